"""The optimiser of a run, its learning rate schedule, and gradient clipping."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ecmoe.config import RunConfig


def build_optimizer(config: RunConfig, parameters: Iterable[Tensor], device: torch.device) -> torch.optim.Optimizer:
    """Return AdamW, fused on a GPU, or Adafactor.

    PyTorch's Adafactor has no first moment (beta1 = 0, as in the paper); its second has the decay 1 - t^-0.8 at step t."""
    keys = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.optimizer == "adafactor":
        return torch.optim.Adafactor(parameters, **keys)
    # Not with a GradScaler, as gradients would be clipped while scaled.
    fused = (device.type == "cuda" and config.precision != "16-mixed") or None
    return torch.optim.AdamW(parameters, betas=(config.beta1, config.beta2), fused=fused, **keys)


def learning_rate_factor(config: RunConfig, step: int) -> float:
    """Return the learning rate at a step, from 0 on, as a fraction of the peak: a linear warm-up; then constant, or the
    paper's inverse square root after `constant_steps`, or a linear decay to 0 over the last `decay_fraction`."""
    done = step + 1
    warm = min(done / config.warmup_steps, 1.0) if config.warmup_steps else 1.0
    if config.schedule == "inverse_sqrt":
        return warm * math.sqrt(config.constant_steps / max(done, config.constant_steps))
    if config.schedule == "linear":
        length = max(config.decay_fraction * config.steps, 1.0)
        return warm * min((config.steps - step) / length, 1.0)
    return warm


def clip(parameters: Iterable[Tensor], optimizer: torch.optim.Optimizer, max_norm: float) -> None:
    """Scale gradients down to a norm of at most max_norm, like clip_grad_norm_. Call before every `optimizer.step()`.

    A fused optimiser scales the gradients itself when its next step reads them, which saves a pass over memory: it
    divides them by its attribute grad_scale, intended for GradScaler. The host doesn't wait for the device."""
    parameters = [p for p in parameters if p.grad is not None]
    if not optimizer.defaults.get("fused") or len({p.device for p in parameters}) != 1:
        torch.nn.utils.clip_grad_norm_(parameters, max_norm)
        return
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm  # combine the norms of all ranks' shards
    optimizer.grad_scale = ((norm.float() + 1e-6) / max_norm).clamp_min(1)  # 1 / clip_grad_norm_'s factor
