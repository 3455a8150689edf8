"""The answer in words says what the verdicts say, and no more."""

from dataclasses import replace

import pytest

from ecmoe import paths
from ecmoe.files import Damaged, write_json
from ecmoe.study.answer import answer, cost
from ecmoe.study.protocol import find_claim, protocol
from ecmoe.study.verdict import (
    CONTRADICTED,
    IN_DIRECTION,
    NO_EFFECT,
    NOT_RUN,
    PLUMBING,
    REPRODUCED,
    UNDECIDED,
    of_evidence,
)
from tests.study.known import CENTRE, Known, judged, losses, seeds


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("ECMOE_HOME", str(tmp_path))


def verdicts(numbers, scale="gpu", **more):
    return {
        id: of_evidence(find_claim(id), Known(numbers, scale, find_claim(id).page, **more)) for id in protocol().claims
    }


def test_three_sentences_from_the_verdicts_and_the_cost(home):
    numbers = losses(**CENTRE, **{"EC-CAP2 renormalized": seeds(3.62), "EC-CAP3 renormalized": seeds(3.601)})
    holds, does_not, choice = answer(verdicts(numbers, bench={"even": [1.08, 1.081, 1.079]}, step_time=1.1))
    assert holds == (
        "Of the paper's 10 claims and 2 limitations, 5 were run so far (4 of them tested on models of 4 layers of width 64, 8 experts, trained on 122,880 tokens): "
        "2 hold (C5: a cap of 2 experts "
        "costs quality; C9: EC beats dense models, and sooner), and 1 holds in direction "
        "(C2: a GShard step takes 20% longer)."
    )
    assert does_not.startswith(
        "1 is contradicted (C1, in 2 of 4 parts: “half the steps, renormalized gates” and “half the steps, raw gates”); "
    )
    assert "7 are not run yet (C3, " in does_not
    assert choice.startswith(
        "For a choice of router: with renormalized gates, EC-CF2 ends 0.001 nats below GShard top-2 after as many"
    )
    assert "). A GShard top-2 step takes 1.080 times the time of an EC-CF2 step" in choice and choice.endswith(".")
    assert cost("gpu") == "`make reproduce SCALE=gpu` runs it."
    untimed = answer(verdicts(numbers))[2]  # names no part that has no number
    assert "with renormalized gates" in untimed and "times the time" not in untimed and "not run" not in untimed


def test_the_cost_is_that_of_all_records(home):
    for i, device in enumerate(["NVIDIA H200", "A", "NVIDIA H100", "B", "NVIDIA H100", "C", None]):
        seconds = 1800 if device else None  # of one nothing is known
        record = {"summary": {"seconds": seconds, "device": device}}
        write_json(path := paths.results("gpu", "runs") / f"{i}.json", record, sealed=True)
    assert cost("gpu") == (
        "All 7 runs took 3.0 hours of training steps on A, B, C, NVIDIA H100, NVIDIA H200; `make reproduce SCALE=gpu` loads them and "
        "trains what is missing."
    )
    path.write_text(path.read_text().replace("null", "7200", 1))
    with pytest.raises(Damaged, match=r"6\.json is damaged .its check sum"):
        cost("gpu")


HASH = "C6: hash routing, one expert per token, is worse than EC-CF2, two on average"
SIZE = "of them tested on models of 4 layers of width 64, 8 experts, trained on 122,880 tokens"


@pytest.mark.parametrize(
    ("labels", "holds", "does_not"),
    [
        ([REPRODUCED], f"1 claim (1 {SIZE}): 1 holds ({HASH}).", "None is contradicted, undecided or without an effect."),
        ([REPRODUCED, REPRODUCED, NOT_RUN], f"3 claims, 2 were run so far (2 {SIZE}): 2 hold ({HASH}; {HASH}).",
         "1 is not run yet (C6)."),
        ([UNDECIDED, NOT_RUN], f"2 claims, 1 was run so far (1 {SIZE}): none holds.", "1 is undecided (C6); 1 is not run yet (C6)."),
        ([IN_DIRECTION, CONTRADICTED, CONTRADICTED, NO_EFFECT],
         f"4 claims (4 {SIZE}): 1 holds in direction ({HASH}).",
         f"2 are contradicted ({HASH}; {HASH}); "
         f"no effect was found for 1 ({HASH})."),
    ],
)  # fmt: skip
def test_one_or_several_claims_of_each_label(home, labels, holds, does_not):
    found = judged("C6", losses(**{"EC-CF2 renormalized": seeds(3.60), "Hash modulo": seeds(3.62)}))
    sentences = answer({str(i): replace(found, label=label) for i, label in enumerate(labels)})
    choice = "No run shows yet what this means for the choice of a router."
    assert sentences == [f"Of the paper's {holds}", does_not[0].upper() + does_not[1:], choice]


