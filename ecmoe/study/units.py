"""Units of effects, and numbers in words: every number with a unit is written by these functions."""

import enum
import math
from collections.abc import Iterable
from typing import Any


class Unit(enum.StrEnum):
    """The unit of an effect. A SHARE is a fraction of 1, such as a fraction of tokens or an accuracy."""

    NATS = "nats per token"
    RATIO = "ratio"
    SHARE = "share"

    def inner(self, x: float) -> float:
        """Map to the scale on which intervals are symmetric: the logarithm for ratios, else unchanged."""
        return math.log(x) if self is Unit.RATIO else x

    def outer(self, x: float) -> float:
        """Invert `inner`."""
        return math.exp(x) if self is Unit.RATIO else x


def amount(x: float, unit: Unit, *, compares: bool = False) -> str:
    """Format a value with its unit: "0.004 nats", "1.8 points" (a difference of shares), "23%", "0.970 times"."""
    word = {Unit.NATS: " nats", Unit.RATIO: " times", Unit.SHARE: " points" if compares else "%"}[unit]
    return _digits(x, unit, _decimals(x, unit)) + word


def figure(x: float, unit: Unit, *, compares: bool = False) -> str:
    """Format a figure of the paper: as `amount`, but a ratio with the digits that it is given with: "1.2 times"."""
    return f"{x:g} times" if unit is Unit.RATIO else amount(x, unit, compares=compares)


def span(low: float, high: float, unit: Unit) -> str:
    """Format an interval without its unit, both ends with the same number of decimals: "0.002 to 0.006", "4.9 to 10.6"."""
    decimals = max(_decimals(x, unit) for x in (low, high))
    return f"{_digits(low, unit, decimals)} to {_digits(high, unit, decimals)}"


def tolerance(margin: float, unit: Unit) -> str:
    """Format a margin: "0.005 nats", "2.0 points", or "2%" for ratios."""
    return f"{100 * margin:g}%" if unit is Unit.RATIO else amount(margin, unit, compares=True)


def counted(n: int, of: str) -> str:
    """Format a count: "1 seed", "4 seeds"."""
    return f"{n} {of}{'' if n == 1 else 's'}"


def duration(hours: float) -> str:
    """Format a time: "3.6 hours", or minutes below an hour: "1.2 minutes"."""
    return f"{hours:,.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"


def between(values: Iterable[Any], form: str = "") -> str:
    """Format the smallest and the largest value: "200 to 400", or "400" if they are equal."""
    ends = sorted(values)
    return " to ".join(dict.fromkeys(format(x, form) for x in (*ends[:1], *ends[-1:])))


def _decimals(x: float, unit: Unit) -> int:
    """Return how many decimals a value is given: a ratio three, a share in percent one below 10, a loss three, or four if tiny."""
    if unit is Unit.RATIO:
        return 3
    if unit is Unit.SHARE:
        return int(abs(100 * x) < 10)
    if abs(x) >= 10:
        return 1
    return 3 if abs(x) >= 0.0005 or x == 0 else 4


def _digits(x: float, unit: Unit, decimals: int) -> str:
    """Format without a unit; shares in percent, and never as -0."""
    return f"{100 * x:z,.{decimals}f}" if unit is Unit.SHARE else f"{x:z.{decimals}f}"
