"""The Trainer of a run, and what a machine must have for it."""

import logging
import os
import re
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_only
from torch._inductor import config as inductor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.utils import deterministic

from ecmoe.config import ConfigError
from ecmoe.model.build import build_model
from ecmoe.training import trainer


@pytest.mark.parametrize(("precision", "bytes_each"), [("bf16-true", 2 * 2), ("32-true", 2 * 4)])
def test_weights_and_gradients_must_fit_and_16_bits_take_half(tiny_config, monkeypatch, precision, bytes_each):
    config = tiny_config(num_experts=1024, router="dense_moe", precision=precision)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    memory = {"SC_PHYS_PAGES": bytes_each * config.weights_at_least, "SC_PAGE_SIZE": 1}
    monkeypatch.setattr(trainer.os, "sysconf", memory.get)
    trainer.check_machine(config)
    memory["SC_PHYS_PAGES"] -= 1
    with pytest.raises(ConfigError, match="num_experts=1024.*weights and gradients alone take"):
        trainer.check_machine(config)


@pytest.mark.parametrize("keys", [{}, {"router": "dense"}, {"layers": 4, "moe_every": 4},
                                  {"data": "digits", "channels": 1, "classes": 10, "patch_size": 2, "sequence_length": 16}])  # fmt: skip
def test_the_weights_of_a_config_are_those_of_its_matrices(tiny_config, keys):
    config = tiny_config(**keys)
    named = build_model(config).named_parameters()
    matrices = [p for name, p in named if p.dim() > 1 and not re.search("router|relative|position", name)]
    assert config.weights_at_least == sum(p.numel() for p in matrices)


@pytest.mark.parametrize(
    ("precision", "gpu", "hook"),
    [("32-true", True, None), ("bf16-mixed", False, bf16_compress_hook), ("auto", True, bf16_compress_hook)]
    + [("auto", False, None), ("bf16-true", True, None)],
)
def test_gradients_of_copies_travel_in_the_bits_of_their_factors(tiny_config, monkeypatch, precision, gpu, hook):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    config = tiny_config(strategy="ddp", devices=2, precision=precision)
    with torch._dynamo.config.patch(optimize_ddp=True):
        ddp = trainer.strategy(config)
        assert torch._dynamo.config.optimize_ddp is False  # else blocks would be compiled in pieces
    assert isinstance(ddp, DDPStrategy) and ddp._ddp_comm_hook is hook and ddp.narrow == (hook and torch.bfloat16)
    said = ddp._ddp_kwargs
    assert said["broadcast_buffers"] is False and said["gradient_as_bucket_view"] and said["static_graph"]
    assert not trainer.strategy(config.replace(accumulate=2))._ddp_kwargs["static_graph"]


@pytest.mark.parametrize("name", ["fsdp2", "ep"])
def test_sharded_strategies_take_all_ranks_for_data(tiny_config, name):
    parallel = trainer.strategy(tiny_config(strategy=name, devices=2, num_nodes=2))
    assert isinstance(parallel, ModelParallelStrategy)
    assert (parallel._data_parallel_size, parallel._tensor_parallel_size) == (4, 1)
    assert parallel._save_distributed_checkpoint is False and trainer.strategy(tiny_config()) == "auto"


@pytest.mark.parametrize(("gpu", "backend"), [(False, "gloo"), (True, "nccl")])
@pytest.mark.parametrize("name", ["ddp", "fsdp2", "ep"])
def test_ranks_talk_by_what_their_devices_have(tiny_config, monkeypatch, name, gpu, backend):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    config = tiny_config(strategy=name, devices=2, precision="32-true")
    assert trainer.strategy(config)._process_group_backend == backend


@pytest.mark.parametrize("ours", [True, False])
def test_a_rank_is_torchruns_or_none(tiny_config, monkeypatch, ours):
    monkeypatch.setattr(rank_zero_only, "rank", 3)  # as Lightning takes it from what any launcher left behind
    monkeypatch.setattr(trainer, "in_torchrun", lambda: ours)
    trainer.new_trainer(tiny_config(), **{"barebones": True} if ours else {})
    assert rank_zero_only.rank == (3 if ours else 0)


def test_a_trainer_keeps_nothing_and_says_nothing_unless_it_is_told(tiny_config):
    logging.getLogger("lightning.pytorch").setLevel(logging.INFO)
    quiet = trainer.new_trainer(tiny_config(precision="64-true"))
    assert logging.getLogger("lightning.pytorch").level == logging.ERROR
    assert quiet.loggers == quiet.callbacks == [] and quiet.precision == "64-true" and quiet.max_epochs == -1
    told = trainer.new_trainer(tiny_config(), enable_checkpointing=True, max_steps=3)
    assert [type(callback) for callback in told.callbacks] == [ModelCheckpoint] and told.max_steps == 3


