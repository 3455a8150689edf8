"""A JupyterLab hook that saves a page's notebook without outputs. `make lab` passes it to Jupyter."""

import re
from pathlib import PurePosixPath
from typing import Any


def as_written(model: dict[str, Any], path: str = "", **_: Any) -> None:
    """Remove outputs and execution counts before saving (a `pre_save_hook`), so that running a notebook changes nothing to commit.
    Applies to NN_name.ipynb only: a copy under another name keeps its outputs."""
    if model["type"] != "notebook" or not re.fullmatch(r"\d\d_\w+\.ipynb", PurePosixPath(path).name):
        return
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    model["content"]["metadata"] = {"kernelspec": kernel, "language_info": {"name": "python"}}
    for cell in model["content"]["cells"]:
        if cell["cell_type"] == "code":
            cell.update(outputs=[], execution_count=None)
