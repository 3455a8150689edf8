"""Runs of this study, kept like the others: found again by name, never computed twice; and what pages read of them."""

from __future__ import annotations

import dataclasses
import datetime
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock

from ecmoe import paths
from ecmoe.continual.learning import final_accuracy, forgetting, run
from ecmoe.continual.settings import APPROACHES, SCHEMA, Settings
from ecmoe.data import images
from ecmoe.provenance import commit, device_name, versions
from ecmoe.study.stats import paired_difference, verdict
from ecmoe.study.table import by_seed
from ecmoe.training.result import Result, read_record, write_record

ORACLE = "oracle gate"  # Expert Gate's experts, told the task: no run of its own


def run_or_load(settings: Settings, *, scale: str = "smoke", train: bool = True, keep: bool = False) -> Result:
    """The result of a run: kept from an earlier call, or computed now.

    Args:
        scale: whose records are looked at first. train: False: what is missing comes back as "not run".
        keep: in reports/<scale>/continual, as the engine does; else in runs/continual.

    Returns:
        a Result without curve or weights. Its record is written last and by rename: it is there whole, or not at all.
    """
    places = [folder / f"{settings.name}.json" for folder in (records(scale), paths.runs() / "continual")]
    path = next((place for place in places[: 2 - keep] if place.exists()), places[1 - keep])
    if path.exists():
        return read_record(path)
    if not train:
        return _missing(settings)
    (paths.runs() / "continual").mkdir(parents=True, exist_ok=True)
    with FileLock(paths.runs() / "continual" / f"{settings.name}.lock"):  # whoever comes second finds it done
        if not path.exists():
            write_record(path, Result(_summary(settings)))
    return read_record(path)  # as a later call will see it


def records(scale: str) -> Path:
    """The folder of this study's records: never that of the runs that have a RunConfig."""
    return paths.continual(scale)


def run_study(settings: Mapping[str, Any], seeds: Sequence[int], *, approaches: Sequence[str] = tuple(APPROACHES),
              scale: str = "smoke", train: bool = True) -> dict[str, list[Result]]:  # fmt: skip
    """Run or load every approach with every seed; all settings are checked before anything runs.

    Returns:
        label of the approach -> a Result for each seed. A run that fails is reported and the others go on.
    """
    made = {
        APPROACHES[a]: [Settings.from_dict({**settings, "approach": a, "seed": seed}) for seed in seeds]
        for a in approaches
    }
    results: dict[str, list[Result]] = {label: [] for label in made}
    for i in range(len(seeds)):
        for label, configs in made.items():
            try:
                result = run_or_load(configs[i], scale=scale, train=train)
            except Exception as error:
                print(f"[{label} s{seeds[i]}] failed: {error}", file=sys.stderr, flush=True)
                result = _missing(configs[i], status="failed", error=f"{type(error).__name__}: {error}")
            results[label].append(result)
    return results


def _missing(settings: Settings, status: str = "not run", error: str | None = None) -> Result:
    return Result({"config": dataclasses.asdict(settings), "name": settings.name, "seed": settings.seed, "schema": SCHEMA,
                   "status": status, "error": error})  # fmt: skip


def _summary(settings: Settings) -> dict[str, Any]:
    """Run, and say what was measured and how; with the keys that `report.provenance` reads."""
    started, clock = datetime.datetime.now(datetime.UTC), time.perf_counter()
    measured = run(settings)
    seconds = time.perf_counter() - clock
    print(f"[{APPROACHES[settings.approach]} s{settings.seed}] accuracy {final_accuracy(measured['accuracy']):.3f}, {seconds:.0f} s",
          file=sys.stderr, flush=True)  # fmt: skip
    for suffix in ("", "_task_known"):
        matrix = measured[f"accuracy{suffix}"]
        measured |= {f"final_accuracy{suffix}": final_accuracy(matrix), f"forgetting{suffix}": forgetting(matrix)}
    return _missing(settings, status="finished").summary | measured | {
        "seconds": seconds, "device": device_name(), "precision": "32-true", "world_size": 1, "commit": commit(),
        "versions": versions("torch", "numpy"),
        "data": images.load(settings.data).provenance, "started": started.isoformat(timespec="seconds"),
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }  # fmt: skip


# What figures and tables read


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
    columns = [
        "final_accuracy",
        "forgetting",
        "final_accuracy_task_known",
        "forgetting_task_known",
        "gate_right",
        "parameters",
        "seconds",
    ]
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
    rows = []
    for label, results in runs.items():
        last = pd.DataFrame(
            [dict(zip(r.summary["task_names"], r.summary["accuracy"][-1], strict=True)) for r in results if r.ok]
        )
        rows.append(
            {"approach": label} | last.mean().to_dict() | {"all tasks": last.mean(axis=1).mean() if len(last) else None}
        )
    frame = pd.DataFrame(rows)
    return frame[["approach", *(c for c in frame.columns if c not in ("approach", "all tasks")), "all tasks"]]


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
        columns measure, of, is it, that of, difference (percentage points), 95% interval, seeds, answer.
    """
    answers = {"reproduced": "yes", "not reproduced": "no"}
    labels, rows = APPROACHES | {"oracle": ORACLE}, []
    for measure, one, direction, other in COMPARED:
        a, b = ({seed: 100 * v for seed, v in by_seed(runs[labels[x]], measure).items()} for x in (one, other))
        found = verdict(paired_difference(a, b, "points"), direction=direction, scale=scale)
        effect = found.effect
        low, high, n = effect.low, effect.high, effect.n
        rows.append({
            "measure": measure.replace("_", " "), "of": labels[one], "is it": direction, "that of": labels[other],
            "difference": effect.mean, "95% interval": effect.interval if low is None else f"{low:.1f} to {high:.1f}", "seeds": n,
            "answer": answers.get(found.label, found.label),
        })  # fmt: skip
    return pd.DataFrame(rows)


def retained(runs: Mapping[str, list[Result]]) -> pd.DataFrame:
    """Accuracies one below the other: approach, seed, `after` (tasks learned), `task`, accuracy; a missing run is a row of NaN."""
    rows: list[dict[str, Any]] = []
    for label, results in runs.items():
        for r in results:
            same = {"approach": label, "seed": r.summary["seed"]}
            cells = [
                (t + 1, k + 1, value)
                for t, row in enumerate(r.summary.get("accuracy", []))
                for k, value in enumerate(row)
            ]
            rows += [same | {"after": t, "task": k, "accuracy": v} for t, k, v in cells if v is not None] or [same]
    return pd.DataFrame(rows, columns=["approach", "seed", "after", "task", "accuracy"]).astype({"accuracy": float})


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
