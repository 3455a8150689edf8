"""Passes over rows: gather and combine tokens, apply the activation. One kernel each, on contiguous tensors.

Rows are indexed in int64, because e k f can exceed 2^31.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ecmoe.kernels.common import INTERPRETED, block, cdiv, device_of, kernel, wide

# Rows and columns that a program holds at a time.
GATHER = {"ROWS": 16, "COLUMNS": 128, "num_warps": 4}
GATHER_DOT = {"ROWS": 4, "COLUMNS": 1024, "num_warps": 4}
COMBINE = {"ROWS": 1, "COLUMNS": 1024, "num_warps": 1}


def gather(x: Tensor, token: Tensor) -> Tensor:
    """Return P x: (n, d), (e, k) -> (e, k, d), with zeros in empty slots."""
    (n, d), slots = x.shape, token.numel()
    out = x.new_empty(*token.shape, d)
    grid = cdiv(slots, GATHER["ROWS"]), cdiv(d, GATHER["COLUMNS"])
    _gather_kernel[grid](x, token, out, slots, n, d, **GATHER)
    return out


def gather_dot_(dout: Tensor, y: Tensor, token: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Return dy = P dout, (e, k, d), written over y; and gate's gradient, (e, k): dy . y / gate, as y contains gate.

    A gate of 0 gets the gradient 0: it is an empty slot, or a softmax that has underflowed.
    """
    (n, d), slots = dout.shape, token.numel()
    dgate = torch.empty_like(gate)
    cut = GATHER_DOT | {"COLUMNS": block(d, 16, GATHER_DOT["COLUMNS"])}
    _gather_dot_kernel[cdiv(slots, cut["ROWS"]),](dout, y, token, gate, dgate, slots, n, d, **wide(y), **cut)
    return y, dgate


def invert(token: Tensor, n: int) -> Tensor:
    """Return (n, e) int32: the slot, in 0..e k - 1, in which expert i holds token t; e k where it doesn't hold t."""
    (e, k), slots = token.shape, token.numel()
    inverse = torch.full((n, e), slots, dtype=torch.int32, device=token.device)
    with device_of(token):
        _invert_kernel[cdiv(slots, 1024),](token, inverse, slots, n, e, k, BLOCK=1024)
    return inverse


def combine(rows: Tensor, inverse: Tensor) -> Tensor:
    """Return P^T rows: (e, k, d), (n, e) -> (n, d), the sum of each token's slots, in the order of experts."""
    (e, k, d), n = rows.shape, inverse.shape[0]
    out = rows.new_empty(n, d)
    cut = COMBINE | {"COLUMNS": block(d, 16, COMBINE["COLUMNS"])}
    grid = cdiv(n, cut["ROWS"]), cdiv(d, cut["COLUMNS"])
    _combine_kernel[grid](rows, inverse, out, e * k, n, d, e, E=block(e, 2), **wide(rows), **cut)
    return out


def activate_(h: Tensor, gate: Tensor, keep: bool = True) -> tuple[Tensor, Tensor]:
    """Return slope = gelu'(h), empty unless `keep`, and a = gate gelu(h), written over h; both (e, k, f)."""
    slope = new_slope(h, keep)
    _activate_kernel[gate.numel(),](h, gate, slope, h.shape[-1], FORWARD=True, KEEP=keep, **_activation(h))
    return slope, h


def scale_(da: Tensor, slope: Tensor, gate: Tensor) -> Tensor:
    """Return dh = gate da slope, (e, k, f), written over da."""
    _activate_kernel[gate.numel(),](da, gate, slope, da.shape[-1], FORWARD=False, KEEP=False, **_activation(da))
    return da


def _activation(h: Tensor) -> dict:
    return wide(h) | approximate(h) | {"COLUMNS": 1024, "num_warps": 4}


def new_slope(h: Tensor, keep: bool) -> Tensor:
    """Return an empty tensor for the slopes of h: int8 if h has 16 bits; of size 0 unless `keep`."""
    shape, dtype = h.shape if keep else (0,), torch.int8 if h.element_size() == 2 else h.dtype
    return torch.empty(shape, dtype=dtype, device=h.device)


def approximate(x: Tensor) -> dict:
    """Return a kernel argument: whether to use the hardware's tanh, exact to 2^-11, as bf16 rounds to 2^-9 anyway."""
    return {"APPROXIMATE": x.dtype == torch.bfloat16 and not INTERPRETED}


