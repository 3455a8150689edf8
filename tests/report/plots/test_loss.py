"""Losses, loads and accuracies: what is shown is what was measured, alt text has the numbers, gaps are named."""

import math
import re

import pandas as pd
import pytest
from matplotlib.colors import to_rgb

from ecmoe.report import plots
from ecmoe.report.plots import style
from ecmoe.study.table import curves, table
from ecmoe.training.result import not_run
from tests.report.plots.figures import EC, HASH, TOP2, across, drawn, legend, luminance, run, texts


def marked(plot):
    """The lines of a figure's first axes that have a marker."""
    return [line for line in plot.figure.axes[0].get_lines() if line.get_marker() not in ("", "None", None)]


def test_loss_over_steps(runs):
    plot = drawn(plots.over(curves(runs), "step"))
    ends = plot.data.groupby("arm").tail(1).set_index("arm")
    assert ends["mean"].to_dict() == pytest.approx({"EC": 2.01, "top-2": 2.51})
    half = 0.01 * 4.302653 / math.sqrt(3)  # Student's t for two degrees of freedom
    assert ends.loc["EC", ["low", "high"]].tolist() == pytest.approx([2.01 - half, 2.01 + half])
    assert "EC 2.010 (1.985 to 2.035) at 100, 3 seeds; top-2 2.510" in plot.alt and plot.alt.endswith("Not run: Hash.")
    assert texts(plot) == ["EC", "top-2"]  # each at the end of its line
    (ax,) = plot.figure.axes
    label = "validation loss (nats per token)"
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("training step", f"{label};\nthe axis doesn't start at 0")
    lower = drawn(plots.over(curves({"EC": [run(EC, 0.01, rows=50)]}), "step"))
    assert lower.figure.axes[0].get_ylim()[0] <= 0 and lower.figure.axes[0].get_ylabel() == label
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


def test_loss_over_tokens_is_a_line_whose_steps_may_differ_in_size(runs):
    per_step = {"EC": 500_000, "top-2": 2_000_000}
    frame = curves(runs).assign(tokens=lambda frame: frame["step"] * frame["arm"].map(per_step))
    plot = drawn(plots.over(frame, "tokens"))
    (ax,) = plot.figure.axes
    assert (ax.get_xlabel(), ax.get_xscale()) == ("training tokens", "linear")
    assert all(line.get_marker() in ("", "None") for line in ax.get_lines())  # which settings have
    assert plot.data.groupby("arm")["tokens"].max().to_dict() == {"EC": 50_000_000, "top-2": 200_000_000}
    assert " at 50000000, 3 seeds" in plot.alt and " at 200000000, 3 seeds" in plot.alt


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
    by_size = {"EC": [run(EC.replace(num_experts=e, seed=s), 2 + 1 / e) for e in (4, 8, 16) for s in range(3)]}
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
    for levels, heights in ((), []), (["Dense"], [2.7]):
        (ax,) = drawn(plots.over(table(by_size | dense), "num_experts", levels=levels)).figure.axes
        assert [line.get_ydata()[0] for line in ax.get_lines() if across(line)] == heights
        marked = {float(x) for line in ax.get_lines() if not across(line) for x in line.get_xdata()}
        assert (2 in marked) == (not levels)
    bare = table(by_size | dense)
    bare["num_experts"] = bare["num_experts"].mask(bare["arm"] == "Dense")
    plot = drawn(plots.over(bare, "num_experts", levels=["Dense"]))
    assert [line.get_ydata()[0] for line in plot.figure.axes[0].get_lines() if across(line)] == [2.7]
    assert ": Dense: 2.700; EC: 2.250" in plot.alt and texts(plot) == ["EC", "Dense"]
    assert plots.over(bare, "num_experts").alt.endswith(" Not run: Dense.")


def test_a_setting_of_which_one_value_was_run_is_no_figure():
    one = {"EC": [run(EC, 2.0)], "top-2": [run(TOP2, 2.1)]}
    plot = plots.over(table(one), "num_experts")
    assert plot.figure is None and "Not run: EC, top-2." in plot.alt
    two = table({"EC": [run(EC.replace(num_experts=4), 2.0)], "top-2": [run(TOP2.replace(num_experts=8), 2.1)]})
    drawn_with = {
        name: plots.over(two, "num_experts", levels=of).figure is not None
        for name, of in (("none", []), ("one", ["EC"]), ("both", ["EC", "top-2"]))
    }
    assert drawn_with == {"none": True, "one": False, "both": False}  # a level is at no value of its own


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
    there = zip(plot.figure.axes[0].texts, plot.figure.artists, strict=True)
    colors = {text.get_text(): line.get_color() for text, line in there}
    green = [to_rgb(colors[name])[1] for name in names]  # of viridis, which grows from end to end
    assert green == sorted(green) and len(set(green)) == len(tasks)
    light = [luminance(color) for color in colors.values()]
    assert min(light) + 0.05 > 2 * (luminance("#16191d") + 0.05) and 1.05 > 2 * (max(light) + 0.05)  # the pages' papers


def test_the_names_of_tasks_stand_at_the_ends_of_their_lines_however_wide_the_intervals_are():
    rows = [
        ("gate", seed, 1, task, end) for task, ends in ((1, (0, 1, 0)), (2, (1, 0, 1))) for seed, end in enumerate(ends)
    ]
    frame = pd.DataFrame(rows, columns=["arm", "seed", "after", "task", "accuracy"])
    plot = plots.retention(frame)
    assert plot.data["low"].min() < -100 and plot.data["high"].max() > 200  # far outside of the axes
    assert [text.xy[1] for text in plot.figure.axes[0].texts] == pytest.approx([100 / 3, 200 / 3])


def test_a_difference_has_the_looks_of_the_figure_with_its_reference():
    arms = ["GShard top-2", "Switch top-1", *(f"A{i}" for i in range(9))]
    rows = [(arm, seed, 4 + i / 9 + seed / 99) for i, arm in enumerate(arms) for seed in range(3)]
    frame = pd.DataFrame(rows, columns=["arm", "seed", "val_loss"])
    both = (plots.final_loss(frame), plots.final_loss(frame, reference="GShard top-2"))
    of = [
        {row.arm: line.get_color() for row, line in zip(plot.data.itertuples(), marked(plot), strict=True)}
        for plot in both
    ]
    assert len(of[1]) == 10 and of[0] == of[1] | {"GShard top-2": style.looks(arms)["GShard top-2"].color}


def test_lines_at_0_are_whole_and_lines_at_the_sides_are_inside(runs):
    empty = {"EC": [run(EC.replace(num_experts=e, seed=s), 2.0, dropped=0.0) for e in (4, 8) for s in range(3)]}
    several = plots.over(table({f"A{i}": empty["EC"] for i in range(7)}), "num_experts", ("val_loss", "dropped"))
    several.figure.draw_without_rendering()
    for ax in several.figure.axes:
        assert ax.get_ylim()[0] == 0
        assert all(not line.get_clip_on() and line.zorder > ax.spines["bottom"].zorder for line in ax.get_lines())
        at = [line.get_transform().transform(line.get_xydata())[:, 0] for line in ax.get_lines()]
        inside, radius = ax.get_window_extent(), 7 / 2 / 72 * several.figure.dpi
        assert min(map(min, at)) - radius > inside.x0 and max(map(max, at)) + radius < inside.x1
        assert all(line.zorder > bars[2][0].zorder for line in ax.get_lines() for bars in ax.containers)
