"""Estimates over paired seeds: how large an effect is, how sure that is, and how many seeds would make it sure.

Every interval is Student's t over seeds, and so says what another set of seeds would show; ratios are taken in the logarithm.
What an estimate means for a claim is verdict.py's.
"""

from __future__ import annotations

import bisect
import enum
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import integrate, optimize
from scipy import stats as scipy_stats

LEVEL = 0.95


class Unit(enum.StrEnum):
    """What an effect is measured in. A share is of 1: of tokens, of examples, above an equal share."""

    NATS = "nats per token"
    RATIO = "ratio"
    SHARE = "share"

    def inner(self, x: float) -> float:
        """On the scale on which intervals are symmetric: of a ratio the logarithm."""
        return math.log(x) if self is Unit.RATIO else x

    def outer(self, x: float) -> float:
        """Back from `inner`."""
        return math.exp(x) if self is Unit.RATIO else x

    @property
    def neutral(self) -> float:
        """Where there is no effect."""
        return 1.0 if self is Unit.RATIO else 0.0


@dataclass(frozen=True)
class Estimate:
    """An effect: its mean over n values, with the error of that mean.

    Args:
        mean, error: on the inner scale of the unit; error is NaN for fewer than two values. df: degrees of freedom.
        n: values; none where nothing was measured. of: what there is one value of.
    """

    mean: float
    error: float
    df: float
    n: int
    unit: Unit
    of: str = "seed"

    @property
    def value(self) -> float:
        """In the unit."""
        return self.unit.outer(self.mean)

    def inner(self, level: float = LEVEL) -> tuple[float, float] | None:
        """The interval on the inner scale; None for fewer than two values."""
        if self.n < 2 or not math.isfinite(self.error):
            return None
        half = self._critical(level) * self.error
        return self.mean - half, self.mean + half

    def interval(self, level: float = LEVEL) -> tuple[float, float] | None:
        """In the unit."""
        found = self.inner(level)
        return None if found is None else (self.unit.outer(found[0]), self.unit.outer(found[1]))

    def smallest(self, level: float = LEVEL, power: float = 0.8) -> float:
        """The smallest true effect that as many values, as noisy, would show with that power: in the unit, of a ratio the factor.

        The minimum detectable effect of the two-sided t test, larger than half the interval. NaN for fewer than two values.
        """
        if self.inner(level) is None:
            return math.nan
        return self.unit.outer(self.error * _shift(self._critical(level), self.df, power))

    def seeds_for(self, margin: float, level: float = LEVEL, power: float = 0.8) -> int | None:
        """How many seeds as noisy as these would decide the margin (`seeds_needed`); None where seeds don't tell, or 1000 don't do.

        Args:
            margin: in the unit; of a ratio what is added to 1.
        """
        if self.of != "seed" or self.inner(level) is None:
            return None
        try:
            inner = math.log1p(margin) if self.unit is Unit.RATIO else margin
            return seeds_needed(self.error * math.sqrt(self.n), inner, level=level, power=power)
        except ValueError:
            return None

    def _critical(self, level: float) -> float:
        return float(scipy_stats.t.ppf((1 + level) / 2, self.df))

    def times(self, factor: float) -> Estimate:
        """A ratio times a factor that is known; nothing, where the factor is NaN."""
        if not self.n or not math.isfinite(factor):
            return nothing(self.unit, self.of)
        return Estimate(self.mean + math.log(factor), self.error, self.df, self.n, self.unit, self.of)


@dataclass(frozen=True)
class Spread(Estimate):
    """The ratio of two standard deviations; its interval is F's, which is lopsided. df: of the two, as (df, other)."""

    other: float = 0.0

    def inner(self, level: float = LEVEL) -> tuple[float, float] | None:
        if self.n < 2:
            return None
        tail = (1 - level) / 2
        high, low = (math.log(scipy_stats.f.ppf(p, self.df, self.other)) / 2 for p in (tail, 1 - tail))
        return self.mean - low, self.mean - high

    def seeds_for(self, margin: float, level: float = LEVEL, power: float = 0.8) -> int | None:
        """Not said of a spread."""

    def smallest(self, level: float = LEVEL, power: float = 0.8) -> float:
        """The ratio of true standard deviations that would show with that power."""
        if self.n < 2:
            return math.nan
        f = scipy_stats.f
        return math.sqrt(f.ppf((1 + level) / 2, self.df, self.other) / f.ppf(1 - power, self.df, self.other))


