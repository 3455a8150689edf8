"""Effects over paired seeds, their intervals, and verdicts.

Every interval is Student's t at 95% over seeds, and so says how sure we are that another set of
seeds would show the same; ratios are taken in the logarithm. One seed has no interval. Where seeds
were added because a first look at 95% left a claim undecided, the second look is at 97.5%: the two
together err in at most 7.5% of cases, 3.75% to each side.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import optimize
from scipy import stats as scipy_stats

from ecmoe.study.claims import CLAIMS, Claim

__all__ = [
    "CLAIMS", "LABELS", "Claim", "Crossing", "Effect", "Verdict", "all_of", "interval", "looks_at",
    "paired_difference", "ratio_effect", "smallest_effect", "steps_ratio", "steps_ratio_along", "steps_to_equal_loss",
    "verdict",
]  # fmt: skip

LEVEL = 0.95
# From best to worst; `all_of` takes the last of several.
LABELS = (
    "reproduced", "reproduced in direction", "undecided", "not run", "not reproduced",
)  # fmt: skip
PLUMBING = "plumbing only"


class Effect(NamedTuple):
    """A mean over n seeds with its interval; `low` and `high` are None for fewer than two.

    A unit of "ratio", or "ratio of" something, makes it a factor. `of`: what n counts, where it isn't seeds. `looks`: how
    often verdicts were looked at while seeds were added.
    """

    mean: float
    low: float | None
    high: float | None
    n: int
    unit: str = ""
    of: str = "seed"
    looks: int = 1

    @property
    def level(self) -> float:
        """Of the interval: 0.95, or what makes it that over all looks."""
        return _level(self.looks)

    @property
    def ratio(self) -> bool:
        """Is it a factor, rather than a difference?"""
        return self.unit.split(" ")[0] == "ratio"

    @property
    def neutral(self) -> float:
        """Where there is no effect: 1 for a ratio, 0 for a difference."""
        return 1.0 if self.ratio else 0.0

    @property
    def interval(self) -> str:
        """The interval as text."""
        if self.low is None or self.high is None:
            return f"one {self.of}: no interval" if self.n == 1 else "none"
        return f"{_number(self.low)} to {_number(self.high)}"

    def times(self, factor: float, unit: str) -> Effect:
        """The effect in another unit: all of it times a factor that is known; not measured where the factor is NaN."""
        if not self.n or math.isnan(factor):
            return Effect(math.nan, None, None, 0, unit, self.of, self.looks)
        mean, low, high = (None if x is None else x * factor for x in self[:3])
        return Effect(mean, low, high, self.n, unit, self.of, self.looks)

    def __str__(self) -> str:
        if not self.n:
            return "not measured"
        unit = self.unit.replace("ratio of", "x the").replace("ratio", "x")
        unit = f" {unit}" if unit else ""
        seeds = f"{self.n} {self.of}{'s' if self.n > 1 else ''}"
        if self.low is None:
            return f"{_number(self.mean)}{unit} ({seeds}, no interval)"
        return f"{_number(self.mean)}{unit} ({_percent(self.level)} {self.interval}; {seeds})"


class Crossing(NamedTuple):
    """Where a curve first reaches `target`; x is None and censored if it never does."""

    x: float | None
    censored: bool
    target: float


class Verdict(NamedTuple):
    """A label, the effect it rests on, and the rule that led from one to the other.

    rules_out: the paper's figure, where the whole interval misses it, whatever the label says about the direction.
    parts: name and verdict of each, of a claim that has several.
    """

    label: str
    effect: Effect
    rule: str
    rules_out: float | None = None
    parts: tuple[tuple[str, Verdict], ...] = ()

    def __str__(self) -> str:
        """As a part of a claim is put in words."""
        return f"{self.effect} {self.label}" if self.effect.n else self.label


def interval(values: Iterable[float], unit: str = "", of: str = "seed", looks: int = 1) -> Effect:
    """Mean and t interval of values, one a seed; what isn't finite is left out.

    A ratio takes the geometric mean, and needs values above 0. `of`: what there is one value of, if not a seed. `looks`: as
    in `Effect`.
    """
    x = np.array([v for v in values if v is not None and math.isfinite(v)], dtype=float)
    ratio = Effect(math.nan, None, None, 0, unit).ratio
    if ratio and (x <= 0).any():
        raise ValueError(f"ratios must be above 0, but one is {x.min():g}")
    if ratio:
        x = np.log(x)
    if not len(x):
        return Effect(math.nan, None, None, 0, unit, of, looks)
    mean = float(x.mean())
    low = high = None
    if len(x) > 1:
        half = scipy_stats.t.ppf((1 + _level(looks)) / 2, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x))
        low, high = mean - float(half), mean + float(half)
    if ratio:
        mean, low, high = (None if v is None else math.exp(v) for v in (mean, low, high))
    return Effect(mean, low, high, len(x), unit, of, looks)


def paired_difference(
    a: Mapping[int, float], b: Mapping[int, float], unit: str = "nats per token", *, looks: int = 1
) -> Effect:
    """a - b over the seeds that both have; arms with the same seed saw the same batches. `looks`: as in `Effect`."""
    return interval((a[seed] - b[seed] for seed in _shared(a, b)), unit, looks=looks)


def looks_at(arms: Iterable[str], second_look: Iterable[str]) -> int:
    """How often a comparison of these arms was looked at: twice, if one of them is of those that got seeds after a look."""
    return 1 if set(arms).isdisjoint(second_look) else 2


def ratio_effect(a: Mapping[int, float], b: Mapping[int, float]) -> Effect:
    """a / b over the seeds that both have: geometric mean, interval in the logarithm."""
    return interval((a[seed] / b[seed] for seed in _shared(a, b)), "ratio")


def steps_to_equal_loss(
    curve_a: pd.DataFrame, curve_b: pd.DataFrame, column: str = "val_loss", x: str = "step"
) -> Crossing:
    """The first x at which a is down to b's final loss, linearly interpolated.

    Only for constant learning rates: under a decaying schedule it means nothing. Never reached is
    censored, not infinite. A curve without a value is not measured: x None, not censored.
    """
    _, ys = _points(curve_b, column, x)
    return _first_at(curve_a, float(ys[-1]) if len(ys) else math.nan, column, x)


def steps_ratio(
    curves_a: Mapping[int, pd.DataFrame],
    curves_b: Mapping[int, pd.DataFrame],
    column: str = "val_loss",
) -> Effect:
    """Steps that a needs over steps that b needs, seed by seed, for the loss that both reach.

    That loss is the higher of the two final ones: b's, if a ends lower, as in the claim "a needs
    less than half of b's steps"; a's, if b ends lower, and then the ratio is above 1. So no seed is
    censored, and none is left out for having lost.
    """
    ratios = []
    for seed in _shared(curves_a, curves_b):
        a, b = curves_a[seed], curves_b[seed]
        finals = [_points(curve, column, "step")[1] for curve in (a, b)]
        if any(len(ys) == 0 for ys in finals):
            continue
        target = max(float(ys[-1]) for ys in finals)
        at_a, at_b = (_first_at(curve, target, column, "step").x for curve in (a, b))
        if at_a and at_b:
            ratios.append(at_a / at_b)
    return interval(ratios, "ratio of steps")


def steps_ratio_along(
    curves_a: Mapping[int, pd.DataFrame],
    curves_b: Mapping[int, pd.DataFrame],
    column: str = "val_loss",
    points: int = 12,
) -> pd.DataFrame:
    """Steps that a needs over steps that b needs, not at one loss but at all on the way down.

    Returns:
        a row per loss, evenly spread from where all curves begin, that one left out, to what all of them reach: target,
        and the `Effect` over seeds as mean, low, high, n. No row where a seed pair is missing.
    """
    pairs = [(curves_a[seed], curves_b[seed]) for seed in _shared(curves_a, curves_b)]
    losses = [_points(curve, column, "step")[1] for pair in pairs for curve in pair]
    if not losses or any(len(ys) < 2 for ys in losses):
        return pd.DataFrame(columns=["target", "mean", "low", "high", "n"], dtype=float)
    rows = []
    for target in np.linspace(min(ys[0] for ys in losses), max(ys[-1] for ys in losses), points + 1)[1:]:
        at = [[_first_at(curve, target, column, "step").x for curve in pair] for pair in pairs]
        rows.append((target, *interval((a / b for a, b in at), "ratio")[:4]))
    return pd.DataFrame(rows, columns=["target", "mean", "low", "high", "n"]).astype(float)


def smallest_effect(effect: Effect, power: float = 0.8) -> float:
    """The smallest true effect that as many seeds, as noisy as these, would show with that power.

    Minimum detectable effect of the paired t test, two-sided, 5% over all looks: larger than the half-width of the
    interval. In the effect's unit; for a ratio the factor above 1. NaN for fewer than two seeds.
    """
    if effect.n < 2 or effect.low is None or effect.high is None:
        return math.nan
    ratio = effect.ratio
    half = math.log(effect.high / effect.low) / 2 if ratio else (effect.high - effect.low) / 2
    df = effect.n - 1
    critical = scipy_stats.t.ppf((1 + effect.level) / 2, df)

    def missing(shift: float) -> float:
        # The other tail is left out: at any power worth asking for it is nothing.
        return float(scipy_stats.nct.sf(critical, df, shift)) - power

    standard_error = half / critical
    found = standard_error * float(optimize.brentq(missing, 1e-6, 60.0))
    return math.exp(found) if ratio else found


def verdict(
    effect: Effect,
    threshold: float | None = None,
    margin: float = 0.0,
    direction: str = "below",
    scale: str = "",
) -> Verdict:
    """What an effect says about a claim.

    Args:
        effect: over paired seeds.
        threshold: the paper's figure, such as 0.5 (C1) or 1.2 (C2); None: the claim has none.
        margin: what counts as equal, in the effect's unit (of a ratio: 0.02 is 0.98 to 1.02). An effect that is shown to
            be no larger is not what the claim says, even where its interval holds "no effect".
        direction: "below" or "above": the side of "no effect" that the claim is on. "near": the
            claim is a value, `threshold`, and holds within `margin` of it.
        scale: at "smoke" there is no verdict: "plumbing only".
    """
    if direction not in ("below", "above", "near"):
        raise ValueError(f"direction={direction!r}: must be below, above or near")
    if direction == "near" and (threshold is None or margin <= 0):
        raise ValueError("direction='near' needs threshold, the claimed value, and a margin above 0")
    rule = _rule(effect.neutral, threshold, margin, direction, "" if effect.ratio else effect.unit)
    if effect.looks > 1:
        rule = rule.replace("95% interval", f"{_percent(effect.level)} interval") + (
            f". Of {_percent(effect.level)}, for seeds were added after a first look had left it undecided"
        )
    if effect.of != "seed":
        rule = rule.replace("paired seeds", f"{effect.of}s").replace("one seed", f"one {effect.of}")
    missed = threshold if scale != "smoke" and _misses(effect, threshold, direction) else None
    if missed is not None:
        rule += f". Here the whole interval misses the paper's {_number(missed)}"
    return Verdict(_label(effect, threshold, margin, direction, scale), effect, rule, missed)


def _label(effect: Effect, threshold: float | None, margin: float, direction: str, scale: str) -> str:
    low, high, neutral = effect.low, effect.high, effect.neutral
    if scale == "smoke":
        return PLUMBING
    if not effect.n:
        return "not run"
    if effect.n < 2 or low is None or high is None:
        return "undecided"
    if direction == "near":
        if threshold - margin <= low and high <= threshold + margin:
            return "reproduced"
        apart = high < threshold - margin or low > threshold + margin
        return "not reproduced" if apart else "undecided"
    sign = -1.0 if direction == "below" else 1.0
    nearest, farthest = sorted((sign * (low - neutral), sign * (high - neutral)))
    if farthest < 0 or 0 < margin >= farthest:  # on the other side, or too little to count
        return "not reproduced"
    if nearest <= 0:  # the interval holds "no effect": does it hold the paper's, too?
        return "not reproduced" if _misses(effect, threshold, direction) else "undecided"
    bound = margin if threshold is None else sign * (threshold - neutral)
    return "reproduced" if nearest >= bound else "reproduced in direction"


def _misses(effect: Effect, threshold: float | None, direction: str) -> bool:
    """Is the paper's figure ruled out, whatever the label says about the direction?"""
    if threshold is None or direction == "near" or effect.low is None or effect.high is None:
        return False
    return effect.low > threshold if direction == "below" else effect.high < threshold


