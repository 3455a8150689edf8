"""What must hold of the rows of pages. Who adds an arm to a page needs no edit here; a row that is lost or swapped is seen."""

import re
from collections import defaultdict
from itertools import pairwise, product

import pytest

from ecmoe import paths
from ecmoe.config import CHOICES
from ecmoe.measures import MEASURES
from ecmoe.routers import ROUTERS
from ecmoe.study import plan
from ecmoe.study.parameters import merge_parameters
from tests.configs.rows import CENTRE, CLAIMS, SCALES, STUDIES, arms, every_study, notebook, quoted, scale_of, values
from tests.report.notebooks import declared


def test_every_arm_is_on_a_page():
    shown = {name for page, scale in product(STUDIES, SCALES) for name in values(page, scale)["arms"]}
    assert set(plan.named_arms()) <= shown


@every_study
def test_what_a_notebook_names_is_on_its_page(page, scale):
    rows = values(page, scale)
    assert quoted(page) & set(plan.named_arms()) <= set(rows["arms"])
    assert quoted(page) & set(MEASURES) == set(rows.get("measures") or ())
    assert len(arms(page, scale)) > 1  # to compare


def test_every_claim_is_on_its_page():
    """Else the index sends readers to a page that says nothing of it."""
    for claim in CLAIMS:
        assert claim.id in quoted(claim.page), f"{claim.page} must name {claim.id} in page.answer and page.judged"


def test_a_page_that_trains_nothing_reads_what_its_notebook_declares():
    for page in set(plan.pages("smoke")) - {*STUDIES, "08_step_time"}:
        rows = merge_parameters([paths.configs() / f"{page}.yaml"])
        defaults = declared(notebook(page))
        assert rows and rows == {key: defaults[key] for key in rows}, page


@every_study
def test_the_arm_that_others_are_held_against_is_the_centre(page, scale):
    rows = values(page, scale)
    assert all(rows[key] == CENTRE and CENTRE in rows["arms"] for key in {"centre", "free", "served"} & set(rows))
    images = any(config.images for config in arms(page, scale).values())
    assert images or any(name.partition(", ")[0] == CENTRE for name in arms(page, scale))


@pytest.mark.parametrize("page", [page for page in STUDIES if page != "14_learning_rate"])
def test_a_page_varies_the_same_at_every_scale(page):
    """But for numbers that follow from a scale's sizes: of experts, of tokens in a pool, of places a patch. Where a scale has a list
    of its own, an arm that is added to one list is added to the other: at scale smoke every part is tried."""
    keys = {key for row in ROUTERS.values() for key in row.keys} | {"router", "approach"}
    keys -= {"num_experts"} | ({"capacity_factor"} if page == "10_vision" else set())

    def varied(scale, key):
        found = {config.identity().get(key) for config in arms(page, scale).values()}
        return {value for value in found if not (key == "pool" and isinstance(value, int))}

    for scale, key in product(("smoke", "paper"), keys):
        assert varied(scale, key) == varied("gpu", key), (scale, key)


@pytest.mark.parametrize("scale", SCALES)
def test_every_router_and_each_of_its_choices_is_shown(scale):
    shown = defaultdict(set)
    for config in (config for page in STUDIES for config in arms(page, scale).values()):
        for key, value in config.identity().items():
            shown[key].add(value)
    others = {config.router for config in arms("05_other_routers", scale).values()}
    assert others == set(ROUTERS)  # and the dense model, for comparison
    shown["pool"].add("rank")  # of one process it is the batch
    shown["balance"].add("none")  # as a weight of 0
    for key in {key for row in ROUTERS.values() for key in row.keys if CHOICES[key]}:
        assert set(CHOICES[key]) <= shown[key], key


CROSSED = {
    "06_number_of_experts": r"(.*), (\d+ experts)",
    "10_vision": r"(.*), (.* places? a patch)",
    "13_gates": r"(EC-CF2|GShard top-2) (\w+(?:, initial scale \d+)?)",
}


@pytest.mark.parametrize(("page", "scale"), [*product(CROSSED, SCALES)])
def test_each_router_has_every_setting(page, scale):
    settings = defaultdict(set)
    for name in arms(page, scale):
        if found := re.fullmatch(CROSSED[page], name):
            settings[found[1]].add(found[2])
    first, *others = settings.values()
    assert len(first) > 1 and others and all(other == first for other in others), settings


@pytest.mark.parametrize("scale", SCALES)
def test_pages_vary_what_the_paper_varies(scale):
    by_gate = defaultdict(set)
    for config in arms("03_capacity_factor", scale).values():
        if config.router == "expert_choice":
            by_gate[config.gate].add(config.capacity_factor)
    assert all(factors >= {0.5, 1.0, 2.0} for factors in by_gate.values())  # Figure 4a
    caps = {config.max_experts_per_token for config in arms("04_capped_experts", scale).values()}
    assert caps >= {None, 2, 3}  # Table 4
    experts = sorted({config.num_experts for config in arms("06_number_of_experts", scale).values()})
    assert len(experts) > 2 and all(after == 2 * before for before, after in pairwise(experts))  # Figure 2b
    assert scale == "paper" or scale_of(scale)["base"]["num_experts"] in experts


@pytest.mark.parametrize("scale", SCALES)
def test_a_sweep_is_of_one_router_from_low_to_high(scale):
    swept, shown = values("02_load_balance", scale)["sweep"], arms("02_load_balance", scale)
    assert set(swept) == {name for name in shown if re.match("Switch top-1, capacity", name)}
    capacities = [shown[name].capacity_factor for name in swept]  # the usual cure: twice to eight times
    assert (
        capacities[0] == 1
        and capacities[-1] >= 8
        and all(after == 2 * before for before, after in pairwise(capacities))
    )
