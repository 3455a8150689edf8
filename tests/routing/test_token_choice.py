"""Token choice against GShard's Algorithm 1 as a loop, Switch by hand, V-MoE's priority by sorting."""

from fractions import Fraction
from math import ceil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ecmoe.config import CHOICES
from ecmoe.routing import TokenChoice, causal_routing
from tests.routing.problems import alone, check, generator, problems, random_logits, same_choice, two_hundred

D = 3


def softmax(x: np.ndarray) -> np.ndarray:
    z = np.exp(x - x.max(1, keepdims=True))
    return z / z.sum(1, keepdims=True)


def algorithm_1(logits, top_k, capacity, renormalized=True, by_score=False):
    """Lepikhin et al. 2021, Algorithm 1, for any k and without its random second expert.

    Serve all tokens' first choice in order, then all second choices; counters c_e go on counting.
    """
    S = softmax(logits.numpy())
    n, e = S.shape
    ranked = np.argsort(-S, axis=1)[:, :top_k]
    out, c = np.zeros((n, e)), [0] * e
    order = np.argsort(-S.max(1)) if by_score else range(n)
    for choice in range(top_k):
        for s in order:
            i = ranked[s, choice]
            if capacity is None or c[i] < capacity:
                out[s, i] = S[s, i] / (S[s, ranked[s]].sum() if renormalized else 1)
            c[i] += 1
    return torch.from_numpy(out), c


@two_hundred
@given(
    problems(),
    st.integers(1, 3),
    st.sampled_from([None, 0.25, 0.5, 1, 1.1, 1.25, 2]),
    st.sampled_from(["softmax", "renormalized", "scaled"]),
    st.sampled_from(["order", "score"]),
)
def test_200_problems(problem, top_k, factor, gate, priority):
    n, e = problem.logits.shape
    top_k = min(top_k, e)
    router = TokenChoice(D, e, top_k, factor, gate=gate, priority=priority)
    chosen = router.assign(problem.logits, mask=problem.mask)
    found = check(chosen, problem)
    n_valid = int(problem.valid.sum())
    capacity = None if factor is None else ceil(Fraction(str(factor)) * top_k * n_valid / e)
    expected, demand = algorithm_1(
        problem.logits[problem.valid], top_k, capacity, gate == "renormalized", priority == "score"
    )
    same_choice(alone(chosen, problem), expected * (e / top_k if gate == "scaled" else 1))
    assert chosen.demand.tolist() == demand
    assert chosen.demand.sum() == n_valid * top_k  # kept + dropped = all requests
    if capacity is not None:
        assert chosen.token.shape[1] == min(ceil(Fraction(str(factor)) * top_k * n / e), n)  # a token asks once
        assert chosen.load(n).tolist() == [min(count, capacity) for count in demand]
    else:
        assert len(found) == n_valid * top_k
    with causal_routing(router):
        free = router.assign(problem.logits, mask=problem.mask)
    assert free.load(n).tolist() == demand  # nothing is dropped


def test_by_hand():
    # Three of four tokens want expert 0 and it has ceil(1 x 1 x 4 / 2) = 2 places: the third to come is dropped.
    logits = torch.tensor([[3.0, 1], [1, 3], [4, 1], [9, 1]]).log()
    switch = TokenChoice(D, 2, 1, 1.0)
    chosen = switch.assign(logits)
    assert chosen.token.tolist() == [[0, 2], [1, 4]] and chosen.demand.tolist() == [3, 1]
    torch.testing.assert_close(switch.assign(logits).gate, torch.tensor([[0.75, 0.8], [0.75, 0.0]]))
    # By score the one that wants it least goes: 0.9 and 0.8 stay, 0.75 goes.
    by_score = TokenChoice(D, 2, 1, 1.0, priority="score")
    assert by_score.assign(logits).token.tolist() == [[3, 2], [1, 4]]


def test_all_first_choices_come_before_any_second():
    # Token 0's second choice (expert 1) comes after token 1's first, though token 0 comes first.
    logits = torch.tensor([[5.0, 2, 1], [1, 5, 2]]).log()
    chosen = TokenChoice(D, 3, 2, 0.75).assign(logits)  # ceil(0.75 x 2 x 2 / 3) = 1 place
    assert chosen.token.tolist() == [[0], [1], [1]]


def test_where_nothing_is_said_it_drops_nothing_and_balances_as_switch():
    said = "gate=softmax, priority=order, aux_loss_weight=0.01, z_loss_weight=0.0, balance=switch, bias_rate=0.001"
    free, limited = TokenChoice(8, 4, 2), TokenChoice(8, 4, 2, 1.0)
    assert free.extra_repr() == f"d_model=8, num_experts=4, top_k=2, {said}" and free.capacity_factor is None
    assert (free.static, limited.static) == (False, True)  # the fullest expert decides how many places there are


