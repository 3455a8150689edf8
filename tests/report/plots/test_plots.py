"""What holds of all figures: their order and room, the sizes of what they draw, gaps where nothing was run."""

import math
import re

import numpy as np
import pandas as pd

from ecmoe.bench.rows import BOTH, EAGER, FORWARD
from ecmoe.report import plots
from ecmoe.study.table import curves, table
from ecmoe.training.result import not_run
from tests.report.plots.figures import EC


def test_arms_and_panels_stand_in_the_order_of_the_page():
    rows = [
        (arm, s, 1.0 + s, r, given)
        for given in "yxz"
        for arm in "cab"
        for s in (0, 1)
        for r in ("as trained", "causally")
    ]
    frame = pd.DataFrame(rows, columns=["arm", "seed", "loss", "routing", "given"])
    plot = plots.by_routing(frame, "loss", "given", "loss")
    assert [ax.get_title() for ax in plot.figure.axes if ax.get_title()] == [*"yxz"]
    assert plot.figure.axes[0].get_shared_y_axes().joined(*plot.figure.axes[:2])
    assert list(dict.fromkeys(plot.data["arm"])) == re.findall("([abc]), causally", plot.alt)[:3] == [*"cab"]
    shares = plots.expert_shares(frame.assign(**{f"share_{j}": 0.1 for j in range(9)}))
    assert shares.data["arm"].tolist() == re.findall("([abc]): 10.0% none", shares.alt) == [*"cab"]
    few = plots.expert_shares(frame.assign(**{f"share_{j}": 0.1 if j < 8 else math.nan for j in range(9)}))
    assert (
        "c: 10.0% none" in few.alt and "30.0% more" in few.alt and "Not run" not in few.alt
    )  # of fewer than 8 experts
    tasks = frame.assign(after=1, task=1, accuracy=0.5)
    kept = plots.retention(tasks)
    assert [ax.get_title() for ax in kept.figure.axes if ax.get_visible()] == [*"cab"]


def test_a_figure_has_room_for_all_its_rows():
    heights = {}
    for count in (4, 9):
        arms = [f"arm {i}" for i in range(count)]
        frame = pd.DataFrame([(arm, s, i + s, r, "c") for i, arm in enumerate(arms) for s in (0, 1) for r in ("as trained", "causally")],
                             columns=["arm", "seed", "loss", "routing", "given"]).assign(percent=0.5)  # fmt: skip
        shares = frame.assign(**{f"share_{j}": 0.1 for j in range(9)})
        kinds = pd.DataFrame({"kind": arms, "ms": 1.0, "share": 1 / count, "most": ""})
        steps = frame.assign(path="plain", mode="eager", routing="own", ms=1.0, low_ms=1.0, high_ms=1.0)
        made = [plots.final_loss(frame, "loss"), plots.by_routing(frame, "loss", "given", "loss"), plots.expert_shares(shares),
                plots.profile(kinds), plots.step_times(steps), plots.routing_matrix({"EC": np.eye(count)}, arms),
                plots.gate_choices(pd.DataFrame(np.eye(count)), pd.DataFrame(np.eye(count)), arms)]  # fmt: skip
        heights[count] = [plot.figure.get_size_inches()[1] for plot in made]
    assert all(ax.get_xlabel() for plot in made[:-2] for ax in plot.figure.axes)
    assert all(5 * 0.3 <= more - few <= 5 * 0.5 for few, more in zip(heights[4], heights[9], strict=True))
    assert all(2 < few <= 1.5 + 4 * 0.5 for few in heights[4])


def measures(plot):
    """Height in inches; widths of lines, sizes of marks, sizes of letters; columns of the legend."""
    lines, marks, letters = set(), set(), set()
    for ax in plot.figure.axes:
        for line in ax.lines:
            lines.add(line.get_linewidth())
            marks |= {line.get_markersize()} if line.get_marker() not in ("None", None, "") else set()
        for those in ax.collections:
            lines |= {*map(float, those.get_linewidths())}
            marks |= {*map(float, getattr(those, "get_sizes", list)())}
        named = [*ax.texts, ax.xaxis.label, ax.yaxis.label, *ax.get_xticklabels(), *ax.get_yticklabels()]
        letters |= {text.get_fontsize() for text in named if text.get_text()}
    sizes = [sorted(round(size, 2) for size in of) for of in (lines, marks, letters)]
    return round(float(plot.figure.get_size_inches()[1]), 2), *sizes, [legend._ncols for legend in plot.figure.legends]


