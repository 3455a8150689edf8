"""The kernels of ecmoe/model/attention.py, in Triton: attention and its gradients, including the bias's.

A program holds a tile of queries and loops over the keys that they see (for the keys' gradients: a tile of keys, and
the queries that see them). One loop covers far tiles, which need no bias; the other covers near tiles, which do.

Near tiles don't look up the bias score by score. All tiles at one offset from the diagonal hold the same distances at
the same positions, so `biases` writes the bias once for BLOCK queries of each head and the keys around them; its rows
load like rows of keys. Its entries for future keys are -inf: no other mask is needed. For the bias' gradient, each row
of a near tile of dS is rotated by one more than the row above: a column then holds one distance and can be summed.

Exponentials use base 2: scores and biases are multiplied by log2 e, and lse is a base-2 logarithm.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ecmoe.kernels.common import cdiv, device_of, dot, kernel

BLOCK = 128  # tokens; T must be a multiple of it
_LOG2E = tl.constexpr(1.4426950408889634)


class Tile(NamedTuple):
    """Tile sizes of a kernel, and how its loops overlap loads with computation."""

    own: int  # rows of a program, a divisor of BLOCK
    step: int  # rows per loop step, a divisor of `own`; equal to it in QUERIES
    warps: int
    far_stages: int
    near_stages: int  # pipeline stages of the near loop, which also loads biases
    per_sm: int = 1  # programs per multiprocessor, as registers allow


# By head width: up to 64, and 128. On an H200 those for 64 were the fastest of about six tried for each kernel.
FORWARD = {64: Tile(64, 64, 4, 3, 2, 4), 128: Tile(128, 64, 8, 2, 2, 1)}
QUERIES = {64: Tile(64, 64, 4, 3, 2, 3), 128: Tile(64, 64, 4, 2, 1, 2)}
KEYS = {64: Tile(64, 64, 4, 2, 2, 3), 128: Tile(64, 32, 4, 2, 2, 2)}


def _options(tiles: dict[int, Tile], width: int) -> dict:
    t = tiles[64 if width <= 64 else 128]
    registers = min(65_536 // (32 * t.warps * t.per_sm) // 8 * 8, 255)
    stages = dict(FAR_STAGES=t.far_stages, NEAR_STAGES=t.near_stages)
    return dict(WIDTH=width, OWN=t.own, STEP=t.step, **stages, num_warps=t.warps, maxnreg=registers)


def biases(like: Tensor, table: Tensor, near: int, sides: int) -> Tensor:
    """Return (sides, h, BLOCK, span + BLOCK): the bias minus that of far distances, around a block on the diagonal.

    The first side has the block's queries as rows; its keys start `span` tokens before the block, and all earlier keys
    are far. The second side has the block's keys as rows; its queries start with the block.

    Args:
        like: attention's input. table: (h, T) float32, the bias by distance, equal for all distances from `near` on.
    """
    h, T = table.shape
    width = cdiv(near, BLOCK) * BLOCK + BLOCK
    # In 16 bits float16 suits biases, which are small: it has 11 significant bits, bfloat16 has 8.
    out = like.new_empty(sides, h, BLOCK, width, dtype=torch.float32 if like.dtype == torch.float32 else torch.float16)
    _flash_biases_kernel[BLOCK // 16, h, sides](table, out, T, width, BLOCK=BLOCK, ROWS=16)
    return out


def forward(qkv: Tensor, table: Tensor, near: int) -> tuple[Tensor, Tensor]:
    """Return out (B, T, h, d/h), and lse (B, h, T) of the scores minus the far distances' bias; all contiguous."""
    B, T, _, h, width = qkv.shape
    near = min(near, T)
    out, lse = qkv.new_empty(B, T, h, width), qkv.new_empty(B, h, T, dtype=torch.float32)
    options = _options(FORWARD, width)
    with device_of(qkv):
        bias = biases(qkv, table, near, 1)
        _flash_forward_kernel[B * h * T // options["OWN"],](
            qkv, bias, out, lse, h, T, near, bias.shape[-1], width**-0.5, BLOCK=BLOCK, **options
        )  # fmt: skip
    return out, lse


