"""What the interpreter can't know: types, layouts, shared memory, tensor cores. No GPU is needed."""

import os
import pkgutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

from ecmoe import kernels

NAMES = [part.name for part in pkgutil.iter_modules(kernels.__path__)]
PARTS = [import_module(f"ecmoe.kernels.{name}") for name in NAMES if name != "cute"]  # which isn't Triton


def test_every_kernel_compiles_for_hopper(tmp_path):
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    script = Path(__file__).with_name("compile_kernels.py")
    shown = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr[-2000:]
    shown = [line.split() for line in shown.stdout.splitlines()]
    assert {row[0] for row in shown} == {name for part in PARTS for name in vars(part) if name.endswith("_kernel")}
    for name, _, _, _, spilled, _, shared, _, wgmma in shown:
        assert int(spilled) <= 96 and int(shared) <= 232_448, name  # of a multiprocessor of sm_90
        products = ("product", "flash_forward", "flash_queries", "flash_keys", "logits")
        assert int(wgmma) > 0 or not any(word in name for word in products), name
