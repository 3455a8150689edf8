"""`expert_choice`: a whole layer, including its router, as one autograd function.

A kernel launch costs the host some microseconds and an autograd step more, whatever it computes. If nothing else reads
the intermediate results, 24 launches suffice, not 36 as with separate kernels or 89 as in plain PyTorch
(`Router.read`, `ExpertChoice.assign`, `MoE.experts`): the logits' kernel also computes the scores and clears the table
`inverse` (which slot of which expert holds a token), the top-k fills this table, and gates and statistics are read from
it.
"""

from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ecmoe.kernels import layer, routing
from ecmoe.kernels.common import block, cdiv, check, device_of, kernel
from ecmoe.kernels.selection import BINS, LONGEST, choose

NUMBERS = 2048  # tokens x experts of a program


def available(x: Tensor, weight: Tensor, k: int) -> bool:
    """Return whether `expert_choice` supports (n, d) tokens, (d, e) router weights, and k tokens per expert."""
    types = x.dtype in (torch.bfloat16, torch.float32) and weight.dtype in (torch.bfloat16, torch.float32)
    return types and 0 < k < len(x) < LONGEST and weight.shape[1] <= routing.MOST_EXPERTS


def expert_choice(
    x: Tensor,
    weight: Tensor,
    w1: Tensor,
    w2: Tensor,
    k: int,
    *,
    scale: float | None = 1.0,
    cutoff: tuple[Tensor, Tensor] | None = None,
    statistics: Sequence[Tensor] | None = None,
    kernels: str = "triton",
) -> Tensor:
    """Compute a layer in which every expert takes the k tokens that score highest for it (Eq. 1 to 4).

    Args:
        x: (n, d). weight: (d, e), the router's. w1: (e, d, f). w2: (e, f, d).
        scale: factor from scores to gates; None: a token's gates are normalised to sum to 1.
        cutoff: (e,) and () tensors, to which each expert's lowest chosen score, and 1, are added; None: nothing is.
        statistics: int64 tensors to overwrite: (e,) load, (e,) demand, () tokens, and at most 16 bins, which count the
            tokens with 0, 1, ... experts, the last bin those with as many or more. None: nothing is written.
        kernels: see `experts`.

    Returns:
        (n, d), in the dtype of x.
    """
    check(x)
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (x, weight, w1, w2))
    scale = None if scale is None else float(scale)  # an int would be another type of argument to the kernels
    return _Layer.apply(x, weight, w1, w2, k, scale, cutoff or (None, None), statistics, kernels, dtype, keep)


def _cut(n: int, e: int) -> tuple[tuple[int], dict]:
    """Return the grid, and the tokens and experts of a program."""
    rows = max(NUMBERS // block(e), 1)
    return (cdiv(n, rows),), {"E": block(e), "ROWS": rows}


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, w1, w2, k, scale, cutoff, statistics, kernels, dtype, keep):
        with device_of(x):
            (n, e), x, weight = (len(x), weight.shape[1]), x.contiguous(), weight.contiguous()
            inverse = x.new_empty(n, e, dtype=torch.int32)
            S = routing.product(x, weight, inverse, e * k)
            load, demand, tokens, bins = statistics or [None] * 4
            token, gate = choose(S, k, inverse, cutoff, bins), S.new_empty(e, k)
            grid, cut = _cut(n, e)
            _weigh_kernel[grid](
                S,
                inverse,
                gate,
                load,
                demand,
                tokens,
                bins,
                n,
                e,
                k,
                scale,
                0 if bins is None else len(bins) - 1,
                **cut,
            )
            out, *kept = layer.experts_forward(x.to(dtype), w1, w2, token, gate, inverse, kernels, keep)
        if keep:
            ctx.scale, ctx.kernels = scale, kernels
            ctx.save_for_backward(x, weight, S, w1, w2, token, gate, *kept)
        return out.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        x, weight, S, w1, w2, token, gate, inverse, x_in, *kept = ctx.saved_tensors
        with device_of(x):
            dx, dw1, dw2, dgate = layer.experts_backward(
                dout.to(x_in.dtype), w1, w2, token, gate, inverse, x_in, *kept, ctx.kernels
            )
            (n, e), dlogits = inverse.shape, S.new_empty(*inverse.shape)
            grid, cut = _cut(n, e)
            _weigh_backward_kernel[grid](dgate, S, inverse, dlogits, n, e, dgate.numel(), ctx.scale, **cut)
            dx, dweight = routing.product_backward(dlogits, dx, x, weight)
        return dx, dweight, dw1, dw2, *[None] * 7


@kernel
def _weigh_kernel(
    S, inverse, gate, load, demand, tokens, bins, n, e, k, scale, most, E: tl.constexpr, ROWS: tl.constexpr
):
    t, expert = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, E)
    inside = (t < n)[:, None] & (expert < e)[None, :]
    slot = tl.load(inverse + t[:, None] * e + expert[None, :], mask=inside, other=e * k)
    held = slot < e * k
    s = tl.load(S + expert[None, :].to(tl.int64) * n + t[:, None], mask=held, other=0)
    if scale is None:
        s = s / tl.maximum(tl.sum(s, 1), 1.1754943508222875e-38)[:, None]
    else:
        s *= scale
    tl.store(gate + slot, s, mask=held)
    if bins is not None:
        got, j = tl.minimum(tl.sum(held.to(tl.int32), 1), most), tl.arange(0, BINS)
        some = tl.histogram(got, BINS, mask=t < n).to(tl.int64)
        tl.atomic_add(bins + j, some, mask=j <= most, sem="relaxed")
        first = (expert < e) & (tl.program_id(0) == 0)
        tl.store(load + expert, tl.zeros((E,), tl.int64) + k, mask=first)
        tl.store(demand + expert, tl.zeros((E,), tl.int64) + k, mask=first)
        tl.store(tokens, n)


@kernel
def _weigh_backward_kernel(dgate, S, inverse, out, n, e, slots, scale, E: tl.constexpr, ROWS: tl.constexpr):
    t, expert = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, E)
    inside = (t < n)[:, None] & (expert < e)[None, :]
    place = t[:, None] * e + expert[None, :]
    slot = tl.load(inverse + place, mask=inside, other=slots)
    ds = tl.load(dgate + slot, mask=slot < slots, other=0)
    s = tl.load(S + expert[None, :].to(tl.int64) * n + t[:, None], mask=inside, other=0)
    if scale is None:  # gradient of s / sum(s) over the token's experts
        own = tl.where(slot < slots, s, 0.0)
        total = tl.maximum(tl.sum(own, 1), 1.1754943508222875e-38)[:, None]
        ds = tl.where(slot < slots, ds - tl.sum(own / total * ds, 1)[:, None], 0.0) / total
    else:
        ds *= scale
    tl.store(out + place, s * (ds - tl.sum(s * ds, 1)[:, None]), mask=inside)
