"""All routers and optimisers learn, from the same batches, and what a step adds up is what one batch gives."""

import pytest
import torch

from ecmoe import run_or_load
from ecmoe.data.batches import TextData


def test_the_curve_learns(tiny_config):
    curve = run_or_load(tiny_config(seed=12), progress=False).curve
    assert curve["val_loss"].iloc[-1] < curve["val_loss"].iloc[0]


def test_arms_with_the_same_seed_see_the_same_batches(tiny_config):
    batches = []
    for router in ("expert_choice", "dense"):
        data = TextData(tiny_config(router=router))
        data.setup("fit")
        batches.append([b for _, b in zip(range(5), data.train_dataloader(), strict=False)])
    assert all(torch.equal(a, b) for a, b in zip(*batches, strict=True))


@pytest.mark.parametrize(
    "changes",
    [
        {"router": "token_choice", "capacity_factor": 1.0, "z_loss_weight": 0.001},
        {"router": "hash", "capacity_factor": 1.0, "hash_table": "balanced"},
        {"router": "token_choice", "capacity_factor": 0.5, "priority": "score", "balance": "importance_load"},
        {"router": "token_choice", "capacity_factor": None, "balance": "bias", "top_k": 1},
        {"router": "dense", "optimizer": "adafactor", "learning_rate": 0.01},
        {"router": "dense_moe"},
        {"router": "linear_assignment"},
        {"router": "kmeans", "capacity_factor": 1.25},
        {"router": "task_level", "num_tasks": 4},
        {"router": "task_level", "num_tasks": 4, "task_table": "fixed"},
        {"router": "expert_threshold"},
        {"max_experts_per_token": 2},
        {"max_experts_per_token": 3, "cap_solver": "dykstra"},
    ],
)
def test_other_routers_and_optimizers_learn(tiny_config, changes):
    result = run_or_load(tiny_config(**changes), progress=False)
    assert result.ok and result.curve["val_loss"].iloc[-1] < result.curve["val_loss"].iloc[0]
    assert not result.load_model().training


def test_accumulated_micro_batches_are_one_batch(tiny_config):
    """Without competition between tokens, 2 x 4 sequences give the step of 1 x 8."""
    whole = tiny_config(router="dense", batch_size=8, steps=3, eval_every=3, eval_batches=1)
    halves = whole.replace(batch_size=4, accumulate=2, eval_batches=2)
    results = [run_or_load(config, progress=False) for config in (whole, halves)]
    assert results[0].summary["val_loss"] == pytest.approx(results[1].summary["val_loss"], abs=1e-4)
    assert [result.curve["tokens"].tolist() for result in results] == [[3 * 8 * 16]] * 2


def test_cutoffs_move_once_a_step_and_never_in_evaluation(tiny_config):
    config = tiny_config(seed=30, accumulate=2, steps=4, eval_every=1)
    model = run_or_load(config, progress=False).load_model()
    cutoff = model.moe_layers[0].router.cutoff
    assert float(cutoff.weight) == pytest.approx(1 - cutoff.beta**4) and float(cutoff.count) == 0
