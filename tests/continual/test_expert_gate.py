"""Expert Gate: its gates and its experts, against numbers done by hand and what must hold of tasks in sequence."""

from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ecmoe.continual import expert_gate
from ecmoe.continual.expert_gate import ExpertGate, new_gate, without_forgetting
from ecmoe.continual.learning import split
from ecmoe.data import images
from ecmoe.data.batches import Batches
from tests.continual.small import GATE


@pytest.fixture(scope="module")
def learned():
    """An Expert Gate that has learned two tasks of digits, the tasks, and what its experts were after the first."""
    tasks = split(images.load("digits"), GATE, "cpu")[:2]
    torch.manual_seed(0)
    model, first = ExpertGate(GATE), None
    for task in tasks:
        model.learn(task.x, task.y, task.held)
        first = first or {name: value.clone() for name, value in model.state_dict().items()}
    return model, tasks, first


# The gate


def test_the_error_is_the_squared_distance_to_the_reconstruction():
    torch.manual_seed(0)
    model, x = ExpertGate(GATE), torch.rand(4, 1, 8, 8)
    model.gates.extend(new_gate(GATE) for _ in range(2))
    W, b, V, c = (p.detach().numpy() for p in model.gates[1].parameters())
    assert W.shape == (GATE.code, 64) and V.shape == (64, GATE.code)
    for i, image in enumerate(x.flatten(1).numpy()):
        code = np.maximum(W @ image + b, 0)
        again = 1 / (1 + np.exp(-(V @ code + c)))
        assert model.errors(x)[i, 1].item() == pytest.approx(((again - image) ** 2).sum(), rel=1e-5)


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
    own = [(c.min(), c.max()) for c in model.classes]
    answers, told = model.answers([task.val_x for task in tasks], [task.classes for task in tasks])
    assert torch.equal(torch.cat(answers), said) and len(answers) == len(told) == 2
    with torch.device("meta"):  # where what is made without `device=` has no numbers
        again, told_again = model.answers([task.val_x for task in tasks], [])
    assert all(torch.equal(a, b) for a, b in zip([*answers, *told], [*again, *told_again], strict=True))
    for k, task in enumerate(tasks):  # the task's own expert, whatever the gates say
        assert told[k].tolist() == task.classes[model.experts[k](task.val_x).argmax(1)].tolist()
    swapped = model.answers([task.val_x for task in reversed(tasks)], [])[1]
    assert all(low <= said.min() and said.max() <= high for said, (low, high) in zip(swapped, own, strict=True))


def test_relatedness_by_hand(learned):
    model, tasks, _ = learned
    held = tasks[1].x[tasks[1].held]
    er_a, er_k = model.errors(held).mean(0).tolist()
    found = model.relatedness(held)
    assert found[1] == 1 and found[0].item() == pytest.approx(1 - (er_a - er_k) / er_k, rel=1e-4)
    assert model.origins[1]["task"] == 0 and model.origins[1]["related"] == pytest.approx(found[0].item())


# Experts


def test_what_was_learned_is_never_changed(learned):
    model, tasks, first = learned
    now = model.state_dict()
    assert all(torch.equal(now[name], value) for name, value in first.items())
    assert not any(p.requires_grad for p in model.parameters())
    told = model(tasks[0].val_x, torch.zeros(len(tasks[0].val_x), dtype=torch.long))[0]
    assert (told == tasks[0].val_y).float().mean() > 0.9


def test_a_task_is_learned_from_the_most_related_one(monkeypatch):
    """Four tasks in all that their gates and experts are given; of which the third alone, most related to the second, is near."""
    related, fitted, measured = [[1.0], [0.3, 1.0], [0.75, 0.2, 1.0], [0.2, 0.9, 0.5, 1.0]], [], []

    def fit(config, learnt, loss, *examples):
        assert all(p.requires_grad for p in learnt.parameters())
        fitted.append((config, learnt, loss, examples))

    def relatedness(model, x):
        measured.append(x)
        return torch.tensor(related[len(model.gates) - 1])

    monkeypatch.setattr(expert_gate, "fit", fit)
    monkeypatch.setattr(ExpertGate, "relatedness", relatedness)
    tasks = split(images.load("digits"), GATE, "cpu")[:4]
    config = GATE.replace(threshold=0.75)  # as related as that is not enough
    model = ExpertGate(config)
    for task in tasks:
        model.learn(task.x, task.y, task.held)
    assert [tuple(origin.values()) for origin in model.origins] == [
        (None, None, "scratch"), (0, pytest.approx(0.3), "fine-tuning"), (0, 0.75, "fine-tuning"),
        (1, pytest.approx(0.9), "LwF")]  # fmt: skip
    assert not any(p.requires_grad for p in model.parameters()) and len({id(p) for p in model.parameters()}) == 4 * (
        len(list(model.gates[0].parameters())) + len(list(model.experts[0].parameters()))
    )
    for k, task in enumerate(tasks):
        (of_gate, gate, loss, (x,)), (of_expert, learnt, own, examples) = fitted[2 * k : 2 * k + 2]
        assert (
            of_gate == config.replace(steps=GATE.gate_steps, learning_rate=GATE.gate_learning_rate)
            and of_expert == config
        )
        assert gate is model.gates[k] and torch.equal(x, task.x[~task.held].flatten(1))
        code = gate(x).sigmoid()
        torch.testing.assert_close(loss(x), -(x * code.log() + (1 - x) * (1 - code).log()).mean(), rtol=1e-4, atol=1e-5)
        assert k == 0 or torch.equal(measured[k - 1], task.x[task.held])
        expert, old, (_, local, *soft) = model.experts[k], model.origins[k]["task"], examples
        assert torch.equal(examples[0], task.x) and torch.equal(model.classes[k][local], task.y)
        assert expert.head.weight.shape == (2, GATE.d_model) and expert.head.bias is None
        if old is not None:
            start, source = expert.state_dict(), model.experts[old].state_dict()
            assert all(torch.equal(start[name], source[name]) == ("head" not in name) for name in source)
        if model.origins[k]["how"] == "LwF":
            head = learnt[1]
            assert learnt[0] is expert and torch.equal(head.weight, model.experts[old].head.weight)
            assert len(soft) == 1 and torch.equal(soft[0], (model.experts[old](task.x) / 2).softmax(1))
            assert torch.equal(own(examples), without_forgetting(expert, head, examples))
        else:
            assert learnt is expert and not soft
            torch.testing.assert_close(own(examples), F.cross_entropy(expert(task.x), local))


