"""Attention: its bias as written out, and the fast path against the plain one."""

import math
from types import SimpleNamespace

import pytest
import torch

from ecmoe.config import RunConfig
from ecmoe.model import attention
from ecmoe.model.attention import Attention, RelativeBias, bucket
from ecmoe.model.build import build_model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = RunConfig(layers=2, d_model=16, d_ff=24, heads=2, sequence_length=12, batch_size=2, num_experts=4)


def test_attention_is_softmax_with_the_bias_of_each_distance():
    attention = Attention(SMALL).double()
    with torch.no_grad():
        attention.relative.weight.normal_()
    x = torch.randn(1, 12, 16, dtype=torch.float64)
    q, k, v = attention.qkv(x)[0].view(12, 3, 2, 8).permute(1, 2, 0, 3)
    expected = torch.zeros(2, 12, 8, dtype=torch.float64)
    for h in range(2):
        for t in range(12):
            distance = torch.tensor([t - s for s in range(t + 1)])
            bias = attention.relative.weight[bucket(distance, 32, 128), h]
            p = (q[h, t] @ k[h, : t + 1].T / math.sqrt(8) + bias).softmax(0)
            expected[h, t] = p @ v[h, : t + 1]
    torch.testing.assert_close(attention(x)[0], attention.out(expected.transpose(0, 1).reshape(12, 16)))


def test_buckets_are_t5s():
    # 32 buckets to distance 128: exact to 15, logarithmic from 16, the last from 113 on.
    assert bucket(torch.arange(16), 32, 128).tolist() == list(range(16))
    far = bucket(torch.tensor([16, 18, 19, 112, 113, 128, 5000]), 32, 128).tolist()
    assert far == [
        16 + int(16 * math.log(d / 16) / math.log(8)) if d < 128 else 31 for d in (16, 18, 19, 112, 113, 128, 5000)
    ]
    assert far == sorted(far) and far[-1] == 31


def test_buckets_of_odd_numbers_and_of_more_than_there_are_distances():
    assert bucket(torch.arange(9), 8, 3).tolist() == [0, 1, 2, 3, 4, 7, 7, 7, 7]  # all are near
    far = [min(3 + int(4 * math.log(d / 3) / math.log(50 / 3)), 6) for d in range(3, 60)]
    assert bucket(torch.arange(60), 7, 50).tolist() == [0, 1, 2, *far]
    assert bucket(torch.arange(15, 19), 32, 17).tolist() == [15, 16, 31, 31]  # from the first to the last in one step


@pytest.mark.parametrize(("buckets", "distance"), [(32, 128), (2, 2), (4, 8), (32, 2), (7, 50)])
def test_distances_from_near_on_share_the_last_bucket(buckets, distance):
    near = RelativeBias(1, buckets, distance).near
    found = bucket(torch.arange(1000), buckets, distance)
    assert (found[near - 1 :] == buckets - 1).all() and found[near - 2] < buckets - 1


@pytest.mark.parametrize(("buckets", "most"), [(6, 20), (2, 2), (5, 4), (8, 3)])
def test_a_heads_bias_starts_by_falling_with_distance(buckets, most):
    config = SMALL.replace(relative_buckets=buckets, relative_max_distance=most)
    weight = build_model(config).blocks[0].attention.relative.weight
    by_bucket = {b: [] for b in range(buckets)}
    for distance in range(21):
        by_bucket[int(bucket(torch.tensor(distance), buckets, most))].append(distance)
    for b, distances in by_bucket.items():
        mean = distances[0] if b == buckets - 1 else sum(distances) / max(len(distances), 1)
        for h, slope in enumerate((2**-4, 2**-8)):  # 2^(-8 (h + 1) / 2)
            assert weight[b, h].item() == pytest.approx(-slope * mean), (b, h)


def test_a_bias_may_start_at_random_instead():
    weights = [b.attention.relative.weight for b in build_model(SMALL.replace(relative_init="normal")).blocks]
    assert torch.cat(weights).std().item() == pytest.approx(0.1, rel=0.25) and not torch.equal(*weights)


# The fast path: on a GPU where there is one, else in Triton's interpreter

# Relative norms. bf16 rounds P, dS and the results to 2^-9 each; the interpreter cuts them off.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2 if DEVICE == "cuda" else 2e-2}
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


@pytest.fixture
def kernels():
    pytest.importorskip("triton")
    from ecmoe.kernels import INTERPRETED
    from ecmoe.kernels import attention as kernel

    if DEVICE == "cpu" and not INTERPRETED:
        pytest.skip("needs a GPU or TRITON_INTERPRET=1")
    return kernel


