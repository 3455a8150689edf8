"""Runs that several files draw."""

import pytest

from ecmoe.training.result import not_run
from tests.report.plots.figures import EC, HASH, TOP2, run


@pytest.fixture
def runs():
    """As a study has them: three seeds of two arms, and one that was not run."""
    made = {"EC": (EC, 2.0), "top-2": (TOP2, 2.5)}
    return {arm: [run(c.replace(seed=s), loss + s / 100) for s in range(3)] for arm, (c, loss) in made.items()} | {
        "Hash": [not_run(HASH)]
    }
