"""How kernels are launched, and functions become operators."""

from types import SimpleNamespace

import pytest
import torch
import triton.language as tl
from torch import Tensor

from ecmoe.kernels import common
from ecmoe.kernels.common import Operator, kernel


@kernel
def _scaled_kernel(x, out, size, factor, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + place, tl.load(x + place, mask=place < size) * factor, mask=place < size)


@pytest.fixture
def launches(monkeypatch):
    """Launches of `_scaled_kernel`: those that Triton looked at, and those that went past it, with their arguments."""
    seen = SimpleNamespace(triton=[], past=[])
    compiled = SimpleNamespace(run=lambda *args: seen.past.append(args), function="f", packed_metadata="m")
    jit = SimpleNamespace(arg_names=["x", "out", "size", "factor", "BLOCK"])

    class Launched:
        arg_names = jit.arg_names

        def __getitem__(self, grid):
            return lambda *args, **keys: seen.triton.append((grid, args, keys)) or compiled

    monkeypatch.setattr(common, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: "s", raising=False)
    monkeypatch.setattr(_scaled_kernel, "jit", Launched())
    monkeypatch.setattr(_scaled_kernel, "known", {})
    return seen


def test_triton_looks_at_a_launch_once(launches):
    x, out = torch.ones(8), torch.empty(8)
    for grid in ((1,), (1,), (2, 3)):
        _scaled_kernel[grid](x, out, 8, 2.0, BLOCK=8, num_warps=4)
    assert len(launches.triton) == 1
    launch = "s", "f", "m", None, None, None, x, out, 8, 2.0, 8
    assert launches.past == [(1, 1, 1, *launch), (2, 3, 1, *launch)]


@pytest.mark.parametrize("other", ["type", "alignment", "number", "constant", "option", "none"])
def test_what_may_need_another_binary_goes_through_triton(launches, other):
    x = torch.ones(12)
    given = {"type": x.double(), "alignment": x[1:]}.get(other, x)
    last = None if other == "none" else 2.0
    constants = {"BLOCK": 16 if other == "constant" else 8, "num_warps": 8 if other == "option" else 4}
    for _ in range(2):
        _scaled_kernel[1,](x, x, 8, 2.0, BLOCK=8, num_warps=4)
        _scaled_kernel[1,](given, x, 9 if other == "number" else 8, last, **constants)
    assert len(launches.triton) == len(launches.past) == 2
    assert launches.past[-1][9] is given


def test_launches_are_not_remembered_without_end(launches, monkeypatch):
    monkeypatch.setattr(common, "REMEMBERED", 3)
    for size in range(10):
        _scaled_kernel[1,](torch.ones(8), torch.ones(8), size, 2.0, BLOCK=8)
    assert len(_scaled_kernel.known) <= 3


def _tripled(x: Tensor) -> Tensor:
    return 3 * x


def test_an_operator_is_registered_under_the_compiler_alone():
    x, graphs, tripled = torch.randn(4), [], Operator(_tripled, torch.empty_like)

    def backend(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(lambda x: tripled(x), backend=backend, fullgraph=True)
    assert torch.equal(tripled(x), 3 * x) and torch.equal(compiled(x), 3 * x)
    assert any(node.target is torch.ops.ecmoe.tripled.default for node in graphs[0].graph.nodes)
