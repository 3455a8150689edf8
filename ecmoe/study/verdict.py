"""Verdicts: a claim's label in one plain sentence, with its parts and what it rests on.

    judge("C8", "gpu")      protocol.yaml -> estimates over paired seeds -> Holm -> labels of parts -> label of the claim

Nothing here trains, measures or needs a notebook: what isn't there is "not run".
"""

import bisect
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ecmoe.config import RunConfig
from ecmoe.study import repeats, speed
from ecmoe.study.estimate import Estimate, Unit, amount, counted, span, tolerance
from ecmoe.study.evidence import Evidence
from ecmoe.study.plan import Planned, plan, sound
from ecmoe.study.protocol import Claim, Part, find_claim, protocol

REPRODUCED, IN_DIRECTION, NO_EFFECT = "reproduced", "reproduced in direction", "no effect"
CONTRADICTED, UNDECIDED, NOT_RUN = "contradicted", "undecided", "not run"
PLUMBING = "plumbing only"  # of scale smoke: whatever its numbers say
# A claim is as good as the weakest of its deciding parts: the last of these.
WEAKEST_LAST = (REPRODUCED, IN_DIRECTION, NOT_RUN, UNDECIDED, NO_EFFECT, CONTRADICTED)


@dataclass(frozen=True, kw_only=True)
class JudgedPart(Part):
    """A part of a claim as the records have it.

    level: of its interval, after Holm. missing: "arm s2" of the runs that it lacks. mixed: "code", "card": what differs among its
    runs that mustn't. repeats: runs whose repeats show that their codes compute the same.
    """

    label: str
    sentence: str
    effect: Estimate
    level: float
    missing: tuple[str, ...]
    mixed: tuple[str, ...]
    repeats: tuple[str, ...]

    @property
    def interval(self) -> tuple[float, float] | None:
        """In the unit; None for fewer than two seeds, or turns of a bench."""
        return self.effect.interval(self.level)

    @property
    def smallest(self) -> float:
        """The smallest true effect that as many would have shown (of a ratio the factor); NaN as the interval is None."""
        return self.effect.smallest(self.level, protocol().power)


