"""Data parallelism by PyTorch's DDP, but with a separate all-reduce for each gradient of experts, most of the traffic."""

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
    """Strategy that keeps a copy of the model on each rank, and averages gradients, sent as dtype `narrow` (None: their
    own), before they are clipped. In a callback's `on_after_backward`, experts' may not be averaged yet.

    PyTorch's DDP copies every gradient into a bucket, and the bucket into the tensor that is sent. An expert's gradient
    is large enough to be sent alone, as soon as it has been computed, which saves two passes over memory."""

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
