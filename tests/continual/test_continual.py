"""Continual learning against loops and numbers done by hand; what must hold of tasks in sequence; runs that are kept."""

import math
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ecmoe import paths
from ecmoe.config import ConfigError
from ecmoe.continual import expert_gate, learning, runs
from ecmoe.continual.expert_gate import ExpertGate, Gate, probabilities, relatedness, without_forgetting
from ecmoe.continual.learning import final_accuracy, forgetting, new_gate, new_network, run, split
from ecmoe.continual.patchnet import PatchNet, as_large, count, dense_ffn
from ecmoe.continual.settings import APPROACHES, Settings
from ecmoe.data import images
from ecmoe.files import Damaged
from ecmoe.training.result import read_record

FAST = {"steps": 25, "gate_steps": 60, "code": 16, "d_model": 16, "d_ff": 16}
DIGITS = (1, 8, 8)


@pytest.fixture(scope="module")
def study():
    """The summary of every approach on split digits, one seed: some seconds in all."""
    return {
        label: runs.run_or_load(Settings(approach=approach, **FAST | {"steps": 40})).summary
        for approach, label in APPROACHES.items()
    }


@pytest.fixture(scope="module")
def learned():
    """An Expert Gate that has learned two tasks of digits, the tasks, and what its experts were after the first."""
    settings = Settings(**FAST)
    tasks = split(images.load("digits"), settings)[:2]
    torch.manual_seed(0)
    model, first = new_gate(DIGITS, settings), None
    for task in tasks:
        model.learn(task.x, task.y, task.held)
        first = first or {name: value.clone() for name, value in model.state_dict().items()}
    return model, tasks, first


# The gate


def test_the_error_is_the_squared_distance_to_the_reconstruction():
    torch.manual_seed(0)
    gate, x = Gate(6, 3), torch.rand(4, 6)
    W, b = gate.encoder.weight.detach().numpy(), gate.encoder.bias.detach().numpy()
    V, c = gate.decoder.weight.detach().numpy(), gate.decoder.bias.detach().numpy()
    for i, image in enumerate(x.numpy()):
        code = np.maximum(W @ image + b, 0)
        again = 1 / (1 + np.exp(-(V @ code + c)))
        assert gate.error(x)[i].item() == pytest.approx(((again - image) ** 2).sum(), rel=1e-5)


def test_the_gate_with_the_lowest_error_chooses(learned):
    model, tasks, _ = learned
    x = torch.cat([task.val_x for task in tasks])
    by_hand = []
    for image in x.flatten(1):
        errors = [float((gate(image[None]).sigmoid()[0] - image).square().sum()) for gate in model.gates]
        by_hand.append(errors.index(min(errors)))
    said, expert = model(x)
    assert expert.tolist() == by_hand
    for i in range(0, len(x), 17):
        k = by_hand[i]
        assert said[i] == model.classes[k][model.experts[k](x[i : i + 1]).argmax()]


def test_trust_is_a_softmax_of_minus_the_errors():
    er, t = [3.0, 1.0, 2.5], 2.0
    weights = [math.exp(-e / t) for e in er]
    expected = torch.tensor([[w / sum(weights) for w in weights]])
    torch.testing.assert_close(probabilities(torch.tensor([er]), t), expected)
    assert probabilities(torch.tensor([er]), 1e3).max() < 0.34  # hot: no preference


def test_relatedness_by_hand(learned):
    assert relatedness(torch.tensor([2.0, 3.0, 4.0, 8.0]), torch.tensor(2.0)).tolist() == [1.0, 0.5, 0.0, -2.0]
    model, tasks, _ = learned
    held = tasks[1].x[tasks[1].held]
    er_a, er_k = (float(gate.error(held.flatten(1)).mean()) for gate in model.gates)
    found = model.relatedness(held)
    assert found[1] == 1 and found[0].item() == pytest.approx(1 - (er_a - er_k) / er_k, rel=1e-4)
    assert model.origins[1].task == 0 and model.origins[1].related == pytest.approx(found[0].item())


# Experts


def test_what_was_learned_is_never_changed(learned):
    model, tasks, first = learned
    now = model.state_dict()
    assert all(torch.equal(now[name], value) for name, value in first.items())
    assert not any(p.requires_grad for p in model.parameters())
    told = model(tasks[0].val_x, torch.zeros(len(tasks[0].val_x), dtype=torch.long))[0]
    assert (told == tasks[0].val_y).float().mean() > 0.9


