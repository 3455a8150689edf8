"""Notebooks to make pages of, what a notebook declares, and a text that no page may take for HTML."""

import nbformat

EVIL = "<script>alert(1)</script>"


def notebook(*cells: tuple[str, str]):
    made = []
    for kind, source in cells:
        new = nbformat.v4.new_markdown_cell if kind == "md" else nbformat.v4.new_code_cell
        cell = new(source)
        if kind in ("parameters", "answer", "read"):
            cell.metadata["tags"] = [kind]
        made.append(cell)
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return nbformat.v4.new_notebook(cells=made, metadata={"kernelspec": kernel})


def declared(notebook) -> dict:
    """Name -> default, of the cell tagged `parameters`."""
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    there: dict = {}
    exec(cell.source, {}, there)
    del there["__annotations__"]
    return there
