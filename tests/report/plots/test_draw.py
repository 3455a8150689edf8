"""What every figure is drawn with, looked at on the axes themselves: what stands where, how it is called, what is left out."""

import math
import re
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from ecmoe.model import metrics
from ecmoe.report import plots
from ecmoe.report.plots import draw
from ecmoe.report.plots.draw import PERCENT, name_ends, number
from ecmoe.report.plots.style import GREY, INK, PAPER, WIDTH, Look, looks, plain
from tests.report.plots.figures import across

SHOWN = {"a": Look("#0072b2", "o"), "b": Look("#d55e00", "s", (4, 2)), "level": Look("#009e73", "^")}


@pytest.fixture
def ax():
    with plain():
        yield Figure(figsize=(9, 4.2)).subplots()


def named(ax) -> dict[str, tuple]:
    """Text -> where it stands, and its colour."""
    return {text.get_text(): (*text.xy, text.get_color()) for text in ax.texts}


def test_panels_have_their_titles_and_one_table_of_their_numbers():
    def panel(ax, given):
        ax.plot([0, 1], [given, 0], label=f"first of {given}")
        ax.plot([0, 1], [0, given], label="second")
        return pd.DataFrame({"x": [given]}, index=[7]), f"it is {given}"

    each = {"one": 1, "two": 2, "three": 3}
    plot = draw.panels(
        "loss of it", panel, each, 5.0, "pqr", ["q", "q"], rows=2, key="size", ylabel="y", legend=1, sharey=True
    )
    assert plot.alt == "Loss of it. one: it is 1. two: it is 2. three: it is 3. Not run: p, r."
    assert plot.data.to_dict("index") == {i: {"x": i + 1, "size": name} for i, name in enumerate(each)}
    axes = plot.figure.axes
    assert [(ax.get_title(), ax.get_visible(), ax.get_ylabel()) for ax in axes] == [
        ("one", True, "y"), ("two", True, ""), ("three", True, ""), ("", False, ""),
    ]  # fmt: skip
    assert (
        axes[0].get_subplotspec().get_gridspec().get_geometry() == (2, 2) and axes[0].get_ylim() == axes[2].get_ylim()
    )
    assert plot.figure.get_size_inches().tolist() == [WIDTH, 5.0] and plot.figure.get_constrained_layout()
    (legend,) = plot.figure.legends  # of the first, one below the other
    assert [text.get_text() for text in legend.get_texts()] == ["first of 1", "second"] and legend._ncols == 1
    wide = draw.panels("loss", panel, dict.fromkeys("abc", 1), 5.0, rows=2, legend=3).figure.axes[0]
    assert wide.figure.legends[0]._ncols == 3
    assert wide.get_subplotspec().get_gridspec().get_geometry() == (2, 2)
    assert draw.panels("loss", panel, dict.fromkeys("abc", 1), 5.0).figure.axes[0].get_gridspec().ncols == 3
    alone = draw.panels("loss", panel, {"": 4}, 3.0, ["p"])
    assert alone.alt == "Loss: it is 4." and list(alone.data) == ["x"] and not alone.figure.legends
    assert [(ax.get_title(), ax.get_ylabel()) for ax in alone.figure.axes] == [("", "")]
    for given, measured, said in (({}, None, ""), ({"": 1}, [], " Not run: p, q.")):
        nothing = draw.panels("loss", panel, given, 3.0, "pq", measured)
        assert nothing.figure is None and nothing.alt == f"Loss: not run.{said}" and nothing.data.empty


def measured() -> pd.DataFrame:
    """Shares of two arms at three sizes, by three seeds, and of one at a fourth, by two; and two rows that lack a number."""
    rows = [
        (arm, seed, x, base + x / 100 + seed / 50)
        for arm, base in (("b", 0.4), ("a", 0.2))
        for seed in (0, 1, 2)
        for x in (4, 1, 2)
    ]
    rows += [("level", 0, 8, 0.3), ("level", 1, 8, 0.5), ("a", 3, 4, math.nan), ("a", 3, math.nan, 0.9)]
    return pd.DataFrame(rows, columns=["arm", "seed", "num_experts", "dropped"])


