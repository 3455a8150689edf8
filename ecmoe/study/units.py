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
    """Format a value with its unit: "0.004 nats", "1.8 points" (a difference of shares), "23.4%", "0.97 times"."""
    word = {Unit.NATS: " nats", Unit.RATIO: " times", Unit.SHARE: " points" if compares else "%"}[unit]
    return _digits(x, unit) + word


def span(low: float, high: float, unit: Unit) -> str:
    """Format an interval without its unit: "0.002 to 0.006", "21 to 25"."""
    return f"{_digits(low, unit)} to {_digits(high, unit)}"


def tolerance(margin: float, unit: Unit) -> str:
    """Format a margin: "0.005 nats", "2.0 points", or "2%" for ratios."""
    return f"{100 * margin:g}%" if unit is Unit.RATIO else amount(margin, unit, compares=True)


def counted(n: int, of: str) -> str:
    """Format a count: "1 seed", "4 seeds"."""
    return f"{n} {of}{'' if n == 1 else 's'}"


def between(values: Iterable[Any], form: str = "") -> str:
    """Format the smallest and the largest value: "200 to 400", or "400" if they are equal."""
    ends = sorted(values)
    return " to ".join(dict.fromkeys(format(x, form) for x in (*ends[:1], *ends[-1:])))


def _digits(x: float, unit: Unit) -> str:
    """Format without a unit: ratios with up to three decimals, shares in percent (one decimal below 10), losses with three."""
    if unit is Unit.RATIO:
        return f"{x:.3f}".rstrip("0").rstrip(".")
    if unit is Unit.SHARE:
        return f"{100 * x:z,.{int(abs(100 * x) < 10)}f}"
    if abs(x) >= 10:
        return f"{x:.3g}"
    return f"{x:.3f}" if abs(x) >= 0.0005 or x == 0 else f"{x:.4f}"
