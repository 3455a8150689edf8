"""Estimate effects over paired seeds: mean, confidence interval, and the number of seeds needed to decide a margin.

Intervals are Student's t over seeds unless stated otherwise; ratios are averaged in the logarithm. verdict.py draws conclusions.
"""

import bisect
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import integrate, optimize
from scipy.stats import chi, f, nct, norm, t

from ecmoe.study.protocol import protocol
from ecmoe.study.units import Unit, counted


@dataclass(frozen=True)
class Estimate:
    """An effect: its mean over n values (0: nothing was measured) on the unit's inner scale. of: what a value stands for.

    errors: (standard error, degrees of freedom) on the inner scale for each source of sampling, such as seeds and examples.
    The squared half-widths of each source's own t interval add up to that of the whole (MOVER, Zou and Donner 2008), which
    keeps its level if one source has few values and another many."""

    mean: float
    errors: tuple[tuple[float, float], ...]
    n: int
    unit: Unit
    of: str = "seed"

    @property
    def value(self) -> float:
        return self.unit.outer(self.mean)

    @property
    def sample(self) -> str:
        """The number of values in words: "4 seeds", "7 turns"."""
        return counted(self.n, self.of)

    def inner(self, level: float) -> tuple[float, float] | None:
        """Return the confidence interval on the inner scale; None for fewer than two values."""
        if self.n < 2:
            return None
        half = math.hypot(*(error * _critical(level, df) for error, df in self.errors))
        return self.mean - half, self.mean + half

    def interval(self, level: float | None = None, least: int = 2) -> tuple[float, float] | None:
        """Return the confidence interval in the unit; None for fewer than `least` values, or than two. level: None: the protocol's."""
        found = self.inner(level or protocol().level) if self.n >= least else None
        return found and (self.unit.outer(found[0]), self.unit.outer(found[1]))

    def smallest(self, level: float, power: float) -> float:
        """Return the minimum detectable effect of the two-sided t test with these values' number and noise, in the unit (a
        factor for a ratio); NaN for fewer than two values."""

        def shift(df: float) -> float:  # noncentrality that gives the t test this power; the far tail is negligible
            critical = _critical(level, df)
            return optimize.brentq(lambda at: nct.sf(critical, df, at) - power, 1e-6, 20 + 10 * critical)

        effect = math.hypot(*(error * shift(df) for error, df in self.errors)) if self.n > 1 else math.nan
        return self.unit.outer(effect)

    def seeds_for(self, margin: float, level: float, power: float) -> int | None:
        """Return how many seeds with this noise would decide the margin (for a ratio its distance from 1), as `seeds_needed`;
        None if more seeds alone can't, as they leave the examples' error."""
        if self.of != "seed" or self.n < 2 or len(self.errors) != 1:
            return None
        inner = math.log1p(margin) if self.unit is Unit.RATIO else margin
        return seeds_needed(self.errors[0][0] * math.sqrt(self.n), inner, level=level, power=power)


class Spread(Estimate):
    """The ratio of two standard deviations, with the F distribution's interval. errors: as of each arm's mean.
    n: the smaller number of values."""

    @property
    def sample(self) -> str:
        """The number of values in words, of each arm where they differ: "3 and 4 seeds"."""
        of_each = [int(df) + 1 for _, df in self.errors]
        return f"{of_each[0]} and {of_each[1]} {self.of}s" if len(set(of_each)) > 1 else super().sample

    def _quantile(self, p: float) -> float:
        return math.log(f.ppf(p, *(df for _, df in self.errors))) / 2

    def inner(self, level: float) -> tuple[float, float] | None:
        ends = ((1 + level) / 2, (1 - level) / 2)
        return tuple(self.mean - self._quantile(p) for p in ends) if self.n > 1 else None

    def smallest(self, level: float, power: float) -> float:
        return math.exp(self._quantile((1 + level) / 2) - self._quantile(1 - power)) if self.n > 1 else math.nan


def of_values(values: Iterable[float | None], unit: Unit = Unit.NATS, of: str = "seed") -> Estimate:
    """Return the mean of the finite values, one per seed. Ratios must be above 0; their mean is geometric."""
    x = np.array([v for v in values if v is not None and math.isfinite(v)], dtype=float)
    if unit is Unit.RATIO:
        if (x <= 0).any():
            raise ValueError(f"ratios must be above 0, but one is {x.min():g}")
        x = np.log(x)
    return Estimate(float(x.mean()) if len(x) else math.nan, _error(x), len(x), unit, of)


