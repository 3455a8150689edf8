"""The Lightning Trainer of a run: its precision, its strategy over ranks, and deterministic steps."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch._inductor import config as inductor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils import deterministic
from torch.utils.hooks import RemovableHandle

from ecmoe.config import ConfigError, RunConfig
from ecmoe.model.moe import MoE
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


class DDP(DDPStrategy):
    """Strategy that keeps a copy of the model on each rank, and averages gradients, sent as dtype `narrow` (None: their
    own), before they are clipped. In a callback's `on_after_backward`, experts' may not be averaged yet.

    PyTorch's DDP copies every gradient into a bucket, and the bucket into the tensor that is sent. The gradients of
    experts, most of the traffic, are large enough to be sent alone, each as soon as it has been computed, which saves
    two passes over memory."""

    def __init__(self, config: RunConfig, narrow: torch.dtype | None, **keys: Any) -> None:
        # Dynamo would split compiled blocks at bucket boundaries; blocks are small enough to stay whole.
        torch._dynamo.config.optimize_ddp = False
        super().__init__(
            broadcast_buffers=False,  # routing statistics differ between ranks; end_step adds them up
            gradient_as_bucket_view=True,
            static_graph=config.accumulate == 1,  # a static graph can't skip the reduction of micro-batches
            ddp_comm_hook=bf16_compress_hook if narrow else None,
            **keys,
        )
        self.narrow = narrow
        self.travelling: list[torch.futures.Future[Tensor]] = []  # all-reduces of this step's gradients
        self.hooks: list[RemovableHandle] = []  # start these all-reduces

    def _setup_model(self, model: nn.Module) -> DistributedDataParallel:
        of_experts = {w for layer in model.modules() if isinstance(layer, MoE) for w in (layer.w1, layer.w2)}
        experts = {name: w for name, w in model.named_parameters() if w in of_experts and w.requires_grad}
        ignore = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
        ignore(model, list(experts))
        with warnings.catch_warnings():  # about an old name, which older versions of torch need
            warnings.simplefilter("ignore", FutureWarning)
            # Lightning's method does this on a side stream; each gradient would then have to wait for that stream.
            ddp = DistributedDataParallel(model, self.determine_ddp_device_ids(), **self._ddp_kwargs)
        ignore(model, [])  # reset, so that the model can be wrapped again by another strategy

        def send(weight: Tensor) -> None:
            gradient = weight.grad
            if ddp.require_backward_grad_sync and gradient is not None:  # otherwise more micro-batches follow
                sent = torch.empty_like(gradient, dtype=self.narrow)
                torch.mul(gradient, 1 / self.world_size, out=sent)
                arrived = dist.all_reduce(sent, async_op=True).get_future()
                # As soon as it arrives, on a separate stream, in parallel with the backward pass.
                self.travelling.append(arrived.then(lambda sent: gradient.copy_(sent.value()[0])))

        for weight in experts.values():
            dist.broadcast(weight.detach(), 0)
            self.hooks.append(weight.register_post_accumulate_grad_hook(send))
        return ddp

    def post_backward(self, closure_loss: Tensor) -> None:
        """Wait for the all-reduces of the experts' gradients, too."""
        for arrived in self.travelling:
            arrived.wait()
        self.travelling.clear()
        super().post_backward(closure_loss)

    def teardown(self) -> None:
        """Remove the hooks, which would continue to send gradients and keep the model in memory."""
        while self.hooks:
            self.hooks.pop().remove()
        super().teardown()


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
    """Raise a ConfigError, before any work is done, if the run needs a GPU, or more GPUs (without any: CPU cores) or
    memory than this machine has."""
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
    if config.kernels.startswith("triton") and not cuda:
        raise ConfigError(f"kernels={config.kernels!r}: needs a CUDA GPU; use auto, or plain")
    if config.devices > there:
        raise ConfigError(f"devices={config.devices}: this machine has {there} {what}")


@contextmanager
def repeatable() -> Iterator[None]:
    """Within the context, make a step on a GPU compute the same bits every time, in this and in other processes.

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
        with inductor.patch(deterministic=True):
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        deterministic.fill_uninitialized_memory = filled
