"""The Lightning Trainer of a run: its precision, its strategy over ranks, and what makes its steps repeatable."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.utilities import rank_zero_only

from ecmoe.config import ConfigError, RunConfig
from ecmoe.training.ranks import in_torchrun


def new_trainer(config: RunConfig, **keys: Any) -> L.Trainer:
    """A Trainer of the run's precision, on the current GPU if there is one, that keeps nothing and says nothing; `keys` are its own."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    cuda = torch.cuda.is_available()
    if cuda:
        torch.set_float32_matmul_precision("high")
    if not in_torchrun():  # Lightning would believe what another launcher, or one long gone, left in the environment
        rank_zero_only.rank = 0
        keys = {"plugins": [LightningEnvironment()]} | keys
    quiet = dict(
        devices=[torch.cuda.current_device()] if cuda else 1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer = L.Trainer(
        accelerator="cuda" if cuda else "cpu", precision=resolved_precision(config), max_epochs=-1, **quiet | keys
    )
    # Before each batch Lightning asks rank 0 whether it was told to end, and the host waits for the device's answer. Nobody
    # need ask: torchrun tells every rank. Each ends where it is: to tell the others, as Lightning would, is to wait for ranks
    # that wait elsewhere, or are gone.
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
    if trainer.world_size > 1:
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    return trainer


def strategy(config: RunConfig) -> Any:
    """How the ranks of a run work together."""
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if config.strategy == "ddp":
        from ecmoe.training.ddp import DDP

        return DDP(config, process_group_backend=backend, narrow=reduced_dtype(config))
    if config.sharded:
        from lightning.pytorch.strategies import ModelParallelStrategy

        # Lightning's "auto" takes the ranks of a node for tensor parallel: each would then train a model of its own.
        return ModelParallelStrategy(
            data_parallel_size=config.ranks,
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=backend,
        )
    return "auto"


def reduced_dtype(config: RunConfig) -> torch.dtype | None:
    """Of gradients on their way between ranks: as their factors were, in half the time. None: their own."""
    return torch.bfloat16 if resolved_precision(config) == "bf16-mixed" else None


def resolved_precision(config: RunConfig) -> str:
    """The Trainer's precision: bf16 on a GPU and float32 on a CPU, unless the config says otherwise."""
    if config.precision != "auto":
        return config.precision
    return "bf16-mixed" if torch.cuda.is_available() else "32-true"


def check_machine(config: RunConfig) -> None:
    """Can this machine train the run? Asked before any work is done.

    Raises:
        ConfigError: a key asks for a GPU, for more of them than there are, or for more memory.
    """
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory
    else:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    shards = config.ranks if config.sharded else 1
    needed = 2 * (2 if config.precision == "bf16-true" else 4) * config.weights_at_least // shards  # gradients, too
    if needed > memory:
        keys = ("layers", "d_model", "d_ff", "num_experts", "vocab_size")
        raise ConfigError(f"{', '.join(f'{key}={getattr(config, key)}' for key in keys)}: weights and gradients alone take "
                          f"{needed / 2**30:,.0f} GiB, and this device has {memory / 2**30:,.0f}: lower one of them")  # fmt: skip
    if not torch.cuda.is_available():
        if config.precision == "16-mixed":
            raise ConfigError("precision='16-mixed': needs a CUDA GPU; on a CPU use 32-true, or bf16-mixed")
        if config.kernels.startswith("triton"):
            raise ConfigError(f"kernels={config.kernels!r}: needs a CUDA GPU; use auto, or plain")
    elif config.devices > torch.cuda.device_count():
        raise ConfigError(f"devices={config.devices}: this machine has {torch.cuda.device_count()} GPUs")


@contextmanager
def repeatable() -> Iterator[None]:
    """Within it, a step on a GPU computes the same bits every time, in this process and in another.

    Left alone, sums whose terms many threads add at once come out in the order in which they arrive: gradients of looked-up
    tables and of tokens that several experts took, where Inductor compiles them. Inductor also picks a reduction's shape by
    timing it. What has no deterministic form warns. On a CPU nothing changes.
    """
    if not torch.cuda.is_available():
        yield
        return
    from torch._inductor import config as inductor
    from torch.utils import deterministic

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what PyTorch takes by itself on Hopper
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = deterministic.fill_uninitialized_memory
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)
        deterministic.fill_uninitialized_memory = (
            False  # a pass over all that is allocated, against a fault we don't have
        )
        with inductor.patch(deterministic=True):
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        deterministic.fill_uninitialized_memory = filled
