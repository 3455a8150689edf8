"""Attention of the Transformer: causal, with a learned bias per head and distance; or, for images, over all tokens.

`Attention` passes the bias to PyTorch's attention as a mask with one number per head, query and key. In 16 bits on a GPU
that is slow, and so is the mask's gradient. There our kernels (ecmoe/kernels/attention.py) add the bias inside flash
attention (Dao et al. 2022):

    S = q k^T / (d/h)^1/2 + bias,  P = exp(S - lse),  out = P v                                lse = logsumexp S
    dv = P^T dout,  dS = P (dout v^T - delta),  dq ~ dS k,  dk ~ dS^T q                        delta = sum(dout out)

All distances beyond T5's longest share one bias, and adding a constant doesn't change a softmax: with the shared bias
subtracted from all biases, far keys need none. Its gradient is minus the sum over near keys, as dS sums to 0 over the
keys of a query. Sums are float32 in a fixed order: equal inputs give equal bits.

Letters: B sequences of T tokens, width d, h heads.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ecmoe.config import RunConfig
from ecmoe.routing.router import TRITON


class Attention(nn.Module):
    """Multi-head attention: causal with relative position bias (per layer, as in GLaM), or over all tokens (images)."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model, bias=False)
        self.out = nn.Linear(config.d_model, config.d_model, bias=False)
        self.relative = None
        if not config.images:
            self.relative = RelativeBias(config.heads, config.relative_buckets, config.relative_max_distance)

    def forward(self, x: Tensor, past: list[Tensor] | None = None) -> Tensor:
        """Attend from x, (B, T, d). past: [keys, values] of earlier tokens, (B, h, t, d/h), or []; updated in place."""
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
        if self.relative is not None:
            bias = self.relative(T, k.shape[2], x.device).to(q.dtype).expand(B, -1, -1, -1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.out(y.transpose(1, 2).reshape(B, T, d))


class RelativeBias(nn.Module):
    """A learned bias per head and bucket of distances (Raffel et al. 2020, causal). All distances from `near` on are in
    the last bucket; `near` - 1 may be in it, too."""

    def __init__(self, heads: int, buckets: int, max_distance: int) -> None:
        super().__init__()
        self.buckets, self.max_distance = buckets, max_distance
        self.weight = nn.Parameter(torch.zeros(buckets, heads))
        distances = torch.arange(max(buckets, max_distance), device="cpu")
        # Plus one, since a GPU's logarithm may put the first distance of the last bucket into the bucket before.
        self.near = int((bucket(distances, buckets, max_distance) < buckets - 1).sum()) + 1

    def falling(self) -> Tensor:
        """Return (buckets, h) initial values after ALiBi (Press et al. 2022): minus a head's slope, 2^(-8 (i + 1) / h) for
        head i, times a bucket's mean distance, or the smallest in the last one, which is unbounded. Early training can
        then learn what to attend to, rather than where."""
        heads = self.weight.shape[1]
        slopes = 2.0 ** (-8 * torch.arange(1, heads + 1, device="cpu") / heads)
        distances = torch.arange(self.near, device="cpu")  # the last of them is the smallest in the last bucket
        of = bucket(distances, self.buckets, self.max_distance)
        mean = of.bincount(weights=distances.float()) / of.bincount().clamp_min(1)
        return -slopes * mean[:, None]

    def table(self, keys: int, device: torch.device) -> Tensor:
        """Return the (h, keys) bias by distance."""
        of = bucket(torch.arange(keys, device=device), self.buckets, self.max_distance)
        # A sum with one nonzero term, not an index: on a GPU, the deterministic gradient of indexing needs a sort.
        chosen = torch.arange(self.buckets, device=device)[:, None, None] == of  # (buckets, 1, keys)
        return (self.weight[:, :, None] * chosen).sum(0)

    def forward(self, queries: int, keys: int, device: torch.device) -> Tensor:
        """Return the (h, queries, keys) bias, -inf for future keys. The last query and the last key are one token."""
        # A row runs from far keys to near keys to the future, and is the row above shifted right by one. Repeating a line
        # that is one element longer than a row gives this, with a plain sum as gradient; indexing's would be slow.
        line = F.pad(self.table(keys, device).flip(1), (0, queries), value=float("-inf"))
        rows = line.roll(1 - queries, 1).repeat(1, queries)[:, :-queries].unflatten(1, (queries, -1))
        return rows[..., :keys]


def bucket(distance: Tensor, buckets: int, max_distance: int) -> Tensor:
    """Return T5's causal bucket of each distance: exact in the first half of them, then logarithmic to max_distance."""
    exact = buckets // 2
    log = (distance.clamp_min(1).float() / exact).log() / math.log(max(max_distance / exact, 1.0001))
    far = exact + (log * (buckets - exact)).long().clamp(0, buckets - exact - 1)
    return torch.where(distance < exact, distance, far)


def fits(qkv: Tensor) -> bool:
    """Return whether `fast_attention` supports a (B, T, 3, h, d/h) tensor: GPU with Triton, 16 bits, whole blocks."""
    whole = qkv.shape[1] % 128 == 0 and qkv.shape[4] in (16, 32, 64, 128)
    return qkv.is_cuda and qkv.dtype in (torch.bfloat16, torch.float16) and whole and TRITON


@torch.library.custom_op("ecmoe::attention", mutates_args=())
def fast_attention(qkv: Tensor, table: Tensor, near: int) -> tuple[Tensor, Tensor]:
    """Return causal softmax(q k^T / (d/h)^1/2 + bias) v, (B, T, h, d/h), and lse, (B, h, T), for the backward pass.

    Args:
        qkv: (B, T, 3, h, d/h). table: (h, T) float32, the bias by distance. near: entries of the table from here on must
            be equal: they stand for one parameter, so only the sum of their gradients matters.
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
    from ecmoe.kernels import attention as kernel

    dqkv, sums = kernel.backward(dout.contiguous(), qkv.contiguous(), out, lse, table.contiguous(), near)
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
    """Return the table's (h, T) gradient from (h, distances) sums of dS; its last entry is the sum of the far ones."""
    dtable, exact = sums.new_zeros(len(sums), T), min(near, T)
    dtable[:, :exact] = sums[:, :exact]
    if near < T:
        dtable[:, -1] = -dtable[:, :exact].sum(1)
    return dtable
