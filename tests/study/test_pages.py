"""What must hold of the rows of pages and scales. Who adds an arm to a page needs no edit here; a row that is lost, swapped or unfair is seen."""

import re
from collections import defaultdict
from functools import cache
from itertools import pairwise, product

import nbformat
import pytest
import yaml

from ecmoe import paths
from ecmoe.config import CHOICES, RunConfig
from ecmoe.continual import ContinualConfig
from ecmoe.measures import MEASURES
from ecmoe.routers import ROUTERS
from ecmoe.study import plan
from ecmoe.study.parameters import merge_parameters, parameter_files
from ecmoe.study.protocol import protocol
from tests.report.notebooks import declared

SCALES = ("smoke", "gpu", "paper")
CENTRE = "EC-CF2 renormalized"


@cache
def values(page, scale):
    return merge_parameters(parameter_files(page, scale))


@cache
def scale_of(name):
    return yaml.safe_load((paths.configs() / f"scale/{name}.yaml").read_text())


@cache
def arms(page, scale):
    """Arm -> its config with the page's first seed."""
    seed = values(page, scale)["seeds"][0]
    return {one.arms[0]: one.config for one in plan.of_page(page, scale, {"seeds": [seed]})}


@cache
def notebook(page):
    return nbformat.read(paths.configs().parent / f"notebooks/{page}.ipynb", as_version=4)


def quoted(page):
    """The strings in the code of the page's notebook."""
    code = (cell.source for cell in notebook(page).cells if cell.cell_type == "code")
    return set(re.findall(r'"([^"\n]*)"', "\n".join(code)))


STUDIES = [page for page in plan.pages("smoke") if "arms" in values(page, "smoke")]
every_study = pytest.mark.parametrize(("page", "scale"), [*product(STUDIES, SCALES)])
CLAIMS = protocol().claims.values()


# No row is lost


def test_every_arm_is_on_a_page():
    shown = {name for page, scale in product(STUDIES, SCALES) for name in values(page, scale)["arms"]}
    assert set(plan.named_arms()) <= shown


@every_study
def test_what_a_notebook_names_is_on_its_page(page, scale):
    rows = values(page, scale)
    assert quoted(page) & set(plan.named_arms()) <= set(rows["arms"])
    assert quoted(page) & set(MEASURES) == set(rows.get("measures") or ())
    assert len(arms(page, scale)) > 1  # to compare


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
    assert others == set(ROUTERS) - {"dense"}
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


# Rows that are compared are alike but for what is compared

# Keys that are one thing: a change of one asks for the others.
THING = dict.fromkeys(("batch_size", "steps", "warmup_steps", "schedule", "learning_rate", "relative_init"), "recipe")
THING |= {"aux_loss_weight": "balance"}


def apart(a, b):
    """The things in which two configs differ, of those that both have."""
    a, b = a.identity(), b.identity()
    return {THING.get(key, key) for key in a.keys() & b.keys() if a[key] != b[key]}


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


# What pages say of their rows


@every_study
def test_the_arm_that_others_are_held_against_is_the_centre(page, scale):
    rows = values(page, scale)
    assert all(rows[key] == CENTRE and CENTRE in rows["arms"] for key in {"centre", "free", "served"} & set(rows))
    images = any(config.images for config in arms(page, scale).values())
    assert images or any(name.partition(", ")[0] == CENTRE for name in arms(page, scale))


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
        assert set(used.values()) <= {family(config) for config in arms(page, scale).values()}, used


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


