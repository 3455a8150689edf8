"""Verdicts: what the records of a scale say of a claim, by the protocol alone.

    judge("C8", "gpu")      protocol.yaml -> estimates over paired seeds -> Holm -> labels of parts -> label of the claim

Nothing here trains, measures or needs a notebook: what isn't there is "not run".
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from ecmoe.config import RunConfig
from ecmoe.measures.measure import measure
from ecmoe.study import estimate, repeats, steps
from ecmoe.study.arms import size
from ecmoe.study.estimate import Estimate, Unit, amount, counted, span, tolerance
from ecmoe.study.parameters import merge_parameters, parameter_files
from ecmoe.study.plan import Planned, arms_of, configs, plan, record, sound
from ecmoe.study.protocol import Claim, Part, find_claim, protocol
from ecmoe.training.result import Result, read_record

REPRODUCED, IN_DIRECTION, NO_EFFECT = "reproduced", "reproduced in direction", "no effect"
CONTRADICTED, UNDECIDED, NOT_RUN = "contradicted", "undecided", "not run"
PLUMBING = "plumbing only"  # of scale smoke: whatever its numbers say
# A claim is as good as the weakest of its deciding parts: the last of these.
WEAKEST_LAST = (REPRODUCED, IN_DIRECTION, NOT_RUN, UNDECIDED, NO_EFFECT, CONTRADICTED)
LABELS = (REPRODUCED, IN_DIRECTION, NO_EFFECT, CONTRADICTED, UNDECIDED, NOT_RUN, PLUMBING)


@dataclass(frozen=True)
class JudgedPart:
    """A part of a claim as the records have it.

    estimate, low, high: in `unit`; None where nothing, or too little, is there. seeds: how many. smallest: the smallest true
    effect that they would have shown (of a ratio the factor). needs: seeds, as noisy as these, that would decide the margin.
    level: of the interval, after Holm. figure: the paper's.
    compares: a difference, rather than how large something is. missing: "arm s2" of the runs that it lacks.
    mixed: what differs among its runs that mustn't. repeats: runs whose repeats show that their codes compute the same.
    """

    name: str
    label: str
    sentence: str
    estimate: float | None
    low: float | None
    high: float | None
    unit: Unit
    seeds: int
    of: str
    smallest: float | None
    needs: int | None
    level: float
    decides: bool
    compares: bool
    figure: float | None
    neutral: float
    margin: float
    rule: str
    missing: tuple[str, ...]
    mixed: tuple[str, ...]
    repeats: tuple[str, ...]


@dataclass(frozen=True)
class RestsOn:
    """What a verdict rests on: runs, or turns of a bench. mixed: "code", "card": what differs within a deciding comparison."""

    size: str
    tokens: int
    seeds: tuple[int, ...]
    runs: int
    cards: tuple[str, ...]
    codes: tuple[str, ...]
    mixed: tuple[str, ...]
    turns: int = 0
    repeats: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.turns:
            return f"{counted(self.turns, 'turn')} of training steps of {self.size}, on {', '.join(self.cards)}"
        if not self.runs:
            return "no run"
        seeds = f"seed{'s' * (len(self.seeds) > 1)} {', '.join(map(str, self.seeds))}"
        cards = ", ".join(self.cards) or "an unknown device"
        return f"{self.runs} runs of {self.tokens / 1e6:,.0f} million tokens ({seeds}) of {self.size}, on {cards}"


@dataclass(frozen=True)
class ClaimVerdict:
    """A claim's label, in one plain sentence, with its parts and what it rests on. command: what would run what is missing."""

    claim: str
    scale: str
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


def judge(claim: str, scale: str, *, page: str | None = None) -> ClaimVerdict:
    """The verdict on a claim, from protocol, plan and records.

    Args:
        claim: "C1" ... "C10", "L1", "L2". scale: whose records are read; at smoke the label is "plumbing only".
        page: whose arms are judged, where not the claim's own: what another size says. Parts whose arms it doesn't train are
            left out.

    Raises:
        ConfigError: there is no such claim.
    """
    find_claim(claim)
    return _judge(claim, scale, page, plan(scale))