def backward(dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, table: Tensor, near: int) -> tuple[Tensor, Tensor]:
    """Return dqkv, and (h, distances) float32, dS summed by distance: complete only for distances below `near`."""
    B, T, _, h, width = qkv.shape
    near = min(near, T)
    dqkv, delta = torch.empty_like(qkv), torch.empty_like(lse)
    options = _options(QUERIES, width)
    own, step = options["OWN"], options["STEP"]
    distances = (cdiv(near - 1, step) + 1) * step
    sums = qkv.new_zeros(B, h, T // own, distances, dtype=torch.float32)
    with device_of(qkv):
        bias = biases(qkv, table, near, 2)
        sizes = h, T, near, bias.shape[-1], width**-0.5
        _flash_queries_kernel[B * h * T // own,](
            qkv, bias, dout, out, lse, dqkv, delta, sums, *sizes, distances, BLOCK=BLOCK, **options
        )  # fmt: skip
        options = _options(KEYS, width)
        _flash_keys_kernel[B * h * T // options["OWN"],](
            qkv, bias[1], dout, lse, delta, dqkv, *sizes, BLOCK=BLOCK, **options
        )
    return dqkv, sums.sum((0, 2))


@kernel
def _flash_biases_kernel(table, out, T, width, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    first, head, side = tl.program_id(0) * ROWS, tl.program_id(1), tl.program_id(2)
    table += head * T
    out += (side * tl.num_programs(1) + head) * BLOCK * width
    far = tl.load(table + T - 1)
    row = (first + tl.arange(0, ROWS))[:, None]
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)[None, :]
        distance = tl.where(side == 0, row + (width - BLOCK) - column, column - row)
        past = distance >= 0
        bias = (tl.load(table + tl.minimum(distance, T - 1), mask=past, other=0) - far) * _LOG2E
        bias = tl.minimum(tl.maximum(bias, -60_000.0), 60_000.0)  # finite in float16
        tl.store(out + row * width + column, tl.where(past, bias, float("-inf")).to(out.dtype.element_ty))


@triton.jit
def _place(h, T, OWN: tl.constexpr):
    """Return a program's sequence, head and block. Blocks of a head run in turn, to find its keys in the cache."""
    blocks = T // OWN
    pair = tl.program_id(0) // blocks
    return (pair // h).to(tl.int64), pair % h, tl.program_id(0) % blocks


@triton.jit
def _tile(base, first, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return pointers to ROWS x COLUMNS numbers from row `first` on."""
    return base + (first + tl.arange(0, ROWS))[:, None] * stride + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def _product(a, b):
    """Return a b^T."""
    return dot(a, b.T, tl.zeros((a.shape[0], b.shape[0]), tl.float32))


@triton.jit
def _far_keys(first, near, STEP: tl.constexpr):
    """Return how many keys, in whole steps, are far from query `first` and all later ones."""
    return tl.maximum(first - near + 1, 0) // STEP * STEP


@kernel
def _flash_forward_kernel(
    qkv, bias, out, lse, h, T, near, width, scale,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, OWN: tl.constexpr, STEP: tl.constexpr,
    FAR_STAGES: tl.constexpr, NEAR_STAGES: tl.constexpr,
):  # fmt: skip
    b, head, block = _place(h, T, OWN)
    first = T - OWN - block * OWN  # the last queries first: they have the most keys
    qkv += (b * T * 3 * h + head) * WIDTH
    q = tl.load(_tile(qkv, first, 3 * h * WIDTH, OWN, WIDTH))
    bias += head * BLOCK * width + (width - BLOCK) - first
    highest = tl.full((OWN,), float("-inf"), tl.float32)
    total, output = tl.zeros((OWN,), tl.float32), tl.zeros((OWN, WIDTH), tl.float32)
    far = _far_keys(first, near, STEP)
    scale *= _LOG2E
    # Online softmax. Key 0 comes first and all queries see it, so `highest` is finite from then on.
    for NEAR in tl.static_range(2):
        start, stop = far if NEAR else 0, first + OWN if NEAR else far
        for key in tl.range(start, stop, STEP, num_stages=NEAR_STAGES if NEAR else FAR_STAGES):
            k = tl.load(_tile(qkv + h * WIDTH, key, 3 * h * WIDTH, STEP, WIDTH))
            v = tl.load(_tile(qkv + 2 * h * WIDTH, key, 3 * h * WIDTH, STEP, WIDTH))
            score = _product(q, k)
            if NEAR:
                score = score * scale + tl.load(_tile(bias + key, 0, width, OWN, STEP)).to(tl.float32)
                higher = tl.maximum(highest, tl.max(score, 1))
                p = tl.exp2(score - higher[:, None])
            else:  # one multiplication per score less
                higher = tl.maximum(highest, tl.max(score, 1) * scale)
                p = tl.exp2(score * scale - higher[:, None])
            shrink = tl.exp2(highest - higher)
            total = total * shrink + tl.sum(p, 1)
            output = dot(p.to(v.dtype), v, output * shrink[:, None])
            highest = higher
    out += (b * T * h + head) * WIDTH
    tl.store(_tile(out, first, h * WIDTH, OWN, WIDTH), (output / total[:, None]).to(out.dtype.element_ty))
    tl.store(lse + (b * h + head) * T + first + tl.arange(0, OWN), highest + tl.log2(total))


@triton.jit
def _add_both(a, b, c, d):
    return a + c, b + d


@kernel
def _flash_queries_kernel(
    qkv, bias, dout, out, lse, dqkv, delta, sums, h, T, near, width, scale, distances,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, OWN: tl.constexpr, STEP: tl.constexpr,
    FAR_STAGES: tl.constexpr, NEAR_STAGES: tl.constexpr,
):  # fmt: skip
    """Compute the queries' gradients; also delta, and the sums of dS by distance."""
    tl.static_assert(OWN == STEP, "a turned tile is a square")
    b, head, block = _place(h, T, OWN)
    first = T - OWN - block * OWN
    qkv += (b * T * 3 * h + head) * WIDTH
    q = tl.load(_tile(qkv, first, 3 * h * WIDTH, OWN, WIDTH))
    gradient = tl.load(_tile(dout + (b * T * h + head) * WIDTH, first, h * WIDTH, OWN, WIDTH))
    output = tl.load(_tile(out + (b * T * h + head) * WIDTH, first, h * WIDTH, OWN, WIDTH))
    inner = tl.sum(gradient.to(tl.float32) * output.to(tl.float32), 1)
    at = (b * h + head) * T + first + tl.arange(0, OWN)
    tl.store(delta + at, inner)
    logs = tl.load(lse + at)
    bias += head * BLOCK * width + (width - BLOCK) - first
    far = _far_keys(first, near, STEP)
    dq = tl.zeros((OWN, WIDTH), tl.float32)
    sums += tl.program_id(0).to(tl.int64) * distances + first
    row, column = tl.arange(0, OWN)[:, None], tl.arange(0, STEP)[None, :]
    above_before = tl.zeros((STEP,), tl.float32)
    for NEAR in tl.static_range(2):
        start, stop = far if NEAR else 0, first + OWN if NEAR else far
        for key in tl.range(start, stop, STEP, num_stages=NEAR_STAGES if NEAR else FAR_STAGES):
            k = tl.load(_tile(qkv + h * WIDTH, key, 3 * h * WIDTH, STEP, WIDTH))
            v = tl.load(_tile(qkv + 2 * h * WIDTH, key, 3 * h * WIDTH, STEP, WIDTH))
            score = _product(q, k) * (scale * _LOG2E) - logs[:, None]
            if NEAR:
                score += tl.load(_tile(bias + key, 0, width, OWN, STEP)).to(tl.float32)
            ds = tl.exp2(score) * (_product(gradient, v) - inner[:, None])
            dq = dot(ds.to(k.dtype), k, dq)
            if NEAR:  # column j of `turned` holds distance first - key + j, and above its diagonal STEP less
                turned = tl.gather(ds, (row - column) & (STEP - 1), 1)
                below, above = tl.where(row >= column, turned, 0.0), tl.where(row < column, turned, 0.0)
                below, above = tl.reduce((below, above), 0, _add_both)
                tl.store(sums - key + tl.arange(0, STEP), below + above_before)
                above_before = above
    dqkv += (b * T * 3 * h + head) * WIDTH
    tl.store(_tile(dqkv, first, 3 * h * WIDTH, OWN, WIDTH), (dq * scale).to(dqkv.dtype.element_ty))


@kernel
def _flash_keys_kernel(
    qkv, bias, dout, lse, delta, dqkv, h, T, near, width, scale,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, OWN: tl.constexpr, STEP: tl.constexpr,
    FAR_STAGES: tl.constexpr, NEAR_STAGES: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of keys and values. The first keys come first: they have the most queries."""
    b, head, block = _place(h, T, OWN)
    first = block * OWN
    qkv += (b * T * 3 * h + head) * WIDTH
    k = tl.load(_tile(qkv + h * WIDTH, first, 3 * h * WIDTH, OWN, WIDTH))
    v = tl.load(_tile(qkv + 2 * h * WIDTH, first, 3 * h * WIDTH, OWN, WIDTH))
    dout += (b * T * h + head) * WIDTH
    lse += (b * h + head) * T
    delta += (b * h + head) * T
    bias += head * BLOCK * width - first
    far = tl.minimum(tl.cdiv(first + OWN - 1 + near, STEP) * STEP, T)  # far from all keys of the program
    dk, dv = tl.zeros((OWN, WIDTH), tl.float32), tl.zeros((OWN, WIDTH), tl.float32)
    for FAR in tl.static_range(2):  # keys are the rows: this avoids transposes
        start, stop = far if FAR else first, T if FAR else far
        for query in tl.range(start, stop, STEP, num_stages=FAR_STAGES if FAR else NEAR_STAGES):
            q = tl.load(_tile(qkv, query, 3 * h * WIDTH, STEP, WIDTH))
            gradient = tl.load(_tile(dout, query, h * WIDTH, STEP, WIDTH))
            at = query + tl.arange(0, STEP)
            score = _product(k, q) * (scale * _LOG2E) - tl.load(lse + at)[None, :]
            if not FAR:
                score += tl.load(_tile(bias + query, 0, width, OWN, STEP)).to(tl.float32)
            p = tl.exp2(score)
            dv = dot(p.to(gradient.dtype), gradient, dv)
            ds = p * (_product(v, gradient) - tl.load(delta + at)[None, :])
            dk = dot(ds.to(q.dtype), q, dk)
    dqkv += (b * T * 3 * h + head) * WIDTH
    tl.store(_tile(dqkv + h * WIDTH, first, 3 * h * WIDTH, OWN, WIDTH), (dk * scale).to(dqkv.dtype.element_ty))
    tl.store(_tile(dqkv + 2 * h * WIDTH, first, 3 * h * WIDTH, OWN, WIDTH), dv.to(dqkv.dtype.element_ty))