def test_lines_go_through_means_with_intervals_marks_and_names(ax):
    data = draw.lines(ax, measured(), "num_experts", "dropped", SHOWN, log=True, ticks_at_values=True, levels=["level"])
    means = {(arm, x): base + x + 2 for arm, base in (("a", 20), ("b", 40)) for x in (1, 2, 4)} | {("level", 8): 40.0}
    assert data[["arm", "num_experts", "mean"]].values.tolist() == [
        [*at, pytest.approx(mean)] for at, mean in means.items()
    ]
    half = 4.302653 * 2 / math.sqrt(3)  # Student's t for two degrees of freedom, in percent
    assert (data["high"] - data["mean"])[:6].tolist() == pytest.approx([half] * 6)
    assert data["seeds"].tolist() == [3] * 6 + [2] and math.isnan(data["high"][6])  # two seeds give no verdict
    assert ax.get_xscale() == "log" and ax.xaxis.get_transform().base == 2
    assert ax.get_xticks().tolist() == [1, 2, 4] and [tick.get_text() for tick in ax.get_xticklabels()] == [*"124"]
    assert isinstance(ax.xaxis.get_minor_locator(), NullLocator)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("number of experts e", "")
    through = {line.get_color(): line for line in ax.get_lines() if line.get_marker() in ("o", "s")}
    assert list(through) == [SHOWN["a"].color, SHOWN["b"].color]
    for name, line in zip("ab", through.values(), strict=True):
        assert line.get_ydata().tolist() == pytest.approx([means[name, x] for x in (1, 2, 4)])
        assert line.get_marker() == SHOWN[name].marker and line.is_dashed() == (name == "b")
        ring = SHOWN[name].color, PAPER  # of an open marker; a filled one stands out from others by an edge like paper
        assert (line.get_markeredgecolor(), line.get_markerfacecolor()) == (ring if name == "b" else ring[::-1])
        assert all(line.zorder > bars[2][0].zorder for bars in ax.containers)
    assert through[SHOWN["b"].color].get_markeredgewidth() > through[SHOWN["a"].color].get_markeredgewidth()
    bars = [segment for bars in ax.containers for segment in bars[2][0].get_segments()]
    assert sorted(y for bar in bars for y in bar[:, 1]) == pytest.approx(sorted([*data["low"][:6], *data["high"][:6]]))
    (level,) = (line for line in ax.get_lines() if across(line))
    assert level.get_ydata()[0] == pytest.approx(40.0) and level.get_color() == SHOWN["level"].color
    assert not level.is_dashed()  # which would say that its gates are raw
    ends = {"a": 26.0, "level": 40.0, "b": 46.0}
    at = named(ax)
    assert {color for *_, color in at.values()} == {INK}  # letters in the colours of the lines would be hard to read
    samples = {
        name: (line.get_color(), line.is_dashed(), line.get_marker(), line.get_markerfacecolor())
        for name, line in zip(at, ax.figure.artists, strict=True)
    }
    assert samples == {
        "a": (SHOWN["a"].color, False, "o", SHOWN["a"].color),
        "level": (SHOWN["level"].color, False, "", SHOWN["level"].color),
        "b": (SHOWN["b"].color, True, "s", PAPER),
    }
    assert list(at) == list(ends) and all(x == 1 for x, *_ in at.values())
    assert [y for _, y, _ in at.values()] == sorted(y for _, y, _ in at.values())


def test_a_level_of_raw_gates_is_dashed_like_other_lines_of_theirs(ax):
    raw = SHOWN | {"level": Look("#009e73", "^", (4, 2))}
    draw.lines(ax, measured(), "num_experts", "dropped", raw, ticks_at_values=True, levels=["level"])
    (level,) = (line for line in ax.get_lines() if across(line))
    assert level.is_dashed() and level.get_marker() in ("", "None", None)


def test_lines_stand_a_few_points_aside_so_that_no_interval_hides_another(ax):
    frame = pd.concat([measured().query("arm == 'a'").assign(arm=arm) for arm in "abc"])  # one and the same
    draw.lines(ax, frame, "num_experts", "dropped", looks("abc"), log=True, ticks_at_values=True)
    point, at = ax.figure.dpi / 72, ax.transData.transform((2, 22))[0]
    lines = [line for line in ax.get_lines() if line.get_marker() not in ("None", None, "")]
    marks = [line.get_transform().transform(line.get_xydata()[1])[0] for line in lines]
    assert [(x - at) / point for x in marks] == pytest.approx([-4, 0, 4])
    bars = [bars[2][0] for bars in ax.containers]
    ends = [bar.get_transform().transform(bar.get_segments()[1])[:, 0] for bar in bars]
    assert [list((x - at) / point) for x in ends] == [pytest.approx([x, x]) for x in (-4, 0, 4)]