def judge_all(scale: str) -> dict[str, ClaimVerdict]:
    """Claim -> verdict, of all claims in the paper's order."""
    planned, _ = sound(scale)  # a page that can't be planned hides no claim of another
    return {claim: _judge(claim, scale, None, planned) for claim in protocol().claims}


def _judge(claim: str, scale: str, page: str | None, planned: Sequence[Planned]) -> ClaimVerdict:
    about = find_claim(claim)
    further = about.arms if page in (None, about.page) else ()
    return of_evidence(about, Evidence(scale, page or about.page, planned, further))


def of_evidence(about: Claim, evidence: Evidence) -> ClaimVerdict:
    """The verdict on a claim, whatever the evidence is read from."""
    parts = _parts(about, evidence)
    found = {part.name: _estimate(part, evidence) for part in parts}
    family = [part for part in parts if part.name in {one.name for one in about.family}]
    of_family = holm([(part, found[part.name]) for part in family])
    levels = dict.fromkeys(found, protocol().level) | {
        part.name: level for part, level in zip(family, of_family, strict=True)
    }
    labels = {part.name: label_of(part, found[part.name], levels[part.name]) for part in parts}
    judged = {
        part.name: _judged(part, labels[part.name], found[part.name], levels[part.name], evidence) for part in parts
    }
    for part in parts:
        helping = judged.get(part.or_direction or "")
        if helping and helping.label in (REPRODUCED, IN_DIRECTION) and labels[part.name] in WEAKEST_LAST[3:]:
            both = f"{judged[part.name].sentence}, but {helping.sentence}"  # not by as much, but on its side
            judged[part.name] = replace(judged[part.name], label=IN_DIRECTION, sentence=both)
    if evidence.scale == "smoke":
        judged = {k: v if v.label == NOT_RUN else replace(v, label=PLUMBING) for k, v in judged.items()}
        label = PLUMBING
    else:
        label = weakest([part.label for part in judged.values() if part.decides])
    return ClaimVerdict(
        claim=about.id,
        scale=evidence.scale,
        label=label,
        sentence=_sentence(label, list(judged.values())),
        parts=tuple(judged.values()),
        rests_on=_rests_on(parts, list(judged.values()), evidence),
        command=_command(about, evidence),
        about=about,
    )


def _parts(about: Claim, evidence: Evidence) -> list[Part]:
    """All parts on the claim's own page; elsewhere those whose arms are there.

    Where a part is left out that another could make "in direction", that other one decides.
    """
    if evidence.page == about.page:
        return list(about.parts)
    there = [part for part in about.parts if part.arms and set(part.arms) <= set(evidence.arms)]
    instead = {part.or_direction for part in about.parts if part not in there}
    return [replace(part, decides=True) if part.name in instead else part for part in there]


def _command(about: Claim, evidence: Evidence) -> str:
    if about.arms:
        return f"ecmoe runs {evidence.page} --scale {evidence.scale} --train"
    return f"ecmoe bench all --scale {evidence.scale}"


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
    figure = None if part.figure is None else unit.inner(part.figure) if unit is Unit.RATIO else part.figure
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
    low, high = -12.0, math.log10(0.5)  # of log10 alpha
    if label_of(part, found, 1 - 10**high) in (NOT_RUN, UNDECIDED):
        return 1.0
    for _ in range(40):
        middle = (low + high) / 2
        decided = label_of(part, found, 1 - 10**middle) != UNDECIDED
        low, high = (low, middle) if decided else (middle, high)
    return 10**high


def weakest(labels: Sequence[str]) -> str:
    """The label of a claim whose parts have these: what one part refutes stays refuted, whatever the others would say."""
    if all(label == NOT_RUN for label in labels):
        return NOT_RUN
    worst = max(labels, key=WEAKEST_LAST.index)
    return UNDECIDED if worst == NOT_RUN else worst


# Estimates


