"""Attention: its bias as written out, and the fast path against the plain one."""

import math

import pytest
import torch

from ecmoe import attention
from ecmoe.attention import Attention, RelativeBias, bucket
from ecmoe.config import RunConfig

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
    assert far == [16 + int(16 * math.log(d / 16) / math.log(8)) if d < 128 else 31 for d in (16, 18, 19, 112, 113, 128, 5000)]
    assert far == sorted(far) and far[-1] == 31



@pytest.mark.parametrize(("buckets", "distance"), [(32, 128), (2, 2), (4, 8), (32, 2), (7, 50)])
def test_distances_from_near_on_share_the_last_bucket(buckets, distance):
    near = RelativeBias(1, buckets, distance).near
    found = bucket(torch.arange(1000), buckets, distance)
    assert (found[near - 1 :] == buckets - 1).all() and found[near - 2] < buckets - 1


# The fast path


def problem(B=2, h=3, T=256, width=16, dtype=torch.float32, seed=0):
    """q, k, v as views of one tensor, a bias table, and a gradient of the output."""
    g = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(B, T, 3, h, width, generator=g).to(DEVICE, dtype).permute(2, 0, 3, 1, 4)
    gradient = torch.randn(B, T, h, width, generator=g).to(DEVICE, dtype).transpose(1, 2)
    return q, k, v, torch.randn(h, T, generator=g).to(DEVICE), gradient


def plain(q, k, v, table):
    """Attention as written out, and the logarithm of its softmax's denominator."""
    T = q.shape[2]
    distance = torch.arange(T, device=q.device)[:, None] - torch.arange(T, device=q.device)
    bias = table[:, distance].masked_fill(distance < 0, float("-inf"))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + bias
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def oracle(q, k, v, table, gradient):
    """Float64: output, lse, and the gradients of q, k, v and table."""
    wide = [t.detach().double().requires_grad_() for t in (q, k, v, table)]
    out, lse = plain(*wide)
    return out.detach(), lse.detach(), *torch.autograd.grad(out, wide, gradient.double())


def distance(ours, theirs):
    ours, theirs = ours.detach().double(), theirs.detach().double()
    return float((ours - theirs).norm() / theirs.norm())


def ours(q, k, v, table, gradient, near):
    pytest.importorskip("triton")
    out, lse, *_ = oracle(q, k, v, table, gradient)
    delta = (out * gradient.double()).sum(-1)
    return attention.bias_gradient(q, k, v, gradient, lse.float(), delta.float(), table, near)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("near", [1, 2, 65, 66, 114, 1000])
def test_bias_gradient_is_the_derivative(near, dtype):
    given = problem(dtype=dtype)
    dtable, expected = ours(*given, near), oracle(*given)[-1]
    exact = min(near, 256)
    assert distance(dtable[:, :exact], expected[:, :exact]) < (1e-5 if dtype == torch.float32 else 1e-2)
    # The rest is one number, by softmax's zero sum.
    far = expected[:, exact:].sum(1)
    torch.testing.assert_close(dtable[:, exact:].sum(1).double(), far, rtol=1e-2, atol=2e-4 if dtype == torch.float32 else 0.05)


def test_bias_gradient_takes_any_strides_and_repeats_its_bits():
    q, k, v, table, gradient = problem(width=32)
    dtable = ours(q, k, v, table, gradient, 114)
    q, k, v, gradient = (t.contiguous() for t in (q, k, v, gradient))
    assert torch.equal(ours(q, k, v, table, gradient, 114), dtable)
    assert torch.equal(ours(q.mT.contiguous().mT, k, v, table, gradient, 114), dtable)


def test_many_tiles_make_several_sums(monkeypatch):
    from ecmoe import attention_kernel

    given = problem(B=3, h=1)
    monkeypatch.setattr(attention_kernel, "TILES", 5)
    assert distance(ours(*given, 256), oracle(*given)[-1]) < 1e-5


def test_operator_is_what_it_says():
    q, k, v, table, gradient = problem(T=64)
    lse, delta = torch.zeros(2, 2, 3, 64, device=DEVICE)
    torch.library.opcheck(
        torch.ops.ecmoe.bias_gradient, (q, k, v, gradient, lse, delta, table, 50), test_utils=["test_schema", "test_faketensor"]
    )


@pytest.fixture
def anywhere(monkeypatch):
    """FlexAttention's eager form has a backward pass on a CPU too, but nobody may use it there."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *tensors: None)
    if DEVICE == "cpu":
        monkeypatch.setattr(attention, "flexible", lambda q: q.shape[2] % 128 == 0)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("compiled", [False, True])
def test_fast_attention_is_the_plain_one(anywhere, monkeypatch, compiled):
    torch._dynamo.reset()
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    layer = Attention(SMALL.replace(d_model=32)).to(DEVICE, dtype)
    with torch.no_grad():
        layer.relative.weight.normal_()
    x = torch.randn(2, 256, 32, device=DEVICE, dtype=dtype, requires_grad=True)
    wanted, gradient = [x, *layer.parameters()], torch.randn(2, 256, 32, device=DEVICE, dtype=dtype)
    run = torch.compile(layer, fullgraph=True, backend="aot_eager" if DEVICE == "cpu" else "inductor") if compiled else layer
    fast = run(x)
    fast = fast, *torch.autograd.grad(fast, wanted, gradient)
    monkeypatch.setattr(attention, "flexible", lambda q: False)
    expected = layer(x)
    expected = expected, *torch.autograd.grad(expected, wanted, gradient)
    for a, b in zip(fast, expected, strict=True):
        assert a.dtype == b.dtype and distance(a, b) < (2e-2 if DEVICE == "cuda" else 1e-5)


def test_generation_and_odd_lengths_take_the_plain_path(monkeypatch, anywhere):
    monkeypatch.setattr(attention, "flex", lambda *given: pytest.fail("taken"))
    layer = Attention(SMALL)
    layer(torch.randn(2, 100, 16))
    past = []
    layer(torch.randn(2, 128, 16), past)
    assert past[0].shape[2] == 128
