"""The Trainer of a run, and what a machine must have for it."""

import pytest
import torch

from ecmoe.config import ConfigError
from ecmoe.training import trainer


def test_16_bits_take_half_of_the_memory(tiny_config, monkeypatch):
    config = tiny_config(num_experts=1024, router="dense_moe")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    pages = 6 * config.weights_at_least  # between 2 x 2 and 2 x 4 bytes a weight
    monkeypatch.setattr(trainer.os, "sysconf", lambda name: {"SC_PHYS_PAGES": pages, "SC_PAGE_SIZE": 1}[name])
    trainer.check_machine(config.replace(precision="bf16-true"))
    with pytest.raises(ConfigError, match="num_experts=1024.*weights and gradients alone take"):
        trainer.check_machine(config)
