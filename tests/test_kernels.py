"""The fast path against the plain one: on a GPU where there is one, else in Triton's interpreter."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ecmoe import MoE
from ecmoe.moe import KERNELS
from ecmoe.routing import Assignment, ExpertChoice, Hash, TokenChoice

pytest.importorskip("triton")
from ecmoe import kernels
from ecmoe.kernels import common, product, routing, rows, selection

DEVICE = "cpu" if kernels.INTERPRETED else "cuda"
# Relative norms: float32 sums in another order; bf16 rounds each of some five results to 2^-9.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 1e-2}
WHOLE, ODD = (24, 16, 32, 4, 12), (23, 5, 9, 3, 7)  # n, d, f, e, k; the fused products take whole 16 bytes


def problem(n, d, f, e, k, dtype, seed=0):
    """x, w1, w2, token, gate, and a gradient of the output."""
    g = torch.Generator().manual_seed(seed)
    x, w1, w2 = (torch.randn(*s, generator=g) * s[-2] ** -0.5 for s in ((n, d), (e, d, f), (e, f, d)))
    token = torch.stack([torch.randperm(n, generator=g)[:k] for _ in range(e)])
    gate = torch.rand(e, k, generator=g)
    wide = torch.promote_types(dtype, torch.float32)
    tensors = [t.to(DEVICE, dtype).requires_grad_() for t in (x * n**0.5, w1, w2)]
    gradient = torch.randn(n, d, generator=g).to(DEVICE, dtype)
    return *tensors, token.to(DEVICE), gate.to(DEVICE, wide).requires_grad_(), gradient


def one_hot(x, w1, w2, token, gate):
    """Eq. 3 and 4 by einsum."""
    P = F.one_hot(token, len(x) + 1)[..., :-1].to(x.dtype)
    h = F.gelu(torch.einsum("ekn,nd,edf->ekf", P, x, w1), approximate="tanh")
    return torch.einsum("ekn,ek,ekf,efd->nd", P, gate, h, w2)


def with_gradients(function, x, w1, w2, token, gate, gradient):
    out = function(x, w1, w2, token, gate)
    return out, *torch.autograd.grad(out, [x, w1, w2, gate], gradient)


def oracle(x, w1, w2, token, gate, gradient):
    wide = [t.detach().double().requires_grad_() for t in (x, w1, w2, gate)]
    return with_gradients(one_hot, *wide[:3], token, wide[3], gradient.double())


def distance(ours, theirs):
    ours, theirs = ours.detach().double(), theirs.detach().double()
    return float((ours - theirs).norm() / theirs.norm().clamp_min(1e-30))


def assert_near(ours, theirs, dtype):
    for name, a, b in zip(("out", "x", "w1", "w2", "gate"), ours, theirs, strict=True):
        assert distance(a, b) < TOLERANCE[dtype], name


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("sizes", [WHOLE, ODD, (1, 1, 1, 1, 1)])
def test_output_and_gradients_are_those_of_the_one_hot_einsum(sizes, dtype, fuse):
    if sizes == (1, 1, 1, 1, 1) and dtype == torch.bfloat16:
        pytest.skip("of a single number a slope's 8 bits are too few: their errors average out")
    given = problem(*sizes, dtype)
    assert_near(with_gradients(lambda *a: kernels.experts(*a, fuse=fuse), *given), oracle(*given), dtype)


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
    assert distance(a, expected * gate[..., None].double()) < TOLERANCE[dtype] and distance(kept, steepness) < TOLERANCE[dtype]
    nothing, again = product.product(x_in, w1, gate, keep=False, tile=tile)
    assert nothing.numel() == 0 and torch.equal(again, a)
    dy = rows.gather(gradient, token)
    dh = product.product_backward(dy, w2, slope, gate, tile=tile)
    assert distance(dh, steepness * gate[..., None] * (dy.double() @ w2.double().mT)) < TOLERANCE[dtype]


def test_slopes_are_kept_in_8_bits():
    """All that gelu' can be, to half a step of 1/200."""
    h = torch.linspace(-12, 12, 4801, device=DEVICE)[None, :, None].expand(1, -1, 2).bfloat16().contiguous()
    wide = h.double().requires_grad_()
    value = F.gelu(wide, approximate="tanh")
    steepness = torch.autograd.grad(value.sum(), wide)[0]
    gate = torch.ones(1, 4801, device=DEVICE)
    slope, a = rows.activate_(h, gate)
    assert slope.dtype == torch.int8 and distance(a, value) < TOLERANCE[torch.bfloat16]
    again = rows.scale_(torch.ones_like(h), slope, gate)
    rounding = 2**-7 if kernels.INTERPRETED else 2**-8  # bf16's, which the interpreter cuts off
    assert (again.double() - steepness).abs().max() < 0.0025 + rounding


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


