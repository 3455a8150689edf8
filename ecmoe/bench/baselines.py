"""Baselines for expert choice: fast implementations of token choice, ours and those of other packages.

Each computes the same as an `MoE` with `TokenChoice`:

    capacity           `MoE` itself: (e, slots) tokens and a batched product; tokens beyond capacity are dropped
    grouped_mm         `Grouped`: no dropping, no padding; torch's grouped product over rows sorted by expert
    ScatterMoE, Liger  the same in Triton (Tan et al. 2024; Hsu et al. 2024); timed if they are installed

Letters: n tokens of width d, e experts of hidden width f, k experts per token (top-k).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ecmoe.bench.clock import reason
from ecmoe.model.moe import MoE
from ecmoe.routing import TokenChoice
from ecmoe.routing.balance import switch_loss

FAR = 16.0  # more than the logits of an untrained router differ by, but the softmax still has a gradient


class Grouped(nn.Module):
    """Token choice without dropping: rows sorted by expert, and one grouped product for all experts.

    The numbers of rows per expert stay on the device, so the host doesn't wait; the gradient of a gather is a gather,
    so there are no atomic sums. The router of `layer` is a `TokenChoice`; its capacity is ignored. Weights are shared."""

    def __init__(self, layer: MoE) -> None:
        super().__init__()
        self.router, self.w1, self.w2 = layer.router, layer.w1, layer.w2
        self.aux_loss: Tensor | None = None

    def forward(self, x: Tensor, **_: Tensor | None) -> Tensor:
        """Map tokens (B, T, d) to outputs (B, T, d)."""
        logits, flat = self.router.read(x.flatten(0, -2))
        S = logits.softmax(1)  # (n, e)
        gate, choice = S.topk(self.router.top_k, dim=1)  # (n, k)
        if self.router.gate == "renormalized":
            gate = gate / gate.sum(1, keepdim=True)
        if self.training and self.router.aux_loss_weight:
            self.aux_loss = self.router.aux_loss_weight * switch_loss(S, _counts(choice, S.shape[1]))
        return self.experts(flat, choice, gate).view_as(x)

    def experts(self, x: Tensor, choice: Tensor, gate: Tensor) -> Tensor:
        """Apply the experts `choice` (n, k) with weights `gate` (n, k) to x: (n, d) -> (n, d)."""
        kind, (n, k) = x.device.type, choice.shape
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        order = choice.flatten().argsort(stable=True)  # (n k,) requests, by expert
        place = torch.empty_like(order).scatter_(0, order, torch.arange(n * k, device=x.device))
        ends = _counts(choice, len(self.w1)).cumsum(0, dtype=torch.int32)
        x_in = _Take.apply(x.to(dtype), order, place, k)
        h = F.gelu(_grouped_mm(x_in, self.w1.to(dtype), ends), approximate="tanh")
        y = _Take.apply(_grouped_mm(h, self.w2.to(dtype), ends), place, order, 1)
        return (y.view(n, k, -1) * gate.to(dtype)[:, :, None]).sum(1).to(x.dtype)


class _Take(torch.autograd.Function):
    """Gather rows order // k of x, where `order` is a permutation of the n k requests, and `place` its inverse."""

    @staticmethod
    def forward(ctx, x, order, place, k):
        ctx.save_for_backward(place)
        ctx.k = k
        return x[order // k] if k > 1 else x[order]

    @staticmethod
    def backward(ctx, gradient):
        (place,) = ctx.saved_tensors
        rows = gradient[place]
        return rows.view(-1, ctx.k, rows.shape[1]).sum(1) if ctx.k > 1 else rows, None, None, None


def _grouped_mm(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Multiply rows (r, i), sorted by expert, by weight (e, i, o) -> (r, o); ends: (e,) end of each expert's rows."""
    if rows.dtype == torch.bfloat16:
        return torch._grouped_mm(rows, weight, offs=ends)
    # torch._grouped_mm can't be compiled in other dtypes, and doesn't support float64.
    starts = [0, *ends.tolist()]
    return torch.cat([rows[a:b] @ w for a, b, w in zip(starts, starts[1:], weight, strict=False)])


def _counts(choice: Tensor, e: int) -> Tensor:
    """Count requests per expert, (e,), in choice (n, k); `bincount` would wait for the device, and atomics are slow."""
    return (choice.flatten()[:, None] == torch.arange(e, device=choice.device)).sum(0)


class Even(TokenChoice):
    """Token choice that can be forced to random choices with equally many tokens for each expert.

    A router's own choices depend on its training. With forced choices, no expert exceeds its capacity and none is
    unused, the best case of token choice. `forced` (1 or 0) is set in place, so that one graph serves both."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("forced", torch.zeros(()), persistent=False)
        self.register_buffer("push", torch.empty(0), persistent=False)

    def prepare(self, n: int) -> None:
        """Draw the forced choices for n tokens; each expert has n k / e of them (within k if e doesn't divide n)."""
        e, device = self.num_experts, self.weight.device
        first = torch.rand(-(-n // e), e, device=device).argsort(1)  # every e tokens choose each expert once
        choice = torch.stack([first.roll(j, 1).flatten()[:n] for j in range(self.top_k)], 1)  # (n, k), all distinct
        self.push = torch.zeros(n, e, device=device).scatter(1, choice, FAR)

    def read(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits, increased by `FAR` for the forced choices, and x."""
        logits, x = super().read(x)
        return logits + self.forced * self.push, x


class ScatterMoE(Grouped):
    """Token choice by scattermoe's MLP, on copies of the same weights in its layout, (e, out, in)."""

    def __init__(self, layer: MoE) -> None:
        from scattermoe.mlp import MLP

        super().__init__(layer)
        e, d, f = layer.w1.shape
        with torch.device("meta"):
            self.mlp = MLP(d, f, e, layer.router.top_k, activation=nn.GELU(approximate="tanh"))
        self.w1, self.w2 = (nn.Parameter(w.detach().transpose(1, 2).contiguous()) for w in (layer.w1, layer.w2))
        self.mlp.experts.weight, self.mlp.output_experts.weight = self.w1, self.w2

    def experts(self, x: Tensor, choice: Tensor, gate: Tensor) -> Tensor:
        return self.mlp(x, gate.to(x.dtype), choice)


class Liger(Grouped):
    """Token choice by Liger's fused experts, gated (three matrices), so that a width of 2/3 f has the same cost."""

    def __init__(self, layer: MoE) -> None:
        from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

        super().__init__(layer)
        self.compute = LigerFusedMoEFunction.apply
        e, d, f = layer.w1.shape
        f = max(round(2 * f / 3 / 64), 1) * 64
        self.w1 = nn.Parameter(layer.w1.new_empty(e, 2 * f, d).normal_(std=d**-0.5))
        self.w2 = nn.Parameter(layer.w2.new_empty(e, d, f).normal_(std=f**-0.5))

    def experts(self, x: Tensor, choice: Tensor, gate: Tensor) -> Tensor:
        return self.compute(x, self.w1, self.w2, choice.int(), gate.to(x.dtype))


PEERS = {"ScatterMoE": ScatterMoE, "Liger": Liger}


def peers(layer: MoE) -> tuple[dict[str, Grouped], list[str]]:
    """Return the layers of other packages that are installed and work, and the names of the others, with the reason."""
    found, absent = {}, []
    for name, kind in PEERS.items():
        try:
            found[name] = kind(layer)
        except Exception as error:  # a module may be missing, and another version of a package raises anything
            absent.append(f"{name} ({reason(error)})")
    return found, absent