class Evidence:
    """What is there of a page's arms at a scale, read from reports/<scale> when it is asked for."""

    def __init__(self, scale: str, page: str, everything: Sequence[Planned] = (), further: Sequence[str] = ()) -> None:
        """everything: the plan of the scale. further: arms beside the page's own, as they would be there."""
        self.scale, self.page, self._everything, self._further = scale, page, everything, further

    @cached_property
    def planned(self) -> dict[str, dict[int, Planned]]:
        """Arm -> seed -> the planned run: of the page's arms, by whichever page plans the very same run."""
        values = merge_parameters(parameter_files(self.page, self.scale))
        arms = arms_of(values, self.scale)
        arms |= arms_of({"base": values["base"], "arms": [arm for arm in self._further if arm not in arms]}, self.scale)
        by_config: dict[str, list[str]] = {}
        for arm, (config,) in configs(values["base"], arms, [0]).items():
            by_config.setdefault(config.name, []).append(arm)
        found: dict[str, dict[int, Planned]] = {}
        for one in self._everything:
            for arm in by_config.get(one.config.replace(seed=0).name, ()):
                found.setdefault(arm, {})[one.seed] = one
        return found

    @cached_property
    def _summaries(self) -> dict[str, dict[int, dict[str, Any]]]:
        return {}

    @property
    def arms(self) -> list[str]:
        """That the page trains."""
        return list(self.planned)

    def config(self, arm: str) -> RunConfig | None:
        """Of its first seed; None: not planned."""
        by_seed = self.planned.get(arm)
        return by_seed[min(by_seed)].config if by_seed else None

    def summaries(self, arm: str) -> dict[int, dict[str, Any]]:
        """Seed -> summary, of the runs that have a record."""
        if arm not in self._summaries:
            files = {seed: record(one, self.scale) for seed, one in self.planned.get(arm, {}).items()}
            self._summaries[arm] = {s: read_record(path).summary for s, path in sorted(files.items()) if path.exists()}
        return self._summaries[arm]

    @cached_property
    def repeats(self) -> list[dict[str, Any]]:
        """Runs of the scale that were trained again, as `ecmoe again` kept them."""
        return repeats.kept(self.scale)

    def missing(self, arm: str) -> list[int]:
        """Seeds that are planned and not there, or broke off."""
        done = {seed for seed, summary in self.summaries(arm).items() if summary["status"] == "finished"}
        return sorted(set(self.planned.get(arm, {})) - done)

    def values(self, arm: str, column: str) -> dict[int, float]:
        """Seed -> a number of the summary, or `what/row` of a measurement; of finished runs."""
        what, _, row = column.partition("/")
        found = {}
        for seed, summary in self.summaries(arm).items():
            if summary["status"] != "finished":
                continue
            value = (
                _of_rows(self.measured(arm, seed, what), what, row)
                if row
                else (summary | (summary.get("routing") or {})).get(column)
            )
            if value is not None and math.isfinite(value):
                found[seed] = float(value)
        return found

    def measured(self, arm: str, seed: int, what: str) -> list[dict[str, Any]]:
        """What was measured on a run under that name, for each of what it was to be measured for; empty, where one is missing."""
        one, result = self.planned[arm][seed], Result(self.summaries(arm)[seed])
        asked = [how for how in one.measures if how.what == what]
        found = [measure(result, how, scale=self.scale, train=False, keep=True) for how in asked]
        return [] if None in found else found

    def right(self, arm: str, of: str) -> dict[int, list[np.ndarray]]:
        """Seed -> for each task, (N,): was each validation example right? of: accuracy, accuracy_causal; less the majority's share."""
        which, _, less = of.partition(" - ")
        key = {"accuracy": "right", "accuracy_causal": "right_causal"}[which]
        found = {}
        for seed in self.values(arm, "val_loss"):
            tasks = self.measured(arm, seed, "fine-tuned")
            if tasks and all(key in task for task in tasks):
                found[seed] = [
                    _bits(task[key], task["rows"][0]) - (task["rows"][0][less] if less else 0.0) for task in tasks
                ]
        return found

    def bench(self, a: str, b: str, routing: str) -> Estimate:
        """Time of a step of a over b's, each on its best path, turn by turn."""
        return steps.step_ratio(self.scale, a, b, routing)

    def bench_setting(self) -> tuple[str, str]:
        """The size of the models whose steps were timed, and the device."""
        return steps.setting(self.scale)

    def step_time(self, a: str, b: str) -> float:
        """A step of a over a step of b, each alone on one device; NaN where that isn't measured."""
        return steps.step_times(self.scale, a, b)


