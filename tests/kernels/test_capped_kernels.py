"""Capped expert choice by kernels: feasible for any scores, near the optimum for those that occur.

On a GPU where there is one, else in Triton's interpreter.
"""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from ecmoe.kernels import INTERPRETED
from ecmoe.kernels import capped as kernel
from ecmoe.kernels.capped import capped, hold
from ecmoe.routing.capped import capped_top_k

DEVICE = "cpu" if INTERPRETED else "cuda"


def scores(kind: str, g: int, n: int, e: int, seed: int = 0) -> torch.Tensor:
    """(g, e, n) softmax over the experts."""
    draw = torch.Generator().manual_seed(seed)
    z = torch.randn(g, n, e, generator=draw)
    kinds = 4 * torch.randn(6, e, generator=draw)  # of tokens
    kind_of = torch.randint(6, (g, n), generator=draw)
    z = {
        "random": z,
        "a little biased": z + torch.randn(e, generator=draw),
        "biased": z + 3 * torch.randn(e, generator=draw),
        "peaked": 8 * z,
        "one-hot": 40 * z,
        "peaked and biased": 5 * z + 5 * torch.randn(e, generator=draw),
        "alike": kinds[kind_of] + 0.05 * z,
        "equal": kinds[kind_of],
        "one row": kinds[0].expand(g, n, e),
        "zero": 0 * z,
    }[kind]
    return z.softmax(2).transpose(1, 2).to(DEVICE)


def check(I: torch.Tensor, n: int, k: int, b: int) -> None:
    """Exactly k different tokens of each expert, in rising order; at most b experts of a token."""
    g, e, _ = I.shape
    assert I.shape == (g, e, k) and I.dtype == torch.int64
    assert I.min() >= 0 and I.max() < n and (I.diff(dim=2) > 0).all()
    for pool in range(g):
        taken = torch.bincount(I[pool].flatten(), minlength=n)
        assert taken.max() <= b and taken.sum() == e * k


def total(S: torch.Tensor, I: torch.Tensor) -> torch.Tensor:
    return S.gather(2, I).double().sum((1, 2))


# Share of the best sum that may be lost. Equal tokens take many rounds of prices to tell experts apart.
LOSS = {
    "random": 0.0004, "a little biased": 0.001, "biased": 0.003, "peaked": 0.002, "one-hot": 0.002,
    "peaked and biased": 0.003, "alike": 0.03, "equal": 0.03, "one row": 1e-4, "zero": 1e-4,
}  # fmt: skip


@pytest.mark.parametrize(
    "kind, n, e, c, b",
    [(kind, 512, 16, 2, 2) for kind in LOSS]  # two programs
    + [
        (kind, *sizes)
        for kind in ("random", "peaked and biased", "equal")
        for sizes in ((256, 16, 2, 3), (384, 6, 1, 1))
    ],
)
def test_it_comes_near_the_transport_solver(kind, n, e, c, b):
    S, k = scores(kind, 1, n, e), n * c // e
    I = capped(S, k, b)
    check(I, n, k, b)
    best = capped_top_k(S, k, b, kernels="plain")[0].double().sum()
    assert total(S, I).item() >= (1 - LOSS[kind]) * best


@pytest.mark.parametrize("kind", ["random", "biased", "peaked"])
def test_one_expert_each_is_the_assignment_problem(kind):
    n, e = 256, 8
    S = scores(kind, 1, n, e)
    I = capped(S, n // e, 1)
    check(I, n, n // e, 1)
    places = S[0].repeat_interleave(n // e, 0).double().cpu().numpy()
    best = places[linear_sum_assignment(places, maximize=True)].sum()
    assert best * (1 + 1e-9) >= total(S, I).item() >= 0.985 * best


@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_it_is_feasible_whatever_the_scores(data):
    g, e, n = data.draw(st.integers(1, 3)), data.draw(st.integers(2, 9)), data.draw(st.integers(1, 70))
    b = data.draw(st.integers(1, e - 1))
    k = data.draw(st.one_of(st.just(n * b // e), st.integers(0, n * b // e)))
    draw = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    kind = data.draw(st.sampled_from(["normal", "few values", "constant", "huge", "tiny", "column", "NaN"]))
    S = torch.randn(g, e, n, generator=draw)
    S = {
        "normal": S,
        "few values": S.round(),
        "constant": 0 * S - 1,
        "huge": 1e25 * S,
        "tiny": 1e-42 * S,
        "column": S[:, :, :1].expand(g, e, n),  # all tokens want the same experts
        "NaN": S.masked_fill(S > 1, float("nan")),
    }[kind].to(DEVICE)
    if k:
        with mock.patch.object(kernel, "ROUNDS", 6):  # good prices would leave nothing to settle
            check(capped(S, k, b), n, k, b)


@pytest.mark.parametrize("b", [1, 2, 3])
def test_it_is_feasible_even_where_prices_fail(b, monkeypatch):
    monkeypatch.setattr(kernel, "ROUNDS", 1)
    for kind in ("biased", "one row", "zero"):
        S = scores(kind, 1, 96, 8)
        check(capped(S, 96 // 8, b), 96, 96 // 8, b)


def test_pools_are_solved_apart_and_strides_do_not_matter(monkeypatch):
    monkeypatch.setattr(kernel, "ROUNDS", 6)
    S = scores("a little biased", 2, 64, 8)
    I = capped(S, 16, 3)
    assert torch.equal(I, capped(S.contiguous(), 16, 3))
    assert torch.equal(I, torch.cat([capped(S[i : i + 1], 16, 3) for i in range(2)]))


def test_a_sample_sets_the_first_prices(monkeypatch):
    monkeypatch.setattr(kernel, "SAMPLE", 256)
    monkeypatch.setattr(kernel, "SAMPLE_LEAST", 64)
    for n in (1024, 1000):  # 1000: no multiple of the stride
        S, k = scores("a little biased", 1, n, 8), n // 4
        I = capped(S, k, 2)
        check(I, n, k, 2)
        assert total(S, I).item() >= 0.99 * capped_top_k(S, k, 2, kernels="plain")[0].double().sum()


@pytest.mark.parametrize("b", [2, 3])
def test_experts_hold_tokens_as_zeros_and_ones(b):
    X = hold(scores("a little biased", 1, 128, 8), 32, b)
    assert X.min() == 0 and X.max() == 1 and (X.sum(2) == 32).all() and X.sum(1).max() <= b


def test_the_capped_choice_runs_on_them_and_passes_gradients():
    S = scores("random", 2, 64, 8).detach().requires_grad_()
    G, I = capped_top_k(S, 16, 2, kernels="triton")
    check(I, 64, 16, 2)
    G.sum().backward()
    assert torch.equal(S.grad, torch.zeros_like(S).scatter(2, I, 1.0))
    double, _ = capped_top_k(S.detach().double(), 16, 2, kernels="triton")  # not theirs: the plain path
    assert double.dtype == torch.float64
    papers = [capped_top_k(S.detach(), 16, 2, solver="dykstra", kernels=who)[1] for who in ("triton", "plain")]
    assert torch.equal(*papers)  # nor is the paper's programme


def test_shapes_are_known_to_the_compiler(monkeypatch):
    monkeypatch.setattr(kernel, "ROUNDS", 1)
    S, tests = scores("random", 2, 32, 4), ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.ecmoe.capped, (S, 8, 2), test_utils=tests)
