"""A study's runs as tidy tables: a row per run, a row per step, a number per seed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from ecmoe.config import ConfigError, RunConfig
from ecmoe.model import metrics
from ecmoe.routers import arm_label
from ecmoe.training.result import Result

Study = Mapping[str, Sequence[Result]]  # as `run_study` returns it: name of an arm -> its runs


def table(results: Iterable[Result] | Study, axes: Sequence[str] = ()) -> pd.DataFrame:
    """One row per run and seed: `arm`, every config key, every number of summary and routing.

    Args:
        results: from `run_or_load`, or `load_records`; or a study, whose arms keep their names there. A missing or
            diverged run is a row with NaN.
        axes: config keys that stand on a figure's axis, and so are no part of the arm's label.
    """
    rows = []
    for result, arm in _labelled(results, axes):
        scalars = {
            key: value
            for key, value in (result.summary | (result.summary.get("routing") or {})).items()
            if value is not None and not isinstance(value, (dict, list))
        }
        rows.append({"arm": arm, "status": "not run", **result.summary["config"], **scalars})
    frame = pd.DataFrame(rows)
    measured = metrics.table()
    for column in [name for name in measured if name not in frame]:
        frame[column] = math.nan
    frame[measured] = frame[measured].astype(float)
    if "status" in frame:  # a loss of a run that broke off is no result
        frame.loc[frame["status"] != "finished", metrics.results()] = math.nan
    return frame


def curves(results: Iterable[Result] | Study, axes: Sequence[str] = ()) -> pd.DataFrame:
    """All curves below each other: `arm`, `seed`, `status`, `name`, axes and the columns of a curve; of results as `table` takes them.

    A missing run is one row of NaN, so that figures can name it.
    """
    frames = []
    for result, arm in _labelled(results, axes):
        summary, curve = result.summary, result.curve.reindex(columns=metrics.curve()).astype(float)
        if not len(curve):
            curve = pd.DataFrame([dict.fromkeys(metrics.curve(), math.nan)])
        extra = {key: summary["config"].get(key) for key in axes}
        extra |= {key: summary[key] for key in ("seed", "status", "name")}
        frames.append(curve.assign(arm=arm, **extra))
    if not frames:
        return pd.DataFrame(columns=["arm", "seed", "status", "name", *metrics.curve()])
    frame = pd.concat(frames, ignore_index=True)
    return frame[["arm", "seed", "status", "name", *axes, *metrics.curve()]]


def by_seed(results: Iterable[Result], key: str = "val_loss") -> dict[int, float]:
    """seed -> a number of the summary (or of its routing), for the finished runs of one arm."""
    values = {}
    for result in results:
        if not result.ok:
            continue
        value = (result.summary | (result.summary.get("routing") or {})).get(key)
        if value is not None:
            values[int(result.summary["seed"])] = float(value)
    return values


def by_routing(runs: Study) -> pd.DataFrame:
    """A row per arm, seed and routing ("as trained", "causally") with its `loss`, arms by their name in the study."""
    rows = [
        {
            "arm": arm,
            "seed": result.summary["seed"],
            "routing": routing,
            "loss": result.summary.get(key) if result.ok else None,
        }
        for arm, by_arm in runs.items()
        for result in by_arm
        for routing, key in (("as trained", "val_loss"), ("causally", "val_loss_causal"))
    ]
    return pd.DataFrame(rows, columns=["arm", "seed", "routing", "loss"]).astype({"loss": float})


def curves_by_seed(results: Iterable[Result]) -> dict[int, pd.DataFrame]:
    """seed -> curve, for the finished runs of one arm."""
    return {int(result.summary["seed"]): result.curve for result in results if result.ok}


def arm_labels(results: Sequence[Result], axes: Sequence[str] = ()) -> list[str]:
    """A label for each result: `arm_label`, and the keys by which runs that share it differ.

    So that two arms are never taken for two seeds of one: "Dense d_ff=1024", "Dense d_ff=2048".
    """
    identities = [_identity(result.summary["config"], axes) for result in results]
    usual = RunConfig().to_dict()  # what an older record doesn't say
    plain = [arm_label(usual | result.summary["config"], axes) for result in results]
    labels = []
    for label, identity in zip(plain, identities, strict=True):
        alike = [other for other, name in zip(identities, plain, strict=True) if name == label]
        differing = [key for key in identity if any(other.get(key) != identity[key] for other in alike)]
        labels.append(" ".join([label, *(f"{key}={identity[key]}" for key in differing)]))
    return labels


def _labelled(results: Iterable[Result] | Study, axes: Sequence[str]) -> list[tuple[Result, str]]:
    if isinstance(results, Mapping):
        return [(result, arm) for arm, by_arm in results.items() for result in by_arm]
    results = list(results)
    return list(zip(results, arm_labels(results, axes), strict=True))


def _identity(config: Mapping[str, Any], axes: Sequence[str]) -> dict[str, Any]:
    try:
        keys = RunConfig.from_dict(config).identity()
    except ConfigError:  # a record of another schema
        keys = dict(config)
    return {key: value for key, value in keys.items() if key != "seed" and key not in axes}
