"""AdamW, one pass over each tensor: at the memory's speed, where torch's fused step reaches two thirds of it."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ecmoe.kernels.common import check

UPDATE = {"BLOCK": 2048, "num_warps": 8}


class AdamW(torch.optim.AdamW):
    """`torch.optim.AdamW` on CUDA tensors, with its state and its numbers.

    Gradients are divided by the attribute `grad_scale`, a tensor of one float32, as they are read, if it is set: as
    torch's fused step does, which saves whoever clips them a pass.

    Args:
        params, lr, betas, eps, weight_decay: as torch has them; parameters are contiguous.

    Raises:
        ValueError: in the first step, a parameter that isn't contiguous.
    """

    grad_scale: Tensor | None = None
    _step_supports_amp_scaling = True  # what torch and Lightning ask for

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
