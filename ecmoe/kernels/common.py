"""What the kernels share: where they may run, sizes of blocks, a product that the interpreter gets right."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED: bool = triton.knobs.runtime.interpret  # on CPU tensors, without a GPU
_INTERPRETED = tl.constexpr(INTERPRETED)


def check(x: Tensor) -> None:
    """Raise a RuntimeError unless the kernels can run on x."""
    if x.device.type != "cuda" and not INTERPRETED:
        raise RuntimeError(
            f"kernels='triton' needs tensors on a CUDA device, and these are on {x.device.type}: move the layer and "
            f"its input to a GPU, or use kernels='plain' (for tests without a GPU, set TRITON_INTERPRET=1)"
        )


def block(size: int, least: int = 1, most: int = 1 << 20) -> int:
    """The next power of two within bounds."""
    return min(max(triton.next_power_of_2(size), least), most)


def wide(x: Tensor) -> dict:
    """The type that sums of x run in, as a kernel's argument."""
    return {"WIDE": tl.float64 if x.dtype == torch.float64 else tl.float32}


@triton.jit
def dot(a, b, c):
    """c + a b, without TF32."""
    if _INTERPRETED:  # it multiplies the bits of bf16 numbers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, c, input_precision="ieee")