@dataclass(frozen=True)
class RestsOn:
    """What a sentence rests on: runs, or turns of a bench.

    tokens: the fewest and the most that a run was trained on. mixed, repeats: of the comparisons that decide a verdict.
    """

    size: str = ""
    tokens: tuple[int, int] = (0, 0)
    seeds: tuple[int, ...] = ()
    runs: int = 0
    cards: tuple[str, ...] = ()
    mixed: tuple[str, ...] = ()
    repeats: tuple[str, ...] = ()
    turns: int = 0

    @classmethod
    def of(cls, runs: Collection[Mapping[str, Any]], configs: Sequence[RunConfig], **more: Any) -> "RestsOn":
        """Of finished runs' summaries, and the configs of their arms."""
        tokens = [config.steps * config.tokens_per_batch for config in configs] or [0]
        return cls(
            size=size(configs) if configs else "",
            tokens=(min(tokens), max(tokens)),
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
        """ "52 million tokens", "26 to 52 million tokens"."""
        unit, word = (1e6, " million") if self.tokens[0] >= 1e6 else (1, "")
        return f"{' to '.join(f'{n / unit:,.0f}' for n in dict.fromkeys(self.tokens))}{word} tokens"


@dataclass(frozen=True)
class ClaimVerdict:
    """A claim's label, in one plain sentence, with its parts and what it rests on. command: what would run what is missing."""

    claim: str
    label: str
    sentence: str
    parts: tuple[JudgedPart, ...]
    rests_on: RestsOn
    command: str
    about: Claim

    @property
    def deciding(self) -> tuple[JudgedPart, ...]:
        """The parts that make the label."""
        return tuple(part for part in self.parts if part.decides)

    @property
    def said(self) -> str:
        """The label; where only some of the deciding parts have it, of how many: "no effect in 1 of 2 parts"."""
        some, all_parts = sum(part.label == self.label for part in self.deciding), len(self.deciding)
        return f"{self.label} in {some} of {all_parts} parts" if 0 < some < all_parts else self.label

    @property
    def lacks(self) -> bool:
        """Would a run tell more about the label?"""
        names = {part.name for part in self.about.family}
        return any(part.missing or part.label == NOT_RUN for part in self.parts if part.name in names)


def judge(claim: str, scale: str, *, page: str | None = None, planned: Sequence[Planned] | None = None) -> ClaimVerdict:
    """The verdict on a claim, from protocol, plan and records.

    Args:
        claim: "C1" ... "C10", "L1", "L2". scale: whose records are read; at smoke the label is "plumbing only".
        page: whose arms are judged, where not the claim's own: what another size says. Parts whose arms it doesn't train are
            left out. planned: the plan of the scale, where it is at hand.

    Raises:
        ConfigError: there is no such claim.
    """
    about = find_claim(claim)
    further = about.arms if page in (None, about.page) else ()
    everything = plan(scale) if planned is None else planned
    return of_evidence(about, Evidence(scale, page or about.page, everything, further))


def judge_all(scale: str) -> dict[str, ClaimVerdict]:
    """Claim -> verdict, of all claims in the paper's order."""
    planned, _ = sound(scale)  # a page that can't be planned hides no claim of another
    return {claim: judge(claim, scale, planned=planned) for claim in protocol().claims}


def of_evidence(about: Claim, evidence: Evidence) -> ClaimVerdict:
    """The verdict on a claim, whatever the evidence is read from."""
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
    deciding = [part for part in judged.values() if part.decides]
    label = PLUMBING if evidence.scale == "smoke" else weakest([part.label for part in deciding])
    missing = [run for part in family.values() for run in evidence.missing(part)]
    pages = dict.fromkeys(evidence.trains(*run) for run in missing) or [evidence.page]
    trains = f"ecmoe runs {' '.join(pages)} --scale {evidence.scale} --train"
    return ClaimVerdict(
        claim=about.id,
        label=label,
        sentence=_sentence(label, deciding),
        parts=tuple(judged.values()),
        rests_on=_rests_on([judged[name] for name in family], evidence),
        command=trains if about.arms else f"ecmoe bench all --scale {evidence.scale}",
        about=about,
    )


def _parts(about: Claim, evidence: Evidence) -> list[Part]:
    """All parts on the claim's own page; elsewhere those whose arms are there.

    Where a part is left out that another could make "in direction", that other one decides.
    """
    if evidence.page == about.page:
        return list(about.parts)
    there = [part for part in about.parts if part.arms and set(part.arms) <= set(evidence.planned)]
    instead = {part.or_direction for part in about.parts if part not in there}
    return [replace(part, decides=True) if part.name in instead else part for part in there]


def _judged(part: Part, found: Estimate, level: float, evidence: Evidence) -> JudgedPart:
    label = label_of(part, found, level)
    together = _compared(part, evidence)
    linked = [repeats.linked(runs, evidence.repeats) for runs in together]
    mixed = {"code": None in linked, "card": any(len({run.get("device") for run in runs}) > 1 for runs in together)}
    return JudgedPart(
        **vars(part),
        label=label,
        sentence=_found(part, label, found, level),
        effect=found,
        level=level,
        missing=tuple(f"{arm} s{seed}" for arm, seed in evidence.missing(part)),
        mixed=tuple(what for what, differs in mixed.items() if differs),
        repeats=tuple(sorted({run for shown in linked for run in shown or ()})),
    )


def _or_direction(part: JudgedPart, other: JudgedPart) -> JudgedPart:
    """A part that isn't reproduced has the other to thank if it is in direction, and is undecided until that one is decided."""
    if part.label not in (UNDECIDED, NO_EFFECT, CONTRADICTED):
        return part
    if other.label in (REPRODUCED, IN_DIRECTION):
        text = f"{part.sentence}, but {part.direction}: {other.sentence}"
        return replace(part, label=IN_DIRECTION, sentence=text)
    if other.label in (UNDECIDED, NOT_RUN):
        text = f"{part.sentence}; open is whether {part.direction}: {other.sentence}"
        return replace(part, label=UNDECIDED, sentence=text)
    return part


def _compared(part: Part, evidence: Evidence) -> list[list[Mapping[str, Any]]]:
    """The summaries that are held against each other: arms are, seed by seed; where spreads are compared, seeds are, too.

    A seed on another card, or with other code, than the next is as good a block as any: its arms share what it adds.
    """
    runs = [run for arm in part.arms for run in evidence.summaries(arm).values()]
    seeds = {run["seed"] for run in runs}
    return [runs] if part.how == "spread" else [[run for run in runs if run["seed"] == seed] for seed in seeds]


def _rests_on(family: Sequence[JudgedPart], evidence: Evidence) -> RestsOn:
    turns = max((part.effect.n for part in family if part.effect.of == "turn"), default=0)
    if turns:
        of, card = speed.setting(evidence.scale)
        return RestsOn(of, cards=(card,), turns=turns)
    arms = [arm for arm in dict.fromkeys(arm for part in family for arm in part.arms) if evidence.finished(arm)]
    runs = {run["name"]: run for arm in arms for run in evidence.finished(arm).values()}.values()
    return RestsOn.of(
        runs,
        [evidence.config(arm) for arm in arms],
        mixed=tuple(sorted({what for part in family for what in part.mixed})),
        repeats=tuple(sorted({run for part in family for run in part.repeats})),
    )


# Labels


def label_of(part: Part, found: Estimate, level: float) -> str:
    """The label of a part at that level, by the protocol's rule."""
    if not found.n:
        return NOT_RUN
    least = protocol().least_seeds if found.of == "seed" else 2
    inner = found.inner(level)
    return UNDECIDED if found.n < least or inner is None else _of_interval(part, *inner)


def _of_interval(part: Part, low: float, high: float) -> str:
    """Low and high on the unit's inner scale."""
    neutral, unit = part.unit.inner(part.neutral), part.unit
    margin = math.log1p(part.margin) if unit is Unit.RATIO else part.margin
    figure = None if part.figure is None else unit.inner(part.figure)
    if part.says == "near":
        if figure - margin <= low and high <= figure + margin:
            return REPRODUCED
        return CONTRADICTED if high < figure - margin or low > figure + margin else UNDECIDED
    sign = 1.0 if part.says == "above" else -1.0
    nearest, farthest = sorted((sign * (low - neutral), sign * (high - neutral)))  # above 0: the claim's side
    if part.says == "at or below":
        return REPRODUCED if nearest > -margin else CONTRADICTED if farthest < -margin else UNDECIDED
    if -margin <= nearest and farthest <= margin:
        return NO_EFFECT
    if nearest > 0:
        enough = margin if figure is None else sign * (figure - neutral)
        return REPRODUCED if nearest >= enough else IN_DIRECTION
    return CONTRADICTED if farthest < 0 else UNDECIDED


def holm(cases: Sequence[tuple[Part, Estimate]]) -> list[float]:
    """The level of each part's interval, so that all labels of the family together are wrong as seldom as the protocol says.

    Holm (1979), step by step: the part that is decided most surely is held to 1 - 0.05 / m, the next to 1 - 0.05 / (m - 1), and
    so on, until one is undecided at its level, which is then that of all others. m counts parts that did not run, too.
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
    """The p-value of the part's label: the least alpha at which it is decided; 1, where none would do.

    An interval within another decides whatever that decides, so it can be searched for by halves.
    """
    alphas = np.logspace(-12, math.log10(0.5), 100_000)
    decided = bisect.bisect_left(alphas, True, key=lambda a: label_of(part, found, 1 - a) not in (NOT_RUN, UNDECIDED))
    return float(alphas[decided]) if decided < len(alphas) else 1.0


def weakest(labels: Sequence[str]) -> str:
    """The label of a claim whose parts have these: what one part refutes stays refuted, whatever the others would say."""
    if all(label == NOT_RUN for label in labels):
        return NOT_RUN
    worst = max(labels, key=WEAKEST_LAST.index)
    return UNDECIDED if worst == NOT_RUN else worst


# In words


def size(configs: Sequence[RunConfig]) -> str:
    """The size of models in words: "8 layers of width 512, 16 to 128 experts"; of experts only where there are some."""

    def span(key: str, of: Sequence[RunConfig]) -> str:
        least, most = (pick(getattr(config, key) for config in of) for pick in (min, max))
        return f"{least}" if least == most else f"{least} to {most}"

    text = f"{span('layers', configs)} layers of width {span('d_model', configs)}"
    moe = [config for config in configs if config.row.layer is not None]
    return f"{text}, {span('num_experts', moe)} experts" if moe else text


def _found(part: Part, label: str, found: Estimate, level: float) -> str:
    """The sentence of a part: its number, interval and seeds, and what keeps it from a better label."""
    if not found.n:
        return f"{part.name}: not run"
    below, above = part.sides
    size = amount(abs(found.value), part.unit, compares=part.compares)
    text = part.found.format(size=size, side=below if found.value < 0 else above)
    ends, seeds = found.interval(level), counted(found.n, found.of)
    if ends and part.compares and found.value < 0:  # like the size: towards the side that is named
        ends = -ends[1], -ends[0]
    text += f" ({span(*ends, part.unit)}; {seeds})" if ends else f" ({seeds}, no interval)"
    if label == NO_EFFECT:
        text += f", which counts as equal (by {tolerance(part.margin, part.unit)} or less)"
    elif label == UNDECIDED and found.of == "seed" and found.n < protocol().least_seeds:
        text += f"; a verdict needs {protocol().least_seeds} seeds"
    elif label == UNDECIDED and ends:
        needs = found.seeds_for(part.margin, level, protocol().power) or 0
        text += ", which doesn't decide it" + f"; {needs} seeds would" * (needs > found.n)
    elif label == IN_DIRECTION and part.figure is not None:
        text += f"; the paper: {amount(part.figure, part.unit, compares=part.compares)}"
    return text


def _sentence(label: str, deciding: Sequence[JudgedPart]) -> str:
    if label == PLUMBING:
        return "A tiny model and a few steps: this shows that every part works, and says nothing about the claim."
    ran = [part for part in deciding if part.label != NOT_RUN]
    if not ran:
        return "Not run yet."
    text = max(ran, key=lambda part: WEAKEST_LAST.index(part.label)).sentence
    text = text[0].upper() + text[1:]
    if len(deciding) > 1:
        counts = Counter(part.label for part in deciding)
        said = ", ".join(f"{counts[label]} {label}" for label in WEAKEST_LAST if counts[label])
        text += f". The claim's {len(deciding)} parts: {said}"
    return text + "."
