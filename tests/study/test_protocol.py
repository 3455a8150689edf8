"""The protocol: complete, readable, and about arms that exist."""

import re
from copy import deepcopy

import pytest
import yaml

from ecmoe import paths
from ecmoe.config import ConfigError
from ecmoe.study import protocol as module
from ecmoe.study.plan import named_arms
from ecmoe.study.protocol import find_claim, protocol
from ecmoe.study.units import Unit
from ecmoe.study.verdict import judge

WRITTEN = yaml.safe_load((paths.configs() / "protocol.yaml").read_text())
CLAIMS = protocol().claims
MARGINS = {Unit.NATS: 0.005}
PARTS = [(claim, part) for claim in CLAIMS.values() for part in claim.parts]


def test_every_claim_of_the_paper_is_judged_by_a_rule_that_says_what_would_refute_it():
    assert list(CLAIMS) == [f"C{i}" for i in range(1, 11)] + ["L1", "L2"]
    for id, claim in CLAIMS.items():
        assert (
            claim.id == id
            and claim.claim
            and len(claim.short) < 75
            and claim.paper
            and claim.where
            and claim.refuted_by
            and claim.differences
        )
        assert (paths.configs() / f"{claim.page}.yaml").exists() and claim.family
    assert CLAIMS["C5"].proxy and CLAIMS["C6"].proxy
    assert protocol().least_seeds >= 3


@pytest.mark.parametrize("claim, part", PARTS, ids=lambda x: getattr(x, "id", getattr(x, "name", "")))
def test_a_part_can_be_computed_and_put_in_words(claim, part):
    assert set(part.arms) <= set(named_arms()) and part.margin > 0
    assert part.found.format(size="1 nat", side="above") != part.found and part.rule
    assert ("{side}" in part.found) == (part.compares and part.unit is not Unit.RATIO)
    if part.how == "difference" and part.over:
        assert len(set(part.over)) > 1
    assert (part.name in [p.name for p in claim.family]) or not part.decides


def test_units_and_neutral_values_follow_from_what_is_compared():
    by_name = {(claim.id, part.name): part for claim, part in PARTS}
    steps = by_name["C1", "steps for an equal loss, renormalized gates"]
    assert (steps.unit, steps.neutral, steps.figure, steps.margin) == (Unit.RATIO, 1.0, 0.5, 0.02)
    assert by_name["C1", "all steps, raw gates"].sides == (
        "below",
        "above",
    )  # of a negative difference, of a positive one
    assert by_name["C7", "one or two experts"].terms == [(1, "share_1"), (1, "share_2")]
    leak = by_name["L1", "leak of the batch"]
    assert leak.terms == [(1, "val_loss_causal"), (-1, "val_loss")] and leak.unit is Unit.NATS and leak.compares
    assert by_name["C4", "against the most frequent class"].margin == 0.005  # the claim's own
    assert by_name["C2", "even routing, each on its best path"].arms == ()
    assert (
        len(CLAIMS["C1"].family) == sum(part.decides for part in CLAIMS["C1"].parts) + 2
    )  # the parts that can make it "in direction"


def test_the_unit_of_every_part_follows_from_how_it_compares_and_what():
    kinds = {"steps": "ratio", "time": "ratio", "bench": "ratio", "spread": "ratio", "accuracy": "share"}
    kinds |= dict.fromkeys(("train_loss", "val_loss", "val_loss_causal", "losses", "next-token"), "nats per token")
    kinds |= dict.fromkeys(("over_capacity", *(f"share_{j}" for j in range(9))), "share")
    what = [part.how if part.how != "difference" else re.split("[ /]", part.of)[0] for _, part in PARTS]
    assert [str(part.unit) for _, part in PARTS] == [kinds[kind] for kind in what] and len(set(what)) > 10


