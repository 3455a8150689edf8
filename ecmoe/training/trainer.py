"""The Lightning Trainer of a run: its precision, its strategy over ranks, and deterministic steps."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_only
from torch._inductor import config as inductor
from torch.utils import deterministic

from ecmoe.config import ConfigError, RunConfig
from ecmoe.routing.router import lacking
from ecmoe.training.ddp import DDP
from ecmoe.training.gpus import use_tf32
from ecmoe.training.ranks import in_torchrun


def new_trainer(config: RunConfig, **keys: Any) -> L.Trainer:
    """Return a Trainer with the run's precision, on the current GPU if any. It prints and saves nothing by default."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    use_tf32()
    cuda = torch.cuda.is_available()
    if not in_torchrun():  # Lightning would use variables that another launcher left in the environment
        rank_zero_only.rank = 0
        keys = {"plugins": [LightningEnvironment()]} | keys
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    keys = {"devices": [torch.cuda.current_device()] if cuda else 1, "precision": resolved_precision(config)} | keys
    trainer = L.Trainer(accelerator="cuda" if cuda else "cpu", max_epochs=-1, **dict.fromkeys(off, False) | keys)
    # On SIGTERM, end at once, or as `Recorder` says. Lightning's handler would inform the other ranks, and so wait for
    # ranks that wait elsewhere or have ended; torchrun sends SIGTERM to every rank.
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    # Before each batch, Lightning broadcasts whether rank 0 received SIGTERM, and the host waits for the device.
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
    return trainer


def strategy(config: RunConfig) -> Any:
    """Return the Lightning strategy of a run, by which its ranks work together."""
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if config.strategy == "ddp":
        return DDP(config, process_group_backend=backend, narrow=reduced_dtype(config))
    if config.sharded:
        # Lightning's "auto" uses the ranks of a node for tensor parallelism: each would train a separate model.
        sizes = {"data_parallel_size": config.ranks, "tensor_parallel_size": 1}
        return ModelParallelStrategy(**sizes, save_distributed_checkpoint=False, process_group_backend=backend)
    return "auto"


def reduced_dtype(config: RunConfig) -> torch.dtype | None:
    """Return the dtype in which gradients are sent: bf16 in bf16-mixed, to halve the traffic; None: their own dtype."""
    return torch.bfloat16 if resolved_precision(config) == "bf16-mixed" else None


def resolved_precision(config: RunConfig) -> str:
    """Return the Trainer's precision: bf16-mixed on a GPU and float32 on a CPU, unless the config sets it."""
    auto = "bf16-mixed" if torch.cuda.is_available() else "32-true"
    return auto if config.precision == "auto" else config.precision


def check_machine(config: RunConfig) -> None:
    """Raise a ConfigError if the run needs a GPU, or more GPUs (without any: CPU cores) or memory than this machine has."""
    if cuda := torch.cuda.is_available():
        memory, there, what = torch.cuda.get_device_properties(0).total_memory, torch.cuda.device_count(), "GPUs"
    else:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        there, what = os.cpu_count() or 1, "CPU cores"
    shards = config.ranks if config.sharded else 1
    needed = 2 * (2 if config.precision == "bf16-true" else 4) * config.weights_at_least // shards  # with gradients
    if needed > memory:
        ends = ("patch_size", "channels", "classes") if config.images else ("vocab_size",)
        keys = ("layers", "d_model", "d_ff", "num_experts", *ends)
        raise ConfigError(f"{', '.join(f'{key}={getattr(config, key)}' for key in keys)}: weights and gradients alone take "
                          f"{needed / 2**30:,.0f} GiB, and this device has {memory / 2**30:,.0f}: lower one of them")  # fmt: skip
    if config.precision == "16-mixed" and not cuda:
        raise ConfigError("precision='16-mixed': needs a CUDA GPU; on a CPU use 32-true, or bf16-mixed")
    if config.kernels not in ("plain", "auto") and not cuda:
        raise ConfigError(f"kernels={config.kernels!r}: needs a CUDA GPU; use auto, or plain")
    if said := lacking(config.kernels):
        raise ConfigError(said)
    if config.devices > there:
        raise ConfigError(f"devices={config.devices}: this machine has {there} {what}")


@contextmanager
def repeatable() -> Iterator[None]:
    """Within the context, make a step on a GPU compute the same bits every time, in this and in other processes; and
    run backward passes in this thread, as autograd's own would launch kernels more slowly.

    By default, the order of a sum by many threads depends on their timing: gradients of embeddings and of tokens that
    several experts took, if compiled by Inductor. Inductor also chooses the shape of a reduction by timing it. If an
    operation has no deterministic implementation, torch warns. On a CPU, nothing changes."""
    if not torch.cuda.is_available():
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # PyTorch's default on Hopper
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = deterministic.fill_uninitialized_memory
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)
        # It would fill all new memory, against reads of uninitialised memory, which don't occur here.
        deterministic.fill_uninitialized_memory = False
        with inductor.patch(deterministic=True), torch.autograd.set_multithreading_enabled(False):
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        deterministic.fill_uninitialized_memory = filled
