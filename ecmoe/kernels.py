"""The fast path of `MoE` on a GPU, in Triton: the six products, and as few passes around them as it takes.

Letters: n tokens x of width d, e experts of hidden width f, k slots of an expert, P (e k, n) of Eq. 3.

    forward                                   backward
    x_in = P x                  gather        dy = P dout                            gather
    h = x_in w1                 product       da = dy w2^T                           product
    a = gate gelu(h)            its epilogue  dh = gate da gelu'(h), dgate = da . gelu(h)   its epilogue
    y = a w2                    bmm           dw2 = a^T dy, dw1 = x_in^T dh, dx_in = dh w1^T   bmm
    out = P^T y                 combine       dx = P^T dx_in                         combine

The gate sits inside a, so the combine is a plain sum, and the gate's gradient needs no y. A token's sum goes
over its experts in their order, in float32, without atomics: the same input gives the same bits. h, a and x_in
stay for the backward pass. Shapes depend on no data and nothing waits for the device: CUDA graphs, torch.compile.

`experts`, `logits` and `select` each stand for one line of the plain path, which stays the readable truth
(moe.py, routing/); tests/test_kernels.py holds them to it, without a GPU in Triton's interpreter
(TRITON_INTERPRET=1). On a GPU: `pytest tests/test_kernels.py`, then `ecmoe bench --compile --passes --json layer.json`
times all of it. Block sizes below are first guesses for sm_90 that no GPU has seen.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

INTERPRETED: bool = triton.knobs.runtime.interpret  # on CPU tensors, without a GPU


class Tile(NamedTuple):
    """How a product is cut: blocks of m x n, k deep, whose epilogue takes `slice` columns at a time."""

    m: int
    n: int
    k: int
    slice: int
    warps: int
    stages: int
    per_sm: int  # programs on a multiprocessor: with two, one multiplies while the other is in its epilogue

    def options(self) -> dict:
        """What Triton's launcher takes."""
        registers = min(65_536 // (32 * self.warps * self.per_sm), 255)
        return {"num_warps": self.warps, "num_stages": self.stages, "maxnreg": registers}


# The first is taken; `ecmoe bench --passes` times all of them.
TILES = [
    Tile(128, 128, 64, 32, 8, 3, per_sm=2),
    Tile(128, 256, 64, 64, 8, 4, per_sm=1),
    Tile(256, 128, 64, 32, 8, 4, per_sm=1),
    Tile(128, 128, 64, 64, 8, 4, per_sm=1),
]
FORWARD = BACKWARD = TILES[0]
# Programs hold (rows, columns) at a time.
GATHER = {"ROWS": 16, "COLUMNS": 256, "num_warps": 4}
COMBINE = {"ROWS": 8, "COLUMNS": 256, "num_warps": 4}
ACTIVATION = {"ROWS": 4, "COLUMNS": 512, "num_warps": 4}
SELECT = {"BLOCK": 8192, "num_warps": 16}
LOGITS = {"ROWS": 128, "DEPTH": 32, "num_warps": 8}
LOGITS_DX = {"ROWS": 128, "COLUMNS": 128, "num_warps": 8}
LOGITS_DW = {"ROWS": 64, "COLUMNS": 128, "num_warps": 8}
TOKENS_PER_SUM = 2048  # of the partial sums of the router's gradient
MOST_EXPERTS = 128  # of `logits`: more would not fit into shared memory


def experts(
    x: Tensor, w1: Tensor, w2: Tensor, token: Tensor, gate: Tensor, *, fuse: bool = True
) -> Tensor:
    """Eq. 3 and 4, as `MoE.experts`.

    Args:
        x: (n, d). w1: (e, d, f). w2: (e, f, d).
        token: (e, k) int64, n in an empty slot; no expert holds a token twice. gate: (e, k), 0 in an empty slot.
        fuse: multiply x_in w1 and dy w2^T in Triton, with the activation in the epilogue; else, and for
            sizes or types that this can't do, by `torch.bmm` and a pass of its own.

    Returns:
        (n, d), in the dtype of x; products run in autocast's dtype where it is on.

    Raises:
        RuntimeError: x is on no CUDA device.
    """
    _check(x)
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    gate = gate.to(torch.promote_types(dtype, torch.float32))
    inputs = (x.to(dtype), w1.to(dtype), w2.to(dtype), gate)
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    return _experts(*inputs[:3], token, gate, fuse, keep)[0].to(x.dtype)


def logits(x: Tensor, weight: Tensor) -> Tensor:
    """(n, d) tokens, (d, e) weights -> (n, e) float32 x @ weight, to float32's precision.

    bf16 numbers multiply exactly in tensor cores and add up in float32; a float32 number goes in as the sum of
    three of them. float64 and float16 take the plain product.
    """
    if x.dtype not in (torch.bfloat16, torch.float32) or weight.shape[1] > MOST_EXPERTS:
        dtype = torch.promote_types(x.dtype, torch.float32)
        return x.to(dtype) @ weight.to(dtype)
    _check(x)
    return _logits(x, weight.float())


def select(scores: Tensor, k: int) -> Tensor:
    """(..., m) -> (..., k) int64: places of the k highest scores of each row, in rising order.

    Of equal scores the first are taken. No sort: the k-th score is found two bits at a time (radix select).
    Float32 only; others take `torch.topk`, whose order is another. No gradient: gather the scores.
    """
    scores = scores.detach()
    if scores.dtype != torch.float32:
        return scores.topk(k, dim=-1).indices
    _check(scores)
    if k == scores.shape[-1]:  # also a single score, on which Triton 3.6 fails
        return torch.arange(k, device=scores.device).expand(scores.shape).contiguous()
    rows = scores.reshape(-1, scores.shape[-1]).contiguous()
    return _select(rows, k).view(*scores.shape[:-1], k)


def _check(x: Tensor) -> None:
    if x.device.type != "cuda" and not INTERPRETED:
        raise RuntimeError(
            f"kernels='triton' needs tensors on a CUDA device, and these are on {x.device.type}: move the layer and "
            f"its input to a GPU, or use kernels='plain' (for tests without a GPU, set TRITON_INTERPRET=1)"
        )


# Operators: opaque to torch.compile, with shapes that it can know.


@torch.library.custom_op("ecmoe::experts", mutates_args=())
def _experts(
    x: Tensor, w1: Tensor, w2: Tensor, token: Tensor, gate: Tensor, fuse: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Out, and what the backward pass needs (empty unless `keep`): inverse (n, e), x_in, h, a (e, k, ...)."""
    n = x.shape[0]
    x, token, gate = x.contiguous(), token.contiguous(), gate.contiguous()
    with torch.cuda.device_of(x):
        x_in = gather(x, token)
        if fuse and fusible(x_in, w1):
            h, a = product(x_in, w1.contiguous(), gate, keep=keep)
        else:
            h = torch.bmm(x_in, w1)
            a = activate(h, gate)
        y = torch.bmm(a, w2)
        inverse = invert(token, n)
        out = combine(y, inverse)
    if not keep:
        inverse, x_in, h, a = inverse.new_empty(0), *(x.new_empty(0) for _ in range(3))
    return out, inverse, x_in, h, a


@_experts.register_fake
def _(x, w1, w2, token, gate, fuse, keep):
    (n, d), (e, k), f = x.shape, token.shape, w1.shape[2]
    kept = [(n, e), (e, k, d), (e, k, f), (e, k, f)] if keep else [(0,)] * 4
    inverse = x.new_empty(kept[0], dtype=torch.int32)
    return x.new_empty(n, d), inverse, *(x.new_empty(shape) for shape in kept[1:])


@torch.library.custom_op("ecmoe::experts_backward", mutates_args=())
def _experts_backward(
    dout: Tensor,
    w1: Tensor,
    w2: Tensor,
    token: Tensor,
    gate: Tensor,
    inverse: Tensor,
    x_in: Tensor,
    h: Tensor,
    a: Tensor,
    fuse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, w1, w2, gate."""
    gate = gate.contiguous()
    with torch.cuda.device_of(dout):
        dy = gather(dout.contiguous(), token.contiguous())
        if fuse and fusible(dy, w2):
            dh, dgate = product_backward(dy, w2.contiguous(), h, gate)
        else:
            dh = torch.bmm(dy, w2.transpose(1, 2))
            dgate = activate_backward_(dh, h, gate)
        dw2 = torch.bmm(a.transpose(1, 2), dy)
        del dy
        dw1 = torch.bmm(x_in.transpose(1, 2), dh)
        dx_in = torch.bmm(dh, w1.transpose(1, 2))
        del dh
        dx = combine(dx_in, inverse)
    return dx, dw1, dw2, dgate


@_experts_backward.register_fake
def _(dout, w1, w2, token, gate, inverse, x_in, h, a, fuse):
    return (
        dout.new_empty(dout.shape),
        w1.new_empty(w1.shape),
        w2.new_empty(w2.shape),
        gate.new_empty(gate.shape),
    )


def _keep_for_backward(ctx, inputs, output):
    _, w1, w2, token, gate, ctx.fuse, _ = inputs
    _, *kept = output
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)  # zeros the size of h, else
    ctx.save_for_backward(w1, w2, token, gate, *kept)


def _backward(ctx, dout, *_):
    if dout is None:
        return (None,) * 7
    dx, dw1, dw2, dgate = _experts_backward(dout, *ctx.saved_tensors, ctx.fuse)
    return dx, dw1, dw2, None, dgate, None, None


_experts.register_autograd(_backward, setup_context=_keep_for_backward)


@torch.library.custom_op("ecmoe::logits", mutates_args=())
def _logits(x: Tensor, w: Tensor) -> Tensor:
    (n, d), e = x.shape, w.shape[1]
    x, w = x.contiguous(), w.contiguous()
    out = x.new_empty(n, e, dtype=torch.float32)
    with torch.cuda.device_of(x):
        grid = (triton.cdiv(n, LOGITS["ROWS"]),)
        _logits_kernel[grid](x, w, out, n, d, e, E=_block(e, 16), **LOGITS)
    return out


@_logits.register_fake
def _(x, w):
    return x.new_empty(x.shape[0], w.shape[1], dtype=torch.float32)


@torch.library.custom_op("ecmoe::logits_backward", mutates_args=())
def _logits_backward(dlogits: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    (n, d), e = x.shape, w.shape[1]
    dlogits, x, w = dlogits.contiguous(), x.contiguous(), w.contiguous()
    dx, sums = torch.empty_like(x), triton.cdiv(n, TOKENS_PER_SUM)
    dw = w.new_empty(sums, d, e)  # summed in a fixed order
    with torch.cuda.device_of(x):
        grid = triton.cdiv(n, LOGITS_DX["ROWS"]), triton.cdiv(d, LOGITS_DX["COLUMNS"])
        _logits_dx_kernel[grid](dlogits, w, dx, n, d, e, E=_block(e, 16), **LOGITS_DX)
        grid = triton.cdiv(d, LOGITS_DW["COLUMNS"]), sums
        _logits_dw_kernel[grid](
            x, dlogits, dw, n, d, e, E=_block(e, 16), TOKENS=TOKENS_PER_SUM, **LOGITS_DW
        )
        return dx, dw.sum(0)


@_logits_backward.register_fake
def _(dlogits, x, w):
    return x.new_empty(x.shape), w.new_empty(w.shape)


_logits.register_autograd(
    lambda ctx, dlogits: _logits_backward(dlogits, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


@torch.library.custom_op("ecmoe::select", mutates_args=())
def _select(scores: Tensor, k: int) -> Tensor:
    rows, m = scores.shape
    out = scores.new_empty(rows, k, dtype=torch.int64)
    block = min(SELECT["BLOCK"], _block(m))
    with torch.cuda.device_of(scores):
        _select_kernel[rows,](scores, out, m, k, **SELECT | {"BLOCK": block})
    return out


@_select.register_fake
def _(scores, k):
    return scores.new_empty(scores.shape[0], k, dtype=torch.int64)


# Passes: one kernel each, on contiguous tensors.


def gather(x: Tensor, token: Tensor) -> Tensor:
    """P x: (n, d), (e, k) -> (e, k, d); zeros in empty slots."""
    (n, d), slots = x.shape, token.numel()
    out = x.new_empty(*token.shape, d)
    grid = triton.cdiv(slots, GATHER["ROWS"]), triton.cdiv(d, GATHER["COLUMNS"])
    _gather_kernel[grid](x, token, out, slots, n, d, **GATHER)
    return out


def invert(token: Tensor, n: int) -> Tensor:
    """(e, k) -> (n, e) int32: the slot in which expert i holds token t, in 0..e k - 1; e k where it doesn't."""
    (e, k), slots = token.shape, token.numel()
    inverse = torch.full((n, e), slots, dtype=torch.int32, device=token.device)
    _invert_kernel[triton.cdiv(slots, 1024),](token, inverse, slots, n, e, k, BLOCK=1024)
    return inverse


def combine(rows: Tensor, inverse: Tensor) -> Tensor:
    """P^T rows: (e, k, d), (n, e) -> (n, d): each token's slots added up, expert by expert."""
    (e, k, d), n = rows.shape, inverse.shape[0]
    out = rows.new_empty(n, d)
    grid = triton.cdiv(n, COMBINE["ROWS"]), triton.cdiv(d, COMBINE["COLUMNS"])
    _combine_kernel[grid](rows, inverse, out, e * k, n, d, e, E=_block(e, 2), **_wide(rows), **COMBINE)
    return out


def activate(h: Tensor, gate: Tensor) -> Tensor:
    """gate gelu(h): (e, k, f), (e, k) -> (e, k, f)."""
    a, slots = torch.empty_like(h), gate.numel()
    grid = (triton.cdiv(slots, ACTIVATION["ROWS"]),)
    _activate_kernel[grid](h, gate, a, slots, h.shape[-1], **_wide(h), **_approximate(h), **ACTIVATION)
    return a


def activate_backward_(da: Tensor, h: Tensor, gate: Tensor) -> Tensor:
    """da = dy w2^T becomes dh = gate da gelu'(h), in place; returns the gate's gradient, (e, k)."""
    dgate, slots = torch.empty_like(gate), gate.numel()
    grid = (triton.cdiv(slots, ACTIVATION["ROWS"]),)
    _activate_backward_kernel[grid](
        da, h, gate, dgate, slots, h.shape[-1], **_wide(h), **_approximate(h), **ACTIVATION
    )
    return dgate


def fusible(a: Tensor, w: Tensor) -> bool:
    """Can the fused products take these? 16 bits, and rows of whole 16 bytes for the copy engine."""
    narrow = a.dtype in (torch.bfloat16, torch.float16)
    if a.is_cuda and torch.cuda.get_device_capability(a.device)[0] < 9:
        return False
    whole = all(size * a.element_size() % 16 == 0 for size in w.shape[1:])
    return (narrow or INTERPRETED and a.dtype == torch.float32) and whole and a.numel() > 0


def product(
    x_in: Tensor, w1: Tensor, gate: Tensor, *, keep: bool = True, tile: Tile | None = None
) -> tuple[Tensor, Tensor]:
    """h = x_in w1 and a = gate gelu(h), both (e, k, f), in one kernel; h is empty unless `keep`."""
    t = tile or FORWARD
    (e, k, d), f = x_in.shape, w1.shape[2]
    a = x_in.new_empty(e, k, f)
    h = torch.empty_like(a) if keep else a.new_empty(0)
    _product_kernel[_programs(x_in, e, k, f, t),](
        TensorDescriptor.from_tensor(x_in, [1, t.m, t.k]),
        TensorDescriptor.from_tensor(w1, [1, t.k, t.n]),
        TensorDescriptor.from_tensor(h, [1, t.m, t.slice]) if keep else None,
        TensorDescriptor.from_tensor(a, [1, t.m, t.slice]),
        gate,
        e, k, COLUMNS=f, DEPTH=d,
        M=t.m, N=t.n, K=t.k, KEEP=keep, **_approximate(x_in), **t.options(),
    )  # fmt: skip
    return h, a


def product_backward(
    dy: Tensor, w2: Tensor, h: Tensor, gate: Tensor, *, tile: Tile | None = None
) -> tuple[Tensor, Tensor]:
    """dh = gate (dy w2^T) gelu'(h), (e, k, f), and the gate's gradient, (e, k), in one kernel."""
    t = tile or BACKWARD
    (e, k, d), f = dy.shape, w2.shape[1]
    dh = torch.empty_like(h)
    parts = gate.new_empty(e, k, triton.cdiv(f, t.n))  # of the sum over f; added in a fixed order
    _product_backward_kernel[_programs(dy, e, k, f, t),](
        TensorDescriptor.from_tensor(dy, [1, t.m, t.k]),
        TensorDescriptor.from_tensor(w2, [1, t.n, t.k]),
        TensorDescriptor.from_tensor(h, [1, t.m, t.slice]),
        TensorDescriptor.from_tensor(dh, [1, t.m, t.slice]),
        gate,
        parts,
        e, k, COLUMNS=f, DEPTH=d,
        M=t.m, N=t.n, K=t.k, **_approximate(dy), **t.options(),
    )  # fmt: skip
    return dh, parts.sum(-1)


def _block(size: int, least: int = 1) -> int:
    return max(triton.next_power_of_2(size), least)


def _wide(x: Tensor) -> dict:
    return {"WIDE": tl.float64 if x.dtype == torch.float64 else tl.float32}


def _approximate(x: Tensor) -> dict:
    """The hardware's tanh, good to 2^-11, where the result is rounded to bf16's 2^-9 anyway."""
    return {"APPROXIMATE": x.dtype == torch.bfloat16 and not INTERPRETED}


def _programs(x: Tensor, e: int, rows: int, columns: int, t: Tile) -> int:
    tiles = e * triton.cdiv(rows, t.m) * triton.cdiv(columns, t.n)
    return min(tiles, t.per_sm * (_multiprocessors(x.device.index) if x.is_cuda else 2))


@lru_cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


# Kernels. Rows are counted in int64: e k f passes 2^31.

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def _dot(a, b, c):
    if _INTERPRETED:  # it multiplies the bits of bf16 numbers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, c, input_precision="ieee")


@triton.jit
def _gelu(h, APPROXIMATE: tl.constexpr):
    """GELU by tanh, and its derivative: h s(2u), u = (2/pi)^1/2 (h + 0.044715 h^3), s the logistic function."""
    u = h * (0.7978845608028654 + 0.035677408136300125 * h * h)
    if APPROXIMATE:
        tanh = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [u], dtype=tl.float32, is_pure=True, pack=1
        )
        s = 0.5 + 0.5 * tanh
    else:
        s = 1 / (1 + tl.exp(-2 * u))
    slope = 2 * (0.7978845608028654 + 0.10703222440890037 * h * h)
    return h * s, s + h * s * (1 - s) * slope


@triton.jit
def _gather_kernel(x, token, out, slots, n, d, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    slot = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    source = tl.load(token + slot, mask=slot < slots, other=n)
    inside = (column < d)[None, :]
    row = tl.load(x + source[:, None] * d + column[None, :], mask=(source < n)[:, None] & inside, other=0)
    tl.store(out + slot[:, None] * d + column[None, :], row, mask=(slot < slots)[:, None] & inside)


@triton.jit
def _invert_kernel(token, inverse, slots, n, e, k, BLOCK: tl.constexpr):
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    t = tl.load(token + slot, mask=slot < slots, other=n)
    tl.store(inverse + t * e + slot // k, slot, mask=t < n)


@triton.jit
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


@triton.jit
def _activate_kernel(
    h, gate, a, slots, f,
    WIDE: tl.constexpr, APPROXIMATE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    g = tl.load(gate + slot, mask=slot < slots, other=0).to(WIDE)
    for start in range(0, f, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        place = slot[:, None] * f + column[None, :]
        inside = (slot < slots)[:, None] & (column < f)[None, :]
        value, _ = _gelu(tl.load(h + place, mask=inside, other=0).to(WIDE), APPROXIMATE)
        tl.store(a + place, (g[:, None] * value).to(a.dtype.element_ty), mask=inside)


@triton.jit
def _activate_backward_kernel(
    da, h, gate, dgate, slots, f,
    WIDE: tl.constexpr, APPROXIMATE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    g = tl.load(gate + slot, mask=slot < slots, other=0).to(WIDE)
    total = tl.zeros((ROWS, COLUMNS), WIDE)
    for start in range(0, f, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        place = slot[:, None] * f + column[None, :]
        inside = (slot < slots)[:, None] & (column < f)[None, :]
        value, slope = _gelu(tl.load(h + place, mask=inside, other=0).to(WIDE), APPROXIMATE)
        gradient = tl.load(da + place, mask=inside, other=0).to(WIDE)
        total += gradient * value
        tl.store(da + place, (g[:, None] * gradient * slope).to(da.dtype.element_ty), mask=inside)
    tl.store(dgate + slot, tl.sum(total, 1), mask=slot < slots)


@triton.jit
def _tile(tile, rows, COLUMNS: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """Tiles of an expert follow each other, down and then across: its operands stay in the cache."""
    down = tl.cdiv(rows, M)
    inside = tile % (down * tl.cdiv(COLUMNS, N))
    return tile // (down * tl.cdiv(COLUMNS, N)), inside % down, inside // down


@triton.jit
def _halves(total):
    """Left and right columns."""
    return total.reshape(total.shape[0], 2, total.shape[1] // 2).permute(0, 2, 1).split()


@triton.jit
def _product_kernel(
    x, w, h, a, gate, e, rows, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, KEEP: tl.constexpr, APPROXIMATE: tl.constexpr,
):  # fmt: skip
    tiles = e * tl.cdiv(rows, M) * tl.cdiv(COLUMNS, N)
    # Flattened: the next tile's operands load while this one's epilogue runs.
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        expert, m, n = _tile(tile, rows, COLUMNS, M, N)
        total = tl.zeros((M, N), tl.float32)
        for i in range(tl.cdiv(DEPTH, K)):
            left = x.load([expert, m * M, i * K]).reshape(M, K)
            right = w.load([expert, i * K, n * N]).reshape(K, N)
            total = _dot(left, right, total)
        row = m * M + tl.arange(0, M)
        g = tl.load(gate + expert.to(tl.int64) * rows + row, mask=row < rows, other=0)
        _activate(h, a, total, g, expert, m * M, n * N, KEEP, APPROXIMATE)


@triton.jit
def _activate(
    h, a, total, g, expert, m, n, KEEP: tl.constexpr, APPROXIMATE: tl.constexpr
):
    if total.shape[1] > a.block_shape[2]:  # slices need less shared memory, which is the pipeline's
        left, right = _halves(total)
        _activate(h, a, left, g, expert, m, n, KEEP, APPROXIMATE)
        _activate(h, a, right, g, expert, m, n + left.shape[1], KEEP, APPROXIMATE)
    else:
        if KEEP:
            h.store([expert, m, n], total.to(h.dtype)[None])
        value, _ = _gelu(total, APPROXIMATE)
        a.store([expert, m, n], (g[:, None] * value).to(a.dtype)[None])


@triton.jit
def _product_backward_kernel(
    dy, w, h, dh, gate, parts, e, rows, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, APPROXIMATE: tl.constexpr,
):  # fmt: skip
    across: tl.constexpr = tl.cdiv(COLUMNS, N)
    for tile in tl.range(tl.program_id(0), e * tl.cdiv(rows, M) * across, tl.num_programs(0), flatten=True):
        expert, m, n = _tile(tile, rows, COLUMNS, M, N)
        total = tl.zeros((M, N), tl.float32)
        for i in range(tl.cdiv(DEPTH, K)):
            left = dy.load([expert, m * M, i * K]).reshape(M, K)
            right = w.load([expert, n * N, i * K]).reshape(N, K)
            total = _dot(left, right.T, total)
        row = m * M + tl.arange(0, M)
        place = expert.to(tl.int64) * rows + row
        g = tl.load(gate + place, mask=row < rows, other=0)
        part = _activate_backward(h, dh, total, g, expert, m * M, n * N, APPROXIMATE)
        tl.store(parts + place * across + n, part, mask=row < rows)


@triton.jit
def _activate_backward(h, dh, total, g, expert, m, n, APPROXIMATE: tl.constexpr):
    if total.shape[1] > dh.block_shape[2]:
        left, right = _halves(total)
        part = _activate_backward(h, dh, left, g, expert, m, n, APPROXIMATE)
        part += _activate_backward(h, dh, right, g, expert, m, n + left.shape[1], APPROXIMATE)
    else:
        before = h.load([expert, m, n]).reshape(total.shape).to(tl.float32)
        value, slope = _gelu(before, APPROXIMATE)
        dh.store([expert, m, n], (g[:, None] * total * slope).to(dh.dtype)[None])
        part = tl.sum(total * value, 1)
    return part


@triton.jit
def _keys(scores, place, m):
    """Scores as int32 that order as they do; the least where there is none. -0 is 0, and NaN the largest."""
    bits = tl.load(scores + place, mask=place < m, other=0).to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    bits = tl.where(size == 0, 0, tl.where(size > 0x7F800000, 0x7FFFFFFF, bits))
    return tl.where(place < m, bits ^ ((bits >> 31) & 0x7FFFFFFF), -0x80000000)


@triton.jit
def _select_kernel(scores, out, m, k, BLOCK: tl.constexpr):
    """A program a row. The k-th key lies in low..last: at least k keys are >= low, `above` < k are > last."""
    scores += tl.program_id(0).to(tl.int64) * m
    out += tl.program_id(0).to(tl.int64) * k
    offset = tl.arange(0, BLOCK)
    low = tl.full((), -0x80000000, tl.int32)
    last = tl.full((), 0x7FFFFFFF, tl.int32)
    above = tl.full((), 0, tl.int32)
    count = above + m
    shift = above + 30
    while (shift >= 0) & (count > k):  # once exactly k are >= low, the other bits don't matter
        step = tl.full((), 1, tl.int32) << shift
        one, two, three = low + step, low + 2 * step, low + 3 * step
        ones = tl.zeros((BLOCK,), tl.int32)
        twos = tl.zeros((BLOCK,), tl.int32)
        threes = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, m, BLOCK):
            key = _keys(scores, start + offset, m)
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
    written = tl.full((), 0, tl.int32)
    equal = tl.full((), 0, tl.int32)
    for start in range(0, m, BLOCK):
        place = start + offset
        key = _keys(scores, place, m)
        between = ((key >= low) & (key <= last) & (place < m)).to(tl.int32)
        rank = equal + tl.cumsum(between) - between
        taken = ((key > last) | ((between > 0) & (rank < k - above))) & (place < m)
        taken = taken.to(tl.int32)
        target = written + tl.cumsum(taken) - taken
        tl.store(out + target, place.to(tl.int64), mask=taken > 0)
        written += tl.sum(taken)
        equal += tl.sum(between)


@triton.jit
def _split(x):
    """A float32 tensor as the sum of three bf16 ones, exact but for the last bit."""
    high = x.to(tl.bfloat16)
    rest = x - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    return high, middle, (rest - middle.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def _multiply(a, b, total):
    """total + a b to float32's precision, small terms first; a in bf16 or float32, b in float32."""
    high, middle, low = _split(b)
    if a.dtype == tl.bfloat16:
        total = _dot(a, low, total)
        total = _dot(a, middle, total)
        return _dot(a, high, total)
    else:
        a_high, a_middle, a_low = _split(a)
        total = _dot(a_low, high, total)
        total = _dot(a_middle, middle, total)
        total = _dot(a_high, low, total)
        total = _dot(a_middle, high, total)
        total = _dot(a_high, middle, total)
        return _dot(a_high, high, total)


@triton.jit
def _logits_kernel(
    x, w, out, n, d, e, E: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr
):
    t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    expert = tl.arange(0, E)
    total = tl.zeros((ROWS, E), tl.float32)
    for start in range(0, d, DEPTH):
        column = start + tl.arange(0, DEPTH)
        inside = (t < n)[:, None] & (column < d)[None, :]
        tokens = tl.load(x + t[:, None] * d + column[None, :], mask=inside, other=0)
        inside = (column < d)[:, None] & (expert < e)[None, :]
        weights = tl.load(w + column[:, None] * e + expert[None, :], mask=inside, other=0)
        total = _multiply(tokens, weights, total)
    inside = (t < n)[:, None] & (expert < e)[None, :]
    tl.store(out + t[:, None] * e + expert[None, :], total, mask=inside)


@triton.jit
def _logits_dx_kernel(
    dlogits, w, dx, n, d, e, E: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """dlogits w^T."""
    t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    expert = tl.arange(0, E)
    inside = (t < n)[:, None] & (expert < e)[None, :]
    left = tl.load(dlogits + t[:, None] * e + expert[None, :], mask=inside, other=0)
    inside = (column < d)[None, :] & (expert < e)[:, None]
    right = tl.load(w + column[None, :] * e + expert[:, None], mask=inside, other=0)
    total = _multiply(left, right, tl.zeros((ROWS, COLUMNS), tl.float32))
    inside = (t < n)[:, None] & (column < d)[None, :]
    tl.store(dx + t[:, None] * d + column[None, :], total.to(dx.dtype.element_ty), mask=inside)


@triton.jit
def _logits_dw_kernel(
    x, dlogits, dw, n, d, e,
    E: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """x^T dlogits over TOKENS tokens."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.program_id(1).to(tl.int64) * TOKENS
    expert = tl.arange(0, E)
    total = tl.zeros((COLUMNS, E), tl.float32)
    for start in range(0, TOKENS, ROWS):
        t = first + start + tl.arange(0, ROWS)
        inside = (t < n)[None, :] & (column < d)[:, None]
        tokens = tl.load(x + t[None, :] * d + column[:, None], mask=inside, other=0)  # transposed
        inside = (t < n)[:, None] & (expert < e)[None, :]
        gradient = tl.load(dlogits + t[:, None] * e + expert[None, :], mask=inside, other=0)
        total = _multiply(tokens, gradient, total)
    inside = (column < d)[:, None] & (expert < e)[None, :]
    place = (tl.program_id(1).to(tl.int64) * d + column[:, None]) * e + expert[None, :]
    tl.store(dw + place, total, mask=inside)