def test_lines_marks_and_letters_are_as_large_as_on_all_pages(runs):
    """Figures of a page stand beside each other; who changes a size looks at all pages anew."""
    of_runs, both = table(runs), [(what, 0.5) for what in (FORWARD, BOTH)]
    kinds = pd.DataFrame({"kind": ["a", "idle"], "ms": [1.0, 2.0], "share": [0.4, 0.6], "most": ["x", "y"]})
    timed = {"path": "plain", "mode": EAGER, "ms": 3.0, "low_ms": 2.0, "high_ms": 4.0}
    steps = [timed | {"arm": arm, "routing": how} for arm in ("EC-CF2", "GShard top-2") for how in ("own", "even")]
    layers = [{"size": "a", "layer": "EC", "variant": "", "mode": EAGER, "name": "EC", "what": what, "ms": 1.0,
               "share_of_floor": share, "low_ms": 1.0, "high_ms": 1.0} for what, share in both]  # fmt: skip
    grown = pd.DataFrame(
        {"axis": "n", "value": [8192, 1000], "ms": [4.0, 2.0], "low_ms": 1.0, "high_ms": 6.0, "floor_ms": 0.5}
    )
    fits = pd.DataFrame([("n", 0.5, 0.9, 2.0)], columns=["axis", "exponent", "of_floor", "at_1"])
    two = [
        {"arm": "EC", "seed": s, "routing": how, "given": "x", "bits": s + 0.5}
        for how in ("as trained", "causally")
        for s in (0, 1)
    ]
    auto = [{"n": n, "d_model": 64, "mode": EAGER, "what": what, "ratio": x} for n in (8, 16) for what, x in both]
    learned = [{"arm": "EC", "seed": 0, "after": after, "task": 1, "name": "x", "accuracy": 0.5} for after in (1, 2)]
    shares = pd.DataFrame([[0.9, 0.1], [0.2, 0.8]])
    expected = {
        "steps": (plots.over(curves(runs), "step"), 4.2, [0.0, 1.8], [], [9, 10], []),
        "setting": (plots.over(of_runs.assign(steps=of_runs["seed"] % 2), "steps"), 4.2, [1.5, 1.8], [7], [9, 10], []),
        "difference": (plots.over(curves(runs), "step", reference="EC"), 4.2, [0.0, 1.4, 1.8], [], [9, 10], []),
        "level": (plots.over(of_runs.assign(steps=[1, 2, 3, 4, 4, 4, 4]), "steps", levels=["top-2"]), 4.2, [1.4, 1.5, 1.8], [7], [9, 10], []),
        "final": (plots.final_loss(of_runs), 2.5, [1.2, 2.0], [7, 81], [10], []),
        "shares": (plots.expert_shares(of_runs, {"x": 0.5}), 3.5, [], [], [9, 10], [9]),
        "matrix": (plots.routing_matrix({"a": [[1, 0], [0, 0.5]]}, ["x", "y"]), 2.44, [1], [], [9, 10], []),
        "profile": (plots.profile(kinds), 1.7, [], [], [9, 10], []),
        "step times": (plots.step_times(pd.DataFrame(steps)), 1.84, [1.0, 1.5, 2.0], [7, 49], [10], [2]),
        "floor": (plots.share_of_floor(pd.DataFrame(layers)), 2.16, [1.0, 2.7], [6], [10], [2]),
        "growth": (plots.growth(grown, fits), 3.6, [1.5], [6], [9, 10], [3]),
        "two routings": (plots.by_routing(pd.DataFrame(two), "bits", "given", "bits"), 2.5, [1.0, 1.5, 2.0], [6, 7], [10], [2]),
        "plain": (plots.over_plain(pd.DataFrame(auto)), 3.4, [0.0, 1.0, 1.5], [6], [10], [8]),
        "retention": (plots.retention(pd.DataFrame(learned)), 2.9, [1.5, 1.8], [7], [9, 10], []),
        "gates": (plots.gate_choices(shares, shares, ["x", "y"]), 3.18, [1], [], [9, 10], []),
    }  # fmt: skip
    assert {name: measures(plot) for name, (plot, *_) in expected.items()} == {
        name: tuple(sizes) for name, (_, *sizes) in expected.items()
    }


def test_nothing_at_all_is_no_figure():
    missing = {"EC": [not_run(EC)]}
    for plot in (
        plots.over(curves(missing), "step"),
        plots.final_loss(table(missing)),
        plots.expert_shares(table(missing)),
        plots.over(curves(missing), "step", ("over_capacity", "dropped")),
        plots.over(table(missing), "num_experts"),
        plots.profile(pd.DataFrame()),
    ):
        assert plot.figure is None and re.search("not run", plot.alt)
    assert plots.final_loss(table(missing)).alt == "Validation loss (nats per token): not run. Not run: EC."
