"""configs/arms.yaml: every arm is named once, differs from every other, and can be built at every scale."""

import json
import re
from collections import Counter

import pytest
import yaml

from ecmoe import paths
from ecmoe.config import ConfigError
from ecmoe.study import plan
from ecmoe.study.plan import configs

SCALES = {p.stem: yaml.safe_load(p.read_text()) for p in sorted((paths.configs() / "scale").glob("*.yaml"))}


def made_of(names, base):
    made = configs(base, {name: plan.arm_keys(name, base) for name in names}, [0])
    return {name: config for name, (config,) in made.items()}


TEXT = [name for name, keys in plan.named_arms().items() if "a patch" not in name and "approach" not in keys]


def test_a_name_is_one_arm_and_an_arm_has_one_name():
    lines = (paths.configs() / "arms.yaml").read_text().splitlines()
    heads = [line.split(": {")[0].rstrip(":") for line in lines if line[:1] not in ("#", " ", "")]
    assert heads == list(plan.named_arms())  # a key that stood twice would have won in silence
    alike = Counter(json.dumps(keys, sort_keys=True) for name, keys in plan.named_arms().items() if name in TEXT)
    assert max(alike.values()) == 1


EC, TOP = {"router": "expert_choice"}, {"router": "token_choice", "capacity_factor": 1.0}
HASH, TASKS = {"router": "hash", "capacity_factor": 1.25}, {"router": "task_level", "num_tasks": 8}
# What the words of a name say, from the papers and the README: later ones change what earlier ones said.
SAYS = (
    ("EC|one EC network|joint, EC", EC),
    (r"EC-CF([\d.]+)", lambda c: {"capacity_factor": float(c)}),
    (r"EC-CAP(\d)", lambda b: {"capacity_factor": 2.0, "max_experts_per_token": int(b)}),
    ("GShard top-2|Top-2", TOP | {"top_k": 2}),
    ("Switch top-1", TOP | {"top_k": 1, "capacity_factor": 1.25, "gate": "softmax"}),
    ("Hash (modulo|balanced)", lambda table: HASH | {"hash_table": table}),
    ("Dense|Expert Gate|one dense network|joint, dense", {"router": "dense"}),
    ("Dense MoE", {"router": "dense_moe"}),
    ("BASE", {"router": "linear_assignment"}),
    ("K-means", {"router": "kmeans", "capacity_factor": 1.25}),
    ("Task level", TASKS | {"task_table": "learned"}),
    ("Task level fixed", {"task_table": "fixed"}),
    ("Expert threshold", {"router": "expert_threshold", "capacity_factor": 2.0}),
    ("Batch priority", TOP | {"top_k": 2, "gate": "renormalized", "priority": "score"}),
    ("Loss-free bias", TOP | {"top_k": 2, "gate": "renormalized", "balance": "bias", "aux_loss_weight": 0.0}),
    ("Expert Gate", {"approach": "expert_gate"}),
    ("one (dense|EC) network", lambda _: {"approach": "sequence"}),
    ("joint", {"approach": "joint"}),
    ("one EC network|joint, EC", {"gate": "renormalized"}),
    (".* renormalized", {"gate": "renormalized"}),
    (".* scaled", {"gate": "scaled"}),
    (".* raw", {"gate": "softmax"}),
    (".* nothing dropped", {"capacity_factor": None, "gate": "renormalized"}),
    (r".*, capacity ([\d.]+)", lambda c: {"capacity_factor": float(c)}),
    (r".*, (\d+) experts", lambda e: {"num_experts": int(e)}),
    (r".*, pool (\d+)", lambda n: {"pool": int(n)}),
    (r".*, pool ([a-z]+)", lambda pool: {"pool": pool}),
    (".*, no auxiliary loss", {"aux_loss_weight": 0.0}),
    (r".*, auxiliary weight ([\d.]+)", lambda weight: {"aux_loss_weight": float(weight)}),
    (".*, first choices counted", {"balance": "first_choice"}),
    (".*, Dykstra", {"cap_solver": "dykstra"}),
    (r".*, initial scale (\d+)", lambda scale: {"moe_init_scale": float(scale)}),
    (r".*, (\d/\d) of the steps", lambda share: {"steps": share}),
    (".* equal FLOPs", {"d_ff": "7/6"}),  # 7/2 d f of two layers, one of experts, to the 3 d f of a gated FFN
    (r"EC.*, ([\d.]+) places? a patch", lambda c: {"capacity_factor": float(c)}),
    (r"Top-2.*, ([\d.]+) places? a patch", lambda c: {"capacity_factor": float(c) / 2, "balance": "importance_load"}),
    ("Top-2.*, batch priority", {"priority": "score"}),
    ("Top-2.*, order of arrival", {"priority": "order"}),
    # As many tokens: 4 x 1/4.
    (".*, constant rate", {"schedule": "constant", "learning_rate": 0.002, "relative_init": "normal"}),
    (".*, constant rate", {"batch_size": "4/1", "steps": "1/4", "warmup_steps": "1/2"}),
)


