"""What JupyterLab saves of a page's notebook: what somebody wrote, not what it showed. `make lab` hands this to Jupyter."""

import re
from pathlib import PurePosixPath
from typing import Any

KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def as_written(model: dict[str, Any], path: str = "", **_: Any) -> None:
    """A `pre_save_hook`: no outputs, no counters, so that to run a notebook is no change to commit.

    Of NN_name.ipynb alone: a copy under another name keeps what it showed.
    """
    if model["type"] != "notebook" or not re.fullmatch(r"\d\d_\w+\.ipynb", PurePosixPath(path).name):
        return
    model["content"]["metadata"] = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    for cell in model["content"]["cells"]:
        if cell["cell_type"] == "code":
            cell.update(outputs=[], execution_count=None)