def _estimate(part: Part, evidence: Evidence) -> Estimate:
    if part.how == "bench":
        return evidence.bench(part.a[0], part.b[0], part.of)
    if part.how == "accuracy":
        return _accuracy(part, evidence)
    if part.how == "spread":
        a, b = (_by_seed(part, evidence, arm).values() for arm in (part.a[0], part.b[0]))
        return estimate.spread_ratio(a, b)
    if part.how in ("steps", "time"):
        return _steps(part, evidence)
    a, b = ([_by_seed(part, evidence, arm) for arm in arms] for arms in (part.a, part.b))
    return estimate.of_values(
        (_one(part, seed, a) - (_one(part, seed, b) if b else 0.0) for seed in estimate.shared(*a, *b)), part.unit
    )


def _by_seed(part: Part, evidence: Evidence, arm: str) -> dict[int, float]:
    """Seed -> what `of` asks for."""
    terms = [(sign, evidence.values(arm, column)) for sign, column in part.terms]
    return {seed: sum(sign * of[seed] for sign, of in terms) for seed in estimate.shared(*(of for _, of in terms))}


def _one(part: Part, seed: int, arms: Sequence[Mapping[int, float]]) -> float:
    """A seed's mean over arms, or their slope."""
    values = [arm[seed] for arm in arms]
    return estimate.slope(values, part.over) if part.over else float(np.mean(values))


def _steps(part: Part, evidence: Evidence) -> Estimate:
    """The share of its steps at which a reaches b's loss; as time, times what a step of a takes over one of b."""
    a, target = [_by_seed(part, evidence, arm) for arm in part.a], _by_seed(part, evidence, part.b[0])
    shares = [
        estimate.share_of_steps([arm[seed] for arm in a], part.over, target[seed])
        for seed in estimate.shared(*a, target)
    ]
    found = estimate.of_values(shares, Unit.RATIO)
    return found.times(evidence.step_time(part.a[-1], part.b[0])) if part.how == "time" else found


def _accuracy(part: Part, evidence: Evidence) -> Estimate:
    a = evidence.right(part.a[0], part.of)
    b = evidence.right(part.b[0], part.of) if part.b else {seed: [0.0] * len(tasks) for seed, tasks in a.items()}
    seeds = estimate.shared(a, b)
    return estimate.crossed([[x - y for x, y in zip(a[seed], b[seed], strict=True)] for seed in seeds], part.unit)


def _of_rows(found: Sequence[Mapping[str, Any]], what: str, row: str) -> float | None:
    """The number of a measurement's row: a loss by way of routing; bits of the probe beyond the model's own prediction, in nats."""
    rows = found[0]["rows"] if found else []
    if what == "losses":
        return next((r["loss"] for r in rows if r["way"] == row), None)
    beyond = rows[-1]["given"] if rows else None  # the last, which alone tells a leak from honest prediction
    bits = next((r["bits"] for r in rows if r["routing"] == row and r["given"] == beyond), None)
    return None if bits is None else bits * math.log(2)


def _bits(packed: str, row: Mapping[str, Any]) -> np.ndarray:
    return np.unpackbits(np.frombuffer(base64.b64decode(packed), np.uint8), count=row["validation"]).astype(float)


# In words


def _judged(part: Part, label: str, found: Estimate, level: float, evidence: Evidence) -> JudgedPart:
    interval = found.interval(level)
    low, high = interval or (None, None)
    smallest = found.smallest(level, protocol().power) if found.n else math.nan
    runs = [summary for arm in part.arms for summary in evidence.summaries(arm).values()]
    linked = repeats.linked(runs, evidence.repeats)
    mixed = {"code": linked is None, "card": len({run.get("device") for run in runs}) > 1}
    return JudgedPart(
        name=part.name, label=label, sentence=_found(part, label, found, level), unit=part.unit,
        estimate=found.value if found.n else None, low=low, high=high, seeds=found.n, of=found.of,
        smallest=smallest if math.isfinite(smallest) else None,
        needs=found.seeds_for(part.margin, level, protocol().power) if found.n else None, level=level, decides=part.decides, compares=part.compares,
        figure=part.figure, neutral=part.neutral, margin=part.margin, rule=part.rule,
        missing=tuple(f"{arm} s{seed}" for arm in part.arms for seed in evidence.missing(arm)),
        mixed=tuple(what for what, differs in mixed.items() if differs), repeats=tuple(linked or ()),
    )  # fmt: skip