@pytest.mark.parametrize(
    "change, error",
    [
        ({"margn": 1}, "claim C1, part 'x': unknown key 'margn': did you mean margin"),
        ({"says": "under"}, "says='under': Input should be 'below'"),
        ({"how": "magic"}, "how='magic': Input should be 'difference'"),
        ({"says": "near"}, "says=near needs a figure"),
        ({"of": "val_los"}, "of='val_los': there is no metric 'val_los'"),
        ({"of": "loses/sequence"}, "there is no measurement 'loses'"),
        ({"over": [1, 2]}, "over has 2 numbers for 1 arms"),
        ({"a": ["Dense", "BASE"], "over": [1]}, "over has 1 numbers for 2 arms"),
        ({"or_direction": "x"}, "or_direction needs `direction`"),
        ({"or_direction": "y", "direction": "it does"}, "or_direction='y' isn't one of its parts"),
        ({"decides": False}, "claim C1: one part or more must have decides: true"),
        ({"a": "BAZE"}, "there is no arm 'BAZE': did you mean BASE"),
        ({"a": []}, "a=\\[\\]: Value should have at least 1 item"),
        ({"margin": 0}, "margin=0: Input should be greater than 0"),
        ({"margin": float("inf")}, "margin=inf: Input should be a finite number"),
        ({"found": "{siz}"}, "found='{siz}' may contain only {size} and {side}"),
        ({"sides": ["less"]}, "sides: 1 is missing"),
        ({"decides": "perhaps"}, "decides='perhaps': Input should be a valid boolean"),
    ],
)
def test_what_is_wrong_in_the_protocol_is_named(change, error):
    part = {
        "name": "x",
        "a": "Dense",
        "b": "BASE",
        "of": "val_loss",
        "says": "below",
        "found": "{size}",
        "decides": True,
    }
    keys = {
        "page": "01_convergence",
        "short": "s",
        "claim": "c",
        "paper": "p",
        "where": "4",
        "refuted_by": "r",
        "differences": "d",
    }
    with pytest.raises(ConfigError, match=error):
        module._claim("C1", {**keys, "parts": [part | change]}, MARGINS)
    for key in keys:
        with pytest.raises(ConfigError, match=f"claim C1: {key} is missing"):
            module._claim("C1", {**{other: keys[other] for other in keys if other != key}, "parts": [part]}, MARGINS)
    for key in ("name", "a", "says", "found", "of"):
        with pytest.raises(ConfigError, match=f"{key} is missing"):
            module._claim("C1", {**keys, "parts": [{k: v for k, v in part.items() if k != key}]}, MARGINS)
    with pytest.raises(ConfigError, match="two parts have the name 'x'"):
        module._claim("C1", {**keys, "parts": [part, part]}, MARGINS)
    later = [part | {"or_direction": "y", "direction": "it does"}, part | {"name": "y"}]
    assert (
        module._claim("C1", {**keys, "parts": later}, MARGINS).family[0].or_direction == "y"
    )  # of those below it, too
    beside = {"name": "y", "decides": False, "or_direction": "z", "direction": "it does"}
    helped = [part, part | beside, part | {"name": "z", "decides": False}]
    assert [one.name for one in module._claim("C1", {**keys, "parts": helped}, MARGINS).family] == ["x"]
    for own, margin in (({}, 0.005), ({"margin": 0.02}, 0.02)):
        claim = module._claim("C1", {**keys, "parts": [part | own]}, MARGINS)
        assert claim.parts[0].margin == margin and claim.parts[0].sides == ("below", "above")
    narrow = module._claim("C1", {**keys, "margins": {"nats per token": 0.001}, "parts": [part]}, MARGINS)
    assert narrow.parts[0].margin == 0.001  # the claim's own


