"""Judge the paper's claims: a label, a sentence, the parts that decide, and the runs behind them.

    judge("C8", "gpu")      protocol.yaml -> estimates over paired seeds -> Holm -> labels of parts -> label of the claim

Nothing here trains, measures or needs a notebook: missing results are "not run".
"""

import bisect
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ecmoe.config import RunConfig
from ecmoe.study import repeats, speed
from ecmoe.study.estimate import Estimate
from ecmoe.study.evidence import Evidence
from ecmoe.study.plan import by_arm, sound
from ecmoe.study.protocol import Claim, Part, find_claim, protocol
from ecmoe.study.units import Unit, amount, between, counted, figure, span, tolerance

REPRODUCED, IN_DIRECTION, NO_EFFECT = "reproduced", "reproduced in direction", "no effect"
CONTRADICTED, UNDECIDED, NOT_RUN = "contradicted", "undecided", "not run"
PLUMBING = "plumbing only"  # label of everything that ran at scale smoke, whatever its numbers
# A claim gets the label of its weakest deciding part: the one that comes last in this order.
WEAKEST_LAST = (REPRODUCED, IN_DIRECTION, NOT_RUN, UNDECIDED, NO_EFFECT, CONTRADICTED)


@dataclass(frozen=True, kw_only=True)
class JudgedPart(Part):
    """A part of a claim with its label and estimate. missing: (arm, seed) of the runs that it lacks. unrecorded: of finished runs
    whose results lack what it compares. level: of the interval, after Holm."""

    label: str
    sentence: str
    effect: Estimate
    level: float
    missing: tuple[tuple[str, int], ...]
    unrecorded: tuple[tuple[str, int], ...]

    @property
    def interval(self) -> tuple[float, float] | None:
        """The confidence interval in the unit; None for fewer than two seeds (or turns of a bench)."""
        return self.effect.interval(self.level)


@dataclass(frozen=True)
class RestsOn:
    """The runs, or the turns of a bench, that a sentence is based on. tokens: the smallest and largest number of training tokens of
    a run. word: for these tokens. mixed: "code" if compared runs have code versions not shown to agree, "card" if they used different
    kinds of device. repeats: runs that show that versions agree. covered: how many steps each of their repeats compared."""

    size: str = ""
    tokens: tuple[int, int] = (0, 0)
    word: str = "tokens"
    seeds: tuple[int, ...] = ()
    runs: int = 0
    cards: tuple[str, ...] = ()
    mixed: tuple[str, ...] = ()
    repeats: tuple[str, ...] = ()
    covered: tuple[int, ...] = ()
    turns: int = 0

    @classmethod
    def of(cls, runs: Collection[Mapping[str, Any]], configs: Sequence[RunConfig], **more: Any) -> "RestsOn":
        """Build it from the summaries of finished runs and the configs of their arms."""
        tokens = [run["tokens"] for run in runs] or [0]
        return cls(
            size=model_size(configs) if configs else "",
            tokens=(min(tokens), max(tokens)),
            word=token_word(configs),
            seeds=tuple(sorted({run["seed"] for run in runs})),
            runs=len(runs),
            cards=tuple(sorted({run["device"] for run in runs if run.get("device")})),
            **more,
        )

    def __str__(self) -> str:
        cards = ", ".join(self.cards) or "an unknown device"
        if self.turns:
            return f"{counted(self.turns, 'turn')} of training steps of {self.size}, on {cards}"
        if not self.runs:
            return "no run"
        seeds = f"seed{'s' * (len(self.seeds) > 1)} {', '.join(map(str, self.seeds))}"
        return f"{counted(self.runs, 'run')} of {self.trained} ({seeds}) of {self.size}, on {cards}"

    @property
    def trained(self) -> str:
        """The training tokens in words: "52 million tokens", "26 to 52 million patches"."""
        unit, million = (1e6, " million") if self.tokens[0] >= 1e6 else (1, "")
        return f"{between((n / unit for n in self.tokens), ',.0f')}{million} {self.word}"


@dataclass(frozen=True)
class ClaimVerdict:
    """The verdict on a claim: label, sentence, parts, and the runs behind it. command: the shell command that runs what is missing.
    lacks: whether runs that could change the label are missing. A run that finished isn't: no command trains it again."""

    label: str
    sentence: str
    parts: tuple[JudgedPart, ...]
    rests_on: RestsOn
    command: str
    lacks: bool
    about: Claim

    @property
    def deciding(self) -> tuple[JudgedPart, ...]:
        return tuple(part for part in self.parts if part.decides)

    @property
    def said(self) -> str:
        """The label, with a count if only some deciding parts have it: "no effect in 1 of 2 parts"."""
        some, all_parts = sum(part.label == self.label for part in self.deciding), len(self.deciding)
        told = 0 < some < all_parts and self.label != PLUMBING
        return f"{self.label} in {some} of {all_parts} parts" if told else self.label


