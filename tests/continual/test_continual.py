"""Continual learning against loops and numbers done by hand; what must hold of tasks in sequence; runs that are kept."""

import math
import warnings
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ecmoe import paths
from ecmoe.config import ConfigError
from ecmoe.continual import ContinualConfig, expert_gate, learning
from ecmoe.continual.expert_gate import ExpertGate, Gate, new_expert, without_forgetting
from ecmoe.continual.learning import OneNetwork, as_large, count, final_accuracy, forgetting, run, split
from ecmoe.data import images
from ecmoe.data.batches import Batches
from ecmoe.files import Damaged
from ecmoe.study import plan
from ecmoe.training.result import read_record
from ecmoe.training.run import run_or_load

FAST = {"steps": 25, "warmup_steps": 2, "gate_steps": 60, "code": 16, "d_model": 16, "d_ff": 16}


def page(**changes):
    """Arm -> its config on page 11, at smoke, but small."""
    planned = plan.of_page("11_continual_learning", "smoke", {"base": FAST | changes, "seeds": [0]})
    return {one.arms[0]: one.config for one in planned}


GATE = page()["Expert Gate"]
DENSE, EC = page()["one dense network"], page()["one EC network"]


@pytest.fixture(scope="module")
def study():
    """The summary of every approach on split digits, one seed: some seconds in all."""
    return {arm: run_or_load(config).summary for arm, config in page(steps=40).items()}


@pytest.fixture(scope="module")
def learned():
    """An Expert Gate that has learned two tasks of digits, the tasks, and what its experts were after the first."""
    tasks = split(images.load("digits"), GATE)[:2]
    torch.manual_seed(0)
    model, first = ExpertGate(GATE), None
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


def test_relatedness_by_hand(learned):
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
    third = split(images.load("digits"), GATE)[2]
    other = ExpertGate(GATE.replace(steps=5))
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
    monkeypatch.setattr(expert_gate, "fit", lambda config, *_: fitted.append((config.steps, config.learning_rate)))
    task = split(images.load("digits"), GATE)[0]
    ExpertGate(GATE).learn(task.x, task.y, task.held)
    assert fitted == [(GATE.gate_steps, GATE.gate_learning_rate), (GATE.steps, GATE.learning_rate)]


@pytest.mark.parametrize(("clip", "growth"), [(0.0, 1), (0.5, 1000)])
def test_training_follows_the_schedule_and_the_clipping_of_the_config(clip, growth):
    """Adam's first step is the rate times the sign of a gradient: here a tenth, two tenths, ... of it. So are all others
    of one size, as clipping makes them."""
    layer, seen = nn.Linear(1, 1, bias=False), []

    def loss(batch):
        seen.append(layer.weight.item())
        return layer.weight.sum() * len(batch) * growth ** len(seen)

    expert_gate.fit(
        GATE.replace(steps=4, warmup_steps=10, learning_rate=0.1, gradient_clip=clip), layer, loss, torch.ones(100)
    )
    np.testing.assert_allclose(-np.diff(seen), [0.01, 0.02, 0.03], rtol=1e-4)


def test_training_takes_the_batches_of_the_seed():
    layer, seen = nn.Linear(1, 1), []
    for config in (GATE, GATE.replace(seed=1)):
        examples = torch.arange(100.0)
        expert_gate.fit(config.replace(steps=3), layer, lambda x: (seen.append(x), layer.weight.sum())[1], examples)
        batches = islice(Batches([examples], config.batch_size, config.seed), 3)
        assert torch.equal(torch.cat(seen[-3:]), torch.cat(list(batches)))


@pytest.mark.parametrize(("threshold", "how"), [(-1e9, "LwF"), (1e9, "fine-tuning")])
def test_the_threshold_decides_between_lwf_and_fine_tuning(learned, threshold, how):
    model, tasks, _ = learned
    other = ExpertGate(GATE.replace(threshold=threshold))
    for task in tasks:
        other.learn(task.x, task.y, task.held)
    assert [origin.how for origin in other.origins] == ["scratch", how]


