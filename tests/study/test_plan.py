"""A study: all configs checked first, seed by seed, and one failure doesn't stop the rest."""

import pytest

from ecmoe import paths
from ecmoe.config import ConfigError
from ecmoe.study import plan as study
from ecmoe.training import run as train
from ecmoe.training.result import not_run

ARMS = {"EC": {}, "Top-1": {"router": "token_choice", "top_k": 1}}


def test_a_bad_arm_is_named_before_anything_runs(monkeypatch):
    monkeypatch.setattr(train, "run_or_load", lambda *a, **k: pytest.fail("ran"))
    with pytest.raises(ConfigError, match="arm 'Top-1'.*top_k"):
        study.run_study({}, ARMS | {"Top-1": {"router": "token_choice", "top_k": 99}}, [0])


def test_seed_by_seed_and_failures_are_kept(monkeypatch, capsys):
    asked = []

    def run(config, records, train):
        asked.append((config.router, config.seed))
        assert records is None and train
        if config.router == "token_choice":
            raise RuntimeError("no disk")
        return not_run(config)

    monkeypatch.setattr(train, "run_or_load", run)
    runs = study.run_study({"steps": 5}, ARMS, [0, 1])
    assert asked == [("expert_choice", 0), ("token_choice", 0), ("expert_choice", 1), ("token_choice", 1)]
    assert [r.summary["status"] for r in runs["Top-1"]] == ["failed", "failed"]
    assert "no disk" in runs["Top-1"][0].summary["error"] and "no disk" in capsys.readouterr().err
    assert [r.summary["config"]["steps"] for r in runs["EC"]] == [5, 5]


def test_larger_scales_use_committed_records(monkeypatch):
    monkeypatch.setattr(
        train, "run_or_load", lambda c, records, train: not_run(c) if records == paths.records("gpu") else 1 / 0
    )
    assert study.run_study({}, ARMS, [0], scale="gpu")["EC"][0].summary["status"] == "not run"


def test_an_arm_may_have_seeds_of_its_own(monkeypatch):
    asked = []
    monkeypatch.setattr(train, "run_or_load", lambda c, **_: asked.append((c.router, c.seed)) or not_run(c))
    more = {"EC": {"seeds": [0, 1, 2]}, "Top-1": ARMS["Top-1"]}
    runs = study.run_study({}, more, [0])
    assert asked == [("expert_choice", 0), ("token_choice", 0), ("expert_choice", 1), ("expert_choice", 2)]
    assert [len(runs[label]) for label in more] == [3, 1]
    assert more["EC"] == {"seeds": [0, 1, 2]}  # as it was given


def test_seeds_for_an_arm_that_is_not_there_are_an_error():
    arms = study.with_seeds(ARMS, {"EC": [0, 1, 2]})
    assert {label: [c.seed for c in made] for label, made in study.configs({}, arms, [5]).items()} == {
        "EC": [0, 1, 2],
        "Top-1": [5],
    }
    with pytest.raises(ConfigError, match="more_seeds names arm 'EC-CF9', but the arms are EC, Top-1"):
        study.with_seeds(ARMS, {"EC-CF9": [0]})
    with pytest.raises(ConfigError, match="second_look names arm 'EC-CF9'"):
        study.with_seeds(ARMS, {}, ["EC-CF9"])
