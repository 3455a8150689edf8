"""The progress bar of a notebook that trains: a widget, or text on the terminal from which `ecmoe report` runs it."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import tqdm.auto

TERMINAL = "ECMOE_TERMINAL"  # environment variable of the kernel: the device file of that terminal


def terminal() -> dict[str, str]:
    """Return the environment variable that names the terminal to which stderr goes; empty if it goes elsewhere."""
    try:
        return {TERMINAL: os.ttyname(sys.stderr.fileno())}
    except (OSError, ValueError):  # a file or a pipe, such as of the pipeline; or no file at all
        return {}


@contextmanager
def progress_bar(steps: int) -> Iterator[tqdm.tqdm]:
    """Yield a bar of so many steps, which is hidden if there are none. It writes to the terminal itself, because a
    widget is shown only by a notebook's frontend, and text on stderr would become part of the page."""
    name = os.environ.get(TERMINAL) if steps else None
    kind = tqdm.tqdm if name else tqdm.auto.tqdm
    with open(name, "w", encoding="utf-8") if name else nullcontext() as file:
        with kind(total=steps, unit="step", disable=not steps, file=file) as bar:
            yield bar
