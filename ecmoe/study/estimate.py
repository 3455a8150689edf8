"""Estimates over paired seeds: how large an effect is, how sure that is, and how many seeds would make it sure.

Every interval is Student's t over seeds, and so says what another set of seeds would show; ratios are taken in the logarithm.
What an estimate means for a claim is verdict.py's.
"""

from __future__ import annotations

import bisect
import enum
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import integrate, optimize
from scipy.stats import chi, f, nct, norm, t

LEVEL, POWER = 0.95, 0.8


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


@dataclass(frozen=True)
class Estimate:
    """An effect: its mean over n values, and how sure that is.

    Args:
        mean: on the inner scale of the unit. errors: (standard error, degrees of freedom) on that scale, for each kind of
            sample that it is a mean over. n: values; none where nothing was measured. of: what there is one value of.

    Half its interval is the root of the sum of squares of what each kind alone would have (MOVER, Zou and Donner 2008), which
    keeps its level where one kind has few values and the other many; of one kind it is Student's.
    """

    mean: float
    errors: tuple[tuple[float, float], ...]
    n: int
    unit: Unit
    of: str = "seed"

    @property
    def value(self) -> float:
        """In the unit."""
        return self.unit.outer(self.mean)

    def inner(self, level: float = LEVEL) -> tuple[float, float] | None:
        """The interval on the inner scale; None for fewer than two values."""
        if self.n < 2:
            return None
        half = math.hypot(*(error * _critical(level, df) for error, df in self.errors))
        return self.mean - half, self.mean + half

    def interval(self, level: float = LEVEL) -> tuple[float, float] | None:
        """In the unit."""
        found = self.inner(level)
        return None if found is None else (self.unit.outer(found[0]), self.unit.outer(found[1]))

    def smallest(self, level: float = LEVEL, power: float = POWER) -> float:
        """The smallest true effect that as many values, as noisy, would show with that power: in the unit, of a ratio the factor.

        The minimum detectable effect of the two-sided t test, larger than half the interval. NaN for fewer than two values.
        """
        if self.n < 2:
            return math.nan

        def shift(df: float) -> float:  # at which a t test reaches the power; what its other tail adds is nothing
            critical = _critical(level, df)
            return optimize.brentq(lambda at: nct.sf(critical, df, at) - power, 1e-6, 20 + 10 * critical)

        return self.unit.outer(math.hypot(*(error * shift(df) for error, df in self.errors)))

    def seeds_for(self, margin: float, level: float = LEVEL, power: float = POWER) -> int | None:
        """How many seeds as noisy as these would decide the margin (`seeds_needed`); None where seeds don't tell.

        margin: in the unit; of a ratio what is added to 1."""
        if self.of != "seed" or self.n < 2 or len(self.errors) != 1:  # more seeds are no more examples
            return None
        inner = math.log1p(margin) if self.unit is Unit.RATIO else margin
        ((error, _),) = self.errors
        return seeds_needed(error * math.sqrt(self.n), inner, level=level, power=power)


class Spread(Estimate):
    """The ratio of two standard deviations, of values whose degrees of freedom are in `errors`; F's interval, which is lopsided."""

    def _quantile(self, p: float) -> float:
        (_, df), (_, other) = self.errors
        return math.log(f.ppf(p, df, other)) / 2

    def inner(self, level: float = LEVEL) -> tuple[float, float] | None:
        if self.n < 2:
            return None
        return self.mean - self._quantile((1 + level) / 2), self.mean - self._quantile((1 - level) / 2)

    def smallest(self, level: float = LEVEL, power: float = POWER) -> float:
        """The ratio of true standard deviations that would show with that power."""
        return math.exp(self._quantile((1 + level) / 2) - self._quantile(1 - power)) if self.n >= 2 else math.nan


def nothing(unit: Unit, of: str = "seed") -> Estimate:
    """Nothing was measured."""
    return Estimate(math.nan, (), 0, unit, of)


def of_values(values: Iterable[float | None], unit: Unit = Unit.NATS, of: str = "seed") -> Estimate:
    """The mean of values, one a seed; what isn't finite is left out. Ratios must be above 0, and have the geometric mean."""
    x = np.array([v for v in values if v is not None and math.isfinite(v)], dtype=float)
    if unit is Unit.RATIO:
        if (x <= 0).any():
            raise ValueError(f"ratios must be above 0, but one is {x.min():g}")
        x = np.log(x)
    if not len(x):
        return nothing(unit, of)
    return Estimate(float(x.mean()), _error(x), len(x), unit, of)


def _error(x: np.ndarray) -> tuple[tuple[float, float], ...]:
    """Of a mean of values; none where there is one."""
    return ((float(x.std(ddof=1)) / math.sqrt(len(x)), len(x) - 1),) if len(x) > 1 else ()


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
    return float(np.exp(x[i] + (losses[i] - target) / fall * (x[i + 1] - x[i]))) if fall > 0 else math.nan