@pytest.mark.parametrize("name", plan.named_arms())
def test_an_arm_is_what_its_name_says(name):
    keys = {}
    for words, says in SAYS:
        if found := re.match(rf"({words})\b", name):
            keys |= says if isinstance(says, dict) else says(found[2])
    assert keys == plan.named_arms()[name]


@pytest.mark.parametrize("scale", ["smoke", "gpu"])
def test_arms_that_differ_are_different_runs(scale):
    """But for the base's own number of experts, which is also an arm of the sweep."""
    base = SCALES[scale]["base"]
    made = made_of(TEXT, base)
    names = Counter(config.name for config in made.values())
    shared = [name for name, config in made.items() if names[config.name] > 1]
    of_base = f", {base['num_experts']} experts"
    assert all(name.endswith(of_base) or name + of_base in shared for name in shared)


def test_an_arm_is_its_base_and_its_keys():
    base = {"steps": 300, "d_ff": 128, "learning_rate": 0.5}
    assert plan.arm_keys("Dense", base) == {**base, "router": "dense"}
    assert plan.arm_keys("Dense", base, {"Dense": {"learning_rate": 0.1}})["learning_rate"] == 0.1
    own = {"Dense equal FLOPs": {"d_ff": 64}}  # of its scale, in place of the arm's
    assert (
        plan.arm_keys("Dense equal FLOPs", base, own)["d_ff"] == 64 and plan.arm_keys("Dense", base, own)["d_ff"] == 128
    )
    half = plan.arm_keys("EC-CF2 raw, 1/2 of the steps", base)
    assert half["steps"] == 150 and half["gate"] == "softmax" and half["learning_rate"] == 0.5
    assert plan.arm_keys("Dense equal FLOPs", base)["d_ff"] == 152  # 149.3, in whole multiples of 8
    assert plan.arm_keys("Dense equal FLOPs", {})["d_ff"] == 152  # RunConfig's own 128


def test_a_dense_twin_of_equal_flops_has_them():
    from ecmoe.model.build import count_parameters

    base = SCALES["gpu"]["base"]
    made = made_of(["EC-CF2 renormalized", "Dense equal FLOPs", "Dense"], base)
    active = {name: count_parameters(config).active for name, config in made.items()}
    assert active["Dense equal FLOPs"] == pytest.approx(active["EC-CF2 renormalized"], rel=0.005)
    assert active["Dense"] < 0.95 * active["EC-CF2 renormalized"]


