"""The optimiser's kernel against torch's AdamW."""

import copy

import pytest
import torch
from torch import nn

from ecmoe.kernels import AdamW
from ecmoe.kernels.adamw import norm
from ecmoe.training.lit import clip
from tests.kernels.oracle import DEVICE

KEYS = {"betas": (0.8, 0.95), "weight_decay": 0.1, "eps": 1e-6}


def models():
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(37, 90), nn.GELU(), nn.Linear(90, 3), nn.Linear(3, 3)).to(DEVICE)
    ours[3].requires_grad_(False)  # no gradient
    return ours, copy.deepcopy(ours)


def backward(model, step):
    x = torch.randn(5, 37, generator=torch.Generator().manual_seed(step)).to(DEVICE)
    model.zero_grad()
    loss = model(x).square().sum()
    loss.backward()
    return loss


@pytest.mark.parametrize("scale", [None, 4.0])
def test_steps_and_state_are_torchs(scale):
    """Halfway each goes on from the other's state."""
    ours, theirs = models()
    optimizers = [AdamW(ours.parameters(), lr=0.1, **KEYS), torch.optim.AdamW(theirs.parameters(), lr=0.1, **KEYS)]
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)) for o in optimizers]
    for step in range(6):
        losses = [backward(model, step) for model in (ours, theirs)]
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-5)
        if scale:
            optimizers[0].grad_scale = torch.tensor(scale, device=DEVICE)
            for p in theirs.parameters():
                p.grad = p.grad / scale if p.requires_grad else None
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        if step == 2:
            states = [copy.deepcopy(o.state_dict()["state"]) for o in optimizers]
            for optimizer, state in zip(optimizers, reversed(states), strict=True):
                optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    for name in ("step", "exp_avg", "exp_avg_sq"):
        a, b = (o.state[m[0].weight][name] for o, m in zip(optimizers, (ours, theirs), strict=True))
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_narrow_weights_round_once():
    """In float32 within a step, as torch's fused one: what is kept is one of the two nearest bf16 numbers."""
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(3000, device=DEVICE).bfloat16())
    wide = nn.Parameter(p.detach().float())
    p.grad = torch.randn(3000, device=DEVICE).bfloat16()
    wide.grad = p.grad.float()
    for optimizer in (AdamW([p], lr=0.01, **KEYS), torch.optim.AdamW([wide], lr=0.01, **KEYS)):
        optimizer.step()
    assert p.dtype == torch.bfloat16
    torch.testing.assert_close(p.float(), wide.detach(), rtol=2**-7, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_is_that_of_all_numbers_together(dtype):
    g = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=g).to(DEVICE, dtype) for shape in [(70_000,), (3, 5), (1,), (129, 40)]]
    tensors.append(tensors[-1].T)
    expected = torch.cat([t.flatten().double() for t in tensors]).norm()
    torch.testing.assert_close(norm(tensors).double(), expected, rtol=1e-6, atol=0)


def test_a_closure_is_called_with_gradients():
    ours, _ = models()
    optimizer = AdamW(ours.parameters(), lr=0.1)
    before = ours[0].weight.detach().clone()
    assert optimizer.step(lambda: backward(ours, 0)) > 0
    assert not torch.equal(before, ours[0].weight)


def test_a_parameter_in_another_order_is_refused():
    p = nn.Parameter(torch.ones(3, 5, device=DEVICE).T)
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=r"shape \(5, 3\) has strides"):
        AdamW([p]).step()


def test_it_clips_as_it_reads():
    ours, theirs = models()
    optimizers = [AdamW(ours.parameters(), lr=0.1), torch.optim.AdamW(theirs.parameters(), lr=0.1)]
    for model, optimizer in zip((ours, theirs), optimizers, strict=True):
        backward(model, 0)
        clip(model.parameters(), optimizer, 0.01)
    assert ours[0].weight.grad.norm() > 100 * theirs[0].weight.grad.norm()  # a pass less: they stay as they are
    for optimizer in optimizers:
        optimizer.step()
    moments = [o.state[m[0].weight]["exp_avg"] for o, m in zip(optimizers, (ours, theirs), strict=True)]
    torch.testing.assert_close(moments[0], moments[1], rtol=1e-4, atol=1e-9)
