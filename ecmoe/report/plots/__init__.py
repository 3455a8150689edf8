"""One function per figure: tidy data in, `Plot(figure, alt, data)` out.

`alt` (alternative text) states the finding with numbers, `data` holds the numbers shown. Missing runs are named and left as
gaps; `figure` is None if nothing was run. Bands and bars are intervals over seeds, at the protocol's level, of as many seeds
as a verdict needs, or more.
"""

from ecmoe.report.plots.draw import LABELS
from ecmoe.report.plots.loss import by_routing, final_loss, over, retention
from ecmoe.report.plots.routing import expert_shares, gate_choices, routing_matrix
from ecmoe.report.plots.speed import growth, over_plain, profile, share_of_floor, step_times
from ecmoe.report.plots.style import Plot, looks

__all__ = [
    "LABELS", "Plot", "by_routing", "expert_shares", "final_loss", "gate_choices", "growth", "looks", "over", "over_plain",
    "profile", "retention", "routing_matrix", "share_of_floor", "step_times",
]  # fmt: skip
