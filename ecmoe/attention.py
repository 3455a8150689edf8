"""Attention of the Transformer: causal, with a learned bias for each head and distance; or to all tokens alike.

`Attention` hands the bias to PyTorch's attention as a mask, one number per head, query and key. On a GPU in 16 bits
this is slow, the more so as its gradient is that large too. There FlexAttention looks the bias up in a table of (h, T)
distances instead, and skips the future. It could also give the table's gradient, but by atomic additions, all
queries of all sequences to the same few numbers. Ours comes from the scores' gradients

    dS = P (dP - delta),  P = exp(S + bias - lse),  dP = dout v^T,  delta = sum(dout out)  a query

added up over the queries and keys of each distance. Three observations make that cheap:

- All tiles of M queries x M keys with as many blocks between them hold the same distances at the same places. So a
  program adds up tiles of a block diagonal as they are, in registers, and distances are only told apart at the end.
- All distances beyond T5's longest share a bucket, so nobody asks which of them a gradient belongs to.
- dS sums to 0 over the keys of a query (softmax). So the far distances get minus the sum of all near ones, and only
  the two or three block diagonals of the near ones are computed at all.

Sums are float32 and have a fixed order: the same input gives the same bits. tests/test_attention.py holds the fast
path to the plain one, without a GPU in FlexAttention's eager form and Triton's interpreter.

Letters: B sequences of T tokens, width d, h heads.
"""

from __future__ import annotations

import math
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import (
    AuxRequest,
    create_block_mask,
    flex_attention,
)

from ecmoe.config import RunConfig

FLEX_BLOCK = 128  # FlexAttention's; T must be a multiple of it
# Its own choice for Hopper has no room for the looked-up biases, which take a place in the pipeline beside the keys.
FLEX_OPTIONS = {"fwd_BLOCK_M": 128, "fwd_BLOCK_N": 64, "fwd_num_stages": 2, "fwd_num_warps": 4}


class Attention(nn.Module):
    """Multi-head attention; causal, with a relative position bias (per layer, as in GLaM), or to all tokens alike."""

    def __init__(self, config: RunConfig, causal: bool = True) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model, bias=False)
        self.out = nn.Linear(config.d_model, config.d_model, bias=False)
        self.relative = None
        if causal:
            self.relative = RelativeBias(config.heads, config.relative_buckets, config.relative_max_distance)

    def forward(self, x: Tensor, past: list[Tensor] | None = None) -> Tensor:
        """x: (B, T, d). past: [keys, values], each (B, h, tokens before x, d/h), or []; extended in place."""
        B, T, d = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)  # (B, h, T, d/h)
        if self.relative is not None and past is None and flexible(q):
            y = flex(q, k, v, self.relative.table(T, x.device), self.relative.near)
            return self.out(y.transpose(1, 2).reshape(B, T, d))
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

    def table(self, keys: int, device: torch.device) -> Tensor:
        """(h, keys), the bias by distance."""
        return self.weight[bucket(torch.arange(keys, device=device), self.buckets, self.max_distance)].T

    def forward(self, queries: int, keys: int, device: torch.device) -> Tensor:
        """(h, queries, keys), -inf where the key lies in the future; the last query is the last key's token."""
        by_distance = self.table(keys, device)
        # A Toeplitz matrix: each query's row is a window into the distances from far to near, then the future; the
        # last query's comes first. Windows have a fast backward pass; indexing (queries, keys) entries has not.
        future = by_distance.new_full((by_distance.shape[0], queries - 1), float("-inf"))
        return torch.cat([by_distance.flip(1), future], dim=1).unfold(1, keys, 1).flip(1)


def bucket(distance: Tensor, buckets: int, max_distance: int) -> Tensor:
    """T5's causal buckets: exact up to half of them, then logarithmic up to max_distance."""
    exact = buckets // 2
    log = (distance.clamp_min(1).float() / exact).log() / math.log(max(max_distance / exact, 1.0001))
    far = exact + (log * (buckets - exact)).long().clamp(0, buckets - exact - 1)
    return torch.where(distance < exact, distance, far)


