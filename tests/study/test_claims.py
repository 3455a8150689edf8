"""Each claim of the protocol, judged on made-up evidence whose truth is known."""

import numpy as np
import pytest

from ecmoe.study.protocol import Claim, protocol
from ecmoe.study.units import Unit
from ecmoe.study.verdict import CONTRADICTED, IN_DIRECTION, NO_EFFECT, NOT_RUN, REPRODUCED, UNDECIDED, of_evidence
from tests.study.known import CENTRE, HALF, Known, judged, losses, seeds


def test_c1_half_the_steps_are_too_few():
    found = judged("C1", losses(**CENTRE))
    assert found.label == CONTRADICTED and found.about.id == "C1" and len(found.deciding) == 4
    labels = {p.name: p.label for p in found.parts}
    assert labels["half the steps, renormalized gates"] == CONTRADICTED
    assert labels["all steps, renormalized gates"] == NO_EFFECT and labels["EC-CF2 against Switch top-1"] == REPRODUCED
    assert found.sentence == (
        "With renormalized gates, EC-CF2 after half the steps ends 0.099 nats above GShard top-2 after all of them "
        "(0.099 to 0.099; 4 seeds). The claim's 4 parts: 2 reproduced, 2 contradicted."
    )
    steps = next(p for p in found.parts if p.name.startswith("steps for"))
    assert steps.unit is Unit.RATIO and 0.98 < steps.effect.value < 1.0 and not steps.decides


def test_an_interval_is_told_towards_the_side_that_is_named():
    wide = losses(**CENTRE | {"EC-CF2 renormalized": seeds(3.600, 0.003)})
    part = next(p for p in judged("C1", wide).parts if p.name == "EC-CF2 against Switch top-1")
    assert part.effect.value == pytest.approx(-0.05) and -0.058 < part.interval[0] < -0.052
    high, low = (-end for end in part.interval)
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
    other = next(part for part in found.parts if part.name == "all steps, raw gates")
    assert half.sentence.endswith(f"suffice: {other.sentence}") and other.label in (UNDECIDED, NOT_RUN)
    fast = better | {"EC-CF2 raw, 1/2 of the steps": seeds(3.620)}
    assert judged("C1", losses(**fast)).deciding[1].label == REPRODUCED  # needs no other


def test_c2_is_a_ratio_over_turns():
    fast = judged("C2", {}, bench={"even": [1.25, 1.26, 1.24]})
    assert fast.label == REPRODUCED and fast.sentence.endswith("of an EC-CF2 step (1.225 to 1.275; 3 turns).")
    found = judged("C2", {}, bench={"even": [1.08, 1.081, 1.079]})
    assert found.label == IN_DIRECTION
    assert found.sentence == (
        "A GShard top-2 step takes 1.080 times the time of an EC-CF2 step (1.078 to 1.082; 3 turns); the paper: 1.2 times."
    )
    two = judged("C2", {}, bench={"even": [1.1, 0.95]})
    assert two.label == UNDECIDED and "which doesn't decide it" in two.sentence and "needs" not in two.sentence
    level = judged("C2", {}, bench={"even": [1.001, 1.002, 1.0]})
    assert level.label == NO_EFFECT and level.sentence.endswith("which counts as equal (by 2% or less).")
    assert str(found.rests_on) == "3 turns of training steps of one model, on an unknown device"
    none = judged("C2", {}, scale="paper")
    assert (none.label, none.sentence, none.command) == (NOT_RUN, "Not run yet.", "ecmoe bench all --scale paper")


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
    assert trend.effect.value == pytest.approx(-0.02) and "lowers EC-CF2's loss by 0.020 nats" in trend.sentence
    beyond = next(p for p in found.parts if "beyond" in p.name)
    assert beyond.effect.value == pytest.approx(-0.001)
    assert judged("C3", losses(**experts((3.70, 0.02), (3.80, 0.02)))).label == CONTRADICTED


def test_c3_needs_all_numbers_of_experts_of_a_seed():
    numbers = experts((3.70, -0.02), (3.72, -0.02))
    del numbers["EC-CF2 renormalized, 32 experts"][0], numbers["EC-CF2 renormalized, 32 experts"][3]
    found = judged("C3", losses(**numbers))
    assert found.label == UNDECIDED and found.parts[0].effect.n == 2
    assert found.parts[0].sentence.startswith("each doubling") and found.parts[0].sentence.endswith(
        "; 2 seeds); a verdict needs 3 seeds"
    )
    assert found.sentence.endswith("The claim's 2 parts: 2 undecided.")
    assert found.parts[0].missing == tuple(("EC-CF2 renormalized, 32 experts", seed) for seed in (0, 3))


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
    assert found.parts[0].effect.value == pytest.approx(0.05, abs=0.02) and " points above" in found.parts[0].sentence
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
    assert spread.effect.value == pytest.approx(10) and spread.label == REPRODUCED
    assert "; 4 seeds)" in spread.sentence
    fewer = judged("C6", losses(**hash_routing | {"Hash modulo": seeds(3.64, 0.004, n=3)}))
    spread = next(p for p in fewer.parts if p.name == "spread over seeds")
    assert "; 3 and 4 seeds)" in spread.sentence  # those of both arms: it pairs none


def test_c6_goes_on_with_what_holds_at_equal_compute():
    hash_routing = {"Hash modulo": seeds(3.64), "EC-CF2 renormalized": seeds(3.60)}
    worse = "Hash routing ends 0.040 nats above EC-CF2 (0.040 to 0.040; 4 seeds)."
    assert judged("C6", losses(**hash_routing)).sentence == worse
    at_equal_compute = {"EC-CF1 renormalized": seeds(3.66), "EC-CF1 raw": seeds(3.65)}
    found = judged("C6", losses(**hash_routing | at_equal_compute))
    then = (
        "At equal compute, hash routing ends 0.020 nats below EC-CF1 with renormalized gates (0.020 to 0.020; 4 seeds)."
    )
    assert found.sentence == f"{worse} {then}" and found.rests_on.runs == 12  # the runs of both sentences
    raw = next(p for p in found.parts if p.name == "modulo against EC-CF1, raw gates")
    assert raw.label == CONTRADICTED and raw.effect.value == pytest.approx(-0.01) and not raw.decides
    assert found.label == REPRODUCED


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
    assert equal.effect.value == pytest.approx(0.75 * 1.1, rel=1e-3)  # the twin's loss is that of 3/4 of the steps
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
    assert found.label == REPRODUCED and found.parts[2].effect.value == pytest.approx(0.11)
    arms["EC-CF2 renormalized"] = routed(3.60, 3.59)
    found = judged("L1", arms)
    assert found.label == CONTRADICTED
    assert found.sentence.startswith(
        "Routed by cut-offs, a model trained with the batch as its pool has a loss 0.010 nats lower than routed as trained ("
    )
    ways = {"losses/as trained": 3.60, "losses/sequence": 3.65, "losses/global top-k": 3.62, "losses/causally": 3.61}
    found = judged("L2", {"EC-CF2 renormalized": {way: seeds(loss) for way, loss in ways.items()}})
    assert found.label == REPRODUCED and [round(p.effect.value, 3) for p in found.parts] == [0.05, 0.03, 0.04]


def test_all_claims_can_be_judged_with_nothing_there():
    for id, about in protocol().claims.items():
        found = of_evidence(about, Known({}, page=about.page))
        assert found.about.id == id and found.label == NOT_RUN and {p.label for p in found.parts} == {NOT_RUN}
        assert found.rests_on.runs == 0 and str(found.rests_on) == "no run"
    assert isinstance(about, Claim)