def _error(x: np.ndarray) -> tuple[tuple[float, float], ...]:
    """Return the `errors` of a mean of values; empty for fewer than two."""
    return ((float(x.std(ddof=1)) / math.sqrt(len(x)), len(x) - 1),) if len(x) > 1 else ()


def slope(values: Sequence[float], over: Sequence[float]) -> float:
    """Return the slope of the least-squares line through values: their change per doubling of `over`."""
    return float(np.polyfit(np.log2(over), values, 1)[0])


def share_of_steps(losses: Sequence[float], over: Sequence[float], target: float) -> float:
    """Return the share of the steps at which the loss would reach the target: linear in the logarithm of the share between
    the two lengths around it, beyond all lengths along the nearest two; NaN if the loss doesn't fall there.

    losses: final loss of each run. over: its length as a share of all steps, in rising order."""
    x = np.log(np.asarray(over, dtype=float))
    reached = (i for i in range(len(x) - 1) if losses[i + 1] <= target)
    i = next(reached, len(x) - 2)
    fall = losses[i] - losses[i + 1]
    return float(np.exp(x[i] + (losses[i] - target) / fall * (x[i + 1] - x[i]))) if fall > 0 else math.nan


def crossed(differences: Sequence[Sequence[np.ndarray]]) -> Estimate:
    """Return the mean over tasks of mean differences, a share, with the errors of both seeds and test examples.

    differences: for each seed, for each task, (N,): one arm's score on each example, the same for all seeds, minus the other's.
    Seeds and examples are crossed random samples, whose variances add up. That of examples is of their means over seeds; the
    residual counts in both, which makes the interval slightly too wide."""
    seeds = of_values((np.mean([task.mean() for task in seed]) for seed in differences), Unit.SHARE)
    tasks = [np.mean(of_seeds, axis=0) for of_seeds in zip(*differences, strict=True)]
    examples = [one for task in tasks for one in _error(task)]  # a task with a single example has no error
    if not examples:
        return seeds
    of_examples = math.hypot(*(error for error, _ in examples)) / len(tasks), sum(df for _, df in examples)
    return replace(seeds, errors=(*seeds.errors, of_examples))


def spread_ratio(a: Iterable[float], b: Iterable[float]) -> Spread:
    """Return a's standard deviation over seeds divided by b's; `Spread.n` is 0 if one is 0 or has fewer than two seeds."""
    arms = [of_values(x) for x in (a, b)]
    errors = tuple(one for arm in arms for one in arm.errors if one[0])
    if len(errors) < 2:
        return Spread(math.nan, (), 0, Unit.RATIO)
    deviations = [error * math.sqrt(df + 1) for error, df in errors]
    return Spread(math.log(deviations[0] / deviations[1]), errors, min(arm.n for arm in arms), Unit.RATIO)


def seeds_needed(spread: float, margin: float, *, level: float | None = None, power: float | None = None) -> int | None:
    """Return how many paired seeds detect a difference as large as the margin, and exclude it where there is none; None if
    1000 are too few.

    spread: standard deviation over seeds of the paired difference. margin: what counts as equal, in the same unit. level: of
    the interval. power: required in both cases. None: the protocol's."""
    if not spread:
        return 2
    level, power = level or protocol().level, power or protocol().power

    def decides(n: int) -> bool:
        critical, in_errors, df = _critical(level, n - 1), margin / (spread / math.sqrt(n)), n - 1
        error = chi(df, scale=df**-0.5)  # estimated standard error / true standard error
        # Probability that the whole interval lies within the margin if there is no difference, integrated over the error's estimate.
        inside = lambda s: (2 * norm.cdf(in_errors - critical * s) - 1) * error.pdf(s)  # noqa: E731
        equal, _ = integrate.fixed_quad(inside, 0, min(in_errors / critical, error.ppf(1 - 1e-9)), n=200)
        return min(nct.sf(critical, df, in_errors), equal) >= power

    return bisect.bisect_left(range(2, 1000), True, key=decides) + 2 if decides(1000) else None


def _critical(level: float, df: float) -> float:
    return float(t.ppf((1 + level) / 2, df))


def shared(*by_seed: Mapping[int, float]) -> list[int]:
    """Return the seeds that all arguments have, in order."""
    return sorted(set.intersection(*map(set, by_seed)))