def test_a_new_expert_starts_from_the_most_related_one(learned, monkeypatch):
    model, tasks, _ = learned
    third = split(images.load("digits"), Settings(**FAST))[2]
    other = ExpertGate(model.new_expert, model.pixels, model.settings.replace(steps=5))
    for task in tasks:
        other.learn(task.x, task.y, task.held)
    monkeypatch.setattr(expert_gate, "fit", lambda *_: None)  # where it starts is then where it is
    other.learn(third.x, third.y, third.held)
    a = other.origins[2].task
    assert a == int(other.relatedness(third.x[third.held])[:2].argmax())
    start, source = other.experts[2].state_dict(), other.experts[a].state_dict()
    assert all(torch.equal(start[name], value) for name, value in source.items() if "head" not in name)
    assert not torch.equal(start["head.weight"], source["head.weight"])


def test_gates_and_experts_are_trained_each_by_their_own_keys(monkeypatch):
    fitted = []
    monkeypatch.setattr(expert_gate, "fit", lambda parameters, loss, n, *how: fitted.append(how))
    settings = Settings(**FAST)
    task = split(images.load("digits"), settings)[0]
    new_gate(DIGITS, settings).learn(task.x, task.y, task.held)
    assert fitted == [
        (settings.gate_steps, settings.batch_size, settings.gate_learning_rate),
        (settings.steps, settings.batch_size, settings.learning_rate),
    ]


@pytest.mark.parametrize(("threshold", "how"), [(-1e9, "LwF"), (1e9, "fine-tuning")])
def test_the_threshold_decides_between_lwf_and_fine_tuning(learned, threshold, how):
    model, tasks, _ = learned
    other = ExpertGate(model.new_expert, model.pixels, model.settings.replace(threshold=threshold))
    for task in tasks:
        other.learn(task.x, task.y, task.held)
    assert [origin.how for origin in other.origins] == ["scratch", how]


def test_the_teacher_is_the_old_expert_as_it_was(learned, monkeypatch):
    model, tasks, _ = learned
    taught = []

    def loss(expert, old_head, teacher, x, y):
        taught.append(teacher)
        return lambda ids: F.cross_entropy(expert(x[ids]), y[ids])

    monkeypatch.setattr(expert_gate, "without_forgetting", loss)
    other = ExpertGate(model.new_expert, model.pixels, model.settings.replace(threshold=-1e9, steps=1, gate_steps=1))
    for task in tasks:
        other.learn(task.x, task.y, task.held)
    assert taught == [other.experts[0]]


def test_lwf_keeps_the_old_answers_better_than_fine_tuning():
    settings = Settings(**FAST)
    first, second = split(images.load("digits"), settings)[:2]
    drift = {}
    for threshold in (-1e9, 1e9):
        torch.manual_seed(0)
        model = new_gate(DIGITS, settings.replace(threshold=threshold, steps=60))
        for task in (first, second):
            model.learn(task.x, task.y, task.held)
        old, new = model.experts
        answers = [F.log_softmax(old.head(expert.features(second.x)), 1) for expert in (old, new)]
        drift[model.origins[1].how] = F.kl_div(answers[1], answers[0], log_target=True, reduction="batchmean").item()
    assert drift["LwF"] < drift["fine-tuning"]


# Networks and tasks


def test_rivals_are_as_large_as_expert_gate():
    for approach in ("shared", "expert_choice"):
        settings = Settings(approach=approach, **FAST)
        gate = new_gate(DIGITS, settings)
        whole = 5 * (count(gate.new_expert(2)) + count(Gate(64, settings.code)))
        step = 2 * settings.d_model * (settings.num_experts if approach == "expert_choice" else 1)
        assert abs(count(new_network(DIGITS, 5, 10, settings)) - whole) <= step / 2


def test_as_large_takes_the_nearest_width():
    sizes = {f: count(dense_ffn(8, f)) for f in range(1, 40)}
    for wanted in (20, 100, 333):
        assert count(as_large(lambda f: dense_ffn(8, f), wanted)) == min(
            sizes.values(), key=lambda size: abs(size - wanted)
        )


def test_a_masked_image_changes_nothing():
    settings = Settings(approach="expert_choice", **FAST)
    torch.manual_seed(0)
    model, x = new_network(DIGITS, 5, 10, settings).eval(), torch.rand(50, *DIGITS)
    mask = torch.arange(50) < 40
    y = model(x, mask)[:40]
    x[40:] = torch.rand(10, *DIGITS)
    torch.testing.assert_close(model(x, mask)[:40], y)


