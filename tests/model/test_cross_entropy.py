"""The fused output layer and loss against F.cross_entropy on whole logits."""

import pytest
import torch
from torch.nn import functional as F

from ecmoe.config import RunConfig
from ecmoe.model import cross_entropy
from ecmoe.model.build import build_model
from ecmoe.model.cross_entropy import linear_cross_entropy, losses_
from tests.on_gpu import OnGPU

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def problem(n=29, d=12, V=50, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(n, d, generator=g), torch.randn(V, d, generator=g)
    targets = torch.randint(V, (n,), generator=g).to(DEVICE)
    return x.to(DEVICE, dtype).requires_grad_(), weight.to(DEVICE, dtype).requires_grad_(), targets


def whole(x, weight, targets):
    return F.cross_entropy((x @ weight.T).to(torch.promote_types(x.dtype, torch.float32)), targets)


def distance(ours, theirs):
    ours, theirs = ours.detach().double(), theirs.detach().double()
    return float((ours - theirs).norm() / theirs.norm())


@pytest.fixture(params=["one chunk", "many chunks", "a chunk per token"])
def chunks(request, monkeypatch):
    size = {"one chunk": 1 << 29, "many chunks": 3000, "a chunk per token": 1}[request.param]
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", size)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_loss_and_gradients_are_those_of_whole_logits(chunks, dtype):
    x, weight, targets = problem(dtype=dtype)
    loss, expected = linear_cross_entropy(x, weight, targets), whole(x, weight, targets)
    assert loss.dtype == expected.dtype
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}[dtype]
    assert distance(loss, expected) < tolerance
    outside = 3 * torch.ones_like(loss)  # a factor on the loss
    for ours, theirs in zip(
        torch.autograd.grad(loss, [x, weight], outside),
        torch.autograd.grad(expected, [x, weight], outside),
        strict=True,
    ):
        assert ours.dtype == dtype
        assert distance(ours, theirs) < tolerance


def test_gradients_are_those_of_differences(chunks):
    x, weight, targets = problem(n=7, d=3, V=5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x, w: linear_cross_entropy(x, w, targets), (x, weight))


def test_large_logits_neither_overflow_nor_vanish():
    x, weight, targets = problem()
    loss = linear_cross_entropy(100 * x, 100 * weight, targets)
    torch.testing.assert_close(loss, whole(100 * x, 100 * weight, targets))


def test_a_loss_that_nobody_differentiates_keeps_no_gradient(monkeypatch):
    x, weight, targets = problem()
    kept = []
    monkeypatch.setattr(cross_entropy, "losses_", lambda z, t, keep: kept.append(keep) or losses_(z, t, keep))
    expected = linear_cross_entropy(x, weight, targets)
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(x, weight, targets), expected)
    assert torch.equal(linear_cross_entropy(x.detach(), weight.detach(), targets), expected)
    assert kept == [True, False, False]


@pytest.mark.parametrize("wants", [0, 1])
def test_what_alone_wants_a_gradient_gets_it(wants):
    given = problem()
    given[1 - wants].requires_grad_(False)
    ours, expected = (torch.autograd.grad(loss(*given), given[wants])[0] for loss in (linear_cross_entropy, whole))
    torch.testing.assert_close(ours, expected)


def test_under_autocast_float64_stays():
    given = problem(dtype=torch.float64)
    with torch.autocast(DEVICE, torch.bfloat16):
        found = linear_cross_entropy(*given)
    torch.testing.assert_close(found, whole(*given), rtol=1e-12, atol=0)


def test_under_autocast_products_are_bf16_and_the_rest_is_float32():
    x, weight, targets = problem(200, 64, 300)
    with torch.autocast(DEVICE, torch.bfloat16):
        loss = linear_cross_entropy(x, weight, targets)
        plain = F.cross_entropy(F.linear(x, weight).float(), targets)
    exact = whole(x.double(), weight.double(), targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=0)  # the same bf16 logits
    expected = torch.autograd.grad(exact, [x, weight])
    errors = [
        [distance(g, e) for g, e in zip(torch.autograd.grad(out, [x, weight]), expected, strict=True)]
        for out in (loss, plain)
    ]
    assert all(ours < 1.05 * theirs for ours, theirs in zip(*errors, strict=True))


