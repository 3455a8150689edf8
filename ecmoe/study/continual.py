"""What page 11 reads of the runs of continual learning."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from ecmoe.continual import APPROACHES
from ecmoe.study import estimate
from ecmoe.study.estimate import Unit, span
from ecmoe.study.table import by_seed
from ecmoe.study.verdict import NOT_RUN, PLUMBING, UNDECIDED
from ecmoe.training.result import Result

ORACLE = "oracle gate"  # Expert Gate's experts, told the task: no run of its own


def with_oracle(runs: Mapping[str, list[Result]]) -> dict[str, list[Result]]:
    """The runs, and beside Expert Gate its experts under an oracle gate: the same networks, told the task."""
    shown: dict[str, list[Result]] = {}
    for label, results in runs.items():
        shown[label] = results
        if label == APPROACHES["expert_gate"]:
            shown[ORACLE] = [Result(_told(result.summary)) for result in results]
    return shown


def _told(summary: Mapping[str, Any]) -> dict[str, Any]:
    names = ("accuracy", "final_accuracy", "forgetting")
    told = {name: summary[f"{name}_task_known"] for name in names if f"{name}_task_known" in summary}
    return {**summary, **told, "gate_right": None}  # it is not asked


def table(runs: Mapping[str, list[Result]]) -> pd.DataFrame:
    """One row per approach and seed: final accuracy and forgetting, without and with the task known, and the network's size."""
    columns = ["final_accuracy", "forgetting", "final_accuracy_task_known", "forgetting_task_known", "gate_right",
               "parameters", "seconds"]  # fmt: skip
    rows = [
        {"approach": label, "seed": r.summary["seed"], "status": r.summary["status"]}
        | {c: r.summary.get(c) for c in columns}
        for label, results in runs.items()
        for r in results
    ]
    frame = pd.DataFrame(rows, columns=["approach", "seed", "status", *columns])
    return frame.astype(dict.fromkeys(columns, float))


def by_approach(runs: Mapping[str, list[Result]]) -> pd.DataFrame:
    """One row per approach: what `table` has, mean over the seeds that finished, and their number."""
    frame, numbers = table(runs), [c for c in table({}).columns if c not in ("approach", "seed", "status")]
    means = frame.groupby("approach", sort=False)[numbers].mean()
    finished = (frame["status"] == "finished").groupby(frame["approach"], sort=False).sum()
    return means.assign(seeds=finished).reset_index()[["approach", "seeds", *numbers]]


def by_task(runs: Mapping[str, list[Result]]) -> pd.DataFrame:
    """One row per approach: accuracy on each task after the last, and their mean; means over seeds."""
    cells = retained(runs)
    last = cells[cells["after"] == cells["after"].max()].pivot_table("accuracy", "approach", "name", sort=False)
    return last.assign(**{"all tasks": last.mean(axis=1)}).reindex(list(runs)).rename_axis("approach").reset_index()


COMPARED = (
    ("final_accuracy", "expert_gate", "above", "shared"), ("forgetting", "expert_gate", "below", "shared"),
    ("final_accuracy", "expert_gate", "above", "expert_choice"), ("forgetting", "expert_gate", "below", "expert_choice"),
    ("forgetting", "expert_choice", "below", "shared"), ("forgetting_task_known", "expert_choice", "below", "shared"),
    ("final_accuracy", "oracle", "above", "expert_gate"), ("final_accuracy", "joint", "above", "expert_gate"),
)  # fmt: skip


def compare(runs: Mapping[str, list[Result]], scale: str) -> pd.DataFrame:
    """The questions of this study, each with its effect over paired seeds: is it above, or below, that of the other?

    Args:
        runs: of `with_oracle`. scale: at smoke there are effects, but no answers.

    Returns:
        columns measure, of, is it, that of, difference (percentage points), 95% interval, seeds, answer: yes where the whole
        interval is on that side of 0, no where it is on the other.
    """
    labels, rows = APPROACHES | {"oracle": ORACLE}, []
    for measure, one, side, other in COMPARED:
        a, b = (by_seed(runs[labels[x]], measure) for x in (one, other))
        effect = estimate.of_values((a[seed] - b[seed] for seed in estimate.shared(a, b)), Unit.SHARE)
        ends = effect.interval()
        rows.append({
            "measure": measure.replace("_", " "), "of": labels[one], "is it": side, "that of": labels[other],
            "difference": 100 * effect.value, "95% interval": span(*ends, Unit.SHARE) if ends else "none", "seeds": effect.n,
            "answer": PLUMBING if scale == "smoke" else NOT_RUN if not effect.n else _answer(ends, side),
        })  # fmt: skip
    return pd.DataFrame(rows)


def _answer(ends: tuple[float, float] | None, side: str) -> str:
    if ends is None or ends[0] <= 0 <= ends[1]:
        return UNDECIDED
    return "yes" if (ends[0] > 0) == (side == "above") else "no"


def retained(runs: Mapping[str, list[Result]]) -> pd.DataFrame:
    """Accuracies one below the other: approach, seed, `after` (tasks learned), `task`, its name, accuracy; a missing run is a row of NaN."""
    columns, rows = ["approach", "seed", "after", "task", "name", "accuracy"], []
    for label, results in runs.items():
        for r in results:
            grid, names = enumerate(r.summary.get("accuracy", ()), 1), r.summary.get("task_names")
            cells = [(after, k + 1, names[k], x) for after, row in grid for k, x in enumerate(row) if x is not None]
            rows += [(label, r.summary["seed"], *cell) for cell in cells or [(math.nan,) * 4]]
    return pd.DataFrame(rows, columns=columns).astype({"accuracy": float})


def mean_matrix(results: Iterable[Result], name: str) -> pd.DataFrame | None:
    """Mean over seeds of a matrix of the summary, such as confusion; None if there is none. Its cells that are None are NaN."""
    there = [pd.DataFrame(r.summary[name], dtype=float) for r in results if r.ok and name in r.summary]
    return sum(there) / len(there) if there else None


def origins(results: Iterable[Result]) -> pd.DataFrame:
    """Where Expert Gate's experts started: one row per task, the source task of each seed, mean relatedness, fine-tuning or LwF."""
    rows = [
        {"task": name, "started from": "nothing" if o["task"] is None else r.summary["task_names"][o["task"]],
         "relatedness": o["related"], "how": o["how"]}
        for r in results if r.ok
        for name, o in zip(r.summary["task_names"], r.summary["origins"], strict=True)
    ]  # fmt: skip
    frame = pd.DataFrame(rows, columns=["task", "started from", "relatedness", "how"]).astype({"relatedness": float})
    many = {"started from": _counted, "relatedness": "mean", "how": _counted}
    return frame.groupby("task", sort=False).agg(many).reset_index()


def _counted(names: pd.Series) -> str:
    """ "0, 1 (2 seeds); 4, 5 (1 seed)"; only the name where all seeds agree."""
    counts = names.value_counts()
    if len(counts) == 1:
        return str(counts.index[0])
    return "; ".join(f"{name} ({n} seed{'s' * (n > 1)})" for name, n in counts.items())