def test_several_levels_have_each_its_height(ax):
    frame = pd.concat([measured(), pd.DataFrame({"arm": "c", "seed": [0], "num_experts": 8, "dropped": 0.1})])
    look = looks(["b", "a", "level", "c"])
    draw.lines(ax, frame, "num_experts", "dropped", look, ticks_at_values=True, levels=["c", "level", "not run"])
    heights = {line.get_color(): line.get_ydata()[0] for line in ax.get_lines() if across(line)}
    assert heights == {look["c"].color: pytest.approx(10.0), look["level"].color: pytest.approx(40.0)}
    assert ax.get_xticks().tolist() == [1, 2, 4] and set(named(ax)) == {"a", "b", "c", "level"}
    marks = [line.get_marker() for line in ax.figure.artists if line.get_color() in heights]
    assert marks == ["", ""]


def test_lines_of_steps_are_bands_and_may_be_differences(ax):
    frame = measured().assign(step=lambda rows: 5000 * rows["num_experts"])
    data = draw.lines(ax, frame, "step", "dropped", SHOWN, reference="a")
    assert data["arm"].unique().tolist() == ["b"] and data["mean"].tolist() == pytest.approx([20.0] * 3)
    zero, line = ax.get_lines()
    assert list(zero.get_ydata()) == [0, 0] and not zero.is_dashed() and line.is_dashed()
    assert [zero.get_color(), line.get_color()] == [SHOWN["a"].color, SHOWN["b"].color]  # an arm's own, as elsewhere
    assert (
        line.get_marker() in (None, "", "None") and ax.get_xscale() == "linear" and len(ax.collections) == 1
    )  # a band
    assert ax.xaxis.get_major_formatter()(15_000.0) == "15k" and list(named(ax)) == ["a", "b"]
    assert [(one.get_color(), one.get_marker()) for one in ax.figure.artists] == [
        (SHOWN["a"].color, ""),
        (SHOWN["b"].color, ""),
    ]
    ax.clear()
    draw.lines(ax, frame, "step", "dropped", {arm: SHOWN[arm] for arm in ("b", "a", "level")}, named=False)
    first, second, _ = ax.get_lines()  # each in its own look, in their order
    assert [first.get_color(), second.get_color()] == [SHOWN[arm].color for arm in "ba"]
    assert not ax.texts and ax.yaxis.get_major_formatter()(15_000.0) != "15k"
    assert draw.lines(ax, frame[:0], "step", "dropped", {}).empty


def test_names_keep_their_place_where_there_is_room(ax):
    ax.set_ylim(0, 10)
    draw.name_ends(
        ax, {"high": 8.0, "low": 2.0, "one who isn't shown": 5.0}, {"high": Look("red", "o"), "low": Look("blue", "o")}
    )
    assert named(ax) == {"low": (1, 2.0, INK), "one who isn't shown": (1, 5.0, INK), "high": (1, 8.0, INK)}
    assert {text.xyann for text in ax.texts} == {(33, 0)} and {text.get_va() for text in ax.texts} == {"center"}
    assert [line.get_color() for line in ax.figure.artists] == ["blue", INK, "red"]
    edge, high = ax.transAxes.transform((1, 0))[0], ax.transData.transform((0, 8))[1]
    sample = ax.figure.artists[-1].get_transform().transform(ax.figure.artists[-1].get_xydata())
    assert (edge + 33 / 72 * ax.figure.dpi > sample[:, 0]).all() and (
        sample[:, 0] > edge
    ).all()  # between axes and name
    assert ax.figure.artists[-1].get_markevery() == [1]  # in its middle
    assert sample[:, 1] == pytest.approx([high] * 3) and ax.get_ylim() == (0, 10)


def test_names_that_are_too_close_leave_a_line_between_centres_and_more_where_they_are_of_two_lines(ax):
    ax.set_ylim(0, 10)
    draw.name_ends(ax, {"a": 5.0, "b": 5.01, "an arm whose name takes two lines, 64 experts": 5.02}, {})
    a, b, of_two = (text.xy[1] for text in ax.texts)
    line = 0.062 * 10 * 3.3 / (ax.figure.get_size_inches()[1] - 1)  # (0.062 of an axis that is 3.3 inches high)
    assert b - a == pytest.approx(line) and of_two - b == pytest.approx(line * (1 + 0.7 * 0.5))


