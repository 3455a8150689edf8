"""The bias gradient's sums over tiles of ecmoe/attention.py, in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, TILES, WARPS, STAGES = 64, 32, 4, 2  # queries and keys of a tile; tiles that a program adds up


def tile_sums(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, lse: Tensor, delta: Tensor, table: Tensor, near: int
) -> Tensor:
    """(h, diagonals, M, M) float32: dS summed over the tiles of a block diagonal, for all that hold a distance < near.

    Arguments as those of `ecmoe.attention.bias_gradient`.

    Raises:
        ValueError: T is not a multiple of M.
    """
    B, h, T, width = q.shape
    if T % BLOCK:
        raise ValueError(f"T={T}: the bias gradient needs whole blocks of {BLOCK} tokens")
    q, k, v, dout = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v, dout))
    diagonals = min((near - 2) // BLOCK + 2, T // BLOCK)  # the n-th holds distances (n - 1) M + 1 ... (n + 1) M - 1
    splits = triton.cdiv(B * T // BLOCK, TILES)
    parts = q.new_empty(h, diagonals, splits, BLOCK, BLOCK, dtype=torch.float32)
    with torch.cuda.device_of(q):
        _tile_sums_kernel[splits, diagonals, h](
            q, k, v, dout, lse.contiguous(), delta.contiguous(), table.contiguous(), parts,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dout.stride()[:3],
            B, T, width**-0.5, TILES=TILES, M=BLOCK, WIDTH=width, STAGES=STAGES, num_warps=WARPS,
        )  # fmt: skip
    return parts.sum(2)


_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _product(a, b):
    """a b^T"""
    if _INTERPRETED:  # it multiplies the bits of bf16 numbers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, tl.trans(b), input_precision="ieee")


@triton.jit
def _tile_sums_kernel(
    q, k, v, dout, lse, delta, table, parts,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, dout_b, dout_h, dout_t,
    B, T, scale,
    TILES: tl.constexpr, M: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    split, diagonal, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    LOG2E: tl.constexpr = 1.4426950408889634
    row, column = tl.arange(0, M), tl.arange(0, WIDTH)
    distance = diagonal * M + row[:, None] - row[None, :]
    bias = tl.load(table + head * T + distance, mask=distance >= 0, other=float("-inf")) * LOG2E
    total = tl.zeros((M, M), tl.float32)
    across = T // M - diagonal  # tiles of a sequence
    for tile in tl.range(split * TILES, tl.minimum((split + 1) * TILES, B * across), num_stages=STAGES):
        b, first = (tile // across).to(tl.int64), tile % across * M
        key = first + row
        query = key + diagonal * M
        a = tl.load(q + b * q_b + head * q_h + query[:, None] * q_t + column[None, :])
        c = tl.load(k + b * k_b + head * k_h + key[:, None] * k_t + column[None, :])
        value = tl.load(v + b * v_b + head * v_h + key[:, None] * v_t + column[None, :])
        gradient = tl.load(dout + b * dout_b + head * dout_h + query[:, None] * dout_t + column[None, :])
        at = (b * tl.num_programs(2) + head) * T + query
        p = tl.exp2(_product(a, c) * (scale * LOG2E) + bias - (tl.load(lse + at) * LOG2E)[:, None])
        total += p * (_product(gradient, value) - tl.load(delta + at)[:, None])
    at = ((head * tl.num_programs(1) + diagonal) * tl.num_programs(0) + split).to(tl.int64) * M * M
    tl.store(parts + at + row[:, None] * M + row[None, :], total)
