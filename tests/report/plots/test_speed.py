"""Times of layers and steps: each number at its place, under its name."""

import matplotlib as mpl
import pandas as pd
import pytest

from ecmoe.bench.rows import BOTH, EAGER, FORWARD, GRAPH
from ecmoe.report import plots
from ecmoe.report.plots import style
from tests.report.plots.figures import drawn, legend, texts


def test_shares_of_the_floor_leave_out_the_floor():
    rows = [("floor", "", "plain", "eager", 1.0), ("EC-CF2", "", "plain", "eager", 0.5), ("EC-CF2", "", "triton", "CUDA graph", 0.9),
            ("floor", "", "plain", "CUDA graph", 1.0), ("EC-CAP2", "cap 2", "plain", "eager", 0.1), ("top-2", "", "triton", "eager", 0.8)]  # fmt: skip
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
        "small: EC-CF2 plain 50%, EC-CF2 triton 90%, EC-CAP2 plain 10%, top-2 triton 80%. "
        "large: EC-CF2 plain 25%, EC-CF2 triton 45%, EC-CAP2 plain 5%, top-2 triton 40%."
    )
    shares = {"EC-CF2 plain": 0.5, "EC-CF2 triton": 0.9, "EC-CAP2 plain": 0.1, "top-2 triton": 0.8}
    left, right = plot.figure.axes
    marks = [line for line in left.get_lines() if line.get_marker() in ("o", "D") and len(line.get_xdata()) == 4]
    assert [(line.get_marker(), list(line.get_xdata())) for line in marks] == [
        ("o", pytest.approx([45, 85, 5, 75])), ("D", pytest.approx([50, 90, 10, 80])),
    ]  # fmt: skip
    assert [tick.get_text() for tick in left.get_yticklabels()] == list(shares)
    assert left.get_legend() is right.get_legend() is None and legend(plot) == [FORWARD, BOTH]
    assert [100, 100] in [list(line.get_xdata()) for line in left.get_lines()] and right.get_title() == "large"
    assert plot.data[["ms", "low_ms", "high_ms"]].drop_duplicates().values.tolist() == [[2.0, 1.0, 3.0]]
    assert plot.data.groupby(["size", "layer"], sort=False)["share_of_floor"].apply(list).to_dict() == {
        (size, name): pytest.approx([k * (x - 0.05), k * x])
        for size, k in (("small", 1.0), ("large", 0.5))
        for name, x in shares.items()
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
    assert left.get_ylabel() == "time / plain PyTorch's time"
    drawn = sorted(
        (list(x), [round(v, 3) for v in y]) for x, y in (line.get_data() for line in left.lines) if len(x) == 2
    )
    assert drawn[:1] == [([0, 1], [1, 1])]  # as fast as plain
    assert drawn[1:] == [([512, 8192], [0.6, 0.5]), ([512, 8192], [0.8, 0.7])]
    assert (
        legend(plot) == ["width d", "256", "4,096", BOTH, FORWARD] and left.get_legend() is right.get_legend() is None
    )
    assert [line.get_color() for line in plot.figure.legends[0].get_lines()[-2:]] == [style.INK] * 2  # the page's ink
    edges = {
        line.get_markeredgecolor() for line in left.lines if len(line.get_xdata()) == 2 and line.get_marker() != "None"
    }
    assert edges == {style.PAPER}


def test_growth_shows_times_power_and_floor():
    times = [("n", 8192, 4.0), ("n", 1000, 2.0), ("n", 10, 1.5), ("d_model", 16, 3.0), ("d_model", 64, 5.0)]
    grown = pd.DataFrame(times, columns=["axis", "value", "ms"]).assign(low_ms=1.0, high_ms=6.0, floor_ms=0.5)
    fits = pd.DataFrame(
        [("n", 0.5, 0.9, 2.0), ("d_model", 1.25, 2.0, 3.0)], columns=["axis", "exponent", "of_floor", "at_1"]
    )
    plot = drawn(plots.growth(grown, fits))
    assert plot.alt.endswith(
        "grows. tokens n: to the power 0.50, the floor 0.90. width d, f = 4 d: to the power 1.25, the floor 2.00."
    )
    assert plot.data[["panel", "axis", "value", "ms", "floor_ms"]].values.tolist() == [
        ["tokens n", "n", 10, 1.5, 0.5], ["tokens n", "n", 1000, 2.0, 0.5], ["tokens n", "n", 8192, 4.0, 0.5],
        ["width d, f = 4 d", "d_model", 16, 3.0, 0.5], ["width d, f = 4 d", "d_model", 64, 5.0, 0.5],
    ]  # fmt: skip
    first, second = plot.figure.axes
    lines = {line.get_label(): list(line.get_ydata()) for line in first.get_lines()}
    assert lines["EC layer"] == [1.5, 2.0, 4.0] and lines["floor: six products"] == [0.5] * 3
    dashed = {line.get_label(): line.get_linestyle() for line in first.get_lines()}
    assert dashed == {"EC layer": "None", "power of the size": "-", "floor: six products": "--"}
    assert first.yaxis.get_major_formatter()(0.5, 0) == "0.5" and not first.xaxis.get_minor_ticks()
    (bars,) = first.collections
    assert [bar.tolist() for bar in bars.get_segments()] == [[[x, 1.0], [x, 6.0]] for x in (10, 1000, 8192)]
    assert lines["power of the size"] == pytest.approx([2 * 1000**0.5, 2 * 8192**0.5])
    assert [tick.get_text() for tick in first.get_xticklabels()] == ["10", "1000", "8k"]
    assert first.get_xlabel() == "power 0.50, floor 0.90" and second.get_xlabel() == "power 1.25, floor 2.00"
    assert legend(plot) == ["floor: six products", "power of the size", "EC layer"]
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
