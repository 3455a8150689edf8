"""Figures: what they show is what was measured, alt text has the numbers, gaps are named, no setting of a user's changes them."""

import hashlib
import io
import math
import re
import xml.etree.ElementTree as xml
from itertools import pairwise
from types import SimpleNamespace

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot
from matplotlib.colors import to_rgb

from ecmoe.bench.rows import BOTH, EAGER, FORWARD, GRAPH
from ecmoe.config import RunConfig
from ecmoe.model import metrics
from ecmoe.report import plots
from ecmoe.report.plots import style
from ecmoe.report.plots.draw import PERCENT, name_ends, number
from ecmoe.study.table import curves, table
from ecmoe.training.result import Result, not_run

EC, TOP2, HASH = RunConfig(), RunConfig(router="token_choice", top_k=2, capacity_factor=1.0), RunConfig(router="hash")


def run(config: RunConfig, loss: float, rows: int = 5, **routing: float) -> Result:
    x = np.linspace(0, 100, rows)
    shares = {f"share_{j}": (j + 1) / 45 for j in range(9)}  # no two alike
    routing = {"dropped": 0.1, "over_capacity": 0.3, **shares, **routing}
    curve = pd.DataFrame({"step": x, "val_loss": loss + 1 - x / 100}).assign(**routing).reindex(columns=metrics.curve())
    summary = {"config": config.to_dict(), "name": config.name, "seed": config.seed, "status": "finished"}
    return Result(summary | {"val_loss": loss, "routing": routing}, curve)


@pytest.fixture
def runs():
    """As a study has them: three seeds of two arms, and one that was not run."""
    made = {"EC": (EC, 2.0), "top-2": (TOP2, 2.5)}
    return {arm: [run(c.replace(seed=s), loss + s / 100) for s in range(3)] for arm, (c, loss) in made.items()} | {
        "Hash": [not_run(HASH)]
    }


def drawn(plot):
    """Draw it as a page does, and look that its SVG is XML, says what it shows, and has no colour of a white page."""
    svg = plot.svg()
    root = xml.fromstring(svg)
    assert root.get("aria-label") == plot.alt and len(plot.alt) > 30 and re.match(r"0 0 \d+", root.get("viewBox"))
    assert not pyplot.get_fignums()  # shown by the report alone
    assert {group.get("id") for group in root.iter("g")} == {None}  # two figures of a page would share names
    assert all(ax.get_xlabel() for ax in plot.figure.axes) or "Combine weights" in plot.alt  # whose columns are named
    assert not re.search(f"<metadata|font-family|{style.INK}|{style.PAPER}", svg)
    return plot


def legend(plot) -> list[str]:
    (one,) = plot.figure.legends
    return [text.get_text() for text in one.get_texts()]


def texts(plot) -> list[str]:
    return [text.get_text() for ax in plot.figure.axes for text in ax.texts]


def test_loss_over_steps(runs):
    plot = drawn(plots.over(curves(runs), "step"))
    ends = plot.data.groupby("arm").tail(1).set_index("arm")
    assert ends["mean"].to_dict() == pytest.approx({"EC": 2.01, "top-2": 2.51})
    half = 0.01 * 4.302653 / math.sqrt(3)  # Student's t for two degrees of freedom
    assert ends.loc["EC", ["low", "high"]].tolist() == pytest.approx([2.01 - half, 2.01 + half])
    assert "EC 2.010 (1.985 to 2.035) at 100, 3 seeds; top-2 2.510" in plot.alt and plot.alt.endswith("Not run: Hash.")
    assert texts(plot) == ["EC", "top-2"]  # each at the end of its line
    (ax,) = plot.figure.axes
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("training step", "validation loss (nats per token)")
    assert [side for side, spine in ax.spines.items() if spine.get_visible()] == ["left", "bottom"]
    assert all(f"stroke: {color}" in plot.svg() for color in ("currentColor", "var(--line, #d8dde3)"))  # ticks and grid
    assert not plot.figure.axes[0].get_title()  # its axis says it
    drawn_in = [line.get_color() for line in ax.get_lines()][:2]
    assert drawn_in == [style.looks(runs)[arm].color for arm in ("EC", "top-2")] and ax.get_ylim()[0] > 1
    many = {f"arm {i}": runs["EC"] for i in range(20)}
    sizes = [plots.over(curves(one), "step").figure.get_size_inches()[1] for one in (runs, many)]
    assert sizes == pytest.approx([4.2, 7.0])  # room for names


def test_loss_against_a_reference_is_paired_by_seed(runs):
    plot = drawn(plots.over(curves(runs), "step", reference="EC"))
    assert plot.data["arm"].unique().tolist() == ["top-2"] and plot.data["mean"].tolist() == pytest.approx([0.5] * 4)
    assert plot.data["high"].sub(plot.data["low"]).max() < 1e-12  # what seeds share drops out
    assert sorted(texts(plot)) == ["EC", "top-2"] and "minus that of EC" in plot.alt
    assert plot.figure.axes[0].get_ylabel() == "validation loss (nats per token)\nminus that of EC"
    assert plots.over(curves(runs), "step", reference="Hash").figure is None
    finer = curves({"EC": [run(EC, 2.0, rows=9)], "top-2": [run(TOP2, 2.5, rows=9)]})
    later = plots.over(finer, "step", reference="EC").data["step"]
    assert later.tolist() == [25, 37.5, 50, 62.5, 75, 87.5, 100]  # without the first quarter


