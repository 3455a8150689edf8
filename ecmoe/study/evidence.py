"""Read the evidence on a claim: estimate its parts from stored records and measurements. Nothing here trains or measures."""

import base64
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ecmoe.config import RunConfig
from ecmoe.measures import Measurement, as_measured, measure
from ecmoe.study import estimate, speed
from ecmoe.study.estimate import Estimate
from ecmoe.study.load import recorded
from ecmoe.study.plan import Planned
from ecmoe.study.protocol import Part
from ecmoe.study.units import Unit
from ecmoe.training.result import Result


class Evidence:
    """The results of planned runs, read lazily from reports/<scale>. page: whose arms they are. planned: arm -> seed -> run."""

    def __init__(self, scale: str, page: str, planned: Mapping[str, Mapping[int, Planned]] = {}) -> None:
        self.scale, self.page, self.planned = scale, page, planned
        self._summaries: dict[str, dict[int, dict[str, Any]]] = {}

    def config(self, arm: str) -> RunConfig:
        """Return the config of the arm's first seed."""
        by_seed = self.planned[arm]
        return by_seed[min(by_seed)].config

    def summaries(self, arm: str) -> dict[int, dict[str, Any]]:
        """Return seed -> summary, for the arm's runs that have a record."""
        if arm not in self._summaries:
            found = {s: recorded(one, self.scale) for s, one in sorted(self.planned.get(arm, {}).items())}
            self._summaries[arm] = {seed: result.summary for seed, result in found.items() if result}
        return self._summaries[arm]

    def finished(self, arm: str) -> dict[int, dict[str, Any]]:
        """Return seed -> summary, for the arm's runs that finished."""
        return {seed: summary for seed, summary in self.summaries(arm).items() if summary["status"] == "finished"}

    def missing(self, part: Part) -> list[tuple[str, int]]:
        """Return (arm, seed) of the runs that a part lacks: planned for all its arms, but not finished or not fully measured."""
        return [run for run, there in self._asked_by(part).items() if not there]

    def unrecorded(self, part: Part) -> list[tuple[str, int]]:
        """Return (arm, seed) of the runs that a part lacks although they finished and were measured: their results have no such
        column, since it's newer than they are."""
        if part.how == "accuracy":  # which isn't a column
            return []
        has = {arm: estimate.shared(*(self.values(arm, column) for _, column in part.terms)) for arm in part.arms}
        return [(arm, seed) for (arm, seed), there in self._asked_by(part).items() if there and seed not in has[arm]]

    def _asked_by(self, part: Part) -> dict[tuple[str, int], bool]:
        """Return (arm, seed) -> whether the run finished and was measured in full, for those planned for all of a part's arms."""
        by_seed, whats = [self.planned.get(arm, {}) for arm in part.arms], part.measured
        asked = [{s: one for s, one in of.items() if whats <= {how.what for how in one.measures}} for of in by_seed]

        def there(arm: str, seed: int) -> bool:
            return seed in self.finished(arm) and all(self.measured(arm, seed, what) for what in whats)

        return {(arm, seed): there(arm, seed) for arm in part.arms for seed in estimate.shared(*asked)}

    def values(self, arm: str, column: str) -> dict[int, float]:
        """Return seed -> value, for finished runs. column: a key of the summary, or "what/row" of a measurement."""
        what, _, row = column.partition("/")
        numbers = {
            seed: _of_rows(self.measured(arm, seed, what), what, row)
            if row
            else (summary | (summary.get("routing") or {})).get(column)
            for seed, summary in self.finished(arm).items()
        }
        return {seed: float(x) for seed, x in numbers.items() if x is not None}

    def measured(self, arm: str, seed: int, what: str) -> list[dict[str, Any]]:
        """Return a run's stored results of the measurements called `what`, such as one for each task; empty if any is missing."""
        result, asked = self._asked(arm, seed, what)
        found = [measure(result, how, scale=self.scale, train=False, keep=True) for how in asked]
        return [] if None in found else found

    def as_measured(self, arm: str, seed: int, what: str) -> list[dict[str, Any]]:
        """Return a run's summary as of each of these measurements: with the device and the code that computed it."""
        result, asked = self._asked(arm, seed, what)
        return [one for how in asked if (one := as_measured(result, how, scale=self.scale, keep=True))]

    def _asked(self, arm: str, seed: int, what: str) -> tuple[Result, list[Measurement]]:
        asked = [how for how in self.planned[arm][seed].measures if how.what == what]
        return Result(self.summaries(arm)[seed]), asked

    def right(self, arm: str, of: str) -> dict[int, list[np.ndarray]]:
        """Return seed -> for each task, (N,): 1 for a validation example predicted correctly, else 0. of: "accuracy" or
        "accuracy_causal"; " - key" subtracts that number of the task's row, such as the majority's share."""
        which, _, less = of.partition(" - ")
        key = {"accuracy": "right", "accuracy_causal": "right_causal"}[which]

        def right(task: Mapping[str, Any]) -> np.ndarray:
            (row,) = task["rows"]
            packed = np.frombuffer(base64.b64decode(task[key]), np.uint8)
            return np.unpackbits(packed, count=row["validation"]) - (row[less] if less else 0.0)

        tasks = {seed: self.measured(arm, seed, "fine-tuned") for seed in self.values(arm, "val_loss")}
        return {seed: [*map(right, of)] for seed, of in tasks.items() if of}

    def step_ratio(self, a: str, b: str, of: str) -> Estimate:
        """Return a's step time divided by b's, per turn of the bench, each on its fastest path. of: how token choice routes, "even" or
        "own"; after a comma the only mode to read: "even, compiled"."""
        routing, _, mode = of.partition(", ")
        rows = speed.kept("step", self.scale)["rows"]

        def best(name: str) -> list[float]:
            of_arm = [row for row in rows if row["arm"] == name and mode in ("", row["mode"])]
            asked = [row for row in of_arm if row["routing"] == routing] or of_arm
            return min(asked, key=lambda row: row["ms"])["samples_ms"] if asked else []

        pairs = zip(best(a), best(b), strict=False)
        return estimate.of_values((x / y for x, y in pairs), Unit.RATIO, "turn")

    def step_time(self, a: str, b: str) -> float:
        """Return the time of a's training step divided by b's, each alone on one device; NaN if not measured."""
        timed = speed.kept(speed.study_file(speed.study_arms(self.scale)), self.scale)
        ms = {row["arm"]: row["ms"] for row in timed["rows"]}
        return ms.get(a, math.nan) / ms.get(b, math.nan)

    def estimate(self, part: Part) -> Estimate:
        """Return the estimate of a part by the method that its `how` names."""
        if part.how == "bench":
            return self.step_ratio(part.a[0], part.b[0], part.of)
        if part.how == "accuracy":
            right = self.right(part.a[0], part.of)
            other = self.right(part.b[0], part.of) if part.b else {s: [0.0] * len(tasks) for s, tasks in right.items()}
            pairs = [zip(right[seed], other[seed], strict=True) for seed in estimate.shared(right, other)]
            return estimate.crossed([[x - y for x, y in tasks] for tasks in pairs])
        a, b = ([self._by_seed(part, arm) for arm in arms] for arms in (part.a, part.b))
        if part.how == "spread":
            return estimate.spread_ratio(a[0].values(), b[0].values())
        seeds = estimate.shared(*a, *b)
        if part.how == "difference":
            return estimate.of_values((_one(part, s, a) - (_one(part, s, b) if b else 0.0) for s in seeds), part.unit)
        # The share of the steps at which a reaches b's loss; for "time", multiplied by the ratio of their step times.
        takes = self.step_time(part.a[-1], part.b[0]) if part.how == "time" else 1.0
        shares = (estimate.share_of_steps([arm[seed] for arm in a], part.over, b[0][seed]) for seed in seeds)
        return estimate.of_values((takes * share for share in shares), Unit.RATIO)

    def _by_seed(self, part: Part, arm: str) -> dict[int, float]:
        """Return seed -> the sum of the part's signed terms."""
        terms = [(sign, self.values(arm, column)) for sign, column in part.terms]
        return {seed: sum(sign * of[seed] for sign, of in terms) for seed in estimate.shared(*(of for _, of in terms))}


def _one(part: Part, seed: int, arms: Sequence[Mapping[int, float]]) -> float:
    """Return a seed's mean over arms, or the slope over them if the part has `over`."""
    values = [arm[seed] for arm in arms]
    return estimate.slope(values, part.over) if part.over else float(np.mean(values))


def _of_rows(found: Sequence[Mapping[str, Any]], what: str, row: str) -> float | None:
    """Return the value of a measurement's row: a loss under one way of routing, or the probe's information in nats."""
    rows = found[0]["rows"] if found else []
    if what == "losses":
        return next((r["loss"] for r in rows if r["way"] == row), None)
    beyond = rows[-1]["given"] if rows else None  # only the last condition separates a leak from honest prediction
    return next((r["bits"] * math.log(2) for r in rows if r["routing"] == row and r["given"] == beyond), None)
