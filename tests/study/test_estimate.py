"""Estimates against scipy, closed forms and simulation."""

import dataclasses
import math

import numpy as np
import pytest
from scipy import stats as reference

from ecmoe.study import estimate
from ecmoe.study.estimate import Estimate, of_values
from ecmoe.study.protocol import protocol
from ecmoe.study.units import Unit


def test_an_interval_is_scipys_paired_t_interval():
    a, b = np.array([3.70, 3.69, 3.72, 3.71]), np.array([3.72, 3.73, 3.73, 3.75])
    found = of_values(a - b)
    for level in (0.95, 0.99):
        expected = reference.ttest_rel(a, b).confidence_interval(level)
        assert found.interval(level) == pytest.approx((expected.low, expected.high))
    assert found.value == pytest.approx((a - b).mean()) and found.n == 4 and found.of == "seed"


def test_a_ratio_is_taken_in_the_logarithm():
    x = [0.5, 0.55, 0.44]
    found = of_values(x, Unit.RATIO)
    expected = reference.ttest_1samp(np.log(x), 0).confidence_interval(0.95)
    assert found.value == pytest.approx(reference.gmean(x))
    assert found.interval() == pytest.approx((math.exp(expected.low), math.exp(expected.high)))
    for wrong in (-1.0, 0.0):
        with pytest.raises(ValueError, match=f"above 0, but one is {wrong:g}"):
            of_values([2.0, wrong], Unit.RATIO)


def test_too_few_values_have_no_interval():
    one = of_values([0.5, math.nan, None])
    assert of_values([0.5, 0.6]).interval(least=3) is None and of_values([0.5, 0.6, 0.7]).interval(least=3)
    assert (one.value, one.n, one.interval()) == (0.5, 1, None) and math.isnan(one.smallest(0.95, 0.8))
    assert of_values([]).n == 0 and math.isnan(of_values([]).value)


def test_intervals_cover_the_truth_as_often_as_they_say():
    samples = np.random.default_rng(0).normal(0.3, 1.0, size=(2000, 3))
    for level in (0.95, 0.8):
        ends = [of_values(sample).interval(level) for sample in samples]
        assert np.mean([low <= 0.3 <= high for low, high in ends]) == pytest.approx(level, abs=0.02)


@pytest.mark.parametrize("n", [2, 3, 6])
def test_the_smallest_effect_is_found_as_often_as_it_says(n):
    values = np.linspace(-1, 1, n)
    true = of_values(values).smallest(0.95, 0.8) / values.std(ddof=1)
    samples = np.random.default_rng(0).normal(true, 1.0, size=(20000, n))
    assert (reference.ttest_1samp(samples, 0, axis=1).pvalue < 0.05).mean() == pytest.approx(0.8, abs=0.01)
    ratio, logs = of_values(np.exp(values), Unit.RATIO), of_values(values)
    assert ratio.smallest(0.9, 0.7) == pytest.approx(math.exp(logs.smallest(0.9, 0.7)))


def test_a_slope_is_by_doubling():
    assert estimate.slope([4.0, 3.9, 3.8, 3.7], [16, 32, 64, 128]) == pytest.approx(-0.1)
    assert estimate.slope([4.0, 3.7], [16, 128]) == pytest.approx(-0.1)


def test_a_share_of_steps_lies_between_the_horizons_that_reach_the_loss():
    over = [0.5, 0.75, 1.0]
    law = lambda share: 3 - 0.4 * math.log(share)  # noqa: E731  a loss that falls with the logarithm of the steps
    losses = [law(share) for share in over]
    for share in (0.3, 0.5, 0.6, 0.75, 0.9, 1.0, 1.2):  # between, at, and beyond them
        assert estimate.share_of_steps(losses, over, law(share)) == pytest.approx(share)
    assert all(math.isnan(estimate.share_of_steps([3.0, 3.0, last], over, 2.5)) for last in (3.0, 3.1))
    assert estimate.share_of_steps([3.2, 3.0, 3.1], over, 3.0) == pytest.approx(0.75)  # reached before it rises again
    bent = estimate.share_of_steps([3.4, 3.2, 3.15], over, 3.3)  # in the first of two unlike pieces
    assert bent == pytest.approx(math.exp((math.log(0.5) + math.log(0.75)) / 2))
    assert estimate.share_of_steps([3.4, 3.2, 3.1], over, 3.0) == pytest.approx(
        0.75 * (4 / 3) ** 2
    )  # on from the last two


