"""What is compared is alike but for what is compared, and planned with as many seeds as a verdict needs; an unfair row is seen."""

import re
from collections import defaultdict
from itertools import pairwise, product

import pytest

from ecmoe.config import RunConfig
from ecmoe.study import plan
from ecmoe.study.parameters import merge_parameters, parameter_files
from ecmoe.study.protocol import protocol
from tests.configs.rows import CLAIMS, SCALES, STUDIES, arms, every_study, scale_of, values

# Keys that are one thing: a change of one asks for the others.
THING = dict.fromkeys(("batch_size", "steps", "warmup_steps", "schedule", "learning_rate", "relative_init"), "recipe")
THING |= {"aux_loss_weight": "balance"}


def apart(a, b):
    """The things in which two configs differ, of those that both have."""
    a, b = a.identity(), b.identity()
    return {THING.get(key, key) for key in a.keys() & b.keys() if a[key] != b[key]}


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.id)
def test_what_judges_a_claim_is_planned(claim):
    """On the claim's page what decides, on any other what stands beside it; measured, and with as many seeds as a verdict needs."""
    pages = {page: plan.of_page(page, "gpu") for page in dict.fromkeys((claim.page, *STUDIES))}
    assert {arm for part in claim.family for arm in part.arms} <= {one.arms[0] for one in pages[claim.page]}
    for part, arm in [(one, arm) for one in claim.parts for arm in one.arms]:
        runs = next(runs for planned in pages.values() if (runs := [one for one in planned if one.arms[0] == arm]))
        assert len(runs) >= protocol().least_seeds, (part.name, arm)
        asked = [term.split("/") for _, term in part.terms if "/" in term]
        asked += [("fine-tuned", None)] * (part.how == "accuracy")
        for one, (what, row) in product(runs, asked):
            found = [how.keys for how in one.measures if how.what == what]
            assert found, (part.name, arm, what)
            if what == "losses":
                assert row in ("as trained", "causally", "global top-k", *found[0]["pools"]), (part.name, row)


CONTRASTS = [
    pytest.param(claim.page, a, b, id=f"{claim.id}: {a} - {b}")
    for claim in CLAIMS
    for part in claim.family
    if part.b and part.arms
    for a, b in (zip(part.a, part.b, strict=True) if len(part.a) == len(part.b) else product(part.a, part.b))
]


@pytest.mark.parametrize(("page", "a", "b"), CONTRASTS)
def test_what_decides_a_claim_compares_like_with_like(page, a, b):
    """The same gate, tokens, experts and sizes, and as many places, but for what the names of the arms say."""
    first, second = arms(page, "gpu")[a], arms(page, "gpu")[b]
    differ = apart(first, second)
    if "of the steps" in a + b:
        differ -= {"recipe"}
    if "equal FLOPs" in a + b:
        differ -= {"d_ff"}
    if "Switch" in a + b:  # an expert a token, of its own capacity, and no choice of gate
        differ -= {"top_k", "gate", "capacity_factor"}
    if first.router == second.router:
        assert len(differ) <= 1
        return
    places = [{"expert_choice": 1, "token_choice": config.top_k}.get(config.router) for config in (first, second)]
    if None not in places and "Switch" not in a + b:
        assert places[0] * first.capacity_factor == places[1] * second.capacity_factor
    assert differ <= {"router", "capacity_factor"}


@every_study
def test_arms_of_a_router_differ_from_one_of_them_in_one_thing(page, scale):
    kin = defaultdict(dict)
    for name, config in arms(page, scale).items():
        kin[config.router, config.identity().get("top_k")][name] = config  # top-1 is no kin of top-2
    for family in (family for family in kin.values() if len(family) > 1):
        for name, config in family.items():
            least = min(len(apart(config, other)) for one, other in family.items() if one != name)
            assert least <= 1, f"{name}: no arm of {sorted(family)} differs from it in one thing alone"


@every_study
def test_arms_read_as_many_tokens(page, scale):
    tokens = {
        config.steps * config.tokens_per_batch
        for name, config in arms(page, scale).items()
        if "of the steps" not in name
    }
    assert len(tokens) == 1


@every_study
def test_a_number_of_experts_is_that_of_two_routers(page, scale):
    numbers = defaultdict(set)
    for name, config in arms(page, scale).items():
        if re.search(r", \d+ experts", name):
            numbers[config.num_experts].add(config.router)
    assert all(len(routers) > 1 for routers in numbers.values()), numbers


@pytest.mark.parametrize("scale", SCALES)
def test_other_routers_have_an_expert_choice_of_as_many_experts_a_token(scale):
    ours, others = set(), {}
    for name, config in arms("05_other_routers", scale).items():
        count = config.row.experts_per_token(config.to_dict())
        if config.router == "expert_choice":
            ours.add(count)
        elif config.router != "dense_moe" and not config.row.estimated:  # of dense MoE's tokens each has all experts
            others[name] = count
    assert set(others.values()) <= ours, others


@pytest.mark.parametrize("scale", SCALES)
def test_seeds_are_the_first_and_enough(scale):
    """So that pages share runs; a page that lists its own has as many as an interval needs, and the centre no fewer than another."""
    seeds = {page: values(page, scale)["seeds"] for page in STUDIES}
    searched = seeds.pop("14_learning_rate")  # of other seeds than those that its rates are used with
    assert len(searched) == 1 and all(set(searched).isdisjoint(others) for others in seeds.values())
    assert all(listed == list(range(len(listed))) for listed in seeds.values())
    least = protocol().least_seeds
    own = [
        page for page in seeds if any("seeds" in merge_parameters([file]) for file in parameter_files(page, scale)[1:])
    ]
    assert all(len(seeds[page]) >= least for page in own)
    usual = len(scale_of(scale)["seeds"])
    assert usual >= least if scale == "gpu" else usual == 1
    assert len(seeds["01_convergence"]) == max(map(len, seeds.values())) or scale == "smoke"


@pytest.mark.parametrize("scale", ["smoke", "gpu"])
def test_rates_were_searched_where_they_are_used(scale):
    """For each router, gate and number of experts that decides a claim, and for each with the same rates and steps."""
    page, base = "14_learning_rate", scale_of(scale)["base"]
    rates = values(page, scale)["vary"]["learning_rate"]
    assert rates == sorted(rates) and len(rates) > 1 and base["learning_rate"] in rates
    searched, study = next(iter(arms(page, scale).values())), RunConfig.from_dict(base)
    assert searched.steps < study.steps and study.steps % searched.steps == 0
    if scale == "gpu":
        assert rates[0] < base["learning_rate"] < rates[-1]
        assert len({round(after / before, 6) for before, after in pairwise(rates)}) == 1

        def family(config):
            keys = config.identity()
            return tuple(keys.get(key) for key in ("router", "top_k", "gate", "num_experts", "d_ff"))

        asked = {arm for claim in CLAIMS for part in claim.family for arm in part.arms}
        used = {name: family(RunConfig.from_dict(plan.arm_keys(name, base))) for name in asked}
        searched = {family(config) for config in arms(page, scale).values()}
        assert not {name for name, of in used.items() if of not in searched}, f"{page} searches no rate for these"
