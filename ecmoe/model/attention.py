"""Attention of the Transformer: causal, with a learned bias for each head and distance; or to all tokens alike.

`Attention` hands the bias to PyTorch's attention as a mask, one number per head, query and key. On a GPU in 16 bits
this is slow, the more so as its gradient is that large too. There we have kernels of our own (ecmoe/kernels/attention.py),
flash attention (Dao et al. 2022) with the bias added inside:

    S = q k^T / (d/h)^1/2 + bias,  P = exp(S - lse),  out = P v                                lse = logsumexp S
    dv = P^T dout,  dS = P (dout v^T - delta),  dq ~ dS k,  dk ~ dS^T q                        delta = sum(dout out)

All distances beyond T5's longest share a bias, and softmax doesn't see a constant: with that one subtracted from all, far
keys need no bias. Nor does anybody ask which of them a gradient belongs to: dS sums to 0 over the keys of a query, so they
get minus the sum of all near ones. Sums are float32 and have a fixed order: the same input gives the same bits.

Letters: B sequences of T tokens, width d, h heads.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ecmoe.config import RunConfig
from ecmoe.routing.router import TRITON


class Attention(nn.Module):
    """Multi-head attention; causal, with a relative position bias (per layer, as in GLaM), or, of images, to all tokens alike."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model, bias=False)
        self.out = nn.Linear(config.d_model, config.d_model, bias=False)
        self.relative = None
        if not config.images:
            self.relative = RelativeBias(config.heads, config.relative_buckets, config.relative_max_distance)

    def forward(self, x: Tensor, past: list[Tensor] | None = None) -> Tensor:
        """x: (B, T, d). past: [keys, values], each (B, h, tokens before x, d/h), or []; extended in place."""
        B, T, d = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.heads, d // self.heads)
        if self.relative is not None and past is None and fits(qkv):
            y, _ = fast_attention(qkv, self.relative.table(T, x.device).float(), self.relative.near)
            return self.out(y.reshape(B, T, d))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, h, T, d/h)
        if past is not None:
            if past:
                k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
            past[:] = [k, v]
        bias = None
        if self.relative is not None:  # (h, T, keys), -inf for the future
            bias = self.relative(T, k.shape[2], x.device).to(q.dtype).expand(B, -1, -1, -1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.out(y.transpose(1, 2).reshape(B, T, d))


class RelativeBias(nn.Module):
    """A learned bias per head and bucket of distances (Raffel et al. 2020, causal).

    Attributes:
        near: distances from this one on share the last bucket; the first that does may lie just below.
    """

    def __init__(self, heads: int, buckets: int, max_distance: int) -> None:
        super().__init__()
        self.buckets, self.max_distance = buckets, max_distance
        self.weight = nn.Parameter(torch.zeros(buckets, heads))
        distances = torch.arange(max(buckets, max_distance) + 1, device="cpu")
        # One more, should a GPU's logarithm put the first of them into the bucket before.
        self.near = int((bucket(distances, buckets, max_distance) < buckets - 1).sum()) + 1

    def falling(self) -> Tensor:
        """(buckets, h) initial values after ALiBi (Press et al. 2022): minus a head's slope times the distance.

        Head i of h has the slope 2^(-8 (i + 1) / h). A bucket's distance is the mean of its distances; the last one,
        which has no end, takes its first. The start of training is then spent on what to look for, not on where.
        """
        heads = self.weight.shape[1]
        slopes = 2.0 ** (-8 * torch.arange(1, heads + 1) / heads)
        distances = torch.arange(max(self.buckets, self.max_distance) + 1)
        of = bucket(distances, self.buckets, self.max_distance)
        counts, last = of.bincount(minlength=self.buckets), self.buckets - 1
        mean = of.bincount(weights=distances.float(), minlength=self.buckets) / counts.clamp_min(1)
        mean[last] = distances[of == last][0]
        return -slopes * mean[:, None]

    def table(self, keys: int, device: torch.device) -> Tensor:
        """(h, keys), the bias by distance."""
        of = bucket(torch.arange(keys, device=device), self.buckets, self.max_distance)
        # A sum with one term, not a look-up, whose gradient a GPU would have to sort before it adds it up in a fixed order.
        chosen = torch.arange(self.buckets, device=device)[:, None, None] == of  # (buckets, 1, keys)
        return (self.weight[:, :, None] * chosen).sum(0)

    def forward(self, queries: int, keys: int, device: torch.device) -> Tensor:
        """(h, queries, keys), -inf where the key lies in the future; the last query is the last key's token."""
        # A Toeplitz matrix: from far to near, then the future, and each row one to the right of the row above. Written
        # again and again, a line that is one longer than a row does that, and its backward pass is a plain sum;
        # indexing (queries, keys) entries would add up one by one.
        line = F.pad(self.table(keys, device).flip(1), (0, queries), value=float("-inf"))
        rows = line.roll(1 - queries, 1).repeat(1, queries)[:, :-queries].unflatten(1, (queries, -1))
        return rows[..., :keys]


def bucket(distance: Tensor, buckets: int, max_distance: int) -> Tensor:
    """T5's causal buckets: exact up to half of them, then logarithmic up to max_distance."""
    exact = buckets // 2
    log = (distance.clamp_min(1).float() / exact).log() / math.log(max(max_distance / exact, 1.0001))
    far = exact + (log * (buckets - exact)).long().clamp(0, buckets - exact - 1)
    return torch.where(distance < exact, distance, far)


# The fast path.


def fits(qkv: Tensor) -> bool:
    """Can `fast_attention` take this (B, T, 3, h, d/h) tensor? On a GPU with Triton, 16 bits, in whole blocks."""
    whole = qkv.shape[1] % 128 == 0 and qkv.shape[4] in (16, 32, 64, 128)
    return qkv.is_cuda and qkv.dtype in (torch.bfloat16, torch.float16) and whole and TRITON


@torch.library.custom_op("ecmoe::attention", mutates_args=())
def fast_attention(qkv: Tensor, table: Tensor, near: int) -> tuple[Tensor, Tensor]:
    """Causal softmax(q k^T / (d/h)^1/2 + bias) v, (B, T, h, d/h); and what the backward pass needs of the softmax.

    Args:
        qkv: (B, T, 3, h, d/h), as one product leaves queries, keys and values.
        table: (h, T) float32, the bias by distance. All from `near` on are one parameter: they are equal, and only
            their gradients' sum counts.
    """
    from ecmoe.kernels import attention as kernel

    return kernel.forward(qkv.contiguous(), table.contiguous(), near)


@fast_attention.register_fake
def _(qkv, table, near):
    B, T, _, h, width = qkv.shape
    return qkv.new_empty(B, T, h, width), qkv.new_empty(B, h, T, dtype=torch.float32)


@torch.library.custom_op("ecmoe::attention_backward", mutates_args=())
def _attention_backward(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, table: Tensor, near: int
) -> tuple[Tensor, Tensor]:
    """Gradients of qkv and table; of the far distances' the sum stands at the last."""
    from ecmoe.kernels import attention as kernel

    dout, qkv, table = dout.contiguous(), qkv.contiguous(), table.contiguous()
    dqkv, sums = kernel.backward(dout, qkv, out, lse, table, near)
    return dqkv, _of_table(sums, near, table.shape[1])


@_attention_backward.register_fake
def _(dout, qkv, out, lse, table, near):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (qkv, table))


def _keep_for_backward(ctx, inputs, output):
    qkv, table, ctx.near = inputs
    ctx.save_for_backward(qkv, *output, table)


def _backward(ctx, dout, _):
    return *_attention_backward(dout, *ctx.saved_tensors, ctx.near), None


fast_attention.register_autograd(_backward, setup_context=_keep_for_backward)


def _of_table(sums: Tensor, near: int, T: int) -> Tensor:
    """(h, distances) sums of dS -> (h, T), the table's gradient; of the far distances' the sum stands at the last."""
    dtable, exact = sums.new_zeros(len(sums), T), min(near, T)
    dtable[:, :exact] = sums[:, :exact]
    if near < T:
        dtable[:, -1] = -dtable[:, :exact].sum(1)
    return dtable
