"""Compile every kernel for Hopper as its caller would launch it, without a GPU: `python tests/compile_kernels.py`.

Prints a row per kernel: registers, bytes of spilled registers, bytes of shared memory. TRITON_INTERPRET must be unset.
"""

import re
import subprocess
import tempfile
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

driver.set_active(
    SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )
)
compile_and_run, compiled = JITFunction.run, {}


def compile_only(self, *args, grid, warmup, **keys):
    kernel = compile_and_run(self, *args, grid=grid, warmup=True, **keys)
    compiled[kernel.hash] = kernel
    return kernel


JITFunction.run = compile_only
from ecmoe import kernels  # noqa: E402

kernels._check = lambda x: None
kernels.fusible = lambda a, w: a.dtype == torch.bfloat16
kernels._approximate = lambda x: {"APPROXIMATE": x.dtype == torch.bfloat16}


def launch(n, d, f, e, k, dtype):
    """Each kernel once, on tensors that nothing reads or writes."""
    wide = torch.promote_types(dtype, torch.float32)
    x, dy, h = (torch.empty(shape, dtype=dtype) for shape in ((n, d), (e, k, d), (e, k, f)))
    w1, w2 = torch.empty(e, d, f, dtype=dtype), torch.empty(e, f, d, dtype=dtype)
    token, gate = torch.empty(e, k, dtype=torch.long), torch.empty(e, k, dtype=wide)
    kernels.combine(kernels.gather(x, token), kernels.invert(token, n))
    kernels.activate_backward_(h, kernels.activate(h, gate), gate)
    if dtype == torch.bfloat16:
        for tile in kernels.TILES:
            kernels.product(dy, w1, gate, tile=tile)
            kernels.product_backward(dy, w2, h, gate, tile=tile)
        kernels.product(dy, w1, gate, keep=False)
    if dtype != torch.float64:
        w = torch.empty(d, e)
        torch.ops.ecmoe.logits_backward(kernels.logits(x, w), x, w)
        kernels.select(torch.empty(e, n), k)


if __name__ == "__main__":
    launch(512, 64, 512, 64, 256, torch.bfloat16)
    launch(2, 1, 1, 1, 1, torch.float32)  # ones become constants
    tool = triton.knobs.nvidia.cuobjdump.path
    for kernel in compiled.values():
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
        wgmma = kernel.asm["ptx"].count("wgmma.mma_async")
        print(f"{kernel.name:28} registers {registers:>3} spilled {stack:>4} shared {kernel.metadata.shared:>6} wgmma {wgmma}")
