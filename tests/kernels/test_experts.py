"""The experts' operator against the one-hot einsum."""

import pytest
import torch
from torch.nn import functional as F

from ecmoe import kernels
from ecmoe.kernels import layer, product, rows
from ecmoe.routing import Assignment
from tests.kernels.oracle import (
    DEVICE,
    ODD,
    TOLERANCE,
    WHOLE,
    assert_near,
    distance,
    oracle,
    problem,
    spoil_new_memory,
    with_gradients,
)

NARROW = (40, 16, 24, 3, 10)  # a row of f has whole 16 bytes, but not one of slopes in 8 bits


@pytest.mark.parametrize("who", ["triton", "triton-bmm"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("sizes", [WHOLE, ODD, NARROW, (1, 1, 1, 1, 1)])
def test_output_and_gradients_are_those_of_the_one_hot_einsum(sizes, dtype, who):
    if sizes == (1, 1, 1, 1, 1) and dtype == torch.bfloat16:
        pytest.skip("of a single number a slope's 8 bits are too few: their errors average out")
    given = problem(*sizes, dtype)
    assert_near(with_gradients(lambda *a: kernels.experts(*a, kernels=who), *given), oracle(*given), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_that_all_or_none_take_and_empty_slots(dtype):
    x, w1, w2, token, gate, gradient = problem(20, 16, 32, 9, 6, dtype)  # more experts than a step of `combine` adds
    token[:] = torch.arange(5, 11, device=DEVICE)  # tokens 0 to 4 are in no expert
    token[:, 0] = 3
    token[4, 2:], token[8] = 20, 20
    gate = torch.where(token == 20, 0.0, gate.detach()).requires_grad_()
    ours = with_gradients(kernels.experts, x, w1, w2, token, gate, gradient)
    assert_near(ours, oracle(x, w1, w2, token, gate, gradient), dtype)
    assert (ours[0][:3] == 0).all() and (ours[1][:3] == 0).all()
    assert (ours[2][8] == 0).all() and (ours[4][token == 20] == 0).all()


@pytest.mark.parametrize("sizes", [WHOLE, ODD])  # fused and not
def test_experts_read_nothing_that_nobody_has_written(sizes, monkeypatch):
    x, w1, w2, token, gate, gradient = problem(*sizes, torch.float32)
    token[1, 2:], token[2] = len(x), len(x)  # empty slots
    gate = torch.where(token == len(x), 0.0, gate.detach()).requires_grad_()
    found = []
    for spoiled in (False, True):
        if spoiled:
            spoil_new_memory(monkeypatch)
        found.append(with_gradients(kernels.experts, x, w1, w2, token, gate, gradient))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_more_rows_and_columns_than_a_program_holds():
    given = problem(40, 1100, 1100, 2, 24, torch.float64)
    assert_near(with_gradients(kernels.experts, *given), oracle(*given), torch.float64)
    token = torch.stack([torch.randperm(1400, generator=torch.Generator().manual_seed(i))[:600] for i in range(2)])
    expected = torch.full((1400, 2), 1200)
    for i in range(2):
        expected[token[i], i] = 600 * i + torch.arange(600)
    assert torch.equal(rows.invert(token.to(DEVICE), 1400).cpu(), expected.int())


@pytest.mark.parametrize(
    ("dtype", "who", "fused"),
    [(torch.bfloat16, "triton", True), (torch.bfloat16, "triton-bmm", False), (torch.float64, "triton", False)],
)
def test_who_multiplies(dtype, who, fused, monkeypatch):
    if not kernels.INTERPRETED and not product.fusible(
        torch.empty(1, 8, 8, device=DEVICE, dtype=dtype), torch.empty(1, 8, 8)
    ):
        pytest.skip("needs a Hopper")
    called = []
    for name in ("product", "product_backward", "activate_", "scale_"):
        real = getattr(layer, name)
        monkeypatch.setattr(layer, name, lambda *a, n=name, r=real, **k: called.append(n) or r(*a, **k))
    with_gradients(lambda *a: kernels.experts(*a, kernels=who), *problem(*WHOLE, dtype))
    assert called == (["product", "product_backward"] if fused else ["activate_", "scale_"])


def test_the_copy_engine_is_asked_for_rows_of_whole_16_bytes(monkeypatch):
    """A GPU refuses a descriptor of any other tensor; the interpreter takes it."""
    described, given = [], problem(*NARROW, torch.bfloat16)
    real = product.described
    monkeypatch.setattr(product, "described", lambda base, block: described.append(base) or real(base, block))
    with_gradients(kernels.experts, *given)
    assert described or not kernels.INTERPRETED
    assert all(stride * t.element_size() % 16 == 0 for t in described for stride in t.stride()[:-1])


@pytest.mark.skipif(not kernels.INTERPRETED, reason="of a GPU's kind it also depends")
def test_what_the_fused_products_take():
    """16 bits, in the interpreter 32 too, and rows of w and of its transpose of whole 16 bytes, of however many experts."""
    sizes = {(3, 8, 16): True, (3, 8, 12): False, (3, 12, 8): False, (2, 4, 8): False}
    for dtype in (torch.bfloat16, torch.float16):
        found = {size: product.fusible(torch.empty(3, 5, size[1], dtype=dtype), torch.empty(size)) for size in sizes}
        assert found == sizes
    for dtype, size, fits in (
        (torch.float32, (3, 4, 12), True),
        (torch.float32, (3, 4, 6), False),
        (torch.float64, (3, 8, 8), False),
    ):
        assert product.fusible(torch.empty(3, 5, size[1], dtype=dtype), torch.empty(size)) == fits
    assert not product.fusible(torch.empty(3, 0, 8), torch.empty(3, 8, 8))


def test_several_tiles_down_across_and_deep():
    tile = product.Tile(16, 32, 16, 16, warps=4, stages=2, per_sm=1)
    dtype = torch.float32 if kernels.INTERPRETED else torch.bfloat16
    x, w1, w2, token, gate, gradient = (t.detach() for t in problem(60, 40, 80, 3, 37, dtype))
    x_in = rows.gather(x, token)
    slope, a = product.product(x_in, w1, gate, tile=tile)
    h = (x_in.double() @ w1.double()).requires_grad_()
    expected = F.gelu(h, approximate="tanh")
    steepness = torch.autograd.grad(expected.sum(), h)[0]
    kept = slope.double() if dtype == torch.float32 else (slope.view(torch.uint8).double() - 27) / 200
    assert (
        distance(a, expected * gate[..., None].double()) < TOLERANCE[dtype]
        and distance(kept, steepness) < TOLERANCE[dtype]
    )
    nothing, again = product.product(x_in, w1, gate, keep=False, tile=tile)
    assert nothing.numel() == 0 and torch.equal(again, a)
    dy = rows.gather(gradient, token)
    dh = product.product_backward(dy, w2, slope, gate, tile=tile)
    assert distance(dh, steepness * gate[..., None] * (dy.double() @ w2.double().mT)) < TOLERANCE[dtype]


def test_experts_and_gradients_are_the_same_in_any_layout():
    given, found = [t.detach() for t in problem(*WHOLE, torch.float32)], []
    for order in (lambda t: t, lambda t: t.mT.contiguous().mT):
        x, w1, w2, token, gate, gradient = map(order, given)
        wanted = [t.requires_grad_() for t in (x, w1, w2, gate)]
        found.append(with_gradients(kernels.experts, *wanted[:3], token, wanted[3], gradient))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_slopes_are_kept_in_8_bits():
    """All that gelu' can be, to half a step of 1/200."""
    h = torch.linspace(-12, 12, 4800, device=DEVICE).view(1, 4, 1200).bfloat16()
    wide = h.double().requires_grad_()
    value = F.gelu(wide, approximate="tanh")
    steepness = torch.autograd.grad(value.sum(), wide)[0]
    gate = torch.ones(1, 4, device=DEVICE)
    slope, a = rows.activate_(h, gate)
    assert rows.new_slope(h.half(), True).dtype == torch.int8 and rows.new_slope(h.float(), True).dtype == torch.float32
    assert slope.dtype == torch.int8 and distance(a, value) < TOLERANCE[torch.bfloat16]
    again = rows.scale_(torch.ones_like(h), slope, gate)
    rounding = 2**-7 if kernels.INTERPRETED else 2**-8  # bf16's, which the interpreter cuts off
    assert (again.double() - steepness).abs().max() < 0.0025 + rounding


@pytest.mark.parametrize("alone", range(4))
def test_each_input_alone_may_want_its_gradient(alone):
    *given, gradient = problem(6, 4, 5, 2, 3, torch.float32)
    token = given.pop(3)
    wanted = [t.detach().requires_grad_(i == alone) for i, t in enumerate(given)]
    out = kernels.experts(*wanted[:3], token, wanted[3])
    (ours,) = torch.autograd.grad(out, wanted[alone], gradient)
    theirs = oracle(*given[:3], token, given[3], gradient)[1 + alone]
    assert distance(ours, theirs) < TOLERANCE[torch.float32]


def test_a_second_backward_pass_is_refused():
    x, w1, w2, token, gate, gradient = problem(*WHOLE, torch.float32)
    out = kernels.experts(x, w1, w2, token, gate)
    torch.autograd.grad(out, x, gradient, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out, x, gradient)


def test_the_same_input_gives_the_same_bits():
    given = problem(*WHOLE, torch.bfloat16)
    first = with_gradients(kernels.experts, *given)
    for _ in range(3 if kernels.INTERPRETED else 20):
        for a, b in zip(first, with_gradients(kernels.experts, *given), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("who", ["triton", "triton-bmm"])
def test_without_gradients_nothing_is_kept(who, monkeypatch):
    x, w1, w2, token, gate, _ = problem(*WHOLE, torch.float32)
    kept, forward = [], layer._experts_op
    monkeypatch.setattr(layer, "_experts_op", lambda *given: kept.extend(found := forward(*given)) or found)
    with torch.no_grad():
        out = kernels.experts(x, w1, w2, token, gate, kernels=who)
    assert len(kept) == 8 and torch.equal(kept[0], out) and not any(t.numel() for t in kept[1:])
    assert torch.equal(kernels.experts(x, w1, w2, token, gate, kernels=who), out)
    assert [t.numel() > 0 for t in kept[8:]] == [True] * 6 + [False] * 2  # the weights are x's kind


def test_weights_in_float32_get_gradients_in_float32():
    x, w1, w2, token, gate, gradient = problem(*WHOLE, torch.bfloat16)
    narrow = with_gradients(kernels.experts, x, w1, w2, token, gate, gradient)
    wide = [w.detach().float().requires_grad_() for w in (w1, w2)]
    ours = with_gradients(kernels.experts, x, *wide, token, gate, gradient)
    assert ours[2].dtype == ours[3].dtype == torch.float32
    for a, b in zip(ours, narrow, strict=True):
        assert distance(a, b) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("keep", [True, False])
def test_operators_say_their_shapes(keep):
    x, w1, w2, token, gate, gradient = problem(*WHOLE, torch.float32)
    x, w1, w2, gate = (t.detach() for t in (x, w1, w2, gate))
    given = (x, w1, w2, token, gate, None, "triton", keep)
    torch.library.opcheck(torch.ops.ecmoe.experts_forward, given, test_utils=("test_schema", "test_faketensor"))
    if keep:
        given = (gradient, w1, w2, token, gate, *torch.ops.ecmoe.experts_forward(*given)[1:], "triton")
        torch.library.opcheck(torch.ops.ecmoe.experts_backward, given, test_utils=("test_faketensor",))


def test_an_assignment_is_inverted():
    token = torch.tensor([[2, 0], [0, 3], [3, 1]], device=DEVICE)
    assert rows.invert(Assignment(token, None).token, 3).tolist() == [[1, 2, 6], [6, 6, 5], [0, 6, 6]]
