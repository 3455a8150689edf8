"""Whose results may stand for whose: every key that decides what a run computes is in its name, and no other is."""

import contextlib
import dataclasses

import pytest
import torch

from ecmoe.config import CHOICES, RunConfig
from ecmoe.model.build import build_model
from ecmoe.routers import ROUTERS
from ecmoe.routing import causal_routing, routers

# Written down from the routers' papers and constructors, not read from the package; of a further router its row counts.
ROUTING = {name: set(row.keys) for name, row in ROUTERS.items()} | {
    "expert_choice": {"num_experts", "capacity_factor", "gate", "pool", "max_experts_per_token", "cap_solver"},
    "token_choice": {
        "num_experts", "capacity_factor", "top_k", "gate", "priority", "balance", "aux_loss_weight", "z_loss_weight",
    },
    "hash": {"num_experts", "capacity_factor", "hash_table"},
    "dense_moe": {"num_experts"},
    "dense": set(),
    "linear_assignment": {"num_experts"},
    "kmeans": {"num_experts", "capacity_factor"},
    "task_level": {"num_experts", "num_tasks", "task_table"},
    "expert_threshold": {"num_experts", "capacity_factor", "gate", "threshold_beta"},
}  # fmt: skip
OTHER = {  # another value of each routing key
    "num_experts": 4, "capacity_factor": 1.0, "gate": "renormalized", "pool": "sequence", "max_experts_per_token": 3,
    "cap_solver": "dykstra", "top_k": 1, "priority": "score", "balance": "importance_load", "aux_loss_weight": 0.5,
    "z_loss_weight": 0.5, "hash_table": "balanced", "num_tasks": 2, "task_table": "fixed", "threshold_beta": 0.5,
}  # fmt: skip
DECIDES = {  # another value of every other key that decides what is computed, of a run on text
    "layers": 2, "d_model": 32, "d_ff": 64, "heads": 2, "moe_every": 1, "moe_init_scale": 2.0, "relative_buckets": 16,
    "relative_max_distance": 64, "relative_init": "normal", "data": "enwik8", "streaming": True, "max_bytes": 1000,
    "tokenizer": "bpe", "vocab_size": 512, "sequence_length": 64, "seed": 1, "batch_size": 32, "accumulate": 2, "steps": 61,
    "optimizer": "adafactor", "learning_rate": 1e-3, "beta1": 0.8, "beta2": 0.95, "weight_decay": 0.1, "gradient_clip": 0.5,
    "schedule": "linear", "warmup_steps": 11, "constant_steps": 100, "decay_fraction": 0.5, "eval_batches": 4,
    "precision": "bf16-mixed", "strategy": "ddp", "devices": 2, "num_nodes": 2,
}  # fmt: skip
WATCHES = {  # of how a run is watched, and where it runs
    "eval_every": 7, "checkpoint_every": 7, "compile": True, "cuda_graph": True, "kernels": "plain",
    "activation_checkpointing": True,
}  # fmt: skip
IMAGES = {"patch_size": 1, "channels": 3, "classes": 5, "augment": True}


def test_every_key_is_looked_at():
    keys = {field.name for field in dataclasses.fields(RunConfig)} - {"router"}
    assert keys == {*OTHER, *DECIDES, *WATCHES, *IMAGES}
    assert set(ROUTING) == set(CHOICES["router"])


@pytest.mark.parametrize("router", ROUTING)
def test_what_a_router_reads_is_in_the_name_and_nothing_else(router):
    config = RunConfig(router=router, max_experts_per_token=2)
    for key, value in OTHER.items():
        other = config.replace(**{key: value})
        assert (other.digest() != config.digest()) == (key in ROUTING[router]), key


def computed(config: RunConfig) -> list[bytes]:
    """What two training passes and a causal one give, and what routers have learnt from them."""
    model = build_model(config, torch.arange(config.vocab_size))
    for p in model.parameters():
        p.data.mul_(2)  # sharper scores than at the start
    ids, tasks = torch.arange(2 * 64).view(2, 64) ** 2 % 251, torch.tensor([1, 0])
    torch.manual_seed(0)  # V-MoE's noise
    found = []
    for passing in (contextlib.nullcontext, contextlib.nullcontext, causal_routing):
        with passing(model):
            found += [model(ids, tasks), *(layer.aux_loss for layer in model.moe_layers if layer.aux_loss is not None)]
        for router in routers(model):
            router.end_step()
    return [t.detach().numpy().tobytes() for t in (*found, *(b for router in routers(model) for b in router.buffers()))]


SMALL = RunConfig(layers=2, d_model=16, d_ff=32, heads=4, sequence_length=64, batch_size=2)


@pytest.mark.parametrize("router", ROUTING)
def test_what_a_router_reads_changes_what_is_computed(router):
    config = SMALL.replace(router=router, capacity_factor=0.5, max_experts_per_token=1, num_tasks=8)
    before = computed(config)
    assert computed(config) == before
    for key in ROUTING[router]:
        assert computed(config.replace(**{key: OTHER[key]})) != before, key


@pytest.mark.parametrize("key", ["layers", "d_model", "d_ff", "heads", "moe_every", "moe_init_scale", "relative_buckets",
                                 "relative_max_distance", "relative_init", "seed"])  # fmt: skip
def test_what_a_model_reads_changes_what_is_computed(key):
    value = {"layers": 3, "d_model": 32, "d_ff": 64}.get(key, DECIDES[key])
    assert computed(SMALL.replace(**{key: value})) != computed(SMALL)


def test_another_meaning_of_configs_is_another_run(monkeypatch):
    before = RunConfig().name
    monkeypatch.setattr("ecmoe.config.SCHEMA", 10**6)
    assert RunConfig().name != before


def test_a_solver_without_a_cap_solves_nothing():
    assert RunConfig(cap_solver="dykstra").digest() == RunConfig().digest()


@pytest.mark.parametrize("key", DECIDES)
def test_what_decides_a_run_is_in_its_name(key):
    config = RunConfig(tokenizer="bpe", vocab_size=300) if key == "vocab_size" else RunConfig()
    changed = {key: DECIDES[key]} | ({"vocab_size": 300} if key == "tokenizer" else {})
    other = config.replace(**changed)
    assert other.name != config.name


@pytest.mark.parametrize("key", WATCHES)
def test_what_watches_a_run_is_not_in_its_name(key):
    assert RunConfig().replace(**{key: WATCHES[key]}).name == RunConfig().name


def test_keys_of_images_are_in_the_name_of_runs_on_images_alone():
    images = RunConfig(data="digits")
    for key, value in IMAGES.items():
        assert RunConfig().replace(**{key: value}).name == RunConfig().name
        assert images.replace(**{key: value}).name != images.name, key
    for key in ("streaming", "max_bytes"):
        assert images.replace(**{key: DECIDES[key]}).name == images.name, key
