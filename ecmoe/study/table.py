"""A study's runs as tidy tables: a row per run, a row per step, a number per seed."""

import math
from collections.abc import Mapping, Sequence

import pandas as pd

from ecmoe.model import metrics
from ecmoe.training.result import Result

Study = Mapping[str, Sequence[Result]]  # as `load` returns it: name of an arm -> its runs


def table(study: Study) -> pd.DataFrame:
    """One row per run and seed: `arm`, every config key, every number of summary and routing; NaN where a run is missing or broke off."""
    rows = []
    for arm, result in _runs(study):
        numbers = result.summary | (result.summary.get("routing") or {})
        scalars = {key: x for key, x in numbers.items() if x is not None and not isinstance(x, (dict, list))}
        rows.append({"arm": arm, **result.summary["config"], **scalars})
    frame = pd.DataFrame(rows)
    measured = metrics.table()
    frame = frame.reindex(columns=[*dict.fromkeys([*frame, *measured])])
    frame[measured] = frame[measured].astype(float)
    if "status" in frame:  # a loss of a run that broke off is no result
        frame.loc[frame["status"] != "finished", metrics.results()] = math.nan
    return frame


def curves(study: Study) -> pd.DataFrame:
    """All curves below each other: `arm`, `seed`, `status`, `name` and the columns of a curve.

    A missing run is one row of NaN, so that figures can name it.
    """
    columns = ["arm", "seed", "status", "name", *metrics.curve()]
    frames = []
    for arm, result in _runs(study):
        curve = result.curve.reindex(range(max(len(result.curve), 1)), columns=metrics.curve()).astype(float)
        frames.append(curve.assign(arm=arm, **{key: result.summary[key] for key in columns[1:4]}))
    return pd.concat(frames, ignore_index=True)[columns] if frames else pd.DataFrame(columns=columns)


def _runs(study: Study) -> list[tuple[str, Result]]:
    return [(arm, result) for arm, by_arm in study.items() for result in by_arm]
