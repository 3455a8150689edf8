"""The bar of a page that trains counts steps over all runs, and says which run it is and its last loss; one's own arm."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tqdm import tqdm

from ecmoe import paths
from ecmoe.config import ConfigError, RunConfig
from ecmoe.files import Damaged, write_json, write_text
from ecmoe.measures import measurements
from ecmoe.model.build import flops_per_token
from ecmoe.study import load as module
from ecmoe.study.load import Study, beside, load, watching
from ecmoe.study.plan import Planned, of_page
from ecmoe.training.result import Result, not_run, write_record


def planned_of(seed: int) -> Planned:
    config = RunConfig(steps=10, seed=seed)
    return Planned(config.name, config, ("01_a",), ("EC",), seed)


def test_steps_are_counted_over_all_runs():
    waiting = [planned_of(0), planned_of(1)]
    with tqdm(total=20) as bar:
        for one, steps, told, ended in zip(waiting, ((4, 10), (3,)), (10, 13), (10, 20), strict=True):
            with watching(bar, one, waiting) as (watch,):
                for step in steps:
                    watch.on_train_batch_end(SimpleNamespace(global_step=step))
                watch.on_validation_end(SimpleNamespace(callback_metrics={"val_loss": 2.5}))
                assert bar.n == told
            assert bar.n == ended  # the second ended early
        assert bar.desc.startswith("run 2 of 2, EC s1") and "loss=2.500" in bar.postfix


def test_ones_own_arm_stands_beside_those_of_the_page(monkeypatch):
    trained = []
    found = lambda one, scale, train, callbacks: trained.extend([one.arms[0]] * train) or not_run(one.config)  # noqa: E731
    monkeypatch.setattr(module, "_result", found)
    study = load("14_learning_rate", {"scale": "gpu", "train_missing": False, "seeds": [101, 100]})
    shown = beside(study, {"learning_rate": 0.0015})
    assert list(shown) == [*study, "yours"] and len(study) > 20
    (mine,) = shown["yours"]
    assert (mine.summary["config"]["learning_rate"], mine.summary["seed"]) == (0.0015, 101)  # the first
    for arm in study:
        assert shown[arm][0].summary == study[arm][0].summary
    assert trained == ["yours"] == list(shown.train)  # whatever else is missing
    for wrong in (3, ["gate"], "EC-CF2 raw"):
        with pytest.raises(ConfigError, match="arm 'yours' must hold `key: value` lines, but holds"):
            beside(study, wrong)
    whole = replace(study, train={"one", "other"})
    monkeypatch.setattr(module, "load", lambda page, given, also: also)
    assert beside(whole, {}) == {"one", "other", "yours"}


def test_an_unknown_name_is_an_error_where_a_notebook_begins_and_its_own_later(monkeypatch):
    monkeypatch.setattr("ecmoe.study.parameters._CHECKED", set())
    page = {"scale": "smoke", "train_missing": False}
    for name in ("13_gates", "14_learning_rate"):
        with pytest.raises(ConfigError, match="has no parameter 'sed'"):
            load(name, page | {"sed": [3]})
        assert (study := load(name, page)).page == name
        assert load(name, page | {"sed": [3]}).parameters == study.parameters


@pytest.mark.parametrize(
    ("gpu", "scale", "told"), [(False, "gpu", True), (True, "gpu", False), (False, "smoke", False)]
)
def test_who_would_train_for_hours_without_a_gpu_is_told_before(monkeypatch, capsys, gpu, scale, told):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    said = []
    monkeypatch.setattr(module, "_result", lambda one, *_: said.append(capsys.readouterr().err) or not_run(one.config))
    study = load("13_gates", {"scale": scale, "train_missing": False})
    config = RunConfig.from_dict(beside(study, {"gate": "softmax"})["yours"][0].summary["config"])
    hours = (
        flops_per_token(config) * config.steps * config.tokens_per_batch / (8 * 100e9) / 3600
    )  # at 100 GFLOP/s a core
    assert (f"1 runs will take more than {hours:,.0f} hours" in "".join(said)) is told


def test_a_key_that_a_record_lacks_is_missed_by_its_name(tmp_path, monkeypatch):
    monkeypatch.setenv("ECMOE_HOME", str(tmp_path))
    one = planned_of(0)
    write_record(path := module.planning.record(one, "gpu"), not_run(one.config))
    study = Study(one.pages[0], "gpu", {}, [one], (), {"EC": [module.recorded(one, "gpu")]})
    summary = study["EC"][0].summary
    assert summary == not_run(one.config).summary and summary.get("tokens") is None
    with pytest.raises(Damaged, match=rf"runs/{path.name} is damaged \(it has no tokens\): delete it"):
        summary["tokens"]
    write_json(path, {"curve": {}}, sealed=True)
    for read in (module.recorded, module.engine.lacks):
        with pytest.raises(Damaged, match=rf"runs/{path.name} is damaged .*it has no summary"):
            read(replace(one, measures=tuple(measurements("caps", {}))), "gpu")


@pytest.mark.parametrize("lacking", ["", "a measurement", "measurements whose weights are here"])
def test_what_is_measured_without_weights_is_told_before_too(monkeypatch, tmp_path, capsys, lacking):
    """Three recorded runs, to be trained again for whichever of two measurements is missing."""
    page = {"scale": "gpu", "arms": ["EC-CF2 renormalized"], "seeds": [0, 1, 2]}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("ECMOE_HOME", str(tmp_path))
    monkeypatch.setattr(module, "_result", lambda one, *_: not_run(one.config))
    planned = module.planning.of_page("04_capped_experts", "gpu", page)
    for one in planned:
        record, *measured = module.engine.files(one, "gpu")
        write_json(record, {"summary": {"status": "finished"}}, sealed=True)
        for path in measured[bool(lacking) :]:
            write_json(path, {}, sealed=True)
        if "here" in lacking:
            write_text(paths.runs() / one.name / "model.safetensors", "")
    load("04_capped_experts", page | {"train_missing": True})
    told = "3 runs will take more than" in capsys.readouterr().err
    assert len(planned) == 3 and told is (lacking == "a measurement")


@pytest.mark.parametrize(
    ("hours", "cores", "said"),
    [(0.99, 8, ""), (2.0, 8, "3 runs will take more than 2 hours"), (1234.4, 8, "than 1,234 hours"), (2.0, None, "than 16 hours")],
)  # fmt: skip
def test_hours_are_the_flops_of_all_tokens_over_what_cores_do(monkeypatch, capsys, hours, cores, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(module.os, "cpu_count", lambda: cores)
    configs = [RunConfig(steps=steps) for steps in (1, 2, 5)]
    tokens = [config.steps * config.tokens_per_batch for config in configs]
    monkeypatch.setattr(
        "ecmoe.model.build.flops_per_token", lambda config: hours * 3600 * 8 * module.CORE / sum(tokens)
    )
    module.warn_of_hours(configs)
    told = capsys.readouterr().err
    assert told.count("\n") == bool(said) and said in told


def test_hours_of_tasks_in_sequence_are_those_of_all_tasks(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(module.os, "cpu_count", lambda: 1)
    config = of_page("11_continual_learning", "smoke")[0].config.replace(tasks=5)
    hour = 3600 * module.CORE / (config.steps * config.tokens_per_batch)
    monkeypatch.setattr("ecmoe.model.build.flops_per_token", lambda config: 2 * hour)
    module.warn_of_hours([config])
    assert "1 runs will take more than 10 hours" in capsys.readouterr().err


def test_what_was_measured_is_a_table_with_a_row_for_each_gap(monkeypatch):
    """Of two arms and seeds: one that has rows, one of plain numbers, one that is missing; the second arm is trained."""
    hows = list(measurements("accuracy-at", {"places": [0.5, 2.0]}))
    planned = [
        replace(one, arms=(arm,), name=f"{arm}{one.seed}") for one in map(planned_of, (0, 1)) for arm in ("a", "b")
    ]
    planned = [replace(one, measures=tuple(hows[: 2 - one.seed])) for one in planned]
    results = {arm: [Result({"name": f"{arm}{seed}"}) for seed in (0, 1)] for arm in "ab"}
    found = {("a0", 0.5): {"rows": [{"x": 1}, {"x": 2}]}, ("a0", 2.0): {"x": 3, "y": 4}, ("b0", 2.0): {"x": 5}}
    asked = []

    def take(result, how, *, scale, train):
        asked.append((result.summary["name"], how.name, scale, train))
        return found.get((result.summary["name"], how.keys["places"]))

    monkeypatch.setattr("ecmoe.study.load.measure", take)
    study = Study("01_a", "gpu", {}, planned, {"b"}, results)
    table = study.measured("accuracy-at")
    assert asked == [(one.name, how.name, "gpu", one.name[0] == "b") for one in planned for how in one.measures]
    assert table.fillna(0).to_dict("records") == [
        {"arm": arm, "seed": seed, "places": places, "x": x, "y": y}
        for arm, seed, places, x, y in (("a", 0, 0.5, 1, 0), ("a", 0, 0.5, 2, 0), ("a", 0, 2.0, 3, 4), ("b", 0, 0.5, 0, 0),
                                        ("b", 0, 2.0, 5, 0), ("a", 1, 0.5, 0, 0), ("b", 1, 0.5, 0, 0))
    ]  # fmt: skip
    assert list(study.measured("losses").columns) == ["arm", "seed"] and study.measured("losses").empty
    made = lambda result, how, *, scale: {"of": (result.summary["name"], how.name, scale)} if how == hows[0] else None  # noqa: E731
    monkeypatch.setattr("ecmoe.study.load.as_measured", made)
    assert study.as_measured() == [{"of": (name, hows[0].name, "gpu")} for name in ("a0", "b0", "a1", "b1")]


def test_a_run_that_fails_leaves_the_others_and_says_why(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("ECMOE_HOME", str(tmp_path))
    asked = []

    def run(config, *, train, progress, callbacks):
        asked.append((config, train, progress, callbacks))
        raise RuntimeError("no memory")

    monkeypatch.setattr("ecmoe.training.run.run_or_load", run)
    one = planned_of(3)
    lost = module._result(one, "gpu", True, ["bar"])
    assert (lost.summary["status"], lost.summary["error"]) == ("failed", "RuntimeError: no memory")
    assert lost.summary["name"] == one.name and "[EC s3] failed: no memory" in capsys.readouterr().err
    missing = module._result(one, "gpu", False, [])
    assert missing.summary["status"] == "not run" and asked == [(one.config, True, False, ["bar"])]
    (paths.runs() / one.name).mkdir(parents=True)
    (paths.runs() / one.name / "summary.json").touch()
    assert module._result(one, "gpu", False, []).summary["status"] == "failed"  # it was there to be read
    assert asked[1] == (one.config, False, False, [])
    record = paths.results("gpu", "runs") / f"{one.name}.json"
    write_record(record, not_run(one.config))
    assert (
        module._result(one, "gpu", True, []).summary["status"] == "not run" and len(asked) == 2
    )  # whatever lies in runs/


def test_only_what_is_missing_moves_the_bar(monkeypatch, tmp_path):
    monkeypatch.setenv("ECMOE_HOME", str(tmp_path))
    page = {"scale": "smoke", "seeds": [0, 1]}
    planned = module.planning.of_page("13_gates", "smoke", page)
    for path in (
        paths.runs() / planned[0].name / "summary.json",
        paths.results("smoke", "runs") / f"{planned[1].name}.json",
    ):
        path.parent.mkdir(parents=True)
        path.touch()
    bars, asked = [], []

    class Bar(tqdm):
        def __init__(self, **keys):
            super().__init__(**keys)
            bars.append((keys["total"], keys["disable"]))

    def found(one, scale, train, callbacks):
        asked.append((one.name, train, len(callbacks)))
        return not_run(one.config)

    monkeypatch.setattr("tqdm.auto.tqdm", Bar)
    monkeypatch.setattr(module, "_result", found)
    for trains in (True, False):
        study = load("13_gates", page | {"train_missing": trains})
        assert [len(results) for results in study.values()] == [2] * len(study) and len(planned) == 2 * len(study)
    left = planned[2:]
    assert bars == [(sum(one.config.steps for one in left), False), (0, True)]
    names = [one.name for one in planned]
    assert asked == [(name, True, int(name in names[2:])) for name in names] + [(name, False, 0) for name in names]
