"""The router's products, in float32.

Letters: n tokens x of width d, e experts, w (d, e) the router's weight.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ecmoe.kernels.common import Operator, block, cdiv, check, device_of, dot, kernel

LOGITS = {"ROWS": 128, "DEPTH": 64, "num_warps": 8}
LOGITS_DX = {"ROWS": 64, "COLUMNS": 128, "num_warps": 4}
LOGITS_DW = {"ROWS": 32, "COLUMNS": 128, "num_warps": 4, "num_stages": 4}
SUM = {"BLOCK": 256, "AT_ONCE": 8, "num_warps": 4}
TOKENS_PER_SUM = 1024  # per partial sum of the router's gradient
MOST_EXPERTS = 128  # of the kernels: more would not fit into shared memory


def logits(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return (n, e) float32 x @ weight, to float32's precision, for x (n, d), weight (d, e); and x. If the caller uses
    the returned x, the two gradients of x are added in one pass.

    Tensor cores multiply bf16 numbers exactly and add them in float32. A float32 number enters as the sum of three bf16
    numbers (`_split`), so bf16 weights need a third of the products. float64, float16 and more than MOST_EXPERTS
    experts use the plain product.
    """
    if x.dtype not in (torch.bfloat16, torch.float32) or weight.shape[1] > MOST_EXPERTS:
        dtype = torch.promote_types(x.dtype, torch.float32)
        return x.to(dtype) @ weight.to(dtype), x
    check(x)
    return _Logits.apply(x, weight if weight.dtype == torch.bfloat16 else weight.float())


class _Logits(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return _logits_op(x, w), x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, dlogits, dx):
        return _logits_backward_op(dlogits, dx, *ctx.saved_tensors)


def _logits(x: Tensor, w: Tensor) -> Tensor:
    with device_of(x):
        return product(x.contiguous(), w.contiguous())


def product(x: Tensor, w: Tensor, inverse: Tensor | None = None, empty: int = 0) -> Tensor:
    """Return (n, e) logits of contiguous x (n, d), w (d, e). With `inverse`, (n, e) int32, return their softmax over
    experts instead, transposed to (e, n), and fill `inverse` with `empty`."""
    (n, d), e = x.shape, w.shape[1]
    out = x.new_empty((n, e) if inverse is None else (e, n), dtype=torch.float32)
    E = block(e, 16)
    depth = (
        LOGITS["DEPTH"] if w.dtype == torch.bfloat16 or E <= 64 else LOGITS["DEPTH"] // 2
    )  # the three parts of float32 need more room
    _logits_kernel[cdiv(n, LOGITS["ROWS"]),](x, w, out, inverse, empty, n, d, e, E=E, **LOGITS | {"DEPTH": depth})
    return out


