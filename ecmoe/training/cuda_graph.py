"""Run a step's forward and backward pass as two CUDA graphs, instead of launching kernel by kernel.

A step has hundreds of kernels. For a small model, Python takes longer to launch them than a fast GPU takes to run them.
A graph replays captured kernels at the same addresses: sizes must be fixed, and the host must not wait for the device."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Losses = Callable[..., tuple[Tensor, Tensor]]


def capturable(lit: Any) -> bool:
    """Return whether a LitModel's step can be captured: one GPU, static routers, one backward pass per update."""
    c = lit.config
    # A second micro-batch would overwrite the gradients of the first. Activation checkpointing saves generator states,
    # which is forbidden during capture. A GradScaler's factor changes between steps.
    fixed = c.accumulate == 1 and not c.activation_checkpointing and c.precision != "16-mixed"
    alone = lit.device.type == "cuda" and c.strategy == "auto"
    return alone and fixed and all(router.static for router in lit.routers)


class _Step(nn.Module):
    """`lit.losses` as a module, so that the model's parameters are inputs of the graph."""

    def __init__(self, lit: Any) -> None:
        super().__init__()
        self.model, self.losses = lit.model, lit.losses

    def forward(self, *batch: Tensor) -> tuple[Tensor, Tensor]:
        return self.losses(batch[0] if len(batch) == 1 else batch)


def captured(lit: Any, batch: Tensor | tuple[Tensor, ...], pool: Any = None) -> Losses:
    """Return `lit.losses` as a graph for batches with the shapes of `batch`. Capture it under the autocast of training.

    Warm-up and capture run a few passes on `batch`; afterwards, the model's buffers are restored. pool: memory pool
    (`torch.cuda.graph_pool_handle`) to share with graphs whose steps never overlap in time."""
    buffers = list(lit.model.buffers())
    before = [buffer.clone() for buffer in buffers]
    kind = lit.device.type
    # Gradients are accumulated on the stream of the capture, for which steps wait: torch's warning isn't needed.
    torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
    # A weight that autocast has cast and cached would lie outside the graph, and never be updated.
    torch.clear_autocast_cache()
    own = tuple(part.clone() for part in ((batch,) if isinstance(batch, Tensor) else batch))
    with torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), cache_enabled=False):
        step = torch.cuda.make_graphed_callables(_Step(lit), own, allow_unused_input=True, pool=pool)
    with torch.no_grad():
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)
    return lambda batch: step(*((batch,) if isinstance(batch, Tensor) else batch))
