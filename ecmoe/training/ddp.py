"""Data parallelism by DDP, except for the experts, whose gradients are nearly all of the traffic.

DDP copies every gradient into a bucket, and the bucket into the numbers that travel. An expert's gradient is large enough
to travel alone, as soon as it is there: two passes over memory less.
"""

import warnings
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from ecmoe.config import RunConfig
from ecmoe.model.moe import MoE


class DDP(DDPStrategy):
    """Copies of the model on all ranks, with the mean of their gradients: from before they are clipped on, but not yet in a
    callback's `on_after_backward`, where those of experts may be on their way.

    Args:
        narrow: what gradients are on their way; None: as they are.
    """

    def __init__(self, config: RunConfig, narrow: torch.dtype | None, **keys: Any) -> None:
        # Dynamo would cut each compiled block where a bucket ends; a block is little enough to wait for.
        torch._dynamo.config.optimize_ddp = False
        super().__init__(
            broadcast_buffers=False,  # each rank's routing statistics are its own; end_step adds them up
            gradient_as_bucket_view=True,
            static_graph=config.accumulate == 1,  # nor would it see a step whose first micro-batches aren't reduced
            ddp_comm_hook=bf16_compress_hook if narrow else None,
            **keys,
        )
        self.narrow = narrow
        self.travelling: list[torch.futures.Future[Tensor]] = []  # gradients of this step
        self.hooks: list[RemovableHandle] = []  # which send them

    def _setup_model(self, model: nn.Module) -> DistributedDataParallel:
        of_experts = {w for layer in model.modules() if isinstance(layer, MoE) for w in (layer.w1, layer.w2)}
        experts = {name: w for name, w in model.named_parameters() if w in of_experts and w.requires_grad}
        ignore = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
        ignore(model, list(experts))
        with warnings.catch_warnings():  # of a name that older versions of torch don't know by its new one
            warnings.simplefilter("ignore", FutureWarning)
            # Lightning's own does this on a side stream, on which each gradient would then wait for its parameter.
            ddp = DistributedDataParallel(model, self.determine_ddp_device_ids(), **self._ddp_kwargs)
        ignore(model, [])  # by whoever trains the model next

        def send(weight: Tensor) -> None:
            gradient = weight.grad
            if ddp.require_backward_grad_sync and gradient is not None:  # else more micro-batches follow
                sent = torch.empty_like(gradient, dtype=self.narrow)
                torch.mul(gradient, 1 / self.world_size, out=sent)
                arrived = dist.all_reduce(sent, async_op=True).get_future()
                # Beside the backward pass, on a stream of its own, as soon as it is there.
                self.travelling.append(arrived.then(lambda sent: gradient.copy_(sent.value()[0])))

        for weight in experts.values():
            dist.broadcast(weight.detach(), 0)
            self.hooks.append(weight.register_post_accumulate_grad_hook(send))
        return ddp

    def post_backward(self, closure_loss: Tensor) -> None:
        """The experts' gradients are there, too."""
        for arrived in self.travelling:
            arrived.wait()
        self.travelling.clear()
        super().post_backward(closure_loss)

    def teardown(self) -> None:
        """Hooks would go on sending, and keep the model's memory."""
        while self.hooks:
            self.hooks.pop().remove()
        super().teardown()
