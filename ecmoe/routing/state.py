"""RunningState: a module whose running statistics stay in float32 when the model is cast to something narrower."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


class RunningState(nn.Module):
    """Its own floating buffers never fall below float32: `module.to(bfloat16)` and Lightning's `bf16-true` move them and
    cast the parameters only. A moving average in 16 bits stands still, as its steps round to nothing.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in self._buffers.items():
            if buffer is not None and buffer.is_floating_point() and buffer.itemsize < min(4, before[name].itemsize):  # type: ignore[union-attr]
                self._buffers[name] = before[name].to(buffer.device)  # type: ignore[union-attr]
        return self
