"""MoE, Eq. 3 and 4: gather each expert's tokens, apply the expert, weight its outputs and add them up, for any router.

Letters: n tokens of width d, e experts of hidden width f, k slots per expert.
"""

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ecmoe.config import check_key
from ecmoe.files import ConfigError
from ecmoe.model import metrics
from ecmoe.model.tracking import untracked
from ecmoe.routing.assignment import Assignment
from ecmoe.routing.router import Router, lacking, recomputing

# Without a capacity, one expert may get nearly all tokens, and all experts then have that many slots. Passes without
# gradients compute experts in groups, so that h, (e, k, f), has at most HELD elements, or SLOTS rows per token if more.
HELD, SLOTS = 2**28, 3


class MoE(nn.Module):
    """A mixture-of-experts layer: (B, T, d) -> (B, T, d), or (n, d) -> (n, d).

    Args:
        router: any `Router`; it alone decides which tokens an expert gets, and with what weight.
        d_model: d. d_ff: f, the hidden width of an expert (plain GeLU, two matrices, no bias).
        recompute: store only routing and input for the backward pass, and compute the experts again there (activation
            checkpointing; the chosen tokens stay the same).
        kernels: implementation. "plain": PyTorch, on any device. "triton": ecmoe/kernels on a CUDA GPU, with the same
            results up to rounding, and the same bits every time. "triton-bmm": like "triton", but with all matrix
            products by torch.bmm. "cute": like "triton", but with most matrix products by the package quack-kernels,
            on Hopper GPUs. "auto": "triton" on a GPU if it is installed (see `Router.fast`), else "plain".

    Raises:
        ValueError: router isn't one or of another width, d_ff is below 1, or kernels has an unknown value.
        RuntimeError: kernels other than "plain" and "auto" without their package; in forward, without a CUDA device.

    Attributes:
        w1: (e, d, f). w2: (e, f, d), the transpose of Eq. 3's W_2.
        aux_loss: scalar tensor to add to the loss, or None; set by forward, to be read once per step.
        load, demand: (e,) tokens that each expert processed, and tokens requested of it, in the last forward.
        tokens: () tokens routed. experts_per_token: (9,) tokens that 0 to 7 experts took, and that 8 or more took.
    """

    def __init__(
        self, router: Router, d_model: int, d_ff: int, *, recompute: bool = False, kernels: str = "auto"
    ) -> None:
        super().__init__()
        if not isinstance(router, Router):
            raise ConfigError(f"router={router!r}: must be a router, such as ExpertChoice(d_model, num_experts)")
        if router.d_model != d_model:
            raise ValueError(f"d_model={d_model}: must equal the router's, {router.d_model}")
        check_key("d_ff", d_ff)
        e = router.num_experts
        self.router, self.recompute = router, recompute
        self.kernels = kernels
        self.w1 = nn.Parameter(torch.empty(e, d_model, d_ff))
        self.w2 = nn.Parameter(torch.empty(e, d_ff, d_model))
        self.aux_loss: Tensor | None = None
        self.exchange: Any = None  # computes `experts` if other ranks hold some (see `share_experts`)
        self.copied: Any = None  # weight -> a copy to compute with, whose gradient is sent to other ranks (see `DDP`)
        self._leaf: Tensor | None = None  # the aux_loss of a pass without gradients (see `_keep`)
        self.load = nn.Buffer(torch.zeros(e, dtype=torch.long), persistent=False)
        self.demand = nn.Buffer(torch.zeros(e, dtype=torch.long), persistent=False)
        self.experts_per_token = nn.Buffer(torch.zeros(metrics.MOST + 1, dtype=torch.long), persistent=False)
        self.tokens = nn.Buffer(torch.zeros((), dtype=torch.long), persistent=False)
        self.reset_parameters()
        untracked[self] = False  # until `track` is called

    @property
    def kernels(self) -> str:
        """Implementation used by the layer and its router; stored on the router."""
        return self.router.kernels

    @kernels.setter
    def kernels(self, kind: str) -> None:
        if said := lacking(check_key("kernels", kind)):
            raise RuntimeError(said)
        self.router.kernels = kind

    def reset_parameters(self) -> None:
        """Draw the weights, scaled by fan-in: an expert's outputs start at about the size of its inputs."""
        nn.init.normal_(self.w1, std=self.w1.shape[1] ** -0.5)
        nn.init.normal_(self.w2, std=self.w2.shape[1] ** -0.5)
        for buffer in self.buffers(recurse=False):
            buffer.zero_()

    def forward(
        self, x: Tensor, token_ids: Tensor | None = None, task_ids: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Route the tokens, apply the experts and combine their outputs, in the shape of x. A token that no expert took
        gets 0: only its residual stream continues.

        Args:
            x: (B, T, d), or (n, d) if the router needs no sequences; may be empty.
            token_ids: (B, T) vocabulary ids (hash routing). task_ids: (B,) or (B, T) (task-level routing).
            mask: (B, T) bool, False for padding, which uses no capacity and gets output 0.

        Raises:
            ValueError: x has a wrong shape or holds integers, mask isn't bool, or other shapes don't match that of x.
        """
        shape, d = x.shape[:-1], x.shape[-1]  # (B, T)
        self._check(x, token_ids=token_ids, task_ids=task_ids, mask=mask)
        if task_ids is not None and task_ids.dim() < len(shape):
            task_ids = task_ids[:, None].expand(shape)
        token_ids, task_ids, mask = (None if t is None else t.reshape(-1) for t in (token_ids, task_ids, mask))
        x = x.reshape(-1, d)
        if x.shape[0] == 0:
            return self._nothing(x).view(*shape, d)
        if mask is not None:
            x = x.masked_fill(~mask[:, None], 0)  # empty slots read any row, and 0 times NaN is NaN
        again, checkpointed = recomputing(), self.recompute and self.training
        whole = mask is None and self.exchange is None and not checkpointed  # all experts are here, computed once
        own = (type(self).experts, type(self).compute) != (MoE.experts, MoE.compute)  # of a subclass, or of this layer
        own |= not {"experts", "compute"}.isdisjoint(vars(self))
        if whole and not own:
            record = None if again else (self.load, self.demand, self.tokens, self.experts_per_token)
            out = self.router.at_once(x, self.weights, self.room(x), statistics=record)
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

    def _check(self, x: Tensor, **inputs: Tensor | None) -> None:
        shape, d = x.shape[:-1], self.router.d_model
        if x.dim() not in (2, 3) or x.shape[-1] != d:
            right = f"must be (B, T, {d}) or (n, {d}), the router's d_model last"
            raise ValueError(f"x has shape {tuple(x.shape)}: {right}")
        if not x.is_floating_point():
            raise ValueError(f"x is of {x.dtype}: must be floating-point numbers, such as embeddings of token ids")
        for name, given in inputs.items():
            if given is None:
                continue
            if name == "mask" and given.dtype != torch.bool:
                raise ValueError(f"mask is of {given.dtype}: must be bool, False for padding")
            if given.is_floating_point():
                raise ValueError(f"{name} is of {given.dtype}: must hold whole numbers")
            if given.shape != shape and (name != "task_ids" or given.shape != shape[:1]):
                of_sequences = f" or {tuple(shape[:1])}" if name == "task_ids" and len(shape) == 2 else ""
                right = f"must be {tuple(shape)}{of_sequences}, as x is {tuple(x.shape)}"
                raise ValueError(f"{name} has shape {tuple(given.shape)}: {right}")

    def _keep(self, aux_loss: Tensor | None) -> None:
        self.aux_loss, self._leaf = aux_loss, None
        if aux_loss is not None and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # Reentrant checkpointing first runs a pass without gradients. `aux_loss` is then a separate leaf, which gets
            # a gradient from the loss; when the pass is recomputed, `_WithLoss` passes this gradient on.
            self.aux_loss = self._leaf = aux_loss.detach().requires_grad_()

    def _nothing(self, x: Tensor) -> Tensor:
        """Return the (0, d) input, with zero gradients for all parameters: other ranks may wait for these."""
        for buffer in self.buffers(recurse=False):
            buffer.zero_()
        nothing = torch.stack([w.sum() for w in (*self.router.parameters(), *self.weights())]).sum() * 0.0
        self._keep(nothing if self.training else None)
        return x + nothing

    def experts(self, x: Tensor, token: Tensor, gate: Tensor) -> Tensor:
        """Return (n, d) outputs for (n, d) tokens and their (e, k) assignment (Eq. 3 and 4)."""
        if self.exchange is not None:
            return self.exchange(self, x, token, gate)
        return self.compute(x, *self.weights(), token, gate)

    def weights(self) -> tuple[Tensor, Tensor]:
        """Return w1 and w2, or the copies of them that experts compute with."""
        return (self.w1, self.w2) if self.copied is None else (self.copied(self.w1), self.copied(self.w2))

    def compute(self, x: Tensor, w1: Tensor, w2: Tensor, token: Tensor, gate: Tensor) -> Tensor:
        """Like `experts`, with the given weights, which may be those of some experts only."""
        groups = -(-token.numel() // self.room(x))
        if groups <= 1:
            return self._some_experts(x, w1, w2, token, gate)
        some = (t.chunk(groups) for t in (w1, w2, token, gate))
        return sum(self._some_experts(x, *group) for group in zip(*some, strict=True))  # type: ignore[return-value]

    def room(self, x: Tensor) -> int:
        """Return the number of slots that may be computed at a time."""
        return sys.maxsize if torch.is_grad_enabled() else max(HELD // self.w1.shape[2], SLOTS * x.shape[0], 1)

    def _some_experts(self, x: Tensor, w1: Tensor, w2: Tensor, token: Tensor, gate: Tensor) -> Tensor:
        """Return these experts' contribution to each token, (n, d). Empty slots (token n, gate 0) add to no token."""
        if token.numel() and self.router.fast(x, x.shape[0]):
            from ecmoe import kernels

            return kernels.experts(x, w1, w2, token, gate, kernels=self.kernels)
        n, d = x.shape
        slots = token.reshape(-1)
        x_in = x.index_select(0, slots.clamp(max=n - 1)).view(*token.shape, d)  # (e, k, d) = P X
        h = F.gelu(torch.bmm(x_in, w1), approximate="tanh")  # (e, k, f); JAX's default GeLU
        y = torch.bmm(h, w2)  # (e, k, d)
        y = y * gate.unsqueeze(-1).to(y.dtype)
        return y.new_zeros(n + 1, d).index_add(0, slots, y.view(-1, d))[:-1].to(x.dtype)

    def __getstate__(self) -> dict[str, Any]:
        # An autograd graph can't be copied; and what a copy computes isn't this layer's gradient.
        return {**self.__dict__, "aux_loss": None, "_leaf": None, "copied": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        untracked[self] = False  # `track` knows the original only

    @torch.no_grad()
    def _record(self, assignment: Assignment, n: int, mask: Tensor | None) -> None:
        token = assignment.token
        if token.numel() and self.router.fast(token, n) and not torch.compiler.is_compiling():
            from ecmoe.kernels.rows import invert  # torch would sort under deterministic algorithms

            counts = (invert(token.contiguous(), n) < token.numel()).sum(1).clamp(max=metrics.MOST)
        else:
            counts = assignment.experts_per_token(n).clamp(max=metrics.MOST)
        if mask is not None:  # don't count padding
            counts = counts.masked_fill(~mask, -1)
        # Comparing is faster than scattering: atomic additions of all tokens would compete for a few bins.
        bins = (counts == torch.arange(metrics.MOST + 1, device=counts.device)[:, None]).sum(1)
        self.load.copy_(assignment.load(n))
        self.experts_per_token.copy_(bins)
        self.tokens.copy_(bins.sum())
        self.demand.copy_(self.load if assignment.demand is None else assignment.demand)

    def statistics(self) -> dict[str, Tensor]:
        """Return the last forward's metrics as scalar tensors on the layer's device: dropped, over_capacity, max_load and
        share_0 to share_8, as `ecmoe.model.metrics` defines them; NaN if it had no tokens."""
        return {metric.name: metric.of(self) for metric in metrics.of_layers()}  # type: ignore[misc]


class _WithLoss(torch.autograd.Function):
    """Return `out`; in the backward pass, give `loss` the gradient that `leaf` received."""

    @staticmethod
    def forward(ctx, out: Tensor, loss: Tensor, leaf: Tensor) -> Tensor:
        ctx.leaf = leaf
        return out.view_as(out)

    @staticmethod
    def backward(ctx, dout: Tensor) -> tuple[Tensor, Tensor | None, None]:
        return dout, ctx.leaf.grad, None