def test_a_diverged_run_ends_where_it_broke_off():
    lost = run(EC, 2.0)
    lost.curve.loc[3:, "val_loss"] = math.nan
    assert drawn(plots.over(curves({"EC": [lost]}), "step")).data["step"].max() == 50


def test_final_loss_sorts_and_says_where_its_axis_starts(runs):
    plot = drawn(plots.final_loss(table(runs)))
    assert plot.data["arm"].tolist() == ["EC", "top-2", "Hash"] and plot.data["seeds"].fillna(0).tolist() == [3, 3, 0]
    ax = plot.figure.axes[0]
    assert (
        "doesn't start at 0" in ax.get_xlabel() and "nats per token" in ax.get_xlabel() and texts(plot) == ["not run"]
    )
    assert "2.010 (1.985 to 2.035), 3 seeds" in plot.alt and plot.alt.endswith("Not run: Hash.")
    ticks = sorted(x for collection in ax.collections for x in collection.get_offsets()[:, 0])
    assert ticks == pytest.approx([2.0, 2.01, 2.02, 2.5, 2.51, 2.52])  # every seed is seen
    skewed = [("a", 0, 1.0), ("a", 1, 1.0), ("a", 2, 9.0), ("b", 0, 2.0), ("b", 1, 2.0), ("b", 2, 2.0)]
    of_means = plots.final_loss(pd.DataFrame(skewed, columns=["arm", "seed", "val_loss"]))
    assert of_means.data["arm"].tolist() == ["b", "a"]  # as they are drawn, though a's median is lower
    highest = plots.final_loss(table(runs), lowest_first=False)
    assert highest.data["arm"].tolist() == ["top-2", "EC", "Hash"]
    gaps = plots.final_loss(table(runs | {"A": [not_run(HASH)]}))
    assert gaps.data["arm"].tolist() == ["EC", "top-2", "Hash", "A"]  # which stay in their order
    one = drawn(plots.final_loss(table({"EC": [run(EC, 2.0)]})))
    assert "2.000, 1 seed." in one.alt
    difference = drawn(plots.final_loss(table(runs), reference="EC"))
    zeros = [
        [list(line.get_xdata()) for line in one.figure.axes[0].get_lines()].count([0, 0]) for one in (plot, difference)
    ]
    assert zeros == [0, 1]  # a line where there is no difference
    assert "validation loss (nats per token)\nminus that of EC" == difference.figure.axes[0].get_xlabel()
    assert (
        difference.data.loc[0, ["mean", "low", "high"]].tolist() == pytest.approx([0.5] * 3)  # paired by seed
        and "doesn't" not in difference.figure.axes[0].get_xlabel()
    )


def test_loss_against_a_key():
    by_size = {"EC": [run(EC.replace(num_experts=e, seed=s), 2 + 1 / e) for e in (4, 8, 16) for s in range(2)]}
    plot = drawn(plots.over(table(by_size), "num_experts"))
    assert plot.data["num_experts"].tolist() == [4, 8, 16] and "2.250 (2.250 to 2.250) at 4, 2.125" in plot.alt
    assert [tick.get_text() for tick in plot.figure.axes[0].get_xticklabels()] == ["4", "8", "16"]
    gap = plots.over(table(by_size | {"Hash": [not_run(HASH)]}).assign(mine=1.5), "num_experts", ("val_loss", "mine"))
    assert gap.alt.startswith("Validation loss (nats per token) and mine over number of experts e. ")
    assert plots.over(table(by_size | {"Hash": [not_run(HASH)]}), "num_experts").alt.endswith(" Not run: Hash.")
    scales = [plots.over(table(by_size), "num_experts", log=log).figure.axes[0].get_xscale() for log in (True, False)]
    assert scales == ["log", "linear"] and plot.figure.axes[0].get_xscale() == "log"
    assert plots.over(curves(by_size), "step").figure.axes[0].get_xscale() == "linear"
    dense = {"Dense": [run(EC.replace(router="dense", num_experts=2, seed=s), 2.2 + s) for s in range(2)]}
    for level, across in ((None, []), ("Dense", [2.7])):
        (ax,) = drawn(plots.over(table(by_size | dense), "num_experts", level=level)).figure.axes
        assert [line.get_ydata()[0] for line in ax.get_lines() if line.get_transform() != ax.transData] == across
        marked = {float(x) for line in ax.get_lines() if line.get_transform() == ax.transData for x in line.get_xdata()}
        assert (2 in marked) == (level is None)


def test_a_setting_of_which_one_value_was_run_is_no_figure():
    one = {"EC": [run(EC, 2.0)], "top-2": [run(TOP2, 2.1)]}
    plot = plots.over(table(one), "num_experts")
    assert plot.figure is None and "Not run: EC, top-2." in plot.alt


def test_large_numbers_are_in_thousands():
    rows = [("a", 0, size, 12_000.0 * size) for size in (1, 2, 4)]
    frame = pd.DataFrame(rows, columns=["arm", "seed", "devices", "tokens_per_second"])
    for times, tick in ((1.0, "20k"), (0.1, "2000")):
        (ax,) = drawn(
            plots.over(
                frame.assign(tokens_per_second=frame["tokens_per_second"] * times), "devices", "tokens_per_second"
            )
        ).figure.axes
        ax.figure.canvas.draw()
        assert tick in [label.get_text() for label in ax.get_yticklabels()]


