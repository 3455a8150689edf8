"""Tables for page 11 from the runs of continual learning."""

import math
from collections.abc import Iterable, Mapping

import pandas as pd

from ecmoe.training.result import Result

ORACLE = "oracle gate"  # Expert Gate's experts, chosen by the true task; read from Expert Gate's runs


def with_oracle(runs: Mapping[str, list[Result]]) -> dict[str, list[Result]]:
    """Return the runs with one more arm after Expert Gate: the same experts under an oracle gate, which knows the task."""
    shown: dict[str, list[Result]] = {}
    for arm, results in runs.items():
        shown[arm] = results
        if arm == "Expert Gate":
            suffix = "_task_known"
            told = [{k.removesuffix(suffix): x for k, x in r.summary.items() if k.endswith(suffix)} for r in results]
            shown[ORACLE] = [Result(r.summary | t | {"gate_right": None}) for r, t in zip(results, told, strict=True)]
    return shown


def retained(runs: Mapping[str, list[Result]]) -> pd.DataFrame:
    """Return accuracies in long form: arm, seed, `after` (tasks learned), `task`, its name, accuracy. A missing run is a row of NaN."""
    columns, rows = ["arm", "seed", "after", "task", "name", "accuracy"], []
    for arm, results in runs.items():
        for r in results:
            grid = enumerate(r.summary.get("accuracy", ()), 1)
            names = r.summary["task_names"] if "accuracy" in r.summary else ()
            cells = [(after, k + 1, names[k], x) for after, row in grid for k, x in enumerate(row) if x is not None]
            rows += [(arm, r.summary["seed"], *cell) for cell in cells or [(math.nan,) * 4]]
    return pd.DataFrame(rows, columns=columns).astype({"accuracy": float})


def mean_matrix(results: Iterable[Result], name: str) -> pd.DataFrame | None:
    """Return the mean over seeds of a matrix in the summaries, such as "confusion"; None if no run finished."""
    there = [pd.DataFrame(r.summary[name], dtype=float) for r in results if r.ok]
    return sum(there) / len(there) if there else None


def origins(results: Iterable[Result]) -> pd.DataFrame:
    """Return where Expert Gate's experts started: a row per task with source tasks, mean relatedness, and fine-tuning or LwF."""
    rows = [
        {"task": name, "started from": "nothing" if o["task"] is None else r.summary["task_names"][o["task"]],
         "relatedness": o["related"], "how": o["how"]}
        for r in results if r.ok
        for name, o in zip(r.summary["task_names"], r.summary["origins"], strict=True)
    ]  # fmt: skip
    frame = pd.DataFrame(rows, columns=["task", "started from", "relatedness", "how"]).astype({"relatedness": float})
    each = lambda names: "; ".join(names.unique())  # noqa: E731
    of_task = {"started from": each, "relatedness": "mean", "how": each}
    return frame.groupby("task", sort=False).agg(of_task).reset_index()
