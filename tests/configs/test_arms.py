"""configs/arms.yaml: every arm is named once, differs from every other, and can be built at every scale."""

import json
import re
from collections import Counter

import pytest
import yaml

from ecmoe import paths
from ecmoe.config import ConfigError
from ecmoe.study import plan

SCALES = {p.stem: yaml.safe_load(p.read_text()) for p in sorted((paths.configs() / "scale").glob("*.yaml"))}


def made_of(names, base):
    return {name: plan.config_of(name, plan.arm_keys(name, base), 0) for name in names}


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
    assert keys == plan.named_arms()[name], "a new word of a name needs a row in SAYS"


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


def test_what_cannot_be_an_arm_is_said_with_its_name(monkeypatch):
    with pytest.raises(ConfigError, match="'EC-CF2 renormalised': did you mean EC-CF2 renormalized"):
        plan.arm_keys("EC-CF2 renormalised", {})
    with pytest.raises(ConfigError, match=r"1/2 of the scale.s steps is 1\.5, which is no whole number"):
        plan.arm_keys("EC-CF2 raw, 1/2 of the steps", {"steps": 3})
    with pytest.raises(ConfigError, match="arm 'EC-CF2 raw': .*capacity_factor"):
        made_of(["EC-CF2 raw"], {"num_experts": 3, "batch_size": 1, "sequence_length": 2})
    for key in ("steps", "warmup_steps", "batch_size"):
        monkeypatch.setattr(plan, "named_arms", lambda key=key: {"Half": {key: "1/2"}})
        assert plan.arm_keys("Half", {key: 6})[key] == 3
        with pytest.raises(ConfigError, match=rf"1/2 of the scale.s {key} is 2\.5, which is no whole number"):
            plan.arm_keys("Half", {key: 5})
    for share in ("half", "1/0"):
        monkeypatch.setattr(plan, "named_arms", lambda share=share: {"Half": {"steps": share}})
        with pytest.raises(ConfigError, match=f"arm 'Half': .*steps='{share}' must be a number"):
            plan.arm_keys("Half", {"steps": 4})