@pytest.mark.parametrize("gpu", [False, True])
def test_a_trainer_is_of_the_current_device_and_hears_no_signals(tiny_config, monkeypatch, gpu):
    given, connector = {}, SimpleNamespace(register_signal_handlers=pytest.fail)
    loop = SimpleNamespace(epoch_loop=SimpleNamespace())
    made = SimpleNamespace(_signal_connector=connector, fit_loop=loop)
    monkeypatch.setattr(trainer.L, "Trainer", lambda **keys: given.update(keys) or made)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert trainer.new_trainer(tiny_config(), max_steps=5) is made
    assert [type(plugin) for plugin in given.pop("plugins")] == [LightningEnvironment]
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    device = {"accelerator": "cuda", "devices": [3], "precision": "bf16-mixed"}
    expected = device if gpu else {"accelerator": "cpu", "devices": 1, "precision": "32-true"}
    assert given == expected | dict.fromkeys(quiet, False) | {"max_epochs": -1, "max_steps": 5}
    assert torch.get_float32_matmul_precision() == ("high" if gpu else "highest")
    connector.register_signal_handlers()


def test_no_rank_waits_for_its_device_before_a_batch(tiny_config, monkeypatch):
    """Lightning's own question is there to be replaced, and ours asks nobody."""
    loop = trainer.new_trainer(tiny_config()).fit_loop.epoch_loop
    assert hasattr(type(loop), "_broadcast_sigterm_tensor") and "_broadcast_sigterm_tensor" in vars(loop)
    monkeypatch.setattr(torch.distributed, "broadcast", None)
    loop._broadcast_sigterm_tensor()


def test_a_machine_must_have_as_many_gpus_as_are_asked_for_and_their_memory(tiny_config, monkeypatch):
    config = tiny_config(devices=2, num_experts=1024, router="dense_moe", kernels="triton", precision="16-mixed")
    gpu = SimpleNamespace(total_memory=2 * 4 * config.weights_at_least)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", {0: gpu}.get)
    trainer.check_machine(config)
    with pytest.raises(ConfigError, match="devices=3: this machine has 2 GPUs"):
        trainer.check_machine(config.replace(devices=3))
    gpu.total_memory -= 8
    with pytest.raises(ConfigError, match="num_experts=1024.*weights and gradients alone take"):
        trainer.check_machine(config)
    trainer.check_machine(sharded := config.replace(strategy="fsdp2"))  # each has half of them
    gpu.total_memory = 2 * config.weights_at_least
    trainer.check_machine(sharded.replace(num_nodes=2))  # or a quarter
    with pytest.raises(ConfigError, match="weights and gradients alone take"):
        trainer.check_machine(sharded)
    gpu.total_memory = 1
    with pytest.raises(ConfigError, match="num_experts=1024, patch_size=2, channels=1, classes=10: weights"):
        trainer.check_machine(config.replace(data="digits", sequence_length=16, classes=10))
    gpu.total_memory, large = 3 * 2**30, config.replace(d_ff=2**20)
    said = f"alone take {8 * large.weights_at_least / 2**30:,.0f} GiB, and this device has 3: lower one of them"
    with pytest.raises(
        ConfigError, match=rf"layers=2, d_model=16, d_ff=1048576, num_experts=1024, vocab_size=256: .*{said}"
    ):
        trainer.check_machine(large)


def test_without_gpus_a_machine_must_have_a_core_for_each_process(tiny_config, monkeypatch):
    """Else devices=1000 starts a thousand processes, and the memory is gone."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(trainer.os, "cpu_count", lambda: 4)
    trainer.check_machine(tiny_config(devices=4, strategy="ddp"))
    with pytest.raises(ConfigError, match=r"^devices=5: this machine has 4 CPU cores$"):
        trainer.check_machine(tiny_config(devices=5, strategy="ddp"))
    monkeypatch.setattr(trainer.os, "cpu_count", lambda: None)  # where nobody knows
    trainer.check_machine(tiny_config())
    with pytest.raises(ConfigError, match=r"^devices=2: this machine has 1 CPU cores$"):
        trainer.check_machine(tiny_config(devices=2, strategy="ddp"))


@pytest.mark.parametrize("gpu", [True, False])
@pytest.mark.parametrize("before", [(False, False), (True, False), (True, True)])
def test_steps_of_a_gpu_are_repeatable_and_what_was_set_is_set_again(monkeypatch, gpu, before):
    def state() -> tuple[bool, ...]:
        settings = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
        own_thread = torch._C._is_multithreading_enabled()
        return *settings, deterministic.fill_uninitialized_memory, inductor.deterministic, own_thread

    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "as it was")
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    start, variable, said = state(), "CUBLAS_WORKSPACE_CONFIG", "as it was"
    if not before[0]:  # a user hasn't said
        del os.environ[variable]
        said = ":4096:8" if gpu else None
    try:
        with pytest.raises(ZeroDivisionError), trainer.repeatable():
            assert state() == ((True, True, False, True, False) if gpu else start)
            raise ZeroDivisionError
        assert state() == start and os.environ.get(variable) == said
    finally:
        torch.use_deterministic_algorithms(False)
