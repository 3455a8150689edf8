"""Rules, labels and Holm against what is true by construction; and what is said beside the label."""

from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.stats import t, ttest_1samp

from ecmoe.config import RunConfig
from ecmoe.study import estimate, verdict
from ecmoe.study.estimate import of_values
from ecmoe.study.protocol import Part, find_claim
from ecmoe.study.units import Unit
from ecmoe.study.verdict import (
    CONTRADICTED,
    IN_DIRECTION,
    NO_EFFECT,
    NOT_RUN,
    PLUMBING,
    REPRODUCED,
    UNDECIDED,
    RestsOn,
    holm,
    label_of,
    of_evidence,
    weakest,
)
from tests.study.known import CENTRE, HALF, Known, judged, losses, seeds


def part(says="below", *, ratio=False, **keys):
    keys = {"margin": 0.02 if ratio else 0.005, "neutral": 1.0 if ratio else 0.0} | keys
    return Part("x", ("a",), says, "{size}", "val_loss", ("b",), how="steps" if ratio else "difference", **keys)


def between(low, high, n=4, unit=Unit.NATS, level=0.95):
    """An estimate whose interval at that level is this."""
    low, high = unit.inner(low), unit.inner(high)
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
        (part("below", ratio=True, figure=0.5), 0.985, 1.0201, UNDECIDED),
        (part("below", ratio=True, figure=0.5), 1.03, 1.30, CONTRADICTED),
        (part("above", ratio=True, figure=1.2), 1.21, 1.30, REPRODUCED),
        (part("above", ratio=True, figure=1.2), 1.05, 1.30, IN_DIRECTION),
        (part("above", ratio=True, figure=1.2), 0.90, 0.95, CONTRADICTED),
        # Near the paper's share.
        (part("near", figure=0.23, margin=0.05), 0.21, 0.25, REPRODUCED),
        (part("near", figure=0.23, margin=0.05), 0.15, 0.25, UNDECIDED),
        (part("near", figure=0.23, margin=0.05), 0.20, 0.35, UNDECIDED),
        (part("near", figure=0.23, margin=0.05), 0.10, 0.17, CONTRADICTED),
        (part("near", figure=0.23, margin=0.05), 0.29, 0.35, CONTRADICTED),
        (part("above", neutral=0.5, margin=0.02), 0.55, 0.60, REPRODUCED),
        (part("above", neutral=0.5, margin=0.02), 0.49, 0.51, NO_EFFECT),
        (part("above", neutral=0.5, margin=0.02, figure=0.7), 0.72, 0.80, REPRODUCED),
        (part("above", neutral=0.5, margin=0.02, figure=0.7), 0.65, 0.80, IN_DIRECTION),
    ],
)  # fmt: skip
def test_every_rule(rule, low, high, label):
    assert label_of(rule, between(low, high, unit=rule.unit), 0.95) == label


@pytest.mark.parametrize(
    "says, low, high, label",
    [
        ("below", -1.0, 0.0, UNDECIDED),  # it holds no effect, too
        ("below", 0.0, 1.0, UNDECIDED),
        ("below", -0.25, 0.25, NO_EFFECT),
        ("below", -1.0, -0.25, REPRODUCED),
        ("above", 0.25, 1.0, REPRODUCED),
        ("above", 0.2, 1.0, IN_DIRECTION),
        ("above", -0.25, 0.25, NO_EFFECT),
        ("below", -1.0, -0.2, IN_DIRECTION),
        ("below", -0.2, 0.3, UNDECIDED),
        ("above", -0.3, 0.2, UNDECIDED),
        ("at or below", 0.25, 1.0, UNDECIDED),
        ("near", 0.25, 0.75, REPRODUCED),
        ("near", 0.0, 0.25, UNDECIDED),
        ("near", 0.75, 1.0, UNDECIDED),
    ],
)
def test_an_interval_may_end_at_a_bound(says, low, high, label):
    bounded = part(says, margin=0.25, figure=0.5 if says == "near" else None)
    assert label_of(bounded, SimpleNamespace(n=3, of="seed", inner=lambda level: (low, high)), 0.95) == label


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


