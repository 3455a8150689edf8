"""The two matrix products next to the activation, which is fused in as their epilogue: persistent Triton kernels.

The copy engine loads operands (tensor descriptors), tile after tile in one flattened loop, so that the next tile's
operands load while the epilogue of the current tile runs. An epilogue processes a slice of columns at a time, which
needs fewer registers, and writes by ordinary stores: the copy engine would wait for each slice before the next.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ecmoe.kernels.common import INTERPRETED, cdiv, described, dot, kernel
from ecmoe.kernels.rows import approximate, gelu, new_slope, pack, unpack


class Tile(NamedTuple):
    """Tile sizes of a product: blocks of m x n, k deep; the epilogue takes `slice` columns at a time."""

    m: int
    n: int
    k: int
    slice: int
    warps: int
    stages: int
    per_sm: int  # programs per multiprocessor: of two, one can multiply while the other runs its epilogue

    def options(self) -> dict:
        """Return the options for Triton's launcher."""
        registers = min(65_536 // (32 * self.warps * self.per_sm), 255)
        return {"num_warps": self.warps, "num_stages": self.stages, "maxnreg": registers}


def tile_for(depth: int, slopes: bool = False) -> Tile:
    """Return the faster of two tiles: two small tiles share a multiprocessor, a large one loads less.

    Speed relative to cuBLAS (which computes no activation) on an H200 at depths 512, 768 and 4096, when writing slopes;
    without slopes; backward. Small: 0.73, 0.74, 0.92; 0.85, 0.88, 0.88; 0.81, 0.81, 0.87. Large: 0.70, 0.76, 0.99;
    0.79, 0.79, 1.01; 0.71, 0.75, 0.98.
    """
    if depth > (512 if slopes else 1024):
        return Tile(128, 256, 64, 128, warps=8, stages=3, per_sm=1)
    return Tile(128, 128, 64, 32, warps=4, stages=3, per_sm=2)


def fusible(a: Tensor, w: Tensor) -> bool:
    """Return whether the fused products support these: on Hopper GPUs (tiles are sized for their shared memory), with
    16-bit types, and with rows of whole 16 bytes for the copy engine."""
    if a.is_cuda and not _hopper(a.device.index):
        return False
    narrow = a.dtype in (torch.bfloat16, torch.float16)
    whole = all(size * a.element_size() % 16 == 0 for size in w.shape[1:])
    return (narrow or INTERPRETED and a.dtype == torch.float32) and whole and a.numel() > 0


def product(
    x_in: Tensor, w1: Tensor, gate: Tensor, *, keep: bool = True, tile: Tile | None = None
) -> tuple[Tensor, Tensor]:
    """Return slope = gelu'(h) and a = gate gelu(h) of h = x_in w1, both (e, k, f); slope is empty unless `keep`."""
    a = x_in.new_empty(*gate.shape, w1.shape[2])
    slope, t = new_slope(a, keep), tile or tile_for(x_in.shape[2], keep)
    _launch(x_in, described(w1, [1, t.k, t.n]), slope if keep else None, a, gate, t, False)
    return slope, a


def product_backward(
    dy: Tensor, w2: Tensor, slope: Tensor, gate: Tensor, *, out: Tensor | None = None, tile: Tile | None = None
) -> Tensor:
    """Return dh = gate (dy w2^T) slope, (e, k, f), written to `out` if given."""
    dh, t = dy.new_empty(*gate.shape, w2.shape[1]) if out is None else out, tile or tile_for(dy.shape[2])
    _launch(dy, described(w2, [1, t.n, t.k]), slope, dh, gate, t, True)
    return dh


def _launch(
    x: Tensor, w: TensorDescriptor, slope: Tensor | None, out: Tensor, gate: Tensor, t: Tile, back: bool
) -> None:
    (e, rows, depth), columns = x.shape, out.shape[2]
    tiles = e * cdiv(rows, t.m) * cdiv(columns, t.n)
    _product_kernel[min(tiles, t.per_sm * (_multiprocessors(x.device.index) if x.is_cuda else 2)),](
        described(x, [1, t.m, t.k]), w, slope, out, gate, e, rows,
        COLUMNS=columns, DEPTH=depth, M=t.m, N=t.n, K=t.k, SLICE=t.slice, BACKWARD=back,
        **approximate(x), **t.options(),
    )  # fmt: skip


@lru_cache
def _hopper(device: int) -> bool:
    return torch.cuda.get_device_capability(device)[0] == 9


@lru_cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit
def _tile(tile, rows, COLUMNS: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """Return a tile's expert, row and column. An expert's tiles are consecutive, so its operands stay in the cache."""
    down = tl.cdiv(rows, M)
    inside = tile % (down * tl.cdiv(COLUMNS, N))
    return tile // (down * tl.cdiv(COLUMNS, N)), inside % down, inside // down


@triton.jit
def _multiply(
    x, w, expert, m, n,
    DEPTH: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Return a tile of an expert's x w, or of x w^T if TRANSPOSED."""
    total = tl.zeros((M, N), tl.float32)
    for i in range(tl.cdiv(DEPTH, K)):
        left = x.load([expert, m * M, i * K]).reshape(M, K)
        if TRANSPOSED:
            right = w.load([expert, n * N, i * K]).reshape(N, K).T
        else:
            right = w.load([expert, i * K, n * N]).reshape(K, N)
        total = dot(left, right, total)
    return total


@triton.jit
def _halves(total):
    """Return the left and the right half of the columns."""
    return total.reshape(total.shape[0], 2, total.shape[1] // 2).permute(0, 2, 1).split()


@kernel
def _product_kernel(
    x, w, slope, out, gate, e, rows, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, SLICE: tl.constexpr,
    BACKWARD: tl.constexpr, APPROXIMATE: tl.constexpr,
):  # fmt: skip
    tiles = e * tl.cdiv(rows, M) * tl.cdiv(COLUMNS, N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        expert, m, n = _tile(tile, rows, COLUMNS, M, N)
        total = _multiply(x, w, expert, m, n, DEPTH, M, N, K, BACKWARD)
        row, column = m * M + tl.arange(0, M), n * N + tl.arange(0, N)
        place = expert.to(tl.int64) * rows + row
        g = tl.load(gate + place, mask=row < rows, other=0)
        if BACKWARD:
            inside = (row < rows)[:, None] & (column < COLUMNS)[None, :]
            steepness = tl.load(slope + place[:, None] * COLUMNS + column[None, :], mask=inside, other=0)
            _scale(out, total, steepness, g, expert, m * M, n * N, rows, COLUMNS, SLICE)
        else:
            _activate(slope, out, total, g, expert, m * M, n * N, rows, COLUMNS, SLICE, APPROXIMATE)


@triton.jit
def _activate(
    slope, a, total, g, expert, m, n, rows, COLUMNS: tl.constexpr, SLICE: tl.constexpr, APPROXIMATE: tl.constexpr
):  # fmt: skip
    if total.shape[1] > SLICE:
        left, right = _halves(total)
        _activate(slope, a, left, g, expert, m, n, rows, COLUMNS, SLICE, APPROXIMATE)
        _activate(slope, a, right, g, expert, m, n + left.shape[1], rows, COLUMNS, SLICE, APPROXIMATE)
    else:
        value, steepness = gelu(total, APPROXIMATE)
        if slope is not None:
            _store(slope, pack(steepness, slope.dtype.element_ty), expert, m, n, rows, COLUMNS)
        _store(a, g[:, None] * value, expert, m, n, rows, COLUMNS)


@triton.jit
def _scale(dh, total, steepness, g, expert, m, n, rows, COLUMNS: tl.constexpr, SLICE: tl.constexpr):
    if total.shape[1] > SLICE:
        left, right = _halves(total)
        steep_left, steep_right = _halves(steepness)
        _scale(dh, left, steep_left, g, expert, m, n, rows, COLUMNS, SLICE)
        _scale(dh, right, steep_right, g, expert, m, n + left.shape[1], rows, COLUMNS, SLICE)
    else:
        _store(dh, g[:, None] * total * unpack(steepness), expert, m, n, rows, COLUMNS)


@triton.jit
def _store(out, value, expert, m, n, rows, COLUMNS: tl.constexpr):
    """Write a tile to an expert's matrix, (rows, COLUMNS), from row m and column n on."""
    row, column = m + tl.arange(0, value.shape[0]), n + tl.arange(0, value.shape[1])
    place = (expert.to(tl.int64) * rows + row)[:, None] * COLUMNS + column[None, :]
    inside = (row < rows)[:, None] & (column < COLUMNS)[None, :]
    tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)
