"""Verdicts of synthetic evidence whose truth is known: every rule, every label, Holm, and the words."""

import base64
import math

import numpy as np
import pytest

from ecmoe import paths
from ecmoe.config import SCHEMA, RunConfig
from ecmoe.files import write_json
from ecmoe.measures import measure
from ecmoe.study import estimate, speed
from ecmoe.study.estimate import Unit, of_values
from ecmoe.study.evidence import Evidence
from ecmoe.study.plan import plan, record
from ecmoe.study.protocol import Claim, Part, find_claim, protocol
from ecmoe.study.verdict import (
    CONTRADICTED,
    IN_DIRECTION,
    NO_EFFECT,
    NOT_RUN,
    PLUMBING,
    REPRODUCED,
    UNDECIDED,
    holm,
    judge,
    judge_all,
    label_of,
    of_evidence,
    weakest,
)
from ecmoe.training.result import Result, write_record

NOISE = np.array([-1.0, 0.3, 0.7, 0.0])  # of four seeds, around 0


def seeds(mean, noise=0.0004, n=4):
    return dict(enumerate(mean + noise * (NOISE[:n] - NOISE[:n].mean())))


class Known(Evidence):
    """Evidence that is made up: arm -> column -> seed -> number."""

    def __init__(self, numbers, scale="gpu", page="", **more):
        super().__init__(scale, page)
        self.numbers, self.more = numbers, more

    @property
    def planned(self):
        return {arm: {seed: None for seed in range(4)} for arm in self.numbers}

    def config(self, arm):
        return RunConfig()

    def summaries(self, arm):
        columns = self.numbers.get(arm, {})
        ran = sorted(set().union(*columns.values())) if columns else []
        common = {"device": "H100", "code": "c0de", "config": {"router": arm.split()[0]}} | self.more.get("summary", {})
        return {s: {"name": f"{arm} {s}", "seed": s, "status": "finished"} | common for s in ran}

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


def part(says="below", *, ratio=False, **keys):
    keys = {"margin": 0.02 if ratio else 0.005, "neutral": 1.0 if ratio else 0.0} | keys
    return Part("x", ("a",), says, "{size}", "val_loss", ("b",), how="steps" if ratio else "difference", **keys)


def between(low, high, n=4, unit=Unit.NATS, level=0.95):
    """An estimate whose interval at that level is this."""
    low, high = unit.inner(low), unit.inner(high)
    from scipy.stats import t

    error = (high - low) / 2 / t.ppf((1 + level) / 2, n - 1)
    return estimate.Estimate((low + high) / 2, ((error, n - 1),), n, unit)


# Rules


@pytest.mark.parametrize(
    "rule, low, high, label",
    [
        (part("below"), -0.030, -0.010, REPRODUCED),
        (part("below"), -0.030, -0.002, IN_DIRECTION),  # below, but perhaps by less than counts
        (part("below"), -0.0049, -0.001, NO_EFFECT),  # below, and by less than counts for sure
        (part("below"), -0.004, 0.004, NO_EFFECT),
        (part("below"), -0.010, 0.002, UNDECIDED),
        (part("below"), -0.002, 0.010, UNDECIDED),
        (part("below"), 0.001, 0.010, CONTRADICTED),
        (part("below"), 0.010, 0.030, CONTRADICTED),
        (part("above"), 0.010, 0.030, REPRODUCED),
        (part("above"), 0.001, 0.030, IN_DIRECTION),
        (part("above"), -0.030, -0.010, CONTRADICTED),
        # At or below: level will do.
        (part("at or below"), -0.030, -0.010, REPRODUCED),
        (part("at or below"), -0.004, 0.004, REPRODUCED),
        (part("at or below"), -0.030, 0.0051, UNDECIDED),
        (part("at or below"), 0.001, 0.010, UNDECIDED),
        (part("at or below"), 0.006, 0.010, CONTRADICTED),
        # The paper's figure: the ratio of steps is below 0.5, that of step times above 1.2.
        (part("below", ratio=True, figure=0.5), 0.30, 0.45, REPRODUCED),
        (part("below", ratio=True, figure=0.5), 0.40, 0.60, IN_DIRECTION),
        (part("below", ratio=True, figure=0.5), 0.40, 1.10, UNDECIDED),
        (part("below", ratio=True, figure=0.5), 0.985, 1.015, NO_EFFECT),
        (part("below", ratio=True, figure=0.5), 1.03, 1.30, CONTRADICTED),
        (part("above", ratio=True, figure=1.2), 1.21, 1.30, REPRODUCED),
        (part("above", ratio=True, figure=1.2), 1.05, 1.30, IN_DIRECTION),
        (part("above", ratio=True, figure=1.2), 0.90, 0.95, CONTRADICTED),
        # Near the paper's share.
        (part("near", figure=0.23, margin=0.05), 0.21, 0.25, REPRODUCED),
        (part("near", figure=0.23, margin=0.05), 0.15, 0.25, UNDECIDED),
        (part("near", figure=0.23, margin=0.05), 0.29, 0.35, CONTRADICTED),
        (part("above", neutral=0.5, margin=0.02), 0.55, 0.60, REPRODUCED),
        (part("above", neutral=0.5, margin=0.02), 0.49, 0.51, NO_EFFECT),
    ],
)  # fmt: skip
def test_every_rule(rule, low, high, label):
    assert label_of(rule, between(low, high, unit=rule.unit), 0.95) == label


