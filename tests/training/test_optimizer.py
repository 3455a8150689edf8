"""The optimiser: wired as the config says; clipping and schedule, against what torch does in more passes."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from ecmoe import paths
from ecmoe.config import RunConfig
from ecmoe.training.optimizer import build_optimizer, clip, learning_rate_factor
from ecmoe.training.run import run_or_load

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CLOSE = {"cpu": 1e-5, "cuda": 1e-4}[DEVICE]  # two orders of adding up; a GPU's products are TF32


def test_adamw_has_the_keys_of_the_config():
    """Each by a formula of its own (Loshchilov and Hutter 2019, algorithm 2): no two keys can be mixed up."""
    config = RunConfig(learning_rate=0.25, beta1=0.5, beta2=0.75, weight_decay=0.125)
    weight = nn.Parameter(torch.tensor([2.0]))
    optimizer = build_optimizer(config, [weight], torch.device("cpu"))
    expected, m, v = 2.0, 0.0, 0.0
    for t, gradient in enumerate([3.0, -1.0, 0.5], start=1):
        weight.grad = torch.tensor([gradient])
        optimizer.step()
        m, v = 0.5 * m + 0.5 * gradient, 0.75 * v + 0.25 * gradient**2
        expected -= 0.25 * 0.125 * expected
        expected -= 0.25 * (m / (1 - 0.5**t)) / ((v / (1 - 0.75**t)) ** 0.5 + 1e-8)
        assert float(weight) == pytest.approx(expected, rel=1e-5)


def test_adafactor_has_the_keys_of_the_config():
    config = RunConfig(optimizer="adafactor", learning_rate=0.25, weight_decay=0.125)
    optimizer = build_optimizer(config, [nn.Parameter(torch.ones(2, 2))], torch.device("cpu"))
    assert isinstance(optimizer, torch.optim.Adafactor)
    assert optimizer.defaults["lr"] == 0.25 and optimizer.defaults["weight_decay"] == 0.125


def test_learning_rate_schedules():
    constant = RunConfig(warmup_steps=10)
    assert [learning_rate_factor(constant, s) for s in (0, 4, 9, 50)] == [0.1, 0.5, 1.0, 1.0]
    paper = RunConfig(schedule="inverse_sqrt", warmup_steps=0, constant_steps=100)
    assert learning_rate_factor(paper, 99) == 1.0 and learning_rate_factor(paper, 399) == pytest.approx(0.5)
    linear = RunConfig(schedule="linear", warmup_steps=10, steps=100, decay_fraction=0.25)
    factors = {0: 0.1, 9: 1.0, 75: 1.0, 76: 0.96, 90: 0.4, 99: 0.04}  # 25 steps down, the last to 1/25
    assert {step: learning_rate_factor(linear, step) for step in factors} == pytest.approx(factors)
    assert learning_rate_factor(RunConfig(schedule="inverse_sqrt", warmup_steps=10, constant_steps=100), 4) == 0.5
    none = RunConfig(schedule="linear", warmup_steps=0, steps=8, decay_fraction=0.0)
    assert [learning_rate_factor(none, step) for step in (0, 7)] == [1.0, 1.0]


def test_a_step_is_fused_on_a_gpu_unless_a_factor_scales_its_gradients(monkeypatch):
    monkeypatch.setattr(torch.optim, "AdamW", lambda parameters, **keys: keys["fused"])
    found = {
        (device, precision): build_optimizer(RunConfig(precision=precision), [], torch.device(device))
        for device in ("cpu", "cuda")
        for precision in ("auto", "16-mixed")
    }
    assert [key for key, fused in found.items() if fused] == [("cuda", "auto")] and set(found.values()) == {True, None}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("max_norm", [0.1, 1e4])
def test_clipping_and_a_step_are_torchs(fused, max_norm):
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(7, 9), nn.GELU(), nn.Linear(9, 3), nn.Linear(3, 3)).to(DEVICE)
    theirs = copy.deepcopy(ours)
    ours[3].requires_grad_(False), theirs[3].requires_grad_(False)  # no gradient
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.1, fused=f) for m, f in ((ours, fused), (theirs, False))]
    for step in range(4):
        x = (10 ** (step - 2)) * torch.randn(5, 7, device=DEVICE)  # clipped, and not
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            model(x).square().sum().backward()
        clip(ours.parameters(), optimizers[0], max_norm)
        nn.utils.clip_grad_norm_(theirs.parameters(), max_norm)
        for optimizer in optimizers:
            optimizer.step()
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    moments = [optimizer.state[model[0].weight] for model, optimizer in zip((ours, theirs), optimizers, strict=True)]
    torch.testing.assert_close(moments[0]["exp_avg_sq"], moments[1]["exp_avg_sq"], rtol=CLOSE, atol=1e-5)


def test_narrow_weights_are_clipped_too():
    """A fused step reads the factor as float32, whatever the gradients are."""
    weight = nn.Parameter(torch.ones(3, device=DEVICE, dtype=torch.bfloat16))
    optimizer = torch.optim.AdamW([weight], lr=0.5, weight_decay=0.0, fused=True)
    weight.grad = torch.tensor([30.0, 0.0, 40.0], device=DEVICE, dtype=torch.bfloat16)
    clip([weight], optimizer, 1.0)
    optimizer.step()
    moment = optimizer.state[weight]["exp_avg"].float()
    torch.testing.assert_close(moment, torch.tensor([0.06, 0.0, 0.08], device=DEVICE), rtol=0.01, atol=0.0)


def test_a_gradient_that_is_no_number_stays_none():
    weight = nn.Parameter(torch.ones(3, device=DEVICE))
    optimizer = torch.optim.AdamW([weight], fused=True)
    weight.grad = torch.tensor([1.0, float("nan"), 1.0], device=DEVICE)
    clip([weight], optimizer, 1.0)
    optimizer.step()
    assert weight.isnan().all()  # as after clip_grad_norm_: the run is found to have diverged


def test_a_fused_run_is_clipped_like_any_other(tiny_config, monkeypatch, tmp_path):
    """Through Lightning: the optimiser that is given the factor is the one that steps."""
    adamw, losses = torch.optim.AdamW, {}
    for fused in (False, True):
        monkeypatch.setattr(torch.optim, "AdamW", lambda *given, f=fused, **keys: adamw(*given, **keys | {"fused": f}))
        monkeypatch.setattr(paths, "runs", lambda f=fused: tmp_path / str(f))
        for norm in (0.001, 1000.0):
            config = tiny_config(
                seed=77, gradient_clip=norm, optimizer="adamw", learning_rate=1e-3, precision="32-true"
            )
            losses[fused, norm] = run_or_load(config, progress=False).summary["val_loss"]
    assert losses[False, 0.001] != pytest.approx(losses[False, 1000.0], rel=2e-4)  # it matters
    for norm in (0.001, 1000.0):
        # Steps add up roundings, and the text is the standard library's, another in each Python.
        assert losses[True, norm] == pytest.approx(losses[False, norm], rel=max(CLOSE, 5e-5))


@pytest.mark.parametrize(
    ("gradient", "most", "factor"), [([3.0, 4.0], 0.5, 10), ([3e-6, 4e-6], 2e-6, 3), ([3.0, 4.0], 9.0, 1)]
)
def test_a_fused_step_clips_as_it_reads_and_leaves_gradients_alone(gradient, most, factor):
    weight = nn.Parameter(torch.zeros(2, device=DEVICE))
    optimizer = torch.optim.AdamW([weight], fused=True)
    weight.grad = torch.tensor(gradient, device=DEVICE)
    clip([weight, nn.Parameter(torch.zeros(1))], optimizer, most)  # one has no gradient
    assert weight.grad.tolist() == pytest.approx(gradient, rel=1e-6)
    assert float(optimizer.grad_scale) == pytest.approx(factor)  # (norm + 1e-6) / most, as torch has it


def test_a_fused_step_clips_by_the_norm_of_all_ranks_parts(two_ranks):
    def work(rank: int) -> list:
        mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
        weight = nn.Parameter(DTensor.from_local(torch.zeros(1), mesh, [Shard(0)]))
        optimizer = torch.optim.AdamW([weight], fused=True)
        weight.grad = DTensor.from_local(torch.tensor([3.0 + rank]), mesh, [Shard(0)])
        clip([weight], optimizer, 0.5)
        return [isinstance(optimizer.grad_scale, DTensor), round(float(optimizer.grad_scale), 3)]

    assert two_ranks(work) == [[False, 10.0]] * 2