def test_the_teacher_is_the_old_expert_as_it_was(learned, monkeypatch):
    model, tasks, _ = learned
    taught = []

    def loss(expert, old_head, batch):
        taught.append(batch)
        return F.cross_entropy(expert(batch[0]), batch[1])

    monkeypatch.setattr(expert_gate, "without_forgetting", loss)
    other = ExpertGate(GATE.replace(threshold=-1e9, steps=1, gate_steps=1))
    for task in tasks:
        other.learn(task.x, task.y, task.held)
    ((x, _, soft),) = taught
    torch.testing.assert_close(soft, (other.experts[0](x) / 2).softmax(1))


def test_lwf_keeps_the_old_answers_better_than_fine_tuning():
    first, second = split(images.load("digits"), GATE)[:2]
    drift = {}
    for threshold in (-1e9, 1e9):
        torch.manual_seed(0)
        model = ExpertGate(GATE.replace(threshold=threshold, steps=60))
        for task in (first, second):
            model.learn(task.x, task.y, task.held)
        old, new = model.experts
        answers = [F.log_softmax(old.head(expert.features(second.x)), 1) for expert in (old, new)]
        drift[model.origins[1].how] = F.kl_div(answers[1], answers[0], log_target=True, reduction="batchmean").item()
    assert drift["LwF"] < drift["fine-tuning"]


# Networks and tasks


@pytest.mark.parametrize("config", [DENSE, EC])
def test_rivals_are_as_large_as_expert_gate(config):
    whole = 5 * (count(new_expert(GATE, 2)) + count(Gate(64, GATE.code)))
    step = 2 * config.d_model * config.num_experts if config is EC else 3 * config.d_model
    assert abs(count(OneNetwork(config).lit.model) - whole) <= step / 2


def test_as_large_takes_the_nearest_width():
    sizes = {f: count(learning.LitClassifier(DENSE.replace(d_ff=f))) for f in range(1, 40)}
    for wanted in (0, 2000, 3333):
        nearest = min(sizes.values(), key=lambda size: abs(size - wanted))
        assert sizes[as_large(DENSE, wanted).d_ff] == nearest


@pytest.mark.parametrize("config", [DENSE, EC])
def test_answers_come_in_the_order_of_the_images(config):
    """Where all fit into one batch, mixing changes nothing but who is computed when."""
    torch.manual_seed(0)
    tasks = split(images.load("digits"), config)
    network = OneNetwork(config)
    x = [task.val_x[:10] for task in tasks]
    said, told = network.answers(x, [task.classes for task in tasks])
    logits = network.lit.model(torch.cat(x))
    assert torch.cat(said).tolist() == logits.argmax(1).tolist() and torch.cat(said).unique().numel() > 1
    for k, task in enumerate(tasks):
        own = logits[10 * k : 10 * k + 10, task.classes]
        assert told[k].tolist() == task.classes[own.argmax(1)].tolist()


def test_balance_losses_are_trained_on(monkeypatch):
    losses = []

    def fit(config, learnt, loss, *examples):
        assert learnt.training
        losses.append(float(loss(examples)))

    monkeypatch.setattr(learning, "fit", fit)
    task = split(images.load("digits"), EC)[0]
    for weight in (0.0, 10.0):
        network = OneNetwork(EC.replace(router="token_choice", aux_loss_weight=weight)).eval()
        network.learn(task.x, task.y, task.held)
        assert not network.lit.model.training  # what comes next are answers
    assert losses[1] - losses[0] > 5  # the balance loss is at least about 1