@pytest.mark.parametrize(
    "keys, value, error",
    [
        ("", ["claims"], "protocol: .*should be a valid dictionary"),
        ("level", 1, "protocol: level=1: Input should be less than 1"),
        ("power", 0, "protocol: power=0: Input should be greater than 0"),
        ("least_seeds", 1, "protocol: least_seeds=1: Input should be greater than or equal to 2"),
        ("margins ratio", 0, "margins: ratio=0: Input should be greater than 0"),
        ("level", None, "protocol: level=None: Input should be a valid number"),
        ("margin", {}, "protocol: unknown key 'margin'"),
        ("margins", {"nats per token": 0.005}, "margins has no entry for ratio"),
        ("margins nats", 1, "margins: nats: .*Input should be 'nats per token'"),
        ("claims C1", "x", "claims: C1='x'"),
        ("claims C1 parts", [1], "claim C1: parts: 0=1"),
        ("claims C1 page", "01_convergenc", "claim C1: page='01_convergenc': there is no configs/01_convergenc.yaml"),
        ("claims C1 shorts", "x", "claim C1: unknown key 'shorts': did you mean short"),
        ("claims C1 margins", {"ratio": "x"}, "claim C1: margins: ratio='x'"),
        ("amendments", [{"date": "today"}], "amendments: 0: date='today'"),
    ],
)
def test_what_is_wrong_in_the_whole_file_is_named(keys, value, error, tmp_path, monkeypatch):
    written = {"": deepcopy(WRITTEN)}
    *outer, last = ["", *keys.split()] if keys else [""]
    inner = written
    for key in outer:
        inner = inner[key]
    inner[last] = value
    monkeypatch.setattr(module, "read_yaml", lambda path, what: written[""])
    with pytest.raises(ConfigError, match=error):
        protocol.__wrapped__()


def test_a_file_needs_no_lists(monkeypatch):
    written = {"level": 0.9, "least_seeds": 4, "power": 0.7, "margins": {"ratio": 0.1}, "amendments": [], "claims": {}}
    monkeypatch.setattr(module, "read_yaml", lambda path, what: written)
    found = protocol.__wrapped__()
    assert found == module.Protocol(**written | {"margins": {Unit.RATIO: 0.1}})


def test_an_unknown_claim_suggests_the_near_one():
    for find in (find_claim, lambda claim: judge(claim, "smoke")):
        with pytest.raises(ConfigError, match="claim 'C11': did you mean C1"):
            find("C11")


def test_amendments_say_when_what_and_why():
    for amendment in WRITTEN["amendments"]:
        assert set(amendment) == {"date", "claims", "what", "why"} and all(amendment.values())
        assert set(amendment["claims"]) <= set(CLAIMS)


@pytest.mark.parametrize(
    ("keys", "rule"),
    [
        ({"says": "below"}, "below 0 by more than 0.005 nats, which counts as equal"),
        ({"says": "above", "how": "time"}, "above 1 by more than 2%, which counts as equal"),
        ({"says": "above", "of": "accuracy", "neutral": 0.5}, "above 50% by more than 3.0 points, which counts as equal"),
        ({"says": "above", "how": "bench", "figure": 1.2}, "above 1.2 times, the paper's figure; above 1 by more than 2%: in direction"),
        ({"says": "below", "of": "share_3", "figure": 0.25}, "below 25%, the paper's figure; below 0 by more than 3.0 points: in direction"),
        ({"says": "below", "of": "accuracy_causal", "how": "accuracy"}, "below 0 by more than 3.0 points, which counts as equal"),
        ({"says": "near", "of": "share_3", "figure": 0.23}, "within 3.0 points of 23%"),
        ({"says": "at or below"}, "at or below 0; above it by 0.005 nats or less counts as equal"),
        ({"says": "at or below", "or_direction": "y", "direction": "it does"},
         "at or below 0; above it by 0.005 nats or less counts as equal; in direction if it does (\u201cy\u201d)"),
    ],
)  # fmt: skip
def test_a_rule_in_words(keys, rule):
    margins = {Unit.NATS: 0.005, Unit.RATIO: 0.02, Unit.SHARE: 0.03}
    usual = {"name": "x", "a": ["Dense", "BASE"], "b": "Dense", "of": "val_loss", "found": "{size}"}
    part = module._part("claim C1", usual | keys, margins)
    assert part.rule == rule and part.arms == (() if part.how == "bench" else ("Dense", "BASE"))  # each once
