"""From an estimate to a label, by the protocol alone: of a part, of all deciding parts of a claim together (Holm), of the claim."""

import math
from collections.abc import Sequence

from ecmoe.study.estimate import Estimate, Unit
from ecmoe.study.protocol import Part, protocol

REPRODUCED, IN_DIRECTION, NO_EFFECT = "reproduced", "reproduced in direction", "no effect"
CONTRADICTED, UNDECIDED, NOT_RUN = "contradicted", "undecided", "not run"
PLUMBING = "plumbing only"  # of scale smoke: whatever its numbers say
# A claim is as good as the weakest of its deciding parts: the last of these.
WEAKEST_LAST = (REPRODUCED, IN_DIRECTION, NOT_RUN, UNDECIDED, NO_EFFECT, CONTRADICTED)


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
