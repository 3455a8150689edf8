"""Provenance of a result: the code, device and library versions behind it, so that others can trust and repeat it."""

import ast
import functools
import hashlib
import math
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parent
# Peak dense bf16 matrix-product rate by device, in FLOP/s (vendors' data sheets, without sparsity).
PEAK_BF16 = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "B200": 2250e12}
# The modules that determine the numbers of a run. Pages, plots and tables don't change a loss.
DECIDES = ("config.py", "routers.py", "continual", "data", "kernels", "model", "routing", "training")


def device_name() -> str:
    """Return the GPU's name, or the CPU's architecture and number of cores."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU ({platform.machine()}, {os.cpu_count()} cores)"


def peak_flops(device: str | None = None) -> float:
    """Return the peak bf16 FLOP/s of a device (default: this machine's), or NaN if the device isn't in `PEAK_BF16`."""
    device = device or device_name()
    return next((rate for kind, rate in PEAK_BF16.items() if kind in device), math.nan)


def versions(*names: str) -> dict[str, str]:
    """Return the versions of installed packages and of Python, name -> version."""
    return {name: version(name) for name in names} | {"python": platform.python_version()}


def commit() -> str:
    """Return $ECMOE_COMMIT, else the checkout's commit, with "+" if tracked files differ from it, else "unknown"."""
    if os.environ.get("ECMOE_COMMIT"):  # for a copy without git history
        return os.environ["ECMOE_COMMIT"]
    try:
        _git("ls-files", "--error-unmatch", "__init__.py")  # fails in the virtual environment of another repository
        head, changed = _git("rev-parse", "--short=12", "HEAD"), _git("status", "--porcelain", "-uno")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if changed else "")


def _git(*arguments: str) -> str:
    ours = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}  # git hooks set these
    done = subprocess.run(["git", "-C", str(PACKAGE), *arguments], capture_output=True, text=True, check=True, env=ours)
    return done.stdout.strip()


@functools.cache
def code_digest(names: tuple[str, ...] = DECIDES) -> str:
    """Return 12 hex digits of a hash of the code in these files and folders, ignoring comments, docstrings, types and line breaks."""
    digest = hashlib.sha256()
    for name in names:
        path = PACKAGE / name
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            tree = ast.parse(file.read_text(encoding="utf-8"))
            digest.update(f"{file.relative_to(PACKAGE).as_posix()} {_meaning(tree)}\n".encode())
    return digest.hexdigest()[:12]


def by_other_code(summary: Mapping[str, Any]) -> bool:
    """Return whether other code than this has trained a run; False if its summary doesn't say which."""
    return summary.get("code") not in (None, code_digest())


_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_TYPES = ("annotation", "returns")


def _meaning(node: Any) -> Any:
    """Return a syntax tree as lists, without docstrings and types (`ast.dump` differs between Python versions)."""
    if isinstance(node, list):
        return [_meaning(item) for item in node if not (isinstance(item, ast.AnnAssign) and item.value is None)]
    if not isinstance(node, ast.AST):
        return node
    fields = dict(ast.iter_fields(node))
    if isinstance(node, _DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
        fields["body"] = fields["body"][1:]
    said = {name: value for name, value in fields.items() if value not in (None, []) and name not in _TYPES}
    return [type(node).__name__, *([name, _meaning(value)] for name, value in said.items())]