def judge(claim: str, scale: str, *, page: str | None = None) -> ClaimVerdict:
    """Return the verdict on a claim, such as "C1", from protocol, plan and records. Raise a ConfigError if there is none.

    page: judge the arms of this page instead of the claim's own, such as a page with larger models. Parts whose arms the page
    doesn't train are left out."""
    about = find_claim(claim)
    planned, _ = sound(scale)  # another page that is invalid stops no verdict
    runs = about.runs(scale, planned) if page in (None, about.page) else by_arm(page, scale, planned)
    return of_evidence(about, Evidence(scale, page or about.page, runs))


def judge_all(scale: str) -> dict[str, ClaimVerdict]:
    """Return claim -> verdict for all claims, in the paper's order. Claims of an invalid page count as not run."""
    planned, wrong = sound(scale)
    verdicts = {}
    for id, about in protocol().claims.items():
        runs = {} if about.page in wrong else about.runs(scale, planned)  # making the page reports its error
        verdicts[id] = of_evidence(about, Evidence(scale, about.page, runs))
    return verdicts


def of_evidence(about: Claim, evidence: Evidence) -> ClaimVerdict:
    """Return the verdict on a claim from this evidence."""
    parts = _parts(about, evidence)
    found = {part.name: evidence.estimate(part) for part in parts}
    family = {part.name: part for part in parts if part.name in {one.name for one in about.family}}
    levels = dict.fromkeys(found, protocol().level)
    levels |= zip(family, holm([(part, found[name]) for name, part in family.items()]), strict=True)
    judged = {part.name: _judged(part, found[part.name], levels[part.name], evidence) for part in parts}
    for part in judged.values():
        if part.or_direction in judged:
            judged[part.name] = _or_direction(part, judged[part.or_direction])
    if evidence.scale == "smoke":
        judged = {k: v if v.label == NOT_RUN else replace(v, label=PLUMBING) for k, v in judged.items()}
    parts = tuple(judged.values())
    deciding = [part for part in parts if part.decides]
    label = PLUMBING if evidence.scale == "smoke" else weakest([part.label for part in deciding])
    told = [part for part in parts if part.told]
    sentence = _sentence(label, deciding, told)
    relevant = [judged[name] for name in family]
    lacks = any(part.missing or (part.label == NOT_RUN and not part.unrecorded) for part in relevant)
    planned_by = [evidence.planned[arm][seed].pages for part in relevant for arm, seed in part.missing]
    pages = dict.fromkeys(evidence.page if evidence.page in some else some[0] for some in planned_by) or [evidence.page]
    trains = f"ecmoe runs {' '.join(pages)} --scale {evidence.scale} --train"
    command = trains if about.arms else f"ecmoe bench all --scale {evidence.scale}"
    return ClaimVerdict(label, sentence, parts, _rests_on([*relevant, *told], evidence), command, lacks, about)


def _parts(about: Claim, evidence: Evidence) -> list[Part]:
    """Return all parts on the claim's own page; on another page those whose arms it has. For a part that is left out, the one that
    its `or_direction` names decides."""
    if evidence.page == about.page:
        return list(about.parts)
    there = [part for part in about.parts if part.arms and set(part.arms) <= set(evidence.planned)]
    instead = {part.or_direction for part in about.parts if part not in there}
    return [replace(part, decides=True) if part.name in instead else part for part in there]


def _judged(part: Part, found: Estimate, level: float, evidence: Evidence) -> JudgedPart:
    label = label_of(part, found, level)
    missing, unrecorded = evidence.lacks(part)
    return JudgedPart(
        **vars(part),
        label=label,
        sentence=_found(part, label, found, level, unrecorded),
        effect=found,
        level=level,
        missing=tuple(missing),
        unrecorded=tuple(unrecorded),
    )


def not_recorded(of: str, runs: Sequence[tuple[str, int]]) -> str:
    """Return in words that the results of these runs, (arm, seed), lack what a part compares."""
    seeds = {arm: ", ".join(str(seed) for other, seed in runs if other == arm) for arm, _ in runs}
    return f"{of} is not recorded by {', '.join(f'{arm} (seed {each})' for arm, each in seeds.items())}"


def _or_direction(part: JudgedPart, other: JudgedPart) -> JudgedPart:
    """Relabel a part that isn't reproduced: "in direction" if `other` (its `or_direction`) holds, undecided while `other` is."""
    if part.label in (REPRODUCED, IN_DIRECTION, NOT_RUN) or other.label in (NO_EFFECT, CONTRADICTED):
        return part
    holds = other.label in (REPRODUCED, IN_DIRECTION)
    label, but = (IN_DIRECTION, ", but") if holds else (UNDECIDED, "; open is whether")
    return replace(part, label=label, sentence=f"{part.sentence}{but} {part.direction}: {other.sentence}")


