"""Made-up evidence whose truth is known."""

import math
from types import SimpleNamespace

import numpy as np

from ecmoe.config import RunConfig
from ecmoe.study.estimate import of_values
from ecmoe.study.evidence import Evidence
from ecmoe.study.protocol import find_claim
from ecmoe.study.units import Unit
from ecmoe.study.verdict import of_evidence

NOISE = np.array([-1.0, 0.3, 0.7, 0.0])  # of four seeds, around 0


def seeds(mean, noise=0.0004, n=4):
    return dict(enumerate(mean + noise * (NOISE[:n] - NOISE[:n].mean())))


class Known(Evidence):
    """Evidence that is made up: arm -> column -> seed -> number."""

    def __init__(self, numbers, scale="gpu", page="", **more):
        measures = [SimpleNamespace(what=what) for what in ("losses", "next-token", "fine-tuned")]
        run = SimpleNamespace(pages=(page,), measures=measures)
        super().__init__(scale, page, {arm: dict.fromkeys(range(4), run) for arm in numbers})
        self.numbers, self.more = numbers, more

    def config(self, arm):
        return RunConfig()

    def summaries(self, arm):
        columns = self.numbers.get(arm, {})
        ran = sorted(set().union(*columns.values())) if columns else []
        config = self.config(arm)
        common = {
            "device": "H100",
            "code": "c0de",
            "config": {"router": arm.split()[0], "data": "stdlib"},
        } | self.more.get("summary", {})
        common["tokens"] = config.steps * config.tokens_per_batch
        return {s: {"name": f"{arm} {s}", "seed": s, "status": "finished"} | common for s in ran}

    def measured(self, arm, seed, what):
        return [True]

    def as_measured(self, arm, seed, what):
        return [self.summaries(arm)[seed]]

    def values(self, arm, column):
        return self.numbers.get(arm, {}).get(column, {})

    def step_ratio(self, a, b, routing):
        return of_values(self.more.get("bench", {}).get(routing, []), Unit.RATIO, "turn")

    def step_time(self, a, b):
        return self.more.get("step_time", math.nan)

    def right(self, arm, of):
        return self.numbers.get(arm, {}).get(of, {})


def losses(**by_arm):
    """Arms whose causal, trained and training losses are all the same."""
    return {arm: dict.fromkeys(("val_loss", "val_loss_causal", "train_loss"), of) for arm, of in by_arm.items()}


def judged(id, numbers, **more):
    about = find_claim(id)
    return of_evidence(about, Known(numbers, page=about.page, **more))


HALF, THREE = "EC-CF2 renormalized, 1/2 of the steps", "EC-CF2 renormalized, 3/4 of the steps"


CENTRE = {
    "EC-CF2 renormalized": seeds(3.600), THREE: seeds(3.640), HALF: seeds(3.700), "EC-CF2 raw": seeds(3.605),
    "EC-CF2 raw, 1/2 of the steps": seeds(3.705), "GShard top-2 renormalized": seeds(3.601), "GShard top-2 raw": seeds(3.606),
    "Switch top-1": seeds(3.650), "Dense": seeds(3.660), "Dense equal FLOPs": seeds(3.640),
}  # fmt: skip
