"""Recorder over ranks: each rank sees its own batches; what is recorded, and what follows from it, is of all."""

from types import SimpleNamespace

import pytest
import torch

from ecmoe.training.lit import LitModel
from ecmoe.training.recorder import Diverged, Recorder


def trainer(other: float) -> SimpleNamespace:
    """Of rank 0 of two; whatever they exchange, rank 1 has `other`."""
    strategy = SimpleNamespace(all_gather=lambda value: torch.stack([value, torch.full_like(value, other)]))
    state = {"global_step": 3, "is_global_zero": True, "optimizers": [], "save_checkpoint": lambda path: path.touch()}
    return SimpleNamespace(strategy=strategy, received_sigterm=False, world_size=2, **state)


@pytest.fixture
def module(tiny_config):
    lit = LitModel(tiny_config(steps=5, checkpoint_every=3))
    lit._trainer = trainer(2.0)
    lit.sums = {"loss": torch.tensor(6.0), "aux_loss": torch.tensor(0.0), "count": torch.tensor(2.0)}
    return lit


def test_a_row_is_of_all_ranks(module, tmp_path):
    recorder = Recorder(tmp_path, "run", progress=False)
    recorder.on_validation_start(trainer(2.0), module)
    module.on_validation_epoch_start()
    for loss in (3.0, 4.0):
        recorder.on_validation_batch_end(None, module, {"val_loss": torch.tensor(loss)}, None, 0)
    recorder.on_validation_end(trainer(2.0), module)
    row = recorder.rows[3]
    assert row["val_loss"] == (3 + 4 + 2 + 2) / 4 and row["train_loss"] == (6 + 2) / (2 + 2)
    assert row["max_load"] == 2 and row["share_0"] == 1  # nothing was routed here: 0 in both layers


def test_ranks_diverge_together(module, tmp_path):
    recorder = Recorder(tmp_path, "run", progress=False)
    with pytest.raises(Diverged, match="before step 3"):
        recorder.on_train_batch_end(trainer(float("nan")), module, None, None, 0)
    recorder.on_validation_batch_end(None, module, {"val_loss": torch.tensor(1.0)}, None, 0)
    with pytest.raises(Diverged, match="at step 3"):
        recorder.on_validation_end(trainer(float("nan")), module)


def test_a_checkpoint_holds_the_mean_of_the_sums(module):
    module._fabric, checkpoint = None, {}
    module.trainer = trainer(2.0)
    module.on_save_checkpoint(checkpoint)
    assert checkpoint["sums"] == {"loss": 4.0, "aux_loss": 1.0, "count": 2.0}