def test_expert_shares(runs):
    paper = {"1 or 2: most": 0.74, "3 or 4: 23%": 0.23, "3%": 0.03}
    plot = drawn(plots.expert_shares(table(runs), paper=paper))
    percent = [100 * (j + 1) / 45 for j in range(9)]
    assert plot.data.set_index("arm").loc["EC", [*"01234567", "8+"]].tolist() == pytest.approx(percent)
    assert "EC: 2.2% none, 11.1% one or two, 20.0% three or four, 66.7% more; top-2: 2.2%" in plot.alt
    (ax,) = plot.figure.axes
    bars = [(bar.get_x(), bar.get_width()) for bars in ax.containers[:9] for bar in bars[:1]]
    assert bars == [pytest.approx((sum(percent[:j]), percent[j])) for j in range(9)]
    papers = [(bar.get_x(), bar.get_width(), bar.get_y()) for bars in ax.containers[9:] for bar in bars]
    assert papers == [pytest.approx(one) for one in ((0, 74, 2.6), (74, 23, 2.6), (97, 3, 2.6))]  # in a row of its own
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["EC", "top-2", "Hash", "the paper (100M/64E)"]
    assert ax.get_xlim() == (0, 100) and {text.get_text(): text.get_position() for text in ax.texts}["not run"] == (
        0.01,
        2,
    )
    assert set(paper) <= set(texts(plot)) and plot.data["0"].isna().tolist() == [False, False, True]
    rows = plots.expert_shares(table(runs)).figure.axes[0].get_yticklabels()
    assert [tick.get_text() for tick in rows] == ["EC", "top-2", "Hash"]
    assert texts(plot)[:27:3] == ["", "4%", "7%", "9%", "11%", "13%", "16%", "18%", "20%"]  # where there is room
    assert legend(plot) == [*"01234567", "8+"] and ax.get_legend() is None
    assert "The paper: 1 or 2: most, 3 or 4: 23%, 3%." in plot.alt and "Not run: Hash." in plot.alt


def test_load_is_in_percent(runs):
    plot = drawn(plots.over(curves(runs), "step", ("over_capacity", "dropped")))
    assert plot.data.groupby("measure")["mean"].first().tolist() == pytest.approx([30, 10])
    scales = [
        plots.over(curves(runs), "step", ("over_capacity", "dropped")),
        plots.final_loss(table(runs), "over_capacity"),
    ]
    assert [ax.get_yscale() for ax in scales[0].figure.axes] == [
        "symlog",
        "linear",
    ]  # a collapsed router hides no other
    (ax,) = scales[1].figure.axes
    assert ax.get_xscale() == "symlog" and ax.get_xlim()[0] == -3 and ax.get_xlim()[1] > 30
    paired = (
        plots.final_loss(table(runs), "over_capacity", reference="EC"),
        plots.over(curves(runs), "step", "over_capacity", reference="EC"),
    )
    assert (
        [plot.figure.axes[0].get_xscale() for plot in paired]
        == [paired[1].figure.axes[0].get_yscale()] * 2
        == ["linear"] * 2
    )
    assert [ax.get_title() for ax in plot.figure.axes] == [plots.LABELS[name] for name in ("over_capacity", "dropped")]
    assert plot.figure.axes[1].get_ylim()[0] == 0 and not plot.figure.axes[0].get_ylabel()
    first, last = ({"EC", "top-2"} & {text.get_text() for text in ax.texts} for ax in plot.figure.axes)
    assert not first and last == {"EC", "top-2"}  # lines are named once, in the last panel
    assert not texts(plots.over(curves({"EC": runs["EC"]}), "step", ("over_capacity", "dropped")))  # one needs no name
    assert re.search(r"equal share \(%\): [^:]*: EC 30\.000", plot.alt) and re.search(
        r"dropped \(%\): [^:]*: EC 10", plot.alt
    )
    frame = curves(runs)
    frame.loc[frame["arm"] == "EC", "dropped"] = math.nan  # it has no such number
    half = plots.over(frame, "step", ("over_capacity", "dropped"))
    assert half.data.groupby("measure", sort=False)["arm"].unique().map(list).tolist() == [["EC", "top-2"], ["top-2"]]
    assert half.alt.endswith("Not run: Hash.")
    swept = {
        "top-2": [
            run(TOP2.replace(capacity_factor=c, seed=s), 2.0, dropped=0.2 / c) for c in (1.0, 2.0) for s in (0, 1)
        ]
    }
    plot = drawn(plots.over(table(swept), "capacity_factor", ("over_capacity", "dropped")))
    assert plot.data[plot.data["measure"].str.contains("dropped")]["mean"].tolist() == pytest.approx([20, 10])