def test_fewer_than_three_seeds_give_no_verdict():
    assert label_of(part(), of_values([-1.0, -1.001]), 0.95) == UNDECIDED
    assert label_of(part(), of_values([-1.0, -1.001, -1.002]), 0.95) == REPRODUCED
    assert label_of(part(), of_values([-1.0]), 0.95) == UNDECIDED and label_of(part(), of_values([]), 0.95) == NOT_RUN
    assert label_of(part(ratio=True), of_values([0.1, 0.11], Unit.RATIO, "turn"), 0.95) == REPRODUCED  # no seeds


@pytest.mark.parametrize(
    "labels, label",
    [
        ([REPRODUCED, REPRODUCED], REPRODUCED),
        ([REPRODUCED, IN_DIRECTION], IN_DIRECTION),
        ([REPRODUCED, UNDECIDED, IN_DIRECTION], UNDECIDED),
        ([REPRODUCED, UNDECIDED, NO_EFFECT], NO_EFFECT),
        ([NO_EFFECT, CONTRADICTED, NOT_RUN], CONTRADICTED),
        ([REPRODUCED, NOT_RUN], UNDECIDED),
        ([NOT_RUN, NOT_RUN], NOT_RUN),
    ],
)
def test_a_claim_is_as_good_as_its_weakest_part(labels, label):
    assert weakest(labels) == weakest(labels[::-1]) == label


# Holm


def test_holm_goes_from_the_surest_to_the_first_undecided():
    cases = [(part(), between(-0.02 - w, -0.02 + w)) for w in (0.001, 0.019, 0.03, 0.0155)]
    levels = holm(cases)
    assert levels == pytest.approx([1 - 0.05 / 4, 1 - 0.05 / 3, 1 - 0.05 / 3, 1 - 0.05 / 3])
    labels = [label_of(*case, level) for case, level in zip(cases, levels, strict=True)]
    assert labels == [REPRODUCED, UNDECIDED, UNDECIDED, UNDECIDED]  # at 95% two more would be on their side of 0
    assert [label_of(*case, 0.95) for case in cases].count(UNDECIDED) == 1
    easy = [(part(), between(-0.0205, -0.0195))] * 3
    assert sorted(holm(easy)) == pytest.approx([0.95, 1 - 0.05 / 2, 1 - 0.05 / 3])
    assert holm([(part(), of_values([])), easy[0]]) == pytest.approx([0.95, 0.975])  # what did not run counts, too
    assert holm([]) == []


def test_a_family_without_any_effect_is_wrong_as_seldom_as_the_protocol_says():
    """All true effects lie on the margin, where "no effect" would be as wrong as "reproduced"."""
    rng, wrong = np.random.default_rng(0), 0
    for _ in range(150):
        cases = [(part(), of_values(rng.normal(0.0, 0.05, 3))) for _ in range(4)]
        labels = [label_of(*case, level) for case, level in zip(cases, holm(cases), strict=True)]
        wrong += any(label in (REPRODUCED, IN_DIRECTION, CONTRADICTED) for label in labels)
    assert wrong / 150 < 0.09


# Claims