@dataclass(frozen=True)
class Crossed(Estimate):
    """A mean over samples of several kinds at once, each with an error and degrees of freedom of its own, in `parts`.

    Half its interval is the root of the sum of squares of what each kind alone would have (MOVER, Zou and Donner 2008), which
    keeps its level where one kind has few values and the other many; a pooled error with Satterthwaite's degrees does not.
    """

    parts: tuple[tuple[float, float], ...] = ()

    def inner(self, level: float = LEVEL) -> tuple[float, float] | None:
        if self.n < 2:
            return None
        half = math.hypot(*(error * float(scipy_stats.t.ppf((1 + level) / 2, df)) for error, df in self.parts))
        return self.mean - half, self.mean + half

    def seeds_for(self, margin: float, level: float = LEVEL, power: float = 0.8) -> int | None:
        """Not said: more seeds are no more examples."""

    def smallest(self, level: float = LEVEL, power: float = 0.8) -> float:
        found = self.inner(level)
        return math.nan if found is None else found[1] - self.mean + float(scipy_stats.norm.ppf(power)) * self.error


def nothing(unit: Unit, of: str = "seed") -> Estimate:
    """Nothing was measured."""
    return Estimate(math.nan, math.nan, 0, 0, unit, of)


def of_values(values: Iterable[float | None], unit: Unit = Unit.NATS, of: str = "seed") -> Estimate:
    """The mean of values, one a seed; what isn't finite is left out. Ratios must be above 0, and have the geometric mean."""
    x = np.array([v for v in values if v is not None and math.isfinite(v)], dtype=float)
    if unit is Unit.RATIO:
        if (x <= 0).any():
            raise ValueError(f"ratios must be above 0, but one is {x.min():g}")
        x = np.log(x)
    if not len(x):
        return nothing(unit, of)
    error = float(x.std(ddof=1)) / math.sqrt(len(x)) if len(x) > 1 else math.nan
    return Estimate(float(x.mean()), error, len(x) - 1, len(x), unit, of)


def slope(values: Sequence[float], over: Sequence[float]) -> float:
    """Of the least-squares line through values, by doubling of what they stand over."""
    return float(np.polyfit(np.log2(over), values, 1)[0])


def share_of_steps(losses: Sequence[float], over: Sequence[float], target: float) -> float:
    """The share of the steps at which a loss would be the target, between horizons each of which was trained.

    Args:
        losses: at the horizons `over`, shares of all steps in rising order.

    Linear in the logarithm of the share between two horizons, and beyond them along the nearest two. NaN where losses
    don't fall there, so that nothing can be said.
    """
    x = np.log(np.asarray(over, dtype=float))
    i = next((i for i in range(len(x) - 1) if losses[i + 1] <= target), len(x) - 2)  # the first that gets there
    fall = losses[i] - losses[i + 1]
    if fall <= 0:
        return math.nan
    return float(np.exp(x[i] + (losses[i] - target) / fall * (x[i + 1] - x[i])))


def crossed(differences: Sequence[Sequence[np.ndarray]], unit: Unit = Unit.SHARE) -> Estimate:
    """The mean over tasks of mean differences, as sure as seeds *and* test examples make it.

    Args:
        differences: for each seed, for each task, (N,): one arm's score of each example minus the other's. All seeds have
            the same examples.

    Seeds and examples are both samples, crossed: the variance of the mean is that over seeds plus that over examples (each
    averaged over seeds). What is left over counts once in each, which errs on the wide side.
    """
    seeds, tasks = len(differences), len(differences[0]) if differences else 0
    if not seeds or not tasks:
        return nothing(unit)
    each = np.array([np.mean([task.mean() for task in seed]) for seed in differences])
    parts = []
    if seeds > 1:
        by_example = [np.mean([seed[t] for seed in differences], axis=0) for t in range(tasks)]
        variances = [x.var(ddof=1) / len(x) for x in by_example if len(x) > 1]
        of_examples = math.sqrt(sum(variances)) / tasks, sum(map(len, by_example)) - tasks
        parts = [(float(each.std(ddof=1)) / math.sqrt(seeds), seeds - 1), *[of_examples] * bool(variances)]
    error = math.hypot(*(error for error, _ in parts)) if parts else math.nan
    return Crossed(float(each.mean()), error, seeds - 1, seeds, unit, parts=tuple(parts))


