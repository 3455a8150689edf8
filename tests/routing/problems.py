"""Random routing problems, and what must hold of every assignment, whoever chose.

Letters: n tokens, e experts, k slots of an expert.
"""

from typing import NamedTuple

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from ecmoe.routing import Assignment

two_hundred = settings()  # as conftest.py has them: 200 problems, fewer in a quick round


class Problem(NamedTuple):
    """logits (n, e) float64, so ties don't occur; mask (n,) bool or None; ids (n,) of 10 words or tasks."""

    logits: Tensor
    mask: Tensor | None
    ids: Tensor

    @property
    def valid(self) -> Tensor:
        return torch.ones(len(self.logits), dtype=torch.bool) if self.mask is None else self.mask


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_logits(n: int, e: int, seed: int, sharpness: float = 1.0, bias: float = 0.0) -> Tensor:
    """sharpness: how far a token prefers one expert; bias: how far all tokens prefer the same ones."""
    draw = generator(seed)
    logits = torch.randn(n, e, dtype=torch.float64, generator=draw) * sharpness
    return logits + bias * torch.randn(e, dtype=torch.float64, generator=draw)


@st.composite
def problems(draw, divisible: bool = False, masks: bool = True) -> Problem:
    """A problem; with `divisible`, one whose n is a multiple of e."""
    e = draw(st.integers(2, 6))  # e = 1: all scores tie
    n = e * draw(st.integers(1, 24 // e)) if divisible else draw(st.integers(1, 24))
    seed = draw(st.integers(0, 9999))
    logits = random_logits(n, e, seed, draw(st.sampled_from([0.3, 1, 5])), draw(st.sampled_from([0, 2])))
    mask = None
    if masks and draw(st.booleans()):
        share = draw(st.sampled_from([0.0, 0.5, 0.9]))
        mask = torch.rand(n, generator=generator(seed)) < share
    return Problem(logits, mask, torch.randint(10, (n,), generator=generator(seed + 1)))


def pairs(assignment: Assignment, n: int) -> dict[tuple[int, int], float]:
    """{(token, expert): gate} by a plain loop; fails if an expert holds a token twice or an empty slot weighs."""
    found = {}
    for i, (tokens, gates) in enumerate(zip(assignment.token.tolist(), assignment.gate.tolist(), strict=True)):
        for token, gate in zip(tokens, gates, strict=True):
            if token == n:
                assert gate == 0, "an empty slot has a weight"
                continue
            assert 0 <= token < n and (token, i) not in found
            found[token, i] = gate
    return found


def demand(assignment: Assignment, n: int) -> list[int]:
    """(e,) requests; a router that drops nothing doesn't say them."""
    return (assignment.load(n) if assignment.demand is None else assignment.demand).tolist()


def check(assignment: Assignment, problem: Problem) -> dict[tuple[int, int], float]:
    """What every router owes: no padding, loads that are dispatched, kept + dropped = all."""
    n, e = problem.logits.shape
    found = pairs(assignment, n)
    assert assignment.token.shape == assignment.gate.shape and assignment.token.shape[0] == e
    assert all(problem.valid[token] for token, _ in found), "padding was routed"
    assert all(gate >= 0 and np.isfinite(gate) for gate in found.values())
    load = np.bincount([i for _, i in found], minlength=e)
    assert assignment.load(n).tolist() == load.tolist()
    assert (np.array(demand(assignment, n)) >= load).all()  # what found no place is dropped
    per_token = np.bincount([token for token, _ in found], minlength=n)
    assert assignment.experts_per_token(n).tolist() == per_token.tolist()
    dense = np.zeros((n, e))
    for (token, i), gate in found.items():
        dense[token, i] = gate
    np.testing.assert_array_equal(assignment.dense(n).detach().numpy(), dense)
    return found


def alone(assignment: Assignment, problem: Problem) -> Tensor:
    """(n_valid, e) combine weights of the unmasked tokens."""
    return assignment.dense(len(problem.logits))[problem.valid]


def same_choice(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