def crossed(differences: Sequence[Sequence[np.ndarray]], unit: Unit = Unit.SHARE) -> Estimate:
    """The mean over tasks of mean differences, as sure as seeds *and* test examples make it.

    Args:
        differences: for each seed, for each task, (N,): one arm's score of each example minus the other's. All seeds have
            the same examples.

    Seeds and examples are both samples, crossed: the variance of the mean is that over seeds plus that over examples (each
    averaged over seeds). What is left over counts once in each, which errs on the wide side.
    """
    seeds, tasks = len(differences), len(differences[0]) if differences else 0
    if not tasks:
        return nothing(unit)
    each = np.array([np.mean([task.mean() for task in seed]) for seed in differences])
    of_tasks = [_error(np.mean([seed[i] for seed in differences], axis=0)) for i in range(tasks)]
    examples = [one for errors in of_tasks for one in errors]  # a task of one example has none
    of_examples = math.hypot(*(error for error, _ in examples)) / tasks, sum(df for _, df in examples)
    errors = _error(each) + (of_examples,) * bool(examples)
    return Estimate(float(each.mean()), errors, seeds, unit)


def spread_ratio(a: Iterable[float], b: Iterable[float]) -> Spread:
    """Standard deviation over seeds of a, over that of b."""
    errors = [_error(np.array(list(x), dtype=float)) for x in (a, b)]
    if not all(errors) or not all(error for ((error, _),) in errors):
        return Spread(math.nan, (), 0, Unit.RATIO)
    deviations = [error * math.sqrt(df + 1) for ((error, df),) in errors]
    n = min(df for ((_, df),) in errors) + 1
    return Spread(math.log(deviations[0] / deviations[1]), errors[0] + errors[1], int(n), Unit.RATIO)


def seeds_needed(spread: float, margin: float, *, level: float = LEVEL, power: float = POWER) -> int | None:
    """How many paired seeds decide the margin: find a true difference as large, and exclude one where there is none.

    Args:
        spread: standard deviation over seeds of the paired difference. margin: what counts as equal, in the same unit.
        level: of the interval (of the smallest of m parts under Holm: 1 - 0.05 / m). power: of both.

    Returns:
        2 to 1000, or None where these are too few.
    """
    if not spread:
        return 2

    def decides(n: int) -> bool:
        critical, in_errors, df = _critical(level, n - 1), margin / (spread / math.sqrt(n)), n - 1
        # That the whole interval lies within the margin where there is no difference, over what the error may be estimated as.
        error = chi(df, scale=df**-0.5)  # over the true one
        inside = lambda s: (2 * norm.cdf(in_errors - critical * s) - 1) * error.pdf(s)  # noqa: E731
        equal, _ = integrate.quad(inside, 0, min(in_errors / critical, error.ppf(1 - 1e-9)))
        return min(nct.sf(critical, df, in_errors), equal) >= power

    return bisect.bisect_left(range(2, 1000), True, key=decides) + 2 if decides(1000) else None


def _critical(level: float, df: float) -> float:
    return float(t.ppf((1 + level) / 2, df))


def shared(*by_seed: Mapping[int, float]) -> list[int]:
    """Seeds that all of them have, in order."""
    return sorted(set.intersection(*(set(one) for one in by_seed))) if by_seed else []


# Numbers in words: the one place that formats them


def amount(x: float, unit: Unit, *, compares: bool = False) -> str:
    """A size with its unit: "0.004 nats", "1.8 points" (of shares that are compared), "23.4%", "0.97 times"."""
    word = {Unit.NATS: " nats", Unit.RATIO: " times", Unit.SHARE: " points" if compares else "%"}[unit]
    return _digits(x, unit) + word


def span(low: float, high: float, unit: Unit) -> str:
    """An interval, in the unit of the amount beside it: "0.002 to 0.006", "21 to 25"."""
    return f"{_digits(low, unit)} to {_digits(high, unit)}"


def tolerance(margin: float, unit: Unit) -> str:
    """What counts as equal: "0.005 nats", "2.0 points", and of ratios "2%"."""
    return f"{100 * margin:g}%" if unit is Unit.RATIO else amount(margin, unit, compares=True)


def counted(n: int, of: str) -> str:
    """ "1 seed", "4 seeds"."""
    return f"{n} {of}{'' if n == 1 else 's'}"


def _digits(x: float, unit: Unit) -> str:
    """Three decimals of a ratio, where they say something; of losses, as these are read; one of a share below 10%."""
    if unit is Unit.RATIO:
        return f"{x:.3f}".rstrip("0").rstrip(".")
    if unit is Unit.SHARE:
        return f"{100 * x:,.{int(abs(100 * x) < 10)}f}"
    if abs(x) >= 10:
        return f"{x:.3g}"
    return f"{x:.3f}" if abs(x) >= 0.0005 or x == 0 else f"{x:.4f}"
