"""Who takes what: shares of tokens by experts, combine weights, what gates choose."""

import numpy as np
import pandas as pd
import pytest

from ecmoe.report import plots
from ecmoe.study.table import table
from tests.report.plots.figures import drawn, legend, texts


def test_expert_shares(runs):
    paper = {"1 or 2: most": 0.74, "3 or 4: 23%": 0.23, "3%": 0.03}
    plot = drawn(plots.expert_shares(table(runs), paper=paper))
    percent = [100 * (j + 1) / 45 for j in range(9)]
    assert plot.data.set_index("arm").loc["EC", [*"01234567", "8+"]].tolist() == pytest.approx(percent)
    assert plot.data.set_index("arm")["seeds"].to_dict() == {"EC": 3, "top-2": 3, "Hash": 0}
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
    assert [ax.collections[0].get_clim() for ax in (left, right)] == [(0, 100), (0.2, 1)]
    assert [tick.get_text() for tick in left.get_yticklabels()] == ["cats", "dogs", "cars"]
    unlike = plots.gate_choices(confusion, related - 0.5, ["cats", "dogs", "cars"]).figure.axes[1]
    assert unlike.collections[0].get_clim() == pytest.approx((-0.3, 0.5))  # relatedness may be below 0
    for given in ((None, related), (confusion, None)):
        assert plots.gate_choices(*given, ["cats", "dogs", "cars"]).figure is None
