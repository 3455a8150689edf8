"""The committed verdicts, computed again from the records by numpy and scipy alone: nothing of ecmoe/study but what is tested."""

import json
import math
from fractions import Fraction
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy.stats import t

ROOT = Path(__file__).parents[2]
GPU, CONFIGS = ROOT / "reports/gpu", ROOT / "configs"
# What a router reads of a config; a run is an arm's if it has all other keys, and these, as scale and arm say.
READ = {
    "dense": [],
    "hash": ["num_experts", "capacity_factor"],
    "expert_choice": ["num_experts", "capacity_factor", "gate", "pool", "max_experts_per_token", "cap_solver"],
    "token_choice": ["num_experts", "capacity_factor", "top_k", "gate", "priority", "balance", "aux_loss_weight"],
}
DEFAULTS = {
    "pool": "batch", "max_experts_per_token": None, "cap_solver": "feasible", "priority": "order", "balance": "switch",
    "aux_loss_weight": 0.01, "relative_init": "alibi",
}  # fmt: skip
ALL = {
    "router",
    "steps",
    "d_ff",
    "batch_size",
    "learning_rate",
    "schedule",
    "warmup_steps",
    "relative_init",
    "moe_init_scale",
}


@cache
def written(path):
    return yaml.safe_load((CONFIGS / path).read_text())


@cache
def records():
    return [json.loads(path.read_text())["summary"] for path in (GPU / "runs").glob("*.json")]


@cache
def runs(arm):
    """Seed -> summary."""
    base = written("scale/gpu.yaml")["base"]
    keys = {"moe_init_scale": 1.0} | DEFAULTS | base | written("arms.yaml")[arm]
    keys |= {
        key: float(Fraction(x) * base[key])
        for key, x in keys.items()
        if key in base and "/" in str(x) and key != "data"
    }
    keys["d_ff"] = 8 * math.ceil(keys["d_ff"] / 8)
    same = ALL | set(READ.get(keys["router"], ()))
    of_arm = [one for one in records() if all(one["config"][key] == keys[key] for key in same)]
    return {one["seed"]: one for one in of_arm}


def value(run, column):
    what, _, row = column.partition("/")
    if not row:
        return run.get(column, run["routing"].get(column))
    (path,) = (GPU / "measures" / run["name"]).glob(f"{what}-*.json")
    (loss,) = (one["loss"] for one in json.loads(path.read_text())["found"]["rows"] if one["way"] == row)
    return loss


def of(run, expression):
    """ "a - b + c" of a run's columns."""
    total, sign = 0.0, 1
    for word in expression.replace(" - ", "\0-\0").replace(" + ", "\0+\0").split("\0"):
        if word in "+-":
            sign = 1 if word == "+" else -1
        else:
            total += sign * value(run, word)
    return total


def sample(part):
    """A value of the effect for each seed or turn; of ratios the logarithm."""
    a, b = ([x] if isinstance(x, str) else x for x in (part["a"], part.get("b", [])))
    how, over = part.get("how"), part.get("over")
    if how == "bench":
        rows = json.loads((GPU / "bench/step.json").read_text())["rows"]
        asked = [
            [r for r in rows if r["arm"] == arm and (r["routing"] == part["of"] or "EC" in arm)] for (arm,) in (a, b)
        ]
        best = [min(of_arm, key=lambda row: row["ms"])["samples_ms"] for of_arm in asked]
        return np.log(best[0]) - np.log(best[1])
    found = []
    for seed in set.intersection(*(set(runs(arm)) for arm in [*a, *b])):
        x, y = ([of(runs(arm)[seed], part["of"]) for arm in arms] for arms in (a, b))
        if how in ("steps", "time"):  # where the loss is the other's, on the line between two horizons
            i = next((i for i in range(len(x) - 2) if x[i + 1] <= y[0]), len(x) - 2)
            found.append(np.polyval(np.polyfit(x[i : i + 2], np.log(over[i : i + 2]), 1), y[0]))
        elif over:
            found.append(np.polyfit(np.log2(over), x, 1)[0])
        else:
            found.append(np.mean(x) - (np.mean(y) if y else 0.0))
    if how == "time":
        (path,) = (GPU / "bench").glob("study-*.json")
        ms = {row["arm"]: row["ms"] for row in json.loads(path.read_text())["rows"]}
        found = np.add(found, math.log(ms[a[-1]] / ms[b[0]]))
    return np.array(found)