def test_what_is_labelled_in_percent_is_shown_so():
    assert {column for column, label in plots.LABELS.items() if re.search("%|percentage", label)} == set(PERCENT)
    losses = [
        label for column, label in plots.LABELS.items() if column.split("_")[-1] == "loss" and column != "aux_loss"
    ]
    letters = {"num_experts": "e", "capacity_factor": "c", "n": "n", "d_model": "d"}  # the paper's
    assert {column: plots.LABELS[column].split()[-1] for column in letters} == letters
    words = {"steps": "steps", "num_experts": "experts", "capacity_factor": "factor", "n": "tokens", "devices": "GPUs", "d_model": "width",
             "moe_init_scale": "initial scale", "capacity": "places", "patches_left_out": "patches that no", "images_left_out": "images without",
             "loss": "loss", "final_accuracy": "accuracy", "forgetting": "forgetting"}  # fmt: skip
    assert all(word in plots.LABELS[column] for column, word in words.items())
    assert set(plots.LABELS) - set(words) == {metric.name for metric in metrics.METRICS}
    assert len(set(plots.LABELS.values())) == len(plots.LABELS)
    assert len(losses) > 2 and all(label.endswith("loss (nats per token)") for label in losses)


def test_numbers_in_words_have_as_many_digits_as_say_something():
    rows = [(99.9994, math.nan, math.nan), (-2.0, -99.9, -0.25), (-1234.567, -100.0, 1e6)]
    said = [number(SimpleNamespace(mean=mean, low=low, high=high)) for mean, low, high in rows]
    assert said == ["99.999", "-2.000 (-99.900 to -0.250)", "-1,235 (-100 to 1,000,000)"]


def test_routing_matrix_names_who_is_left_out():
    w = np.array([[0.9, 0.0], [0.6, 0.4], [0.0, 0.0]])
    plot = drawn(plots.routing_matrix({"EC": w}, ["a", "b", "c"]))
    assert "EC: experts hold 2, 1 tokens; no expert takes c" in plot.alt
    assert sorted(text for text in texts(plot) if text) == ["0.40", "0.60", "0.90"]
    assert [tick.get_text() for tick in plot.figure.axes[0].get_xticklabels()] == [
        "expert 0\n2 tokens",
        "expert 1\n1 token",
    ]
    assert plot.data["expert 1"].tolist() == [0.0, 0.4, 0.0] and plot.data["token"].tolist() == ["a", "b", "c"]
    (ax,) = plot.figure.axes
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["expert 0\n2 tokens", "expert 1\n1 token"]
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["a", "b", "c"]
    several = plots.routing_matrix({"EC": w[:2], "top-2": 2 * w[:2]}, ["a", "b"])
    assert [ax.collections[0].get_clim() for ax in several.figure.axes] == [(0.0, 1.0), (0.0, 1.8)]
    left, right = several.figure.axes
    assert left.get_shared_y_axes().joined(left, right)  # whose tokens are named once
    assert "every token is taken" in several.alt and [ax.get_title() for ax in several.figure.axes] == ["EC", "top-2"]
    with pytest.raises(ValueError, match="Shape of passed values"):
        plots.routing_matrix({"EC": w}, ["a", "b"])


def test_two_routings_of_one_seed():
    rows = [("a", s, 4.0 + s, 4.5 + s) for s in range(3)]
    wide = pd.DataFrame([*rows, ("b", 0, math.nan, math.nan)], columns=["arm", "seed", "as trained", "causally"])
    plot = drawn(plots.final_loss(wide, "causally", reference="as trained"))
    assert plot.data["mean"].tolist()[0] == pytest.approx(0.5)
    assert "Causally minus as trained: a 0.500 (0.500 to 0.500), 3 seeds." in plot.alt and plot.alt.endswith(
        "Not run: b."
    )
    frame = wide.melt(["arm", "seed"], var_name="routing", value_name="loss").assign(change="other text")
    panels = drawn(plots.by_routing(frame, "loss", "change", "loss (nats)"))
    assert panels.alt.endswith("Not run: b.")
    (ax,) = panels.figure.axes
    assert (
        ax.get_xlabel() == "loss (nats)"
        and ax.get_title() == "other text"
        and list(ax.get_lines()[-3].get_xdata()) == [0, 0]
    )
    assert "a, as trained 5.000 (2.516 to 7.484); a, causally 5.500" in panels.alt
    assert re.search("other text: .*; a, causally 5.500", panels.alt) and legend(panels) == ["as trained", "causally"]


def test_retention():
    rows = [
        ("gate", s, after, task, 0.9 - 0.1 * (after - task))
        for s in (0, 1)
        for after in (1, 2)
        for task in range(1, after + 1)
    ]
    frame = pd.DataFrame([*rows, ("joint", 0, 2, 1, math.nan)], columns=["arm", "seed", "after", "task", "accuracy"])
    plot = drawn(plots.retention(frame))
    assert plot.alt == (
        "Accuracy on each task, right after it was learned and after the last. gate: task 1 90% then 80%, task 2 90% then 90%. "
        "Not run: joint."
    )
    assert all(ax.get_xscale() == "linear" for ax in plot.figure.axes)
    ax = plot.figure.axes[0]
    assert (ax.get_ylim(), ax.get_xlabel(), ax.get_ylabel()) == ((-3, 103), "tasks learned", "accuracy (%)")
    assert [text.get_text() for text in ax.texts] == ["task 1", "task 2"] and ax.get_xticks().tolist() == [1, 2]
    lines = [line for line in ax.get_lines() if line.get_marker() in ("o", "s")]
    assert [(line.get_marker(), list(line.get_ydata())) for line in lines] == [
        ("o", pytest.approx([90, 80])),
        ("s", pytest.approx([90])),
    ]
    assert len({line.get_color() for line in lines}) == 2 and plot.data["arm"].unique().tolist() == ["gate"]
    assert plots.retention(frame[::-1]).svg() == plot.svg()  # a task has its colour, whoever comes first
    two = plots.retention(pd.concat([frame.assign(arm=arm) for arm in "ab"])).figure.axes
    assert two[0].get_gridspec().get_geometry() == (1, 2) and [ax.get_title() for ax in two] == ["a", "b"]
    assert two[0].get_shared_y_axes().joined(*two)  # one scale, and its numbers once
    several = plots.retention(pd.concat([frame.assign(arm=arm) for arm in "abc"])).figure
    assert [ax.get_visible() for ax in several.axes] == [True, True, True, False]  # two by two
    assert several.get_figheight() == 2 * two[0].figure.get_figheight() > 5