@triton.jit
def gelu(h, APPROXIMATE: tl.constexpr):
    """Return GELU by tanh, h s(2u), and its derivative; u = (2/pi)^1/2 (h + 0.044715 h^3), s the logistic function."""
    square = h * h
    u = h * (0.7978845608028654 + 0.035677408136300125 * square)
    if APPROXIMATE:
        tanh = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [u], dtype=tl.float32, is_pure=True, pack=1)
        s = 0.5 + 0.5 * tanh
    else:
        s = 1 / (1 + tl.exp(-2 * u))
    value = h * s
    return value, s + (value - value * s) * (1.5957691216057308 + 0.21406444881780074 * square)


@triton.jit
def pack(slope, dtype: tl.constexpr):
    """Return a slope as it is stored: in int8, as steps of 1/200 above -27/200."""
    if dtype == tl.int8:  # 1.5 x 2^23 puts the integer into the last bits, faster than a conversion
        return (slope * 200 + 12582939.0).to(tl.int32, bitcast=True).to(tl.int8)
    else:
        return slope.to(dtype)


@triton.jit
def unpack(slope):
    """Undo `pack`."""
    if slope.dtype == tl.int8:
        return (((slope.to(tl.int32) & 255) | 0x4B000000).to(tl.float32, bitcast=True) - 8388635.0) * 0.005
    else:
        return slope


@kernel
def _gather_kernel(x, token, out, slots, n, d, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    slot = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    source = tl.load(token + slot, mask=slot < slots, other=n)
    inside = (column < d)[None, :]
    row = tl.load(x + source[:, None] * d + column[None, :], mask=(source < n)[:, None] & inside, other=0)
    tl.store(out + slot[:, None] * d + column[None, :], row, mask=(slot < slots)[:, None] & inside)


@kernel
def _gather_dot_kernel(
    dout, y, token, gate, dgate, slots, n, d, WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    slot = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    source = tl.load(token + slot, mask=slot < slots, other=n)
    g = tl.load(gate + slot, mask=slot < slots, other=0)
    total = tl.zeros((ROWS,), WIDE)
    for start in range(0, d, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = (column < d)[None, :]
        row = tl.load(dout + source[:, None] * d + column[None, :], mask=(source < n)[:, None] & inside, other=0)
        place = slot[:, None] * d + column[None, :]
        inside &= (slot < slots)[:, None]
        before = tl.load(y + place, mask=inside, other=0)
        tl.store(y + place, row, mask=inside)
        total += tl.sum(row.to(WIDE) * before.to(WIDE), 1)
    tl.store(dgate + slot, tl.where(g != 0, total / tl.where(g != 0, g, 1), 0), mask=slot < slots)


@kernel
def _invert_kernel(token, inverse, slots, n, e, k, BLOCK: tl.constexpr):
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    t = tl.load(token + slot, mask=slot < slots, other=n)
    tl.store(inverse + t * e + slot // k, slot, mask=t < n)


@kernel
def _combine_kernel(
    rows, inverse, out, slots, n, d, e,
    E: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    expert = tl.arange(0, E)
    held = (t < n)[:, None] & (expert < e)[None, :]
    left = tl.load(inverse + t[:, None] * e + expert[None, :], mask=held, other=slots)
    total = tl.zeros((ROWS, COLUMNS), WIDE)
    slot = tl.min(left, 1)
    while tl.min(slot, 0) < slots:  # two at a time: most tokens have one or two
        left = tl.where(left == slot[:, None], slots, left)
        second = tl.min(left, 1)
        left = tl.where(left == second[:, None], slots, left)
        place = slot.to(tl.int64)[:, None] * d + column[None, :]
        one = tl.load(rows + place, mask=(slot < slots)[:, None] & (column < d)[None, :], other=0)
        place = second.to(tl.int64)[:, None] * d + column[None, :]
        two = tl.load(rows + place, mask=(second < slots)[:, None] & (column < d)[None, :], other=0)
        total += one.to(WIDE)
        total += two.to(WIDE)
        slot = tl.min(left, 1)
    place = t[:, None] * d + column[None, :]
    inside = (t < n)[:, None] & (column < d)[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=inside)


@kernel
def _activate_kernel(
    h, gate, slope, f, FORWARD: tl.constexpr, KEEP: tl.constexpr,
    WIDE: tl.constexpr, APPROXIMATE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0).to(tl.int64)
    g = tl.load(gate + slot).to(WIDE)
    for start in range(0, f, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        place, inside = slot * f + column, column < f
        value = tl.load(h + place, mask=inside, other=0).to(WIDE)
        if FORWARD:
            value, steepness = gelu(value, APPROXIMATE)
            if KEEP:
                tl.store(slope + place, pack(steepness, slope.dtype.element_ty), mask=inside)
        else:
            value *= unpack(tl.load(slope + place, mask=inside, other=0))
        tl.store(h + place, (g * value).to(h.dtype.element_ty), mask=inside)
