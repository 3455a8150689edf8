"""`tally_`: who got how much, for a layer's statistics. Two passes of whole numbers, the same in whatever order they add up."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from ecmoe.kernels.common import Operator, cdiv, check, device_of, kernel

BLOCK = 2048
BINS = 16


def tally_(token: Tensor, n: int, load: Tensor, bins: Tensor) -> None:
    """Write down what each expert and each token got.

    Args:
        token: (e, k) int64, n in an empty slot.
        load: (e,) gets the tokens of each expert. bins: at most 16; they get the tokens with 0, 1, ... experts, the last one
            also those with more.
    """
    check(token)
    _tally_op(token, n, load, bins)


def _tally(token: Tensor, n: int, load: Tensor, bins: Tensor) -> None:
    (e, k), token, most = token.shape, token.contiguous(), len(bins) - 1
    counts = torch.zeros(n, dtype=torch.int32, device=token.device)
    with device_of(token):
        _count_tokens_kernel[e,](token, counts, load, bins, n, k, most, BLOCK=BLOCK, BINS=BINS)
        _count_bins_kernel[cdiv(n, BLOCK),](counts, bins, n, most, BLOCK=BLOCK, BINS=BINS)


_tally_op = Operator(_tally, mutates=("load", "bins"))


@kernel
def _count_tokens_kernel(token, counts, load, bins, n, k, most, BLOCK: tl.constexpr, BINS: tl.constexpr):
    expert, total = tl.program_id(0).to(tl.int64), tl.full((), 0, tl.int32)
    for start in range(0, k, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        t = tl.load(token + expert * k + slot, mask=slot < k, other=n)
        tl.atomic_add(counts + t, 1, mask=t < n, sem="relaxed")
        total += tl.sum((t < n).to(tl.int32))
    tl.store(load + expert, total)
    j = tl.arange(0, BINS)
    tl.store(bins + j, tl.zeros((BINS,), bins.dtype.element_ty), mask=(j <= most) & (expert == 0))


@kernel
def _count_bins_kernel(counts, bins, n, most, BLOCK: tl.constexpr, BINS: tl.constexpr):
    t, j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BINS)
    got = tl.minimum(tl.load(counts + t, mask=t < n, other=0), most)
    some = tl.histogram(got, BINS, mask=t < n).to(bins.dtype.element_ty)
    tl.atomic_add(bins + j, some, mask=j <= most, sem="relaxed")
