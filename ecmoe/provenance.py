"""Provenance: which code, on which device, with which libraries. What a result needs to be believed, and repeated."""

import ast
import functools
import hashlib
import math
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parent
# Dense bf16 matrix rate by device, in FLOP/s (vendors' data sheets, without sparsity).
PEAK_BF16 = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "B200": 2250e12}
# What decides the numbers of a run. Not the rest: a page, a plot or a table changes no loss.
DECIDES = ("config.py", "routers.py", "data", "kernels", "model", "routing", "training")


def device_name() -> str:
    """The GPU's name, or the CPU's kind and cores."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU ({platform.machine()}, {os.cpu_count()} cores)"


def peak_flops(device: str | None = None) -> float:
    """FLOP/s that a device (this one) could do at best in bf16; NaN if we don't know it."""
    device = device or device_name()
    return next((rate for kind, rate in PEAK_BF16.items() if kind in device), math.nan)


def versions(*names: str) -> dict[str, str]:
    """Name -> version of installed packages, and of Python."""
    return {name: version(name) for name in names} | {"python": platform.python_version()}


def commit() -> str:
    """The checkout's commit, with "+" if files differ from it; "unknown" outside a checkout of this project.

    A package that lies in another repository's folder, as in its virtual environment, is none of that repository's commits.
    """
    if os.environ.get("ECMOE_COMMIT"):  # a copy without its history
        return os.environ["ECMOE_COMMIT"]
    try:
        if Path(_git("rev-parse", "--show-toplevel")).resolve() != PACKAGE.parent:
            return "unknown"
        _git("ls-files", "--error-unmatch", str(PACKAGE / "__init__.py"))
        head, changed = _git("rev-parse", "--short=12", "HEAD"), _git("status", "--porcelain", "-uno")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if changed else "")


def _git(*arguments: str) -> str:
    ours = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}  # set within a hook
    done = subprocess.run(["git", "-C", str(PACKAGE), *arguments], capture_output=True, text=True, check=True, env=ours)
    return done.stdout.strip()


@functools.lru_cache(maxsize=1)
def code_digest() -> str:
    """12 hex digits of the code that decides the numbers of a run; comments, docstrings, types and line breaks don't count."""
    digest = hashlib.sha256()
    for name in DECIDES:
        path = PACKAGE / name
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            tree = ast.parse(file.read_text(encoding="utf-8"))
            digest.update(f"{file.relative_to(PACKAGE).as_posix()} {_meaning(tree)}\n".encode())
    return digest.hexdigest()[:12]


_TYPES = ("annotation", "returns", "type_comment")


def _meaning(node: Any) -> Any:
    """A syntax tree as lists, without docstrings and types. `ast.dump` writes the same code differently in another Python."""
    if isinstance(node, list):
        return [_meaning(item) for item in node if not (isinstance(item, ast.AnnAssign) and item.value is None)]
    if not isinstance(node, ast.AST):
        return node
    fields = dict(ast.iter_fields(node))
    if (
        isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and ast.get_docstring(node, clean=False) is not None
    ):
        fields["body"] = fields["body"][1:]
    said = {name: value for name, value in fields.items() if value not in (None, []) and name not in _TYPES}
    return [type(node).__name__, *([name, _meaning(value)] for name, value in said.items())]