# Over seeds and examples


def accuracies(rng, seeds, sizes, mean, between_seeds, between_examples):
    """Differences of two arms in each example, by seed and task: seeds and examples both move them."""
    by_example = [rng.normal(mean, between_examples, size) for size in sizes]
    moves = rng.normal(0, between_seeds, (seeds, len(sizes)))
    return [
        [x + move + rng.normal(0, 0.1, len(x)) for x, move in zip(by_example, moves[s], strict=True)]
        for s in range(seeds)
    ]


@pytest.mark.parametrize("between_seeds, between_examples", [(0.05, 0.0), (0.0, 0.5), (0.03, 0.4)])
def test_seeds_and_examples_are_both_in_the_interval(between_seeds, between_examples):
    rng = np.random.default_rng(0)
    inside = []
    for _ in range(600):
        found = estimate.crossed(accuracies(rng, 3, [60, 100, 200], 0.02, between_seeds, between_examples))
        low, high = found.interval()
        inside.append(low <= 0.02 <= high)
    assert 0.94 < np.mean(inside) < 0.995  # errs on the wide side, if at all


def test_crossed_is_the_mean_over_tasks_of_means_over_examples():
    a = [[np.array([1.0, 0.0, 1.0]), np.array([1.0])], [np.array([1.0, 1.0, 1.0]), np.array([0.0])]]
    found = estimate.crossed(a)
    assert found.value == pytest.approx(np.mean([(2 / 3 + 1) / 2, (1 + 0) / 2])) and found.n == 2
    assert found.unit is Unit.SHARE and found.of == "seed"
    seeds = np.var([(2 / 3 + 1) / 2, 0.5], ddof=1) / 2
    examples = np.var([1.0, 0.5, 1.0], ddof=1) / 3 / 4
    assert math.hypot(*(error for error, _ in found.errors)) == pytest.approx(math.sqrt(seeds + examples))
    half = math.hypot(reference.t.ppf(0.975, 1) * math.sqrt(seeds), reference.t.ppf(0.975, 2) * math.sqrt(examples))
    assert found.interval() == pytest.approx((found.value - half, found.value + half))  # 1 and 3 - 1 degrees of freedom
    assert estimate.crossed([]).n == 0 and estimate.crossed(a[:1]).interval() is None
    single = estimate.crossed([[np.array([x]), np.array([x + 1])] for x in (0.0, 0.5, 1.5)])  # which tell no error
    assert single.interval() == pytest.approx(of_values([0.5, 1.0, 2.0]).interval())


# Spread, and how many seeds


def test_a_ratio_of_spreads_has_fs_interval():
    samples = np.random.default_rng(0).normal(0, 1, size=(2000, 9))
    found = [estimate.spread_ratio(2 * x[:5], x[5:]) for x in samples]
    ends = [one.interval(0.9) for one in found]
    assert np.mean([low <= 2 <= high for low, high in ends]) == pytest.approx(0.9, abs=0.02)
    assert np.mean([low > 2 for low, _ in ends]) == pytest.approx(0.05, abs=0.015)
    assert found[0].value == pytest.approx(2 * samples[0, :5].std(ddof=1) / samples[0, 5:].std(ddof=1))
    true = found[0].smallest(0.95, 0.8)
    shown = [estimate.spread_ratio(true * x[:5], x[5:]).interval()[0] > 1 for x in samples]
    assert np.mean(shown) == pytest.approx(0.8, abs=0.03)
    assert estimate.spread_ratio([1.0], [1.0, 2.0]).n == 0


