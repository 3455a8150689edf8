"""Products by QuACK against the one-hot einsum: its own on a GPU where it is installed, else a stand-in for its calls."""

import sys
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from ecmoe import MoE, kernels
from ecmoe.kernels import layer
from ecmoe.routing import ExpertChoice
from tests.kernels.oracle import DEVICE, ODD, TOLERANCE, WHOLE, assert_near, distance, oracle, problem, with_gradients

REAL = DEVICE == "cuda" and find_spec("quack") is not None
DEEP = (24, 16, 4096, 2, 12)  # f is the depth of y = a w2


class Epilogue:
    """An epilogue of QuACK as its documentation states it: `function` of the product's numbers and named operands."""

    called: list[tuple[str, int]] = []

    def __init__(self, function, vectors=()):
        self.function, self.vectors = function, vectors

    def __call__(self, a, b, *, out, config, tuned, **operands):
        assert set(out) == {"D"} and set(operands) == set(self.vectors) and not tuned
        assert all(operand.stride(0) * operand.element_size() % 16 == 0 for operand in operands.values())
        rows = {name: operand.double()[..., None] for name, operand in operands.items()}
        out["D"].copy_(self.function(a.double() @ b.double(), **rows)["D"])
        self.called.append((self.function.__name__, config.tile_m))


@pytest.fixture(autouse=True)
def quack(monkeypatch):
    """Return the list of calls: name of the epilogue, rows of a tile; empty if QuACK is real."""
    if DEVICE == "cuda" and not REAL:
        pytest.skip("needs quack-kernels")
    monkeypatch.setattr(Epilogue, "called", [])
    if not REAL:
        contents = {
            "activation": {"gelu_tanh_approx": lambda h: F.gelu(h, approximate="tanh")},
            "epilogue.frontend": {"gemm_epilogue": lambda ops=(): lambda function: Epilogue(function, ops)},
            "epilogue.ops": {"ColVecLoad": str},
            "gemm_config": {"GemmConfig": SimpleNamespace},
        }
        for name in ("", ".epilogue", *(f".{name}" for name in contents)):
            module = ModuleType(f"quack{name}")
            vars(module).update(contents.get(name[1:], {}))
            monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.delitem(sys.modules, "ecmoe.kernels.cute", raising=False)
        monkeypatch.delattr(kernels, "cute", raising=False)
        monkeypatch.setattr("ecmoe.routing.router.CUTE", True)
    yield Epilogue.called
    if not REAL:  # the module that imported the stand-in
        sys.modules.pop("ecmoe.kernels.cute", None)
        vars(kernels).pop("cute", None)


def cute(*given):
    return kernels.experts(*given, kernels="cute")


@pytest.mark.parametrize("sizes", [WHOLE, ODD, DEEP, (300, 264, 520, 3, 130)])
def test_output_and_gradients_are_those_of_the_one_hot_einsum(sizes):
    given = problem(*sizes, torch.bfloat16)
    expected = oracle(*given)
    assert_near(with_gradients(cute, *given), expected, torch.bfloat16)
    with torch.no_grad():
        assert distance(cute(*given[:5]), expected[0]) < TOLERANCE[torch.bfloat16]


def test_weights_in_float32_get_gradients_that_nothing_has_rounded():
    x, w1, w2, token, gate, gradient = problem(*WHOLE, torch.bfloat16)
    wide = [w.detach().float().requires_grad_() for w in (w1, w2)]
    with torch.autocast(DEVICE, torch.bfloat16):
        ours = with_gradients(cute, x, *wide, token, gate, gradient)
    assert_near(ours, oracle(x, *wide, token, gate, gradient), torch.bfloat16)
    for gradient in ours[2:4]:
        assert gradient.dtype == torch.float32 and not torch.equal(gradient, gradient.bfloat16().float())


@pytest.mark.parametrize(
    ("sizes", "kept", "free"),
    [
        (WHOLE, [("_product", 128)] * 4, [("_activated", 128), ("_product", 128)]),
        (DEEP, [("_product", 256), *2 * [("_product", 128)], ("_product", 256)], [("_activated", 128), ("_product", 256)]),
        (ODD, [], []),
    ],
)  # fmt: skip
def test_who_multiplies(sizes, kept, free, quack, monkeypatch):
    """Without slopes all is QuACK's; what writes or reads them is Triton's; a row of no whole 16 bytes is cuBLAS's."""
    if REAL:
        pytest.skip("it keeps no list")
    fused = []
    for name in ("product", "product_backward"):
        real = getattr(layer, name)
        monkeypatch.setattr(layer, name, lambda *a, n=name, r=real, **k: fused.append(n) or r(*a, **k))
    given = problem(*sizes, torch.bfloat16)
    with_gradients(cute, *given)
    assert quack == kept and fused == ["product", "product_backward"][: len(kept)]
    quack.clear()
    with torch.no_grad():
        cute(*given[:5])
    assert quack == free and len(fused) == min(len(kept), 2)


def test_a_layer_is_the_plain_one_with_gradients_and_without():
    torch.manual_seed(0)
    moe = MoE(ExpertChoice(16, 4, 2.0), 16, 32, kernels="cute").to(DEVICE, torch.bfloat16)
    x, results = torch.randn(2, 12, 16, device=DEVICE, dtype=torch.bfloat16, requires_grad=True), []
    for kind in ("cute", "plain"):
        moe.kernels = kind
        out = moe(x)
        results.append([out, *torch.autograd.grad(out.float().square().sum(), [x, moe.w1, moe.w2])])
        with torch.no_grad():
            results[-1].append(moe(x))
    for ours, theirs in zip(*results, strict=True):
        assert distance(ours, theirs) < 2 * TOLERANCE[torch.bfloat16]  # both are rounded


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr("ecmoe.routing.router.CUTE", False)
    with pytest.raises(
        RuntimeError, match=r"kernels='cute' needs quack-kernels: `pip install 'quack-kernels\[cu13\]'`"
    ):
        MoE(ExpertChoice(16, 4, 2.0), 16, 32, kernels="cute")