HALF, THREE = "EC-CF2 renormalized, 1/2 of the steps", "EC-CF2 renormalized, 3/4 of the steps"
CENTRE = {
    "EC-CF2 renormalized": seeds(3.600), THREE: seeds(3.640), HALF: seeds(3.700), "EC-CF2 raw": seeds(3.605),
    "EC-CF2 raw, 1/2 of the steps": seeds(3.705), "GShard top-2 renormalized": seeds(3.601), "GShard top-2 raw": seeds(3.606),
    "Switch top-1": seeds(3.650), "Dense": seeds(3.660), "Dense equal FLOPs": seeds(3.640),
}  # fmt: skip


def test_c1_half_the_steps_are_too_few():
    found = judged("C1", losses(**CENTRE))
    assert found.label == CONTRADICTED and found.claim == "C1" and len(found.deciding) == 4
    labels = {p.name: p.label for p in found.parts}
    assert labels["half the steps, renormalized gates"] == CONTRADICTED
    assert labels["all steps, renormalized gates"] == NO_EFFECT and labels["EC-CF2 against Switch top-1"] == REPRODUCED
    assert found.sentence == (
        "With renormalized gates, EC-CF2 after half the steps ends 0.099 nats above GShard top-2 after all of them "
        "(0.099 to 0.099; 4 seeds). The claim's 4 parts: 2 reproduced, 2 contradicted."
    )
    steps = next(p for p in found.parts if p.name.startswith("steps for"))
    assert steps.unit is Unit.RATIO and 0.98 < steps.estimate < 1.0 and not steps.decides


def test_an_interval_is_told_towards_the_side_that_is_named():
    wide = losses(**CENTRE | {"EC-CF2 renormalized": seeds(3.600, 0.003)})
    part = next(p for p in judged("C1", wide).parts if p.name == "EC-CF2 against Switch top-1")
    assert part.estimate == pytest.approx(-0.05) and -0.058 < part.low < -0.052
    low, high = -part.high, -part.low
    assert f"ends 0.050 nats below Switch top-1 ({low:.3f} to {high:.3f}; 4 seeds)" in part.sentence


def test_c1_is_reproduced_where_half_the_steps_do():
    fast = CENTRE | {HALF: seeds(3.601), "EC-CF2 raw, 1/2 of the steps": seeds(3.603)}
    assert judged("C1", losses(**fast)).label == REPRODUCED


def test_c1_is_reproduced_in_direction_where_fewer_steps_do_but_not_half():
    """At equal steps EC is below, so it gets there sooner; half the steps are too few."""
    better = CENTRE | {"GShard top-2 renormalized": seeds(3.63), "GShard top-2 raw": seeds(3.63)}
    found = judged("C1", losses(**better))
    assert found.label == IN_DIRECTION
    assert {p.label for p in found.deciding} == {IN_DIRECTION, REPRODUCED}
    assert "after half the steps ends 0.070 nats above GShard top-2 after all of them" in found.sentence
    assert (
        ", but fewer steps than all suffice: with renormalized gates, EC-CF2 ends 0.030 nats below GShard top-2 after "
        "as many steps" in found.sentence
    )
    assert found.sentence.endswith("The claim's 4 parts: 2 reproduced, 2 reproduced in direction.")
    assert found.deciding[0].rule.endswith(
        "; in direction if fewer steps than all suffice (\u201call steps, renormalized gates\u201d)"
    )
    one_gate = better | {"GShard top-2 raw": seeds(3.60)}
    assert judged("C1", losses(**one_gate)).label == CONTRADICTED  # both gates count


@pytest.mark.parametrize("ran", [0, 1, 2])
def test_half_the_steps_are_undecided_until_all_of_them_ran(ran):
    """As many steps may put half of them in direction: until they are judged, nothing is contradicted."""
    better = CENTRE | {"GShard top-2 renormalized": seeds(3.63), "GShard top-2 raw": seeds(3.63)}
    found = judged("C1", losses(**better | {"EC-CF2 raw": dict(list(seeds(3.605).items())[:ran])}))
    half = found.deciding[1]
    assert half.name == "half the steps, raw gates" and half.label == UNDECIDED == found.label and found.lacks
    assert (
        "after all of them (0.075 to 0.075; 4 seeds); open is whether fewer steps than all suffice: " in half.sentence
    )
    fast = better | {"EC-CF2 raw, 1/2 of the steps": seeds(3.620)}
    assert judged("C1", losses(**fast)).deciding[1].label == REPRODUCED  # needs no other