def test_tasks_are_in_the_order_of_their_numbers():
    tasks = range(1, 12)
    frame = pd.DataFrame({"arm": "gate", "seed": 0, "after": 11, "task": tasks, "accuracy": [k / 20 for k in tasks]})
    plot = plots.retention(frame)
    names = [f"task {k}" for k in tasks]
    assert plot.data["task"].tolist() == names and re.findall(r"task \d+", plot.alt) == names
    shown = {text.get_text(): to_rgb(text.get_color()) for text in plot.figure.axes[0].texts}
    green = [shown[name][1] for name in names]  # of viridis, which grows from end to end
    assert green == sorted(green)


def test_shares_of_the_floor_leave_out_the_floor_and_what_stands_in_tables():
    rows = [("floor", "", "plain", "eager", 1.0), ("EC-CF2", "", "plain", "eager", 0.5), ("EC-CF2", "", "triton", "CUDA graph", 0.9),
            ("floor", "in 8 bits", "plain", "eager", 1.5), ("EC-CAP2", "Dykstra", "plain", "eager", 0.1), ("top-2", "", "triton", "eager", 0.8)]  # fmt: skip
    each = [(*row, what) for row in rows for what in ("routing", "forward", "forward + backward")]
    frame = pd.DataFrame(each, columns=["layer", "variant", "path", "mode", "share_of_floor", "what"])
    frame = frame.assign(name=frame["layer"] + " " + frame["path"], ms=2.0, low_ms=1.0, high_ms=3.0)
    frame.loc[frame["what"] == "forward", "share_of_floor"] -= 0.05
    sizes = [
        frame.assign(size=size, share_of_floor=k * frame["share_of_floor"])
        for size, k in (("small", 1.0), ("large", 0.5))
    ]
    plot = plots.share_of_floor(pd.concat(sizes))
    assert plot.alt.endswith(
        "small: EC-CF2 plain 50%, floor plain 150%, top-2 triton 80%. large: EC-CF2 plain 25%, floor plain 75%, top-2 triton 40%."
    )
    left, right = plot.figure.axes
    marks = [line for line in left.get_lines() if line.get_marker() in ("o", "D") and len(line.get_xdata()) == 3]
    assert [(line.get_marker(), list(line.get_xdata())) for line in marks] == [
        ("o", pytest.approx([45, 145, 75])), ("D", pytest.approx([50, 150, 80])),
    ]  # fmt: skip
    assert [tick.get_text() for tick in left.get_yticklabels()] == ["EC-CF2 plain", "floor plain", "top-2 triton"]
    assert left.get_legend() is right.get_legend() is None and legend(plot) == [FORWARD, BOTH]
    assert [100, 100] in [list(line.get_xdata()) for line in left.get_lines()] and right.get_title() == "large"
    assert plot.data[["ms", "low_ms", "high_ms"]].drop_duplicates().values.tolist() == [[2.0, 1.0, 3.0]]
    assert plot.data.groupby(["size", "layer"], sort=False)["share_of_floor"].apply(list).to_dict() == {
        (size, name): pytest.approx([k * (x - 0.05), k * x])
        for size, k in (("small", 1.0), ("large", 0.5))
        for name, x in (("EC-CF2 plain", 0.5), ("floor plain", 1.5), ("top-2 triton", 0.8))
    }


def test_times_of_steps_stand_by_arm_and_path():
    rows = [("A", "own", "plain", "eager", 3.0), ("B", "own", "triton", "CUDA graph", 2.0), ("B", "even", "triton", "CUDA graph", 1.0),
            ("C", "own", "plain", "eager", None)]  # fmt: skip
    frame = pd.DataFrame(rows, columns=["arm", "routing", "path", "mode", "ms"]).assign(
        low_ms=0.5, high_ms=4.0, mfu=0.25
    )
    plot = drawn(plots.step_times(frame))
    assert plot.alt == (
        "Time of a training step, median: A, own routing, plain 3.0 ms; B, own routing, triton, CUDA graph 2.0 ms; "
        "B, even routing, triton, CUDA graph 1.0 ms."
    )
    (ax,) = plot.figure.axes
    (marks,) = (one for one in ax.collections if len(one.get_offsets()) == 3)
    assert marks.get_offsets().tolist() == [[3.0, -0.15], [2.0, 0.85], [1.0, 1.15]]  # its own above, even below
    bars = next(one for one in ax.collections if hasattr(one, "get_segments"))
    assert [bar.tolist() for bar in bars.get_segments()] == [[[0.5, y], [4.0, y]] for y in (-0.15, 0.85, 1.15)]
    own, forced = style.looks("AB"), style.PAPER
    filled = [mpl.colors.to_hex(color) for color in marks.get_facecolors()]
    assert filled == [own["A"].color.lower(), own["B"].color.lower(), forced.lower()]
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["A, plain", "B, triton, CUDA graph"]
    assert ax.get_ylim() == (1.5, -0.5) and plot.data["mfu"].tolist() == [0.25] * 3
    assert legend(plot) == ["routed by its own router", "routed evenly, by force"]
    fills = [handle.get_markerfacecolor() for handle in plot.figure.legends[0].legend_handles]
    assert fills == [style.GREY, style.PAPER]


