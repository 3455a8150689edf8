"""The kernels of ecmoe/attention.py, in Triton: attention and its gradients, the bias's included.

A program holds a tile of queries (of keys, for the keys' gradients) and walks over the keys that they see (the queries
that see them), in two loops: over far tiles, with nothing beside the products, and over near ones, with the bias.

In the backward pass dS, made with the keys' gradients, is kept in memory, in squares of keys x queries: to make it again
for the queries' gradients would take two more products and all exponentials. At most KEPT_BYTES of it, of some heads at
a time.

Near tiles don't look the bias up score by score. As tiles as far from the diagonal hold the same distances at the same
places, `biases` writes the bias once for BLOCK queries of each head, against the keys around them; its rows then load
as those of the keys do. The future is -inf in it, so that there is no other mask.

Exponentials are of base 2: scores and biases are multiplied by log2 e, and lse is a binary logarithm.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ecmoe.kernels.common import dot

BLOCK = 128  # tokens; T must be a multiple of it
KEPT_BYTES = 1 << 30  # of dS
_LOG2E = tl.constexpr(1.4426950408889634)


class Tile(NamedTuple):
    """How a kernel is cut, and how its loops overlap loads with the rest."""

    own: int  # rows of a program, a divisor of BLOCK
    step: int  # rows that a step of its loops takes, a divisor of its own
    warps: int
    far_stages: int
    near_stages: int  # where biases take their place in the pipeline too
    per_sm: int = 1  # programs on a multiprocessor, as far as registers go


# By the width of a head: up to 64, and 128. Those for 64 were the fastest of some six each on an H200.
FORWARD = {64: Tile(64, 64, 4, 3, 2, 4), 128: Tile(128, 64, 8, 2, 2, 1)}
KEYS = {64: Tile(64, 64, 4, 2, 2, 3), 128: Tile(64, 32, 4, 2, 2, 2)}
QUERIES = {64: Tile(64, 64, 4, 3, 2, 3), 128: Tile(64, 64, 4, 3, 2, 2)}  # its own is KEYS', the side of squares


def _options(tiles: dict[int, Tile], width: int) -> dict:
    t = tiles[64 if width <= 64 else 128]
    registers = min(65_536 // (32 * t.warps * t.per_sm) // 8 * 8, 255)
    stages = dict(FAR_STAGES=t.far_stages, NEAR_STAGES=t.near_stages)
    return dict(WIDTH=width, OWN=t.own, STEP=t.step, **stages, num_warps=t.warps, maxnreg=registers)


def biases(like: Tensor, table: Tensor, near: int, *, of_keys: bool) -> Tensor:
    """(h, BLOCK, span + BLOCK): the bias, less that of the far distances, around a block on the diagonal.

    Its rows are the block's queries; keys start `span` tokens before them, and distances from there on are all far. Or
    they are the block's keys; queries start with them.

    Args:
        like: attention's input. table: (h, T) float32, the bias by distance, the last one also that of all from `near` on.
    """
    h, T = table.shape
    width = triton.cdiv(near, BLOCK) * BLOCK + BLOCK
    # Of 16 bits, float16's are the right ones: biases are small, and it has 11 digits to bfloat16's 8.
    out = like.new_empty(h, BLOCK, width, dtype=torch.float32 if like.dtype == torch.float32 else torch.float16)
    _flash_biases_kernel[BLOCK // 16, h](table, out, T, width, BLOCK=BLOCK, ROWS=16, OF_KEYS=of_keys)
    return out


def forward(qkv: Tensor, table: Tensor, near: int) -> tuple[Tensor, Tensor]:
    """out (B, T, h, d/h), and lse (B, h, T) of the scores with the far distances' bias subtracted; all contiguous."""
    B, T, _, h, width = qkv.shape
    near = min(near, T)
    out, lse = qkv.new_empty(B, T, h, width), qkv.new_empty(B, h, T, dtype=torch.float32)
    options = _options(FORWARD, width)
    with torch.cuda.device_of(qkv):
        bias = biases(qkv, table, near, of_keys=False)
        _flash_forward_kernel[B * h * T // options["OWN"],](
            qkv, bias, out, lse, h, T, near, bias.shape[-1], width**-0.5, BLOCK=BLOCK, **options
        )  # fmt: skip
    return out, lse


