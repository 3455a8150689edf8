"""Read configs/protocol.yaml: each claim of the paper and the rules that judge it, fixed before the runs.

Zhou et al., "Mixture-of-Experts with Expert Choice Routing", NeurIPS 2022 (arXiv 2202.09368).
"""

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from ecmoe import paths
from ecmoe.config import ConfigError
from ecmoe.files import check_known, read_yaml
from ecmoe.measures import MEASURES
from ecmoe.model.metrics import METRICS
from ecmoe.study.parameters import Held, held_to
from ecmoe.study.plan import Planned, by_arm, named_arms
from ecmoe.study.units import Unit, amount, figure, tolerance

OneOrMore = BeforeValidator(lambda value: value if isinstance(value, list | tuple) else [value])
Share = Annotated[float, Field(gt=0, lt=1)]
Margin = Annotated[float, Field(gt=0)]
RATIOS = ("steps", "time", "bench", "spread")


@dataclass(frozen=True)
class Part(Held):
    """One comparison within a claim; configs/protocol.yaml explains the keys."""

    name: str
    a: Annotated[tuple[str, ...], OneOrMore, Field(min_length=1)]
    says: Literal["below", "above", "at or below", "near"]
    found: str
    of: str
    b: Annotated[tuple[str, ...], OneOrMore] = ()
    how: Literal["difference", "steps", "time", "bench", "accuracy", "spread"] = "difference"
    decides: bool = False
    told: bool = False
    over: Annotated[tuple[float, ...], OneOrMore] = ()
    figure: float | None = None
    neutral: float = 0.0
    margin: Margin = 0.0
    sides: tuple[str, str] = ("below", "above")
    or_direction: str | None = None
    direction: str = ""

    @property
    def unit(self) -> Unit:
        if self.how in RATIOS:
            return Unit.RATIO
        shares = [metric.name for metric in METRICS if metric.unit == "share"]
        return Unit.SHARE if self.how == "accuracy" or self.terms[0][1] in shares else Unit.NATS

    @property
    def compares(self) -> bool:
        """Whether the estimate is a difference, rather than the size of a quantity."""
        return bool(self.b or " - " in self.of or self.over)

    @property
    def sign(self) -> float:
        """1 if larger effects are on the claim's side, -1 if smaller ones are."""
        return 1.0 if self.says in ("above", "near") else -1.0

    @property
    def origin(self) -> float:
        """The value, in the unit, from which effects count: that of no effect, or the figure that a "near" part claims."""
        return self.figure if self.says == "near" and self.figure is not None else self.neutral

    @property
    def arms(self) -> tuple[str, ...]:
        """The trained arms that the part compares, each once; none for a bench."""
        return () if self.how == "bench" else tuple(dict.fromkeys(self.a + self.b))

    @property
    def terms(self) -> list[tuple[int, str]]:
        """`of` as signs and columns: "share_1 + share_2" is [(1, "share_1"), (1, "share_2")]."""
        signed = self.of.replace(" - ", "|-").replace(" + ", "|").split("|")
        return [(-1 if term.startswith("-") else 1, term.removeprefix("-")) for term in signed]

    @property
    def measured(self) -> set[str]:
        """The measurements that the part rests on."""
        columns = {column.partition("/")[0] for _, column in self.terms if "/" in column}
        return {"fine-tuned"} if self.how == "accuracy" else columns

    @property
    def rule(self) -> str:
        """The rule in words, as a page shows it beside the estimate."""
        equal, neutral = tolerance(self.margin, self.unit), f"{self.neutral:g}"
        if self.neutral and self.unit is not Unit.RATIO:
            neutral = amount(self.neutral, self.unit)
        if self.says == "near":
            return f"within {equal} of {figure(self.figure, self.unit)}"
        if self.says == "at or below":
            helped = f"; in direction if {self.direction} (\u201c{self.or_direction}\u201d)" * bool(self.or_direction)
            return f"at or below {neutral}; above it by {equal} or less counts as equal{helped}"
        if self.figure is None:
            return f"{self.says} {neutral} by more than {equal}, which counts as equal"
        paper = figure(self.figure, self.unit)
        return f"{self.says} {paper}, the paper's figure; {self.says} {neutral} by more than {equal}: in direction"


