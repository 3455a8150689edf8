"""What 08_step_time measures is kept, belongs to its machine, and is read by rules that can be checked by hand."""

import pandas as pd
import pytest
import torch

from ecmoe import bench, plots, speed
from ecmoe.scoreboard import claim_table, record
from ecmoe.stats import Effect, verdict

TINY = {"n": 64, "d_model": 8, "d_ff": 16, "num_experts": 4}


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch):
    monkeypatch.setenv("ECMOE_HOME", str(tmp_path))


def test_layers_are_measured_once(monkeypatch):
    first = speed.layers({"tiny": TINY}, scale="smoke", repeats=2)
    assert {"floor", "EC-CF2"} <= set(first["layer"]) and (first["ms"] > 0).all()
    both = first[first["what"] == "forward + backward"].set_index("layer")["ms"]
    share = first[first["what"] == "forward + backward"].set_index("layer")["share_of_floor"]
    assert share["EC-CF2"] == pytest.approx(both["floor"] / both["EC-CF2"])
    monkeypatch.setattr(bench, "bench_layer", lambda **_: pytest.fail("measured again"))
    pd.testing.assert_frame_equal(speed.layers({"tiny": TINY}, scale="smoke", repeats=2), first)
    plot = plots.share_of_floor(first)
    assert f"EC-CF2 {100 * share['EC-CF2']:.0f}%" in plot.alt


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure on")
def test_a_gpu_page_without_a_gpu_has_gaps():
    layers = speed.layers({"0.1B/64E": TINY}, scale="gpu")
    assert layers["layer"].isna().all() and "Not run: 0.1B/64E." in plots.share_of_floor(layers).alt
    steps = speed.steps({}, scale="gpu")
    assert steps["rows"] == [] and "Not run" in plots.step_times(steps["rows"]).alt
    assert speed.step_ratio(steps, "GShard top-2", "EC-CF2").n == 0
    grown = speed.growth(TINY | {"capacity_factor": 2.0}, {"n": [64, 128]}, scale="gpu")
    assert not len(grown) and "what was not run" in plots.growth(grown, speed.exponents(grown)).alt


def test_growth_of_every_size():
    axes = {"n": [64, 128], "num_experts": [2, 4], "capacity_factor": [1.0, 2.0], "d_model": [8, 16]}
    grown = speed.growth(TINY | {"capacity_factor": 2.0}, axes, scale="smoke", repeats=2)
    assert grown.groupby("axis")["value"].apply(list).to_dict() == {k: [float(v) for v in vs] for k, vs in axes.items()}
    assert set(grown["path"]) == {"plain"} and (grown["ms"] > 0).all() and (grown["floor_ms"] > 0).all()
    assert len(plots.growth(grown, speed.exponents(grown)).figure.axes) == 4


def test_exponents_are_those_of_a_power_law():
    rows = [{"axis": "n", "value": v, "path": "plain", "ms": 3 * v**1.5, "floor_ms": 0.1 * v} for v in (1, 2, 8)]
    (found,) = speed.exponents(pd.DataFrame(rows)).to_dict("records")
    assert found["exponent"] == pytest.approx(1.5) and found["of its floor"] == pytest.approx(1.0)


def test_each_arm_counts_on_its_best_path():
    rows = [{"arm": "A", "path": "plain", "ms": 2.0}, {"arm": "A", "path": "triton", "ms": 1.0}, {"arm": "B", "path": "plain", "ms": 1.2}]
    measured = {"rows": rows, "samples": {"A, plain": [9.0, 9.0], "A, triton": [1.0, 1.1], "B, plain": [1.2, 1.32]}}
    assert speed.best_paths(rows) == {"A": "triton", "B": "plain"}
    ratio = speed.step_ratio(measured, "B", "A")
    assert ratio.mean == pytest.approx(1.2) and ratio.n == 2 and str(ratio).endswith("2 repeats)")


def test_repeats_are_not_taken_for_seeds(tmp_path, monkeypatch):
    monkeypatch.setenv("ECMOE_VERDICTS", str(tmp_path / "verdicts"))
    effect = Effect(1.3, 1.25, 1.35, 15, "ratio", "repeat")
    found = verdict(effect, 1.2, direction="above", scale="gpu")
    assert found.label == "reproduced" and "interval over repeats" in found.rule and "seed" not in found.rule
    record(found, "C2", "gpu")
    (line,) = [line for line in claim_table(tmp_path / "verdicts").splitlines() if line.startswith("| C2")]
    assert "1.3 x (1.25 to 1.35 over 15 repeats)" in line and "seed" not in line


def test_a_step_keeps_the_time_of_every_repeat():
    small = {"n": 64, "sequence_length": 32, "d_model": 8, "d_ff": 16, "heads": 2, "num_experts": 4, "vocab_size": 300}
    steps = speed.steps(small, scale="smoke", repeats=3)
    assert {row["arm"] for row in steps["rows"]} == {"EC-CF2", "EC-CF1", "GShard top-2", "Switch top-1"}
    assert all(len(samples) == 3 for samples in steps["samples"].values())
    assert speed.step_ratio(steps, "GShard top-2", "EC-CF2").n == 3
