"""`select`: the k highest of each row, without a sort, in rising order of place.

Radix select. A score's key is an int32 that orders as the score does. Digit by digit, from the highest, the k-th
key is pinned down by counting: how many keys with the digits found so far have which next digit? Rows are cut
into chunks, a program each, so that few long rows keep a GPU busy too; counts add up in integers, in any order
the same. Then each program writes the places of its chunk, behind those of the chunks before it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ecmoe.kernels.common import block, check

CHUNK = {"BLOCK": 4096, "num_warps": 8}
DIGITS = 4  # of 8 bits


def select(scores: Tensor, k: int) -> Tensor:
    """(..., m) -> (..., k) int64: places of the k highest scores of each row, in rising order.

    Of equal scores the first are taken. Float32 only; others take `torch.topk`, whose order is another. No
    gradient: gather the scores.
    """
    scores = scores.detach()
    if scores.dtype != torch.float32:
        return scores.topk(k, dim=-1).indices
    check(scores)
    if k == scores.shape[-1]:  # also a single score, on which Triton 3.6 fails
        return torch.arange(k, device=scores.device).expand(scores.shape).contiguous()
    rows = scores.reshape(-1, scores.shape[-1]).contiguous()
    return _select(rows, k).view(*scores.shape[:-1], k)


@torch.library.custom_op("ecmoe::select", mutates_args=())
def _select(scores: Tensor, k: int) -> Tensor:
    rows, m = scores.shape
    cut = CHUNK | {"BLOCK": block(m, 16, CHUNK["BLOCK"])}
    chunks = triton.cdiv(m, cut["BLOCK"])
    count = torch.zeros(DIGITS, rows, 256, dtype=torch.int32, device=scores.device)
    found = torch.empty(DIGITS + 1, rows, 2, dtype=torch.int32, device=scores.device)
    taken = torch.empty(rows, chunks, 2, dtype=torch.int32, device=scores.device)
    out = scores.new_empty(rows, k, dtype=torch.int64)
    grid = rows, chunks
    with torch.cuda.device_of(scores):
        for digit in range(DIGITS):
            _count_kernel[grid](scores, count, found, rows, m, k, DIGIT=digit, **cut)
        _take_kernel[grid](scores, count, found, taken, rows, m, k, DIGITS=DIGITS, **cut)
        _place_kernel[grid](scores, found, taken, out, rows, m, k, DIGITS=DIGITS, CHUNKS=block(chunks), **cut)
    return out


@_select.register_fake
def _(scores, k):
    return scores.new_empty(scores.shape[0], k, dtype=torch.int64)


@triton.jit
def _keys(scores, place, m):
    """Scores as int32 that order as they do. -0 is 0, and NaN the largest."""
    bits = tl.load(scores + place, mask=place < m, other=0).to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    bits = tl.where(size == 0, 0, tl.where(size > 0x7F800000, 0x7FFFFFFF, bits))
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _narrow(count, found, rows, k, DIGIT: tl.constexpr):
    """The first DIGIT digits of the row's k-th key, and how many of the keys with these digits are among the k."""
    row = tl.program_id(0).to(tl.int64)
    if DIGIT == 0:
        return tl.full((), 0, tl.int32), k
    bins = tl.arange(0, 256)
    have = tl.load(count + ((DIGIT - 1) * rows + row) * 256 + bins)
    if DIGIT == 1:
        left, prefix = k, tl.full((), 0, tl.int32)
    else:
        before = found + ((DIGIT - 1) * rows + row) * 2
        prefix, left = tl.load(before), tl.load(before + 1)
    least = tl.sum(have) - tl.cumsum(have) + have  # keys with this digit or a higher one
    digit = tl.sum((least >= left).to(tl.int32)) - 1
    left -= tl.sum(tl.where(bins > digit, have, 0))
    # The highest digit carries the sign.
    prefix = digit - 128 if DIGIT == 1 else (prefix << 8) | digit
    tl.store(found + (DIGIT * rows + row) * 2, prefix)  # by all chunks alike
    tl.store(found + (DIGIT * rows + row) * 2 + 1, left)
    return prefix, left


@triton.jit
def _count_kernel(scores, count, found, rows, m, k, DIGIT: tl.constexpr, BLOCK: tl.constexpr):
    prefix, _ = _narrow(count, found, rows, k, DIGIT)
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    key = _keys(scores + row * m, place, m)
    if DIGIT == 0:
        digit, here = (key >> 24) + 128, place < m
    else:
        digit, here = (key >> (24 - 8 * DIGIT)) & 255, (place < m) & ((key >> (32 - 8 * DIGIT)) == prefix)
    bins = tl.arange(0, 256)
    have = tl.histogram(digit, 256, mask=here)
    tl.atomic_add(count + (DIGIT * rows + row) * 256 + bins, have, mask=have > 0, sem="relaxed")


@triton.jit
def _take_kernel(scores, count, found, taken, rows, m, k, DIGITS: tl.constexpr, BLOCK: tl.constexpr):
    """How many keys of the chunk are above the row's k-th key, and how many equal it."""
    last, _ = _narrow(count, found, rows, k, DIGITS)
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = chunk * BLOCK + tl.arange(0, BLOCK)
    key = _keys(scores + row * m, place, m)
    taken += (row * tl.num_programs(1) + chunk) * 2
    tl.store(taken, tl.sum(((key > last) & (place < m)).to(tl.int32)))
    tl.store(taken + 1, tl.sum(((key == last) & (place < m)).to(tl.int32)))


@triton.jit
def _place_kernel(
    scores, found, taken, out, rows, m, k, DIGITS: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    last = tl.load(found + (DIGITS * rows + row) * 2)
    wanted = tl.load(found + (DIGITS * rows + row) * 2 + 1)  # of the equal ones
    chunks = tl.arange(0, CHUNKS)
    taken += row * tl.num_programs(1) * 2 + chunks * 2
    above = tl.sum(tl.load(taken, mask=chunks < chunk, other=0))
    equal = tl.sum(tl.load(taken + 1, mask=chunks < chunk, other=0))
    place = chunk * BLOCK + tl.arange(0, BLOCK)
    key = _keys(scores + row * m, place, m)
    same = ((key == last) & (place < m)).to(tl.int32)
    rank = equal + tl.cumsum(same) - same
    take = (((key > last) & (place < m)) | ((same > 0) & (rank < wanted))).to(tl.int32)
    target = above + tl.minimum(equal, wanted) + tl.cumsum(take) - take
    tl.store(out + row * k + target, place.to(tl.int64), mask=take > 0)