@pytest.mark.parametrize(("clip", "growth"), [(0.0, 1), (0.5, 1000)])
def test_training_follows_the_schedule_and_the_clipping_of_the_config(monkeypatch, clip, growth):
    """Adam's first step is the rate times the sign of a gradient: here a tenth, two tenths, ... of it. So are all others
    of one size, as clipping makes them."""
    layer, seen, norms = nn.Linear(1, 1, bias=False), [], []
    clipped = expert_gate.clip
    monkeypatch.setattr(expert_gate, "clip", lambda *given: (norms.append(given[2]), clipped(*given)))

    def loss(batch):
        assert layer.weight.grad is None
        seen.append(layer.weight.item())
        return layer.weight.sum() * len(batch) * growth ** len(seen)

    expert_gate.fit(
        GATE.replace(steps=4, warmup_steps=10, learning_rate=0.1, gradient_clip=clip), layer, loss, torch.ones(100)
    )
    np.testing.assert_allclose(-np.diff(seen), [0.01, 0.02, 0.03], rtol=1e-4)
    assert norms == [clip] * 4 * bool(clip)


def test_training_takes_the_batches_of_the_seed():
    layer, seen = nn.Linear(1, 1), []
    for config in (GATE, GATE.replace(seed=1)):
        examples = torch.arange(100.0)
        expert_gate.fit(config.replace(steps=3), layer, lambda x: (seen.append(x), layer.weight.sum())[1], examples)
        batches = islice(Batches([examples], config.batch_size, config.seed), 3)
        assert torch.equal(torch.cat(seen[-3:]), torch.cat(list(batches)))


def test_batches_are_taken_where_the_examples_lie(monkeypatch):
    """Indices in numpy would be copied to the device by each tensor, and the host would wait."""
    taken, batch_of, layer = [], expert_gate.batch_of, nn.Linear(1, 1)
    monkeypatch.setattr(expert_gate, "batch_of", lambda parts, which: (taken.append(which), batch_of(parts, which))[1])
    for device in ("cpu", "meta"):
        x, y, ours = torch.rand(30, 2, device=device), torch.arange(30, device=device), []
        config = GATE.replace(batch_size=4, seed=7, steps=9)
        expert_gate.fit(config, layer, lambda batch, to=ours: (to.append(batch), layer.weight.sum())[1], x, y)
        for one, other in zip(ours, islice(Batches((x, y), 4, 7), 9), strict=True):
            assert taken.pop().device == one[0].device == one[1].device == x.device
            assert all(device == "meta" or torch.equal(a, b) for a, b in zip(one, other, strict=True))
            assert one[0].shape == (4, 2) and one[1].dtype == torch.int64


def test_lwf_keeps_the_old_answers_better_than_fine_tuning():
    first, second = split(images.load("digits"), GATE, "cpu")[:2]
    drift = {}
    for threshold in (-1e9, 1e9):
        torch.manual_seed(0)
        model = ExpertGate(GATE.replace(threshold=threshold, steps=60))
        for task in (first, second):
            model.learn(task.x, task.y, task.held)
        old, new = model.experts
        answers = [F.log_softmax(old.head(expert.features(second.x)), 1) for expert in (old, new)]
        drift[model.origins[1]["how"]] = F.kl_div(answers[1], answers[0], log_target=True, reduction="batchmean").item()
    assert drift["LwF"] < drift["fine-tuning"]


def test_learning_without_forgetting_adds_the_old_answers_at_temperature_2():
    """Li and Hoiem 2016, Eq. 2 and 3: probabilities to the power of 1/2, normalised, of teacher and student alike."""
    dice = torch.Generator().manual_seed(0)
    x, y = torch.randn(6, 4, generator=dice).requires_grad_(), torch.tensor([0, 1, 1, 0, 1, 0])
    teacher, old_head, head = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(4, 2)
    expert = SimpleNamespace(features=lambda x: x.tanh(), head=head)
    old, new = (p.softmax(1).sqrt() for p in (teacher(x.detach()), old_head(x.tanh())))
    old, new = old / old.sum(1, keepdim=True), new / new.sum(1, keepdim=True)
    own = -head(x.tanh()).log_softmax(1)[torch.arange(6), y].mean()
    expected = own - (old * new.log()).sum(1).mean()
    found = without_forgetting(expert, old_head, (x, y, old))
    torch.testing.assert_close(found, expected)
    wanted = [x, *head.parameters(), *old_head.parameters()]
    for ours, theirs in zip(torch.autograd.grad(found, wanted), torch.autograd.grad(expected, wanted), strict=True):
        torch.testing.assert_close(ours, theirs)
