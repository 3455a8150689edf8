"""measure: what needs a run's weights is computed once and kept, so that pages are redrawn without them.

What a page asks for and doesn't get is noted in LACKING, and kept beside the runs that it rests on: `ecmoe runs --train`
then measures it, on a machine that need not draw pages.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pandas as pd

from ecmoe import paths
from ecmoe.config import RunConfig
from ecmoe.files import read_json, write_json
from ecmoe.training.result import Result

Compute = Callable[[Any, RunConfig], Mapping[str, Any]]
LACKING: dict[str, dict[str, dict[str, Any]]] = {}  # run -> measurement -> how to take it


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
    path = folder(result.summary["name"], scale) / f"{what}.json"
    if result.ok and path.exists():
        return read_json(path)
    if not train and result.summary["status"] != "diverged":  # which leaves nothing to measure
        _note(result, what, compute)
    if not train or not result.ok:
        return None
    import torch

    from ecmoe.training.run import free_memory, load_model, run_or_load

    config = RunConfig.from_dict(result.summary["config"])
    here = result.path is not None and (result.path / "model.safetensors").exists()
    model = load_model(result.path if here else run_or_load(config, weights=True).path)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    write_json(path, compute(model, config))
    del model
    free_memory()
    return read_json(path)  # as a later call will see it


def take(result: Result, lacking: Mapping[str, Mapping[str, Any]], scale: str) -> None:
    """Measure what a page lacks of a finished run, as its record says: {what: {"compute": "module:function", "keys": {}}}."""
    for what, how in lacking.items():
        module, _, name = how["compute"].partition(":")
        if not module.startswith("ecmoe."):
            raise ValueError(f"compute={how['compute']!r} of measurement {what!r}: must be a function of ecmoe")
        measure(result, what, partial(getattr(import_module(module), name), **how["keys"]), scale=scale)


def _note(result: Result, what: str, compute: Compute) -> None:
    function, keys = (compute.func, compute.keywords) if isinstance(compute, partial) else (compute, {})
    if getattr(function, "__module__", "").startswith("ecmoe."):  # else nobody finds it
        how = {"compute": f"{function.__module__}:{function.__qualname__}", "keys": keys}
        LACKING.setdefault(result.summary["name"], {})[what] = how


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


def folder(run: str, scale: str) -> Path:
    """Where the measurements of a run are kept."""
    if scale == "smoke":
        return paths.runs() / run / "measures"
    return paths.root() / "reports" / scale / "measures" / run
