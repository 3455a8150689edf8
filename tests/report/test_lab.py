"""What Lab saves: run and saved, a page's notebook is the file that is tracked."""

from pathlib import Path

import nbformat
import pytest
from jupyter_server.services.contents.filemanager import FileContentsManager

from ecmoe.report.lab import as_written

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


@pytest.fixture
def manager(tmp_path):
    return FileContentsManager(root_dir=str(tmp_path), pre_save_hook="ecmoe.report.lab.as_written")


def save(manager, source: Path, name: str) -> bytes:
    """Save it as Lab does once it was run; what lies on the disk then."""
    notebook = nbformat.read(source, as_version=4)
    notebook.metadata.language_info = {"name": "python", "version": "3.11.7", "pygments_lexer": "ipython3"}
    notebook.metadata.widgets = {"state": {}}
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type == "code":
            cell.update(execution_count=number, outputs=[nbformat.v4.new_output("stream", text="shown")])
    manager.save({"type": "notebook", "content": notebook}, name)
    return (Path(manager.root_dir) / name).read_bytes()


@pytest.mark.parametrize("notebook", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_to_run_and_save_a_page_is_no_change(manager, notebook):
    assert save(manager, notebook, notebook.name) == notebook.read_bytes()


def test_of_a_page_in_a_folder_alone_is_anything_left_out():
    cells = [{"cell_type": "markdown", "source": "a"}, {"cell_type": "code", "outputs": [1], "execution_count": 3}]
    model = {"type": "notebook", "content": {"metadata": {"a": 1}, "cells": cells}}
    as_written(model, "notebooks/01_a.ipynb", contents_manager=None)
    assert cells == [
        {"cell_type": "markdown", "source": "a"},
        {"cell_type": "code", "outputs": [], "execution_count": None},
    ]
    assert list(model["content"]["metadata"]) == ["kernelspec", "language_info"]
    for name in ("01_a.ipynb.txt", "x01_a.ipynb", "1_a.ipynb"):
        as_written({"type": "notebook", "content": {}}, name)
    as_written(other := {"type": "file", "content": "text"}, "01_a.ipynb")
    assert other["content"] == "text"


def test_a_copy_keeps_what_it_showed(manager):
    assert b"shown" in save(manager, NOTEBOOKS / "03_capacity_factor.ipynb", "mine.ipynb")