def backward(dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, table: Tensor, near: int) -> tuple[Tensor, Tensor]:
    """dqkv, and (h, distances) float32: dS summed by distance, of the near ones; what it holds from `near` on is not whole."""
    B, T, _, h, width = qkv.shape
    near = min(near, T)
    dqkv, delta = torch.empty_like(qkv), torch.empty_like(lse)
    of_keys, of_queries = _options(KEYS, width), _options(QUERIES, width)
    side = of_keys["OWN"]
    blocks, distances = T // side, (triton.cdiv(near - 1, side) + 1) * side
    squares = blocks * (blocks + 1) // 2
    sums = qkv.new_zeros(B * blocks, h, distances, dtype=torch.float32)
    some = min(max(KEPT_BYTES // (squares * side**2 * qkv.element_size()), 1), B * h)
    with torch.cuda.device_of(qkv):
        ds = qkv.new_empty(some, squares, side, side)
        bias = biases(qkv, table, near, of_keys=True)
        _flash_delta_kernel[B * h * T // BLOCK,](dout, out, delta, h, T, WIDTH=width, ROWS=BLOCK)
        for head in range(0, B * h, some):
            programs = (min(some, B * h - head) * blocks,)
            _flash_keys_kernel[programs](
                qkv, bias, dout, lse, delta, dqkv, ds, head, h, T, near, bias.shape[-1], width**-0.5,
                BLOCK=BLOCK, **of_keys,
            )  # fmt: skip
            _flash_queries_kernel[programs](qkv, ds, dqkv, sums, head, h, T, near, width**-0.5, distances, **of_queries)
    return dqkv, sums.sum(0)


@triton.jit
def _flash_biases_kernel(table, out, T, width, BLOCK: tl.constexpr, ROWS: tl.constexpr, OF_KEYS: tl.constexpr):
    first, head = tl.program_id(0) * ROWS, tl.program_id(1)
    table += head * T
    out += head * BLOCK * width
    far = tl.load(table + T - 1)
    row = (first + tl.arange(0, ROWS))[:, None]
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)[None, :]
        distance = column - row if OF_KEYS else row + (width - BLOCK) - column
        past = distance >= 0
        bias = (tl.load(table + tl.minimum(distance, T - 1), mask=past, other=0) - far) * _LOG2E
        bias = tl.minimum(tl.maximum(bias, -60_000.0), 60_000.0)  # finite in float16
        tl.store(out + row * width + column, tl.where(past, bias, float("-inf")).to(out.dtype.element_ty))


@triton.jit
def _place(pair, h, T, OWN: tl.constexpr):
    """A program's sequence, head, and block, the first program's being `pair`'s, heads of all sequences counted through.
    Blocks of a head follow each other: the second finds its keys in the cache."""
    blocks = T // OWN
    pair += tl.program_id(0) // blocks
    return (pair // h).to(tl.int64), pair % h, tl.program_id(0) % blocks


@triton.jit
def _tile(base, first, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Pointers to ROWS x COLUMNS numbers from row `first` on."""
    return base + (first + tl.arange(0, ROWS))[:, None] * stride + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def _product(a, b):
    """a b^T"""
    return dot(a, b.T, tl.zeros((a.shape[0], b.shape[0]), tl.float32))


@triton.jit
def _far_keys(first, near, STEP: tl.constexpr):
    """So many keys, in whole steps, are far from query `first` and all after it."""
    return tl.maximum(first - near + 1, 0) // STEP * STEP


@triton.jit
def _flash_forward_kernel(
    qkv, bias, out, lse, h, T, near, width, scale,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, OWN: tl.constexpr, STEP: tl.constexpr,
    FAR_STAGES: tl.constexpr, NEAR_STAGES: tl.constexpr,
):  # fmt: skip
    b, head, block = _place(0, h, T, OWN)
    first = T - OWN - block * OWN  # the last queries first: they have the most keys
    qkv += (b * T * 3 * h + head) * WIDTH
    q = tl.load(_tile(qkv, first, 3 * h * WIDTH, OWN, WIDTH))
    bias += head * BLOCK * width + (width - BLOCK) - first
    highest = tl.full((OWN,), float("-inf"), tl.float32)
    total, output = tl.zeros((OWN,), tl.float32), tl.zeros((OWN, WIDTH), tl.float32)
    far = _far_keys(first, near, STEP)
    scale *= _LOG2E
    highest, total, output = _attend(
        highest, total, output, q, qkv, bias, h, width, scale, 0, far, False, STEP, FAR_STAGES
    )  # fmt: skip
    highest, total, output = _attend(
        highest, total, output, q, qkv, bias, h, width, scale, far, first + OWN, True, STEP, NEAR_STAGES
    )  # fmt: skip
    out += (b * T * h + head) * WIDTH
    tl.store(_tile(out, first, h * WIDTH, OWN, WIDTH), (output / total[:, None]).to(out.dtype.element_ty))
    tl.store(lse + (b * h + head) * T + first + tl.arange(0, OWN), highest + tl.log2(total))


@triton.jit
def _attend(
    highest, total, output, q, qkv, bias, h, width, scale, start, stop,
    NEAR: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Online softmax over keys from start to stop. Key 0 comes first, which all see: `highest` is finite from then on."""
    OWN: tl.constexpr = q.shape[0]
    WIDTH: tl.constexpr = q.shape[1]
    for key in tl.range(start, stop, STEP, num_stages=STAGES):
        k = tl.load(_tile(qkv + h * WIDTH, key, 3 * h * WIDTH, STEP, WIDTH))
        v = tl.load(_tile(qkv + 2 * h * WIDTH, key, 3 * h * WIDTH, STEP, WIDTH))
        score = _product(q, k)
        if NEAR:
            score = score * scale + tl.load(_tile(bias + key, 0, width, OWN, STEP)).to(tl.float32)
            higher = tl.maximum(highest, tl.max(score, 1))
            p = tl.exp2(score - higher[:, None])
        else:  # a multiplication a score less
            higher = tl.maximum(highest, tl.max(score, 1) * scale)
            p = tl.exp2(score * scale - higher[:, None])
        shrink = tl.exp2(highest - higher)
        total = total * shrink + tl.sum(p, 1)
        output = dot(p.to(v.dtype), v, output * shrink[:, None])
        highest = higher
    return highest, total, output


@triton.jit
def _flash_delta_kernel(dout, out, delta, h, T, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    b, head, block = _place(0, h, T, ROWS)
    place = _tile((b * T * h + head) * WIDTH, block * ROWS, h * WIDTH, ROWS, WIDTH)
    inner = tl.sum(tl.load(dout + place).to(tl.float32) * tl.load(out + place).to(tl.float32), 1)
    tl.store(delta + (b * h + head) * T + block * ROWS + tl.arange(0, ROWS), inner)


@triton.jit
def _flash_keys_kernel(
    qkv, bias, dout, lse, delta, dqkv, ds, pair, h, T, near, width, scale,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, OWN: tl.constexpr, STEP: tl.constexpr,
    FAR_STAGES: tl.constexpr, NEAR_STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of keys and values, and dS; the first keys, which come first, have the most queries."""
    b, head, block = _place(pair, h, T, OWN)
    first = block * OWN
    qkv += (b * T * 3 * h + head) * WIDTH
    k = tl.load(_tile(qkv + h * WIDTH, first, 3 * h * WIDTH, OWN, WIDTH))
    v = tl.load(_tile(qkv + 2 * h * WIDTH, first, 3 * h * WIDTH, OWN, WIDTH))
    dout += (b * T * h + head) * WIDTH
    lse += (b * h + head) * T
    delta += (b * h + head) * T
    bias += head * BLOCK * width - first
    ds = _head_of(ds, T, OWN) + block * OWN * OWN
    far = tl.minimum(tl.cdiv(first + OWN - 1 + near, STEP) * STEP, T)  # from the last key on
    dk, dv = tl.zeros((OWN, WIDTH), tl.float32), tl.zeros((OWN, WIDTH), tl.float32)
    dk, dv = _to_keys(
        dk, dv, k, v, qkv, dout, lse, delta, bias, ds, h, width, scale, first, far, True, STEP, NEAR_STAGES
    )  # fmt: skip
    dk, dv = _to_keys(
        dk, dv, k, v, qkv, dout, lse, delta, bias, ds, h, width, scale, far, T, False, STEP, FAR_STAGES
    )  # fmt: skip
    dqkv += (b * T * 3 * h + head) * WIDTH
    tl.store(_tile(dqkv + h * WIDTH, first, 3 * h * WIDTH, OWN, WIDTH), (dk * scale).to(dqkv.dtype.element_ty))
    tl.store(_tile(dqkv + 2 * h * WIDTH, first, 3 * h * WIDTH, OWN, WIDTH), dv.to(dqkv.dtype.element_ty))


@triton.jit
def _head_of(ds, T, SIDE: tl.constexpr):
    """Where the squares of a program's head start."""
    blocks = T // SIDE
    return ds + tl.program_id(0) // blocks * _squares(blocks, SIDE)


@triton.jit
def _squares(block, SIDE: tl.constexpr):
    """So many numbers are in a head's squares of the queries before this block."""
    return block * (block + 1) // 2 * tl.full((), SIDE * SIDE, tl.int64)


@triton.jit
def _to_keys(
    dk, dv, k, v, qkv, dout, lse, delta, bias, ds, h, width, scale, start, stop,
    NEAR: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dS^T q and P^T dout, added up over queries from start to stop; keys are the rows, so that nothing is transposed."""
    OWN: tl.constexpr = k.shape[0]
    WIDTH: tl.constexpr = k.shape[1]
    for query in tl.range(start, stop, STEP, num_stages=STAGES):
        q = tl.load(_tile(qkv, query, 3 * h * WIDTH, STEP, WIDTH))
        gradient = tl.load(_tile(dout, query, h * WIDTH, STEP, WIDTH))
        at = query + tl.arange(0, STEP)
        score = _product(k, q) * (scale * _LOG2E) - tl.load(lse + at)[None, :]
        if NEAR:
            score += tl.load(_tile(bias + query, 0, width, OWN, STEP)).to(tl.float32)
        p = tl.exp2(score)
        dv = dot(p.to(gradient.dtype), gradient, dv)
        dscore = (p * (_product(v, gradient) - tl.load(delta + at)[None, :])).to(q.dtype)
        dk = dot(dscore, q, dk)
        block = query // OWN
        tl.store(_tile(ds + _squares(block, OWN) + (query - block * OWN), 0, OWN, OWN, STEP), dscore)
    return dk, dv


@triton.jit
def _flash_queries_kernel(
    qkv, ds, dqkv, sums, pair, h, T, near, scale, distances,
    WIDTH: tl.constexpr, OWN: tl.constexpr, STEP: tl.constexpr,
    FAR_STAGES: tl.constexpr, NEAR_STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of queries, dS k; and dS by distance."""
    b, head, block = _place(pair, h, T, OWN)
    block = T // OWN - 1 - block  # the last queries first
    first = block * OWN
    qkv += (b * T * 3 * h + head) * WIDTH
    ds = _head_of(ds, T, OWN) + _squares(block, OWN)
    dq = tl.zeros((OWN, WIDTH), tl.float32)
    for key in tl.range(0, first + OWN, STEP, num_stages=FAR_STAGES):
        k = tl.load(_tile(qkv + h * WIDTH, key, 3 * h * WIDTH, STEP, WIDTH))
        dq = dot(tl.load(_tile(ds + key * OWN, 0, OWN, STEP, OWN)).T, k, dq)
    dqkv += (b * T * 3 * h + head) * WIDTH
    tl.store(_tile(dqkv, first, 3 * h * WIDTH, OWN, WIDTH), (dq * scale).to(dqkv.dtype.element_ty))

    # Column j of a turned square holds distance first - key + j, and where its rows begin anew OWN less.
    row, column = tl.arange(0, OWN)[:, None], tl.arange(0, OWN)[None, :]
    sums += ((b * (T // OWN) + block) * h + head) * distances + first + tl.arange(0, OWN)
    anew = tl.zeros((OWN,), tl.float32)
    for key in tl.range(_far_keys(first, near, OWN), first + OWN, OWN, num_stages=NEAR_STAGES):
        turned = tl.load(ds + key * OWN + row * OWN + (row + column) % OWN).to(tl.float32)
        tl.store(sums - key, tl.sum(tl.where(row + column < OWN, turned, 0.0), 0) + anew)
        anew = tl.sum(tl.where(row + column < OWN, 0.0, turned), 0)
