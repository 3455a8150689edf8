"""Compile every kernel for Hopper as its caller would launch it, without a GPU: `python tests/kernels/compile_kernels.py`.

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

from ecmoe.kernels.common import kernel

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
kernel.launch = lambda self, grid, *args, **constants: self.jit[grid](*args, **constants)  # nothing was launched
from ecmoe.kernels import (  # noqa: E402
    attention,
    capped,
    choice,
    loss,
    product,
    routing,
    rows,
    selection,
)

for part in (routing, selection, choice):
    part.check = lambda x: None
for part in (product, rows):
    part.approximate = lambda x: {"APPROXIMATE": x.dtype == torch.bfloat16}


def launch(n, d, f, e, k, dtype):
    """Each kernel once, on tensors that nothing reads or writes."""
    wide = torch.promote_types(dtype, torch.float32)
    x, dy, h = (torch.empty(shape, dtype=dtype) for shape in ((n, d), (e, k, d), (e, k, f)))
    w1, w2 = torch.empty(e, d, f, dtype=dtype), torch.empty(e, f, d, dtype=dtype)
    token, gate = torch.empty(e, k, dtype=torch.long), torch.empty(e, k, dtype=wide)
    rows.combine(rows.gather(x, token), rows.invert(token, n))
    rows.gather_dot_(x, dy, token, gate)
    rows.scale_(h, rows.activate_(h, gate)[0], gate)
    if dtype == torch.bfloat16:
        product.product(dy, w1, gate)
        product.product_backward(dy, w2, rows.new_slope(h, True), gate)
        product.product(dy, w1, gate, keep=False)
        deep = torch.empty(e, k, 2048, dtype=dtype)
        product.product(deep, torch.empty(e, 2048, f, dtype=dtype), gate)
        product.product_backward(deep, torch.empty(e, f, 2048, dtype=dtype), rows.new_slope(h, True), gate)
    if dtype != torch.float64:
        w, logits = torch.empty(d, e), torch.empty(n, e)
        for weight in (w, w.bfloat16()):
            torch.ops.ecmoe.logits(x, weight)
            torch.ops.ecmoe.logits_backward(logits, x, x, weight)
        most = routing.MOST_EXPERTS
        torch.ops.ecmoe.logits_backward(torch.empty(n, most), x, x, torch.empty(d, most))
        selection.select(logits.T, k)
        selection.select(torch.empty(1, 3 * selection.SAMPLE), k)
        whole = [t.clone().requires_grad_() for t in (x, w, w1, w2)]
        seen = [torch.empty(size, dtype=torch.long) for size in (e, e, 1, 9)]
        for scale in (1.0, None):
            out = choice.expert_choice(
                *whole, k, scale=scale, cutoff=(torch.empty(e), torch.empty(())), statistics=seen
            )
            out.sum().backward()


def launch_attention(width):
    qkv, out = (
        torch.empty(2, 1024, 3, 12, width, dtype=torch.bfloat16),
        torch.empty(2, 1024, 12, width, dtype=torch.bfloat16),
    )
    table, lse = torch.empty(12, 1024), torch.empty(2, 12, 1024)
    attention.forward(qkv, table, 114)
    attention.backward(out, qkv, out, lse, table, 114)


def launch_capped(n, e, k):
    for S, b in ((torch.empty(1, e, n), 2), (torch.empty(1, n, e).transpose(1, 2), 3)):  # by expert, by token
        capped.places(capped.hold(S, k, b), k)


def show():
    """A row for each kernel launched so far."""
    tool = triton.knobs.nvidia.cuobjdump.path
    for one in compiled.values():
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(one.asm["cubin"])
            file.flush()
            usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
        wgmma = one.asm["ptx"].count("wgmma.mma_async")
        print(
            f"{one.name:28} registers {registers:>3} spilled {stack:>4} shared {one.metadata.shared:>6} wgmma {wgmma}"
        )


if __name__ == "__main__":
    launch(512, 64, 512, 64, 256, torch.bfloat16)
    launch(2, 1, 1, 1, 1, torch.float32)  # ones become constants
    for width in (64, 128):
        launch_attention(width)
    launch_capped(65_536, 64, 2048)
    for keep in (True, False):
        loss.scaled(torch.empty(64, 768, dtype=torch.bfloat16), torch.empty(()))
        loss.losses_(torch.empty(64, 32_000, dtype=torch.bfloat16), torch.empty(64, dtype=torch.long), keep)
    show()