@pytest.mark.parametrize(
    ("labels", "others", "label", "said"),
    [
        ((REPRODUCED, IN_DIRECTION, NOT_RUN), (REPRODUCED, NO_EFFECT, NOT_RUN), None, "{0}"),  # needs none
        ((UNDECIDED, NO_EFFECT, CONTRADICTED), (REPRODUCED, IN_DIRECTION), IN_DIRECTION, "{0}, but it does: {1}"),
        ((UNDECIDED, NO_EFFECT, CONTRADICTED), (UNDECIDED, NOT_RUN), UNDECIDED, "{0}; open is whether it does: {1}"),
        ((UNDECIDED, NO_EFFECT, CONTRADICTED), (NO_EFFECT, CONTRADICTED), None, "{0}"),
    ],
)
def test_a_part_may_have_another_to_thank_for_its_direction(labels, others, label, said):
    (one, *_), sentences = judged("C1", losses(**CENTRE)).parts, ("a is above", "b is below")
    for own, other in product(labels, others):
        parts = [
            replace(one, label=x, sentence=text, direction="it does")
            for x, text in zip((own, other), sentences, strict=True)
        ]
        assert verdict._or_direction(*parts) == replace(parts[0], label=label or own, sentence=said.format(*sentences))


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


def test_the_surest_level_of_a_label_is_its_p_value():
    x = [-0.030, -0.028, -0.033, -0.026]
    assert verdict._smallest_alpha(part(), of_values(x)) == pytest.approx(ttest_1samp(x, 0).pvalue, rel=1e-3)
    assert verdict._smallest_alpha(part(), of_values(x[:2])) == 1.0  # too few seeds


# What stands beside the label


def test_a_sentence_has_number_interval_and_what_keeps_it_from_a_better_label():
    share = {"margin": 0.02, "figure": 0.2, "sides": ("under", "over"), "how": "accuracy"}
    rule = Part("x", ("a",), "above", "a is {size} {side} b", "accuracy", ("b",), **share)
    found = of_values([0.03, 0.05, 0.04, 0.08], Unit.SHARE)
    low, high = (f"{100 * end:.{int(end < 0.1)}f}" for end in found.interval(0.9))
    needs = found.seeds_for(0.02, 0.9, 0.8)
    for label, more in {
        REPRODUCED: "",
        IN_DIRECTION: "; the paper: 20 points",
        NO_EFFECT: ", which counts as equal (by 2.0 points or less)",
        UNDECIDED: f", which doesn't decide it; {needs} seeds probably would",
    }.items():
        assert verdict._found(rule, label, found, 0.9) == f"a is 5.0 points over b ({low} to {high}; 4 seeds){more}"
    enough = verdict._found(replace(rule, margin=0.05), UNDECIDED, found, 0.9)
    assert found.seeds_for(0.05, 0.9, 0.8) == found.n and enough.endswith(", which doesn't decide it")
    few = replace(found, errors=(*found.errors, (0.05, 40)))  # an error of the examples, which more seeds don't lower
    said = verdict._found(rule, UNDECIDED, few, 0.9)
    left = 100 * 0.05 * t.ppf(0.95, 40)
    assert said.endswith(
        f"it; more seeds alone can't tell 2.0 points, for the validation examples leave {left:.1f} points either way"
    )
    many = replace(found, errors=(*found.errors, (0.001, 40)))
    for unlike in (
        verdict._found(rule, UNDECIDED, many, 0.9),
        verdict._found(replace(rule, how="spread"), UNDECIDED, few, 0.9),
    ):
        assert unlike.endswith(", which doesn't decide it")
    less = of_values([-0.03, -0.05, -0.04, -0.08], Unit.SHARE)
    assert verdict._found(rule, REPRODUCED, less, 0.9) == f"a is 5.0 points under b ({low} to {high}; 4 seeds)"
    two = verdict._found(rule, UNDECIDED, of_values([0.0500, 0.0501], Unit.SHARE), 0.9)
    assert two == "a is 5.0 points over b (5.0 to 5.0; 2 seeds); a verdict needs 3 seeds"
    one = verdict._found(rule, UNDECIDED, of_values([0.05], Unit.SHARE), 0.9)
    assert one == "a is 5.0 points over b (1 seed, no interval); a verdict needs 3 seeds"
    assert verdict._found(rule, NOT_RUN, of_values([], Unit.SHARE), 0.9) == "x: not run"


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