def test_without_gradients_nothing_is_kept():
    x, w1, w2, token, gate, _ = problem(*WHOLE, torch.float32)
    out, *kept = torch.ops.ecmoe.experts(x, w1, w2, token, gate, True, False)
    assert all(t.numel() == 0 for t in kept)
    with torch.no_grad():
        assert torch.equal(kernels.experts(x, w1, w2, token, gate), out)


# Operators under torch.compile


@pytest.mark.parametrize("keep", [True, False])
def test_operators_say_their_shapes(keep):
    x, w1, w2, token, gate, gradient = problem(*WHOLE, torch.float32)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_static") if keep else ("test_schema", "test_faketensor")
    given = (x, w1, w2, token, gate, True, keep)
    torch.library.opcheck(torch.ops.ecmoe.experts, given, test_utils=tests)
    if keep:
        kept = [t.detach() for t in torch.ops.ecmoe.experts(*given)[1:]]
        given = (gradient, w1.detach(), w2.detach(), token, gate.detach(), *kept, True)
        torch.library.opcheck(torch.ops.ecmoe.experts_backward, given, test_utils=("test_faketensor",))


def test_routing_operators_say_their_shapes():
    x, w = torch.randn(20, 8, device=DEVICE).bfloat16().requires_grad_(), torch.randn(8, 5, device=DEVICE).requires_grad_()
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    logits, dx = torch.randn(20, 5, device=DEVICE).requires_grad_(), torch.randn_like(x)
    torch.library.opcheck(torch.ops.ecmoe.logits, (x.detach(), w.detach()), test_utils=tests[:2])
    given = (logits.detach(), dx, x.detach(), w.detach())
    torch.library.opcheck(torch.ops.ecmoe.logits_backward, given, test_utils=tests[:2])
    torch.library.opcheck(torch.ops.ecmoe.scores, (logits,), test_utils=tests)
    torch.library.opcheck(torch.ops.ecmoe.select, (w.detach(), 3), test_utils=tests[:2])


