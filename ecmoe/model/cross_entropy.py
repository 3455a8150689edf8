"""The output layer and its loss in one step: cross-entropy of x W^T without storing all logits.

At 65,536 tokens and a vocabulary of 32k, the logits take 4 GB in bf16, and 8 GB more in float32. But the loss is a sum
over tokens, so one chunk of them at a time is enough. Its gradient, softmax(z) - onehot, is known as soon as the logits
z are, up to the upstream gradient, a scalar. So all three products of a chunk run in the forward pass, and the backward
pass only scales dx and dW (Liger Kernel, Hsu et al. 2024; Cut Cross-Entropy, Wijmans et al. 2025):

    z = x W^T                       product
    loss += logsumexp(z) - z[target]     one pass over z, which overwrites
    z <- softmax(z) - onehot(target)     z with its gradient
    dx = z W,  dW += z^T x          products

Sums, exponentials and dW are float32 (float64 if x is); z is rounded to the dtype of x before and after that pass.
Letters: n tokens of width d, V vocabulary.
"""

import torch
from torch import Tensor

from ecmoe.routing.router import TRITON

CHUNK_BYTES = 1 << 30  # size of the logits of a chunk; more chunks would read and write dW more often


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return the mean of -log softmax(x weight^T)[target], in nats: a float32 scalar (float64 if x is).

    x: (..., d). weight: (V, d). targets: (...) int64 in 0..V - 1. Products use autocast's dtype if it is on. There are
    no second derivatives.
    """
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(kind))
    keep = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    loss, _, _ = _sum(x.reshape(-1, x.shape[-1]), weight, targets.reshape(-1), keep)
    return loss / targets.numel()


@torch.library.custom_op("ecmoe::linear_cross_entropy", mutates_args=())
def _sum(x: Tensor, weight: Tensor, targets: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sum of losses over (n, d) tokens, and its gradients for x and weight (empty unless `keep`)."""
    n, V, wide = len(x), len(weight), _wide(x)
    x, w = x.contiguous(), weight.to(x.dtype).contiguous()
    losses = x.new_empty(n, dtype=wide)
    dx = x.new_empty(x.shape if keep else 0)
    dw = weight.new_zeros(weight.shape if keep else 0, dtype=wide)
    chunks = max(-(-n * V * x.element_size() // CHUNK_BYTES), 1)
    rows = max(-(-n // chunks), 1)
    logits = x.new_empty(min(rows, n), V)  # reused by all chunks
    for start in range(0, n, rows):
        part = slice(start, start + rows)
        z = torch.mm(x[part], w.T, out=logits[: len(x[part])])
        losses[part] = losses_(z, targets[part], keep)
        if keep:
            torch.mm(z, w, out=dx[part])
            if z.is_cuda and z.dtype != wide:
                torch.addmm(dw, z.T, x[part], out_dtype=wide, out=dw)
            else:
                dw += z.T.to(wide) @ x[part].to(wide)
    return losses.sum(), dx, dw.to(weight.dtype)


@_sum.register_fake
def _(x, weight, targets, keep):
    kept = (x.shape, weight.shape) if keep else ((0,), (0,))
    return x.new_empty((), dtype=_wide(x)), x.new_empty(kept[0]), weight.new_empty(kept[1])


@torch.library.custom_op("ecmoe::linear_cross_entropy_backward", mutates_args=())
def _scaled(g: Tensor, factor: Tensor) -> Tensor:
    """Return g times factor, computed in float32: rounded to bf16, 1/n would be off by up to 2^-9 for all tokens."""
    if g.is_cuda and factor.dtype == torch.float32 and TRITON:
        from ecmoe.kernels.loss import scaled

        return scaled(g, factor)
    return (factor * g.to(factor.dtype)).to(g.dtype)


@_scaled.register_fake
def _(g, factor):
    return torch.empty_like(g, memory_format=torch.contiguous_format)


def _keep_for_backward(ctx, inputs, output):
    ctx.save_for_backward(*output[1:])


def _backward(ctx, dloss, *_):
    return *(_scaled(g, dloss) for g in ctx.saved_tensors), None, None


_sum.register_autograd(_backward, setup_context=_keep_for_backward)


def losses_(z: Tensor, targets: Tensor, keep: bool) -> Tensor:
    """Return the (m,) losses of (m, V) logits z and (m,) targets. With `keep`, overwrite z with its gradient."""
    if z.is_cuda and z.dtype != torch.float64 and TRITON:
        from ecmoe.kernels.loss import losses_  # reads and writes z once

        return losses_(z, targets, keep)
    log_p, at = z.to(_wide(z)).log_softmax(1), targets[:, None]
    losses = -log_p.gather(1, at)[:, 0]
    if keep:
        z.copy_(log_p.exp_().scatter_add_(1, at, -torch.ones_like(at, dtype=log_p.dtype)))
    return losses


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