def test_what_a_run_gets_over_plain_is_a_line_per_width_in_a_panel_per_way_to_launch():
    rows = [
        {"n": n, "d_model": d, "mode": mode, "what": what, "plain_ms": 2.0, "auto_ms": 2.0 * ratio, "ratio": ratio}
        for mode, worse in ((EAGER, 0.0), (GRAPH, -0.3))
        for what, more in ((FORWARD, 0.2), (BOTH, 0.0))
        for n, d, ratio in ((8192, 4096, 0.5 + more + worse), (512, 4096, 0.6 + more + worse), (512, 256, 0.4 + worse))
    ]
    plot = plots.over_plain(pd.DataFrame(rows))
    assert plot.alt.startswith("Time of a layer as a run gets it, over that of plain PyTorch. ")
    assert "eager: 0.40 to 0.80, at n 512 and d 4,096, forward." in plot.alt
    assert "CUDA graph: 0.10 to 0.50, at n 512 and d 4,096, forward." in plot.alt
    assert plot.data.to_dict("records") == [row | {"panel": row["mode"]} for row in rows]
    left, right = plot.figure.axes
    assert [ax.get_title() for ax in (left, right)] == [EAGER, GRAPH] and left.get_xscale() == "log"
    assert left.get_ylabel() == "over plain PyTorch's time"
    drawn = sorted(
        (list(x), [round(v, 3) for v in y]) for x, y in (line.get_data() for line in left.lines) if len(x) == 2
    )
    assert drawn[:1] == [([0, 1], [1, 1])]  # as fast as plain
    assert drawn[1:] == [([512, 8192], [0.6, 0.5]), ([512, 8192], [0.8, 0.7])]
    assert (
        legend(plot) == ["width d", "256", "4,096", BOTH, FORWARD] and left.get_legend() is right.get_legend() is None
    )


def test_growth_shows_times_power_and_floor():
    times = [("n", 8192, 4.0), ("n", 1000, 2.0), ("d_model", 16, 3.0), ("d_model", 64, 5.0)]
    grown = pd.DataFrame(times, columns=["axis", "value", "ms"]).assign(low_ms=1.0, high_ms=6.0, floor_ms=0.5)
    fits = pd.DataFrame(
        [("n", 0.5, 0.4, 0.6, 2.0), ("d_model", 1.25, 1.0, 1.5, 3.0)],
        columns=["axis", "exponent", "low", "high", "at_1"],
    )
    plot = drawn(plots.growth(grown, fits))
    assert plot.alt.endswith("grows. tokens n: to the power 0.50. width d, f = 4 d: to the power 1.25.")
    assert plot.data[["panel", "axis", "value", "ms", "floor_ms"]].values.tolist() == [
        ["tokens n", "n", 1000, 2.0, 0.5], ["tokens n", "n", 8192, 4.0, 0.5],
        ["width d, f = 4 d", "d_model", 16, 3.0, 0.5], ["width d, f = 4 d", "d_model", 64, 5.0, 0.5],
    ]  # fmt: skip
    first, second = plot.figure.axes
    lines = {line.get_label(): list(line.get_ydata()) for line in first.get_lines()}
    assert lines["EC layer"] == [2.0, 4.0] and lines["floor: six products"] == [0.5, 0.5]
    dashed = {line.get_label(): line.get_linestyle() for line in first.get_lines()}
    assert dashed == {"EC layer": "None", "fitted power": "-", "floor: six products": "--"}
    assert first.yaxis.get_major_formatter()(0.5, 0) == "0.5" and not first.xaxis.get_minor_ticks()
    (bars,) = first.collections
    assert [bar.tolist() for bar in bars.get_segments()] == [[[x, 1.0], [x, 6.0]] for x in (1000, 8192)]
    assert lines["fitted power"] == pytest.approx([2 * 1000**0.5, 2 * 8192**0.5])
    assert [tick.get_text() for tick in first.get_xticklabels()] == ["1000", "8k"]
    assert first.get_xlabel() == "power 0.50 (0.40 to 0.60)" and second.get_xlabel() == "power 1.25 (1.00 to 1.50)"
    assert legend(plot) == ["floor: six products", "fitted power", "EC layer"]
    assert first.get_ylabel() == "forward + backward (ms)" and first.get_yscale() == second.get_xscale() == "log"