def test_c2_is_a_ratio_over_turns():
    assert judged("C2", {}, bench={"even": [1.25, 1.26, 1.24]}).label == REPRODUCED
    found = judged("C2", {}, bench={"even": [1.08, 1.081, 1.079]})
    assert found.label == IN_DIRECTION
    assert found.sentence == (
        "A GShard top-2 step takes 1.08 times the time of an EC-CF2 step (1.078 to 1.082; 3 turns); the paper: 1.2 times."
    )
    level = judged("C2", {}, bench={"even": [1.001, 1.002, 1.0]})
    assert level.label == NO_EFFECT and level.sentence.endswith("which counts as equal (by 2% or less).")
    assert str(found.rests_on) == "3 turns of training steps of one model, on an unknown device"
    assert judged("C2", {}).label == NOT_RUN and judged("C2", {}).sentence == "Not run yet."


def experts(ec, gshard, noise=0.0003):
    """Loss at 16 experts, and what a doubling adds."""
    return {
        f"{arm} renormalized, {16 * 2**i} experts": seeds(start + i * step, noise)
        for arm, (start, step) in {"EC-CF2": ec, "GShard top-2": gshard}.items()
        for i in range(4)
    }


def test_c3_is_one_trend_and_one_mean():
    assert judged("C3", losses(**experts((3.70, -0.02), (3.72, -0.02)))).label == REPRODUCED
    found = judged("C3", losses(**experts((3.70, -0.02), (3.70, -0.019))))
    assert [p.label for p in found.deciding] == [REPRODUCED, NO_EFFECT] and found.label == NO_EFFECT
    trend = found.parts[0]
    assert trend.estimate == pytest.approx(-0.02) and "lowers EC-CF2's loss by 0.020 nats" in trend.sentence
    beyond = next(p for p in found.parts if "beyond" in p.name)
    assert beyond.estimate == pytest.approx(-0.001)
    assert judged("C3", losses(**experts((3.70, 0.02), (3.80, 0.02)))).label == CONTRADICTED


def test_c3_needs_all_numbers_of_experts_of_a_seed():
    numbers = experts((3.70, -0.02), (3.72, -0.02))
    del numbers["EC-CF2 renormalized, 32 experts"][0], numbers["EC-CF2 renormalized, 32 experts"][3]
    found = judged("C3", losses(**numbers))
    assert found.label == UNDECIDED and found.parts[0].seeds == 2
    assert "a verdict needs 3 seeds" in found.parts[0].sentence
    assert found.sentence.endswith("The claim's 2 parts: 2 undecided.")
    assert found.parts[0].missing == ("EC-CF2 renormalized, 32 experts s0", "EC-CF2 renormalized, 32 experts s3")


def right(share, seeds=3, examples=(400, 800), seed=0):
    """Seed -> for each task, which examples are right: harder ones are so for all seeds."""
    rng = np.random.default_rng(seed)
    hard = [rng.random(n) for n in examples]
    return {s: [(h + rng.normal(0, 0.02, len(h)) < share).astype(float) for h in hard] for s in range(seeds)}


def test_c4_counts_seeds_and_examples():
    def arms(ec):
        of = {"EC-CF2 renormalized": ec, "GShard top-2 renormalized": 0.70, "Switch top-1": 0.68, "Dense": 0.69}
        return {
            arm: {"accuracy": right(share), "accuracy_causal": right(share), "val_loss": {s: 3.0 for s in range(3)}}
            for arm, share in of.items()
        }

    found = judged("C4", arms(0.75))
    assert found.label == REPRODUCED and found.parts[0].unit is Unit.SHARE
    assert found.parts[0].estimate == pytest.approx(0.05, abs=0.02) and " points above" in found.parts[0].sentence
    assert judged("C4", arms(0.65)).label == CONTRADICTED


