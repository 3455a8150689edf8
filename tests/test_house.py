"""The house: floors that only import downwards, no circle between files, few things at the door."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import grimp
import pytest
from importlinter.cli import lint_imports

ROOT = Path(__file__).parents[1]


def test_imports_go_down(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert lint_imports(no_cache=True, no_logo=True) == 0, capsys.readouterr().out


def test_files_import_in_no_circle():
    """Imports inside functions count too: who reads one file of a circle has to read them all."""
    graph = grimp.build_graph("ecmoe", cache_dir=None)
    try:
        graphlib.TopologicalSorter(
            {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
        ).prepare()
    except graphlib.CycleError as circle:
        pytest.fail(" <- ".join(circle.args[1]))


def test_few_things_lie_at_the_door():
    nothing_to_read = ("__pycache__", "py.typed")  # PEP 561 says where the empty py.typed lies
    entries = [path for path in (ROOT / "ecmoe").iterdir() if path.name not in nothing_to_read]
    assert len(entries) <= 18, sorted(path.name for path in entries)


def test_text_is_read_as_utf_8_whatever_the_system_uses():
    """What is written goes through `files.write_text`."""
    for path in sorted((ROOT / "ecmoe").rglob("*.py")):
        for call in (node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Call)):
            if isinstance(call.func, ast.Attribute) and call.func.attr == "read_text":
                keys = {key.arg: ast.unparse(key.value) for key in call.keywords}
                assert keys.get("encoding") == "'utf-8'", f"{path.name}:{call.lineno}"


def test_types_hold():
    checked = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
