"""Tasks in sequence: rivals of Expert Gate, what is measured after each task, and runs that are kept; against loops and numbers done by hand."""

import inspect
import math
import warnings
from contextlib import nullcontext
from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ecmoe import paths
from ecmoe.config import ConfigError, RunConfig
from ecmoe.continual import ContinualConfig, learning
from ecmoe.continual.expert_gate import ExpertGate, new_expert, new_gate
from ecmoe.continual.learning import OneNetwork, as_large, count, final_and_forgetting, run, split
from ecmoe.data import images
from ecmoe.files import Damaged
from ecmoe.training.result import read_record
from ecmoe.training.run import run_or_load
from tests.continual.small import DENSE, EC, GATE, page


@pytest.fixture(scope="module")
def study():
    """The summary of every approach on split digits, one seed: some seconds in all."""
    return {arm: run_or_load(config).summary for arm, config in page(steps=40).items()}


# Networks and tasks


@pytest.mark.parametrize("config", [DENSE, EC])
def test_rivals_are_as_large_as_expert_gate(config):
    whole = 5 * (count(new_expert(GATE, 2)) + count(new_gate(GATE)))
    step = 2 * config.d_model * config.num_experts if config is EC else 3 * config.d_model
    assert abs(count(OneNetwork(config).model) - whole) <= step / 2


def test_as_large_takes_the_nearest_width():
    sizes = {f: count(learning.LitClassifier(DENSE.replace(d_ff=f))) for f in range(1, 40)}
    for wanted in (0, 2000, 3333):
        nearest = min(sizes.values(), key=lambda size: abs(size - wanted))
        assert sizes[as_large(DENSE, wanted).d_ff] == nearest


def test_one_network_is_never_compiled(monkeypatch):
    monkeypatch.setattr("ecmoe.training.lit.import_module", lambda name: pytest.fail(f"{name} takes seconds"))
    assert OneNetwork(DENSE.replace(compile=True)).config == OneNetwork(DENSE).config


@pytest.mark.parametrize("config", [DENSE, EC])
def test_answers_come_in_the_order_of_the_images(config):
    """Where all fit into one batch, mixing changes nothing but who is computed when."""
    torch.manual_seed(0)
    tasks = split(images.load("digits"), config, "cpu")
    network = OneNetwork(config)
    x = [task.val_x[:10] for task in tasks]
    said, told = network.answers(x, [task.classes for task in tasks])
    logits = network.model(torch.cat(x))
    assert torch.cat(said).tolist() == logits.argmax(1).tolist() and torch.cat(said).unique().numel() > 1
    for k, task in enumerate(tasks):
        own = logits[10 * k : 10 * k + 10, task.classes]
        assert told[k].tolist() == task.classes[own.argmax(1)].tolist()


