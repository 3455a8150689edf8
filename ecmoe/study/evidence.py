"""Read the evidence on a claim: estimate its parts from stored records and measurements. Nothing here trains or measures."""

import base64
import math
import operator
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from ecmoe.config import RunConfig
from ecmoe.measures import as_measured, measure
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

    def lacks(self, part: Part) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
        """Return (arm, seed) of the runs that a part lacks, of those planned for all its arms: first those that didn't finish or
        weren't measured in full; then those whose results have no such column, since it's newer than they are."""
        by_seed, whats = [self.planned.get(arm, {}) for arm in part.arms], part.measured
        asked = [{s: one for s, one in of.items() if whats <= {how.what for how in one.measures}} for of in by_seed]
        missing, unrecorded = [], []
        for arm in part.arms:
            columns = [self.values(arm, column) for _, column in part.terms if part.how != "accuracy"]
            for seed in estimate.shared(*asked):
                if not self.complete(part, arm, seed):
                    missing.append((arm, seed))
                elif not all(seed in of_column for of_column in columns):
                    unrecorded.append((arm, seed))
        return missing, unrecorded

    def complete(self, part: Part, arm: str, seed: int) -> bool:
        """Return whether this run finished and has all measurements that the part rests on."""
        return seed in self.finished(arm) and all(self.measured(arm, seed, what) for what in part.measured)

    def values(self, arm: str, column: str) -> dict[int, float]:
        """Return seed -> value, for finished runs. column: a key of the summary, or "what/row" of a measurement: a loss
        under one way of routing, or the probe's information in nats."""
        numbers = {seed: self._number(arm, seed, column) for seed in self.finished(arm)}
        return {seed: float(x) for seed, x in numbers.items() if x is not None}

    def _number(self, arm: str, seed: int, column: str) -> float | None:
        what, _, row = column.partition("/")
        if not row:
            summary = self.finished(arm)[seed]
            return (summary | (summary.get("routing") or {})).get(column)
        rows = [each for found in self.measured(arm, seed, what)[:1] for each in found["rows"]]
        if what == "losses":
            return next((each["loss"] for each in rows if each["way"] == row), None)
        # Of the probe: only its last condition separates a leak from honest prediction.
        bits = {each["routing"]: each["bits"] for each in rows if each["given"] == rows[-1]["given"]}
        return bits[row] * math.log(2) if row in bits else None

    def measured(self, arm: str, seed: int, what: str) -> list[dict[str, Any]]:
        """Return a run's stored results of the measurements called `what`, such as one for each task; empty if any is missing."""
        found = self._of_each(partial(measure, train=False), arm, seed, what)
        return [] if None in found else found

    def as_measured(self, arm: str, seed: int, what: str) -> list[dict[str, Any]]:
        """Return a run's summary as of each of these measurements: with the device and the code that computed it."""
        return [one for one in self._of_each(as_measured, arm, seed, what) if one]

    def _of_each(self, read: Callable[..., Any], arm: str, seed: int, what: str) -> list[Any]:
        result, asked = Result(self.summaries(arm)[seed]), self.planned[arm][seed].measures
        return [read(result, how, scale=self.scale, keep=True) for how in asked if how.what == what]

    def right(self, arm: str, of: str) -> dict[int, list[np.ndarray]]:
        """Return seed -> for each task, (N,): 1 for a validation example predicted correctly, else 0. of: "accuracy" or
        "accuracy_causal"; " - key" subtracts that number of the task's row, such as the majority's share."""
        which, _, less = of.partition(" - ")
        key = {"accuracy": "right", "accuracy_causal": "right_causal"}[which]

        def right(task: Mapping[str, Any]) -> np.ndarray:
            (row,) = task["rows"]
            packed = np.frombuffer(base64.b64decode(task[key]), np.uint8)
            return np.unpackbits(packed, count=row["validation"]) - (row[less] if less else 0.0)

        tasks = {seed: self.measured(arm, seed, "fine-tuned") for seed in self.finished(arm)}
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

        return estimate.of_values(map(operator.truediv, best(a), best(b)), Unit.RATIO, "turn")

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
        # A row per seed, a column per arm: the sum of the part's signed terms.
        of = {arm: sum(sign * pd.Series(self.values(arm, what)) for sign, what in part.terms) for arm in part.arms}
        sums = pd.DataFrame(of)
        if part.how == "spread":
            return estimate.spread_ratio(*(sums[arm].dropna() for arm in part.arms))
        sums = sums.dropna().sort_index()
        a, b = (sums[list(arms)].to_numpy() for arms in (part.a, part.b))
        if part.how == "difference":
            of_arms = partial(estimate.slope, over=part.over) if part.over else np.mean
            pairs = ((of_arms(x), of_arms(y) if part.b else 0.0) for x, y in zip(a, b, strict=True))
            return estimate.of_values((x - y for x, y in pairs), part.unit)
        # The share of the steps at which a reaches b's loss; for "time", multiplied by the ratio of their step times.
        takes = self.step_time(part.a[-1], part.b[0]) if part.how == "time" else 1.0
        shares = (estimate.share_of_steps(x, part.over, y) for x, (y,) in zip(a, b, strict=True))
        return estimate.of_values((takes * share for share in shares), Unit.RATIO)
