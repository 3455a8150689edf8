"""What the kernels share: where they may run, how they are launched and become operators, sizes of blocks, a product."""

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

INTERPRETED: bool = triton.knobs.runtime.interpret  # on CPU tensors, without a GPU
_INTERPRETED = tl.constexpr(INTERPRETED)
_REAL = (Tensor, torch.nn.Parameter)  # not what a compiler traces with
REMEMBERED = 4096  # launches of a kernel; causal routing has as many sizes as batches


def check(x: Tensor) -> None:
    """Raise a RuntimeError unless the kernels can run on x."""
    if not x.is_cuda and not INTERPRETED:
        raise RuntimeError(
            f"kernels='triton' needs tensors on a CUDA device, and these are on {x.device.type}: move the layer and "
            f"its input to a GPU, or use kernels='plain' (for tests without a GPU, set TRITON_INTERPRET=1)"
        )


class kernel:  # noqa: N801  it is used as triton.jit is
    """`triton.jit`, whose launches cost half of the host's time.

    Triton looks at type, alignment and divisibility of every argument of every launch, to find the binary compiled for
    such ones; that takes longer than a small kernel runs. Here the numbers themselves and the tensors' types and
    alignments are the key: one look-up. A number that differs goes through Triton, once.
    """

    def __init__(self, function: Callable) -> None:
        self.jit = triton.jit(function)
        self.known: dict[tuple, tuple[Any, tuple]] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return partial(self.launch, grid)

    def launch(self, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        """Launch on the current device and stream, where the tensors are."""
        if INTERPRETED:
            self.jit[grid](*args, **constants)
            return
        device = torch.cuda.current_device()
        # All that Triton could compile for: of tensors type and alignment, of descriptors type and block, numbers themselves.
        key = (device, *constants.items(), *[
            (a.dtype, a.data_ptr() & 15) if type(a) in _REAL else getattr(a, "kind", a) for a in args
        ])  # fmt: skip
        known = self.known.get(key)
        if known is None:
            compiled = self.jit[grid](*args, **constants)
            if len(self.known) >= REMEMBERED:
                self.known.clear()
            rest = tuple(constants[name] for name in self.jit.arg_names[len(args) :])
            self.known[key] = compiled.run, compiled.function, compiled.packed_metadata, rest
            return
        run, function, metadata, rest = known
        across, down, deep = (*grid, 1, 1)[:3]
        stream = torch._C._cuda_getCurrentRawStream(device)
        run(across, down, deep, stream, function, metadata, None, None, None, *args, *rest)


def described(base: Tensor, block: list[int]) -> TensorDescriptor:
    """A contiguous tensor for the copy engine, in blocks; `TensorDescriptor` checks what holds here, for 10 us."""
    out = object.__new__(TensorDescriptor)
    vars(out).update(base=base, shape=base.shape, strides=base.stride(), block_shape=block, kind=(base.dtype, *block))
    return out


class Operator:
    """A function of tensors that torch.compile takes for one step, with shapes that `fake` tells.

    Elsewhere it is just called, for a registered operator costs 0.1 to 0.5 ms of the host's time a call. Gradients are the
    business of an autograd function around it, which the compiler sees through.

    Args:
        function: with annotated arguments, the first of them a tensor.
        fake: the same, for tensors without numbers.
    """

    def __init__(self, function: Callable, fake: Callable) -> None:
        registered = torch.library.custom_op(f"ecmoe::{function.__name__.strip('_')}", function, mutates_args=())
        registered.register_fake(fake)
        self.function, self.registered = function, registered._opoverload

    def __call__(self, *args: Any) -> Any:
        real = type(args[0]) in _REAL and not torch.compiler.is_compiling()
        return (self.function if real else self.registered)(*args)


def device_of(x: Tensor) -> contextlib.AbstractContextManager:
    """Where x's kernels are launched; nothing to do where it is the current device, as it is almost always."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device_of(x)


_HERE = contextlib.nullcontext()


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up; Triton's takes microseconds."""
    return -(-a // b)


def block(size: int, least: int = 1, most: int = 1 << 20) -> int:
    """The next power of two within bounds."""
    return min(max(1 << (size - 1).bit_length(), least), most)


def wide(x: Tensor) -> dict:
    """The type that sums of x run in, as a kernel's argument."""
    return {"WIDE": tl.float64 if x.dtype == torch.float64 else tl.float32}


@triton.jit
def dot(a, b, c):
    """c + a b, without TF32."""
    if _INTERPRETED:  # it multiplies the bits of bf16 numbers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, c, input_precision="ieee")
