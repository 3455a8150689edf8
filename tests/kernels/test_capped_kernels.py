"""Capped expert choice by kernels: feasible for any scores, near the optimum for those that occur.

On a GPU where there is one, else in Triton's interpreter.
"""

from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from ecmoe.kernels import INTERPRETED
from ecmoe.kernels import capped as kernel
from ecmoe.kernels.capped import capped
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
    "random": 0.0004, "a little biased": 0.001, "biased": 0.003, "peaked and biased": 0.003, "alike": 0.03, "equal": 0.03,
    "zero": 1e-4,
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


def test_what_it_takes(monkeypatch):
    def takes(e, b, dtype=torch.float32):
        return kernel.available(torch.empty(1, e, 4, dtype=dtype, device=DEVICE), b)

    assert takes(3, 2) and not takes(3, 3) and takes(512, 2) and not takes(513, 2) and not takes(3, 2, torch.float64)
    monkeypatch.setattr(kernel, "INTERPRETED", False)
    assert takes(3, 2) == (DEVICE == "cuda")  # a CPU's tensors in the interpreter alone


def test_shapes_are_known_to_the_compiler(monkeypatch):
    monkeypatch.setattr(kernel, "ROUNDS", 1)
    S, tests = scores("random", 2, 32, 4), ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.ecmoe.capped, (S, 8, 2), test_utils=tests)


def by_hand(S, k, b, uncapped, sampled, rounds):
    """`capped` in loops of numpy: the prices of an auction, who takes what at them, and who moves."""
    g, e, m = S.shape
    f = np.float32
    thresholds = np.array([-16, -4, -1, -0.25, 0, 0.25, 1, 4, 16], f)
    spare, chosen = m * b > e * k, []
    few = min(m, max(48 // g // 8 * 8, 16))
    token, expert = np.arange(m, dtype=np.uint32)[:, None], np.arange(e, dtype=np.uint32)
    x = token * np.uint32(0x9E3779B1) + expert * np.uint32(0x85EBCA77)
    x = (x ^ (x >> 15)) * np.uint32(0x2C1B3C6D)
    x = (x ^ (x >> 12)) * np.uint32(0x297A2D39)
    noise = f(6) * (((x ^ (x >> 15)) >> 8).astype(f) / f(2**24)) - f(3)
    for pool in range(g):
        scores = S[pool].T  # (m, e)
        unit = f(np.nan_to_num(np.abs(scores[:: max(1, m // 48)]).mean(dtype=np.float64), nan=1.0))
        raw, scores = scores, np.nan_to_num(scores)  # one that is no number breaks nothing else
        price, scale, before, counts = np.zeros(e + 1, f), np.full(e + 1, 4 * unit), 0.0, np.zeros((9, e + 1), f)
        for r in range(rounds + 1):
            since = np.where(np.arange(e + 1) < e, 0, uncapped)  # of a free place later
            target = np.where(np.arange(e + 1) < e, f(before), f(before * e))
            reached = (counts >= target).sum(0)
            low = np.clip(reached - 1, 0, 7)
            most, least = (np.take_along_axis(counts, row[None], 0)[0] for row in (low, low + 1))
            share = np.clip((most - target) / np.maximum(most - least, 1), 0, 1).astype(f)
            step = (
                np.where(reached > 0, thresholds[low] + share * (thresholds[low + 1] - thresholds[low]), f(-16)) * scale
            )
            damping = f(1 if r <= uncapped and r < rounds else 0.7)
            price = price + np.where(r > since, damping * step, f(0))
            scale = np.where(r > since, np.maximum(np.abs(step), f(1e-3) * unit), scale)
            if r == rounds:
                break
            asked = few if r < uncapped + sampled else m
            fallen = min(max(r - uncapped, 0) / (sampled - 4), 1)
            jitter = f(0.2 * (5e-3 / 0.2) ** fallen)
            places = np.arange(asked)
            places = places // 8 * 8 * (m // asked) + places % 8
            gain = scores[places] + noise[places] * (unit * jitter) - price[:e]
            counts = np.zeros((9, e + 1), f)
            if r >= uncapped:
                best = -np.sort(-gain, 1)
                last, other = best[:, b - 1], best[:, b]
                if spare:
                    free = best[:, :b] - price[e]
                    counts[:, e] = [(free >= t * scale[e]).sum() for t in thresholds]
                    last, other = np.maximum(last, price[e]), np.maximum(other, price[e])
                gain = gain - np.where(gain >= last[:, None], other[:, None], last[:, None])
            counts[:, :e] = [(gain >= t * scale[:e]).sum(0) for t in thresholds]
            before = k * asked / m
        offers = scores + noise * (unit * f(5e-3)) - price[:e]
        held = np.zeros((m, e), bool)
        for t in range(m):
            for i in np.argsort(-offers[t])[:b]:
                held[t, i] = not spare or offers[t, i] > price[e]
        while held.sum() < e * k:  # whoever has a place free takes the best of the others
            for t in range(m):
                if held[t].sum() < b and held.sum() < e * k:
                    held[t, np.where(held[t], -np.inf, offers[t]).argmax()] = True
        while held.sum(0).max() > k:
            load = held.sum(0)
            u, v, over = load.argmax(), load.argmin(), load.sum() - e * k
            amount = min(load[u] - k, over if over > 0 else k - load[v])
            may = [t for t in range(m) if held[t, u] and (over > 0 or not held[t, v])]
            if over <= 0:  # first those that lose little
                cheap = raw[:, v] - raw[:, u] - (price[v] - price[u]) + unit * f(0.05) > 0
                may.sort(key=lambda t: not cheap[t])
            held[may[:amount], u] = False
            if over <= 0:
                held[may[:amount], v] = True
        chosen.append([np.flatnonzero(held[:, i]) for i in range(e)])
    return np.array(chosen)


@pytest.mark.parametrize(
    ("e", "k", "b", "uncapped", "sampled", "rounds"),
    [
        (8, 24, 3, 3, 7, 12),
        (6, 50, 3, 2, 6, 10),
        (4, 29, 2, 1, 6, 9),
        (6, 29, 2, 1, 6, 9),
        (8, 24, 3, 4, 14, 2),
        (6, 50, 3, 1, 6, 2),
    ],
)
def test_it_is_the_auction_by_hand(e, k, b, uncapped, sampled, rounds, monkeypatch):
    """Of 100 tokens a pool, 24 are the sample, all of them several programs; after two rounds much is left to settle."""
    assert (kernel.UNCAPPED, kernel.SAMPLED, kernel.ROUNDS) == (4, 14, 22)
    sizes = {"UNCAPPED": uncapped, "SAMPLED": sampled, "ROUNDS": rounds, "SAMPLE": 48, "SAMPLE_LEAST": 16}
    tiles = {"TILE": 512, "SAMPLE_TILE": 128}
    tiles = {name: {"ELEMENTS": size, "num_warps": 4} for name, size in tiles.items()}
    for name, value in (sizes | tiles | {"SWEEP": {"BLOCK": 32}, "SETTLE": {"BLOCK": 32}}).items():
        monkeypatch.setattr(kernel, name, value)
    S = scores("a little biased", 2, 100, e, seed=3) + 0.5 * scores("biased", 2, 100, e, seed=4) - 0.2
    if e == 4:
        S[0, 1, 2] = float("nan")
    assert capped(S, k, b).tolist() == by_hand(S.cpu().numpy(), k, b, uncapped, sampled, rounds).tolist()