def test_tasks_are_disjoint_and_hold_every_image():
    data = images.load("digits")
    tasks = split(data, Settings(tasks=5))
    assert [task.classes.tolist() for task in tasks] == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    assert sum(len(task.x) for task in tasks) == len(data.train_x) and sum(len(task.val_x) for task in tasks) == len(
        data.val_x
    )
    for task in tasks:
        assert set(task.y.tolist()) == set(task.val_y.tolist()) == set(task.classes.tolist())
        assert 0 < task.held.sum() <= len(task.x) / 10 + 1


# Measures


def test_forgetting_against_a_loop(study):
    A = [[0.9, None, None], [0.5, 0.8, None], [0.4, 0.9, 1.0]]
    assert final_accuracy(A) == pytest.approx((0.4 + 0.9 + 1.0) / 3)
    assert forgetting(A) == pytest.approx(((0.9 - 0.4) + (0.8 - 0.9)) / 2)
    assert math.isnan(forgetting([[None, None], [0.5, 0.5]]))
    for label in ("Expert Gate", "one dense network", "one EC network"):
        summary = study[label]
        A, lost = summary["accuracy"], []
        for k in range(4):
            lost.append(A[k][k] - A[4][k])
        assert summary["forgetting"] == pytest.approx(sum(lost) / 4)


def test_one_network_forgets_and_expert_gate_does_not(study):
    final = {label: summary["final_accuracy"] for label, summary in study.items()}
    for label in ("one dense network", "one EC network"):
        summary = study[label]
        assert summary["forgetting"] > 0.5 and max(summary["accuracy"][4][:4]) < 0.5 < summary["accuracy"][4][4]
    assert final["Expert Gate"] > 0.8 and final["joint, dense"] > 0.8
    gate = study["Expert Gate"]
    assert gate["forgetting_task_known"] == 0  # the same expert, unchanged, looks at the same images
    # Where the gate is right both say the same; where it is wrong Expert Gate is, as no other expert knows the task's classes.
    assert 0 <= gate["final_accuracy_task_known"] - gate["final_accuracy"] <= 1 - gate["gate_right"] + 1e-6


def test_joint_training_takes_the_steps_of_all_tasks(monkeypatch):
    steps, fit = [], learning.fit
    monkeypatch.setattr(learning, "fit", lambda *given, **keys: (steps.append(given[3]), fit(*given, **keys)))
    found = runs.summarize(Settings(approach="joint", **FAST | {"steps": 3}), progress=False)
    assert steps == [15] and 0 < found["seconds"] < 300


def test_gate_right_is_the_diagonal_of_the_confusion(study):
    summary = study["Expert Gate"]
    assert summary["gate_right"] == pytest.approx(np.mean([summary["confusion"][k][k] for k in range(5)]))
    np.testing.assert_allclose(np.sum(summary["confusion"], 1), 1, rtol=1e-5)
    assert [summary["relatedness"][k][k] for k in range(5)] == [1.0] * 5


# Runs that are kept


def test_the_same_settings_give_the_same_numbers():
    settings = Settings(approach="expert_choice", tasks=2, **FAST)
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # such as of running statistics that nobody moves
        one = run(settings)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert run(settings) == one
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's random numbers are touched
    assert run(settings.replace(seed=1)) != one


def test_a_run_is_found_again(study, monkeypatch):
    monkeypatch.setattr(runs, "run", lambda settings: pytest.fail("it was computed again"))
    for summary in study.values():
        again = runs.run_or_load(Settings.from_dict(summary["config"]))
        assert again.summary == summary and again.ok
    missing = runs.run_or_load(Settings(seed=61, **FAST), train=False)
    assert missing.summary["status"] == "not run"


