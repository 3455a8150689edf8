"""`ecmoe bench`: rows beside their floor, and an einsum row that computes the same thing."""

import json

import pytest
import torch
from typer.testing import CliRunner

from ecmoe import MoE, bench
from ecmoe.cli import app
from ecmoe.routing import ExpertChoice, TokenChoice


@pytest.fixture(scope="module")
def measured():
    return bench.bench_layer(n=64, d_model=8, d_ff=16, num_experts=4, repeats=2)


def test_every_row_stands_beside_the_floor_of_its_run(measured):
    floor = measured[measured["layer"] == "floor"].set_index("what")["ms"]
    assert set(floor.index) == {"forward", "forward + backward"}
    for row in measured.itertuples():
        assert row.ms > 0 and row.low_ms <= row.ms <= row.high_ms
        if row.what == "routing":
            assert row.of_forward_floor == pytest.approx(row.ms / floor["forward"])
        else:
            assert row.share_of_floor == pytest.approx(floor[row.what] / row.ms)
    assert {"EC-CF2", "top-2, capacity 2 n/e", "EC-CF2, one-hot einsum"} <= set(measured["layer"])


def test_the_plain_path_agrees_with_itself(measured):
    (row,) = measured.attrs["agreement"]
    assert row.pop("layer") == "EC-CF2" and row.pop("same_bits")
    assert set(row) == {"output", "x", "gate", "w1", "w2", "router.weight"} and set(row.values()) == {0}


def test_kernels_are_measured_and_held_to_the_plain_path(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(bench, "kernels_run", lambda device: True)
    table = bench.bench_layer(n=16, d_model=8, d_ff=16, num_experts=2, repeats=2, each_pass=True)
    for kind in ("triton", "triton-bmm"):
        assert len(table[table["layer"] == f"EC-CF2, {kind}"]) == 3  # forward, with backward, routing
    for row in table.attrs["agreement"]:
        assert row.pop("layer").startswith("EC-CF2") and row.pop("same_bits") is True
        assert all(value < (1e-2 if torch.cuda.is_available() else 1e-6) for value in row.values())
    passes = table.attrs["passes"]
    assert not any("error" in row for row in passes) and all(row["us"] > 0 for row in passes)
    assert {"select", "gather", "combine", "invert"} <= {row["pass"] for row in passes}
    assert "x_in w1, bmm" in bench.shown(passes)


def test_passes_need_a_gpu():
    if not torch.cuda.is_available():
        shown = CliRunner().invoke(app, ["bench", "--passes"])
        assert shown.exit_code == 2 and "CUDA" in shown.stderr


def test_absent_peers_are_named(measured):
    assert set(measured.attrs["absent"]) <= set(bench.PEERS.values())


def test_the_command_prints_a_table_and_keeps_it(tmp_path):
    path = tmp_path / "bench.json"
    sizes = ["--tokens", "64", "--d-model", "8", "--d-ff", "16", "--num-experts", "4", "--repeats", "2"]
    shown = CliRunner().invoke(app, ["bench", *sizes, "--json", str(path)])
    assert shown.exit_code == 0, shown.output
    (kept,) = json.loads(path.read_text(), parse_constant=pytest.fail)  # NaN is not JSON
    assert kept["setting"]["d_ff"] == 16
    assert all(row["layer"] in shown.stdout for row in kept["rows"])


def test_a_fraction_of_a_token_is_named_before_anything_is_timed():
    shown = CliRunner().invoke(app, ["bench", "--tokens", "33", "--num-experts", "4"])
    assert shown.exit_code == 2 and "n=33" in shown.stderr


def test_saved_as_json(measured, tmp_path):
    bench.save([measured], tmp_path / "bench" / "layer.json")
    (kept,) = json.loads((tmp_path / "bench" / "layer.json").read_text())
    assert kept["setting"]["n"] == 64 and len(kept["rows"]) == len(measured)


@pytest.mark.parametrize("router", [ExpertChoice(8, 4), TokenChoice(8, 4, 2, 0.5)])
def test_one_hot_row_computes_what_the_layer_computes(router):
    layer = MoE(router, 8, 16).double()
    x = torch.randn(1, 32, 8, dtype=torch.float64)
    torch.testing.assert_close(bench.one_hot_layer(layer, x), layer(x))