@dataclass(frozen=True)
class Claim(Held):
    """A claim of the paper. short: in a few words. paper, where: the paper's result and its section. proxy: what is measured
    instead, if the claim can't be tested directly. differences: from the paper's setting. page: the page that tests it."""

    id: str
    page: str
    short: str
    claim: str
    paper: str
    where: str
    refuted_by: str
    differences: str
    parts: tuple[Part, ...]
    proxy: str = ""

    @property
    def family(self) -> tuple[Part, ...]:
        """The parts judged together by Holm's method: those that decide, and those that their `or_direction` names."""
        helping = {part.or_direction for part in self.parts if part.decides}
        return tuple(part for part in self.parts if part.decides or part.name in helping)

    @property
    def arms(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(arm for part in self.parts for arm in part.arms))

    @property
    def timed(self) -> bool:
        return any(part.how in ("time", "bench") for part in self.parts)

    def runs(self, scale: str, planned: Sequence[Planned]) -> dict[str, dict[int, Planned]]:
        """Return arm -> seed -> run that the parts compare, whichever page plans it. planned: the plan of the scale."""
        return by_arm(self.page, scale, planned, self.arms)


@dataclass(frozen=True)
class Amendment(Held):
    """A change of the rules made after looking at runs that they judge."""

    date: datetime.date
    claims: list[str]
    what: str
    why: str


@dataclass(frozen=True)
class Protocol(Held):
    """The rules for all claims, and the claims by id, in the paper's order. margins: what counts as equal where no claim says otherwise."""

    level: Share
    least_seeds: Annotated[int, Field(ge=2)]
    power: Share
    margins: dict[Unit, Margin]
    amendments: list[Amendment]
    claims: dict[str, Claim]


@cache
def protocol() -> Protocol:
    """Return the validated content of configs/protocol.yaml. A ConfigError names claim, part, key, value, and what would be right."""
    values = held_to(dict[str, Any], read_yaml(paths.configs() / "protocol.yaml", "protocol"), "protocol")
    values.pop("lists", None)  # YAML anchors: lists of arms that the parts refer to
    margins = held_to(dict[Unit, Margin], values.get("margins"), "protocol: margins")
    claims = held_to(dict[str, dict[str, Any]], values.pop("claims", None), "protocol: claims")
    values["claims"] = {id: _claim(id, keys, margins) for id, keys in claims.items()}
    return held_to(Protocol, values, "protocol")


def find_claim(id: str) -> Claim:
    """Return the claim with this id. Raise a ConfigError if there is none."""
    check_known("claim", [id], protocol().claims)
    return protocol().claims[id]


def _claim(id: str, keys: Mapping[str, Any], margins: Mapping[Unit, float]) -> Claim:
    keys, where = dict(keys), f"claim {id}"
    margins = {**margins, **held_to(dict[Unit, Margin], keys.pop("margins", {}), f"{where}: margins")}
    listed = held_to(list[dict[str, Any]], keys.pop("parts", None), f"{where}: parts")
    parts = tuple(_part(where, part, margins) for part in listed)
    names = [part.name for part in parts]
    for part in parts:
        if names.count(part.name) > 1:
            raise ConfigError(f"{where}: two parts have the name {part.name!r}")
        if part.or_direction not in (None, *names):
            raise ConfigError(f"{where}, part {part.name!r}: or_direction={part.or_direction!r} isn't one of its parts")
    if not any(part.decides for part in parts):
        raise ConfigError(f"claim {id}: one part or more must have decides: true")
    if "page" in keys and not (paths.configs() / f"{keys['page']}.yaml").exists():
        raise ConfigError(f"{where}: page={keys['page']!r}: there is no configs/{keys['page']}.yaml")
    return held_to(Claim, keys | {"id": id, "parts": parts}, where)


def _part(where: str, keys: Mapping[str, Any], margins: Mapping[Unit, float]) -> Part:
    where = f"{where}, part {keys.get('name')!r}"
    part = held_to(Part, keys, where)
    check_known(f"{where}: there is no arm", part.arms, named_arms(), "see configs/arms.yaml")
    try:
        part.found.format(size="", side="")
    except (LookupError, ValueError) as error:
        raise ConfigError(f"{where}: found={part.found!r} may contain only {{size}} and {{side}}: {error}") from error
    for _, column in part.terms if part.how not in ("bench", "accuracy") else ():
        what, _, row = column.partition("/")
        if what not in (MEASURES if row else [metric.name for metric in METRICS]):
            raise ConfigError(f"{where}: of={part.of!r}: there is no {'measurement' if row else 'metric'} {what!r}")
    if part.or_direction and not part.direction:
        raise ConfigError(f"{where}: or_direction needs `direction`, which says in words what that part shows")
    if part.says == "near" and part.figure is None:
        raise ConfigError(f"{where}: says=near needs a figure")
    if part.over and len(part.over) != len(part.a):
        raise ConfigError(f"{where}: over has {len(part.over)} numbers for {len(part.a)} arms")
    if part.unit not in margins:
        raise ConfigError(f"{where}: unit={part.unit!s}: margins has no entry for {part.unit!s}")
    return held_to(Part, {"margin": margins[part.unit], "neutral": part.unit.outer(0.0)} | keys, where)