def test_a_profile_has_a_bar_for_each_kind_of_work():
    kinds = pd.DataFrame([("idle", 1600.0, 0.6, "x"), ("loss", 4.0, 0.4, "y")], columns=["kind", "ms", "share", "most"])
    plot = drawn(plots.profile(kinds))
    assert plot.alt == "Where the time of a training step goes: idle 60%; loss 40%."
    (ax,) = plot.figure.axes
    assert [bar.get_width() for bar in ax.patches] == pytest.approx([60, 40]) and texts(plot) == ["1600.0 ms", "4.0 ms"]
    colors = [mpl.colors.to_hex(bar.get_facecolor()) for bar in ax.patches]
    assert colors[0] == style.GREY.lower() != colors[1] and ax.get_ylim()[0] > ax.get_ylim()[1]  # the longest on top
    plot.figure.canvas.draw()
    assert all(text.get_window_extent().x1 < ax.bbox.x1 for text in ax.texts)  # beside its bar, and within the axes


def test_gates_send_images_to_experts():
    confusion = pd.DataFrame([[0.9, 0.1, 0.0], [0.2, 0.5, 0.3], [0.0, 0.3, 0.7]])
    related = pd.DataFrame([[1.0, 0.9, 0.8], [0.3, 1.0, 0.95], [0.6, 0.2, 1.0]])  # above the diagonal: later tasks
    plot = drawn(plots.gate_choices(confusion, related, ["cats", "dogs", "cars"]))
    assert plot.alt.startswith("Which expert the gates send a task's images to. ")
    assert plot.alt.endswith(
        "images sent to each expert (%): on average 70.0% of a task's images go to its own expert, fewest of dogs (50.0%). "
        "relatedness: 1 to itself; to an earlier task at most 0.60 (cars to cats)."
    )
    first, second = plot.data.groupby("panel", sort=False)[["task", "1", "2", "3"]]
    assert first[1].values.tolist()[1] == ["dogs", 20.0, 50.0, 30.0] and second[1].values.tolist()[2] == [
        "cars",
        0.6,
        0.2,
        1.0,
    ]
    assert [ax.get_xlabel() for ax in plot.figure.axes] == ["expert", "gate of task"]
    left, right = plot.figure.axes
    assert left.get_ylabel() == "images of task" and [text.get_text() for text in left.texts][:3] == [
        "90.0",
        "10.0",
        "0.0",
    ]
    assert [text.get_text() for text in right.texts][:3] == ["1.00", "0.90", "0.80"]
    assert [ax.collections[0].get_clim() for ax in (left, right)] == [(0, 100), (0, 1)]
    assert [tick.get_text() for tick in left.get_yticklabels()] == ["cats", "dogs", "cars"]
    unlike = plots.gate_choices(confusion, related - 0.5, ["cats", "dogs", "cars"]).figure.axes[1]
    assert unlike.collections[0].get_clim() == (pytest.approx(-0.3), 1)  # relatedness may be below 0
    for given in ((None, related), (confusion, None)):
        assert plots.gate_choices(*given, ["cats", "dogs", "cars"]).figure is None


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
    fits = pd.DataFrame([("n", 0.5, 0.4, 0.6, 2.0)], columns=["axis", "exponent", "low", "high", "at_1"])
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
        "level": (plots.over(of_runs.assign(steps=[1, 2, 3, 4, 4, 4, 4]), "steps", level="top-2"), 4.2, [1.4, 1.5, 1.8], [7], [9, 10], []),
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


def test_the_label_of_a_difference_is_no_wider_than_its_figure():
    arm = "GShard top-2 renormalized, no auxiliary loss"
    other = "GShard top-2 renormalized, first choices counted"  # beside whose name the axis is short
    frame = pd.DataFrame({"arm": [other, arm], "seed": 0, "val_loss_causal": [3.7, 3.8]})
    figure = plots.final_loss(frame, "val_loss_causal", arm).figure
    figure.draw_without_rendering()
    label = figure.axes[0].xaxis.label
    assert arm in label.get_text()
    (left, right), width = label.get_window_extent().intervalx, figure.bbox.width
    assert 0 <= left < right <= width


def test_saved_as_a_picture_it_is_the_same_each_time(runs, tmp_path):
    plot, paths = plots.final_loss(table(runs)), [tmp_path / "a.png", tmp_path / "b.png"]
    for path in paths:
        plot.save(path)
    picture = pyplot.imread(paths[0])
    assert "fill: #ffffff" not in plot.svg() and b"Software" not in paths[0].read_bytes()
    assert paths[0].read_bytes() == paths[1].read_bytes() and picture.shape[1] == round(150 * style.WIDTH)


def test_a_figure_that_is_not_saved_whole_leaves_the_old_one(runs, tmp_path, monkeypatch):
    plot, path = plots.final_loss(table(runs)), tmp_path / "a.png"
    plot.save(path)
    before = path.read_bytes()

    def full(figure, to, **_):
        to.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(plot.figure), "savefig", full)
    with pytest.raises(OSError, match="no space left to write .*a.png"):
        plot.save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_users_matplotlibrc_changes_no_figure(runs):
    """The same bytes, also for what is made while a figure is drawn, such as its ticks."""

    def digest():
        plot, png = plots.final_loss(table(runs)), io.BytesIO()
        plot.figure.savefig(png, format="png", dpi=50)  # as a user saves it
        return hashlib.sha256(plot.svg().encode() + png.getvalue()).hexdigest()

    clean = digest()
    settings = {
        "font.size": "30",
        "text.usetex": "True",
        "axes.prop_cycle": "cycler('color', ['r'])",
        "savefig.dpi": "7",
    }
    for key, value in settings.items():
        with mpl.rc_context():
            mpl.rcParams[key] = value
            assert digest() == clean, key
            assert mpl.rcParams[key] == mpl.rcParams.__class__({key: value})[key]  # theirs is as it was


