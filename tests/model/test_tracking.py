"""track: running statistics move once a step, in anyone's loop; a loop that forgets them is told once."""

import copy
import inspect
import warnings

import pytest
import torch
from torch import nn

from ecmoe import MoE, track
from ecmoe.routing import ExpertChoice, KMeans, TokenChoice

D, E = 4, 4
ROUTERS = {
    "cut-offs": (lambda: ExpertChoice(D, E), lambda r: r.cutoff.average),
    "centroids": (lambda: KMeans(D, E), lambda r: r.centroids),
    "bias": (lambda: TokenChoice(D, E, 1, balance="bias"), lambda r: r.bias),
}


def model(router) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, D), MoE(router(), D, 8))


def loop(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, micro_batches: int = 1) -> None:
    for step in range(steps):
        for part in range(micro_batches):
            x = torch.randn(2, 8, D, generator=torch.Generator().manual_seed(10 * step + part))
            model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_all_layers_of_a_model_are_tracked():
    layers = nn.Sequential(*(MoE(ExpertChoice(D, E), D, 8) for _ in range(3)))
    optimizer = torch.optim.SGD(layers.parameters(), lr=0.1)
    track(layers, optimizer)
    loop(layers, optimizer, 2)
    assert [layer.router.cutoff.empty() for layer in layers] == [False] * 3
    assert [layer.router.cutoff.count.item() for layer in layers] == [0] * 3  # added to the average


@pytest.mark.parametrize(("router", "statistic"), ROUTERS.values(), ids=ROUTERS)
def test_statistics_move_once_a_step_and_no_more_when_the_handle_goes(router, statistic):
    net = model(router)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    handle = track(net, optimizer)
    calls, end_step = [], net[1].router.end_step
    net[1].router.end_step = lambda: calls.append(1) or end_step()
    before = statistic(net[1].router).clone()
    loop(net, optimizer, steps=3, micro_batches=2)
    assert len(calls) == 3 and not torch.equal(statistic(net[1].router), before)
    handle.remove()
    loop(net, optimizer, steps=1)
    assert len(calls) == 3


@pytest.mark.parametrize("router", [router for router, _ in ROUTERS.values()], ids=ROUTERS)
def test_a_loop_that_forgets_is_told_once(router):
    idle, net = model(router), model(router)  # nobody trains the first
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loop(net, optimizer, steps=1)  # a single step needs none of them
    with pytest.warns(UserWarning, match=r"running statistics.*ecmoe\.track\(model, optimizer\)") as told:
        loop(net, optimizer, steps=5)
    assert len([w for w in told if "running statistics" in str(w.message)]) == 1 and idle[1].w1.grad is None


def test_a_layer_whose_router_is_replaced_by_one_with_statistics_is_told_of():
    net = model(lambda: TokenChoice(D, E, 1))
    net[1].router = ExpertChoice(D, E)
    with pytest.warns(UserWarning, match="ExpertChoice has running statistics"):
        loop(net, torch.optim.SGD(net.parameters(), lr=0.1), steps=2)


@pytest.mark.parametrize("scheduled", [False, True])  # a scheduler wraps the optimiser's step
def test_the_warning_names_the_line_that_steps(scheduled):
    net = model(lambda: ExpertChoice(D, E))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    if scheduled:
        torch.optim.lr_scheduler.ConstantLR(optimizer)
    with pytest.warns(UserWarning, match="running statistics") as told:
        loop(net, optimizer, steps=2)
    lines = inspect.getsourcelines(loop)
    assert [warning.filename for warning in told] == [__file__]
    assert "optimizer.step()" in lines[0][told[0].lineno - lines[1]]


@pytest.mark.parametrize(
    "case", ["tracked", "nothing to move", "another optimiser", "another router", "copied and tracked"]
)
def test_others_are_told_nothing(case):
    net = model((lambda: TokenChoice(D, E, 1)) if case == "nothing to move" else (lambda: ExpertChoice(D, E)))
    if case == "copied and tracked":
        net = copy.deepcopy(net)
    trained = nn.Linear(D, D) if case == "another optimiser" else net
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
    if "tracked" in case:
        track(net, optimizer)
    if case == "another router":
        loop(net, optimizer, steps=1)
        net[1].router = TokenChoice(D, E, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loop(net, optimizer, steps=3)


def test_a_copy_of_a_tracked_layer_is_a_loop_of_its_own():
    net = model(lambda: ExpertChoice(D, E))
    track(net, torch.optim.SGD(net.parameters(), lr=0.1))
    copied = copy.deepcopy(net)
    with pytest.warns(UserWarning, match="running statistics"):
        loop(copied, torch.optim.SGD(copied.parameters(), lr=0.1), steps=2)