def test_points_are_rows_from_the_top_with_a_tick_for_each_seed(ax):
    frame = measured().query("num_experts == 1 or arm == 'level'")
    order = ["level", "b", "lost", "a"]
    data = draw.points(ax, frame, "dropped", order, looks(order))
    assert data["arm"].tolist() == ["level", "b", "lost", "a"]
    assert data["mean"].fillna(0).tolist() == pytest.approx([40, 43, 0, 23])
    ticks = sorted(tuple(np.round(at, 6)) for marks in ax.collections for at in marks.get_offsets())
    assert ticks == [(21.0, 3), (23.0, 3), (25.0, 3), (30.0, 0), (41.0, 1), (43.0, 1), (45.0, 1), (50.0, 0)]
    means = [line for line in ax.get_lines() if line.get_marker() not in ("", "None", None)]
    assert sorted((y, round(x, 6)) for line in means for x, y in zip(*line.get_data(), strict=True) if x == x) == [
        (0, 40),
        (1, 43),
        (3, 23),
    ]
    assert {line.get_linestyle() for line in means} == {"None"}
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["level", "b", "lost", "a"] and ax.get_ylim() == (
        3.5,
        -0.5,
    )
    (gap,) = ax.texts
    assert (gap.get_text(), gap.get_position(), gap.get_color()) == ("not run", (0.01, 2), GREY)
    assert (
        ax.get_ylabel() == ""
        and not ax.yaxis.get_gridlines()[0].get_visible()
        and ax.xaxis.get_gridlines()[0].get_visible()
    )


def test_points_of_raw_gates_are_open(ax):
    rows = [(arm, seed, 4 + seed / 10) for arm in ("A raw", "A renormalized", "A scaled, 8 experts") for seed in (0, 1)]
    frame = pd.DataFrame(rows, columns=["arm", "seed", "val_loss"])
    arms = list(frame["arm"].unique())
    draw.points(ax, frame, "val_loss", arms, looks(arms))
    means = [line for line in ax.get_lines() if line.get_marker() not in ("", "None", None)]
    assert [line.get_markerfacecolor() != "none" for line in means] == [False, True, False]
    assert means[0].get_markeredgecolor() == means[1].get_markerfacecolor() == looks(["A"])["A"].color


def test_points_of_two_kinds_stand_side_by_side(ax):
    frame = pd.concat(
        [measured().assign(kind=kind, dropped=lambda rows, k=k: rows["dropped"] + k) for k, kind in enumerate("xy")]
    )
    pairs = {"x": Look("#0072b2", "o"), "y": Look("#d55e00", "D")}
    data = draw.points(ax, frame.query("num_experts == 2"), "dropped", ["a", "b"], pairs, hue="kind")
    assert data[["arm", "kind"]].values.tolist() == [["b", "x"], ["a", "x"], ["b", "y"], ["a", "y"]]
    assert data["mean"].tolist() == pytest.approx([44, 24, 144, 124]) and not ax.collections  # no seed has a tick
    means = {(to_hex(line.get_color()), line.get_marker()): line.get_ydata() for line in ax.get_lines() if len(line.get_xdata()) == 2
             and line.get_marker() in ("o", "D")}  # fmt: skip
    assert list(means) == [tuple(look[:2]) for look in pairs.values()]
    assert [list(y) for y in means.values()] == [
        [pytest.approx(i - 0.125) for i in (0, 1)],
        [pytest.approx(i + 0.125) for i in (0, 1)],
    ]


def test_a_heat_map_writes_every_number_but_what_is_missing(ax):
    matrix = (
        pd.DataFrame([[0.25, math.nan], [1.5, 3.0]], ["r", "s"], ["c", "d"])
        .rename_axis("rows")
        .rename_axis("columns", axis=1)
    )
    draw.heat(ax, matrix, ".1f", 0.0, 4.0)
    assert [text.get_text() for text in ax.texts] == ["0.2", "1.5", "3.0"] and len(ax.figure.axes) == 1
    (mesh,) = ax.collections
    assert mesh.get_clim() == (0.0, 4.0) and (ax.get_xlabel(), ax.get_ylabel()) == ("", "")
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["r", "s"] and ax.get_yticklabels()[
        0
    ].get_rotation() == 0
    assert (
        ax.yaxis.get_major_ticks()[0].tick1line.get_markersize() == 0 and not ax.xaxis.get_gridlines()[0].get_visible()
    )


def test_rows_are_named_from_the_top(ax):
    draw.name_rows(ax, ["x", "y", "z"], {"x", "z"}, fontsize=7)
    assert [(tick.get_text(), tick.get_fontsize()) for tick in ax.get_yticklabels()] == [(name, 7) for name in "xyz"]
    assert ax.get_yticks().tolist() == [0, 1, 2] and ax.get_ylim() == (2.5, -0.5)
    assert [(text.get_text(), text.get_position()) for text in ax.texts] == [("not run", (0.01, 1))]


