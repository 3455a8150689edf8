"""RunningCutoff: the score that a token needs for an expert to take it, learned from training batches.

Expert choice compares tokens with each other; a token that is compared with a cut-off sees no other token.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ecmoe.routing.ranks import add_up


class RunningState(nn.Module):
    """A module whose buffers are never below float32: `module.to(bfloat16)` and Lightning's `bf16-true` only cast its
    parameters. A moving average in 16 bits would stand still, because its updates round to nothing.
    """

    def reset_parameters(self) -> None:
        """Set the buffers to their initial value, which is 0 unless a subclass sets others."""
        for buffer in self.buffers(recurse=False):
            buffer.zero_()

    @staticmethod
    def zeros(*shape: int) -> nn.Buffer:
        """Return a buffer for running statistics, at least in float32, whatever the default dtype."""
        return nn.Buffer(torch.zeros(shape, dtype=torch.promote_types(torch.get_default_dtype(), torch.float32)))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in self.named_buffers(recurse=False):
            if buffer.is_floating_point() and buffer.itemsize < min(4, before[name].itemsize):
                self._buffers[name] = before[name].to(buffer.device)
        return self


class RunningCutoff(RunningState):
    """(e,) cut-offs: the bias-corrected exponential moving average, over optimiser steps, of a step's mean k-th largest
    score over micro-batches, pools and ranks (Expert Threshold, arXiv 2603.11535).
    """

    def __init__(self, num_experts: int, beta: float) -> None:
        super().__init__()
        if not 0 <= beta < 1:
            raise ValueError(f"beta={beta}: must be at least 0 and below 1")
        self.beta = beta
        self.average = self.zeros(num_experts)
        self.weight = self.zeros()  # 1 - beta^t, the bias correction
        self.pending = self.zeros(num_experts)
        self.count = self.zeros()

    @torch.no_grad()
    def add(self, kth: Tensor, known: Tensor | None = None) -> None:
        """Add (pools, e) k-th largest scores; `known`, (pools,) bool, is False for pools with too few unmasked tokens."""
        if known is not None:
            kth = kth.where(known[:, None], 0.0)
        self.pending.add_(kth[0] if len(kth) == 1 else kth.sum(0))  # summing one pool would cost a pass
        self.count.add_(len(kth) if known is None else known.sum())

    @torch.no_grad()
    def end_step(self) -> Tensor:
        """Update the average; return a () bool, whether it moved: not without scores, or if a score is not finite."""
        add_up(self.pending, self.count)
        average, weight, moves = self._moved()
        self.average.copy_(average)
        self.weight.copy_(weight)
        self.pending.zero_()
        self.count.zero_()
        return moves

    def value(self) -> Tensor:
        """Return the (e,) cut-offs, as if a step ended now: scores added since the last step count."""
        average, weight, _ = self._moved()
        return average / weight

    def empty(self) -> bool:
        """Return whether no training batch has been seen yet."""
        return bool(self._moved()[1] == 0)

    def _moved(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return average and weight after the added scores, and whether these move them: a NaN would stay forever."""
        moves = (self.count > 0) & self.pending.isfinite().all()
        beta = torch.where(moves, self.beta, 1.0)
        mean = torch.where(moves, self.pending / self.count.clamp_min(1), 0.0)
        return beta * self.average + (1 - beta) * mean, beta * self.weight + (1 - beta), moves