def problem(B=2, T=256, h=2, width=16, near=114, dtype=DTYPE, seed=0):
    """qkv, a bias table, and a gradient of the output."""
    g = torch.Generator().manual_seed(seed)
    qkv = torch.randn(B, T, 3, h, width, generator=g).to(DEVICE, dtype).requires_grad_()
    table = torch.randn(h, T, generator=g)
    table[:, near:] = table[:, near:][:, :1]
    gradient = torch.randn(B, T, h, width, generator=g).to(DEVICE, dtype)
    return qkv, table.to(DEVICE).requires_grad_(), gradient


def plain(qkv, table):
    """Attention as written out, in float64."""
    T = qkv.shape[1]
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    distance = torch.arange(T, device=qkv.device)[:, None] - torch.arange(T, device=qkv.device)
    bias = table[:, distance].masked_fill(distance < 0, float("-inf"))
    return ((q @ k.mT / math.sqrt(q.shape[-1]) + bias).softmax(-1) @ v).transpose(1, 2)


def oracle(qkv, table, gradient):
    wide = [t.detach().double().requires_grad_() for t in (qkv, table)]
    out = plain(*wide)
    return out, *torch.autograd.grad(out, wide, gradient.double())


def ours(qkv, table, gradient, near=114):
    out, _ = attention.fast_attention(qkv, table, near)
    return out, *torch.autograd.grad(out, [qkv, table], gradient)


def distance(ours, theirs):
    ours, theirs = ours.detach().double(), theirs.detach().double()
    return float((ours - theirs).norm() / theirs.norm())


def assert_near(found, expected, near, tolerance):
    """Output, and the gradients of q, k, v, and of the biases: each near one's, and of the far ones the sum."""
    assert distance(found[0], expected[0]) < tolerance, "out"
    for name, a, b in zip("qkv", found[1].unbind(2), expected[1].unbind(2), strict=True):
        assert distance(a, b) < tolerance, name
    a, b = found[2], expected[2]
    assert distance(a[:, :near], b[:, :near]) < 3 * tolerance, "near biases"  # large terms may have a small sum
    # A difference of large numbers, by softmax's zero sum.
    error = (a[:, near:].sum(1) - b[:, near:].sum(1)).abs().max() / b[:, :near].norm()
    assert error < 5 * tolerance, "far biases"


# Tiles are of 64: at T=256 some hold far distances alone where near is up to 129, at T=384 where it is 130 too.
@pytest.mark.parametrize(
    ("B", "T", "near"),
    [(1, 128, near) for near in (1, 2, 65, 114, 128, 130, 1000)]
    + [(2, 128, 66)]
    + [(1, 256, near) for near in (1, 2, 65, 66, 114, 1000)]
    + [(1, 384, 130)],
)
def test_output_and_gradients_are_those_of_attention_as_written_out(kernels, B, T, near):
    given = problem(B, T, h=3 if B == 2 else 1, near=near)  # an interpreted head takes seconds
    assert_near(ours(*given, near), oracle(*given), near, TOLERANCE[DTYPE])