def test_c5_and_c6_compare_losses():
    caps = {
        "EC-CAP2 renormalized": seeds(3.62),
        "EC-CAP3 renormalized": seeds(3.601),
        "EC-CF2 renormalized": seeds(3.60),
    }
    found = judged("C5", losses(**caps))
    assert found.label == REPRODUCED and [p.label for p in found.parts] == [REPRODUCED, REPRODUCED, NO_EFFECT, NOT_RUN]
    assert judged("C5", losses(**caps | {"EC-CAP2 renormalized": seeds(3.602)})).label == NO_EFFECT
    hash_routing = {
        "Hash modulo": seeds(3.64, 0.004), "Hash balanced": seeds(3.60), "EC-CF2 renormalized": seeds(3.60),
        "EC-CF1 renormalized": seeds(3.66),
    }  # fmt: skip
    found = judged("C6", losses(**hash_routing))
    assert found.label == REPRODUCED  # modulo decides
    labels = {p.name: p.label for p in found.parts}
    assert labels["a balanced table against EC-CF2"] == NO_EFFECT
    assert labels["modulo against EC-CF1, at equal compute"] == CONTRADICTED
    spread = next(p for p in found.parts if p.name == "spread over seeds")
    assert spread.estimate == pytest.approx(10) and spread.label == REPRODUCED


def shares(*of):
    return {"EC-CF2 renormalized": {f"share_{j}": seeds(share, 0.001) for j, share in enumerate(of)}}


def test_c7_compares_shares():
    found = judged("C7", shares(0.06, 0.40, 0.30, 0.14, 0.08, 0.01, 0.01, 0.0, 0.0))
    assert found.label == REPRODUCED and "22% of the tokens go to three or four" in found.parts[1].sentence
    assert found.parts[0].rule == "above 50% by more than 2.0 points, which counts as equal"
    spread_out = judged("C7", shares(0.30, 0.20, 0.15, 0.10, 0.10, 0.05, 0.05, 0.03, 0.02))
    assert spread_out.label == CONTRADICTED
    assert [p.label for p in spread_out.deciding] == [CONTRADICTED, REPRODUCED, CONTRADICTED]


def test_c8_is_judged_by_training_loss():
    order = {"EC-CF2 raw": 3.60, "EC-CF1 raw": 3.62, "EC-CF0.5 raw": 3.64, "Switch top-1": 3.66}
    numbers = losses(**{arm: seeds(loss) for arm, loss in order.items()})
    assert judged("C8", numbers).label == REPRODUCED
    numbers["EC-CF0.5 raw"]["train_loss"] = seeds(3.70)
    found = judged("C8", numbers)
    assert (
        found.label == CONTRADICTED and "EC-CF0.5's training loss is 0.040 nats above Switch top-1's" in found.sentence
    )
    assert found.sentence.endswith("The claim's 4 parts: 3 reproduced, 1 contradicted.")
    beside = next(p for p in found.parts if p.name == "CF0.5 against Switch top-1, causal validation loss")
    assert beside.label == REPRODUCED and beside.level == 0.95


def test_c9_takes_time_from_steps_and_what_a_step_takes():
    found = judged("C9", losses(**CENTRE), step_time=1.1)
    equal = next(p for p in found.parts if p.name.startswith("time to the loss of the twin of equal FLOPs"))
    assert equal.estimate == pytest.approx(0.75 * 1.1, rel=1e-3)  # the twin's loss is that of 3/4 of the steps
    assert found.label == REPRODUCED
    assert judged("C9", losses(**CENTRE), step_time=1.5).label == CONTRADICTED  # 3/4 of the steps, at 1.5 times each
    assert judged("C9", losses(**CENTRE)).label == UNDECIDED  # no step was timed


def test_c10_asks_what_the_loss_leaves():
    names = ["GShard top-2 renormalized", "GShard top-2 renormalized, no auxiliary loss"]
    found = judged("C10", {name: {"over_capacity": seeds(x, 0.01)} for name, x in zip(names, (0.35, 2.0), strict=True)})
    assert found.label == REPRODUCED and "asked for 35% more than an equal share" in found.sentence
    low = judged("C10", {name: {"over_capacity": seeds(x, 0.01)} for name, x in zip(names, (0.1, 2.0), strict=True)})
    assert low.label == IN_DIRECTION and "the paper: 20%" in low.sentence


