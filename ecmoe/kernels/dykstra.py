"""The paper's solver of the capped problem on a GPU, in Triton: Dykstra's projections, a launch an iteration.

Letters: g pools of m tokens, e experts, k tokens of an expert, b the cap, S (g, e, m) scores; E is e rounded up to a
power of two, T the tokens of a program at a time.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ecmoe.kernels.capped import cut
from ecmoe.kernels.common import block

TILE = {"ELEMENTS": 8192, "num_warps": 8}  # T E numbers of a program at a time
PROGRAMS = 128  # for all pools together


@torch.library.custom_op("ecmoe::dykstra", mutates_args=())
def dykstra(scores: Tensor, k: int, b: int, regularization: float, iterations: int) -> Tensor:
    """log A, (g, e, m), as `dykstra` of ecmoe/routing/capped.py without padding: a launch an iteration."""
    g, e, m = scores.shape
    sizes = cut(m, e, TILE)
    programs = min(block(PROGRAMS // g), block(triton.cdiv(m, sizes["T"])))
    row = scores.new_zeros(iterations + 1, g, e)
    column = scores.new_zeros(g, m)
    # Of each program's tokens: an expert's largest log A, and the sum of A over its exponential.
    sums = scores.new_empty(2, g, programs, 2, e)
    constants = 1 / regularization, math.log(max(k, 1e-30)), math.log(b)
    with torch.cuda.device_of(scores):
        for r in range(iterations + 1):
            _dykstra_kernel[programs, g](
                scores, *scores.stride(), e, m, *constants, row, column, sums, r,
                FIRST=r == 0, PROGRAMS=programs, **sizes,
            )  # fmt: skip
        A = scores / regularization - row[iterations, :, :, None] - column[:, None]
    return A.clamp_max(0.0)


@dykstra.register_fake
def _(scores, k, b, regularization, iterations):
    return torch.empty_like(scores)


@triton.jit(do_not_specialize=["r"])
def _dykstra_kernel(
    scores, sg, se, sm, e, m, strength, log_k, log_b, row, column, sums, r,
    FIRST: tl.constexpr, PROGRAMS: tl.constexpr, E: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Iteration r: rows from the sums of the one before, then columns and entries, and the sums for the next.

    log A is Z - row - column - box, box the excess of Z - row - column over 0: kept nowhere, for rows and columns say it
    all. The first launch adds up exp Z.
    """
    pool, pools, expert = tl.program_id(1), tl.num_programs(1), tl.arange(0, E)
    known = expert < e
    sums += pool * PROGRAMS * 2 * e
    if not FIRST:
        program = tl.arange(0, PROGRAMS)
        parts = sums + (r + 1) % 2 * pools * PROGRAMS * 2 * e + program[:, None] * 2 * e + expert[None, :]
        mosts = tl.load(parts, mask=known[None, :], other=0.0)
        totals = tl.load(parts + e, mask=known[None, :], other=1.0)
        most = tl.max(mosts, 0)
        total = tl.sum(totals * tl.exp(mosts - most[None, :]), 0)
        row += ((r - 1) * pools + pool) * e
        old = tl.load(row + expert, mask=known, other=0.0)
        new = old + most + tl.log(total) - log_k
        tl.store(row + pools * e + expert, new, mask=known & (tl.program_id(0) == 0))
    most = tl.full((E,), -1e30, tl.float32)
    total = tl.zeros((E,), tl.float32)
    for start in range(tl.program_id(0) * T, m, PROGRAMS * T):
        token = start + tl.arange(0, T)
        inside = (token < m)[:, None] & known[None, :]
        place = pool.to(tl.int64) * sg + expert[None, :].to(tl.int64) * se + token[:, None].to(tl.int64) * sm
        A = tl.load(scores + place, mask=inside, other=0.0) * strength
        if not FIRST:
            before = tl.load(column + pool * m + token, mask=token < m, other=0.0)
            box = tl.where(r > 1, tl.maximum(A - old[None, :] - before[:, None], 0.0), 0.0)
            A -= new[None, :]
            free = tl.where(known[None, :], A - box, float("-inf"))
            largest = tl.max(free, 1)
            after = largest + tl.log(tl.sum(tl.exp(free - largest[:, None]), 1)) - log_b
            after = tl.maximum(after, 0.0)
            tl.store(column + pool * m + token, after, mask=token < m)
            A = tl.minimum(A - after[:, None], 0.0)
        A = tl.where(inside, A, float("-inf"))
        larger = tl.maximum(most, tl.max(A, 0))
        total = total * tl.exp(most - larger) + tl.sum(tl.exp(A - larger[None, :]), 0)
        most = larger
    part = sums + r % 2 * pools * PROGRAMS * 2 * e + tl.program_id(0) * 2 * e + expert
    tl.store(part, most, mask=known)
    tl.store(part + e, total, mask=known)
