"""Less capacity without retraining: what is counted is what a loop counts."""

import numpy as np
import pandas as pd
import pytest
import torch

from ecmoe.config import RunConfig
from ecmoe.data.images import ImageData
from ecmoe.measures import inspection as capacity
from ecmoe.model.build import build_model
from ecmoe.training.run import run_or_load

EC = {}
ORDER = {"router": "token_choice", "top_k": 2, "priority": "order", "balance": "none"}
SCORE = ORDER | {"priority": "score"}
BASE = {
    "data": "digits", "patch_size": 2, "sequence_length": 16, "layers": 2, "moe_every": 1, "d_model": 16, "d_ff": 32,
    "heads": 2, "num_experts": 4, "batch_size": 20, "steps": 12, "warmup_steps": 2, "eval_every": 12, "eval_batches": 5,
    "learning_rate": 1e-2,
}  # fmt: skip


def config(keys, places: float) -> RunConfig:
    return RunConfig.from_dict(BASE | keys | {"capacity_factor": places / keys.get("top_k", 1)})


@pytest.mark.parametrize("keys", [EC, ORDER, SCORE, EC | {"gate": "renormalized"}, SCORE | {"gate": "scaled"}])
def test_places_per_patch_mean_the_same_for_every_router(keys):
    model = build_model(config(keys, 2.0)).eval()
    before = [layer.router.capacity_factor for layer in model.moe_layers]
    with capacity.at_capacity(model, 0.2):
        _, counts = capacity.experts_per_patch(model, torch.rand(20, 1, 8, 8))
        for layer in model.moe_layers:
            assert layer.load.max() == 0.2 * 20 * 16 / 4  # c n / e
    assert counts.shape == (2, 20, 16) and (counts[0].sum() == 0.2 * 20 * 16 or "top_k" in keys)
    assert [layer.router.capacity_factor for layer in model.moe_layers] == before


def test_experts_per_patch_is_what_the_layers_did():
    model, x = build_model(config(SCORE, 0.5)).eval(), torch.rand(20, 1, 8, 8)
    logits, counts = capacity.experts_per_patch(model, x)
    for layer, taken in zip(model.moe_layers, counts, strict=True):
        assert torch.bincount(taken.flatten(), minlength=9).tolist() == layer.experts_per_token.tolist()
    assert torch.equal(logits, model(x)) and not model.moe_layers[0]._forward_pre_hooks


def test_those_who_come_late_are_left_out_whole():
    x = torch.rand(20, 1, 8, 8)
    late = {}
    for name, keys in (("order", ORDER), ("score", SCORE)):
        model = build_model(config(keys, 2.0)).eval()
        with capacity.at_capacity(model, 0.2):
            late[name] = capacity.experts_per_patch(model, x)[1][0][10:]
    assert late["order"].sum() < late["score"].sum()


def test_a_router_without_capacity_is_refused():
    model = build_model(config({"router": "linear_assignment"}, 2.0))
    with (
        pytest.raises(ValueError, match="router='linear_assignment' has no capacity"),
        capacity.at_capacity(model, 1.0),
    ):
        pass
    model = build_model(config({"router": "expert_threshold"}, 2.0))  # in evaluation it takes all above its cut-off
    with (
        pytest.raises(
            ValueError, match="router='expert_threshold' has no capacity.*take one of (?!.*expert_threshold)"
        ),
        capacity.at_capacity(model, 1.0),
    ):
        pass
    model = build_model(config({"router": "expert_choice", "gate": "scaled"}, 2.0))
    with pytest.raises(ValueError, match="gate='scaled'"), capacity.at_capacity(model, 1.0):
        pass
    model = build_model(config(EC, 2.0)).eval()
    with pytest.raises(ValueError, match="isn't a whole number"), capacity.at_capacity(model, 0.21):  # never rounded
        model(torch.rand(20, 1, 8, 8))


def test_measured_where_it_was_trained_is_what_training_found():
    result = run_or_load(config(SCORE, 0.5), progress=False)
    model, made = result.load_model(), config(SCORE, 0.5)
    measured = pd.DataFrame({c: capacity.accuracy_at(model, made, places=c) for c in (0.05, 0.2, 0.5)}).T
    assert measured.loc[0.5, "accuracy"] == pytest.approx(result.summary["accuracy"])
    assert measured.loc[0.5, "val_loss"] == pytest.approx(result.summary["val_loss"], abs=1e-5)
    assert measured.loc[0.2, "patches_left_out"] >= 0.8 > measured.loc[0.5, "patches_left_out"] >= 0.5

    data, model = ImageData(result.load_model().config), result.load_model()
    data.setup()
    left_out = []
    with torch.no_grad(), capacity.at_capacity(model, 0.05):
        for x, _ in data.val_dataloader():
            counts = capacity.experts_per_patch(model, x)[1]
            left_out += [all(counts[m, b, t] == 0 for m in range(2) for t in range(16)) for b in range(len(x))]
    assert measured.loc[0.05, "images_left_out"] == pytest.approx(np.mean(left_out)) and 0 < np.mean(left_out) < 1