def test_l1_and_l2_compare_ways_to_route():
    def routed(trained, causal):
        return {"val_loss": seeds(trained), "val_loss_causal": seeds(causal)}

    arms = {
        "EC-CF2 renormalized": routed(3.60, 3.62), "EC-CF2 renormalized, pool sequence": routed(3.55, 3.66),
        "EC-CF2 renormalized, pool position": routed(3.61, 3.61),
    }  # fmt: skip
    found = judged("L1", arms)
    assert found.label == REPRODUCED and found.parts[2].estimate == pytest.approx(0.11)
    arms["EC-CF2 renormalized"] = routed(3.60, 3.59)
    found = judged("L1", arms)
    assert found.label == CONTRADICTED
    assert found.sentence.startswith("Routed causally, a model trained on the batch as its pool gains 0.010 nats (")
    ways = {"losses/as trained": 3.60, "losses/sequence": 3.65, "losses/global top-k": 3.62, "losses/causally": 3.61}
    found = judged("L2", {"EC-CF2 renormalized": {way: seeds(loss) for way, loss in ways.items()}})
    assert found.label == REPRODUCED and [round(p.estimate, 3) for p in found.parts] == [0.05, 0.03, 0.04]


# What stands beside the label


def test_smoke_shows_that_everything_runs_and_gives_no_verdict():
    found = judged("C1", losses(**CENTRE), scale="smoke")
    assert found.label == PLUMBING and "says nothing about the claim" in found.sentence
    assert {p.label for p in found.parts} == {PLUMBING, NOT_RUN}


def test_a_verdict_says_what_it_rests_on_and_what_is_mixed():
    found = judged("C5", losses(**{"EC-CAP2 renormalized": seeds(3.62), "EC-CF2 renormalized": seeds(3.6)}))
    assert found.rests_on.runs == 8 and found.rests_on.seeds == (0, 1, 2, 3) and not found.rests_on.mixed
    assert found.rests_on.cards == ("H100",)
    assert "8 experts" in found.rests_on.size and "H100" in str(found.rests_on)
    assert found.command == "ecmoe runs 04_capped_experts --scale gpu --train"
    assert found.label == UNDECIDED and found.sentence.endswith("The claim's 2 parts: 1 reproduced, 1 not run.")


def test_runs_of_two_codes_or_cards_are_marked():
    class Mixed(Known):
        def summaries(self, arm):
            other = {"code": "0ther", "device": "H200"} if arm == "Hash modulo" else {}
            return {seed: summary | other for seed, summary in super().summaries(arm).items()}

    numbers = losses(**{"Hash modulo": seeds(3.7), "EC-CF2 renormalized": seeds(3.6), "Hash balanced": seeds(3.6)})
    found = of_evidence(find_claim("C6"), Mixed(numbers, page="05_other_routers"))
    assert found.parts[0].mixed == ("code", "card") and found.rests_on.mixed == ("card", "code")
    assert next(p for p in found.parts if p.name == "a balanced table against EC-CF2").mixed == ()


def test_a_seed_may_be_trained_elsewhere_than_the_next_but_not_than_its_pair():
    class Elsewhere(Known):
        def summaries(self, arm):
            there = super().summaries(arm)
            return {s: one | {"code": "0ther", "device": "H200"} if s == 0 else one for s, one in there.items()}

    numbers = losses(**{"Hash modulo": seeds(3.7), "EC-CF2 renormalized": seeds(3.6)})
    found = of_evidence(find_claim("C6"), Elsewhere(numbers, page="05_other_routers"))
    assert found.parts[0].mixed == ()
    assert next(p for p in found.parts if p.name == "spread over seeds").mixed == ("code", "card")


def test_another_page_judges_the_parts_whose_arms_it_trains():
    paper_size = {a: CENTRE[a] for a in ("EC-CF2 renormalized", "GShard top-2 renormalized", "Switch top-1", "Dense")}
    found = of_evidence(find_claim("C1"), Known(losses(**paper_size), page="07_fine_tuning"))
    assert [p.name for p in found.deciding] == [
        "EC-CF2 against Switch top-1", "GShard top-2 against Switch top-1", "all steps, renormalized gates",
    ]  # fmt: skip
    assert found.label == NO_EFFECT  # in place of half the steps: as many
    assert of_evidence(find_claim("C2"), Known(losses(**paper_size), page="07_fine_tuning")).parts == ()


def test_an_interval_is_widened_by_the_number_of_parts_and_says_what_it_could_have_seen():
    caps = {"EC-CAP2 renormalized": seeds(3.62), "EC-CAP3 renormalized": seeds(3.6), "EC-CF2 renormalized": seeds(3.6)}
    noisy = losses(**caps)
    noisy["EC-CAP2 renormalized"]["val_loss"] = seeds(3.62, 0.004)
    found = judged("C5", noisy)
    assert sorted(p.level for p in found.deciding) == pytest.approx([0.95, 0.975])
    first = found.parts[0]
    assert first.smallest > (first.high - first.low) / 2 and first.low < first.estimate < first.high


