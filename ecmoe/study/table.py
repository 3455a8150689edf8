"""A study's runs as tidy tables: one row per run (`table`), or one row per recorded step (`curves`)."""

import math
from collections.abc import Mapping, Sequence

import pandas as pd

from ecmoe.model import metrics
from ecmoe.training.result import Result

Study = Mapping[str, Sequence[Result]]  # arm -> its runs, as `load` returns them


def table(study: Study) -> pd.DataFrame:
    """Return one row per run: `arm`, config keys, and the scalars of summary and routing; NaN for results of unfinished runs."""
    rows = []
    for arm, result in _runs(study):
        numbers = result.summary | (result.summary.get("routing") or {})
        scalars = {key: x for key, x in numbers.items() if x is not None and not isinstance(x, (dict, list))}
        rows.append({"arm": arm, **result.summary["config"], **scalars})
    frame = pd.DataFrame(rows)
    measured = metrics.table()
    frame = frame.reindex(columns=[*dict.fromkeys([*frame, *measured])])
    frame[measured] = frame[measured].astype(float)
    if "status" in frame:  # the last loss of an unfinished run is no result
        frame.loc[frame["status"] != "finished", metrics.results()] = math.nan
    return frame


def curves(study: Study) -> pd.DataFrame:
    """Return all curves in long form: `arm`, `seed`, `status`, `name` and the columns of a curve. A missing run is one row of NaN,
    so that figures can name it."""
    columns = ["arm", "seed", "status", "name", *metrics.curve()]
    frames = []
    for arm, result in _runs(study):
        curve = result.curve.reindex(range(max(len(result.curve), 1)), columns=metrics.curve()).astype(float)
        frames.append(curve.assign(arm=arm, **{key: result.summary[key] for key in columns[1:4]}))
    return pd.concat(frames, ignore_index=True)[columns] if frames else pd.DataFrame(columns=columns)


def _runs(study: Study) -> list[tuple[str, Result]]:
    return [(arm, result) for arm, by_arm in study.items() for result in by_arm]
