"""The committed verdicts, computed again from the records by numpy and scipy alone: nothing of ecmoe/study but what is tested."""

import base64
import json
import math
from fractions import Fraction
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy.optimize import brentq
from scipy.stats import t

ROOT = Path(__file__).parents[2]
GPU, CONFIGS = ROOT / "reports/gpu", ROOT / "configs"
# What a router reads of a config; a run is an arm's if it has all other keys, and these, as scale and arm say.
READ = {
    "dense": [],
    "hash": ["num_experts", "capacity_factor", "hash_table"],
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


def of_page(page):
    """The keys of a page at scale gpu: the scale's, and the page's own over them."""
    return {key: x for path in ("scale/gpu.yaml", f"scale/gpu/{page}.yaml") if (CONFIGS / path).exists()
            for key, x in written(path).get("base", {}).items()}  # fmt: skip


@cache
def runs(arm, page):
    """Seed -> summary."""
    base = of_page(page)
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
    if not (kept := list((GPU / "measures" / run["name"]).glob(f"{what}-*.json"))):
        return math.nan  # a seed that another page trains, and none measures
    (path,) = kept
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


def answers(run, expression):
    """Task -> (N,) a bit for each of its validation examples, minus the share that `expression` subtracts; only if all tasks are there."""
    key, _, less = expression.partition(" - ")
    tasks = written("scale/gpu/07_fine_tuning.yaml")["measures"]["fine-tuned"]["task"]
    kept = [
        json.loads(path.read_text())["found"] for path in (GPU / "measures" / run["name"]).glob("fine-tuned-*.json")
    ]
    found = {}
    for one in kept:
        (row,) = one["rows"]
        bits = base64.b64decode(one[key.replace("accuracy", "right")])
        each = np.array([bits[i // 8] >> (7 - i % 8) & 1 for i in range(row["validation"])])
        assert each.mean() == pytest.approx(row[key])
        found[row["task"]] = each - (row[less] if less else 0.0)
    return found if sorted(found) == sorted(tasks) else {}


def of_examples(part, page):
    """(mean, [(error, df)], n) of a difference of accuracies: seeds and examples are both drawn."""
    (a,), (b,) = ([part[key]] if isinstance(part[key], str) else part[key] for key in "ab")
    pairs = [
        (answers(run, part["of"]), answers(runs(b, page)[seed], part["of"]))
        for seed, run in runs(a, page).items()
        if seed in runs(b, page)
    ]
    pairs = [(x, y) for x, y in pairs if x and y]
    if not pairs:
        return math.nan, [], 0
    seeds = np.array([np.mean([x[task].mean() - y[task].mean() for task in x]) for x, y in pairs])
    tasks = [np.mean([x[task] - y[task] for x, y in pairs], axis=0) for task in pairs[0][0]]
    variance = sum(each.var(ddof=1) / len(each) for each in tasks) / len(tasks) ** 2
    of_examples = (math.sqrt(variance), sum(len(each) - 1 for each in tasks))
    return seeds.mean(), [*of_seeds(seeds), of_examples], len(seeds)


def of_seeds(x):
    return [(x.std(ddof=1) / math.sqrt(len(x)), len(x) - 1)] if len(x) > 1 else []


def half(errors, alpha):
    """Half of an interval's width: of each source of error alone, then the root of their squares' sum."""
    return math.sqrt(sum((error * t.isf(alpha / 2, df)) ** 2 for error, df in errors))


def sure(distance, errors):
    """The alpha whose interval is as wide to one side; 1 if none of 0.999 or less is that narrow."""
    if distance <= 0:
        return 1.0
    inside = lambda log: half(errors, math.exp(log)) - distance  # noqa: E731
    return math.exp(brentq(inside, -200, math.log(0.999), xtol=1e-12)) if inside(math.log(0.999)) < 0 else 1.0


def sample(part, page):
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
    for seed in set.intersection(*(set(runs(arm, page)) for arm in [*a, *b])):
        x, y = ([of(runs(arm, page)[seed], part["of"]) for arm in arms] for arms in (a, b))
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
    return np.array(found)[~np.isnan(found)]


def decided(part, margin, mean, errors):
    """(label, alpha) of all that can be said of a part with some confidence: the label holds from that alpha on."""
    log = part.get("how") in ("bench", "steps", "time")
    inner = math.log if log else float
    said, neutral, figure = part["says"], inner(part.get("neutral", 1.0 if log else 0.0)), part.get("figure")
    if said == "near":
        inside = margin - abs(mean - figure)
        return [("reproduced" if inside > 0 else "contradicted", sure(abs(inside), errors))]
    sign = 1 if said == "above" else -1
    ahead = sign * (mean - neutral)  # on the claim's side
    if said == "at or below":
        return [("reproduced" if ahead > -margin else "contradicted", sure(abs(ahead + margin), errors))]
    enough = margin if figure is None else sign * (inner(figure) - neutral)
    some = "reproduced in direction" if ahead > 0 else "contradicted"
    return [  # the first that holds
        ("no effect", sure(margin - abs(ahead), errors)),
        ("reproduced", sure(ahead - enough, errors)),
        (some, sure(abs(ahead), errors)),
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
            if part.get("how") == "accuracy":
                mean, errors, n = of_examples(part, claim["page"])
            else:
                x = sample(part, claim["page"])
                mean, errors, n = x.mean() if len(x) else math.nan, of_seeds(x), len(x)
            (judged,) = (part for part in verdicts[id].parts if part.name == name)
            assert judged.effect.n == n and judged.effect.mean == pytest.approx(mean, nan_ok=True), f"{id} {name}"
            if n > 1:
                wide = half(errors, 1 - judged.level)
                assert judged.effect.inner(judged.level) == pytest.approx((mean - wide, mean + wide), abs=1e-9)
            if n < rules["least_seeds"]:
                labels |= {name: "undecided"} if n else {}
                continue
            log = part.get("how") in ("bench", "steps", "time")
            kind = "ratio" if log else "nats per token" if "loss" in part["of"] else "share"
            margin = part.get("margin", (rules["margins"] | claim.get("margins", {}))[kind])
            said = decided(part, math.log1p(margin) if log else margin, mean, errors)
            found[name] = mean, errors, log, said
        stopped = None
        for rank, name in enumerate(sorted(found, key=lambda name: min(p for _, p in found[name][-1]))):
            mean, errors, log, said = found[name]
            alpha = stopped or (1 - rules["level"]) / (len(family) - rank)
            labels[name] = next((label for label, p in said if p <= alpha), "undecided")
            stopped = alpha if labels[name] == "undecided" else stopped
            ends = (mean, mean - half(errors, alpha), mean + half(errors, alpha))
            ends = [math.exp(v) if log else v for v in ends]
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
