"""`tally`: who got how much, for a layer's statistics. Two passes of whole numbers, the same in whatever order they add up."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ecmoe.kernels.common import check

BLOCK = 2048
BINS = 16  # a power of two above `most`


def tally(token: Tensor, n: int, most: int = 8) -> tuple[Tensor, Tensor]:
    """What each expert and each token got.

    Args:
        token: (e, k) int64, n in an empty slot. most: below 15.

    Returns:
        (e,) int32 tokens of each expert; (most + 1,) int32 tokens with 0, 1, ... most or more experts.
    """
    check(token)
    return _tally(token, n, most)


@torch.library.custom_op("ecmoe::tally", mutates_args=())
def _tally(token: Tensor, n: int, most: int) -> tuple[Tensor, Tensor]:
    (e, k), token = token.shape, token.contiguous()
    counts = torch.zeros(n, dtype=torch.int32, device=token.device)
    load, bins = counts.new_empty(e), counts.new_empty(most + 1)
    with torch.cuda.device_of(token):
        _count_tokens_kernel[e,](token, counts, load, bins, n, k, most, BLOCK=BLOCK, BINS=BINS)
        _count_bins_kernel[triton.cdiv(n, BLOCK),](counts, bins, n, most, BLOCK=BLOCK, BINS=BINS)
    return load, bins


@_tally.register_fake
def _(token, n, most):
    return tuple(token.new_empty(size, dtype=torch.int32) for size in (token.shape[0], most + 1))


@triton.jit
def _count_tokens_kernel(token, counts, load, bins, n, k, most, BLOCK: tl.constexpr, BINS: tl.constexpr):
    expert, total = tl.program_id(0).to(tl.int64), tl.full((), 0, tl.int32)
    for start in range(0, k, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        t = tl.load(token + expert * k + slot, mask=slot < k, other=n)
        tl.atomic_add(counts + t, 1, mask=t < n, sem="relaxed")
        total += tl.sum((t < n).to(tl.int32))
    tl.store(load + expert, total)
    j = tl.arange(0, BINS)
    tl.store(bins + j, tl.zeros((BINS,), tl.int32), mask=(j <= most) & (expert == 0))


@triton.jit
def _count_bins_kernel(counts, bins, n, most, BLOCK: tl.constexpr, BINS: tl.constexpr):
    t, j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BINS)
    got = tl.minimum(tl.load(counts + t, mask=t < n, other=0), most)
    tl.atomic_add(bins + j, tl.histogram(got, BINS, mask=t < n), mask=j <= most, sem="relaxed")