def test_a_label_of_some_parts_alone_says_of_how_many(home):
    experts = {
        f"{arm} renormalized, {e} experts": seeds(mean)
        for arm, mean in (("EC-CF2", 3.6), ("GShard top-2", 3.62))
        for e in (16, 32, 64, 128)
    }
    level = judged("C3", losses(**experts))
    assert level.said == "no effect in 1 of 2 parts"
    assert answer({"C3": level})[1] == ("No effect was found for 1 (C3, in 1 of 2 parts: “more experts”).")
    part, *_ = level.parts
    both = replace(
        level, parts=(part, part, *(replace(part, label=label) for label in (REPRODUCED, UNDECIDED, UNDECIDED)))
    )
    assert both.said == "no effect in 2 of 5 parts"
    missing = replace(level, label=UNDECIDED, parts=(part, replace(part, label=NOT_RUN)))
    assert missing.said == UNDECIDED  # whose parts are none of them
    assert (
        replace(level, label=PLUMBING, parts=(replace(part, label=PLUMBING), part)).said == PLUMBING
    )  # it judges none


def test_a_claim_named_for_some_of_its_parts_says_how_many_are_undecided(home):
    def routed(trained, causal, noise=0.0004):
        return {"val_loss": seeds(trained, noise), "val_loss_causal": seeds(causal, noise)}

    arms = {"EC-CF2 renormalized": routed(3.60, 3.59), "EC-CF2 renormalized, pool position": routed(3.61, 3.61)}
    sequence = "EC-CF2 renormalized, pool sequence"
    arms[sequence] = {"val_loss": seeds(3.55), "val_loss_causal": seeds(3.57, 0.04)}
    found = judged("L1", arms)
    assert [part.label for part in found.deciding] == [CONTRADICTED, UNDECIDED, UNDECIDED, UNDECIDED]
    low, high = found.deciding[1].interval
    one = f"\u201cleak of one sequence\u201d: 0.020 nats, {low:.3f} to {high:.3f}"
    named = "1 is contradicted (L1, in 1 of 4 parts: \u201cleak of the batch\u201d, while"
    assert answer({"L1": found})[1] == f"{named} 3 are undecided, such as {one})."
    last = tuple(replace(part, label=REPRODUCED) for part in found.parts[2:])
    assert answer({"L1": replace(found, parts=found.parts[:2] + last)})[1] == f"{named} 1 is undecided, {one})."
    arms[sequence] = {"val_loss": {0: 3.55}, "val_loss_causal": {0: 3.57}}
    assert answer({"L1": judged("L1", arms)})[1].endswith("such as \u201cleak of one sequence\u201d: 0.020 nats).")


def test_what_says_nothing_is_said_to(home):
    assert answer(verdicts({})) == ["Nothing was run yet."]
    (plumbing,) = answer(verdicts(losses(**CENTRE), "smoke"))
    assert "says nothing about the paper" in plumbing


def test_the_size_that_most_claims_share_is_said_with_their_number(home):
    usual = judged("C6", losses(**{"EC-CF2 renormalized": seeds(3.60), "Hash modulo": seeds(3.62)}))
    large = replace(usual, rests_on=replace(usual.rests_on, size="12 layers of width 768, 64 experts"))
    shorter = replace(usual, rests_on=replace(usual.rests_on, tokens=(61_440, 122_880)))
    limit = replace(usual, about=find_claim("L1"))
    timed = replace(usual, rests_on=replace(large.rests_on, runs=0, turns=7))
    first, *_ = answer(dict(enumerate([large, shorter, usual, limit, timed])))
    assert first.startswith(
        f"Of the paper's 4 claims and 1 limitation (3 {SIZE.replace('122', '61,440 to 122')}): 5 hold ("
    )
