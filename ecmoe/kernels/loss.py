"""The Triton kernels of ecmoe/model/cross_entropy.py: losses of a chunk of logits (a program per token); scaling."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ecmoe.kernels.common import cdiv, device_of, kernel

BLOCK, WARPS = 4096, 8


def losses_(z: Tensor, targets: Tensor, keep: bool) -> Tensor:
    """Return (m,) float32 losses of contiguous logits z, (m, V), and targets (m,); `keep`: z becomes their gradient."""
    m, V = z.shape
    losses = z.new_empty(m, dtype=torch.float32)
    if m:
        block = min(BLOCK, triton.next_power_of_2(V))
        with device_of(z):
            _losses_kernel[m,](z, targets.contiguous(), losses, V, KEEP=keep, BLOCK=block, num_warps=WARPS)
    return losses


def scaled(x: Tensor, factor: Tensor) -> Tensor:
    """Return x times `factor`, a tensor of one float32, rounded once."""
    x, out = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    with device_of(x):
        _scaled_kernel[cdiv(x.numel(), BLOCK),](x, factor, out, x.numel(), BLOCK=BLOCK, num_warps=WARPS)
    return out


@kernel
def _scaled_kernel(x, factor, out, size, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + place, mask=place < size, other=0).to(tl.float32) * tl.load(factor).to(tl.float32)
    tl.store(out + place, value.to(out.dtype.element_ty), mask=place < size)


@kernel
def _losses_kernel(z, targets, losses, V, KEEP: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    z += row * V
    target = tl.load(targets + row)
    # Load this before the sums, which synchronise all threads: afterwards, a thread may have overwritten it.
    # An invalid target, such as -100, makes the loss NaN instead of reading another token's logit.
    of_target = tl.load(z + target, mask=(target >= 0) & (target < V), other=float("nan")).to(tl.float32)
    highest, total = float("-inf"), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        value = tl.load(z + column, mask=column < V, other=float("-inf"), eviction_policy="evict_last").to(tl.float32)
        higher = tl.maximum(highest, tl.max(value, 0))
        total = total * tl.exp(highest - higher) + tl.exp(value - higher)
        highest = higher
    lse = highest + tl.log(tl.sum(total, 0))
    tl.store(losses + row, lse - of_target)
    if KEEP:
        for start in range(0, V, BLOCK):
            column = start + tl.arange(0, BLOCK)
            value = tl.load(z + column, mask=column < V, other=0, eviction_policy="evict_first").to(tl.float32)
            gradient = tl.exp(value - lse) - tl.where(column == target, 1.0, 0.0)
            tl.store(z + column, gradient.to(z.dtype.element_ty), mask=column < V)