def _compared(part: Part, evidence: Evidence) -> list[list[Mapping[str, Any]]]:
    """Return groups of summaries that are compared directly: all runs if spreads are compared, else the arms of each seed; then the
    same runs as they were measured. Devices and code versions may differ between seeds, because they cancel in the paired difference
    between arms; and those that measured from those that trained."""
    trained = [run for arm in part.arms for run in evidence.summaries(arm).values()]
    of_arms = [(arm, seed, what) for arm in part.arms for seed in evidence.finished(arm) for what in part.measured]
    measured = [run for each in of_arms for run in evidence.as_measured(*each)]
    if part.how == "spread":
        return [trained, measured]
    seeds = {run["seed"] for run in trained}
    return [[run for run in runs if run["seed"] == seed] for runs in (trained, measured) for seed in seeds]


def _rests_on(family: Sequence[JudgedPart], evidence: Evidence) -> RestsOn:
    turns = max((part.effect.n for part in family if part.effect.of == "turn"), default=0)
    if turns:
        of, card = speed.setting(evidence.scale)
        return RestsOn(of, cards=(card,), turns=turns)
    arms = [arm for arm in dict.fromkeys(arm for part in family for arm in part.arms) if evidence.finished(arm)]
    runs = {run["name"]: run for part in family for run in _used(part, evidence)}.values()
    together = [compared for part in family for compared in _compared(part, evidence)]
    kept = repeats.kept(evidence.scale)
    linked = [repeats.linked(compared, kept) for compared in together]
    cards = any(len({run.get("device") for run in compared}) > 1 for compared in together)
    mixed = ("card",) * cards + ("code",) * (None in linked)
    shown = {run for those in linked for run in those or ()}
    more = {"repeats": tuple(sorted(shown)), "covered": tuple(repeats.covered(shown, evidence.scale))}
    return RestsOn.of(runs, [evidence.config(arm) for arm in arms], mixed=mixed, **more)


def _used(part: Part, evidence: Evidence) -> list[Mapping[str, Any]]:
    """Return the summaries of the runs that a part's estimate uses: of the seeds that all its arms have, measured."""
    finished = [(seed, run) for arm in part.arms for seed, run in evidence.finished(arm).items()]
    return [run for seed, run in finished if all(evidence.complete(part, arm, seed) for arm in part.arms)]


def label_of(part: Part, found: Estimate, level: float) -> str:
    """Return the label of a part at this confidence level, by the protocol's rule."""
    if not found.n:
        return NOT_RUN
    if found.n < (protocol().least_seeds if found.of == "seed" else 2):
        return UNDECIDED
    # All on the unit's inner scale, from the part's origin, positive on the claim's side.
    unit, sign, centre = part.unit, part.sign, part.unit.inner(part.origin)
    margin = math.log1p(part.margin) if unit is Unit.RATIO else part.margin
    nearest, farthest = sorted(sign * (end - centre) for end in found.inner(level))
    equal = -margin <= nearest and farthest <= margin
    if part.says == "near":
        return REPRODUCED if equal else CONTRADICTED if farthest < -margin or nearest > margin else UNDECIDED
    if part.says == "at or below":
        return REPRODUCED if nearest > -margin else CONTRADICTED if farthest < -margin else UNDECIDED
    if equal:
        return NO_EFFECT
    if nearest > 0:
        enough = margin if part.figure is None else sign * (unit.inner(part.figure) - centre)
        return REPRODUCED if nearest >= enough else IN_DIRECTION
    return CONTRADICTED if farthest < 0 else UNDECIDED


def holm(cases: Sequence[tuple[Part, Estimate]]) -> list[float]:
    """Return the level of each part's interval, such that the labels of all parts together hold with the protocol's level, 1 - alpha.

    Holm's step-down method (1979): the part with the smallest p-value gets 1 - alpha / m, the next 1 - alpha / (m - 1), and so
    on. The first part that is undecided at its level sets the level of all remaining parts. m includes parts that did not run.
    """
    alpha, m = 1 - protocol().level, len(cases)
    sureness = [_smallest_alpha(part, found) for part, found in cases]
    levels, stopped = [0.0] * m, None
    for rank, i in enumerate(sorted(range(m), key=lambda i: sureness[i])):
        allowed = stopped or alpha / (m - rank)
        if sureness[i] > allowed:
            stopped = allowed
        levels[i] = 1 - allowed
    return levels


