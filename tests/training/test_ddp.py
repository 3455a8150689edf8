"""DDP with experts' gradients that travel alone: the gradients of one process that has both batches."""

import os

import lightning as L
import pytest
import torch

from ecmoe.data import open_data
from ecmoe.training.lit import LitModel
from ecmoe.training.trainer import new_trainer, repeatable, strategy


class Gradients(L.Callback):
    def on_before_optimizer_step(self, trainer, module, optimizer) -> None:
        self.last = {name: p.grad.tolist() for name, p in module.named_parameters()}
        self.first = getattr(self, "first", self.last)


def gradients(config, rank: int = 0) -> list[dict]:
    """Of the first step and of the last."""
    data = open_data(config)
    data.prepare_data()
    data.setup("fit")
    torch.manual_seed(config.seed + rank)  # DDP gives all ranks the weights of the first
    module, plan, seen = LitModel(config, torch.as_tensor(data.token_counts)), strategy(config), Gradients()
    keys = {"devices": config.devices, "strategy": plan, "accumulate_grad_batches": config.accumulate}
    keys |= {"limit_val_batches": 0, "use_distributed_sampler": False, "callbacks": [seen]}
    with repeatable():
        new_trainer(config, **keys, max_steps=config.steps).fit(module, datamodule=data)
    assert not getattr(plan, "travelling", [])
    return [seen.first, seen.last]


@pytest.mark.parametrize(("accumulate", "precision", "rtol"), [(2, "32-true", 1e-4), (1, "bf16-mixed", 0.05)])
def test_two_ranks_are_one_process(tiny_config, two_ranks, accumulate, precision, rtol):
    keys = {"steps": 2, "accumulate": accumulate, "precision": precision}
    two = tiny_config(**keys, strategy="ddp", devices=2, batch_size=4)

    def work(rank: int) -> list[dict]:
        os.environ |= {"TORCHELASTIC_RUN_ID": "x", "RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0"}
        os.environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
        return gradients(two, rank)

    alone, _ = gradients(tiny_config(**keys, batch_size=8))
    (ours, last), (theirs, their_last) = two_ranks(work)
    assert ours == theirs and last == their_last
    for name, wanted in alone.items():
        wanted = torch.tensor(wanted)
        torch.testing.assert_close(torch.tensor(ours[name]), wanted, rtol=rtol, atol=rtol * float(wanted.abs().max()))
