"""The model's kernels, where tests/model can't see them: numbers on the way, and inputs that a model never gives."""

import math

import pytest
import torch
from torch.nn import functional as F

from ecmoe.kernels import attention, loss
from tests.kernels.oracle import DEVICE, spoil_new_memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_biases_are_those_of_the_distances_around_a_block(dtype):
    """By distance, less that of the far ones, as a binary logarithm; finite in float16, which 16 bits are."""
    T, near, edge = 256, 130, attention.BLOCK
    table = 3 * torch.randn(3, T, generator=torch.Generator().manual_seed(0))
    table[0, 3], table[1, 7], table[:, near:] = -1e6, 1e6, torch.tensor([[1.0], [-2.0], [0.5]])
    found = attention.biases(torch.empty(0, device=DEVICE, dtype=dtype), table.to(DEVICE), near, 2).cpu()
    span = 2 * edge  # whole blocks that hold all near distances
    row, column = torch.arange(edge)[:, None], torch.arange(span + edge)
    assert found.dtype == (torch.float32 if dtype == torch.float32 else torch.float16)
    for side, distance in enumerate((row + span - column, column - row)):
        bias = (table - table[:, -1:])[:, distance.clamp(0, T - 1)] / math.log(2)
        expected = bias.clamp(-60_000, 60_000).masked_fill(distance < 0, float("-inf"))
        torch.testing.assert_close(found[side].float(), expected, rtol=2**-10, atol=1e-6)


def test_losses_of_no_token_and_of_every_other_target():
    assert loss.losses_(
        torch.empty(0, 10, device=DEVICE), torch.empty(0, dtype=torch.long, device=DEVICE), True
    ).shape == (0,)
    z, targets = torch.randn(3, 10, device=DEVICE).bfloat16(), torch.arange(6, device=DEVICE)[::2]
    found = loss.losses_(z.clone(), targets, False)
    assert found.dtype == torch.float32
    right = F.cross_entropy(z.float(), targets, reduction="none")
    torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)
    one = loss.losses_(z[1:2].clone(), targets[1:2], False)  # what is left over for the last chunk may be one token
    torch.testing.assert_close(one, right[1:2], rtol=1e-5, atol=1e-5)


def test_attention_reads_nothing_that_nobody_has_written(monkeypatch):
    g = torch.Generator().manual_seed(0)
    qkv, dout = (torch.randn(*s, generator=g).to(DEVICE) for s in ((1, 128, 3, 1, 16), (1, 128, 1, 16)))
    table, found = torch.randn(1, 128, generator=g).to(DEVICE), []
    for spoiled in (False, True):
        if spoiled:
            spoil_new_memory(monkeypatch)
        out, lse = attention.forward(qkv, table, 70)
        dqkv, sums = attention.backward(dout, qkv, out, lse, table, 70)
        found.append((out, lse, dqkv, sums[:, :70]))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(("near", "asked"), [(50, 50), (1000, 128)])
def test_biases_are_asked_for_the_near_distances_of_a_sequence(near, asked, monkeypatch):
    class Asked(Exception):
        pass

    def biases(*given):
        raise Asked(given[2:])

    monkeypatch.setattr(attention, "biases", biases)
    qkv, table, lse = (torch.zeros(*s, device=DEVICE) for s in ((1, 128, 3, 1, 16), (1, 128), (1, 1, 128)))
    with pytest.raises(Asked) as forward:
        attention.forward(qkv, table, near)
    with pytest.raises(Asked) as backward:
        attention.backward(qkv[:, :, 0], qkv, qkv[:, :, 0], lse, table, near)
    assert [error.value.args[0] for error in (forward, backward)] == [(asked, 1), (asked, 2)]


def test_gradients_of_biases_add_up_in_float32():
    """Of 16 bits: off by what rounding P, dS and the output has cost, not by that of each sum."""
    g = torch.Generator().manual_seed(0)
    qkv, dout = (torch.randn(*s, generator=g).to(DEVICE, torch.bfloat16) for s in ((2, 128, 3, 1, 16), (2, 128, 1, 16)))
    table = torch.zeros(1, 128, device=DEVICE)
    out, lse = attention.forward(qkv, table, 100)
    assert out.shape == (2, 128, 1, 16) and lse.shape == (2, 1, 128)
    _, sums = attention.backward(dout, qkv, out, lse, table, 100)
    q, k, v = qkv.double().permute(2, 0, 3, 1, 4)[:, :, 0]
    later = torch.ones(128, 128, device=DEVICE).triu(1).bool()
    p = (q @ k.mT / 4).masked_fill(later, float("-inf")).softmax(-1)
    dp = dout[:, :, 0].double() @ v.mT
    ds = p * (dp - (dp * p).sum(-1, keepdim=True))
    expected = torch.stack([ds.diagonal(-distance, 1, 2).sum() for distance in range(100)])
    assert sums.dtype == torch.float32
    assert (sums[0, :100] - expected).norm() / expected.norm() < 5e-3