def test_a_run_that_breaks_off_is_made_again(monkeypatch):
    settings = Settings(seed=77, **FAST)

    def killed(settings):
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(runs, "run", killed)
        with pytest.raises(KeyboardInterrupt):
            runs.run_or_load(settings)
        assert runs.run_or_load(settings, train=False).summary["status"] == "not run"
        broken.setattr(runs, "run", lambda settings: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            runs.run_or_load(settings)
        kept = runs.run_or_load(settings, train=False).summary
        assert kept["status"] == "failed" and "ZeroDivisionError" in kept["error"]
    assert runs.run_or_load(settings).ok


def test_a_run_is_kept_like_any_other(study, tmp_path):
    summary = study["Expert Gate"]
    settings = Settings.from_dict(summary["config"])
    result = runs.run_or_load(settings, records=tmp_path)
    assert read_record(tmp_path / f"{settings.name}.json").summary == result.summary
    assert {"commit", "code", "device", "versions", "started", "finished", "data", "schema"} <= set(summary)
    path = paths.runs() / settings.name / "summary.json"
    path.write_text(path.read_text().replace('"finished"', '"finishes"'))
    with pytest.raises(Damaged, match="summary.json is damaged"):
        runs.run_or_load(settings, train=False)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"approach": "lottery"}, "approach='lottery': must be one of expert_gate, shared"),
        ({"task": 5}, "unknown key 'task' with value 5: did you mean tasks"),
        ({"steps": "100"}, "steps='100' is of type str, but must be int"),
        ({"temperature": 0}, "temperature=0.0: must be above 0"),
        ({"tasks": 1}, "tasks=1: must be at least 2"),
        ({"d_model": 10**9}, "d_model=1000000000: must be at most 65536"),
        ({"gate_learning_rate": 1e38}, "gate_learning_rate=.*: must be at most 1e"),
        ({"learning_rate": float("nan")}, "learning_rate=nan: must be a finite number"),
    ],
)
def test_settings_that_cannot_work(changes, said):
    with pytest.raises(ConfigError, match=said.replace("(", r"\(")):
        Settings.from_dict(changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tasks": 3}, r"tasks=3 doesn't divide the 10 classes .* one of \[2, 5, 10\]"),
        ({"batch_size": 400}, "batch_size=400: is more than the"),
        ({"code": 64}, "code=64: a gate of images with 64 pixels needs fewer"),
        ({"patch": 3}, "patch=3 doesn't divide images of 8 x 8"),
        ({"approach": "expert_choice", "num_experts": 7}, "num_experts=7"),
    ],
)
def test_settings_that_do_not_fit_the_images(changes, said):
    with pytest.raises(ConfigError, match=said):
        run(Settings(**{**FAST, **changes}))


def test_a_name_says_what_was_run():
    names = {Settings(approach=a, seed=s).name for a in APPROACHES for s in (0, 1)}
    assert len(names) == 2 * len(APPROACHES) and Settings().name.startswith("expert-gate-s0-")
    here, there = (Settings(data=f"images:{folder}/cifar10").name for folder in ("a", "b"))
    assert here == there != Settings(data="images:a/other").name


def test_patchnet_reads_patches_where_they_are():
    torch.manual_seed(0)
    net = PatchNet((1, 4, 4), 2, 2, 8, 1, lambda: dense_ffn(8, 8))
    x = torch.rand(1, 1, 4, 4)
    assert net(x).shape == (1, 2) and net.tokens == 4
    assert not torch.allclose(net(x), net(x.flip(3)))  # places count


def test_learning_without_forgetting_adds_the_old_answers_at_temperature_2():
    """Li and Hoiem 2016, Eq. 2 and 3: probabilities to the power of 1/2, normalised, of teacher and student alike."""
    dice = torch.Generator().manual_seed(0)
    x, y = torch.randn(6, 4, generator=dice), torch.tensor([0, 1, 1, 0, 1, 0])
    teacher, old_head, head = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(4, 2)
    expert = SimpleNamespace(features=lambda x: x.tanh(), head=head)
    ids = torch.tensor([4, 0, 1])
    old, new = (p.softmax(1).sqrt() for p in (teacher(x[ids]), old_head(x[ids].tanh())))
    old, new = old / old.sum(1, keepdim=True), new / new.sum(1, keepdim=True)
    own = -head(x[ids].tanh()).log_softmax(1)[torch.arange(3), y[ids]].mean()
    expected = own - (old * new.log()).sum(1).mean()
    torch.testing.assert_close(without_forgetting(expert, old_head, teacher, x, y)(ids), expected)


def test_a_gate_never_trains_on_the_images_that_measure_relatedness(monkeypatch):
    settings = Settings(**FAST)
    (task, *_), losses, measured = split(images.load("digits"), settings), [], []
    x = torch.where(task.held[:, None, None, None], torch.nan, task.x)  # a held image would make a loss NaN
    monkeypatch.setattr(expert_gate, "fit", lambda learnt, loss, n, *_, **__: losses.append(loss(torch.arange(n))))
    monkeypatch.setattr(ExpertGate, "relatedness", lambda gates, x: (measured.append(x), torch.ones(1))[1])
    new_gate(DIGITS, settings).learn(x, task.y, task.held)
    assert losses[0].isfinite() and losses[1].isnan()  # the expert sees all
    assert measured[0].isnan().all() and len(measured[0]) == task.held.sum()


@pytest.mark.parametrize("shape", [(1, 6, 8), (1, 8, 6)])
def test_a_patch_divides_both_sides(shape):
    with pytest.raises(ConfigError, match="patch=4 doesn't divide images of"):
        PatchNet(shape, 2, 4, 8, 1, lambda: dense_ffn(8, 8))