def _rule(neutral: float, threshold: float | None, margin: float, direction: str, unit: str) -> str:
    of = f" {unit}" if unit else ""
    first = "undecided: the 95% interval over paired seeds holds "
    if direction == "near":
        within = f"{_number(threshold - margin)} to {_number(threshold + margin)}{of}"
        return (
            f"reproduced: the whole 95% interval over seeds lies within {within}; not reproduced: "
            "all of it outside; undecided: neither, or one seed"
        )
    sign = -1.0 if direction == "below" else 1.0
    bound = neutral + sign * margin if threshold is None else threshold
    more = ""
    if margin:
        more += f", or none of it more than {_number(margin)}{of} {direction} {neutral:g}, which counts as equal"
    if threshold is not None:
        more += f", or it holds {neutral:g} but not {_number(threshold)}"
    direct = f"in direction: {direction} {neutral:g}; " if bound != neutral else ""
    return (
        f"{first}{neutral:g}{'' if threshold is None else f' and {_number(threshold)}'}, or one seed; "
        f"reproduced: all of it {direction} {_number(bound)}{of}; {direct}"
        f"not reproduced: all of it on the other side of {neutral:g}{more}"
    )


def all_of(parts: Mapping[str, Verdict]) -> Verdict:
    """The verdict on a claim of several parts, by name: that of its weakest, which also gives the effect.

    One part that is not reproduced refutes the whole; else one that is missing or undecided leaves
    it open: undecided, if half of them ran.
    """
    if not parts:
        raise ValueError("all_of needs at least one verdict")
    worst = max(parts.values(), key=lambda v: (PLUMBING, *LABELS).index(v.label))
    ran = sum(part.effect.n > 0 for part in parts.values())
    if worst.label == "not run" and ran >= len(parts) / 2:
        worst = worst._replace(label="undecided", rule=f"{worst.rule}; undecided, too: of {len(parts)} parts {ran} ran")
    return worst._replace(rule=f"the weakest of {len(parts)} parts. {worst.rule}", parts=tuple(parts.items()))