@pytest.mark.parametrize("balance", CHOICES["balance"])
def test_who_moves_no_bias_counts_no_error(balance):
    router = TokenChoice(D, 4, 2, balance=balance)
    router.assign(random_logits(12, 4, 0, bias=2))
    assert bool(router.load_error.any()) == router.moves == (balance == "bias")


def test_gshards_2n_over_e_is_capacity_factor_1():
    assert TokenChoice(D, 8, 2, 1.0).assign(random_logits(64, 8, 0)).token.shape == (8, 2 * 64 // 8)
    assert TokenChoice(D, 8, 1, 1.25).assign(random_logits(64, 8, 0)).token.shape == (8, 10)
    # 1.1 x 80 / 8 is 11.000000000000002 as float.
    assert TokenChoice(D, 8, 1, 1.1).assign(random_logits(80, 8, 0)).token.shape == (8, 11)


@two_hundred
@given(problems(masks=False), st.sampled_from([None, 0.5, 1]), st.integers(0, 99))
def test_permuting_tokens_permutes_the_choice_unless_order_decides(problem, factor, seed):
    n, e = problem.logits.shape
    order = torch.randperm(n, generator=generator(seed))
    priority = "order" if factor is None else "score"
    router = TokenChoice(D, e, min(2, e), factor, priority=priority)
    same_choice(router.assign(problem.logits[order]).dense(n), router.assign(problem.logits).dense(n)[order])


def test_top_e_without_capacity_is_the_dense_mixture():
    logits = random_logits(7, 4, 0)
    same_choice(TokenChoice(D, 4, 4).assign(logits).dense(7), logits.softmax(1))


def test_gradient_is_that_of_the_dispatched_gates():
    logits = random_logits(8, 3, 0).requires_grad_()
    chosen = TokenChoice(D, 3, 2, 0.5, gate="renormalized").assign(logits)
    kept = chosen.dense(8).detach() > 0
    weights = torch.randn(8, 3, dtype=torch.float64, generator=generator(1))
    S = logits.softmax(1)
    top = torch.zeros_like(S).scatter(1, S.topk(2, 1).indices, 1.0)
    expected = S * kept / (S * top).sum(1, keepdim=True)
    ours = torch.autograd.grad((chosen.dense(8) * weights).sum(), logits)[0]
    torch.testing.assert_close(ours, torch.autograd.grad((expected * weights).sum(), logits)[0])
    assert not kept.all() and top.sum() == 16


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: TokenChoice(D, 4, 5), "top_k=5.*1..4"),
        (lambda: TokenChoice(D, 4, 0), "top_k=0"),
        (lambda: TokenChoice(D, 4, 1, 0.0), "capacity_factor=0.0: must be above 0"),
        (lambda: TokenChoice(D, 4, 1, priority="random"), "priority='random'.*order, score"),
        (lambda: TokenChoice(D, 4, 1, gate="raw"), "gate='raw'"),
        (lambda: TokenChoice(D, 4, 1, balance="best"), "balance='best'"),
        (lambda: TokenChoice(D, 4, 1.5), "top_k=1.5 is of type float, but must be int"),
        (lambda: TokenChoice(D, 4, "2"), "top_k='2' is of type str, but must be int: write 2, without quotes"),
        (lambda: TokenChoice(D, 4, 1, aux_loss_weight=-1), "aux_loss_weight=-1.0: must be at least 0"),
        (lambda: TokenChoice(D, 4, 1, aux_loss_weight=float("nan")), "aux_loss_weight=nan: must be a finite number"),
        (lambda: TokenChoice(D, 4, 1, z_loss_weight=-0.1), "z_loss_weight=-0.1: must be at least 0"),
        (lambda: TokenChoice(D, 4, 1, bias_rate="a"), "bias_rate='a': must be a number, such as 0.001"),
    ],
)  # fmt: skip
def test_errors_name_key_value_and_remedy(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("factor", [1.25, 4 / 3, 5 / 3, 2.0])
@pytest.mark.parametrize("n", [12, 700, 4096])
def test_a_mask_that_leaves_nothing_out_changes_nothing(factor, n):
    router, logits = TokenChoice(8, 20, 3, factor), torch.randn(n, 20, generator=generator(n))
    plain, masked = router.assign(logits), router.assign(logits, mask=torch.ones(n, dtype=torch.bool))
    assert plain.token.shape[1] == ceil(Fraction(factor).limit_denominator(100) * 3 * n / 20)
    assert torch.equal(plain.token, masked.token) and torch.equal(plain.gate, masked.gate)