def test_what_it_rests_on_has_every_run_seed_size_and_card():
    configs = [RunConfig(layers=2, router="hash"), RunConfig(layers=6, router="dense")]
    # Of several tasks in sequence, a run's tokens are more than its config says.
    each = ((16, "B", 40_960), (1, "A", 50_000), (16, None, 81_920))
    runs = [{"seed": seed, "device": device, "tokens": tokens} for seed, device, tokens in each]
    found = RestsOn.of(runs, configs, mixed=("code",))
    all_of_them = "40,960 to 81,920 tokens (seeds 1, 16) of 2 to 6 layers of width 64, 8 experts, on A, B"
    assert str(found) == f"3 runs of {all_of_them}"
    assert str(RestsOn.of(runs[:1], configs[1:])) == "1 run of 40,960 tokens (seed 16) of 6 layers of width 64, on B"
    assert found.mixed == ("code",) and "on an unknown device" in str(RestsOn.of(runs[2:], configs))
    assert "of 40,960 patches (seed 16)" in str(RestsOn.of(runs[:1], [RunConfig(data="digits", sequence_length=16)]))


def test_a_claim_lacks_what_could_change_its_label():
    """A part that decides nothing, and helps none that does, is not waited for."""
    hashed = losses(**{"EC-CF2 renormalized": seeds(3.6), "Hash modulo": seeds(3.62)})
    assert not judged("C6", hashed).lacks  # though nothing is there of three parts beside it
    hashed["Hash modulo"] = dict.fromkeys(hashed["Hash modulo"], seeds(3.62, n=3))
    assert judged("C6", hashed).lacks  # its fourth seed
    helped = losses(**{arm: numbers for arm, numbers in CENTRE.items() if arm != "GShard top-2 raw"})
    assert judged("C1", helped).lacks and not judged("C1", losses(**CENTRE)).lacks


def test_a_page_of_another_size_brings_no_arms_of_the_claim(monkeypatch):
    asked, about = [], find_claim("C1")
    monkeypatch.setattr(verdict, "Evidence", lambda *given: asked.append(given))
    monkeypatch.setattr(verdict, "of_evidence", lambda claim, evidence: claim)
    monkeypatch.setattr(verdict, "sound", lambda scale: ("plan", {}))
    monkeypatch.setattr("ecmoe.study.protocol.by_arm", lambda *given: given)
    monkeypatch.setattr(verdict, "by_arm", lambda *given: given)
    for page in (None, about.page, "07_fine_tuning"):
        assert verdict.judge("C1", "paper", page=page) is about
    own, other = (about.page, "paper", "plan", about.arms), ("07_fine_tuning", "paper", "plan")
    assert asked == [("paper", about.page, own)] * 2 + [("paper", "07_fine_tuning", other)]


def test_a_verdict_rests_on_what_puts_its_parts_in_direction_too_and_on_horizons_of_several_lengths():
    class Short(Known):
        def config(self, arm):
            return RunConfig(steps=10 if "1/2" in arm else 20)

    numbers = losses(**CENTRE)
    found = of_evidence(find_claim("C1"), Short(numbers, page="01_convergence"))
    assert found.rests_on.runs == 7 * 4  # EC-CF2 with raw gates after all steps is compared in no part that decides
    each = RunConfig().tokens_per_batch
    assert f"of {10 * each:,} to {20 * each:,} tokens (seeds" in str(found.rests_on)
    del numbers["EC-CF2 raw, 1/2 of the steps"], numbers["EC-CF2 renormalized, 1/2 of the steps"]
    assert of_evidence(find_claim("C1"), Short(numbers, page="01_convergence")).rests_on.tokens == (20 * each,) * 2
    assert RestsOn(tokens=(26_214_400, 52_428_800)).trained == "26 to 52 million tokens"
    assert RestsOn(tokens=(999_999, 2_000_000)).trained == "999,999 to 2,000,000 tokens"


