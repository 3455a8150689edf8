"""`select`: the k highest of each row, without a sort, in rising order of place.

Radix select: a score's key is an int32 that orders as the score does, and the k-th key is pinned down two bits at a
time, by counting how many keys lie above. One program a row can do that, but reads the row again and again.
In a long row a sample first guesses a key that a few more than k should reach; all programs count and list who
does, and the search goes through that list. Where the guess was bad, it goes through the row: slower, never wrong.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ecmoe.kernels.common import block, check

SEARCH = {"BLOCK": 4096, "num_warps": 16}
GUESS = {"BLOCK": 4096, "num_warps": 8}
CHUNK = {"BLOCK": 2048, "num_warps": 4}
SAMPLE = 4096  # keys of a row that guess; rows up to twice as long are searched at once
DEVIATIONS = 6  # of the sample's count: how many more than k the guess aims at


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
    out = scores.new_empty(rows, k, dtype=torch.int64)
    cut = SEARCH | {"BLOCK": block(m, 16, SEARCH["BLOCK"])}
    long = m > 2 * SAMPLE
    chunks, room = triton.cdiv(m, CHUNK["BLOCK"]), min(2 * k + SAMPLE, m) if long else 1
    listed, low, held = (
        torch.empty(rows, size, dtype=torch.int32, device=scores.device) for size in (room, 1, chunks)
    )
    with torch.cuda.device_of(scores):
        if long:
            share = k * SAMPLE / m
            rank = min(round(share + DEVIATIONS * share**0.5) + DEVIATIONS, SAMPLE)
            _guess_kernel[rows,](scores, low, m, rank, SAMPLE=SAMPLE, **GUESS)
            _count_kernel[rows, chunks](scores, low, held, m, **CHUNK)
            _list_kernel[rows, chunks](scores, low, held, listed, m, room, CHUNKS=block(chunks), **CHUNK)
        _select_kernel[rows,](
            scores, listed, held, out, m, k, room, chunks, LISTED=long, CHUNKS=block(chunks), **cut
        )
    return out


@_select.register_fake
def _(scores, k):
    return scores.new_empty(scores.shape[0], k, dtype=torch.int64)


@triton.jit
def _keys(scores, place, inside):
    """Scores as int32 that order as they do; the least where there is none. -0 is 0, and NaN the largest."""
    bits = tl.load(scores + place, mask=inside, other=0).to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    bits = tl.where(size == 0, 0, tl.where(size > 0x7F800000, 0x7FFFFFFF, bits))
    return tl.where(inside, bits ^ ((bits >> 31) & 0x7FFFFFFF), -0x80000000)


@triton.jit
def _places(listed, use, stride, start, m, BLOCK: tl.constexpr):
    """A block of the m places to look at: from the list, or every stride-th of the row."""
    offset = start + tl.arange(0, BLOCK)
    place = tl.load(listed + offset, mask=(offset < m) & use, other=0)
    return tl.where(use, place, offset * stride), offset < m


@triton.jit
def _search(scores, listed, use, stride, m, k, BLOCK: tl.constexpr):
    """The k-th key lies in low..last: at least k keys are >= low, `above` < k are > last."""
    place, inside = _places(listed, use, stride, 0, m, BLOCK)
    first = _keys(scores, place, inside)  # most often all there is, and in registers
    low = tl.full((), -0x80000000, tl.int32)
    last = tl.full((), 0x7FFFFFFF, tl.int32)
    above = tl.full((), 0, tl.int32)
    count = above + m
    shift = above + 30
    while (shift >= 0) & (count > k):  # once exactly k are >= low, the other bits don't matter
        step = tl.full((), 1, tl.int32) << shift
        one, two, three = low + step, low + 2 * step, low + 3 * step
        ones = (first >= one).to(tl.int32)
        twos = (first >= two).to(tl.int32)
        threes = (first >= three).to(tl.int32)
        for start in range(BLOCK, m, BLOCK):
            place, inside = _places(listed, use, stride, start, m, BLOCK)
            key = _keys(scores, place, inside)
            ones += (key >= one).to(tl.int32)
            twos += (key >= two).to(tl.int32)
            threes += (key >= three).to(tl.int32)
        n1, n2, n3 = tl.sum(ones), tl.sum(twos), tl.sum(threes)
        digit = (n1 >= k).to(tl.int32) + (n2 >= k).to(tl.int32) + (n3 >= k).to(tl.int32)
        above = tl.where(digit == 0, n1, tl.where(digit == 1, n2, tl.where(digit == 2, n3, above)))
        count = tl.where(digit == 0, count, tl.where(digit == 1, n1, tl.where(digit == 2, n2, n3)))
        low += digit * step
        last = low + (step - 1)
        shift -= 2
    return low, last, above


@triton.jit
def _guess_kernel(scores, low, m, rank, SAMPLE: tl.constexpr, BLOCK: tl.constexpr):
    """A key that about k and a few more of the row should reach: the rank-th of the sample."""
    row = tl.program_id(0).to(tl.int64)
    key, _, _ = _search(scores + row * m, low, False, m // SAMPLE, SAMPLE, rank, BLOCK)
    tl.store(low + row, key)


@triton.jit
def _count_kernel(scores, low, held, m, BLOCK: tl.constexpr):
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = chunk * BLOCK + tl.arange(0, BLOCK)
    reach = (_keys(scores + row * m, place, place < m) >= tl.load(low + row)) & (place < m)
    tl.store(held + row * tl.num_programs(1) + chunk, tl.sum(reach.to(tl.int32)))


@triton.jit
def _list_kernel(
    scores, low, held, listed, m, room, CHUNKS: tl.constexpr, BLOCK: tl.constexpr
):
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    chunks = tl.arange(0, CHUNKS)
    before = tl.sum(tl.load(held + row * tl.num_programs(1) + chunks, mask=chunks < chunk, other=0))
    place = chunk * BLOCK + tl.arange(0, BLOCK)
    reach = (_keys(scores + row * m, place, place < m) >= tl.load(low + row)) & (place < m)
    target = before + tl.cumsum(reach.to(tl.int32)) - 1
    tl.store(listed + row * room + target, place, mask=reach & (target < room))


@triton.jit
def _select_kernel(
    scores, listed, held, out, m, k, room, chunks,
    LISTED: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    scores += row * m
    listed += row * room
    out += row * k
    use = LISTED
    if LISTED:
        chunk = tl.arange(0, CHUNKS)
        reach = tl.sum(tl.load(held + row * chunks + chunk, mask=chunk < chunks, other=0))
        use = (reach >= k) & (reach <= room)
        m = tl.where(use, reach, m)
    low, last, above = _search(scores, listed, use, 1, m, k, BLOCK)
    written = tl.full((), 0, tl.int32)
    equal = tl.full((), 0, tl.int32)
    for start in range(0, m, BLOCK):
        place, inside = _places(listed, use, 1, start, m, BLOCK)
        key = _keys(scores, place, inside)
        between = ((key >= low) & (key <= last) & inside).to(tl.int32)
        rank = equal + tl.cumsum(between) - between
        taken = ((key > last) | ((between > 0) & (rank < k - above))) & inside
        taken = taken.to(tl.int32)
        target = written + tl.cumsum(taken) - taken
        tl.store(out + target, place.to(tl.int64), mask=taken > 0)
        written += tl.sum(taken)
        equal += tl.sum(between)