def _found(part: Part, label: str, found: Estimate, level: float) -> str:
    """The sentence of a part: its number, interval and seeds, and what keeps it from a better label."""
    if not found.n:
        return f"{part.name}: not run"
    below, above = part.sides
    value = found.value - part.neutral if part.compares and part.unit is not Unit.RATIO else found.value
    size = amount(abs(value) if part.compares else value, part.unit, compares=part.compares)
    text = part.found.format(size=size, side=below if value < 0 else above)
    inner = found.interval(level)
    seeds = counted(found.n, found.of)
    if inner is None:
        return f"{text} ({seeds}, no interval)"
    low, high = inner
    if part.compares and part.unit is not Unit.RATIO and value < 0:  # like the size: towards the side that is named
        low, high = -high, -low
    text += f" ({span(low, high, part.unit)}; {seeds})"
    if label == NO_EFFECT:
        text += f", which counts as equal (by {tolerance(part.margin, part.unit)} or less)"
    elif label == UNDECIDED and found.of == "seed" and found.n < protocol().least_seeds:
        text += f"; a verdict needs {protocol().least_seeds} seeds"
    elif label == UNDECIDED:
        needs = found.seeds_for(part.margin, level, protocol().power)
        text += ", which doesn't decide it" + (f"; {needs} seeds would" if needs and needs > found.n else "")
    elif label == IN_DIRECTION and part.figure is not None:
        text += f"; the paper: {amount(part.figure, part.unit, compares=part.compares)}"
    return text


def _sentence(label: str, judged: Sequence[JudgedPart]) -> str:
    deciding = [part for part in judged if part.decides]
    if label == PLUMBING:
        return "A tiny model and a few steps: this shows that every part works, and says nothing about the claim."
    if label == NOT_RUN or not deciding:
        return "Not run yet."
    ran = [part for part in deciding if part.label != NOT_RUN]
    shown = max(ran, key=lambda part: WEAKEST_LAST.index(part.label))
    text = shown.sentence[0].upper() + shown.sentence[1:]
    if len(deciding) > 1:
        good = sum(part.label in (REPRODUCED, IN_DIRECTION) for part in deciding)
        holds = {0: "None", len(deciding): "All"}.get(good, str(good))
        text += f". {holds} of the {len(deciding)} parts of the claim {'holds' if good == 1 else 'hold'}"
        left = len(deciding) - len(ran)
        text += f", {left} did not run" if left else ""
    return text + "."


def _rests_on(parts: Sequence[Part], judged: Sequence[JudgedPart], evidence: Evidence) -> RestsOn:
    turns = max((part.seeds for part in judged if part.decides and part.of == "turn"), default=0)
    if turns:
        size_of, card = evidence.bench_setting()
        return RestsOn(size_of, 0, (), 0, (card,), (), (), turns)
    arms = list(dict.fromkeys(arm for part in parts if part.decides for arm in part.arms))
    runs = {
        s["name"]: s for arm in arms for s in evidence.summaries(arm).values() if s["status"] == "finished"
    }.values()
    configs = [config for config in map(evidence.config, arms) if config is not None]

    def distinct(key: str) -> tuple[str, ...]:
        return tuple(sorted({str(run[key]) for run in runs if run.get(key)}))

    return RestsOn(
        size=size(configs) if configs else "",
        tokens=max((config.steps * config.tokens_per_batch for config in configs), default=0),
        seeds=tuple(sorted({run["seed"] for run in runs})),
        runs=len(runs),
        cards=distinct("device"),
        codes=distinct("code"),
        mixed=tuple(sorted({name for part in judged if part.decides for name in part.mixed})),
        repeats=tuple(sorted({run for part in judged if part.decides for run in part.repeats})),
    )