def _smallest_alpha(part: Part, found: Estimate) -> float:
    """Return the p-value of the part's label: the smallest alpha at which the label is decided, or 1 if there is none."""
    # A narrower interval decides whatever a wider one decides, so a binary search finds it.
    alphas = np.logspace(-12, math.log10(0.5), 100_000)
    decided = bisect.bisect_left(alphas, True, key=lambda a: label_of(part, found, 1 - a) not in (NOT_RUN, UNDECIDED))
    return float(alphas[decided]) if decided < len(alphas) else 1.0


def weakest(labels: Sequence[str]) -> str:
    """Return the label of a claim: the weakest of its parts' labels, where a part that isn't run counts as undecided."""
    if all(label == NOT_RUN for label in labels):
        return NOT_RUN
    worst = max(labels, key=WEAKEST_LAST.index)
    return UNDECIDED if worst == NOT_RUN else worst


def token_word(configs: Iterable[RunConfig]) -> str:
    """Return the word for what the models process: "patches" of images, or "tokens"."""
    return "patches" if any(config.images for config in configs) else "tokens"


def model_size(configs: Sequence[RunConfig]) -> str:
    """Return the models' size in words: "8 layers of width 512, 16 to 128 experts"; without experts if all are dense."""
    layers, width = between(config.layers for config in configs), between(config.d_model for config in configs)
    experts = between(config.num_experts for config in configs if config.row.layer is not None)
    return f"{layers} layers of width {width}" + f", {experts} experts" * bool(experts)


def _found(part: Part, label: str, found: Estimate, level: float, unrecorded: Sequence[tuple[str, int]] = ()) -> str:
    """Return the sentence of a part: its value, interval and seeds, and the reason if the label isn't "reproduced"."""
    if not found.n:
        return f"{part.name}: {not_recorded(part.of, unrecorded) if unrecorded else 'not run'}"
    below, above = part.sides
    size = amount(abs(found.value), part.unit, compares=part.compares)
    text = part.found.format(size=size, side=below if found.value < 0 else above)
    ends = found.interval(level)
    if ends and part.compares and found.value < 0:  # like `size`, positive towards the side that the sentence names
        ends = -ends[1], -ends[0]
    text += f" ({span(*ends, part.unit)}; {found.sample})" if ends else f" ({found.sample}, no interval)"
    if label == NO_EFFECT:
        text += f", which counts as equal (by {tolerance(part.margin, part.unit)} or less)"
    elif label == UNDECIDED and found.of == "seed" and found.n < protocol().least_seeds:
        text += f"; a verdict needs {protocol().least_seeds} seeds"
    elif label == UNDECIDED and ends:
        needs = found.seeds_for(part.margin, level, protocol().power) or 0
        text += ", which doesn't decide it" + f"; {needs} seeds probably would" * (needs > found.n)
        of_examples = replace(found, mean=0.0, errors=found.errors[1:]).inner(level) if part.how == "accuracy" else None
        if of_examples and of_examples[1] > part.margin:
            told, left = (amount(x, part.unit, compares=True) for x in (part.margin, of_examples[1]))
            text += f"; more seeds alone can't tell {told}, for the validation examples leave {left} either way"
    elif label == IN_DIRECTION and part.figure is not None:
        text += f"; the paper: {figure(part.figure, part.unit, compares=part.compares)}"
    return text


def _sentence(label: str, deciding: Sequence[JudgedPart], told: Sequence[JudgedPart]) -> str:
    """Return the sentence of the claim's weakest part (of several undecided ones, the least favourable), how many parts
    have which label, and the sentences of the parts in `told`."""
    if label == PLUMBING:
        return "A tiny model and a few steps: this shows that every part works, and says nothing about the claim."
    ran = [part for part in deciding if part.label != NOT_RUN]
    if not ran:
        return next((capital(part.sentence) + "." for part in deciding if part.unrecorded), "Not run yet.")
    weakest = max(ran, key=lambda part: WEAKEST_LAST.index(part.label))
    if weakest.label == UNDECIDED:
        weakest = min((part for part in ran if part.label == UNDECIDED and part.effect.n), key=_favour, default=weakest)
    text = capital(weakest.sentence)
    if len(deciding) > 1:
        counts = Counter(part.label for part in deciding)
        said = ", ".join(f"{counts[label]} {label}" for label in WEAKEST_LAST if counts[label])
        text += f". The claim's {len(deciding)} parts: {said}"
    return ". ".join([text, *(capital(part.sentence) for part in told if part.label != NOT_RUN)]) + "."


def _favour(part: JudgedPart) -> float:
    """Return how far the estimate is on the claim's side, in margins; for a "near" part, how near, below 0."""
    away = part.sign * (part.effect.mean - part.unit.inner(part.origin)) / part.margin
    return -abs(away) if part.says == "near" else away


def capital(text: str) -> str:
    """Return the text with a capital first letter."""
    return text[0].upper() + text[1:]
