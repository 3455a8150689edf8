"""The answer in words says what the verdicts say, and no more."""

import pytest

from ecmoe import paths
from ecmoe.files import write_json
from ecmoe.study.answer import answer
from ecmoe.study.protocol import find_claim, protocol
from ecmoe.study.verdict import of_evidence
from tests.study.known import CENTRE, Known, losses, seeds


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("ECMOE_HOME", str(tmp_path))


def verdicts(numbers, scale="gpu", **more):
    return {
        id: of_evidence(find_claim(id), Known(numbers, scale, find_claim(id).page, **more)) for id in protocol().claims
    }


def test_three_sentences_from_the_verdicts_and_the_cost(home):
    numbers = losses(**CENTRE, **{"EC-CAP2 renormalized": seeds(3.62), "EC-CAP3 renormalized": seeds(3.601)})
    found = answer("gpu", verdicts(numbers, bench={"even": [1.08, 1.081, 1.079]}, step_time=1.1))
    holds, does_not, choice = found.sentences
    assert holds == (
        "Of the paper's 12 claims 5 were run so far, at 4 layers of width 64, 8 experts, trained on 0 million tokens: 2 hold (C5: a cap of 2 experts "
        "costs quality; C9: EC beats dense models, and sooner), and 1 holds in direction, but not by as much "
        "(C2: a GShard step takes 20% longer)."
    )
    assert does_not.startswith(
        "1 is contradicted, at least in part (C1: EC-CF2 needs half of GShard's steps, and both beat Switch); "
    )
    assert "7 are not run yet (C3, " in does_not
    assert choice.startswith(
        "For a choice of router: with renormalized gates, EC-CF2 ends 0.001 nats below GShard top-2 after as many"
    )
    assert "a GShard top-2 step takes 1.08 times the time of an EC-CF2 step" in choice and choice.endswith(".")
    assert found.cost == "`make reproduce SCALE=gpu` runs it."


def test_the_cost_is_that_of_all_records(home):
    for i, device in enumerate(["NVIDIA H200", "NVIDIA H100", "NVIDIA H100", None]):
        seconds = 1800 if device else None  # of one nothing is known
        write_json(paths.records("gpu") / f"{i}.json", {"summary": {"seconds": seconds, "device": device}})
    assert answer("gpu", verdicts({})).cost == (
        "All 4 runs took 1.5 hours of training on NVIDIA H100, NVIDIA H200; `make reproduce SCALE=gpu` loads them and "
        "trains what is missing."
    )


def test_what_says_nothing_is_said_to(home):
    assert answer("gpu", verdicts({})).sentences == ("Nothing was run yet.",)
    (plumbing,) = answer("smoke", verdicts(losses(**CENTRE), "smoke")).sentences
    assert "says nothing about the paper" in plumbing