def _shared(a: Mapping[int, object], b: Mapping[int, object]) -> list[int]:
    return sorted(seed for seed in a.keys() & b.keys() if a[seed] is not None and b[seed] is not None)


def _points(curve: pd.DataFrame, column: str, x: str) -> tuple[np.ndarray, np.ndarray]:
    measured = curve[[x, column]].dropna().sort_values(x)
    return measured[x].to_numpy(float), measured[column].to_numpy(float)


def _first_at(curve: pd.DataFrame, target: float, column: str, x: str) -> Crossing:
    xs, ys = _points(curve, column, x)
    if not len(ys) or not math.isfinite(target):
        return Crossing(None, False, target)
    reached = np.flatnonzero(ys <= target)
    if not len(reached):
        return Crossing(None, True, target)
    i = int(reached[0])
    if i == 0:
        return Crossing(float(xs[0]), False, target)
    share = (ys[i - 1] - target) / (ys[i - 1] - ys[i])
    return Crossing(float(xs[i - 1] + share * (xs[i] - xs[i - 1])), False, target)


def _level(looks: int) -> float:
    return 1 - (1 - LEVEL) / looks


def _percent(level: float) -> str:
    return f"{100 * level:g}%"


def _number(x: float) -> str:
    """Three decimals below 10, as losses are read; no more digits than the figure carries."""
    if x == 0 or not math.isfinite(x):
        return f"{x:g}"
    if abs(x) < 0.001:
        return f"{x:.1e}"
    return f"{x:.3f}".rstrip("0").rstrip(".") if abs(x) < 10 else f"{x:.4g}"
