"""`select`: the positions of the k highest scores of each row, in rising order, without a sort.

Radix select: each score becomes an int32 key of the same order. The k-th highest key is found two bits at a time, by
counting the keys above, starting at the first bit in which keys differ. One program per row can do this, but reads the
row repeatedly. For a long row, a sample first guesses a key that slightly more than k keys should reach; all programs
count and list the keys that do, and the search uses that list. If the guess was bad, the search uses the whole row:
this is slower, but never wrong.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ecmoe.kernels.common import Operator, block, cdiv, check, device_of, kernel

SEARCH = {"BLOCK": 4096, "num_warps": 8}
GUESS = {"BLOCK": 4096, "num_warps": 8}
CHUNK = {"BLOCK": 1024, "num_warps": 2}
SAMPLE = 4096  # sampled keys of a row; rows up to twice as long are searched directly
DEVIATIONS = 6  # standard deviations of the sample's count by which the guess aims beyond k
SLACK = 8  # the guess may overshoot its rank by 1/SLACK, to end sooner
BINS = tl.constexpr(16)  # room for the bins of a layer's statistics
LONGEST = 1 << 21  # limit of a row: three counts are packed into 63 bits


def select(scores: Tensor, k: int) -> Tensor:
    """Return (..., k) int64: the positions of the k highest of (..., m) scores, in rising order; no gradient.

    Among equal scores the first are taken. Types other than float32, and rows of 2^21 scores or more, use `torch.topk`,
    which returns another order.
    """
    m, scores = scores.shape[-1], scores.detach()
    if scores.dtype != torch.float32 or m >= LONGEST:
        return scores.topk(k, dim=-1).indices
    check(scores)
    if k == m:  # includes rows of one score, on which Triton 3.6 fails
        return torch.arange(k, device=scores.device).expand(scores.shape).contiguous()
    return _select_op(scores.reshape(-1, m).contiguous(), k).view(*scores.shape[:-1], k)


def _select(scores: Tensor, k: int) -> Tensor:
    with device_of(scores):
        return choose(scores, k)


_select_op = Operator(_select, lambda scores, k: scores.new_empty(len(scores), k, dtype=torch.int64))


def choose(
    scores: Tensor,
    k: int,
    inverse: Tensor | None = None,
    cutoff: tuple[Tensor, Tensor] | tuple[None, None] = (None, None),
    bins: Tensor | None = None,
) -> Tensor:
    """Run `select` on contiguous (rows, m) scores, k < m, and update the given optional tensors in the same kernel.

    Args:
        inverse: (m, rows) int32, filled with rows x k: gets the slot of each position in each row that chose it.
        cutoff: (rows,) and () tensors, to which each row's lowest chosen score, and 1, are added.
        bins: set to zeros.
    """
    rows, m = scores.shape
    out = scores.new_empty(rows, k, dtype=torch.int64)
    chunks, room, listed, held, expected = 1, 1, out, out, m  # for a short row, which has no list
    if m > 2 * SAMPLE:
        chunks, room = cdiv(m, CHUNK["BLOCK"]), min(2 * k + SAMPLE, m)
        listed, low, held = (scores.new_empty(rows, size, dtype=torch.int32) for size in (room, 1, chunks))
        share = k * SAMPLE / m
        rank = min(round(share + DEVIATIONS * share**0.5) + DEVIATIONS, SAMPLE)
        # The keys that the guess should let through at most. After a bad guess the whole row is searched: no tiny blocks.
        expected = max((rank + rank // SLACK) * m // SAMPLE, SEARCH["BLOCK"] // 4)
        _guess_kernel[rows,](scores, low, m, rank, rank // SLACK, SAMPLE=SAMPLE, **GUESS)
        for count in (True, False):
            _list_kernel[rows, chunks](scores, low, held, listed, m, room, COUNT=count, CHUNKS=block(chunks), **CHUNK)
    _take_kernel[rows,](
        scores, listed, held, out, inverse, *cutoff, bins, m, k, room, chunks, 0 if bins is None else len(bins) - 1,
        LISTED=m > 2 * SAMPLE, CHUNKS=block(chunks), **SEARCH | {"BLOCK": block(expected, 16, SEARCH["BLOCK"])},
    )  # fmt: skip
    return out


@triton.jit
def _keys(scores, place, inside):
    """Return scores as int32 keys of the same order; outside the row, the lowest key. -0 equals 0; NaN is largest."""
    bits = tl.load(scores + place, mask=inside, other=0).to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    bits = tl.where(size == 0, 0, tl.where(size > 0x7F800000, 0x7FFFFFFF, bits))
    return tl.where(inside, bits ^ ((bits >> 31) & 0x7FFFFFFF), -0x80000000)


@triton.jit
def _places(listed, use, stride, start, m, BLOCK: tl.constexpr):
    """Return a block of the m positions to search, from the list or every stride-th of the row, and which are valid."""
    offset = start + tl.arange(0, BLOCK)
    place = tl.load(listed + offset, mask=(offset < m) & use, other=0)
    return tl.where(use, place, offset * stride), offset < m


@triton.jit
def _three(ones, twos, threes):
    """Return three sums, computed as one."""
    total = tl.sum(ones.to(tl.int64) + (twos.to(tl.int64) << 21) + (threes.to(tl.int64) << 42))
    return (total & 0x1FFFFF).to(tl.int32), ((total >> 21) & 0x1FFFFF).to(tl.int32), (total >> 42).to(tl.int32)


@triton.jit
def _search(scores, listed, use, stride, m, k, slack, BLOCK: tl.constexpr):
    """Return a key range low..last that holds the k-th highest: `count` >= k keys are >= low, `above` < k are > last.

    The search ends once count is at most k + slack: with slack 0, the remaining bits no longer matter.
    """
    place, inside = _places(listed, use, stride, 0, m, BLOCK)
    first = _keys(scores, place, inside)  # usually all keys; they stay in registers
    most, least = first, tl.where(inside, first, 0x7FFFFFFF)
    for start in range(BLOCK, m, BLOCK):
        place, inside = _places(listed, use, stride, start, m, BLOCK)
        key = _keys(scores, place, inside)
        most, least = tl.maximum(most, key), tl.minimum(least, tl.where(inside, key, 0x7FFFFFFF))
    smallest = tl.min(least)
    differ = tl.max(most) ^ smallest
    shift = tl.full((), 30, tl.int32)
    while (shift > 0) & ((differ >> shift) == 0):
        shift -= 2
    low = tl.where(shift == 30, -0x80000000, smallest & -(tl.full((), 1, tl.int32) << tl.minimum(shift + 2, 30)))
    last = tl.full((), 0x7FFFFFFF, tl.int32)
    above = tl.full((), 0, tl.int32)
    count = above + m
    while (shift >= 0) & (count > k + slack):
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
        n1, n2, n3 = _three(ones, twos, threes)
        digit = (n1 >= k).to(tl.int32) + (n2 >= k).to(tl.int32) + (n3 >= k).to(tl.int32)
        above = tl.where(digit == 0, n1, tl.where(digit == 1, n2, tl.where(digit == 2, n3, above)))
        count = tl.where(digit == 0, count, tl.where(digit == 1, n1, tl.where(digit == 2, n2, n3)))
        low += digit * step
        last = low + (step - 1)
        shift -= 2
    return low, last, above, count


@kernel
def _guess_kernel(scores, low, m, rank, slack, SAMPLE: tl.constexpr, BLOCK: tl.constexpr):
    """Store a key that slightly more than k keys of the row should reach: the rank-th of the sample, or a bit lower."""
    row = tl.program_id(0).to(tl.int64)
    key, _, _, _ = _search(scores + row * m, low, False, m // SAMPLE, SAMPLE, rank, slack, BLOCK)
    tl.store(low + row, key)


@kernel
def _list_kernel(scores, low, held, listed, m, room, COUNT: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr):
    """COUNT: count each chunk's keys of at least `low`; else list their positions, in rising order, up to `room`."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = chunk * BLOCK + tl.arange(0, BLOCK)
    reach = (_keys(scores + row * m, place, place < m) >= tl.load(low + row)) & (place < m)
    held += row * tl.num_programs(1)
    if COUNT:
        tl.store(held + chunk, tl.sum(reach.to(tl.int32)))
    else:
        chunks = tl.arange(0, CHUNKS)
        before = tl.sum(tl.load(held + chunks, mask=chunks < chunk, other=0))
        target = before + tl.cumsum(reach.to(tl.int32)) - 1
        tl.store(listed + row * room + target, place, mask=reach & (target < room))