def test_an_undecided_part_says_how_many_seeds_would_decide_it():
    caps = {"EC-CAP2 renormalized": seeds(3.604), "EC-CAP3 renormalized": seeds(3.6), "EC-CF2 renormalized": seeds(3.6)}
    noisy = losses(**caps)
    noisy["EC-CAP2 renormalized"]["val_loss"] = seeds(3.604, 0.01)
    first = judged("C5", noisy).parts[0]
    spread = np.std(list(seeds(0, 0.01 - 0.0004).values()), ddof=1)
    needs = estimate.seeds_needed(spread, 0.005, level=first.level)
    assert first.label == UNDECIDED and first.sentence.endswith(f"which doesn't decide it; {needs} seeds would")


def test_all_claims_can_be_judged_with_nothing_there():
    for id, about in protocol().claims.items():
        found = of_evidence(about, Known({}, page=about.page))
        assert found.claim == id and found.label == NOT_RUN and {p.label for p in found.parts} == {NOT_RUN}
        assert found.rests_on.runs == 0 and str(found.rests_on) == "no run"
    assert isinstance(about, Claim)


# From files


@pytest.fixture
def study(tmp_path, monkeypatch):
    """`study({arm: loss}, page)` keeps a record of every planned run of these arms, as scale gpu's."""
    monkeypatch.setenv("ECMOE_HOME", str(tmp_path))

    def keep(means, page, **more):
        evidence = Evidence("gpu", page, plan("gpu"), find_claim("C1").arms)
        for arm, mean in means.items():
            for seed, one in evidence.planned[arm].items():
                loss = mean + 0.0005 * NOISE[seed]
                summary = {"config": one.config.to_dict(), "name": one.name, "seed": seed, "schema": SCHEMA}
                summary |= {
                    "status": "finished",
                    "error": None,
                    "val_loss": loss,
                    "val_loss_causal": loss,
                    "train_loss": loss,
                }
                summary |= {"steps": one.config.steps, "device": "NVIDIA H100", "code": "abc", "routing": {}} | more
                write_record(record(one, "gpu"), Result(summary))
        return evidence

    return keep


def test_records_are_found_by_the_plan_whichever_page_planned_them(study):
    study(
        {"EC-CAP2 renormalized": 3.62, "EC-CAP3 renormalized": 3.60, "EC-CF2 renormalized": 3.60}, "04_capped_experts"
    )
    found = judge("C5", "gpu")
    assert found.label == REPRODUCED and found.parts[0].seeds == 3
    assert found.rests_on.runs == 10 and found.rests_on.seeds == (0, 1, 2, 3)  # page 01 plans a fourth seed of EC-CF2
    assert str(found.rests_on) == (
        "10 runs of 52 million tokens (seeds 0, 1, 2, 3) of 8 layers of width 512, 64 experts, on NVIDIA H100"
    )
    study({"EC-CF2 renormalized": 3.60, "GShard top-2 renormalized, capacity 1.25": 3.58}, "01_convergence")
    beside = next(p for p in judge("C1", "gpu").parts if p.name == "against top-2 at capacity 1.25")
    assert beside.label == CONTRADICTED and beside.seeds == 3  # an arm of page 02
    assert judge_all("gpu")["C5"] == found and judge("C5", "smoke").label == PLUMBING


def test_a_number_of_the_routing_is_a_number_of_the_run(study):
    arm = "EC-CF2 renormalized"
    evidence = study({arm: 3.6}, "04_capped_experts", routing={"share_1": 0.25})
    assert set(evidence.values(arm, "share_1").values()) == {0.25} and evidence.values(arm, "share_2") == {}


def test_a_run_that_diverged_is_missing_and_said_to_be(study):
    study(
        {"EC-CAP2 renormalized": 3.62, "EC-CAP3 renormalized": 3.60, "EC-CF2 renormalized": 3.60}, "04_capped_experts"
    )
    study({"EC-CAP3 renormalized": 3.60}, "04_capped_experts", status="diverged")  # its last loss counts for nothing
    found = judge("C5", "gpu")
    assert found.label == UNDECIDED and found.parts[1].label == NOT_RUN and found.rests_on.runs == 7
    assert [f"EC-CAP3 renormalized s{seed}" for seed in range(3)] == list(found.parts[1].missing)


