"""One function per figure: tidy data in, `Plot(figure, alt, data)` out.

`alt` states the finding with numbers, `data` is what the figure shows. What was not run is a gap that is named, never a 0;
where nothing was run there is no figure. Bands and bars are 95% intervals over seeds.
"""

from ecmoe.report.plots.continual import gate_choices, retention
from ecmoe.report.plots.draw import LABELS
from ecmoe.report.plots.loss import by_routing, final_loss, over
from ecmoe.report.plots.routing import expert_shares, routing_matrix
from ecmoe.report.plots.speed import growth, over_plain, profile, share_of_floor, step_times
from ecmoe.report.plots.style import Plot, looks

__all__ = [
    "LABELS", "Plot", "by_routing", "expert_shares", "final_loss", "gate_choices", "growth", "looks", "over", "over_plain",
    "profile", "retention", "routing_matrix", "share_of_floor", "step_times",
]  # fmt: skip
