"""Figures: what they show is what was measured, alt text has the numbers, gaps are named."""

import math

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot

from ecmoe.config import RunConfig
from ecmoe.model import metrics
from ecmoe.report import plots
from ecmoe.study.stats import Effect
from ecmoe.study.table import curves, table
from ecmoe.training.result import Result, not_run


def run(config: RunConfig, loss: float, rows: int = 5, **routing: float) -> Result:
    x = np.linspace(0, 100, rows)
    measured = {
        "step": x,
        "tokens": 10 * x,
        "seconds": x / 7 + config.seed,
        "val_loss": loss + 1 - x / 100,
    }
    shares = {f"share_{j}": 0.0 for j in range(9)} | {"share_1": 0.75, "share_3": 0.25}
    routing = {"dropped": 0.1, "over_capacity": 0.3, **shares, **routing}
    curve = pd.DataFrame(measured).assign(**routing).reindex(columns=metrics.curve())
    summary = {
        "config": config.to_dict(),
        "name": config.name,
        "seed": config.seed,
        "status": "finished",
    }
    return Result(summary | {"val_loss": loss, "routing": routing}, curve)


EC = RunConfig()
TOP2 = RunConfig(router="token_choice", top_k=2, capacity_factor=1.0)
HASH = RunConfig(router="hash", capacity_factor=1.25)


@pytest.fixture
def runs():
    seeds = [run(c.replace(seed=s), loss + s / 100) for c, loss in ((EC, 2.0), (TOP2, 2.5)) for s in range(3)]
    return [*seeds, not_run(HASH)]


def drawn(plot):
    """Draw it, as a page would: layout, and every text, or an error."""
    plot.figure.canvas.draw()
    assert plot.alt and not pyplot.get_fignums()  # shown by the report alone
    return plot


@pytest.mark.parametrize("x", ["step", "tokens", "seconds"])
def test_loss_over_steps(runs, x):
    plot = drawn(plots.loss_over_steps(curves(runs), x=x))
    assert plot.data["arm"].tolist() == ["EC-CF2 raw", "GShard top-2 raw"]
    if x != "seconds":  # clocks differ, so seconds end where the fastest seed does
        assert plot.data["mean"].tolist() == pytest.approx([2.01, 2.51])
        assert plot.data["high"].tolist() == pytest.approx([2.02, 2.52])
        assert "EC-CF2 raw 2.010 (3 seeds); GShard top-2 raw 2.510 (3 seeds)" in plot.alt
    assert "Not run: Hash." in plot.alt
    whole, half = plot.figure.axes
    assert "Hash (not run)" in [line.get_label() for line in whole.lines]
    assert min(line.get_xdata().min() for line in half.lines if len(line.get_xdata())) >= plot.data[x].max() / 2


def test_a_diverged_run_ends_where_it_broke_off():
    lost = run(EC, 2.0)
    lost.summary["status"] = "diverged"
    lost.curve.loc[3:, "val_loss"] = math.nan
    plot = drawn(plots.loss_over_steps(curves([lost]), zoom=False))
    assert plot.data["step"].item() == 50


def test_final_loss_sorts_and_says_where_its_axis_starts(runs):
    plot = drawn(plots.final_loss(table(runs)))
    assert plot.data["arm"].tolist() == ["EC-CF2 raw", "GShard top-2 raw", "Hash"]
    assert plot.data["mean"].tolist()[:2] == pytest.approx([2.01, 2.51]) and plot.data["seeds"].tolist() == [3, 3, 0]
    ax = plot.figure.axes[0]
    assert "doesn't start at 0" in ax.get_xlabel() and "nats per token" in ax.get_xlabel()
    assert [text.get_text() for text in ax.texts] == ["not run"]
    assert "2.010 (1.985 to 2.035), 3 seeds" in plot.alt  # t interval: 0.01 x 4.303 / sqrt(3)
    one = drawn(plots.final_loss(table([run(EC, 2.0)])))
    assert "1 seed." in one.alt and "to" not in one.alt.split(":")[1]


def test_loss_against_a_key():
    results = [run(EC.replace(num_experts=e, seed=s), 2 + 1 / e) for e in (4, 8, 16) for s in range(2)]
    plot = drawn(plots.loss_against(table(results, axes=["num_experts"]), "num_experts"))
    assert plot.data["arm"].unique().tolist() == ["EC-CF2 raw"] and plot.data["num_experts"].tolist() == [4, 8, 16]
    assert "2.250 at 4, 2.125 at 8" in plot.alt


def test_expert_shares(runs):
    paper = {"one or two: most": 0.74, "three or four: 23%": 0.23, "3%": 0.03}
    plot = drawn(plots.expert_shares(table(runs), paper=paper))
    assert plot.data.set_index("arm").loc["EC-CF2 raw", ["0", "1", "3", "8+"]].tolist() == [
        0,
        75,
        25,
        0,
    ]
    assert "EC-CF2 raw: 0.0% none, 75.0% one or two, 25.0% three or four, 0.0% more" in plot.alt
    assert "The paper: one or two: most, three or four: 23%, 3%." in plot.alt and "Not run: Hash." in plot.alt
    over = drawn(plots.expert_shares_over_steps(curves(runs)))
    assert over.data["1 or 2"].eq(75).all() and "75.0% 1 or 2" in over.alt
    said = [[text.get_text() for text in ax.texts] for ax in over.figure.axes if ax.get_visible()]
    assert said == [[], [], ["not run"]]  # only where nothing is drawn
    left = over.figure.axes[0]
    assert any(label.get_visible() and label.get_text() for label in left.get_yticklabels())