@pytest.mark.parametrize("scale", SCALES)
def test_each_measurement_is_of_the_arms_that_its_page_speaks_of(scale):
    capped, tuned, causal = (values(page, scale) for page in ("04_capped_experts", "07_fine_tuning", "09_causality"))
    assert all(asked == {"arms": [capped["free"]]} for asked in capped["measures"].values())
    assert causal["measures"]["decoding"] == {"arms": [causal["served"]], "seeds": causal["seeds"][:1]}
    of_all = [
        tuned["measures"]["fine-tuned"],
        *(causal["measures"][what] for what in ("losses", "next-token", "dependence")),
    ]
    assert all({"arms", "seeds"}.isdisjoint(asked) for asked in of_all)
    # Tables 2 and 3; at other scales a task that every machine has.
    eleven = ["boolq", "cb", "cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "wic", "wnli"]
    assert of_all[0]["task"] == (eleven if scale == "gpu" else ["lines"])


@pytest.mark.parametrize("scale", SCALES)
def test_models_are_served_with_every_pool_that_one_was_trained_on(scale):
    """And with the fewest tokens of which an expert takes one, e/c."""
    shown, pools = arms("09_causality", scale), values("09_causality", scale)["measures"]["losses"]["pools"]
    trained = {config.pool for config in shown.values() if config.router == "expert_choice"}
    config = shown[CENTRE]
    words = {"sequence": config.sequence_length, "batch": config.batch_size * config.sequence_length}
    sizes = [words.get(pool, pool) for pool in pools if pool != "position"]
    assert trained <= set(pools) and sizes == sorted(set(sizes))
    assert sizes[0] == config.num_experts / config.capacity_factor
    assert any(words["sequence"] < pool < words["batch"] for pool in trained if isinstance(pool, int))


@pytest.mark.parametrize("scale", SCALES)
def test_networks_trained_with_most_places_are_measured_with_as_few_as_others(scale):
    def places(names):
        return {name: float(re.search(r"([\d.]+) places?", name)[1]) for name in names if name != "Dense"}

    asked, trained = values("10_vision", scale)["measures"]["accuracy-at"], places(arms("10_vision", scale))
    assert set(asked["arms"]) == {name for name, count in trained.items() if count == max(trained.values())}
    assert asked["places"] == sorted(set(places(arms("10_vision", "gpu")).values()))


def test_a_page_that_trains_nothing_reads_what_its_notebook_declares():
    for page in set(plan.pages("smoke")) - {*STUDIES, "08_step_time"}:
        rows = merge_parameters([paths.configs() / f"{page}.yaml"])
        defaults = declared(notebook(page))
        assert rows and rows == {key: defaults[key] for key in rows}, page


@pytest.mark.parametrize("scale", ["smoke", "gpu"])
def test_what_is_timed_grows_by_equal_steps_around_a_usual_layer(scale):
    rows = values("08_step_time", scale)
    for name, size in {**rows["layer_sizes"], "growth": rows["growth_from"]}.items():
        assert size["d_ff"] == 4 * size["d_model"] and 2 * size["n"] % size["num_experts"] == 0, name
    for axis, numbers in rows["growth_axes"].items():
        assert len(numbers) > 2 and len({after / before for before, after in pairwise(numbers)}) == 1, axis
        assert numbers[0] < rows["growth_from"][axis] < numbers[-1], axis
    assert rows["repeats"] % 2 and rows["repeats"] > 5  # the median is a sample, and its quartiles are others
    if scale == "smoke":  # which no GPU is needed for
        assert (rows["auto_sizes"], rows["step_sizes"], rows["scaling"]) == ([], {}, {"devices": [1]})


# Sizes

PICTURES = {"digits": (8, 1, 10), "images:data/cifar10": (32, 3, 10), "images:data/imagenet": (224, 3, 1000)}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("page", ["10_vision", "11_continual_learning"])
def test_a_network_sees_whole_pictures(page, scale):
    for config in (one.config for one in plan.plan(scale, [page])):
        side, channels, classes = PICTURES[config.data.partition("#")[0]]
        assert config.sequence_length == (side // config.patch_size) ** 2 and side % config.patch_size == 0
        assert (config.channels, config.classes) == (channels, classes)


def test_runs_are_as_long_as_their_configs_say():
    """Numbers that comments and pages give in words: tokens, passes over a data set, shares of another run."""
    run = {page: plan.plan("gpu", [page])[0].config for page in plan.pages("gpu") if plan.plan("gpu", [page])}
    study, large, rates = run["01_convergence"], run["07_fine_tuning"], run["14_learning_rate"]
    assert study.tokens_per_batch == 16_384 and round(study.steps * study.tokens_per_batch, -6) == 52e6
    assert large.tokens_per_batch == 32_768 and round(large.steps * large.tokens_per_batch, -5) == 105.2e6
    assert (4 * rates.steps, 4 * rates.warmup_steps) == (study.steps, study.warmup_steps)
    vision, tasks = run["10_vision"], run["11_continual_learning"]
    assert vision.steps * vision.batch_size == 30 * 50_000 and vision.eval_batches * vision.batch_size == 10_000
    assert tasks.steps * tasks.batch_size == 25 * 50_000 / tasks.tasks  # a fifth of the images each
    assert all(config.steps % config.eval_every == 0 for config in run.values() if config is not tasks)


def test_scale_smoke_takes_minutes_on_two_cores():
    """So many FLOPs, in models so small that their memory is nothing; from data that every machine has."""
    from ecmoe.model.build import count_parameters, flops_per_token

    planned = plan.plan("smoke")
    assert {one.config.data for one in planned} == {"stdlib", "digits"}
    runs = [one.config for one in planned if not isinstance(one.config, ContinualConfig)]  # these take seconds in all
    cost = sum(config.steps * config.tokens_per_batch * flops_per_token(config) for config in runs)
    assert 5e12 < cost < 9e12
    study, vision = arms("01_convergence", "smoke")[CENTRE], next(iter(arms("10_vision", "smoke").values()))
    assert 1.5e5 < count_parameters(study).total < 2.5e5 and 1.5e5 < count_parameters(vision).total < 5e5
    assert study.tokenizer == "bytes" and study.vocab_size == 256 and study.moe_every == 2 and vision.moe_every == 1
    assert study.steps * study.tokens_per_batch < study.max_bytes / 2  # no text is read twice
    for config in (study, vision):
        assert config.d_model == 16 * config.heads and config.layers == 2 and config.d_ff == 2 * config.d_model
        assert config.steps % config.eval_every == 0 and config.warmup_steps <= config.steps / 8
    assert study.steps >= 4 * study.eval_every and vision.steps == 2 * vision.eval_every
    tasks = arms("11_continual_learning", "smoke")["Expert Gate"]
    assert tasks.steps * tasks.batch_size <= 5000 and tasks.gate_steps * tasks.batch_size <= 15_000
    assert tasks.learning_rate == vision.learning_rate == study.learning_rate


@pytest.mark.parametrize("scale", ["smoke", "gpu"])
def test_networks_that_learn_in_sequence_have_an_expert_for_each_task(scale):
    shown = arms("11_continual_learning", scale)
    for config in shown.values():
        assert config.num_experts == config.tasks == config.classes / 2 and config.threshold == 0.85  # the paper's
        assert config.capacity_factor == arms("01_convergence", scale)[CENTRE].capacity_factor and config.moe_every == 1
        assert config.d_model >= 8 * config.heads
    assert {config.approach for config in shown.values()} == {"expert_gate", "sequence", "joint"}


def test_pages_without_runs_at_scale_gpu_have_the_sizes_that_were_chosen():
    """Of a small ViT on CIFAR-10, as the pages say; runs that are committed would keep them."""
    vision, tasks = (
        yaml.safe_load((paths.configs() / f"scale/gpu/{page}.yaml").read_text())["base"]
        for page in ("10_vision", "11_continual_learning")
    )
    pictures = {"data": "images:data/cifar10#95271d06f8122dfd", "channels": 3, "sequence_length": 64}
    assert vision == pictures | {
        "augment": True, "patch_size": 4, "classes": 10, "layers": 8, "d_model": 384, "d_ff": 1536, "heads": 6,
        "num_experts": 8, "batch_size": 500, "steps": 3000, "warmup_steps": 200, "schedule": "linear",
        "decay_fraction": 0.5, "learning_rate": 0.001, "weight_decay": 0.05, "eval_every": 250, "eval_batches": 20,
        "checkpoint_every": 1000,
    }  # fmt: skip
    fast = {"compile": True, "cuda_graph": True, "checkpoint_every": 3200}  # which no run's name keeps
    assert fast.items() <= scale_of("gpu")["base"].items()
    small = {"layers": 4, "d_model": 128, "d_ff": 256, "steps": 1000, "batch_size": 250, "learning_rate": 0.001}
    gates = {"code": 64, "gate_steps": 4000, "gate_learning_rate": 0.001}
    assert tasks == pictures | small | gates


def test_scale_paper_has_the_papers_size_and_glams_settings():
    from ecmoe.model.build import TABLE_1

    base, preset = scale_of("paper")["base"], TABLE_1["0.1B/64E"].config
    sizes = (
        "layers",
        "d_model",
        "d_ff",
        "heads",
        "num_experts",
        "sequence_length",
        "batch_size",
        "vocab_size",
        "data",
        "tokenizer",
        "streaming",
    )
    assert {key: base[key] for key in sizes} == {key: getattr(preset, key) for key in sizes}
    assert base["batch_size"] * base["sequence_length"] * base["accumulate"] == 2**20  # a million tokens a step
    glam = {
        "optimizer": "adafactor",
        "learning_rate": 0.01,
        "gradient_clip": 1.0,
        "schedule": "inverse_sqrt",
        "constant_steps": 10_000,
    }
    assert {key: base[key] for key in glam} == glam and scale_of("paper")["train_missing"] is False
    ours = {"steps": 100_000, "warmup_steps": 0, "activation_checkpointing": True, "eval_every": 1000}
    assert base == {key: base[key] for key in sizes} | glam | ours | {"accumulate": 16, "checkpoint_every": 1000}
    assert scale_of("paper")["scale"] == "paper" and scale_of("paper")["seeds"] == [0]
    overlays = {
        path.stem: yaml.safe_load(path.read_text()) for path in (paths.configs() / "scale/paper").glob("*.yaml")
    }
    vision = {  # V-MoE-B/16, with as many images a step as it has (4,096), but for whole numbers of places
        "data": "images:data/imagenet", "augment": True, "patch_size": 16, "channels": 3, "classes": 1000,
        "sequence_length": 196, "num_experts": 32, "batch_size": 800, "accumulate": 5, "optimizer": "adamw",
        "learning_rate": 1e-3, "weight_decay": 0.1, "schedule": "linear", "decay_fraction": 1.0, "warmup_steps": 10_000,
    }  # fmt: skip
    assert overlays["10_vision"]["base"] == vision and "base" not in overlays["09_causality"]
    large = {key: getattr(plan.plan("gpu", ["07_fine_tuning"])[0].config, key) for key in sizes[:6]}
    assert large == {key: base[key] for key in large}