def test_images_of_all_tasks_come_mixed_in_batches_as_in_training():
    size = 100
    network, seen = OneNetwork(EC.replace(batch_size=size)), []
    network.model.register_forward_pre_hook(lambda _, given: seen.append(given[0][:, 0, 0, 0]))
    x = [torch.full((size * 2 // 3 + (k == 3), 1, 8, 8), k / 5) for k in range(5)]  # no whole number of places
    network.answers(x, [torch.tensor([2 * k, 2 * k + 1]) for k in range(5)])
    assert [len(batch) for batch in seen] == [size] * 3 + [len(x[0]) * 5 + 1 - 3 * size]
    assert all(batch.unique().numel() == 5 for batch in seen)
    assert torch.equal(torch.cat(seen).sort().values, torch.cat(x)[:, 0, 0, 0])
    order = torch.randperm(len(x[0]) * 5 + 1, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.cat(seen), torch.cat(x)[order, 0, 0, 0])
    first, seen[:] = torch.cat(seen), []
    torch.manual_seed(1)
    network.answers(x, [torch.tensor([2 * k, 2 * k + 1]) for k in range(5)])
    assert torch.equal(torch.cat(seen), first)  # always the same


def test_balance_losses_are_trained_on(monkeypatch):
    losses = []

    def fit(config, learnt, loss, *examples):
        assert learnt.training
        losses.append(float(loss(examples)))

    monkeypatch.setattr(learning, "fit", fit)
    task = split(images.load("digits"), EC, "cpu")[0]
    for weight in (0.0, 10.0):
        network = OneNetwork(EC.replace(router="token_choice", aux_loss_weight=weight)).eval()
        network.learn(task.x, task.y, task.held)
        assert not network.model.training  # what comes next are answers
    assert losses[1] - losses[0] > 5  # the balance loss is at least about 1


@pytest.mark.parametrize("there", [True, False])
def test_tasks_lie_on_the_gpu_where_there_is_one(there, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(learning, "split", lambda data, config, device: pytest.fail(f"on {device}"))
    with pytest.raises(BaseException, match="on cuda" if there else "on cpu"):
        run(GATE)


@pytest.mark.parametrize("there", [True, False])
def test_random_numbers_of_other_gpus_are_left_alone(there, monkeypatch):
    """To keep their state would set up each of them, which takes memory and seconds."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(learning, "split", lambda *how: [])
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: pytest.fail(f"of {devices}"))
    with pytest.raises(BaseException, match=r"of \[3\]" if there else r"of \[\]"):
        run(GATE)


@pytest.mark.parametrize("there", [True, False])
def test_products_on_a_gpu_are_as_precise_whatever_was_trained_before(there, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", asked.append)
    monkeypatch.setattr(learning, "circumstances", dict)
    monkeypatch.setattr(learning, "repeatable", nullcontext)
    found = dict.fromkeys(("accuracy", "accuracy_task_known"), [[1.0, None], [1.0, 1.0]])
    monkeypatch.setattr(learning, "run", lambda config: asked.append("run") or dict(found))
    learning.train_run(GATE, tmp_path, progress=False)
    assert asked == ["high"] * there + ["run"]


def test_tasks_are_disjoint_and_hold_every_image():
    data = images.load("digits")
    tasks = split(data, DENSE.replace(held_out=7), "cpu")
    assert [task.classes.tolist() for task in tasks] == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    assert sum(len(task.x) for task in tasks) == len(data.train_x) and sum(len(task.val_x) for task in tasks) == len(
        data.val_x
    )
    for task in tasks:
        assert set(task.y.tolist()) == set(task.val_y.tolist()) == set(task.classes.tolist())
        assert task.held.nonzero()[:, 0].tolist() == list(range(0, len(task.x), 7))  # one in so many, from the first on
    fewest = min(int((~task.held).sum()) for task in tasks)
    assert len(split(data, DENSE.replace(held_out=7, batch_size=fewest), "cpu")) == 5
    with pytest.raises(ConfigError, match=f"is more than the {fewest} training images"):
        split(data, DENSE.replace(held_out=7, batch_size=fewest + 1), "cpu")


# Measures


def test_forgetting_against_a_loop(study):
    A = [[0.9, None, None], [0.5, 0.8, None], [0.4, 0.9, 1.0]]
    forgotten = ((0.9 - 0.4) + (0.8 - 0.9)) / 2
    assert final_and_forgetting(A) == pytest.approx(((0.4 + 0.9 + 1.0) / 3, forgotten))
    assert math.isnan(final_and_forgetting([[None, None], [0.5, 0.5]])[1])
    for label in ("Expert Gate", "one dense network", "one EC network"):
        summary = study[label]
        A, lost = summary["accuracy"], []
        for k in range(4):
            lost.append(A[k][k] - A[4][k])
        assert summary["forgetting"] == pytest.approx(sum(lost) / 4)


@pytest.mark.parametrize("progress", [True, False])
def test_a_summary_is_worked_out_of_both_matrices_and_written_by_who_holds_the_run(
    monkeypatch, tmp_path, capsys, progress
):
    found = {"accuracy": [[1.0, None], [0.5, 0.25]], "accuracy_task_known": [[0.75, None], [1.0, 0.5]], "other": 3}
    asked = []
    seconds, inside, load = iter([100.0, 107.5]), [], images.load
    monkeypatch.setattr(images, "load", lambda data: inside.append("decoded") or load(data))
    monkeypatch.setattr(learning.time, "perf_counter", lambda: inside.append("clock") or next(seconds))
    monkeypatch.setattr(learning, "repeatable", lambda: nullcontext(inside.append("repeatable")))
    monkeypatch.setattr(learning, "circumstances", lambda: {"commit": "abc"})
    monkeypatch.setattr(learning, "now", lambda: "today")
    monkeypatch.setattr(learning, "run", lambda config: inside.append(config) or dict(found))
    still_ours = lambda: asked.append((tmp_path / "summary.json").exists())  # noqa: E731
    counts = iter([2, 3] if progress else [3, 1])  # of runs on its GPU, when it begins and ends
    where = SimpleNamespace(sharing=lambda: next(counts))
    said = learning.train_run(GATE, tmp_path, still_ours, progress, (), (), where).summary
    numbers = {"final_accuracy": 0.375, "forgetting": 0.5, "final_accuracy_task_known": 0.75}
    numbers |= {"forgetting_task_known": -0.25, "world_size": 1, "precision": "32-true", "status": "finished"}
    assert (found | numbers).items() <= said.items() and said["data"] == load("digits").provenance
    assert {
        "seconds": 2.5,
        "sharing": 3,
        "commit": "abc",
        "finished": "today",
        "name": GATE.name,
    }.items() <= said.items()
    assert asked == [False] and inside == ["decoded", "clock", "repeatable", GATE, "clock"]
    assert capsys.readouterr().err == f"[{GATE.slug()}] accuracy 0.375, 8 s\n" * progress
    assert inspect.signature(learning.train_run).parameters["progress"].default is True


def test_one_network_forgets_and_expert_gate_does_not(study):
    final = {label: summary["final_accuracy"] for label, summary in study.items()}
    for label in ("one dense network", "one EC network"):
        summary = study[label]
        assert summary["forgetting"] > 0.5 and max(summary["accuracy"][4][:4]) < 0.5 < summary["accuracy"][4][4]
    assert final["Expert Gate"] > 0.8 and final["joint, dense"] > 0.8
    gate = study["Expert Gate"]
    assert gate["task_names"] == ["0, 1", "2, 3", "4, 5", "6, 7", "8, 9"]
    assert gate["parameters"] == 5 * (count(new_expert(GATE, 2)) + count(new_gate(GATE)))
    assert gate["forgetting_task_known"] == 0  # the same expert, unchanged, looks at the same images
    # Where the gate is right both say the same; where it is wrong Expert Gate is, as no other expert knows the task's classes.
    assert 0 <= gate["final_accuracy_task_known"] - gate["final_accuracy"] <= 1 - gate["gate_right"] + 1e-6


def test_after_each_task_those_that_came_are_asked_about(monkeypatch):
    """Models that say of every image the class of the first of the task that came last, and told the task its last class."""
    tasks, learned, seeds = split(images.load("digits"), GATE, "cpu"), [], []

    class Model(ExpertGate):
        def __init__(self, config):
            super().__init__(config)
            seeds.append((config.seed, torch.initial_seed()))

        def learn(self, x, y, held):
            learned.append((x, y, held))

        def answers(self, x, classes):
            assert all(torch.equal(a, task.val_x) for a, task in zip(x, tasks, strict=False)) and len(x) == len(learned)
            assert all(torch.equal(a, task.classes) for a, task in zip(classes, tasks, strict=False))
            last = learned[-1][1].min()
            return [last.expand(len(of)) for of in x], [
                own[-1].expand(len(of)) for of, own in zip(x, classes, strict=True)
            ]

        def forward(self, x):
            return None, (torch.arange(len(x)) % 3 == 0).long()  # the second expert takes a third

        def relatedness(self, x, k):
            return torch.tensor([len(x), k])

    monkeypatch.setattr(learning, "ExpertGate", Model)
    load, asked = images.load, []
    monkeypatch.setattr(images, "load", lambda name: load("digits" if asked.append(name) is None else name))
    monkeypatch.setattr(images, "check", lambda config, data: asked.append((config.data, len(data.train_x))))
    found = run(GATE.replace(seed=7, held_out=9, data="cifar10"))
    assert asked == ["cifar10", ("cifar10", len(load("digits").train_x))]  # by another name
    monkeypatch.setattr(images, "load", load)
    tasks = split(images.load("digits"), GATE.replace(held_out=9), "cpu")
    for given, task in zip(learned, tasks, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(given, (task.x, task.y, task.held), strict=True))
    share = [float((task.val_y == task.classes[0]).float().mean()) for task in tasks]
    for k, (row, known) in enumerate(zip(found["accuracy"], found["accuracy_task_known"], strict=True)):
        left = [None] * (4 - k)
        assert row == [0.0] * k + [pytest.approx(share[k])] + left
        assert known == [pytest.approx(1 - of) for of in share[: k + 1]] + left
    assert seeds == [(7, 7)] and found["tokens"] == 5 * GATE.tokens_per_batch * GATE.steps and found["origins"] == []
    thirds = [-(-len(task.val_x) // 3) / len(task.val_x) for task in tasks]
    assert found["confusion"] == [[pytest.approx(1 - t), pytest.approx(t), 0, 0, 0] for t in thirds]
    assert found["gate_right"] == pytest.approx((1 - thirds[0] + thirds[1]) / 5)
    assert found["relatedness"] == [[int(task.held.sum()), k] for k, task in enumerate(tasks)]


def test_joint_training_takes_the_steps_of_all_tasks(monkeypatch):
    steps, fit = [], learning.fit
    monkeypatch.setattr(learning, "fit", lambda config, *how: (steps.append(config.steps), fit(config, *how)))
    found = run(page(steps=3)["joint, dense"])
    assert steps == [15] and found["tokens"] == 15 * 50 * 4
    for name in ("accuracy", "accuracy_task_known"):
        *before, last = found[name]
        assert before == [[None] * 5] * 4 and len(last) == 5 and None not in last  # all tasks at once, after all


def test_gate_right_is_the_diagonal_of_the_confusion(study):
    summary = study["Expert Gate"]
    assert summary["gate_right"] == pytest.approx(np.mean([summary["confusion"][k][k] for k in range(5)]))
    np.testing.assert_allclose(np.sum(summary["confusion"], 1), 1, rtol=1e-5)
    assert (
        np.shape(summary["confusion"]) == (5, 5) and summary["final_accuracy"] <= summary["gate_right"]
    )  # one expert knows
    assert [summary["relatedness"][k][k] for k in range(5)] == [1.0] * 5


# Runs that are kept


@pytest.mark.parametrize("config", [EC, GATE])
def test_the_same_config_gives_the_same_numbers(config, monkeypatch):
    config = config.replace(tasks=2)
    asked, relatedness = [], ExpertGate.relatedness
    monkeypatch.setattr(
        ExpertGate, "relatedness", lambda gates, x, *k: (asked.append(len(x)), relatedness(gates, x, *k))[1]
    )
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # such as of running statistics that nobody moves
        one = run(config)
    assert set(asked) <= {
        int(task.held.sum()) for task in split(images.load("digits"), config, "cpu")
    }  # of held images alone
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert run(config) == one
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's random numbers are touched
    assert run(config.replace(seed=1)) != one


def test_a_run_is_found_again(study, monkeypatch):
    monkeypatch.setattr(learning, "run", lambda config: pytest.fail("it was computed again"))
    for summary in study.values():
        again = run_or_load(ContinualConfig.from_dict(summary["config"]))
        assert again.summary == summary and again.ok
    missing = run_or_load(GATE.replace(seed=61), train=False)
    assert missing.summary["status"] == "not run"


def test_a_run_that_breaks_off_is_made_again(monkeypatch):
    config = GATE.replace(seed=77)

    def killed(config):
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(learning, "run", killed)
        with pytest.raises(KeyboardInterrupt):
            run_or_load(config)
        assert run_or_load(config, train=False).summary["status"] == "not run"
        broken.setattr(learning, "run", lambda config: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_or_load(config)
        kept = run_or_load(config, train=False).summary
        assert kept["status"] == "failed" and "ZeroDivisionError" in kept["error"]
    assert run_or_load(config).ok


def test_a_run_is_kept_like_any_other(study, tmp_path):
    summary = study["Expert Gate"]
    config = ContinualConfig.from_dict(summary["config"])
    result = run_or_load(config, records=tmp_path)
    assert read_record(tmp_path / f"{config.name}.json").summary == result.summary
    assert {"commit", "code", "device", "versions", "started", "finished", "data", "schema"} <= set(summary)
    path = paths.runs() / config.name / "summary.json"
    path.write_text(path.read_text().replace('"finished"', '"finishes"'))
    with pytest.raises(Damaged, match="summary.json is damaged"):
        run_or_load(config, train=False)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"approach": "lottery"}, "approach='lottery': must be one of expert_gate, sequence"),
        ({"task": 5}, "unknown key 'task' with value 5: did you mean tasks"),
        ({"steps": "100"}, "steps='100' is of type str, but must be int"),
        ({"tasks": 1}, "tasks=1: must be at least 2"),
        ({"held_out": 1}, "held_out=1: must be at least 2"),
        ({"gate_learning_rate": 1e38}, "gate_learning_rate=.*: must be at most 1e"),
        ({"tasks": 3}, "tasks=3: must divide classes=10$"),
        ({"code": 64}, "code=64: a gate of images with 64 pixels needs fewer"),
        ({"router": "expert_choice"}, "router='expert_choice', approach='expert_gate': .* set router: dense"),
        ({"devices": 2}, "devices=2, num_nodes=1: must both be 1"),
        ({"num_nodes": 2}, "devices=1, num_nodes=2: must both be 1"),
        ({"router": "kmeans"}, "router='kmeans', approach='expert_gate': experts are dense"),
        ({"data": "stdlib"}, "data='stdlib': tasks are of images: digits, cifar10, images:PATH"),
    ],
)
def test_a_config_that_cannot_work(changes, said):
    with pytest.raises(ConfigError, match=said):
        ContinualConfig.from_dict(GATE.to_dict() | changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"batch_size": 400}, "batch_size=400: is more than the"),
        ({"patch_size": 3}, "patch_size=3: must divide the 8 x 8 pixels"),
        ({"classes": 20}, "classes=20 with data='digits': it has 10"),
    ],
)
def test_a_config_that_does_not_fit_the_images(changes, said):
    with pytest.raises(ConfigError, match=said):
        run(GATE.replace(**changes))


def test_every_key_of_its_own_tells_runs_apart():
    others = {
        "approach": "joint",
        "tasks": 2,
        "code": 17,
        "gate_steps": 61,
        "gate_learning_rate": 0.5,
        "threshold": 0.5,
    }
    others["held_out"] = 7
    assert {field.name: field.default for field in fields(ContinualConfig)}["threshold"] == 0.85  # the paper's
    assert {field.name for field in fields(ContinualConfig)} - {field.name for field in fields(RunConfig)} == set(
        others
    )
    assert len({GATE.name} | {GATE.replace(**{key: value}).name for key, value in others.items()}) == 8


def test_a_name_says_what_was_run():
    configs = [config.replace(seed=seed) for config in page().values() for seed in (0, 1)]
    assert len({config.name for config in configs}) == 10 and GATE.name.startswith("expert-gate-dense-s0-")
    here, there = (GATE.replace(data=f"images:{folder}/cifar10").name for folder in ("a", "b"))
    assert here == there != GATE.replace(data="images:a/other").name
    unread = {"precision": "bf16-mixed", "augment": True, "accumulate": 2, "eval_batches": 9}
    assert {GATE.replace(**{key: value}).name for key, value in unread.items()} == {GATE.name}
    read = {"gradient_clip": 2.0, "batch_size": 49, "steps": 26, "weight_decay": 0.1, "d_model": 32}
    assert len({GATE.name} | {GATE.replace(**{key: value}).name for key, value in read.items()}) == 6
    assert GATE.replace(data="cifar10", channels=3, sequence_length=64).pixels == 32 * 32 * 3