def test_what_cannot_be_an_arm_is_said_with_its_name():
    with pytest.raises(ConfigError, match="'EC-CF2 renormalised': did you mean EC-CF2 renormalized"):
        plan.arm_keys("EC-CF2 renormalised", {})
    with pytest.raises(ConfigError, match=r"1/2 of the scale.s steps is 1\.5, which is no whole number"):
        plan.arm_keys("EC-CF2 raw, 1/2 of the steps", {"steps": 3})
    for key in ("steps", "warmup_steps", "batch_size"):
        assert plan.arm_keys("Dense", {key: 6}, {"Dense": {key: "1/2"}})[key] == 3
        with pytest.raises(ConfigError, match=rf"1/2 of the scale.s {key} is 2\.5, which is no whole number"):
            plan.arm_keys("Dense", {key: 5}, {"Dense": {key: "1/2"}})
    for share in ("half", "1/0"):
        with pytest.raises(ConfigError, match=f"arm 'Dense': .*steps='{share}' must be a number"):
            plan.arm_keys("Dense", {"steps": 4}, {"Dense": {"steps": share}})
    with pytest.raises(ConfigError, match="arm 'EC-CF2 raw': .*capacity_factor"):
        made_of(["EC-CF2 raw"], {"num_experts": 3, "batch_size": 1, "sequence_length": 2})


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
    """Nothing else keeps its numbers, as the results of a scale that are committed keep theirs."""
    overlays = {
        path.stem: yaml.safe_load(path.read_text()) for path in (paths.configs() / "scale/smoke").glob("*.yaml")
    }
    digits = {"data": "digits", "patch_size": 2, "sequence_length": 16, "moe_every": 1, "batch_size": 80, "steps": 100}
    kinds = ("EC raw", "Top-2 raw, batch priority", "Top-2 raw, order of arrival")
    arms = [f"{kind}, {places} a patch" for kind in kinds for places in ("0.1 places", "2 places")]
    assert SCALES["smoke"] | {"base": {}} == {"scale": "smoke", "seeds": [0], "base": {}}
    assert SCALES["smoke"]["base"] == {
        "data": "stdlib", "max_bytes": 4_000_000, "tokenizer": "bytes", "vocab_size": 256, "sequence_length": 128,
        "layers": 2, "d_model": 64, "d_ff": 128, "heads": 4, "num_experts": 8, "batch_size": 16, "steps": 80,
        "warmup_steps": 10, "learning_rate": 0.003, "eval_every": 20, "eval_batches": 4,
    }  # fmt: skip
    assert overlays == {
        "10_vision": {"base": digits | {"eval_every": 50}, "arms": arms},
        "11_continual_learning": {"seeds": [0, 1, 2]},
    }


