"""`experts`: Eq. 3 and 4 as one operator, forward and backward; the docstring of ecmoe.kernels lists its passes."""

from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ecmoe.kernels.common import Operator, check, device_of
from ecmoe.kernels.product import fusible, product, product_backward
from ecmoe.kernels.rows import activate_, combine, gather, gather_dot_, invert, new_slope, scale_


def experts(x: Tensor, w1: Tensor, w2: Tensor, token: Tensor, gate: Tensor, *, kernels: str = "triton") -> Tensor:
    """Compute Eq. 3 and 4, as `MoE.experts` does.

    Args:
        x: (n, d). w1: (e, d, f). w2: (e, f, d).
        token: (e, k) int64, n in an empty slot; no expert holds a token twice. gate: (e, k), 0 in an empty slot.
        kernels: who multiplies. "triton", "auto": Triton computes x_in w1 and dy w2^T, with the activation in the
            epilogue, and `torch.bmm` all else; "triton-bmm", or for sizes and types that the fused kernels don't
            support: `torch.bmm` alone, with separate passes; "cute": as "triton", but QuACK where it is faster.

    Returns:
        (n, d), in the dtype of x; under autocast, products run in autocast's dtype.

    Raises:
        RuntimeError: x is not on a CUDA device; or a second backward pass goes through the same forward pass, whose
            saved tensors the first one has overwritten.
    """
    check(x)
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    gate = gate.to(torch.promote_types(dtype, torch.float32))
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (x, w1, w2, gate))
    return _Experts.apply(x.to(dtype), w1, w2, token, gate, kernels, keep).to(x.dtype)


def experts_forward(
    x: Tensor, w1: Tensor, w2: Tensor, token: Tensor, gate: Tensor, inverse: Tensor | None, kernels: str, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return out, and tensors for the backward pass: inverse (n, e); x_in, slope, a, y (e, k, ...); w1, w2 in the dtype
    of x, empty if this is their own dtype. All but out are empty unless `keep`."""
    x, token, gate = x.contiguous(), token.contiguous(), gate.contiguous()
    with device_of(x):
        x_in, v1, v2 = gather(x, token), w1.to(x.dtype).contiguous(), w2.to(x.dtype).contiguous()
        fused = kernels != "triton-bmm" and fusible(x_in, v1)
        cute = _cute() if kernels == "cute" and fused else None
        if cute and not keep:
            slope, a = new_slope(x_in, False), cute.activated(x_in, v1, gate)
        elif fused:
            slope, a = product(x_in, v1, gate, keep=keep)
        else:
            slope, a = activate_(torch.bmm(x_in, v1), gate, keep)
        y = (cute.product if cute else _bmm)(a, v2)
        inverse = invert(token, x.shape[0]) if inverse is None else inverse
        out = combine(y, inverse)
    if not keep:
        inverse, x_in, a, y = inverse.new_empty(0), x.new_empty(0), x.new_empty(0), x.new_empty(0)
    if not keep or w1.dtype == x.dtype:
        v1, v2 = x.new_empty(0), x.new_empty(0)
    return out, inverse, x_in, slope, a, y, v1, v2


def _fake(x, w1, w2, token, gate, inverse, kernels, keep):
    (n, d), (e, k), f = x.shape, token.shape, w1.shape[2]
    h, y, kept = (
        x.new_empty((e, k, f) if keep else 0),
        x.new_empty((e, k, d) if keep else 0),
        keep and w1.dtype != x.dtype,
    )
    weights = [torch.empty_like(w, dtype=x.dtype) if kept else x.new_empty(0) for w in (w1, w2)]
    table = x.new_empty((n, e) if keep else 0, dtype=torch.int32)
    return torch.empty_like(x), table, y, new_slope(h, True), h, torch.empty_like(y), *weights


def experts_backward(
    dout: Tensor,
    w1: Tensor,
    w2: Tensor,
    token: Tensor,
    gate: Tensor,
    inverse: Tensor,
    x_in: Tensor,
    slope: Tensor,
    a: Tensor,
    y: Tensor,
    v1: Tensor,
    v2: Tensor,
    kernels: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, w1, w2 and gate; those of the weights have the weights' dtype.

    The results overwrite a and y, which nothing else needs: this saves a third of the memory. The operator doesn't
    declare this, because torch.compile would then copy a and y first; raised version counters make a second backward
    pass fail.
    """
    gate = gate.contiguous()
    if not v1.numel():
        v1, v2 = w1.contiguous(), w2.contiguous()
    with device_of(dout):
        dy, dgate = gather_dot_(dout.contiguous(), y, token.contiguous(), gate)
        fused = kernels != "triton-bmm" and fusible(dy, v2)
        multiply = _cute().product if kernels == "cute" and fused else _bmm
        dw2 = multiply(a.transpose(1, 2), dy, w2.dtype)
        if fused:
            dh = product_backward(dy, v2, slope, gate, out=a)
        else:
            dh = scale_(torch.bmm(dy, v2.transpose(1, 2), out=a), slope, gate)
        dw1 = multiply(x_in.transpose(1, 2), dh, w1.dtype)
        dx = combine(multiply(dh, v1.transpose(1, 2), out=y), inverse)
    torch.autograd.graph.increment_version([a, y])
    return dx, dw1, dw2, dgate


def _fake_backward(dout, w1, w2, token, gate, inverse, x_in, slope, a, y, v1, v2, kernels):
    return tuple(t.new_empty(t.shape) for t in (dout, w1, w2, gate))


def _bmm(a: Tensor, b: Tensor, dtype: torch.dtype | None = None, *, out: Tensor | None = None) -> Tensor:
    """Return a b in `dtype` (default: that of a), written to `out`, which has this dtype, if given; on CUDA, float32
    results aren't rounded to the dtype of a on the way."""
    if dtype in (None, a.dtype):
        return torch.bmm(a, b) if out is None else torch.bmm(a, b, out=out)
    if a.is_cuda and dtype == torch.float32:
        return torch.bmm(a, b, out_dtype=dtype)
    return torch.bmm(a, b).to(dtype)


def _cute() -> ModuleType:
    from ecmoe.kernels import cute  # QuACK is optional, and takes seconds to import

    return cute


_experts_op, _experts_backward_op = Operator(experts_forward, _fake), Operator(experts_backward, _fake_backward)


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w1, w2, token, gate, kernels, keep):
        out, *kept = _experts_op(x, w1, w2, token, gate, None, kernels, keep)
        ctx.kernels = kernels
        ctx.save_for_backward(w1, w2, token, gate, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        dx, dw1, dw2, dgate = _experts_backward_op(dout, *ctx.saved_tensors, ctx.kernels)
        return dx, dw1, dw2, None, dgate, None, None
