"""`ecmoe bench`: rows beside their floor, and an einsum row that computes the same thing."""

import json

import pytest
import torch
from typer.testing import CliRunner

import ecmoe.bench_step as bench_step_module
from ecmoe import MoE, RunConfig, bench
from ecmoe.bench_step import ARMS, bench_step
from ecmoe.cli import app
from ecmoe.lit import LitModel
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


# The training step

STEP = {"n": 32, "d_model": 8, "d_ff": 16, "num_experts": 4, "layers": 2, "heads": 2, "sequence_length": 8, "vocab_size": 257}


def test_step_of_every_arm_is_timed():
    table = bench_step(repeats=2, **STEP)
    assert set(table["arm"]) == set(ARMS)
    for row in table.itertuples():
        assert row.low_ms <= row.ms <= row.high_ms
        assert row.tokens_per_second == pytest.approx(32 / (row.ms / 1e3))
    assert table.attrs["setting"]["vocab_size"] == 257 and table.attrs["absent"] == []


def test_step_moves_all_parameters(monkeypatch):
    seen = []
    monkeypatch.setattr(bench_step_module, "LitModel", lambda config: seen.append(LitModel(config)) or seen[-1])
    config = RunConfig(**{"d_model": 8, "heads": 2, "d_ff": 16, "num_experts": 4, "batch_size": 2, "sequence_length": 8})
    step = bench_step_module._step(config, "plain", False, torch.device("cpu"))
    before = [p.detach().clone() for p in seen[0].parameters()]
    step()
    assert all(not torch.equal(a, b) for a, b in zip(before, seen[0].parameters(), strict=True))


def test_the_command_times_a_step(tmp_path):
    sizes = [f for key, value in STEP.items() for f in ("--tokens" if key == "n" else f"--{key.replace('_', '-')}", str(value))]
    shown = CliRunner().invoke(app, ["bench", "--step", *sizes, "--repeats", "2", "--json", str(tmp_path / "step.json")])
    assert shown.exit_code == 0, shown.output
    (kept,) = json.loads((tmp_path / "step.json").read_text(), parse_constant=pytest.fail)
    assert {row["arm"] for row in kept["rows"]} == set(ARMS) and "GShard top-2" in shown.stdout
    refused = CliRunner().invoke(app, ["bench", "--step", "--tokens", "100", "--sequence-length", "16"])
    assert refused.exit_code == 2 and "sequence_length=16" in refused.stderr