def _logits_backward(dlogits: Tensor, dx: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    with device_of(x):
        return product_backward(dlogits.contiguous(), dx.contiguous(), x.contiguous(), w.contiguous())


def product_backward(dlogits: Tensor, dx: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Return dx + dlogits w^T and the gradient of w, summed in a fixed order; all tensors are contiguous."""
    (n, d), e = x.shape, w.shape[1]
    out, sums = torch.empty_like(x), cdiv(n, TOKENS_PER_SUM)
    dw = w.new_empty(sums, d, e, dtype=torch.float32)
    E = block(e, 16)
    grid = cdiv(n, LOGITS_DX["ROWS"]), cdiv(d, LOGITS_DX["COLUMNS"])
    _logits_dx_kernel[grid](dlogits, dx, w, out, n, d, e, E=E, **LOGITS_DX)
    grid = cdiv(d, LOGITS_DW["COLUMNS"]), sums
    # With more experts a stage needs more shared memory, and a program more registers.
    cut = LOGITS_DW if E <= 64 else LOGITS_DW | {"num_warps": 8, "num_stages": 3}
    _logits_dw_kernel[grid](x, dlogits, dw, n, d, e, ROUND=w.dtype == torch.bfloat16, E=E, TOKENS=TOKENS_PER_SUM, **cut)
    total = torch.empty_like(w)
    _sum_kernel[cdiv(d * e, SUM["BLOCK"]),](dw, total, sums, d * e, **SUM)
    return out, total


_logits_op = Operator(_logits, lambda x, w: x.new_empty(x.shape[0], w.shape[1], dtype=torch.float32))
_logits_backward_op = Operator(_logits_backward, lambda dlogits, dx, x, w: (x.new_empty(x.shape), w.new_empty(w.shape)))


@triton.jit
def _split(x):
    """Return three bf16 tensors whose sum is the float32 tensor x, exact except for the last bit."""
    high = x.to(tl.bfloat16)
    rest = x - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    return high, middle, (rest - middle.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def _multiply(a, w, total, ROUND: tl.constexpr):
    """Return total + a w to float32's precision, adding small terms first; a, w: bf16 or float32. ROUND: w to bf16."""
    if w.dtype == tl.bfloat16:
        high, middle, low = w, w, w
    else:
        high, middle, low = _split(w)
    EXACT: tl.constexpr = ROUND or w.dtype == tl.bfloat16
    if a.dtype == tl.bfloat16:
        if not EXACT:
            total = dot(a, low, total)
            total = dot(a, middle, total)
        return dot(a, high, total)
    else:
        a_high, a_middle, a_low = _split(a)
        total = dot(a_low, high, total)
        if not EXACT:
            total = dot(a_middle, middle, total)
            total = dot(a_high, low, total)
        total = dot(a_middle, high, total)
        if not EXACT:
            total = dot(a_high, middle, total)
        return dot(a_high, high, total)


@kernel
def _logits_kernel(
    x, w, out, inverse, empty, n, d, e,
    E: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    expert = tl.arange(0, E)
    total = tl.zeros((ROWS, E), tl.float32)
    for start in range(0, d, DEPTH):
        column = start + tl.arange(0, DEPTH)
        inside = (t < n)[:, None] & (column < d)[None, :]
        tokens = tl.load(x + t[:, None] * d + column[None, :], mask=inside, other=0)
        inside = (column < d)[:, None] & (expert < e)[None, :]
        weight = tl.load(w + column[:, None] * e + expert[None, :], mask=inside, other=0)
        total = _multiply(tokens, weight, total, False)
    inside = (t < n)[:, None] & (expert < e)[None, :]
    place = t[:, None] * e + expert[None, :]
    if inverse is not None:
        total = tl.where((expert < e)[None, :], total, float("-inf"))
        total = tl.exp(total - tl.max(total, 1)[:, None])
        total = total / tl.sum(total, 1)[:, None]
        tl.store(inverse + place, tl.zeros((ROWS, E), tl.int32) + empty, mask=inside)
        place = expert[None, :].to(tl.int64) * n + t[:, None]
    tl.store(out + place, total, mask=inside)


@kernel
def _logits_dx_kernel(
    dlogits, dx, w, out, n, d, e,
    E: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Compute dx + dlogits w^T."""
    t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column, expert = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, E)
    known = (t < n)[:, None] & (expert < e)[None, :]
    left = tl.load(dlogits + t[:, None] * e + expert[None, :], mask=known, other=0)
    inside = (column < d)[None, :] & (expert < e)[:, None]
    weight = tl.load(w + column[None, :] * e + expert[:, None], mask=inside, other=0)
    place = t[:, None] * d + column[None, :]
    ours = (t < n)[:, None] & (column < d)[None, :]
    other = tl.load(dx + place, mask=ours, other=0).to(tl.float32)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    if out.dtype.element_ty == tl.bfloat16:  # the sum is rounded as coarsely anyway
        total = dot(left.to(tl.bfloat16), weight.to(tl.bfloat16), total)
    else:
        total = _multiply(left, weight, total, False)
    tl.store(out + place, (total + other).to(out.dtype.element_ty), mask=ours)


@kernel
def _logits_dw_kernel(
    x, dlogits, dw, n, d, e,
    ROUND: tl.constexpr, E: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Compute x^T dlogits over TOKENS tokens. ROUND: round dlogits to bf16, because the gradient will be bf16."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.program_id(1).to(tl.int64) * TOKENS
    expert = tl.arange(0, E)
    total = tl.zeros((COLUMNS, E), tl.float32)
    for start in range(0, TOKENS, ROWS):
        t = first + start + tl.arange(0, ROWS)
        inside = (t < n)[:, None] & (column < d)[None, :]
        tokens = tl.load(x + t[:, None] * d + column[None, :], mask=inside, other=0)
        inside = (t < n)[:, None] & (expert < e)[None, :]
        gradient = tl.load(dlogits + t[:, None] * e + expert[None, :], mask=inside, other=0)
        total = _multiply(tokens.T, gradient, total, ROUND)
    inside = (column < d)[:, None] & (expert < e)[None, :]
    place = (tl.program_id(1).to(tl.int64) * d + column[:, None]) * e + expert[None, :]
    tl.store(dw + place, total, mask=inside)


@kernel
def _sum_kernel(parts, out, count, size, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr):
    """Add up `count` parts in their order; AT_ONCE of them are loaded together, as a load takes longer than all else."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, count, AT_ONCE):
        for i in tl.static_range(AT_ONCE):
            total += tl.load(parts + place, mask=(place < size) & (first + i < count), other=0)
            parts += size
    tl.store(out + place, total.to(out.dtype.element_ty), mask=place < size)
