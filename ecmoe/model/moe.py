"""MoE: Eq. 3 and 4. Gather each expert's tokens, multiply, weigh, add up; every router takes this path.

Letters: n tokens of width d, e experts of hidden width f, k slots of an expert.
"""

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ecmoe.model import metrics
from ecmoe.model.tracking import expect_tracking
from ecmoe.routing.assignment import Assignment
from ecmoe.routing.router import TRITON, Router, one_of, recomputing

# Without a capacity one expert may get nearly all tokens, and every expert then has as many slots. Evaluation computes
# experts in groups, so that h, (e, k, f), holds at most HELD numbers at a time, or SLOTS rows a token if that is more.
HELD, SLOTS = 2**28, 3


class MoE(nn.Module):
    """A mixture-of-experts layer: (B, T, d) -> (B, T, d), or (n, d) -> (n, d).

    Args:
        router: any `Router`; it alone decides which tokens an expert gets, and with what weight.
        d_model: d. d_ff: f, the hidden width of an expert (plain GeLU, two matrices, no bias).
        recompute: keep only the routing and the input for the backward pass and compute the experts
            again there (activation checkpointing; the chosen tokens stay the same).
        kernels: who computes. "plain": this file and the routers', on any device. "triton": ecmoe/kernels, the
            same results within rounding on a CUDA GPU, the same bits every time; "triton-bmm": as that, with all
            products by torch.bmm. "auto": "triton" on a GPU where it is installed (see
            `Router.fast`), else "plain".

    Raises:
        ValueError: the router has another width, d_ff is below 1, or kernels has no such value.
        RuntimeError: kernels="triton" without the package triton; in forward, without a CUDA device.

    Attributes:
        w1: (e, d, f). w2: (e, f, d), the transpose of Eq. 3's W_2.
        aux_loss: scalar tensor to add to the loss, or None; set by forward, read once a step.
        load, demand: (e,) tokens processed and requested in the last forward.
        tokens: () tokens routed in it. experts_per_token: (9,) tokens by number of experts, 8 = 8 or more.
    """

    def __init__(
        self, router: Router, d_model: int, d_ff: int, *, recompute: bool = False, kernels: str = "auto"
    ) -> None:
        super().__init__()
        if router.d_model != d_model:
            raise ValueError(f"d_model={d_model}: must be the router's, {router.d_model}")
        if d_ff < 1:
            raise ValueError(f"d_ff={d_ff}: must be at least 1")
        if one_of("kernels", kernels).startswith("triton") and not TRITON:
            raise RuntimeError(f"kernels={kernels!r} needs triton: `pip install triton`, or use kernels='plain'")
        e = router.num_experts
        self.router, self.recompute = router, recompute
        self.kernels = kernels
        self.w1 = nn.Parameter(torch.empty(e, d_model, d_ff))
        self.w2 = nn.Parameter(torch.empty(e, d_ff, d_model))
        self.aux_loss: Tensor | None = None
        self.exchange: Any = None  # `expert_parallel.Exchange` where other ranks hold some experts
        self._leaf: Tensor | None = None  # the aux_loss of a pass without gradients
        self.load = nn.Buffer(torch.zeros(e, dtype=torch.long), persistent=False)
        self.demand = nn.Buffer(torch.zeros(e, dtype=torch.long), persistent=False)
        self.experts_per_token = nn.Buffer(torch.zeros(metrics.MOST + 1, dtype=torch.long), persistent=False)
        self.tokens = nn.Buffer(torch.zeros((), dtype=torch.long), persistent=False)
        self.reset_parameters()
        expect_tracking(self)

    @property
    def kernels(self) -> str:
        """Who computes, the router included, which holds it."""
        return self.router.kernels

    @kernels.setter
    def kernels(self, kind: str) -> None:
        self.router.kernels = one_of("kernels", kind)

    def reset_parameters(self) -> None:
        """Fan-in: every expert starts with outputs of about the size of its inputs."""
        nn.init.normal_(self.w1, std=self.w1.shape[1] ** -0.5)
        nn.init.normal_(self.w2, std=self.w2.shape[1] ** -0.5)

    def forward(
        self, x: Tensor, token_ids: Tensor | None = None, task_ids: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Route and compute.

        Args:
            x: (B, T, d), or (n, d) where sequences don't matter; there may be none.
            token_ids: (B, T) vocabulary ids (hash routing).
            task_ids: (B,) or (B, T) (task-level routing).
            mask: (B, T) bool, False for padding, which takes no capacity and gets 0.

        Returns:
            as x; a token that no expert took gets 0 and keeps only its residual stream.

        Raises:
            ValueError: x is of another width or holds integers, or token_ids, task_ids or mask of another shape.
        """
        shape, d = x.shape[:-1], x.shape[-1]  # (B, T)
        self._check_shapes(x, token_ids, task_ids, mask)
        if task_ids is not None and task_ids.dim() < len(shape):
            task_ids = task_ids[:, None].expand(shape)
        token_ids, task_ids, mask = (None if t is None else t.reshape(-1) for t in (token_ids, task_ids, mask))
        x = x.reshape(-1, d)
        if x.shape[0] == 0:
            return self._nothing(x).view(*shape, d)
        if mask is not None:
            x = x.masked_fill(~mask[:, None], 0)  # an empty slot reads any row, and 0 times NaN is NaN
        again, checkpointed = recomputing(), self.recompute and self.training
        if mask is None and self.exchange is None and not checkpointed:  # all experts are here, and computed once
            record = None if again else (self.load, self.demand, self.tokens, self.experts_per_token)
            fuse = self.kernels != "triton-bmm"
            out = self.router.at_once(x, self.w1, self.w2, self.room(x), statistics=record, fuse=fuse)
            if out is not None:
                if not again:
                    self._keep(None)
                return out.view(*shape, d)
        logits, x = self.router.read(x)
        chosen = self.router(
            logits, batch_shape=shape if len(shape) == 2 else None, token_ids=token_ids, task_ids=task_ids, mask=mask
        )
        if not again:
            self._record(chosen, x.shape[0], mask)
            self._keep(chosen.aux_loss)
        if checkpointed:
            out = checkpoint(self.experts, x, chosen.token, chosen.gate, use_reentrant=False)
        else:
            out = self.experts(x, chosen.token, chosen.gate)
        if again and self._leaf is not None and chosen.aux_loss is not None:
            out = _WithLoss.apply(out, chosen.aux_loss, self._leaf)
        return out.view(*shape, d)

    def _check_shapes(self, x: Tensor, token_ids: Tensor | None, task_ids: Tensor | None, mask: Tensor | None) -> None:
        shape = x.shape[:-1]
        if x.dim() not in (2, 3) or x.shape[-1] != self.router.d_model:
            raise ValueError(f"x has shape {tuple(x.shape)}: must be (B, T, {self.router.d_model}) or (n, "
                             f"{self.router.d_model}), the router's d_model last")  # fmt: skip
        if not x.is_floating_point():
            raise ValueError(f"x is of {x.dtype}: must be floating-point numbers, such as embeddings of token ids")
        if mask is not None and mask.dtype != torch.bool:
            raise ValueError(f"mask is of {mask.dtype}: must be bool, False for padding")
        for name, given in {"token_ids": token_ids, "task_ids": task_ids, "mask": mask}.items():
            if given is not None and given.shape != shape and (name != "task_ids" or given.shape != shape[:1]):
                raise ValueError(
                    f"{name} has shape {tuple(given.shape)}: must be {tuple(shape)}, as x is {tuple(x.shape)}"
                )

    def _keep(self, aux_loss: Tensor | None) -> None:
        """What the pass adds to the loss.

        Reentrant checkpointing first runs a pass without gradients. `aux_loss` is then a leaf of its own: its gradient,
        which the loss gives it, goes on where the pass is run again.
        """
        self.aux_loss, self._leaf = aux_loss, None
        if aux_loss is not None and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self.aux_loss = self._leaf = aux_loss.detach().requires_grad_()

    def _nothing(self, x: Tensor) -> Tensor:
        """(0, d) -> (0, d), with gradients of 0 for all parameters, which other ranks may wait for."""
        for buffer in (self.load, self.demand, self.experts_per_token, self.tokens):
            buffer.zero_()
        nothing = torch.stack([p.sum() for p in self.parameters()]).sum() * 0.0
        self._keep(nothing if self.training else None)
        return x + nothing

    def experts(self, x: Tensor, token: Tensor, gate: Tensor) -> Tensor:
        """(n, d) tokens, (e, k) assignment -> (n, d) (Eq. 3 and 4)."""
        if self.exchange is not None:
            return self.exchange(self, x, token, gate)
        return self.compute(x, self.w1, self.w2, token, gate)

    def compute(self, x: Tensor, w1: Tensor, w2: Tensor, token: Tensor, gate: Tensor) -> Tensor:
        """`experts`, with the weights of these experts."""
        groups = -(-token.numel() // self.room(x))
        if groups <= 1:
            return self._some_experts(x, w1, w2, token, gate)
        some = (t.chunk(groups) for t in (w1, w2, token, gate))
        return sum(self._some_experts(x, *group) for group in zip(*some, strict=True))  # type: ignore[return-value]

    def room(self, x: Tensor) -> int:
        """Slots that may be computed at a time."""
        return sys.maxsize if torch.is_grad_enabled() else max(HELD // self.w1.shape[2], SLOTS * x.shape[0], 1)

    def _some_experts(self, x: Tensor, w1: Tensor, w2: Tensor, token: Tensor, gate: Tensor) -> Tensor:
        """(n, d): what these experts add to each token. An empty slot (token n, gate 0) reads any row and adds to row n."""
        if token.numel() and self.router.fast(x, x.shape[0]):
            from ecmoe import kernels

            return kernels.experts(x, w1, w2, token, gate, fuse=self.kernels != "triton-bmm")
        n, d = x.shape
        slots = token.reshape(-1)
        x_in = x.index_select(0, slots.clamp(max=n - 1)).view(*token.shape, d)  # (e, k, d) = P X
        h = F.gelu(torch.bmm(x_in, w1), approximate="tanh")  # (e, k, f); JAX's default GeLU
        y = torch.bmm(h, w2)  # (e, k, d)
        y = y * gate.unsqueeze(-1).to(y.dtype)
        return y.new_zeros(n + 1, d).index_add(0, slots, y.view(-1, d))[:-1].to(x.dtype)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "aux_loss": None, "_leaf": None}  # they hang on a graph, which nobody can copy

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        expect_tracking(self)

    @torch.no_grad()
    def _record(self, assignment: Assignment, n: int, mask: Tensor | None) -> None:
        token = assignment.token
        if token.numel() and self.router.fast(token, n) and not torch.compiler.is_compiling():
            from ecmoe.kernels.rows import invert  # where sums are to come in a fixed order, torch would sort

            counts = (invert(token.contiguous(), n) < token.numel()).sum(1).clamp(max=metrics.MOST)
        else:
            counts = assignment.experts_per_token(n).clamp(max=metrics.MOST)
        if mask is not None:  # padding is in no bin
            counts = counts.masked_fill(~mask, -1)
        # Comparing is faster than adding: all tokens would queue for a few bins.
        bins = (counts == torch.arange(metrics.MOST + 1, device=counts.device)[:, None]).sum(1)
        self.load.copy_(assignment.load(n))
        self.experts_per_token.copy_(bins)
        self.tokens.copy_(bins.sum())
        self.demand.copy_(self.load if assignment.demand is None else assignment.demand)

    def statistics(self) -> dict[str, Tensor]:
        """What the last forward did, as scalar tensors on the layer's device: dropped, over_capacity, max_load, share_0 to
        share_8, as `ecmoe.model.metrics` says them."""
        return {metric.name: metric.of(self) for metric in metrics.of_layers()}  # type: ignore[misc]


class _WithLoss(torch.autograd.Function):
    """out, and a loss beside it that gets the gradient of a leaf."""

    @staticmethod
    def forward(ctx, out: Tensor, loss: Tensor, leaf: Tensor) -> Tensor:
        ctx.leaf = leaf
        return out.view_as(out)

    @staticmethod
    def backward(ctx, dout: Tensor) -> tuple[Tensor, Tensor | None, None]:
        return dout, ctx.leaf.grad, None