def decided(part, margin, mean, error, df):
    """(label, alpha) of all that can be said of a part with some confidence: the label holds from that alpha on."""
    log = part.get("how") in ("bench", "steps", "time")
    inner = math.log if log else float
    said, neutral, figure = part["says"], inner(part.get("neutral", 1.0 if log else 0.0)), part.get("figure")
    if said == "near":
        inside = margin - abs(mean - figure)
        return [("reproduced" if inside > 0 else "contradicted", 2 * t.sf(abs(inside) / error, df))]
    sign = 1 if said == "above" else -1
    ahead = sign * (mean - neutral)  # on the claim's side
    if said == "at or below":
        return [("reproduced" if ahead > -margin else "contradicted", 2 * t.sf(abs(ahead + margin) / error, df))]
    enough = margin if figure is None else sign * (inner(figure) - neutral)
    some = "reproduced in direction" if ahead > 0 else "contradicted"
    return [  # the first that holds
        ("no effect", 2 * t.sf((margin - abs(ahead)) / error, df)),
        ("reproduced", 2 * t.sf((ahead - enough) / error, df)),
        (some, 2 * t.sf(abs(ahead) / error, df)),
    ]


def test_every_deciding_part_and_every_label(committed_verdicts):
    rules, order = (
        written("protocol.yaml"),
        ("reproduced", "reproduced in direction", "undecided", "no effect", "contradicted"),
    )
    verdicts, compared = committed_verdicts, 0
    for id, claim in rules["claims"].items():
        helping = {part.get("or_direction") for part in claim["parts"]}
        family = {part["name"]: part for part in claim["parts"] if part.get("decides") or part["name"] in helping}
        found, labels = {}, {}
        for name, part in family.items():
            x = sample(part) if part.get("how") != "accuracy" else []
            if len(x) < 3:
                continue
            log = part.get("how") in ("bench", "steps", "time")
            kind = "ratio" if log else "nats per token" if "loss" in part["of"] else "share"
            margin = part.get("margin", (rules["margins"] | claim.get("margins", {}))[kind])
            spread = (x.mean(), x.std(ddof=1) / math.sqrt(len(x)), len(x) - 1)
            found[name] = *spread, log, decided(part, math.log1p(margin) if log else margin, *spread)
        stopped = None
        for rank, name in enumerate(sorted(found, key=lambda name: min(p for _, p in found[name][-1]))):
            mean, error, df, log, said = found[name]
            alpha = stopped or (1 - rules["level"]) / (len(family) - rank)
            labels[name] = next((label for label, p in said if p <= alpha), "undecided")
            stopped = alpha if labels[name] == "undecided" else stopped
            half = t.isf(alpha / 2, df) * error
            ends = [math.exp(v) if log else v for v in (mean, mean - half, mean + half)]
            (part,) = (part for part in verdicts[id].parts if part.name == name)
            assert (part.effect.value, *part.interval) == pytest.approx(ends, abs=1e-9), f"{id} {name}"
            compared += 1
        for name, part in family.items():
            helper = labels.get(part.get("or_direction"))
            if helper and labels[name] != "reproduced":
                labels[name] = (
                    "reproduced in direction"
                    if "reproduced" in helper
                    else helper
                    if helper == "undecided"
                    else labels[name]
                )
        deciding = {name: labels.get(name, "not run") for name, part in family.items() if part.get("decides")}
        assert {part.name: part.label for part in verdicts[id].deciding} == deciding, id
        ran = [label for label in deciding.values() if label != "not run"]
        worst = max(ran + ["undecided"] * (len(ran) < len(deciding)), key=order.index) if ran else "not run"
        assert verdicts[id].label == worst, id
    assert compared > 25
