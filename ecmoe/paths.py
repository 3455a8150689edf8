"""Where things lie. Nothing depends on the working folder of a notebook."""

from __future__ import annotations

import os
from pathlib import Path


def root() -> Path:
    """$ECMOE_HOME, else the checkout that holds this package, else the working folder."""
    home = os.environ.get("ECMOE_HOME")
    if home:
        return Path(os.path.expanduser(home)).resolve()
    checkout = Path(__file__).resolve().parents[1]
    return checkout if (checkout / "pyproject.toml").is_file() else Path.cwd()


def configs() -> Path:
    """Scales, arms, pages and the protocol: of the checkout that holds this package, wherever runs are kept."""
    return Path(__file__).resolve().parents[1] / "configs"


def runs() -> Path:
    """Folders of runs."""
    return root() / "runs"


def cache() -> Path:
    """What can be made again: tokenised corpora."""
    return root() / ".cache"


def records(scale: str) -> Path:
    """Small records of the runs at `scale`."""
    return root() / "reports" / scale / "runs"


def measures(scale: str) -> Path:
    """What was measured on the runs at `scale`."""
    return root() / "reports" / scale / "measures"


def resolve(name: str | Path) -> Path:
    """The file or folder `name` means: relative to the working folder, else to the root."""
    path = Path(os.path.expanduser(name))  # which, unlike Path's, leaves alone the ~ of a user that isn't known
    return path if path.is_absolute() or path.exists() else root() / path