def keep_measure(one, how, found):
    measure.write(paths.measures("gpu") / one.name / f"{how.name}.json", one.name, how, found)


def test_measurements_and_benches_are_read_where_the_engine_keeps_them(study):
    arms = dict.fromkeys(("EC-CF2 renormalized", "GShard top-2 renormalized", "Switch top-1", "Dense"), 3.5)
    evidence = study(arms, "07_fine_tuning")
    rng = np.random.default_rng(0)
    for arm in arms:
        for one in evidence.planned[arm].values():
            for how in one.measures:
                bits = (rng.random(200) < (0.8 if arm.startswith("EC") else 0.6)).astype(np.uint8)
                packed = base64.b64encode(np.packbits(bits).tobytes()).decode()
                row = {"validation": 200, "majority": 0.5, "accuracy": bits.mean()}
                keep_measure(one, how, {"rows": [row], "right": packed, "right_causal": packed})
    found = judge("C4", "gpu")
    assert found.label == REPRODUCED and found.parts[0].estimate == pytest.approx(0.2, abs=0.03)
    assert found.parts[4].estimate == pytest.approx(0.3, abs=0.03) and found.rests_on.size.startswith("12 layers")
    assert judge("C1", "gpu", page="07_fine_tuning").label == NO_EFFECT  # the same losses at the paper's size
    one = evidence.planned["Dense"][1]  # of one task it has no causal answers
    keep_measure(one, one.measures[0], {"rows": [row], "right": packed})
    seeds_of = {of: set(evidence.right("Dense", of)) for of in ("accuracy", "accuracy_causal")}
    assert seeds_of == {"accuracy": {0, 1, 2}, "accuracy_causal": {0, 2}}

    losses = {"as trained": 3.60, "sequence": 3.65, "global top-k": 3.62, "causally": 3.61}
    evidence = study({"EC-CF2 renormalized": 3.6}, "09_causality")
    for one in evidence.planned["EC-CF2 renormalized"].values():
        for how in one.measures:
            if how.what == "losses":
                rows = [{"way": way, "loss": loss + 0.001 * one.seed} for way, loss in losses.items()]
                keep_measure(one, how, {"rows": rows})
            if how.what == "next-token":
                told = [("as trained", 0.5), ("causally", 0.1)]
                rows = [
                    {"given": g, "routing": r, "bits": bits * (1 + (g == "unigram"))}
                    for g in ("unigram", "the model")
                    for r, bits in told
                ]
                keep_measure(one, how, {"rows": rows})
    assert judge("L2", "gpu").label == REPRODUCED
    knows = next(
        p for p in judge("L1", "gpu").parts if p.name == "what the routing of the batch knows of the next token"
    )
    assert knows.estimate == pytest.approx(0.4 * math.log(2))  # nats, beyond the model's own prediction

    def step(arm, routing, ms):
        return {"arm": arm, "routing": routing, "ms": ms, "samples_ms": [ms, ms + 0.01, ms - 0.01]}

    rows = [step("EC-CF2", "own", 10.0), step("EC-CF2", "own", 11.0), step("GShard top-2", "even", 11.0)]
    setting = {"layers": 12, "d_model": 768, "num_experts": 64, "device": "NVIDIA H100"}
    rows = [*rows, step("GShard top-2", "own", 9.0)]
    write_json(speed.folder("gpu") / "step.json", {"rows": rows, "setting": setting})
    found = judge("C2", "gpu")
    assert str(found.rests_on) == "3 turns of training steps of 12 layers of width 768, 64 experts, on NVIDIA H100"
    assert found.parts[0].estimate == pytest.approx(1.1, rel=1e-3) and found.parts[1].estimate == pytest.approx(
        0.9, rel=1e-3
    )
    timed = [{"arm": arm, "ms": 10.0 + i} for i, arm in enumerate(speed.study_arms("gpu"))]
    write_json(speed.folder("gpu") / f"{speed.study_file(speed.study_arms('gpu'))}.json", {"rows": timed})
    assert Evidence("gpu", "").step_time(timed[3]["arm"], timed[0]["arm"]) == 1.3
    assert math.isnan(Evidence("gpu", "").step_time("no arm", timed[0]["arm"]))
