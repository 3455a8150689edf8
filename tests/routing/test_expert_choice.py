"""Expert choice against Eq. 2 as printed, a hand computation, loops over pools, and its symmetries."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.nn import functional as F

from ecmoe.config import ConfigError
from ecmoe.routing import ExpertChoice
from ecmoe.routing.expert_choice import _At
from tests.routing.problems import (
    Problem,
    alone,
    check,
    demand,
    generator,
    problems,
    random_logits,
    same_choice,
    two_hundred,
)

D = 3
factors = st.sampled_from([0.5, 1, 1.5, 2, 3])


def whole(n: int, e: int, c: float) -> bool:
    """May c be used at these sizes?"""
    k = Fraction(c) * n / e
    return k.denominator == 1 and 1 <= k <= n


def equation_2(logits: torch.Tensor, k: int) -> torch.Tensor:
    """(n, e) combine weights: sum_j P[i, j, l] G[i, j], with P one-hot, sorting by numpy."""
    x = logits.numpy()
    S = np.exp(x - x.max(1, keepdims=True))
    S /= S.sum(1, keepdims=True)
    I = np.argsort(-S.T, axis=1)[:, :k]  # (e, k)
    G = np.take_along_axis(S.T, I, axis=1)
    P = np.eye(len(x))[I]  # (e, k, n)
    return torch.from_numpy(np.einsum("ijl,ij->li", P, G))


def test_by_hand():
    # softmax of (0, ln 3) is (1/4, 3/4); of (ln 9, 0) it is (9/10, 1/10), and so on. k = n c / e = 2.
    logits = torch.tensor([[1.0, 3], [9, 1], [1, 1], [7, 3]]).log()
    S = [[0.25, 0.75], [0.9, 0.1], [0.5, 0.5], [0.7, 0.3]]
    router = ExpertChoice(D, 2, 1.0)
    chosen = router.assign(logits)
    assert chosen.token.tolist() == [[1, 3], [0, 2]]  # expert 0: 0.9, 0.7; expert 1: 0.75, 0.5
    torch.testing.assert_close(chosen.gate, torch.tensor([[0.9, 0.7], [0.75, 0.5]]))
    everyone = ExpertChoice(D, 2, 2.0, gate="renormalized").assign(logits)
    # All took all: the softmax again.
    torch.testing.assert_close(everyone.dense(4), torch.tensor(S))


@two_hundred
@given(problems(), factors, st.sampled_from(["softmax", "renormalized", "scaled"]))
def test_200_problems(problem, c, gate):
    n, e = problem.logits.shape
    assume(whole(n, e, c))
    router = ExpertChoice(D, e, c, gate=gate)
    chosen = router.assign(problem.logits, mask=problem.mask)
    check(chosen, problem)
    k = int(c * int(problem.valid.sum()) / e)
    assert chosen.load(n).tolist() == [k] * e  # every expert holds exactly k, padding takes none
    expected = equation_2(problem.logits[problem.valid], k)
    if gate == "renormalized":
        expected = expected / expected.sum(1, keepdim=True).clamp_min(1e-300)
    elif gate == "scaled":
        expected = expected * e / c
    same_choice(alone(chosen, problem), expected)
    if gate != "renormalized":
        assert (np.diff(chosen.gate.numpy()[:, :k], axis=1) <= 0).all()  # best first


@two_hundred
@given(problems(masks=False), factors, st.integers(0, 99))
def test_permuting_tokens_permutes_the_choice(problem, c, seed):
    n, e = problem.logits.shape
    assume(whole(n, e, c))
    router, order = ExpertChoice(D, e, c), torch.randperm(n, generator=generator(seed))
    same_choice(router.assign(problem.logits[order]).dense(n), router.assign(problem.logits).dense(n)[order])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("pool", ["sequence", "position", 12])
def test_pools_equal_a_loop_over_pools(pool, masked):
    B, T, e, c = 4, 6, 3, 1.5
    logits = random_logits(B * T, e, 0)
    mask = torch.ones(B, T, dtype=torch.bool)
    if masked:
        # Pools keep 4 or 6, 2 or 4, and 10 tokens: k = c/2 of each, rounded down.
        mask[::2, 4:] = False
    router = ExpertChoice(D, e, c, pool=pool)
    chosen = router.assign(logits, batch_shape=(B, T), mask=mask.flatten() if masked else None)
    ids = torch.arange(B * T).view(B, T)
    groups = {"sequence": ids, "position": ids.T, 12: ids.reshape(2, 12)}[pool]
    expected = torch.zeros(B * T, e, dtype=torch.float64)
    for group in groups:
        group = group[mask.flatten()[group]]
        expected[group] = equation_2(logits[group], int(c * len(group) / e))
    same_choice(chosen.dense(B * T), expected)


def test_where_nothing_is_said_it_is_the_papers():
    said = "capacity_factor=2.0, pool=batch, gate=softmax, cap_solver=feasible, rounding=exact"
    router = ExpertChoice(8, 4)
    assert router.extra_repr() == f"d_model=8, num_experts=4, {said}" and router.max_experts_per_token is None
    assert router.static and router.cutoff.beta == 0.99


def test_one_pool_of_all_is_the_batch():
    logits = random_logits(12, 3, 0)
    batch = ExpertChoice(D, 3, 2.0).assign(logits).dense(12)
    same_choice(ExpertChoice(D, 3, 2.0, pool=12).assign(logits).dense(12), batch)
    same_choice(
        ExpertChoice(D, 3, 2.0, pool="sequence").assign(logits, batch_shape=(1, 12)).dense(12),
        batch,
    )


def test_gradient_is_that_of_the_softmax_at_the_chosen():
    logits = random_logits(8, 2, 0).requires_grad_()
    chosen = ExpertChoice(D, 2, 1.0).assign(logits)
    onehot = F.one_hot(chosen.token, 8).sum(1).T.double()  # (n, e)
    weights = torch.randn(8, 2, dtype=torch.float64, generator=generator(1))
    ours = torch.autograd.grad((chosen.dense(8) * weights).sum(), logits)[0]
    theirs = torch.autograd.grad((logits.softmax(1) * onehot * weights).sum(), logits)[0]
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("n, c, wrong", [(10, 1.0, "2.5"), (4, 0.5, "0.5"), (6, 1.0, "1.5")])
def test_a_fraction_is_an_error_and_names_it(n, c, wrong):
    with pytest.raises(ConfigError, match=rf"capacity_factor={c}.*{wrong}"):
        ExpertChoice(D, 4, c).assign(torch.zeros(n, 4))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: ExpertChoice(D, 4, 0.5).assign(torch.zeros(4, 4)), r"k=0.5 of n=4 .* capacity_factor in 1\.\.4"),
        (lambda: ExpertChoice(D, 4, None), "capacity_factor=null: must be a number"),
        (lambda: ExpertChoice(D, 4, 4.5), "capacity_factor=4.5: must be at most num_experts=4"),
        (lambda: ExpertChoice(D, 4, 8, rounding="down"), "capacity_factor=8: must be at most num_experts=4"),
        (lambda: ExpertChoice(D, 4, 2.0, 1), "max_experts_per_token=1"),
        (lambda: ExpertChoice(D, 4, pool="page"), "pool='page'.*batch, rank, sequence, position"),
        (lambda: ExpertChoice(D, 4, gate="sigmoid"), "gate='sigmoid'.*softmax"),
        (lambda: ExpertChoice(D, 4, cap_solver="greedy"), "cap_solver='greedy'"),
        (lambda: ExpertChoice(D, 4, rounding="up"), "rounding='up'.*exact, down"),
        (lambda: ExpertChoice(D, 4, pool=3).assign(torch.zeros(8, 4)), "pool=3.*n=8"),
        (lambda: ExpertChoice(D, 4, pool="sequence").assign(torch.zeros(8, 4)), "pool='sequence' needs sequences: batch_shape=.*, or x of shape .B, T, d.$"),
        *((lambda pool=pool: ExpertChoice(D, 4, pool=pool), f"pool={pool}(: must be at least 1| is of type bool, but must be str or int)") for pool in (0, -4, True)),
        (lambda: ExpertChoice(D, 4, max_experts_per_token=2.5), "max_experts_per_token=2.5 is of type float, but must be int"),
        (lambda: ExpertChoice(0, 4), "d_model=0: must be at least 1"),
        (lambda: ExpertChoice(D, 0), "num_experts=0"),
    ],
)  # fmt: skip
def test_errors_name_key_value_and_remedy(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_every_expert_is_full_whatever_the_scores():
    for bias in (0, 5, 50):
        router = ExpertChoice(D, 4, 2.0)
        chosen = router.assign(random_logits(32, 4, 0, bias=bias))
        assert chosen.load(32).tolist() == demand(chosen, 32) == [16] * 4
    problem = Problem(random_logits(32, 4, 0, bias=50), torch.arange(32) < 16, torch.zeros(32))
    check(router.assign(problem.logits, mask=problem.mask), problem)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_logits_are_at_least_float32_also_under_autocast(dtype):
    router, x = ExpertChoice(D, 4).to(dtype), torch.randn(2, 5, D, generator=generator(0)).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = router.logits(x)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert logits.shape == (10, 4) and logits.dtype == wide
    torch.testing.assert_close(logits, x.view(10, D).to(wide) @ router.weight.to(wide))


@pytest.mark.parametrize("cap", [4, 9])
def test_a_cap_of_all_experts_is_none(cap):
    logits = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    free, capped = (ExpertChoice(3, 4, 2.0, max_experts_per_token=most).assign(logits) for most in (None, cap))
    assert torch.equal(free.dense(16), capped.dense(16))


def test_a_padded_pool_that_rounds_down_takes_what_its_cap_allows():
    """Of 2 tokens a place each is half a token an expert; rounded up, all 4 experts are what 2 experts a token allow."""
    router, mask = ExpertChoice(3, 4, 1.0, max_experts_per_token=2, rounding="down"), torch.arange(16) < 2
    logits = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    taken = router.assign(logits, mask=mask).dense(16) > 0
    assert taken.sum(0).tolist() == [1] * 4 and taken.sum(1).tolist() == [2] * 2 + [0] * 14
    assert (
        not router.assign(logits, mask=torch.arange(16) < 1).dense(16).any()
    )  # one token, two of four: less than one each
    token, gate = ExpertChoice(3, 4, 1.0, 1, rounding="down").assign(logits[:3])  # nor here
    assert token.shape == gate.shape == (4, 0) and (token.dtype, gate.dtype) == (torch.int64, logits.dtype)


def test_a_layer_is_one_step_only_where_the_router_is_plain(monkeypatch):
    """One pool, no cap, and nobody who looks or chooses otherwise: what the kernels are then told."""
    pytest.importorskip("triton")
    from ecmoe.kernels import choice

    class Other(ExpertChoice):
        pass

    def told(of=ExpertChoice, change=lambda router: None, room=99, n=8, **keys):
        router = of(D, 4, 1.0, gate="scaled", **keys)
        router.kernels = "triton"
        change(router)
        return router, router.at_once(torch.zeros(n, D), lambda: ("w1", "w2"), room, statistics="here")

    monkeypatch.setattr(choice, "expert_choice", lambda *given, **keys: (given, keys))
    monkeypatch.setattr(choice, "available", lambda x, weight, k: True)
    for pool in ("batch", "rank"):
        router, ((_, weight, *given), keys) = told(pool=pool)
        assert weight is router.weight and given == ["w1", "w2", 2]
        cutoff = router.cutoff.pending, router.cutoff.count
        assert keys == {"scale": 4.0, "cutoff": cutoff, "kernels": "triton", "statistics": "here"}
    assert told(change=lambda router: router.eval())[1][1]["cutoff"] is None and told(room=8)[1]
    for pool in ("sequence", "position", 4):
        assert told(pool=pool)[1] is None
    assert told(of=Other)[1] is told(max_experts_per_token=2)[1] is told(room=7)[1] is told(n=0)[1] is None
    for change in (
        lambda router: router.register_forward_hook(print),
        lambda router: router.register_forward_pre_hook(print),
        lambda router: setattr(router, "assign", print),
        lambda router: setattr(router, "read", print),
        lambda router: setattr(router, "causal", True),
        lambda router: setattr(router, "kernels", "plain"),
        lambda router: monkeypatch.setattr(choice, "available", lambda x, weight, k: False),
    ):
        assert told(change=change)[1] is None


@pytest.mark.parametrize("seed", range(5))
def test_padding_is_not_taken_where_scores_are_0(seed):
    logits = 300 * torch.randn(16, 4, generator=generator(seed))  # whose softmax is 0 for most
    mask = torch.arange(16) % 3 != 0
    found = ExpertChoice(8, 4, capacity_factor=2.0).assign(logits, mask=mask)
    assert (logits.softmax(1) == 0).float().mean() > 0.5 and mask[found.token[found.token < 16]].all()


def test_a_sequence_of_padding_alone_moves_no_cutoff():
    router, logits = ExpertChoice(D, 4, 1.0, pool="sequence"), random_logits(24, 4, 0)
    router.assign(logits, batch_shape=(3, 8), mask=torch.arange(24) >= 8)
    second, third = (logits[i : i + 8].softmax(1).sort(0).values[-2] for i in (8, 16))  # k = 2
    assert router.cutoff.count == 2
    torch.testing.assert_close(router.cutoff.pending, (second + third).float())


def test_places_that_differ_are_gathered_and_their_gradients_put_back():
    S, I = torch.randn(2, 3, 5, requires_grad=True), torch.rand(2, 3, 5).argsort(2)[..., :2]
    weight = torch.randn(2, 3, 2)
    found = _At.apply(S, I)
    assert torch.equal(found, S.gather(2, I))
    for ours, theirs in zip(
        *(torch.autograd.grad((x * weight).sum(), S) for x in (found, S.gather(2, I))), strict=True
    ):
        assert torch.equal(ours, theirs)