def mixed(evidence, part):
    """How the runs that this part of C6 compares differ."""
    about = find_claim("C6")
    return of_evidence(
        replace(about, parts=tuple(replace(p, decides=True) for p in about.parts if p.name == part)), evidence
    ).rests_on.mixed


def test_runs_of_two_codes_or_cards_are_marked():
    class Mixed(Known):
        def summaries(self, arm):
            other = {"code": "0ther", "device": "H200"} if arm == "Hash modulo" else {}
            return {seed: one | other if seed == 1 else one for seed, one in super().summaries(arm).items()}

    numbers = losses(**{"Hash modulo": seeds(3.7), "EC-CF2 renormalized": seeds(3.6), "Hash balanced": seeds(3.6)})
    evidence = Mixed(numbers, page="05_other_routers")
    assert of_evidence(find_claim("C6"), evidence).rests_on.mixed == ("card", "code")
    assert mixed(evidence, "a balanced table against EC-CF2") == ()


def test_repeats_that_show_two_codes_to_be_one_are_named_in_place_of_a_mark(monkeypatch):
    class Mixed(Known):
        def summaries(self, arm):
            there = super().summaries(arm)
            return {seed: one | {"code": "0ther"} if arm == "Hash modulo" else one for seed, one in there.items()}

    numbers = losses(**{"Hash modulo": seeds(3.7), "EC-CF2 renormalized": seeds(3.6)})
    evidence = Mixed(numbers, page="05_other_routers")
    common = {"device": "H100", "recorded": "0ther", "code": "c0de", "equal": True}
    kept = [common | {"run": run, "router": router} for run, router in (("z", "Hash"), ("b", "EC-CF2"), ("x", "BASE"))]
    monkeypatch.setattr(verdict.repeats, "kept", {"gpu": kept}.__getitem__)
    monkeypatch.setattr(verdict.repeats, "covered", lambda *asked: [200, 400] if asked == ({"b", "z"}, "gpu") else [])
    found = of_evidence(find_claim("C6"), evidence)
    assert found.rests_on.mixed == () and found.rests_on.repeats == ("b", "z")
    assert found.rests_on.covered == (200, 400)
    monkeypatch.setattr(verdict.repeats, "kept", {"gpu": []}.__getitem__)
    assert of_evidence(find_claim("C6"), evidence).rests_on.mixed == ("code",)


@pytest.mark.parametrize(
    ("marks", "dense", "others"),
    [
        ((), {"device": "H200", "code": "0ther"}, {"device": "H200", "code": "0ther"}),  # than they were trained
        (("card",), {"device": "H200"}, {"measures": "d1"}),
        (("code",), {"code": "0ther"}, {}),
        (("code",), {"measures": "d1"}, {"measures": "d2"}),
        ((), {"measures": "d1"}, {}),  # of the others it isn't known
    ],
)
def test_measurements_by_two_codes_or_cards_are_marked_where_they_are_compared(marks, dense, others):
    class Measured(Known):
        def as_measured(self, arm, seed, what):
            assert what == "fine-tuned"
            made = {} if seed else dense if arm == "Dense" else others
            return [self.summaries(arm)[seed] | made]

    arms = ("EC-CF2 renormalized", "GShard top-2 renormalized", "Switch top-1", "Dense")
    right = {0: [np.ones(9)], 1: [np.ones(9)]}
    evidence = Measured({arm: {"accuracy": right, "val_loss": {0: 3.5, 1: 3.5}} for arm in arms}, page="07_fine_tuning")
    assert of_evidence(find_claim("C4"), evidence).rests_on.mixed == marks
    no_measurement = replace(find_claim("C6"), parts=find_claim("C6").parts[:1])
    hashed = losses(**{"Hash modulo": seeds(3.7), "EC-CF2 renormalized": seeds(3.6)})
    assert of_evidence(no_measurement, Measured(hashed)).rests_on.mixed == ()