def spread_ratio(a: Iterable[float], b: Iterable[float]) -> Spread:
    """Standard deviation over seeds of a, over that of b."""
    a, b = (np.array(list(x), dtype=float) for x in (a, b))
    if min(len(a), len(b)) < 2 or not (a.std() and b.std()):
        return Spread(math.nan, math.nan, 0, 0, Unit.RATIO)
    ratio = math.log(a.std(ddof=1) / b.std(ddof=1))
    return Spread(ratio, math.nan, len(a) - 1, min(len(a), len(b)), Unit.RATIO, other=len(b) - 1)


def seeds_needed(spread: float, margin: float, *, level: float = LEVEL, power: float = 0.8, most: int = 1000) -> int:
    """How many paired seeds decide the margin: find a true difference as large, and exclude one where there is none.

    Args:
        spread: standard deviation over seeds of the paired difference. margin: what counts as equal, in the same unit.
        level: of the interval (of the smallest of m parts under Holm: 1 - 0.05 / m). power: of both.

    Raises:
        ValueError: more than `most` would be needed.
    """
    if not spread:
        return 2

    def decides(n: int) -> bool:
        critical, in_errors = float(scipy_stats.t.ppf((1 + level) / 2, n - 1)), margin / (spread / math.sqrt(n))
        found = float(scipy_stats.nct.sf(critical, n - 1, in_errors))
        return min(found, _equal(critical, n - 1, in_errors)) >= power

    if not decides(most):
        raise ValueError(f"a margin of {margin:g} under a spread of {spread:g} would need more than {most} seeds")
    return bisect.bisect_left(range(2, most), True, key=decides) + 2


def _equal(critical: float, df: int, margin: float) -> float:
    """Chance that the whole interval lies within the margin (in standard errors), where there is no difference at all."""
    chi = scipy_stats.chi(df, scale=df**-0.5)  # the estimated standard error over the true one
    widest = margin / critical
    inside: Callable[[float], float] = lambda s: (2 * scipy_stats.norm.cdf(margin - critical * s) - 1) * chi.pdf(s)  # noqa: E731
    return float(integrate.quad(inside, 0, min(widest, chi.ppf(1 - 1e-9)))[0])


def _shift(critical: float, df: float, power: float) -> float:
    """Noncentrality at which a t test reaches the power. The other tail is left out: at any power worth asking for it is nothing."""
    return float(
        optimize.brentq(lambda shift: float(scipy_stats.nct.sf(critical, df, shift)) - power, 1e-6, 20 + 10 * critical)
    )


def shared(*by_seed: Mapping[int, float]) -> list[int]:
    """Seeds that all of them have, in order."""
    return sorted(set.intersection(*(set(one) for one in by_seed))) if by_seed else []


# Numbers in words: the one place that formats them


def amount(x: float, unit: Unit, *, compares: bool = False) -> str:
    """A size with its unit: "0.004 nats", "1.8 points" (of shares that are compared), "23.4%", "0.97 times"."""
    if unit is Unit.NATS:
        return f"{_digits(x)} nats"
    if unit is Unit.RATIO:
        return f"{_ratio(x)} times"
    return f"{_short(100 * x)} points" if compares else f"{_short(100 * x)}%"


def span(low: float, high: float, unit: Unit) -> str:
    """An interval, in the unit of the amount beside it: "0.002 to 0.006", "21 to 25"."""
    if unit is Unit.SHARE:
        return f"{_short(100 * low)} to {_short(100 * high)}"
    if unit is Unit.RATIO:
        return f"{_ratio(low)} to {_ratio(high)}"
    return f"{_digits(low)} to {_digits(high)}"


def tolerance(margin: float, unit: Unit) -> str:
    """What counts as equal: "0.005 nats", "2.0 points", and of ratios "2%"."""
    return f"{100 * margin:g}%" if unit is Unit.RATIO else amount(margin, unit, compares=True)


def counted(n: int, of: str) -> str:
    """ "1 seed", "4 seeds"."""
    return f"{n} {of}{'' if n == 1 else 's'}"


def _ratio(x: float) -> str:
    """Three decimals where they say something: 1.002 isn't 1, and the paper's 1.2 has no more."""
    return f"{x:.3f}".rstrip("0").rstrip(".")


def _digits(x: float) -> str:
    """Three decimals, as losses are read; four where three would be 0; three digits above 10."""
    if abs(x) >= 10:
        return f"{x:.3g}"
    return f"{x:.3f}" if abs(x) >= 0.0005 or x == 0 else f"{x:.4f}"


def _short(x: float) -> str:
    return f"{x:.1f}" if abs(x) < 10 else f"{x:.0f}"