def test_tasks_are_disjoint_and_hold_every_image():
    data = images.load("digits")
    tasks = split(data, DENSE)
    assert [task.classes.tolist() for task in tasks] == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    assert sum(len(task.x) for task in tasks) == len(data.train_x) and sum(len(task.val_x) for task in tasks) == len(
        data.val_x
    )
    for task in tasks:
        assert set(task.y.tolist()) == set(task.val_y.tolist()) == set(task.classes.tolist())
        assert task.held.sum() == -(-len(task.x) // DENSE.held_out)  # one in so many, the first among them


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
    monkeypatch.setattr(learning, "fit", lambda config, *how: (steps.append(config.steps), fit(config, *how)))
    found = run(page(steps=3)["joint, dense"])
    assert steps == [15] and found["tokens"] == 15 * 50 * 4


def test_gate_right_is_the_diagonal_of_the_confusion(study):
    summary = study["Expert Gate"]
    assert summary["gate_right"] == pytest.approx(np.mean([summary["confusion"][k][k] for k in range(5)]))
    np.testing.assert_allclose(np.sum(summary["confusion"], 1), 1, rtol=1e-5)
    assert (
        np.shape(summary["confusion"]) == (5, 5) and summary["final_accuracy"] <= summary["gate_right"]
    )  # one expert knows
    assert [summary["relatedness"][k][k] for k in range(5)] == [1.0] * 5


# Runs that are kept


def test_the_same_config_gives_the_same_numbers():
    config = EC.replace(tasks=2)
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # such as of running statistics that nobody moves
        one = run(config)
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
        ({"gate_learning_rate": 1e38}, "gate_learning_rate=.*: must be at most 1e"),
        ({"tasks": 3}, r"tasks=3 doesn't divide classes=10: may be one of \[2, 5, 10\]"),
        ({"code": 64}, "code=64: a gate of images with 64 pixels needs fewer"),
        ({"router": "expert_choice"}, "router='expert_choice' with approach='expert_gate': .* set router: dense"),
        ({"devices": 2}, "devices=2, num_nodes=1: tasks in sequence take one device"),
        ({"data": "stdlib"}, "data='stdlib' with approach='expert_gate': must be images"),
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


def test_a_name_says_what_was_run():
    configs = [config.replace(seed=seed) for config in page().values() for seed in (0, 1)]
    assert len({config.name for config in configs}) == 10 and GATE.name.startswith("expert-gate-dense-s0-")
    here, there = (GATE.replace(data=f"images:{folder}/cifar10").name for folder in ("a", "b"))
    assert here == there != GATE.replace(data="images:a/other").name
    assert GATE.replace(precision="bf16-mixed", augment=True).name == GATE.name  # unread


def test_learning_without_forgetting_adds_the_old_answers_at_temperature_2():
    """Li and Hoiem 2016, Eq. 2 and 3: probabilities to the power of 1/2, normalised, of teacher and student alike."""
    dice = torch.Generator().manual_seed(0)
    x, y = torch.randn(6, 4, generator=dice), torch.tensor([0, 1, 1, 0, 1, 0])
    teacher, old_head, head = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(4, 2)
    expert = SimpleNamespace(features=lambda x: x.tanh(), head=head)
    old, new = (p.softmax(1).sqrt() for p in (teacher(x), old_head(x.tanh())))
    old, new = old / old.sum(1, keepdim=True), new / new.sum(1, keepdim=True)
    own = -head(x.tanh()).log_softmax(1)[torch.arange(6), y].mean()
    expected = own - (old * new.log()).sum(1).mean()
    torch.testing.assert_close(without_forgetting(expert, old_head, (x, y, old)), expected)


def test_a_gate_never_trains_on_the_images_that_measure_relatedness(monkeypatch):
    (task, *_), losses, measured = split(images.load("digits"), GATE), [], []
    x = torch.where(task.held[:, None, None, None], torch.nan, task.x)  # a held image would make a loss NaN
    monkeypatch.setattr(expert_gate, "fit", lambda config, learnt, loss, *x: losses.append(loss(x if x[1:] else x[0])))
    monkeypatch.setattr(ExpertGate, "relatedness", lambda gates, x: (measured.append(x), torch.ones(1))[1])
    ExpertGate(GATE).learn(x, task.y, task.held)
    assert losses[0].isfinite() and losses[1].isnan()  # the expert sees all
    assert measured[0].isnan().all() and len(measured[0]) == task.held.sum()
