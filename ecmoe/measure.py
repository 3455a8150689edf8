"""measure: what needs a run's weights is computed once and kept, so that pages are redrawn without them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from ecmoe import paths
from ecmoe.config import RunConfig
from ecmoe.results import Result, read_json, write_json

Compute = Callable[[Any, RunConfig], Mapping[str, Any]]


def measure(
    result: Result, what: str, compute: Compute, *, scale: str = "smoke", train: bool = True
) -> dict[str, Any] | None:
    """What `compute` finds of a finished run's model: kept from an earlier call, or computed now.

    Args:
        result: of `run_or_load`.
        what: names the measurement and its settings: small letters, digits and hyphens. Another name is another one.
        compute: (model in evaluation mode, config) -> a dict that JSON can hold.
        scale: at smoke it is kept in the run's folder, else in reports/<scale>/measures, to be committed.
        train: False: nothing is computed. Else a run whose weights aren't here, as of a record, is trained again.

    Returns:
        the dict; None where there is none: the run isn't finished, or nothing was kept and `train` is False.

    Raises:
        ValueError: `what` can't be a file's name.
    """
    if not re.fullmatch(r"[a-z0-9-]+", what):
        raise ValueError(f"what={what!r}: must consist of small letters, digits and hyphens")
    if not result.ok:
        return None
    path = _folder(result, scale) / f"{what}.json"
    if path.exists():
        return read_json(path)
    if not train:
        return None
    from ecmoe.train import load_model, run_or_load

    config = RunConfig.from_dict(result.summary["config"])
    folder = result.path or run_or_load(config).path
    write_json(path, compute(load_model(folder), config))
    return read_json(path)  # as a later call will see it


def measure_rows(
    runs: Mapping[str, Iterable[Result]], what: str, compute: Compute, *, scale: str = "smoke", train: bool = True
) -> pd.DataFrame:
    """The `rows` of a measurement of every run of a study, below each other, with `arm` and `seed`.

    Args:
        runs: of `run_study`. compute: its dict holds a list of dicts, `rows`. The others: as in `measure`.

    A run without the measurement is one row without values, so that figures can name the gap.
    """
    rows = []
    for arm, results in runs.items():
        for result in results:
            found = measure(result, what, compute, scale=scale, train=train) or {"rows": [{}]}
            rows += [{"arm": arm, "seed": result.summary["seed"], **row} for row in found["rows"]]
    return pd.DataFrame(rows)


def _folder(result: Result, scale: str) -> Path:
    name = result.summary["name"]
    if scale == "smoke":
        return paths.runs() / name / "measures"
    return paths.root() / "reports" / scale / "measures" / name
