"""Data parallelism by PyTorch's DDP, but with a separate all-reduce for each gradient of experts, most of the traffic."""

import warnings
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from ecmoe.config import RunConfig
from ecmoe.model.moe import MoE
from ecmoe.routing.router import recomputing


class DDP(DDPStrategy):
    """Strategy that keeps a copy of the model on each rank and averages gradients, sent as `narrow` (None: their dtype).

    PyTorch's DDP copies every gradient into a bucket, and the bucket into the tensor that is sent. An expert's gradient
    is large enough to be sent alone, and is computed in `narrow`, so that it is sent as it is."""

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
        self.layers: list[MoE] = []
        self.stepping = False  # is this the forward pass of a training step?

    def _setup_model(self, model: nn.Module) -> DistributedDataParallel:
        self.layers = [layer for layer in model.modules() if isinstance(layer, MoE)]
        of_experts = {w for layer in self.layers for w in (layer.w1, layer.w2)}
        experts = {name: w for name, w in model.named_parameters() if w in of_experts and w.requires_grad}
        ignore = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
        ignore(model, list(experts))
        with warnings.catch_warnings():  # about an old name, which older versions of torch need
            warnings.simplefilter("ignore", FutureWarning)
            # Lightning's method does this on a side stream; each gradient would then have to wait for that stream.
            ddp = DistributedDataParallel(model, self.determine_ddp_device_ids(), **self._ddp_kwargs)
        ignore(model, [])  # reset, so that the model can be wrapped again by another strategy
        for weight in experts.values():
            dist.broadcast(weight.detach(), 0)
        for layer in self.layers:
            layer.copied = partial(_copied, self)
        return ddp

    def training_step(self, *args: Any, **keys: Any) -> Any:
        """Send the gradients of this graph only: what a callback computes with the model isn't averaged."""
        self.stepping = True
        try:
            return super().training_step(*args, **keys)
        finally:
            self.stepping = False

    def send(self, weight: Tensor, gradient: Tensor) -> None:
        """Start to average a gradient over ranks. At the end of the backward pass it has arrived, in weight.grad."""
        if weight.grad is not None:  # of earlier micro-batches
            gradient = (weight.grad + gradient).to(gradient.dtype)
            weight.grad = None
        average = torch.empty_like(weight)
        arrived = dist.all_reduce(gradient.contiguous(), async_op=True).get_future()
        # As soon as it arrives, on a separate stream, in parallel with the backward pass.
        arrived = arrived.then(lambda sent: torch.mul(sent.value()[0], 1 / self.world_size, out=average))

        def add() -> None:
            arrived.wait()
            weight.grad = average if weight.grad is None else weight.grad + average  # if the layer was applied twice

        torch.autograd.Variable._execution_engine.queue_callback(add)

    def teardown(self) -> None:
        """Leave the layers to others; they would continue to send gradients and keep the strategy in memory."""
        for layer in self.layers:
            layer.copied = None
        self.layers = []
        super().teardown()


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _copied(ddp: DDP, weight: Tensor) -> Tensor:
    """Return the weight; in a training step a copy in the dtype of computation, whose gradient becomes the weight's,
    averaged over ranks."""
    return _Copied.apply(weight, ddp) if ddp.stepping or recomputing() else weight


class _Copied(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight: Tensor, ddp: DDP) -> Tensor:
        ctx.weight, ctx.ddp = weight, ddp
        return weight.to(ddp.narrow) if ddp.narrow else weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, None]:
        if not ctx.ddp.model.require_backward_grad_sync:  # more micro-batches follow
            return gradient.to(ctx.weight.dtype), None
        ctx.ddp.send(ctx.weight, gradient)
        return None, None  # autograd may copy what it is given, before it has arrived