def test_an_arm_looks_the_same_in_every_figure():
    one, other = (
        plots.looks(["EC-CF2 raw", "Hash modulo"]),
        plots.looks(["Dense", "Hash modulo", "EC-CF2 raw, pool 512", "EC-CF2 raw"]),
    )
    assert one["EC-CF2 raw"] == other["EC-CF2 raw"] and one["Hash modulo"] == other["Hash modulo"]
    crowd = [f"A{i}" for i in range(9)]  # which leave its colour to an arm that has one
    assert all(plots.looks([*crowd, name])[name][:2] == known for name, known in style._KNOWN.items())
    gates = plots.looks(["EC-CF2 renormalized", "EC-CF2 raw", "EC-CF2 scaled"])
    assert len({look.color for look in gates.values()}) == 1 and len({look.dashes for look in gates.values()}) == 3


def test_known_arms_have_the_colours_of_okabe_and_ito():
    blue, sky, green, orange, vermilion, purple = "#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7"
    named = {"EC-CF2": blue, "EC": blue, "one EC network": blue, "EC-CF1": green, "EC-CF0.5": sky, "GShard top-2": vermilion,
             "Switch top-1": orange, "Hash modulo": purple, "Dense": style.INK, "one dense network": style.INK}  # fmt: skip
    assert {arm: plots.looks([arm])[arm].color for arm in named} == named
    together = [
        "EC-CF2",
        "EC-CF1.5",
        "EC-CF1",
        "EC-CF0.5",
        "EC-CAP2",
        "EC-CAP3",
        "GShard top-2",
        "Switch top-1",
        "Hash modulo",
        "Dense",
    ]
    shown = plots.looks(together).values()
    assert len({look.color for look in shown}) == len({look.marker for look in shown}) == len(together)
    gates = plots.looks(f"EC-CF2 {gate}" for gate in ("renormalized", "raw", "scaled"))
    assert [look.dashes for look in gates.values()] == ["", (4, 2), (1, 1.5)]  # solid, dashed, dotted
    none, *some = map(_luminance, style.COUNT_COLORS)
    assert some == sorted(some, reverse=True) and 0.5 < none < 0.7 and len(set(to_rgb(style.COUNT_COLORS[0]))) == 1


def test_the_colours_of_the_centre_are_no_other_arms_even_where_it_is_not_in_the_figure():
    centre = {style._KNOWN[name][0] for name in ("EC-CF2", "GShard top-2", "Switch top-1")}
    alone = [plots.looks([f"A{i}"])[f"A{i}"].color for i in range(40)]
    assert len(centre) == 3 and centre.isdisjoint(alone) and len(set(alone)) == 7


def test_no_two_arms_of_a_figure_look_alike_and_all_are_seen_on_black_and_on_white():
    arms = [f"EC-CF2 pool={n}" for n in range(9)] + ["Dense"]
    assert len({(look.color, look.dashes) for look in plots.looks(arms).values()}) == len(arms)
    for color in {*style._PALETTE, style.GREY, *(color for color, _ in style._KNOWN.values())} - {style.INK}:
        for paper in ("#ffffff", "#16191d"):  # of template/style.css
            light, dark = sorted((_luminance(color), _luminance(paper)), reverse=True)
            assert (light + 0.05) / (dark + 0.05) > 1.9, (color, paper)


def test_ink_is_the_one_that_is_read_best():
    inks = {
        "#000000": "#fff",
        "#ffffff": "#000",
        "#ff0000": "#fff",
        "#00ff00": "#000",
        "#0000ff": "#fff",
        "#808080": "#000",
        "#ff8000": "#000",
        "#0080ff": "#fff",
    }
    assert {color: style.on_color(color) for color in inks} == inks


def _luminance(color: str) -> float:
    """Of WCAG 2."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


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


@pytest.mark.parametrize(("middle", "count"), [(5, 8), (9.9, 8), (0.1, 8), (5, 14), (9.9, 20)])
def test_no_name_at_the_end_of_a_line_lies_over_another_or_outside(middle, count):
    fig, ax = pyplot.subplots(figsize=(7.6, 4.3))
    ax.set_ylim(0, 10)
    ends = {
        f"an arm {i} whose name is long, {i} experts" if i % 3 else f"arm {i}": middle + i / 500 for i in range(count)
    }
    name_ends(ax, ends, {})
    boxes = sorted((text.get_window_extent(fig.canvas.get_renderer()) for text in ax.texts), key=lambda box: box.y0)
    assert all(low.y1 <= high.y0 + 1 for low, high in pairwise(boxes))
    inside, (first, last) = ax.get_window_extent(), (boxes[0].y0, boxes[-1].y1)
    if count == 8:
        assert inside.y0 - 8 <= first < last <= inside.y1 + 8  # half a line: a curve may end at the edge
    else:
        assert inside.y0 - first == pytest.approx(last - inside.y1, abs=12)  # as far out below as above
    if (middle, count) == (5, 8):
        assert np.mean([text.xy[1] for text in ax.texts]) == pytest.approx(
            np.mean(list(ends.values()))
        )  # none is favoured
    pyplot.close(fig)
