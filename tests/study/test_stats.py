"""Statistics against scipy and simulation; verdicts against a table written by hand."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as reference

from ecmoe.study import stats
from ecmoe.study.stats import CLAIMS, Effect, verdict


def numbered(values):
    return dict(enumerate(values))


def test_paired_difference_is_scipys_paired_t_test():
    a, b = [3.70, 3.69, 3.72, 3.71], [3.72, 3.73, 3.73, 3.75]
    effect = stats.paired_difference(numbered(a), numbered(b))
    expected = reference.ttest_rel(a, b).confidence_interval(0.95)
    assert effect.mean == pytest.approx(np.mean(a) - np.mean(b))
    assert (effect.low, effect.high) == pytest.approx((expected.low, expected.high))
    assert effect.n == 4


def test_ratio_effect_is_the_t_interval_of_logarithms():
    a, b = [1.0, 2.2, 3.1], [2.0, 4.0, 7.0]
    effect = stats.ratio_effect(numbered(a), numbered(b))
    expected = reference.ttest_1samp(np.log(np.divide(a, b)), 0).confidence_interval(0.95)
    assert effect.mean == pytest.approx(reference.gmean(np.divide(a, b)))
    assert (effect.low, effect.high) == pytest.approx((math.exp(expected.low), math.exp(expected.high)))
    with pytest.raises(ValueError, match="above 0"):
        stats.interval([-1.0], "ratio")


def test_only_shared_and_finite_seeds_count():
    effect = stats.paired_difference({0: 1.0, 1: 2.0, 5: 9.0}, {0: 0.5, 1: math.nan, 2: 1.0})
    assert effect == Effect(0.5, None, None, 1, "nats per token")
    assert "no interval" in str(effect)
    nothing = stats.paired_difference({0: 1.0}, {1: 1.0})
    assert nothing.n == 0 and math.isnan(nothing.mean) and str(nothing) == "not measured"


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    samples = rng.normal(0.3, 1.0, size=(2000, 3))
    effects = [stats.interval(sample) for sample in samples]
    covered = np.mean([e.low <= 0.3 <= e.high for e in effects])
    assert 0.93 < covered < 0.97  # a normal interval would cover 81%


def test_a_second_look_errs_no_more_than_is_said():
    rng = np.random.default_rng(0)
    samples = rng.normal(0.0, 1.0, size=(4000, 6))

    def fooled(looks):
        ends = []
        for x in samples:
            first, second = stats.interval(x[:3]), stats.interval(x, looks=looks)
            ends.append(
                second if first.low <= 0 <= first.high else first
            )  # seeds are added where the first is undecided
        return np.mean([e.high < 0 for e in ends]), np.mean([e.low > 0 for e in ends])

    assert max(fooled(2)) < 0.0375 and sum(fooled(2)) < 0.075 < sum(fooled(1))


def test_seeds_added_after_a_look_widen_the_interval_and_the_rule_says_so():
    a, b = [3.70, 3.69, 3.72, 3.71], [3.72, 3.73, 3.73, 3.75]
    effect = stats.paired_difference(numbered(a), numbered(b), looks=2)
    expected = reference.ttest_rel(a, b).confidence_interval(0.975)
    assert (effect.low, effect.high) == pytest.approx((expected.low, expected.high))
    assert "(97.5% " in str(effect) and "(97.5% " in str(effect.times(2, "")) and effect.level == 0.975
    assert stats.looks_at(["a", "b"], ["b"]) == 2 and stats.looks_at(["a", "b"], ["c"]) == 1
    rule = verdict(effect).rule
    assert "97.5% interval over paired seeds" in rule and "after a first look" in rule and " 95%" not in rule


def test_smallest_effect_is_found_as_often_as_it_says():
    rng = np.random.default_rng(0)
    for n in (2, 3, 6):
        values = np.linspace(-1, 1, n)
        true = stats.smallest_effect(stats.interval(values)) / values.std(ddof=1)
        samples = rng.normal(true, 1.0, size=(20000, n))
        found = reference.ttest_1samp(samples, 0, axis=1).pvalue < 0.05
        assert found.mean() == pytest.approx(0.8, abs=0.01)
    ratio = stats.interval([0.5, 0.6, 0.7], "ratio")
    logs = stats.interval(np.log([0.5, 0.6, 0.7]))
    assert stats.smallest_effect(ratio) == pytest.approx(math.exp(stats.smallest_effect(logs)))
    assert math.isnan(stats.smallest_effect(stats.interval([1.0])))


def curve(points):
    return pd.DataFrame(points, columns=["step", "val_loss"]).assign(seconds=lambda f: f["step"] * 2)


A = curve([(0, 4.0), (10, 3.0), (20, 2.0), (30, 1.5)])
B = curve([(0, 4.0), (20, 3.0), (40, 2.5)])


def test_steps_to_equal_loss_interpolates_and_censors():
    assert stats.steps_to_equal_loss(A, B) == (15.0, False, 2.5)  # halfway between 10 and 20
    assert stats.steps_to_equal_loss(A, B, x="seconds").x == 30.0
    assert stats.steps_to_equal_loss(B, A) == (None, True, 1.5)  # never: censored, not infinite
    assert stats.steps_to_equal_loss(A, curve([(0, 5.0)])).x == 0.0  # there from the start
    assert stats.steps_to_equal_loss(A, B.assign(val_loss=math.nan)).censored is False


def test_steps_to_equal_loss_takes_the_first_crossing_and_skips_gaps():
    bumpy = curve([(0, 4.0), (10, 2.0), (15, math.nan), (20, 3.0), (30, 1.0)])
    assert stats.steps_to_equal_loss(bumpy, curve([(9, 3.0)])).x == 5.0


def test_steps_ratio_compares_at_the_loss_that_both_reach():
    assert stats.steps_ratio({0: A, 1: A}, {0: B, 1: B}).mean == pytest.approx(15 / 40)
    inverse = stats.steps_ratio({0: B, 1: B, 2: B}, {0: A, 1: A})  # the loser is not left out
    assert inverse.mean == pytest.approx(40 / 15) and inverse.n == 2
    assert stats.steps_ratio({0: A}, {0: B.assign(val_loss=math.nan)}).n == 0


def test_the_ratio_on_the_way_is_that_of_curves_that_are_stretched():
    slow = A.assign(step=A["step"] * 3)
    along = stats.steps_ratio_along({0: A, 1: slow}, {0: slow, 1: A.assign(step=A["step"] * 9)}, points=5)
    assert along["target"].tolist() == pytest.approx(np.linspace(4.0, 1.5, 6)[1:])
    assert along["mean"].tolist() == pytest.approx([1 / 3] * 5) and (along["n"] == 2).all()
    assert along["low"].tolist() == pytest.approx(along["high"].tolist())
    at_end = stats.steps_ratio({0: A}, {0: B}).mean
    assert stats.steps_ratio_along({0: A}, {0: B})["mean"].iloc[-1] == pytest.approx(at_end)
    for nothing in ({}, {0: A.assign(val_loss=math.nan)}):
        assert len(stats.steps_ratio_along(nothing, {0: B})) == 0


def test_steps_become_seconds_by_what_a_step_takes():
    steps = stats.Effect(0.8, 0.7, 0.9, 3, "ratio of steps")
    seconds = steps.times(1.5, "ratio of seconds")
    assert seconds[:3] == pytest.approx((1.2, 1.05, 1.35)) and seconds[3:] == (3, "ratio of seconds", "seed", 1)
    assert stats.Effect(0.8, None, None, 1, "ratio of steps").times(2, "ratio")[:4] == (1.6, None, None, 1)
    for unknown in (steps.times(math.nan, "ratio"), stats.interval([], "ratio").times(2, "ratio")):
        assert unknown.n == 0 and str(unknown) == "not measured"


def effect(low, high, n=3, unit=""):
    return Effect((low + high) / 2, low, high, n, unit)


@pytest.mark.parametrize(
    ("given_effect", "rule", "label"),
    [
        # C1's rule: the ratio of steps is below 0.5
        (effect(0.30, 0.45, unit="ratio"), {"threshold": 0.5}, "reproduced"),
        (effect(0.40, 0.60, unit="ratio"), {"threshold": 0.5}, "reproduced in direction"),
        (effect(0.60, 0.90, unit="ratio"), {"threshold": 0.5}, "reproduced in direction"),
        (effect(0.40, 1.10, unit="ratio"), {"threshold": 0.5}, "undecided"),
        (
            effect(0.98, 1.03, unit="ratio"),
            {"threshold": 0.5},
            "not reproduced",
        ),  # 0.5 it isn't, nor any effect to be seen
        (effect(1.10, 1.30, unit="ratio"), {"threshold": 0.5}, "not reproduced"),
        (effect(0.985, 0.995, unit="ratio"), {"threshold": 0.5, "margin": 0.02}, "not reproduced"),
        # C2's rule: the ratio of step times is above 1.2
        (effect(1.25, 1.30, unit="ratio"), {"threshold": 1.2, "direction": "above"}, "reproduced"),
        (
            effect(1.05, 1.10, unit="ratio"),
            {"threshold": 1.2, "direction": "above"},
            "reproduced in direction",
        ),
        (
            effect(0.90, 0.95, unit="ratio"),
            {"threshold": 1.2, "direction": "above"},
            "not reproduced",
        ),
        # A difference of losses without a printed figure, 0.005 counting as equal
        (effect(-0.030, -0.010), {"margin": 0.005}, "reproduced"),
        (effect(-0.030, -0.002), {"margin": 0.005}, "reproduced in direction"),
        (effect(-0.004, -0.001), {"margin": 0.005}, "not reproduced"),
        (effect(-0.030, 0.001), {"margin": 0.005}, "undecided"),
        (effect(-0.002, 0.002), {"margin": 0.005}, "not reproduced"),
        (effect(-0.010, 0.002), {"margin": 0.005}, "undecided"),
        (effect(-0.002, 0.010), {"margin": 0.005}, "not reproduced"),
        (effect(0.010, 0.030), {"margin": 0.005}, "not reproduced"),
        (effect(0.010, 0.030), {"margin": 0.005, "direction": "above"}, "reproduced"),
        # A share: C7's 23%
        (
            effect(0.21, 0.25),
            {"threshold": 0.23, "margin": 0.05, "direction": "near"},
            "reproduced",
        ),
        (effect(0.15, 0.25), {"threshold": 0.23, "margin": 0.05, "direction": "near"}, "undecided"),
        (
            effect(0.30, 0.35),
            {"threshold": 0.23, "margin": 0.05, "direction": "near"},
            "not reproduced",
        ),
        (effect(-0.01, 0.02), {"threshold": 0.0, "margin": 0.05, "direction": "near"}, "reproduced"),
        # Too few seeds, none, and the scale that shows nothing
        (Effect(-1.0, None, None, 1), {}, "undecided"),
        (Effect(math.nan, None, None, 0), {}, "not run"),
        (effect(0.30, 0.45, unit="ratio"), {"threshold": 0.5, "scale": "smoke"}, "plumbing only"),
    ],
)
def test_verdicts(given_effect, rule, label):
    found = verdict(given_effect, **rule)
    assert found.label == label
    assert found.effect == given_effect and "undecided" in found.rule


@given(
    st.floats(-2, 0), st.floats(0, 2), st.floats(0, 3), st.sampled_from(["below", "above"]),
    st.one_of(st.none(), st.floats(-1, 1)),
)  # fmt: skip
def test_an_interval_that_holds_no_effect_reproduces_nothing(low, high, margin, direction, threshold):
    assert verdict(effect(low, high), threshold, margin, direction).label in ("undecided", "not reproduced")


def test_rules_name_their_figures():
    rule = verdict(effect(0.3, 0.4, unit="ratio"), threshold=0.5).rule
    assert "below 0.5" in rule and "in direction: below 1" in rule and "95%" in rule
    assert "0.005 nats per token" in verdict(effect(0.3, 0.4, unit="nats per token"), margin=0.005).rule
    with pytest.raises(ValueError, match="direction='up'"):
        verdict(effect(0, 1), direction="up")
    with pytest.raises(ValueError, match="near"):
        verdict(effect(0, 1), direction="near")


def test_a_figure_of_the_paper_outside_the_interval_is_named():
    missed = verdict(effect(0.98, 1.06, unit="ratio of steps"), threshold=0.5)
    assert (
        missed.label == "not reproduced" and missed.rule.endswith("misses the paper's 0.5") and missed.rules_out == 0.5
    )
    assert stats.all_of({"a": missed, "b": verdict(effect(0.1, 0.2, unit="ratio"))}).rules_out == 0.5
    assert str(missed.effect).startswith("1.02 x the steps")
    for other in (
        verdict(effect(0.4, 1.1, unit="ratio"), threshold=0.5),
        verdict(effect(0.98, 1.06, unit="ratio"), threshold=0.5, scale="smoke"),
        verdict(effect(1.3, 1.5, unit="ratio"), threshold=1.2, direction="above"),
    ):
        assert "misses" not in other.rule


def test_all_of_is_the_weakest_part():
    good, weak, open_, bad, absent = (
        verdict(e, margin=0.005)
        for e in (
            effect(-2, -1),
            effect(-2, -0.001),
            effect(-1, 1),
            effect(1, 2),
            Effect(math.nan, None, None, 0),
        )
    )
    assert stats.all_of({"a": good, "b": weak}).label == "reproduced in direction"
    assert stats.all_of({"a": good, "b": open_, "c": weak}).label == "undecided"
    assert stats.all_of({"a": absent, "b": absent}).label == "not run"
    partly = stats.all_of({"a": good, "b": absent})
    assert partly.label == "undecided" and partly.rule.endswith("of 2 parts 1 ran")
    assert stats.all_of({"a": good, "b": absent, "c": absent}).label == "not run"
    refuted = stats.all_of({"a": good, "b": bad, "c": absent})
    assert refuted.label == "not reproduced" and refuted.effect == bad.effect
    assert refuted.rule.startswith("the weakest of 3 parts. ") and dict(refuted.parts) == {
        "a": good,
        "b": bad,
        "c": absent,
    }
    assert stats.all_of({"a": verdict(effect(1, 2), scale="smoke")}).label == "plumbing only"
    with pytest.raises(ValueError, match="at least one"):
        stats.all_of({})


def test_every_claim_says_what_would_refute_it():
    assert list(CLAIMS) == [f"C{i}" for i in range(1, 11)] + ["L1", "L2"]
    for name, claim in CLAIMS.items():
        assert claim.id == name and all(claim[:6])
    assert CLAIMS["C5"].proxy and CLAIMS["C6"].proxy
