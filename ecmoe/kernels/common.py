"""Shared by all kernels: device checks, launches, custom operators, block sizes, and a matrix product."""

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

INTERPRETED: bool = triton.knobs.runtime.interpret  # runs on CPU tensors, without a GPU
_INTERPRETED = tl.constexpr(INTERPRETED)
_REAL = (Tensor, torch.nn.Parameter)  # not the types with which torch.compile traces
REMEMBERED = 4096  # most launches kept per kernel; causal routing has new sizes in every batch


def check(x: Tensor) -> None:
    """Raise a RuntimeError unless the kernels can run on x."""
    if not x.is_cuda and not INTERPRETED:
        raise RuntimeError(
            f"kernels='triton' needs tensors on a CUDA device, and these are on {x.device.type}: move the layer and "
            f"its input to a GPU, or use kernels='plain' (for tests without a GPU, set TRITON_INTERPRET=1)"
        )


class kernel:  # noqa: N801  lower case like triton.jit
    """`triton.jit` with launches that take less of the host's time.

    At every launch Triton inspects type, alignment and divisibility of all arguments to find the compiled binary, which
    takes longer than a small kernel runs. This class looks the binary up by the values of numbers and the types and
    alignments of tensors. A launch with a new value goes through Triton once.
    """

    def __init__(self, function: Callable) -> None:
        self.jit = triton.jit(function)
        self.known: dict[tuple, tuple[Any, tuple]] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return partial(self.launch, grid)

    def launch(self, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        """Launch on the current device, which must hold the tensors, and the current stream."""
        if INTERPRETED:
            self.jit[grid](*args, **constants)
            return
        device = torch.cuda.current_device()
        # The key holds all that Triton may specialise on: type and alignment of tensors, type and block of descriptors,
        # other values. Tensors are passed by address: for a tensor, Triton would ask the driver whether it is on a GPU.
        # One that isn't is never known, so Triton refuses it.
        key: list[Any] = [device, *constants.items()]
        values: list[Any] = []
        for arg in args:
            if type(arg) in _REAL:
                values.append(arg.data_ptr())
                key.append((arg.dtype, values[-1] & 15, arg.is_cuda))
            else:
                values.append(arg)
                key.append(getattr(arg, "kind", arg))
        known = self.known.get(tuple(key))
        if known is None:
            compiled = self.jit[grid](*args, **constants)
            if len(self.known) >= REMEMBERED:
                self.known.clear()
            rest = tuple(constants[name] for name in self.jit.arg_names[len(args) :])
            self.known[tuple(key)] = compiled.run, compiled.function, compiled.packed_metadata, rest
            return
        run, function, metadata, rest = known
        across, down, deep = (*grid, 1, 1)[:3]
        stream = torch._C._cuda_getCurrentRawStream(device)
        run(across, down, deep, stream, function, metadata, None, None, None, *values, *rest)


def described(base: Tensor, block: list[int]) -> TensorDescriptor:
    """Return a contiguous tensor's descriptor for the copy engine. Checks in `TensorDescriptor` would cost 10 us."""
    out = object.__new__(TensorDescriptor)
    vars(out).update(base=base, shape=base.shape, strides=base.stride(), block_shape=block, kind=(base.dtype, *block))
    return out


class Operator:
    """A function of tensors that torch.compile treats as one step.

    Without torch.compile the function is called directly, because a registered operator costs the host 0.1 to 0.5 ms
    per call. Gradients come from an autograd function around the operator, which torch.compile can trace.

    Args:
        function: function with annotated arguments, of which the first is a tensor.
        fake: function that returns tensors of the right shapes and types, for tensors without data.
    """

    def __init__(self, function: Callable, fake: Callable) -> None:
        registered = torch.library.custom_op(f"ecmoe::{function.__name__.strip('_')}", function, mutates_args=())
        registered.register_fake(fake)
        self.function, self.registered = function, registered._opoverload

    def __call__(self, *args: Any) -> Any:
        real = type(args[0]) in _REAL and not torch.compiler.is_compiling()
        return (self.function if real else self.registered)(*args)


def device_of(x: Tensor) -> contextlib.AbstractContextManager:
    """Return a context in which x's device is current; it does nothing if the device is already current, as usual."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device_of(x)


_HERE = contextlib.nullcontext()


def cdiv(a: int, b: int) -> int:
    """Return a / b rounded up; Triton's own function takes microseconds."""
    return -(-a // b)


def block(size: int, least: int = 1, most: int = 1 << 20) -> int:
    """Return the smallest power of two >= size, limited to least..most."""
    return min(max(1 << (size - 1).bit_length(), least), most)


def wide(x: Tensor) -> dict:
    """Return the type in which x is summed, as a kernel argument."""
    return {"WIDE": tl.float64 if x.dtype == torch.float64 else tl.float32}


@triton.jit
def dot(a, b, c):
    """Return c + a b, without TF32."""
    if _INTERPRETED:  # the interpreter would multiply bf16 bit patterns
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, c, input_precision="ieee")