def test_it_compiles_whole(chunks):
    x, weight, targets = problem()
    compiled = torch.compile(
        linear_cross_entropy, fullgraph=True, backend="aot_eager" if DEVICE == "cpu" else "inductor"
    )
    for a, b in zip(
        torch.autograd.grad(compiled(x, weight, targets), [x, weight]),
        torch.autograd.grad(linear_cross_entropy(x, weight, targets), [x, weight]),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_operator_is_what_it_says():
    for keep, dtype in ((True, torch.float32), (False, torch.float32), (False, torch.bfloat16)):
        x, weight, targets = problem(dtype=dtype)
        tests = ["test_schema", "test_faketensor"] + ["test_autograd_registration"] * keep
        torch.library.opcheck(torch.ops.ecmoe.linear_cross_entropy, (x, weight, targets, keep), test_utils=tests)


@pytest.mark.parametrize("V", [1, 50, 9000])  # the last is read a part at a time
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_is_the_plain_pass(V, dtype):
    pytest.importorskip("triton")
    from ecmoe.kernels.loss import losses_

    g = torch.Generator().manual_seed(V)
    z = (3 * torch.randn(5, V, generator=g)).to(DEVICE, dtype)
    targets = torch.randint(V, (5,), generator=g).to(DEVICE)
    kept, wide = z.clone(), z.double().requires_grad_()
    expected = F.cross_entropy(wide, targets, reduction="none")
    torch.testing.assert_close(losses_(kept, targets, False).double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(kept, z)
    torch.testing.assert_close(losses_(z, targets, True).double(), expected, rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(expected.sum(), wide)
    torch.testing.assert_close(z, gradient.to(dtype), rtol=1e-5 if dtype == torch.float32 else 2**-7, atol=1e-5)


def test_the_kernel_multiplies_a_gradient_in_float32():
    pytest.importorskip("triton")
    from ecmoe.kernels.loss import scaled

    x, factor = torch.randn(5000).to(DEVICE, torch.float16), torch.tensor(1 / 3, device=DEVICE)
    assert torch.equal(scaled(x, factor), (x.float() * factor).half())


def test_a_target_that_is_no_token_makes_the_loss_nan():
    pytest.importorskip("triton")
    from ecmoe.kernels.loss import losses_

    losses = losses_(torch.randn(4, 10, device=DEVICE), torch.tensor([1, -1, -100, 10], device=DEVICE), False)
    assert losses.isnan().tolist() == [False, True, True, True]


def test_the_model_gives_the_loss_of_its_logits():
    model = build_model(
        RunConfig(layers=2, d_model=16, d_ff=24, heads=2, sequence_length=12, batch_size=2, num_experts=4)
    )
    tokens = torch.randint(256, (2, 13), generator=torch.Generator().manual_seed(0))
    ids, targets = tokens[:, :-1], tokens[:, 1:]
    loss = model(ids, targets=targets)
    expected = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(loss, expected)
    for a, b in zip(
        torch.autograd.grad(loss, list(model.parameters())),
        torch.autograd.grad(expected, list(model.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("path", ["plain", "kernel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_is_scaled_in_float32(dtype, path):
    """Off by no more than rounding the right product once: a factor in 16 bits would be off for all alike."""
    scaled = cross_entropy._scaled
    if path == "kernel":
        pytest.importorskip("triton")
        from ecmoe.kernels.loss import scaled

    x = torch.randn(70, 131, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    factor = torch.tensor(1.0038 / 65_536, device=DEVICE)  # just between two numbers of bf16
    for given in (x, x.T):
        exact = given.double() * factor.double()
        bound = 1.05 if path == "plain" or DEVICE == "cuda" else 1.8  # the interpreter cuts off instead of rounding
        assert distance(scaled(given, factor), exact) <= bound * distance((given.float() * factor).to(dtype), exact)


def test_gradients_of_many_chunks_add_up_in_float32(monkeypatch):
    """In bf16 they would be off by far more than their one rounding at the end."""
    assert cross_entropy.CHUNK_BYTES == 2**30  # another size adds up in another order
    x, weight, targets = problem(n=600, d=16, V=40, dtype=torch.bfloat16)
    exact = torch.autograd.grad(whole(x.double(), weight.double(), targets), weight)[0]
    errors = []
    for size in (1 << 30, 400):  # all tokens at once, five at a time
        monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", size)
        (gradient,) = torch.autograd.grad(linear_cross_entropy(x, weight, targets), weight)
        errors.append(distance(gradient, exact))
    assert errors[1] < 1.05 * errors[0]


@pytest.mark.parametrize("triton", [True, False])
def test_a_gpu_reads_logits_once_and_scales_by_a_kernel_where_it_can(monkeypatch, triton):
    loss = pytest.importorskip("ecmoe.kernels.loss")
    told, targets = [], torch.tensor([1, 0])
    monkeypatch.setattr(loss, "losses_", lambda *given: told.append(given))
    monkeypatch.setattr(loss, "scaled", lambda *given: told.append(given) or given[0].clone())
    monkeypatch.setattr(cross_entropy, "TRITON", triton)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        z, ours = torch.ones(2, 3, dtype=dtype).as_subclass(OnGPU), triton and dtype != torch.float64
        losses_(z, targets, False)
        assert len(told) == ours and all(given[0] is z and given[1:] == (targets, False) for given in told)
        told.clear()
        cross_entropy._scaled._init_fn(z, factor := torch.tensor(2.0, dtype=cross_entropy._wide(z)))
        assert len(told) == ours and all(given[0] is z and given[1] is factor for given in told)
        told.clear()


def test_a_gpu_adds_gradients_of_weights_up_in_one_step(monkeypatch):
    x, weight, targets = (t.detach() for t in problem(dtype=torch.bfloat16))
    expected, added = cross_entropy._sum._init_fn(x, weight, targets, True), []

    def addmm(dw, a, b, *, out_dtype, out):
        added.append((out_dtype, out is dw))
        return out.add_(a.to(out_dtype) @ b.to(out_dtype))

    monkeypatch.setattr(torch, "addmm", addmm)
    monkeypatch.setattr(cross_entropy, "TRITON", False)
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 1500)
    for ours, theirs in zip(
        cross_entropy._sum._init_fn(x.as_subclass(OnGPU), weight, targets, True), expected, strict=True
    ):
        torch.testing.assert_close(torch.Tensor(ours), theirs, rtol=1e-2, atol=1e-2)
    assert added == [(torch.float32, True)] * 2
    wide = [t.float() for t in (x, weight)]
    cross_entropy._sum._init_fn(wide[0].as_subclass(OnGPU), wide[1], targets, True)
    assert len(added) == 2  # its sums are of its own type