@kernel
def _take_kernel(
    scores, listed, held, out, inverse, pending, pools, bins, m, k, room, chunks, most,
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
    low, last, above, count = _search(scores, listed, use, 1, m, k, 0, BLOCK)
    least = tl.full((BLOCK,), float("inf"), tl.float32)
    written = tl.full((), 0, tl.int32)
    equal = tl.full((), 0, tl.int32)
    for start in range(0, m, BLOCK):
        place, inside = _places(listed, use, 1, start, m, BLOCK)
        key = _keys(scores, place, inside)
        taken = (key >= low) & inside
        if count > k:  # equal keys, of which the first are taken
            between = (taken & (key <= last)).to(tl.int32)
            rank = equal + tl.cumsum(between) - between
            taken = taken & ((key > last) | (rank < k - above))
            equal += tl.sum(between)
        one = taken.to(tl.int32)
        target = written + tl.cumsum(one) - one
        tl.store(out + target, place.to(tl.int64), mask=taken)
        if inverse is not None:
            slot = (row * k + target).to(tl.int32)
            tl.store(inverse + place.to(tl.int64) * tl.num_programs(0) + row, slot, mask=taken)
        if pending is not None:
            least = tl.minimum(least, tl.load(scores + place, mask=taken, other=float("inf")))
        written += tl.sum(one)
    if pending is not None:
        tl.store(pending + row, tl.load(pending + row) + tl.min(least))
        tl.store(pools, tl.load(pools) + 1, mask=row == 0)
    if bins is not None:
        tl.store(bins + tl.arange(0, BINS), tl.zeros((BINS,), tl.int64), mask=(row == 0) & (tl.arange(0, BINS) <= most))
