"""AdamW and the norm that clips: one pass over each tensor, at the memory's speed; torch's reach half to three quarters of it."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ecmoe.kernels.common import check

UPDATE = {"BLOCK": 2048, "num_warps": 8}
SQUARES = {"BLOCK": 2048, "STEPS": 4, "num_warps": 8}


class AdamW(torch.optim.AdamW):
    """`torch.optim.AdamW` on CUDA tensors, with its state and its numbers.

    `clip` is `torch.nn.utils.clip_grad_norm_` for the next step, which divides gradients by `grad_scale` as it reads them.

    Args:
        params, lr, betas, eps, weight_decay: as torch has them; parameters are contiguous.

    Raises:
        ValueError: in the first step, a parameter that isn't contiguous.
    """

    grad_scale: Tensor | None = None

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, foreach=False)

    @torch.no_grad()
    def clip(self, max_norm: float) -> None:
        """Let the next step take gradients of a norm of at most max_norm. Nothing waits for the device."""
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if gradients:
            share = (norm(gradients) + 1e-6) / max_norm  # clip_grad_norm_'s factor, upside down
            self.grad_scale = share.clamp_min(1)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step; the loss that `closure` gives, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    if not p.is_contiguous():
                        raise ValueError(
                            f"a parameter of shape {tuple(p.shape)} has strides {p.stride()}: must be contiguous"
                        )
                    state["step"] = torch.zeros(())
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                state["step"] += 1  # on the CPU: no one waits for the device
                t = state["step"].item()
                update(
                    p, p.grad, state["exp_avg"], state["exp_avg_sq"], self.grad_scale,
                    decay=float(1 - group["lr"] * group["weight_decay"]), rate=float(group["lr"] / (1 - beta1**t)),
                    beta1=beta1, beta2=beta2, eps=group["eps"], correction=(1 - beta2**t) ** -0.5,
                )  # fmt: skip
        return loss


def norm(tensors: list[Tensor]) -> Tensor:
    """() float32: the norm of all their numbers together, summed in a fixed order."""
    size = SQUARES["BLOCK"] * SQUARES["STEPS"]
    ends = list(accumulate(triton.cdiv(t.numel(), size) for t in tensors))
    parts = torch.empty(ends[-1], dtype=torch.float32, device=tensors[0].device)
    for t, start, end in zip(tensors, [0, *ends], ends, strict=False):
        check(t)
        with torch.cuda.device_of(t):
            _squares_kernel[end - start,](t.contiguous(), parts[start:], t.numel(), **SQUARES)
    return parts.sum().sqrt()


def update(
    p: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, scale: Tensor | None = None, *,
    decay: float, rate: float, beta1: float, beta2: float, eps: float, correction: float,
) -> None:  # fmt: skip
    """Decoupled weight decay (Loshchilov and Hutter 2019, algorithm 2) of a contiguous tensor, in place.

    Args:
        decay: what p is multiplied with first. rate, correction: the learning rate and the root of the second moment,
            each with its bias corrected.
    """
    check(p)
    gradient = gradient.contiguous()
    with torch.cuda.device_of(p):
        _adamw_kernel[triton.cdiv(p.numel(), UPDATE["BLOCK"]),](
            p, gradient, mean, square, scale, p.numel(),
            decay, rate, beta1, beta2, eps, correction, SCALED=scale is not None, **UPDATE,
        )  # fmt: skip


@triton.jit
def _squares_kernel(x, parts, size, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float32)
    first = tl.program_id(0).to(tl.int64) * BLOCK * STEPS
    for step in tl.static_range(STEPS):  # so that all loads are under way at once
        place = first + step * BLOCK + tl.arange(0, BLOCK)
        number = tl.load(x + place, mask=place < size, other=0).to(tl.float32)
        total += number * number
    tl.store(parts + tl.program_id(0), tl.sum(total))


@triton.jit
def _adamw_kernel(
    p, gradient, mean, square, scale, size, decay, rate, beta1, beta2, eps, correction,
    SCALED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    g = tl.load(gradient + place, mask=inside, other=0).to(tl.float32)
    if SCALED:
        g = g / tl.load(scale)
    m = tl.load(mean + place, mask=inside, other=0).to(tl.float32)
    v = tl.load(square + place, mask=inside, other=0).to(tl.float32)
    w = tl.load(p + place, mask=inside, other=0).to(tl.float32)
    m += (1 - beta1) * (g - m)
    v += (1 - beta2) * (g * g - v)
    w = decay * w - rate * m / (tl.sqrt(v) * correction + eps)
    tl.store(mean + place, m.to(mean.dtype.element_ty), mask=inside)
    tl.store(square + place, v.to(square.dtype.element_ty), mask=inside)
    tl.store(p + place, w.to(p.dtype.element_ty), mask=inside)