def test_the_layer_compiles_whole():
    torch._dynamo.reset()  # else a second capacity factor is taken for a variable
    moe, x = layer("triton", recompute=True), tokens().requires_grad_()
    plain = moe(x)
    compiled = torch.compile(moe, fullgraph=True, backend="aot_eager" if DEVICE == "cpu" else "inductor")
    gradient = torch.randn_like(plain)
    wanted = [x, *moe.parameters()]
    for a, b in zip(
        (plain, *torch.autograd.grad(plain, wanted, gradient)),
        (out := compiled(x), *torch.autograd.grad(out, wanted, gradient)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_the_layer_runs_in_a_cuda_graph():
    moe, x = layer("triton"), tokens().requires_grad_()
    expected = moe(x).detach()  # a graph alive would tie x to the stream outside
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            torch.autograd.grad(moe(x).sum(), [x, *moe.parameters()])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = moe(x)
        gradients = torch.autograd.grad(out.sum(), [x, *moe.parameters()])
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected) and all(g.isfinite().all() for g in gradients)


def test_every_kernel_compiles_for_hopper(tmp_path):
    """What the interpreter can't know: types, layouts, shared memory, tensor cores. No GPU is needed."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    script = Path(__file__).with_name("compile_kernels.py")
    shown = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr[-2000:]
    shown = [line.split() for line in shown.stdout.splitlines()]
    names = {name for part in (rows, product, routing, selection) for name in vars(part) if name.endswith("_kernel")}
    assert {row[0] for row in shown} == names
    for name, _, _, _, spilled, _, shared, _, wgmma in shown:
        assert int(spilled) <= 64 and int(shared) <= 232_448, name  # of a multiprocessor of sm_90
        assert int(wgmma) > 0 or "product" not in name


# The layer

D, FF, E, B, T = 16, 32, 4, 2, 12


def layer(kernels, router=lambda: ExpertChoice(D, E, 2.0), dtype=torch.float32, **keys) -> MoE:
    torch.manual_seed(0)
    return MoE(router(), D, FF, kernels=kernels, **keys).to(DEVICE, dtype)


def tokens(dtype=torch.float32) -> torch.Tensor:
    return torch.randn(B, T, D, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)


ROUTERS = {
    "ec": lambda: ExpertChoice(D, E, 2.0),
    "ec renormalized by sequence": lambda: ExpertChoice(D, E, 1.0, pool="sequence", gate="renormalized"),
    "ec capped": lambda: ExpertChoice(D, E, 2.0, max_experts_per_token=2),
    "top-2 with capacity": lambda: TokenChoice(D, E, 2, 1.0, gate="renormalized"),
    "hash": lambda: Hash(D, E, 50, 1.0),
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ROUTERS)
def test_layer_is_the_plain_one_with_every_router(name, masked):
    plain, fast = layer("plain", ROUTERS[name]), layer("triton", ROUTERS[name])
    ids = torch.randint(50, (B, T), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    mask = None
    if masked:
        mask = torch.ones(B, T, dtype=torch.bool, device=DEVICE)
        mask[:, 8:] = False
    results = []
    for moe in (plain, fast):
        x = tokens().requires_grad_()
        out = moe(x, token_ids=ids, mask=mask)
        loss = out.square().sum() + (0 if moe.aux_loss is None else moe.aux_loss)
        results.append((out, *torch.autograd.grad(loss, [x, *moe.parameters()]), *moe.buffers()))
        if name.startswith("ec"):
            results[-1] += (moe.router.cutoff.pending,)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_bf16_is_no_further_from_float32_than_the_plain_path():
    reference = layer("plain", dtype=torch.bfloat16)
    wide = copy.deepcopy(reference).float()
    x = tokens(torch.bfloat16)
    token, gate = (t.detach() for t in reference.router.assign(reference.router.logits(x)))
    gradient = torch.randn_like(x.flatten(0, 1))

    def run(moe, dtype):
        flat = x.flatten(0, 1).to(dtype).requires_grad_()
        g = gate.clone().requires_grad_()
        out = moe.experts(flat, token, g)
        return out, *torch.autograd.grad(out, [flat, moe.w1, moe.w2, g], gradient.to(dtype))

    expected = run(wide, torch.float32)
    plain = [distance(a, b) for a, b in zip(run(reference, torch.bfloat16), expected, strict=True)]
    for kind in ("triton", "triton-bmm"):
        reference.kernels = kind
        fast = [distance(a, b) for a, b in zip(run(reference, torch.bfloat16), expected, strict=True)]
        assert all(ours < 1e-2 for ours in fast)
        if not kernels.INTERPRETED:  # which rounds otherwise
            assert all(ours < 1.05 * theirs for ours, theirs in zip(fast, plain, strict=True))


@pytest.mark.parametrize("again", ["experts", "whole layer"])
def test_checkpointing_changes_neither_output_nor_gradient(again):
    results = []
    for recompute in (False, True):
        moe, x = layer("triton", recompute=recompute and again == "experts"), tokens().requires_grad_()
        out = checkpoint(moe, x, use_reentrant=False) if recompute and again == "whole layer" else moe(x)
        results.append((out, *torch.autograd.grad(out.square().sum(), [x, *moe.parameters()])))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_weights_in_float32_get_gradients_in_float32():
    x, w1, w2, token, gate, gradient = problem(*WHOLE, torch.bfloat16)
    narrow = with_gradients(kernels.experts, x, w1, w2, token, gate, gradient)
    wide = [w.detach().float().requires_grad_() for w in (w1, w2)]
    ours = with_gradients(kernels.experts, x, *wide, token, gate, gradient)
    assert ours[2].dtype == ours[3].dtype == torch.float32
    for a, b in zip(ours, narrow, strict=True):
        assert distance(a, b) < TOLERANCE[torch.bfloat16]


def test_autocast_takes_the_products_down_and_the_routing_not():
    x = tokens()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out, expected = layer("triton")(x), layer("plain")(x)
    assert out.dtype == expected.dtype == torch.float32
    assert 0 < distance(out, expected) < 1e-2


def test_what_cannot_be_is_said(monkeypatch):
    with pytest.raises(ValueError, match="kernels='fast': must be one of auto, plain, triton"):
        layer("fast")
    assert all(layer(name).router.kernels == name for name in KERNELS)
    monkeypatch.setattr(common, "INTERPRETED", False)
    with pytest.raises(RuntimeError, match="CUDA device, and these are on cpu.*kernels='plain'"):
        kernels.experts(*problem(*WHOLE, torch.float32)[:5] if DEVICE == "cpu" else [torch.zeros(1)] * 5)
    monkeypatch.setattr("ecmoe.moe.TRITON", False)
    with pytest.raises(RuntimeError, match="pip install triton"):
        layer("triton")


# Routing


@pytest.mark.parametrize(("m", "k"), [(64, 8), (100, 33), (7, 7), (1, 1), (9000, 300), (9000, 8999), (20_000, 600)])
def test_select_takes_the_k_highest(m, k):
    scores = torch.randn(3, m, generator=torch.Generator().manual_seed(m)).to(DEVICE)
    chosen = kernels.select(scores, k)
    assert torch.equal(chosen, scores.topk(k).indices.sort().values)


@pytest.mark.parametrize("kind", ["rising", "few values", "periodic", "one high"])
def test_select_is_right_where_its_sample_misleads(kind):
    m, k = 12_000, 500
    place = torch.arange(m)
    scores = {
        "rising": place.float(),
        "few values": (place % 3).float(),
        "periodic": (place % (m // selection.SAMPLE) == 0).float() + place / m,  # the sample sees only high ones
        "one high": (place == 7).float(),
    }[kind]
    expected = scores.argsort(descending=True, stable=True)[:k].sort().values
    assert torch.equal(kernels.select(scores.to(DEVICE), k).cpu(), expected)


def test_select_orders_all_float32_numbers():
    tiny = torch.finfo(torch.float32).tiny
    values = [float("inf"), 1e38, 2.0, 1.0000001, 1.0, tiny, tiny / 4, 1e-45, 0.0, -1e-45, -tiny, -1.0, -3e38, float("-inf")]
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(0))
    values = torch.tensor(values)
    scores = values[order].to(DEVICE)
    for k in range(1, len(values) + 1):
        assert scores[kernels.select(scores, k)].sort(descending=True).values.tolist() == values[:k].tolist()
    scores[3] = float("nan")
    assert kernels.select(scores, 1).tolist() == [3]  # as topk's


def test_of_equal_scores_the_first_are_taken():
    scores = torch.tensor([[0.0, -0.0, 0.0, 1.0, 0.0, -0.0], [2.0] * 6, [1, 3, 1, 3, 1, 3.0]], device=DEVICE)
    assert kernels.select(scores, 3).tolist() == [[0, 1, 3], [0, 1, 2], [1, 3, 5]]
    assert kernels.select(scores, 4).tolist() == [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 3, 5]]


def test_select_takes_pools_and_softmax_scores():
    scores = torch.randn(2, 5, 60, generator=torch.Generator().manual_seed(0)).to(DEVICE).softmax(1)
    chosen = kernels.select(scores.transpose(0, 1), 7).transpose(0, 1)
    assert torch.equal(chosen, scores.topk(7).indices.sort().values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("n", "d", "e"), [(40, 24, 6), (130, 70, 17), (1, 1, 1)])
def test_logits_are_float32s(n, d, e, dtype):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=g).to(DEVICE, dtype).requires_grad_()
    w = torch.randn(d, e, generator=g).to(DEVICE).requires_grad_()
    gradient = torch.randn(n, e, generator=g).to(DEVICE)
    out, expected = kernels.logits(x, w), x.double() @ w.double()
    assert out.dtype == torch.float32 and distance(out, expected) < 2e-6
    (dx, dw), theirs = (torch.autograd.grad(o, [x, w], gradient.to(o.dtype)) for o in (out, expected))
    assert dx.dtype == dtype and distance(dx, theirs[0]) < (2**-6 if dtype == torch.bfloat16 else 2e-6)
    assert distance(dw, theirs[1]) < 2e-6


def test_the_two_gradients_of_a_token_add_up():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(40, 24, generator=g).to(DEVICE).requires_grad_()
    w = torch.randn(24, 6, generator=g).to(DEVICE)
    out, again = kernels.logits_and_tokens(x, w)
    assert torch.equal(again, x)
    (ours,) = torch.autograd.grad(out.square().sum() + again.sin().sum(), x)
    (theirs,) = torch.autograd.grad((x @ w).square().sum() + x.sin().sum(), x)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    (alone,) = torch.autograd.grad(kernels.logits(x, w).square().sum(), x)
    torch.testing.assert_close(alone, ours - x.cos(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "e"), [(70, 64), (33, 5), (1, 1), (3, 300)])
def test_scores_are_the_softmax_by_expert(n, e, dtype):
    logits = (3 * torch.randn(n, e, generator=torch.Generator().manual_seed(0))).to(DEVICE, dtype).requires_grad_()
    gradient = torch.randn(e, n, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    ours, theirs = kernels.scores(logits), logits.softmax(1).T
    torch.testing.assert_close(ours, theirs)
    (ours,), (theirs,) = (torch.autograd.grad(S, logits, gradient) for S in (ours, theirs))
    torch.testing.assert_close(ours, theirs)


def test_logits_of_other_types_are_the_plain_product():
    x, w = torch.randn(5, 4, device=DEVICE).double(), torch.randn(4, 3, device=DEVICE)
    assert torch.equal(kernels.logits(x, w), x @ w.double())


def test_an_assignment_is_inverted():
    token = torch.tensor([[2, 0], [0, 3], [3, 1]], device=DEVICE)
    assert rows.invert(Assignment(token, None).token, 3).tolist() == [[1, 2, 6], [6, 6, 5], [0, 6, 6]]
