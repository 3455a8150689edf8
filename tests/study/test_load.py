"""The bar of a page that trains counts steps over all runs, and says which run it is and its last loss; one's own arm."""

from types import SimpleNamespace

import pytest
import torch
from tqdm import tqdm

from ecmoe.config import RunConfig
from ecmoe.model.build import flops_per_token
from ecmoe.study import load as module
from ecmoe.study.cost import hours_on_cpu
from ecmoe.study.load import beside, load, watching
from ecmoe.study.plan import Planned
from ecmoe.training.result import not_run


def planned(seed: int) -> Planned:
    config = RunConfig(steps=10, seed=seed)
    return Planned(config.name, config, ("01_a",), ("EC",), seed)


def test_steps_are_counted_over_all_runs():
    waiting = [planned(0), planned(1)]
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
    study = load("14_learning_rate", {"scale": "gpu", "train_missing": False})
    shown = beside(study, {"learning_rate": 0.0015})
    assert list(shown) == [*study, "yours"] and len(study) > 20
    assert shown["yours"][0].summary["config"]["learning_rate"] == 0.0015
    for arm in study:
        assert shown[arm][0].summary == study[arm][0].summary
    assert trained == ["yours"] == list(shown.train)  # whatever else is missing


@pytest.mark.parametrize(
    ("gpu", "scale", "told"), [(False, "gpu", True), (True, "gpu", False), (False, "smoke", False)]
)
def test_who_would_train_for_hours_without_a_gpu_is_told_before(monkeypatch, capsys, gpu, scale, told):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    said = []
    monkeypatch.setattr(module, "_result", lambda one, *_: said.append(capsys.readouterr().err) or not_run(one.config))
    study = load("13_gates", {"scale": scale, "train_missing": False})
    beside(study, {"gate": "softmax"})
    assert ("1 runs will take more than" in "".join(said)) is told


def test_hours_of_a_cpu_are_flops_over_its_rate(monkeypatch):
    monkeypatch.setattr(torch.utils.benchmark.Timer, "timeit", lambda *_: SimpleNamespace(median=2 * 1024**3 / 1e10))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = RunConfig(steps=10)
    hours = flops_per_token(config) * 10 * config.tokens_per_batch / 1e10 / 3600
    assert hours_on_cpu([config, config]) == pytest.approx(2 * hours)
