"""A step's forward and backward pass as two CUDA graphs: launched at once, not kernel by kernel.

A step has hundreds of kernels, and Python needs longer to launch them than a fast GPU to run those of a small model. A
graph repeats what it has seen once, at the same addresses: all sizes must be fixed, and nothing may wait for the device.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Losses = Callable[..., tuple[Tensor, Tensor]]


def capturable(lit: Any) -> bool:
    """Can the step of a LitModel be a graph? On one GPU, with routers that read nothing from it, and one backward pass an update."""
    c = lit.config
    # A second micro-batch would write its gradients over those of the first; recomputing saves the state of a generator,
    # which a capture forbids; a GradScaler's factor is a number that changes.
    fixed = c.accumulate == 1 and not c.activation_checkpointing and c.precision != "16-mixed"
    alone = lit.device.type == "cuda" and c.strategy == "auto"
    return alone and fixed and all(router.static for router in lit.routers)


class _Step(nn.Module):
    """Losses as a module: its parameters are inputs of the graph."""

    def __init__(self, lit: Any) -> None:
        super().__init__()
        self.model = lit.model
        self.losses = lit.losses

    def forward(self, *batch: Tensor) -> tuple[Tensor, Tensor]:
        return self.losses(batch[0] if len(batch) == 1 else batch)


def captured(lit: Any, batch: Tensor | tuple[Tensor, ...], pool: Any = None) -> Losses:
    """`lit.losses` as a graph, for batches of the shapes of this one; call it where training calls it, autocast included.

    The graph is captured after a few passes on this batch, whose traces in the model's buffers are wiped out.

    Args:
        pool: memory that graphs share of which one step is over before another's begins (`torch.cuda.graph_pool_handle`).
    """
    parts = (batch,) if isinstance(batch, Tensor) else tuple(batch)
    buffers = list(lit.model.buffers())
    before = [buffer.clone() for buffer in buffers]
    kind = lit.device.type
    # Gradients meet their parameters on the stream of the capture: steps wait for it, and torch warns of that.
    torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
    # A cached cast of a weight would lie outside the graph, and never change.
    torch.clear_autocast_cache()
    with torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), cache_enabled=False):
        step = torch.cuda.make_graphed_callables(
            _Step(lit), tuple(part.clone() for part in parts), allow_unused_input=True, pool=pool
        )
    with torch.no_grad():
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)
    return lambda batch: step(*((batch,) if isinstance(batch, Tensor) else batch))