@pytest.mark.parametrize("width", [16, 64, 128])
def test_heads_of_every_width_in_bf16(kernels, width):
    given = problem(B=1, T=256, h=2 if width == 64 else 1, width=width, dtype=torch.bfloat16)
    assert_near(ours(*given), oracle(*given), 114, TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize(("own", "step"), [(128, 128), (128, 32), (64, 64), (64, 16)])
def test_tiles_may_have_any_size(kernels, monkeypatch, own, step):
    for name in ("FORWARD", "QUERIES", "KEYS"):
        tile = kernels.Tile(own, own if name == "QUERIES" else step, 4, 2, 2)
        monkeypatch.setattr(kernels, name, {64: tile})
    given = problem(B=1, h=1, near=70)
    assert_near(ours(*given, 70), oracle(*given), 70, TOLERANCE[DTYPE])


def test_far_bias_may_be_large(kernels):
    """It is subtracted before anything is rounded."""
    qkv, table, gradient = problem(B=1, h=1)
    expected = ours(qkv, table, gradient)
    with torch.no_grad():
        table += 1024
    assert_near(ours(qkv, table, gradient), expected, 114, 3e-3)


def test_scores_may_be_large(kernels):
    """Where a row's maximum isn't that of its scores, nothing is left of their exponentials."""
    qkv, table, _ = problem(B=1, T=128, h=1, near=1)
    with torch.no_grad():
        qkv[:, :, 0] *= 40
        out, _ = attention.fast_attention(qkv, table, 1)
        assert distance(out, plain(qkv.double(), table.double())) < TOLERANCE[DTYPE]


def test_the_same_input_gives_the_same_bits_in_any_layout(kernels):
    qkv, table, gradient = problem(B=1, T=128)
    first = ours(qkv, table, gradient)
    scattered = gradient.transpose(1, 2).contiguous().transpose(1, 2)
    for a, b in zip(first, ours(qkv.mT.contiguous().mT, table.T.contiguous().T, scattered), strict=True):
        assert torch.equal(a, b)


def test_operators_are_what_they_say(kernels):
    qkv, table, gradient = problem(B=1, T=128, h=1)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(torch.ops.ecmoe.attention, (qkv, table, 50), test_utils=tests)
    out, lse = (t.detach() for t in attention.fast_attention(qkv, table, 50))
    given = gradient, qkv.detach(), out, lse, table.detach(), 50
    torch.library.opcheck(torch.ops.ecmoe.attention_backward, given, test_utils=("test_schema", "test_faketensor"))
    qkv, table = torch.empty(2, 5, 3, 4, 16, device="meta", dtype=DTYPE), torch.empty(4, 5, device="meta")
    out, lse = attention.fast_attention(qkv, table, 3)  # no two sizes alike
    assert out.shape == (2, 5, 4, 16) and out.dtype == DTYPE and lse.shape == (2, 4, 5) and lse.dtype == torch.float32


@pytest.fixture
def anywhere(monkeypatch):
    """The fast path without a GPU."""
    if DEVICE == "cpu":
        monkeypatch.setattr(attention, "fits", lambda qkv: qkv.shape[1] % 128 == 0)


@pytest.mark.parametrize("compiled", [False, True])
def test_fast_attention_is_the_plain_one(kernels, anywhere, monkeypatch, compiled):
    torch._dynamo.reset()
    layer = Attention(SMALL.replace(d_model=32)).to(DEVICE, DTYPE)
    with torch.no_grad():
        layer.relative.weight.normal_()
    x = torch.randn(2, 128, 32, device=DEVICE, dtype=DTYPE, requires_grad=True)
    wanted, gradient = [x, *layer.parameters()], torch.randn(2, 128, 32, device=DEVICE, dtype=DTYPE)
    run = (
        torch.compile(layer, fullgraph=True, backend="aot_eager" if DEVICE == "cpu" else "inductor")
        if compiled
        else layer
    )
    fast = run(x)
    fast = fast, *torch.autograd.grad(fast, wanted, gradient)
    monkeypatch.setattr(attention, "fits", lambda qkv: False)
    expected = layer(x)
    expected = expected, *torch.autograd.grad(expected, wanted, gradient)
    for a, b in zip(fast, expected, strict=True):
        assert a.dtype == b.dtype and distance(a, b) < (2e-2 if DEVICE == "cuda" else 1e-5)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_attention_runs_in_a_cuda_graph(kernels):
    qkv, table, gradient = problem()
    expected = [t.detach().clone() for t in ours(qkv, table, gradient)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        ours(qkv, table, gradient)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = ours(qkv, table, gradient)
    for t in found:
        t.detach().zero_()
    graph.replay()
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("images", [False, True])
def test_what_fits_and_looks_back_takes_the_fast_path_with_its_bias(monkeypatch, images):
    layer = Attention(SMALL.replace(data="digits") if images else SMALL).double()
    x, told = torch.randn(3, 12, 16, dtype=torch.float64), []
    if not images:
        torch.nn.init.normal_(layer.relative.weight)
    expected = layer(x)

    def fast(qkv, table, near):
        told.append((table.dtype, near))
        return plain(qkv, table), None

    monkeypatch.setattr(attention, "fits", lambda qkv: qkv.shape == (3, 12, 3, 2, 8))
    monkeypatch.setattr(attention, "fast_attention", fast)
    torch.testing.assert_close(layer(x), expected, rtol=1e-6, atol=1e-6)
    assert told == ([] if images else [(torch.float32, layer.relative.near)])


def test_generation_and_odd_lengths_take_the_plain_path(monkeypatch, anywhere):
    monkeypatch.setattr(attention, "fast_attention", lambda *given: pytest.fail("taken"))
    layer = Attention(SMALL)
    layer(torch.randn(2, 100, 16))
    past = []
    layer(torch.randn(2, 128, 16), past)
    assert past[0].shape[2] == 128


def test_the_fast_path_takes_whole_blocks_in_16_bits_on_a_gpu(monkeypatch):
    def fits(T=256, width=32, dtype=torch.bfloat16, is_cuda=True):
        return attention.fits(SimpleNamespace(shape=(2, T, 3, 5, width), dtype=dtype, is_cuda=is_cuda))

    monkeypatch.setattr(attention, "TRITON", True)
    assert [T for T in range(32, 400, 32) if fits(T=T)] == [128, 256, 384]
    assert [width for width in range(8, 300, 8) if fits(width=width)] == [16, 32, 64, 128]
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    assert [fits(dtype=dtype) for dtype in dtypes] == [False, False, True, True] and not fits(is_cuda=False)
    monkeypatch.setattr(attention, "TRITON", False)
    assert not fits()


def test_far_distances_share_what_is_left_of_a_sum_of_zero():
    sums = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])
    assert attention._of_table(sums, 2, 5).tolist() == [[1, 2, 0, 0, -3], [8, 16, 0, 0, -24]]
    assert attention._of_table(sums, 7, 3).tolist() == sums.tolist()  # none is far