def test_load_is_in_percent(runs):
    plot = drawn(plots.load(curves(runs)))
    assert plot.data.groupby("measure")["mean"].first().tolist() == pytest.approx([30, 10])
    assert "equal share (%): EC-CF2 raw 30.0" in plot.alt and "dropped (%): EC-CF2 raw 10.0" in plot.alt


def test_capacity_demand():
    results = [run(TOP2.replace(capacity_factor=c, seed=s), 2.0, dropped=0.2 / c) for c in (1.0, 2.0) for s in (0, 1)]
    plot = drawn(plots.capacity_demand(table(results, axes=["capacity_factor"])))
    dropped = plot.data[plot.data["measure"].str.contains("dropped")]
    assert dropped["mean"].tolist() == pytest.approx([20, 10])


def test_routing_matrix_names_who_is_left_out():
    w = np.array([[0.9, 0.0], [0.6, 0.4], [0.0, 0.0]])
    plot = drawn(plots.routing_matrix({"EC": w}, ["a", "b", "c"]))
    assert "EC: experts hold 2, 1 tokens; no expert takes c" in plot.alt
    assert sorted(text.get_text() for text in plot.figure.axes[0].texts) == ["0.40", "0.60", "0.90"]
    assert plot.data["expert 1"].tolist() == [0.0, 0.4, 0.0]
    with pytest.raises(ValueError, match="3 rows of weights for 2 tokens"):
        plots.routing_matrix({"EC": w}, ["a", "b"])


def test_parameter_counts():
    frame = pd.DataFrame({"model": ["a", "b"], "total": [90.0, 200], "printed_total": [100.0, 200],
                          "active": [50.0, 50], "printed_active": [50.0, 40]})  # fmt: skip
    plot = drawn(plots.parameter_counts(frame))
    assert plot.data["total_off_percent"].tolist() == [-10, 0] and "Furthest apart: a, -10.0%" in plot.alt


def test_an_arm_looks_the_same_in_every_figure():
    one, other = (
        plots.looks(["EC-CF2", "Hash"]),
        plots.looks(["Dense", "Hash", "EC-CF2 pool=512", "EC-CF2"]),
    )
    assert one["EC-CF2"] == other["EC-CF2"] and one["Hash"] == other["Hash"]
    gates = plots.looks(["EC-CF2", "EC-CF2 renormalized", "EC-CF2 scaled"])
    assert len({look.color for look in gates.values()}) == 1
    assert len({look.line for look in gates.values()}) == 3


def test_no_two_arms_of_a_figure_look_alike():
    arms = [f"EC-CF2 pool={n}" for n in range(10)] + ["Dense"]
    assert len({(look.color, look.line) for look in plots.looks(arms).values()}) == len(arms)


def test_nothing_at_all_is_a_figure_too():
    missing = [not_run(EC)]
    drawn(plots.loss_over_steps(curves(missing)))
    drawn(plots.final_loss(table(missing)))
    drawn(plots.expert_shares(table(missing)))
    drawn(plots.expert_shares_over_steps(curves(missing)))
    for plot in (
        plots.load(curves(missing)),
        plots.loss_against(table(missing, axes=["num_experts"]), "num_experts"),
        plots.capacity_demand(table(missing, axes=["capacity_factor"])),
    ):
        for ax in drawn(plot).figure.axes:  # no scale where nothing is
            assert [text.get_text() for text in ax.texts] == ["not run"]


def test_ratios_along_name_where_they_begin_and_end():
    rows = pd.DataFrame(
        {"target": [4.0, 3.0], "mean": [0.9, 1.1], "low": [0.8, 1.0], "high": [1.0, 1.2], "n": [3.0, 3.0]}
    )
    plot = drawn(plots.ratios_along({"a against b": rows, "a against c": rows.iloc[:0]}, "steps", 0.5))
    assert (
        "a against b 0.900 at 4.000, 1.100 (1.000 to 1.200) at 3.000" in plot.alt
        and "Not run: a against c." in plot.alt
    )
    ax = plot.figure.axes[0]
    assert ax.get_xlim()[0] > ax.get_xlim()[1] and ax.get_ylim()[0] == 0
    assert plot.data["comparison"].tolist() == ["a against b"] * 2
    empty = drawn(plots.ratios_along({"a against c": rows.iloc[:0]}, "steps", 0.5))
    assert [text.get_text() for text in empty.figure.axes[0].texts] == ["not run"] and "nothing" in empty.alt


def test_differences_say_which_side_they_are_on():
    effects = {
        "a - b": Effect(-0.02, -0.03, -0.01, 3, "nats per token"),
        "a - c": Effect(0.01, -0.01, 0.03, 3, "nats per token"),
        "a - d": Effect(0.04, 0.03, 0.05, 6, "nats per token"),
        "a - e": Effect(0.5, None, None, 1, "nats per token"),
        "a - f": Effect(math.nan, None, None, 0, "nats per token"),
    }
    plot = drawn(plots.differences(effects, "difference (nats per token)", "a is better"))
    ax = plot.figure.axes[0]
    assert ax.get_xlabel() == "difference (nats per token)\nleft of 0: a is better"
    assert [text.get_text() for text in ax.texts] == ["not run"]
    assert "a - b: -0.02 nats per token (95% -0.03 to -0.01; 3 seeds), below 0" in plot.alt
    assert "3 seeds), above" not in plot.alt and "6 seeds), above 0" in plot.alt
    assert plot.alt.endswith("Not run: a - f.")
    assert plot.data["low"].tolist()[:3] == [-0.03, -0.01, 0.03]
    colors = {line.get_marker(): line.get_color() for line in ax.lines if line.get_marker() != "None"}
    assert set(colors) == {"<", ">", "o"} and len(set(colors.values())) == 3