def test_seeds_that_are_needed_decide_the_margin_as_often_as_they_say():
    rng, margin = np.random.default_rng(0), 0.005
    for spread in (0.001, 0.004):
        n = estimate.seeds_needed(spread, margin)

        def decided(true, n=n, spread=spread):
            ends = [of_values(x).interval() for x in rng.normal(true, spread, size=(1500, n))]
            found = [low > 0 for low, _ in ends] if true else [-margin <= low and high <= margin for low, high in ends]
            return np.mean(found)

        assert min(decided(0.0), decided(margin)) > 0.78
    assert [estimate.seeds_needed(spread, margin) for spread in (0.0, 0.001)] == [2, 3]
    assert estimate.seeds_needed(0.003, margin, level=0.9875) > estimate.seeds_needed(0.003, margin)
    # As many as ((1.96 + 1.28) spread / margin)^2, where t is normal: 851, and 1051, which are too many.
    assert (
        estimate.seeds_needed(0.045, margin) == pytest.approx(851, abs=3)
        and estimate.seeds_needed(0.05, margin) is None
    )


def test_no_spread_has_no_ratio():
    assert estimate.spread_ratio([1.0, 2.0, 4.0, 5.0], [1.0, 2.0, 4.0]).n == 3  # the fewer of both
    assert estimate.spread_ratio([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]).n == 0 == estimate.spread_ratio([1.0, 2.0], [3.0]).n
    two, none = estimate.spread_ratio([1.0, 2.0], [1.0, 3.0]), estimate.spread_ratio([1.0], [1.0, 3.0])
    critical = reference.f.ppf([0.025, 0.975, 0.2], 1, 1)
    assert two.interval() == pytest.approx((0.5 / critical[1] ** 0.5, 0.5 / critical[0] ** 0.5))
    assert two.smallest(0.95, 0.8) == pytest.approx((critical[1] / critical[2]) ** 0.5)
    assert none.interval() is None and math.isnan(none.smallest(0.95, 0.8)) and none.unit is Unit.RATIO


def test_seeds_of_a_ratio_decide_a_factor():
    found = of_values([1.0, 1.3, 1.7, 0.9], Unit.RATIO)
    spread = float(np.log([1.0, 1.3, 1.7, 0.9]).std(ddof=1))
    usual = estimate.seeds_needed(spread, math.log(2))
    assert found.seeds_for(1.0, 0.95, 0.8) == usual != estimate.seeds_needed(spread, 1.0)
    for level, power in ((0.6, 0.8), (0.95, 0.3)):
        fewer = estimate.seeds_needed(spread, math.log(2), level=level, power=power)
        assert found.seeds_for(1.0, level, power) == fewer < usual


def test_intervals_and_seeds_are_those_of_the_protocols_rules_unless_others_are_given(monkeypatch):
    found, spread = of_values([1.0, 1.3, 1.7, 0.9]), 0.01
    usual = found.interval(), estimate.seeds_needed(spread, 0.005)
    assert usual == (found.interval(0.95), estimate.seeds_needed(spread, 0.005, level=0.95, power=0.8))
    other = dataclasses.replace(protocol(), level=0.9, power=0.6)
    monkeypatch.setattr(estimate, "protocol", lambda: other)
    changed = found.interval(), estimate.seeds_needed(spread, 0.005)
    assert changed == (found.interval(0.9), estimate.seeds_needed(spread, 0.005, level=0.9, power=0.6)) != usual


def test_more_seeds_are_no_answer_to_what_lies_in_examples_spreads_or_turns():
    of_examples = estimate.crossed([[np.array([1.0, 0.0, 1.0])], [np.array([1.0, 1.0, 0.0])]])
    of_one_seed = estimate.crossed([[np.array([1.0, 0.0, 1.0])]])
    others = (estimate.spread_ratio([1.0, 2.0], [1.0, 3.0]), of_values([1.0, 2.0], of="turn"), of_values([1.0]))
    assert {one.seeds_for(0.1, 0.95, 0.8) for one in (of_examples, of_one_seed, *others)} == {None}


def test_only_shared_seeds_are_paired():
    assert estimate.shared({0: 1.0, 2: 1.0, 1: 1.0}, {2: 0.0, 1: 0.0, 7: 1.0}) == [1, 2]
    assert estimate.shared(dict.fromkeys((8, 1, 16), 0.0)) == [1, 8, 16]
    assert isinstance(of_values([1.0]), Estimate)