# The fast path.

TRITON = find_spec("triton") is not None  # known before torch.compile looks


def flexible(q: Tensor) -> bool:
    """Can `flex` take these (B, h, T, d/h) queries? On a GPU with Triton, 16 bits, in whole blocks."""
    whole = q.shape[2] % FLEX_BLOCK == 0 and q.shape[3] in (16, 32, 64, 128)
    return q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and whole and TRITON


def flex(q: Tensor, k: Tensor, v: Tensor, table: Tensor, near: int) -> Tensor:
    """Causal softmax(q k^T / (d/h)^1/2 + bias) v by FlexAttention.

    Args:
        q, k, v: (B, h, T, d/h). table: (h, T), the bias by distance.
        near: the table's entries from this distance on are one parameter, so that only their gradients' sum counts.
    """
    attend = _attend if torch.compiler.is_compiling() or not q.is_cuda else _attend_compiled
    out, lse = attend(q, k, v, table.detach().float())
    return _BiasGradient.apply(out, table, q.detach(), k.detach(), v.detach(), lse.detach(), near)


def _attend(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    def biased(score, b, h, i, j):
        return score + table[h, i - j]  # a negative distance, taken from the table's end, is masked

    T = q.shape[2]  # all layers' masks are one expression to the compiler, computed once
    mask = create_block_mask(_causal, None, None, T, T, device=q.device, BLOCK_SIZE=FLEX_BLOCK)
    out, aux = flex_attention(q, k, v, score_mod=biased, block_mask=mask, return_aux=AuxRequest(lse=True), kernel_options=FLEX_OPTIONS)
    return out, aux.lse


_attend_compiled = torch.compile(_attend, fullgraph=True, dynamic=False)  # for a model that isn't


def _causal(b, h, i, j):
    return i >= j


class _BiasGradient(torch.autograd.Function):
    """`out` as it is; its backward pass also gives the bias table's gradient."""

    @staticmethod
    def forward(ctx, out, table, q, k, v, lse, near):
        ctx.save_for_backward(out, table, q, k, v, lse)
        ctx.near = near
        return out.view_as(out)

    @staticmethod
    def backward(ctx, dout):
        out, table, q, k, v, lse = ctx.saved_tensors
        dtable = None
        if ctx.needs_input_grad[1]:
            delta = (dout.float() * out.float()).sum(-1)
            dtable = bias_gradient(q, k, v, dout, lse, delta, table.float(), ctx.near).to(table.dtype)
        return dout, dtable, None, None, None, None, None


@torch.library.custom_op("ecmoe::bias_gradient", mutates_args=())
def bias_gradient(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, lse: Tensor, delta: Tensor, table: Tensor, near: int
) -> Tensor:
    """(h, T) gradient of the bias by distance; the sum over all from `near` on stands at the last.

    Args:
        q, k, v, dout: (B, h, T, d/h). lse, delta: (B, h, T) float32. table: (h, T) float32.
    """
    from ecmoe.attention_kernel import tile_sums

    T = q.shape[2]
    sums = tile_sums(q, k, v, dout, lse, delta, table, near)  # (h, diagonals, M, M)
    M = sums.shape[-1]
    # Shift each row by one more than the row above: diagonals become columns, and column r - c + M is distance
    # (diagonal - 1) M + r - c + M.
    shifted = F.pad(sums.flip(-1), (1, M)).flatten(-2)[..., : 2 * M * M].unflatten(-1, (M, 2 * M)).sum(-2)
    by_distance = shifted[..., M:].clone()
    by_distance[:, :-1] += shifted[:, 1:, :M]
    dtable = table.new_zeros(table.shape)
    exact = min(near, T)
    dtable[:, :exact] = by_distance.flatten(1)[:, :exact]
    if near < T:
        dtable[:, -1] = -dtable[:, :exact].sum(1)
    return dtable


@bias_gradient.register_fake
def _(q, k, v, dout, lse, delta, table, near):
    return torch.empty_like(table, memory_format=torch.contiguous_format)