def test_what_pages_rest_on_where_a_scale_says_nothing_else():
    """Their arms, one kind after the other, and what is measured or timed at smoke: who changes a page's YAML says so here, too."""
    EC, GS, capped = "EC-CF2 renormalized", "GShard top-2 renormalized", "EC-CAP{} renormalized".format
    places = ("0.1 places", "0.2 places", "0.5 places", "1 place", "2 places")
    vision = ("EC raw", "Top-2 raw, batch priority", "Top-2 raw, order of arrival")
    gates, scales = (
        ("raw", "renormalized", "scaled"),
        ["EC-CF2 raw, initial scale 4", "GShard top-2 raw, initial scale 4"],
    )
    switch = ["Switch top-1", "Switch top-1, no auxiliary loss"]
    sweep = [f"Switch top-1, capacity {c}" for c in (1, 2, 4, 8)]
    balanced = (
        "no auxiliary loss",
        "auxiliary weight 0.001",
        "auxiliary weight 0.1",
        "first choices counted",
        "capacity 1.25",
    )
    tuned = {"task": ["lines"], "steps": 60, "batch_size": 16, "learning_rate": 1e-3, "examples": 1000}
    pools = {
        "losses": {"pools": [4, 32, "sequence", 512, "batch", "position"]},
        "next-token": {"batches": 8, "classes": 32},
    }
    grown = {"n": [512, 1024, 2048, 4096], "num_experts": [4, 8, 16, 32], "capacity_factor": [0.5, 1.0, 2.0, 4.0]}
    expected = {
        "00_routing": {"sentence": "The cat sat on the mat and slept", "num_experts": 4, "capacity_factor": 2.0, "skew": 1.5},
        "01_convergence": [EC, f"{EC}, 3/4 of the steps", f"{EC}, 1/2 of the steps", "EC-CF2 raw", "EC-CF2 raw, 1/2 of the steps",
                           GS, "GShard top-2 raw", "GShard top-2 nothing dropped", *switch[:1], "Dense", "Dense equal FLOPs"],
        "02_load_balance": {"arms": [EC, GS, *(f"{GS}, {how}" for how in balanced), *switch, *sweep], "sweep": sweep},
        "03_capacity_factor": [*(f"EC-CF{c} renormalized" for c in (0.5, 1, 1.5, 2)), *switch[:1]],
        "04_capped_experts": {"arms": [EC, capped(2), capped(3), f"{capped(2)}, Dykstra"], "free": EC,
                              "measures": {what: {"arms": [EC]} for what in ("experts-by-token", "caps")}},
        "05_other_routers": {"arms": [EC, "EC-CF1 renormalized", "Hash modulo", "Hash balanced", "BASE", "K-means", "Task level",
                                      "Task level fixed", "Dense MoE, 8 experts", f"{EC}, 8 experts", GS, "Batch priority",
                                      "Loss-free bias", "Expert threshold renormalized"], "centre": EC},
        "06_number_of_experts": [f"{arm}, {e} experts" for arm in (EC, GS) for e in (4, 8, 16)],
        "07_fine_tuning": {"arms": [EC, GS, "Switch top-1", "Dense"], "measures": {"fine-tuned": tuned}},
        "08_step_time": {
            "layer_sizes": {"small": {"n": 2048, "d_model": 128, "d_ff": 512, "num_experts": 8}}, "step_sizes": {},
            "growth_from": {"n": 1024, "d_model": 64, "d_ff": 256, "num_experts": 8, "capacity_factor": 2.0},
            "growth_axes": grown | {"d_model": [32, 64, 128]}, "auto_sizes": [], "repeats": 9, "scaling": {"devices": [1]},
        },
        "09_causality": {"arms": [f"{EC}, pool sequence", f"{EC}, pool 512", EC, f"{EC}, pool position", "EC-CF2 raw, pool sequence",
                                  "Expert threshold renormalized"], "served": EC,
                         "measures": pools | {"dependence": {}, "decoding": {"arms": [EC], "seeds": [0]}}},
        "10_vision": {"arms": [f"{kind}, {c} a patch" for kind in vision for c in places],
                      "measures": {"accuracy-at": {"arms": [f"{kind}, 2 places a patch" for kind in vision],
                                                   "places": [0.1, 0.2, 0.5, 1.0, 2.0]}}},
        "12_recipe": [EC, f"{EC}, constant rate", GS],
        "13_gates": [*(f"{arm} {gate}" for arm in ("EC-CF2", "GShard top-2") for gate in gates), *scales, *switch[:1], "Dense"],
        "14_learning_rate": {"arms": [EC, "Dense"], "vary": {"learning_rate": [0.001, 0.003]}, "seeds": [100], "base": {"steps": 40}},
        "15_your_own_model": {"seeds": [0, 1, 2], "steps": 100, "d_model": 64, "num_experts": 8},
    }  # fmt: skip
    for page, rows in expected.items():
        found = yaml.safe_load((paths.configs() / f"{page}.yaml").read_text())
        wanted = rows if isinstance(rows, dict) else {"arms": rows}
        assert found == wanted, f"configs/{page}.yaml: was it changed on purpose? Then change it here, too"
    tasks = yaml.safe_load((paths.configs() / "11_continual_learning.yaml").read_text())
    assert tasks["arms"] == ["Expert Gate", "one dense network", "one EC network", "joint, dense", "joint, EC"]
    assert tasks["base"] == {
        "data": "digits", "patch_size": 4, "channels": 1, "classes": 10, "sequence_length": 4, "layers": 1, "moe_every": 1,
        "d_model": 32, "d_ff": 32, "heads": 4, "num_experts": 5, "capacity_factor": 2.0, "steps": 100, "batch_size": 50,
        "learning_rate": 0.003, "approach": "sequence", "tasks": 5, "code": 32, "gate_steps": 300, "gate_learning_rate": 0.01,
        "threshold": 0.85,
    }  # fmt: skip
    assert {*expected, "11_continual_learning"} == set(plan.pages("smoke"))


