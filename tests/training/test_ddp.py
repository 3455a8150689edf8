"""DDP with experts' gradients that travel alone: the gradients of one process that has both batches."""

import copy
import gc
import os
import weakref
from threading import Timer
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy

from ecmoe.data.batches import TextData
from ecmoe.training import ddp as ddp_module
from ecmoe.training.lit import LitModel
from ecmoe.training.trainer import new_trainer, repeatable, strategy


class Gradients(L.Callback):
    def on_before_optimizer_step(self, trainer, module, optimizer) -> None:
        self.last = {name: p.grad.tolist() for name, p in module.named_parameters() if p.requires_grad}
        self.first = getattr(self, "first", self.last)


def lit(config, rank: int = 0) -> tuple[LitModel, L.LightningDataModule]:
    data = TextData(config)
    data.prepare_data()
    data.setup("fit")
    module = LitModel(config, torch.as_tensor(data.token_counts))
    for p in module.parameters():  # DDP gives all ranks the weights of the first
        p.data.add_(rank)
    return module, data


def fit(config, plan, module, data, *callbacks) -> None:
    keys = {"devices": config.devices, "strategy": plan, "accumulate_grad_batches": config.accumulate}
    keys |= {"limit_val_batches": 0, "use_distributed_sampler": False, "callbacks": list(callbacks)}
    with repeatable():
        new_trainer(config, **keys, max_steps=config.steps).fit(module, datamodule=data)


def gradients(config, plan, module, data) -> list[dict]:
    """Of the first step and of the last."""
    seen = Gradients()
    fit(config, plan, module, data, seen)
    return [seen.first, seen.last]


def as_rank(rank: int) -> None:
    os.environ |= {"TORCHELASTIC_RUN_ID": "x", "RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0"}
    os.environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.mark.parametrize(("accumulate", "precision", "rtol"), [(2, "32-true", 1e-4), (1, "bf16-mixed", 0.05)])
def test_two_ranks_are_one_process(tiny_config, two_ranks, accumulate, precision, rtol):
    keys = {"steps": 2, "accumulate": accumulate, "precision": precision}
    two, one = tiny_config(**keys, strategy="ddp", devices=2, batch_size=4), tiny_config(**keys, batch_size=8)

    def work(rank: int) -> list[dict]:
        as_rank(rank)
        return gradients(two, strategy(two), *lit(two, rank))

    alone, _ = gradients(one, "auto", *lit(one))
    (ours, last), (theirs, their_last) = two_ranks(work)
    assert ours == theirs and last == their_last
    for name, wanted in alone.items():
        wanted = torch.tensor(wanted)
        torch.testing.assert_close(torch.tensor(ours[name]), wanted, rtol=rtol, atol=rtol * float(wanted.abs().max()))


def test_a_model_is_left_to_others_and_its_memory_given_back(tiny_config, two_ranks):
    two = tiny_config(steps=2, strategy="ddp", devices=2, batch_size=4)

    def work(rank: int) -> tuple[list[dict], bool]:
        as_rank(rank)
        module, data = lit(two)
        module.model.moe_layers[0].w2.requires_grad = False  # as a callback may
        gradients(two, strategy(two), module, data)
        by_others = gradients(two, DDPStrategy(process_group_backend="gloo"), module, data)
        weight = weakref.ref(module.model.moe_layers[0].w1)
        del module, data
        gc.collect()
        return by_others, weight() is None

    (first, gone), (second, gone_too) = two_ranks(work)
    assert any("w1" in name for name in first[0]) and first == second and gone and gone_too


@pytest.fixture
def stepping(tiny_config, monkeypatch):
    """A strategy of two ranks, in a training step."""
    ddp = strategy(tiny_config(strategy="ddp", devices=2))
    monkeypatch.setattr(DDPStrategy, "world_size", 2)
    ddp._model, ddp.stepping = SimpleNamespace(require_backward_grad_sync=True), True
    return ddp


def test_a_backward_pass_ends_once_all_averages_are_there(stepping, monkeypatch):
    order = []

    def all_reduce(gradient, async_op):
        future = torch.futures.Future()
        order.append(f"sent {gradient.tolist()}")
        Timer(0.2, lambda: (order.append("there"), future.set_result([gradient + 1]))).start()
        return SimpleNamespace(get_future=lambda: future)

    monkeypatch.setattr(ddp_module.dist, "all_reduce", all_reduce)
    weights = [torch.ones(2, requires_grad=True) for _ in range(2)]
    sum(ddp_module._copied(stepping, weight).sum() for weight in weights).backward()
    assert order == ["sent [1.0, 1.0]"] * 2 + ["there"] * 2
    assert [weight.grad.tolist() for weight in weights] == [[1.0, 1.0]] * 2


@pytest.mark.parametrize("earlier", [None, 4.0])
def test_a_layer_may_be_applied_twice(stepping, monkeypatch, earlier):
    def all_reduce(gradient, async_op):  # of two ranks with the same gradient
        future = torch.futures.Future()
        Timer(0.1, lambda: future.set_result([2 * gradient])).start()
        return SimpleNamespace(get_future=lambda: future)

    monkeypatch.setattr(ddp_module.dist, "all_reduce", all_reduce)
    weight = torch.ones(2, requires_grad=True)
    if earlier:  # micro-batches
        weight.grad = torch.full_like(weight, earlier)
    sum(factor * ddp_module._copied(stepping, weight).sum() for factor in (2, 3)).backward()
    assert weight.grad.tolist() == [5 + (earlier or 0)] * 2


@pytest.mark.parametrize(("precision", "recompute"), [("bf16-mixed", False), ("32-true", True)])
def test_what_a_callback_computes_is_its_own(tiny_config, two_ranks, precision, recompute):
    """It needs no autocast, and its gradients are those of a copy of the model."""
    keys = {"precision": precision, "activation_checkpointing": recompute}
    two = tiny_config(**keys, steps=2, strategy="ddp", devices=2, batch_size=4)

    class Looks(L.Callback):
        same = ()

        def on_after_backward(self, trainer, module):
            before = [p.grad.clone() for p in module.model.parameters()]
            tokens = torch.arange(34).view(2, 17) + trainer.global_rank
            found = []
            for model in (module.model, copy.deepcopy(module.model)):
                loss = model(tokens[:, :-1], targets=tokens[:, 1:])
                found.append(torch.autograd.grad(loss, list(model.parameters())))
            found = [*zip(*found, strict=True), *zip(before, (p.grad for p in module.model.parameters()), strict=True)]
            self.same += (all(torch.equal(a, b) for a, b in found),)

    def work(rank: int) -> tuple[bool, ...]:
        as_rank(rank)
        module, data = lit(two)
        looks = Looks()
        fit(two, strategy(two), module, data, looks)
        return looks.same

    assert two_ranks(work) == [(True, True)] * 2


def test_weights_are_copied_once_a_step(tiny_config, two_ranks, monkeypatch):
    two, copied, copy_of = tiny_config(steps=3, strategy="ddp", devices=2, batch_size=4), [], ddp_module._copied
    monkeypatch.setattr(ddp_module, "_copied", lambda ddp, weight: copied.append(1) or copy_of(ddp, weight))

    def work(rank: int) -> int:
        as_rank(rank)
        fit(two, strategy(two), *lit(two))
        return len(copied)

    assert two_ranks(work) == [3 * 2] * 2  # w1 and w2 of one layer


def test_a_copy_of_a_layer_sends_nothing(tiny_config):
    layer = LitModel(tiny_config()).model.moe_layers[0]
    layer.copied = print
    assert copy.deepcopy(layer).copied is None and layer.copied is print
