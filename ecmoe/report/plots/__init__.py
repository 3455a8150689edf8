"""One function per figure: tidy data in, `Plot(figure, alt, data)` out.

`alt` states the finding with numbers, `data` is what the figure shows. What was not run is a gap that is named, never a 0;
where nothing was run there is no figure. Bands and bars are 95% intervals over seeds.
"""

from ecmoe.report.plots.causality import leak, leak_by_condition, serving_cost
from ecmoe.report.plots.continual import gate_choices, retention
from ecmoe.report.plots.effects import all_effects
from ecmoe.report.plots.loss import final_loss, over
from ecmoe.report.plots.parts import LABELS, Plot
from ecmoe.report.plots.routing import expert_shares, expert_shares_over_steps, routing_matrix
from ecmoe.report.plots.speed import growth, profile, share_of_floor, step_times
from ecmoe.report.plots.style import looks
from ecmoe.report.plots.vision import over_capacity, patches_taken

__all__ = [
    "LABELS", "Plot", "all_effects", "expert_shares", "expert_shares_over_steps", "final_loss", "gate_choices", "growth",
    "leak", "leak_by_condition", "looks", "over", "over_capacity", "patches_taken", "profile",
    "retention", "routing_matrix", "serving_cost", "share_of_floor", "step_times",
]  # fmt: skip