def test_numbers_decades_apart_have_a_logarithmic_axis(ax):
    ax.plot([1, 2], [3.0, 40_000.0])
    ax.set_ylim(0, 1)
    draw.in_decades(ax, "y", "val_loss")
    assert ax.get_yscale() == "linear"
    draw.in_decades(ax, "y", "over_capacity")
    assert ax.get_yscale() == "symlog" and ax.get_xscale() == "linear" and ax.yaxis.get_transform().linthresh == 10
    assert ax.get_ylim()[0] == -3 and ax.get_ylim()[1] > 40_000 and ax.yaxis.get_major_formatter()(1000.0, 0) == "1000"


def test_over_seeds_keeps_the_order_of_the_frame_and_what_has_no_name():
    rows = [("b", 2, 1.0), ("b", 1, 5.0), ("a", 2, 2.0), ("b", 2, 3.0), (None, 1, 4.0), ("b", 2, 5.0), ("a", 2, 8.0)]
    data = draw.over_seeds(pd.DataFrame(rows, columns=["arm", "x", "y"]), ["arm", "x"], "y")
    assert data.astype(object).fillna(0)[["arm", "x", "mean", "seeds"]].values.tolist() == [
        ["b", 2, 3.0, 3],
        ["b", 1, 5.0, 1],
        ["a", 2, 5.0, 2],
        [0, 1, 4.0, 1],
    ]
    assert data["high"][0] == pytest.approx(3 + 4.302653 * 2 / math.sqrt(3)) and data["low"][1:].isna().all()


def test_over_seeds_counts_the_seeds_of_the_mean_which_a_diverged_run_is_not_part_of():
    frame = pd.DataFrame({"arm": "a", "y": [1.0, 3.0, math.inf, math.nan]})
    assert draw.over_seeds(frame, ["arm"], "y")[["mean", "seeds"]].values.tolist() == [[2.0, 2]]


def test_a_difference_is_to_the_reference_at_the_same_seed_and_x():
    rows = [("r", 0, 1, 1.0), ("r", 0, 2, 2.0), ("r", 1, 1, 4.0), ("a", 0, 1, 1.5), ("a", 0, 2, 1.0), ("a", 1, 2, 9.0)]
    frame = pd.DataFrame(rows, columns=["arm", "seed", "x", "y"])
    found = draw.minus(frame, "y", "r", ["seed", "x"])
    assert found["arm"].unique().tolist() == ["a"] and found["y"].fillna(99).tolist() == [0.5, -1.0, 99]


def test_what_is_labelled_in_percent_is_shown_so():
    assert {column for column, label in plots.LABELS.items() if re.search("%|percentage", label)} == set(PERCENT)
    losses = [
        label for column, label in plots.LABELS.items() if column.split("_")[-1] == "loss" and column != "aux_loss"
    ]
    letters = {"num_experts": "e", "capacity_factor": "c", "n": "n", "d_model": "d"}  # the paper's
    assert {column: plots.LABELS[column].split()[-1] for column in letters} == letters
    words = {"steps": "steps", "num_experts": "experts", "capacity_factor": "factor", "n": "tokens", "devices": "GPUs", "d_model": "width",
             "moe_init_scale": "initial scale", "capacity": "places", "patches_left_out": "patches that no", "images_left_out": "images without",
             "loss": "loss", "final_accuracy": "accuracy", "forgetting": "forgetting", "of_ideal": "speed"}  # fmt: skip
    assert all(word in plots.LABELS[column] for column, word in words.items())
    assert set(plots.LABELS) - set(words) == {metric.name for metric in metrics.METRICS}
    assert len(set(plots.LABELS.values())) == len(plots.LABELS)
    assert len(losses) > 2 and all(label.endswith("loss (nats per token)") for label in losses)


def test_numbers_in_words_have_as_many_digits_as_say_something():
    rows = [(99.9994, math.nan, math.nan), (-2.0, -99.9, -0.25), (-1234.567, -100.0, 1e6)]
    said = [number(SimpleNamespace(mean=mean, low=low, high=high)) for mean, low, high in rows]
    assert said == ["99.999", "-2.000 (-99.900 to -0.250)", "-1,235 (-100 to 1,000,000)"]


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_no_name_lies_over_another_however_many_rows_of_panels_there_are(rows):
    figure = Figure(figsize=(9, 2.9 * rows), layout="constrained")
    axes = figure.subplots(rows, 2, squeeze=False, sharey=True)
    for ax in axes.flat:
        ax.set(ylim=(-3, 103), xlabel="tasks learned", title="an arm")
        name_ends(ax, {f"task {k}": 77.0 * (k == 5) for k in range(1, 6)}, {})
    figure.canvas.draw()
    for ax in axes.flat:
        boxes = sorted((text.get_window_extent() for text in ax.texts), key=lambda box: box.y0)
        assert all(low.y1 <= high.y0 + 1 for low, high in pairwise(boxes))


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