def test_pages_without_runs_at_scale_gpu_have_the_sizes_that_were_chosen():
    """Of a small ViT on CIFAR-10, as the pages say; runs that are committed would keep them."""
    vision, tasks = (
        yaml.safe_load((paths.configs() / f"scale/gpu/{page}.yaml").read_text())
        for page in ("10_vision", "11_continual_learning")
    )
    pictures = {"data": "images:data/cifar10#95271d06f8122dfd", "channels": 3, "sequence_length": 64}
    assert vision == {
        "base": pictures | {
            "augment": True, "patch_size": 4, "classes": 10, "layers": 8, "d_model": 384, "d_ff": 1536, "heads": 6,
            "num_experts": 8, "batch_size": 500, "steps": 3000, "warmup_steps": 200, "schedule": "linear",
            "decay_fraction": 0.5, "learning_rate": 0.001, "weight_decay": 0.05, "eval_every": 250, "eval_batches": 20,
            "checkpoint_every": 1000,
        }
    }  # fmt: skip
    fast = {"compile": True, "cuda_graph": True, "checkpoint_every": 3200}  # which no run's name keeps
    assert fast.items() <= SCALES["gpu"]["base"].items()
    small = {"layers": 4, "d_model": 128, "d_ff": 256, "steps": 1000, "batch_size": 250, "learning_rate": 0.001}
    gates = {"code": 64, "gate_steps": 4000, "gate_learning_rate": 0.001}
    assert tasks == {"seeds": [0, 1, 2], "base": pictures | small | gates}


def test_scale_paper_has_the_papers_size_and_glams_settings():
    from ecmoe.model.build import TABLE_1

    base, preset = SCALES["paper"]["base"], TABLE_1["0.1B/64E"].config
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
    assert {key: base[key] for key in glam} == glam and SCALES["paper"]["train_missing"] is False
    ours = {"steps": 100_000, "warmup_steps": 0, "activation_checkpointing": True, "eval_every": 1000}
    assert base == {key: base[key] for key in sizes} | glam | ours | {"accumulate": 16, "checkpoint_every": 1000}
    assert SCALES["paper"]["scale"] == "paper" and SCALES["paper"]["seeds"] == [0]
    overlays = {
        path.stem: yaml.safe_load(path.read_text()) for path in (paths.configs() / "scale/paper").glob("*.yaml")
    }
    pools = ("sequence", "2048", "position")
    arms = {f"EC-CF2 renormalized, pool {pool}" for pool in pools} | {
        "EC-CF2 renormalized",
        "EC-CF2 raw, pool sequence",
    }
    causality = overlays["09_causality"]
    assert set(causality.pop("arms")) == arms | {"Expert threshold renormalized"}
    assert causality == {
        "measures": {
            "dependence": {}, "next-token": {"batches": 8, "classes": 256},
            "losses": {"pools": [32, "sequence", 2048, "batch", "position"]},
            "decoding": {"arms": ["EC-CF2 renormalized"], "seeds": [0]},
        }
    }  # fmt: skip
    vision = {  # V-MoE-B/16, with as many images a step as it has (4,096), but for whole numbers of places
        "data": "images:data/imagenet", "augment": True, "patch_size": 16, "channels": 3, "classes": 1000,
        "sequence_length": 196, "num_experts": 32, "batch_size": 800, "accumulate": 5, "optimizer": "adamw",
        "learning_rate": 1e-3, "weight_decay": 0.1, "schedule": "linear", "decay_fraction": 1.0, "warmup_steps": 10_000,
    }  # fmt: skip
    assert overlays["10_vision"] == {"base": vision} and len(overlays) == 2
    large = {key: getattr(plan.plan("gpu", ["07_fine_tuning"])[0].config, key) for key in sizes[:6]}
    assert large == {key: base[key] for key in large}