def test_a_seed_may_be_trained_elsewhere_than_the_next_but_not_than_its_pair():
    class Elsewhere(Known):
        def summaries(self, arm):
            there = super().summaries(arm)
            return {s: one | {"code": "0ther", "device": "H200"} if s == 0 else one for s, one in there.items()}

    numbers = losses(**{"Hash modulo": seeds(3.7), "EC-CF2 renormalized": seeds(3.6)})
    evidence = Elsewhere(numbers, page="05_other_routers")
    assert of_evidence(find_claim("C6"), evidence).rests_on.mixed == ()
    assert mixed(evidence, "spread over seeds") == ("card", "code")


def test_another_page_judges_the_parts_whose_arms_it_trains():
    paper_size = {a: CENTRE[a] for a in ("EC-CF2 renormalized", "GShard top-2 renormalized", "Switch top-1", "Dense")}
    found = of_evidence(find_claim("C1"), Known(losses(**paper_size), page="07_fine_tuning"))
    assert [p.name for p in found.deciding] == [
        "EC-CF2 against Switch top-1", "GShard top-2 against Switch top-1", "all steps, renormalized gates",
    ]  # fmt: skip
    assert found.label == NO_EFFECT  # in place of half the steps: as many
    assert of_evidence(find_claim("C2"), Known(losses(**paper_size), page="07_fine_tuning")).parts == ()
    half = {arm: CENTRE[arm] for arm in (HALF, "GShard top-2 renormalized")}  # without what could put it in direction
    (alone,) = of_evidence(find_claim("C1"), Known(losses(**half), page="07_fine_tuning")).parts
    assert alone.label == CONTRADICTED
    there = of_evidence(
        find_claim("C1"), Known(losses(**CENTRE), page="07_fine_tuning")
    )  # where all are, none stands in
    assert [p.name for p in there.deciding] == [p.name for p in judged("C1", losses(**CENTRE)).deciding]


def test_an_interval_is_widened_by_the_number_of_parts_and_says_what_it_could_have_seen():
    caps = {"EC-CAP2 renormalized": seeds(3.62), "EC-CAP3 renormalized": seeds(3.6), "EC-CF2 renormalized": seeds(3.6)}
    noisy = losses(**caps)
    noisy["EC-CAP2 renormalized"]["val_loss"] = seeds(3.62, 0.004)
    found = judged("C5", noisy)
    assert sorted(p.level for p in found.deciding) == pytest.approx([0.95, 0.975])
    first = found.parts[0]
    low, high = first.interval
    assert first.effect.smallest(first.level, 0.8) > (high - low) / 2 and low < first.effect.value < high


def test_an_undecided_part_says_how_many_seeds_would_decide_it():
    caps = {"EC-CAP2 renormalized": seeds(3.604), "EC-CAP3 renormalized": seeds(3.6), "EC-CF2 renormalized": seeds(3.6)}
    noisy = losses(**caps)
    noisy["EC-CAP2 renormalized"]["val_loss"] = seeds(3.604, 0.01)
    first = judged("C5", noisy).parts[0]
    spread = np.std(list(seeds(0, 0.01 - 0.0004).values()), ddof=1)
    needs = estimate.seeds_needed(spread, 0.005, level=first.level)
    assert first.label == UNDECIDED and first.sentence.endswith(
        f"which doesn't decide it; {needs} seeds probably would"
    )


def test_of_several_undecided_parts_the_least_favourable_is_told():
    caps = {"EC-CAP2 renormalized": seeds(3.604), "EC-CAP3 renormalized": seeds(3.6), "EC-CF2 renormalized": seeds(3.6)}
    for arm, worse in (("EC-CF2 renormalized", 0), ("EC-CAP3 renormalized", 1)):  # the claim: a cap of 2 ends above it
        noisy = losses(**caps)
        noisy["EC-CAP2 renormalized"]["val_loss"] = seeds(3.604, 0.01)
        noisy[arm]["val_loss"] = seeds(3.606)
        found = judged("C5", noisy)
        assert [part.label for part in found.deciding] == [UNDECIDED, UNDECIDED]
        told, other = found.deciding[worse], found.deciding[1 - worse]
        assert found.sentence.startswith(verdict.capital(told.sentence)) and told.sentence != other.sentence
        assert told.effect.value < other.effect.value
