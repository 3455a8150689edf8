"""Steps as CUDA graphs: where they may be, and, on a GPU, that they compute what other steps do."""

import dataclasses

import pytest
import torch

from ecmoe import paths
from ecmoe.bench.step import bench_study
from ecmoe.training import cuda_graph as graph
from ecmoe.training.lit import LitModel
from ecmoe.training.run import run_or_load

ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


class OnGPU(LitModel):
    """Says that it lies on a GPU."""

    device = torch.device("cuda")


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"router": "dense"}, True),
        ({"router": "expert_choice"}, True),
        ({"router": "expert_choice", "max_experts_per_token": 3}, True),
        ({"router": "token_choice", "top_k": 2, "capacity_factor": 1.0}, True),
        ({"router": "hash", "capacity_factor": 1.25}, True),
        ({"router": "expert_threshold"}, True),
        # The fullest expert's load is read from the device.
        ({"router": "token_choice", "top_k": 2, "capacity_factor": None}, False),
        ({"router": "hash", "capacity_factor": None}, False),
        ({"router": "linear_assignment"}, False),
        ({"router": "kmeans"}, False),
        ({"router": "dense_moe"}, True),
        ({"router": "dense", "precision": "16-mixed"}, False),
        ({"router": "dense", "strategy": "ddp"}, False),
        ({"router": "dense", "accumulate": 2}, False),
        ({"router": "dense", "activation_checkpointing": True}, False),
    ],
)
def test_a_step_is_captured_only_where_nothing_in_it_changes_but_the_numbers(tiny_config, keys, expected):
    assert graph.capturable(OnGPU(tiny_config(**keys))) is expected
    assert not graph.capturable(LitModel(tiny_config(**keys)))  # on a CPU


def test_a_run_may_ask_for_it_anywhere(tiny_config, tmp_path, monkeypatch):
    config = tiny_config(seed=7)
    asking = dataclasses.replace(config, cuda_graph=True)
    assert asking.name == config.name  # it computes the same
    monkeypatch.setattr(paths, "runs", lambda: tmp_path)
    assert run_or_load(asking, progress=False).ok


@pytest.mark.parametrize("router", ["expert_choice", "task_level"])  # whose batches hold tasks, too
def test_what_is_captured_leaves_no_trace_and_is_the_losses_of_any_batch(tiny_config, monkeypatch, router):
    lit, seen = LitModel(tiny_config(router=router)), []
    some, other = (torch.randint(256, (8, 17), generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    if router == "task_level":
        some, other = (some, torch.arange(8) % 4), (other, torch.arange(8) % 3)

    def capture(step, given, **keys):
        parts = (some,) if isinstance(some, torch.Tensor) else some
        assert all(torch.equal(a, b) and a is not b for a, b in zip(given, parts, strict=True))  # addresses of its own
        assert not torch.is_autocast_cache_enabled() and torch.is_autocast_enabled("cpu")
        seen.append((set(step.parameters()) == set(lit.model.parameters()), keys))
        step(*given)
        return step

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", capture)
    monkeypatch.setattr(torch, "clear_autocast_cache", lambda: seen.append("cleared"))
    lit.losses(other)
    before = {name: value.clone() for name, value in lit.model.named_buffers()}
    with torch.autocast("cpu", torch.bfloat16):
        captured = graph.captured(lit, some, pool=(1, 2))
    (told,) = (one for one in seen if one != "cleared")
    assert seen.index("cleared") < seen.index(told) and told == (True, {"allow_unused_input": True, "pool": (1, 2)})
    assert any(value.any() for value in before.values())
    assert all(torch.equal(value, before[name]) for name, value in lit.model.named_buffers())
    for ours, theirs in zip(captured(other), lit.losses(other), strict=True):
        torch.testing.assert_close(ours, theirs)


@ON_GPU
@pytest.mark.parametrize(
    "keys",
    [
        {"router": "expert_choice"},
        {"router": "expert_choice", "gate": "renormalized", "max_experts_per_token": 2},
        {"router": "token_choice", "top_k": 2, "capacity_factor": 1.0},
        {"router": "token_choice", "top_k": 2, "capacity_factor": 1.0, "balance": "importance_load"},  # draws at random
        {"router": "hash", "capacity_factor": 1.25},
        {"router": "expert_threshold"},
        {"router": "dense"},
    ],
)
@pytest.mark.parametrize("compiled", [False, True])
def test_a_graph_trains_like_kernel_by_kernel(tiny_config, tmp_path, monkeypatch, keys, compiled):
    curves = []
    for cuda_graph in (False, True):
        monkeypatch.setattr(paths, "runs", lambda where=str(cuda_graph): tmp_path / where)
        config = tiny_config(**keys, seed=3, compile=compiled, cuda_graph=cuda_graph, precision="bf16-mixed")
        curves.append(run_or_load(config, progress=False).curve)
    for column in ("train_loss", "val_loss", "val_loss_causal", "aux_loss", "share_0", "share_1"):
        torch.testing.assert_close(
            *(torch.tensor(curve[column].to_numpy()) for curve in curves), rtol=2e-3, atol=2e-3, equal_nan=True
        )


@ON_GPU
def test_steps_of_a_studys_arms_are_timed_as_the_graphs_that_runs_take(tiny_config, monkeypatch):
    captured, capture = [], graph.captured
    monkeypatch.setattr(graph, "captured", lambda *args: captured.append(args) or capture(*args))
    keys = {"cuda_graph": True, "sequence_length": 128}
    arms = {
        "EC": tiny_config(**keys),
        "Dense": tiny_config(router="dense", **keys),
        "Eager": tiny_config(router="dense", sequence_length=128),
    }
    table = bench_study(arms, repeats=3)
    assert table["arm"].tolist() == list(arms) and (table["ms"] > 0).all() and table.attrs["absent"] == []
    assert len(captured) == 2
