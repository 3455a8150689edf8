"""Capped expert choice against the linear programme, solved by scipy's HiGHS."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog
from scipy.sparse import coo_matrix
from torch.nn import functional as F

from ecmoe.config import ConfigError
from ecmoe.measures.inspection import held_out, watched
from ecmoe.routing import ExpertChoice, capped
from ecmoe.routing.capped import capped_top_k, dykstra
from ecmoe.routing.transport import transport
from ecmoe.training.run import run_or_load
from tests.routing.problems import check, problems, two_hundred


def optimum(S: np.ndarray, k: int, b: int) -> float:
    e, n = S.shape
    i = np.arange(e * n)
    rows = coo_matrix((np.ones(e * n), (i // n, i)), shape=(e, e * n)).tocsr()
    columns = coo_matrix((np.ones(e * n), (i % n, i)), shape=(n, e * n)).tocsr()
    result = linprog(
        -S.reshape(-1).astype(float), A_eq=rows, b_eq=np.full(e, k), A_ub=columns, b_ub=np.full(n, b),
        bounds=(0, 1), method="highs",
    )  # fmt: skip
    assert result.status == 0, result.message
    return -result.fun


def logits(kind: str, n: int, e: int, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(n, e, generator=g)
    match kind:
        case "random":
            return z
        case "peaked":
            return 8 * z
        case "one-hot":  # in float32 most scores are exactly 0 or 1
            return 40 * z
        case "biased":
            return z + 3 * torch.randn(e, generator=g)
        case "peaked and biased":
            return 5 * z + 5 * torch.randn(e, generator=g)
        case "alike":  # six kinds of tokens that hardly differ
            kinds = 4 * torch.randn(6, e, generator=g)
            return kinds[torch.randint(6, (n,), generator=g)] + 0.05 * z
        case "equal":
            kinds = 4 * torch.randn(6, e, generator=g)
            return kinds[torch.randint(6, (n,), generator=g)]
    raise AssertionError(kind)


def scores(kind: str, n: int, e: int, seed: int = 0) -> torch.Tensor:
    return logits(kind, n, e, seed).softmax(1).T.contiguous()[None]


def held(S, I):
    return torch.zeros_like(S).scatter(2, I, 1.0)


KINDS = ["random", "peaked", "one-hot", "biased", "peaked and biased", "alike", "equal"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n, e, c, b", [(64, 8, 2, 2), (64, 8, 2, 3), (64, 4, 0.5, 1), (96, 16, 1, 1), (48, 8, 1.5, 2)])
def test_every_constraint_holds_and_the_objective_is_the_linear_programmes(kind, n, e, c, b):
    k = int(n * c / e)
    S = scores(kind, n, e, seed=n + b)
    G, I = capped_top_k(S, k, b)
    X = held(S, I)
    assert (X.sum(2) == k).all() and (X.sum(1) <= b).all()
    if b == c:
        assert (X.sum(1) == b).all()
    assert torch.equal(G, S.gather(2, I)) and (G.diff(dim=2) <= 0).all()
    may_lose = capped.TOLERANCE * S.topk(k, dim=2).values.sum().item()
    assert G.sum().item() >= optimum(S[0].numpy(), k, b) - may_lose


@two_hundred
@given(
    problems(divisible=True), st.sampled_from([1.0, 2.0]), st.integers(1, 3), st.sampled_from(["feasible", "dykstra"])
)
def test_200_problems(problem, c, b, solver):
    n, e = problem.logits.shape
    c, b = min(c, e), max(b, int(c))
    router = ExpertChoice(8, e, c, max_experts_per_token=b, cap_solver=solver)
    found = check(router.assign(problem.logits, mask=problem.mask), problem)
    k = int(problem.valid.sum()) * int(n * c / e) // n
    assert all(sum(i == expert for _, i in found) == k for expert in range(e))  # every slot is filled
    if solver == "feasible":
        assert max((sum(t == token for t, _ in found) for token in range(n)), default=0) <= b


def test_pools_are_solved_apart():
    S = torch.cat([scores("random", 64, 8), scores("peaked", 64, 8, seed=1)])
    _, both = capped_top_k(S, 16, 2)
    X = held(S, both)
    assert (X.sum(2) == 16).all() and (X.sum(1) == 2).all()
    for pool in range(2):
        best = optimum(S[pool].numpy(), 16, 2)
        assert (S[pool] * X[pool]).sum().item() >= 0.99 * best
    A = dykstra(S, torch.tensor([16, 16]), 2, torch.ones(2, 64, dtype=torch.bool))
    for pool in range(2):
        alone = dykstra(S[pool : pool + 1], torch.tensor([16]), 2, torch.ones(1, 64, dtype=torch.bool))
        torch.testing.assert_close(A[pool : pool + 1], alone)
    padded = dykstra(torch.cat([S, 1 + S], dim=2), torch.tensor([16, 16]), 2, torch.arange(128).expand(2, 128) < 64)
    torch.testing.assert_close(padded, F.pad(A, (0, 64), value=-torch.inf))


@pytest.mark.parametrize("kind", ["biased", "peaked", "equal"])
def test_a_larger_problem(kind):
    n, e, b, k = 2048, 16, 2, 256
    S = scores(kind, n, e)
    G, I = capped_top_k(S, k, b)
    X = held(S, I)
    assert (X.sum(2) == k).all() and (X.sum(1) == b).all()
    assert G.sum().item() >= 0.99 * optimum(S[0].numpy(), k, b)


def test_where_an_expert_has_more_tokens_than_are_looked_at():
    """16,384 tokens of six kinds: the programme over kinds, each as often as it is there, is small and exact."""
    n, e, k = 16384, 8, 2048
    S = scores("equal", n, e)
    kinds, count = np.unique(S[0].T.numpy(), axis=0, return_counts=True)
    best = linprog(
        -kinds.ravel().astype(float), A_eq=np.tile(np.eye(e), len(kinds)), b_eq=np.full(e, k),
        A_ub=np.kron(np.eye(len(kinds)), np.ones(e)), b_ub=count, method="highs",
    )  # fmt: skip
    G, I = capped_top_k(S, k, 1)
    assert (held(S, I).sum(1) == 1).all() and G.double().sum().item() >= 0.995 * -best.fun


@pytest.mark.parametrize("b", [2, 3])
def test_on_the_scores_of_a_trained_router(tiny_config, b):
    config = tiny_config(num_experts=8, sequence_length=32, steps=60, gate="renormalized")
    model = run_or_load(config, progress=False).load_model()
    _, batch = held_out(config)
    with watched(model) as seen, torch.no_grad():
        model(batch[:, :-1])
    ((logits, _),) = seen
    S = logits.softmax(1).T[None]
    k = S.shape[2] * 2 // 8
    G, I = capped_top_k(S, k, b)
    X = held(S, I)
    assert (X.sum(2) == k).all() and (X.sum(1) <= b).all()
    assert G.sum().item() >= 0.99 * optimum(S[0].numpy(), k, b)


def test_what_may_be_lost_is_a_share_of_the_mean_score_of_a_plain_top_k(monkeypatch):
    S, target = torch.cat([scores("random", 8, 4), scores("biased", 8, 4), scores("peaked", 8, 4)]), [1, 3, 0]
    valid = torch.ones(3, 8, dtype=torch.bool)
    valid[0, [2, 5]], told = False, []
    monkeypatch.setattr(capped, "transport", lambda *given: told.append(given) or transport(*given))
    capped_top_k(S, 3, 2, valid=valid, target=torch.tensor(target))
    ((*_, unit, _, _),) = told
    best = [S[pool][:, valid[pool]].topk(k, dim=1).values.sum() / max(4 * k, 1) for pool, k in enumerate(target)]
    torch.testing.assert_close(unit.flatten(), torch.stack(best))


def test_an_impossible_cap_says_which_one_is_possible():
    with pytest.raises(
        ConfigError,
        match="^max_experts_per_token=2: 4 experts take k=7 of n=10 tokens each, 28 places, but n b = 20: use at least 3$",
    ):
        capped_top_k(torch.rand(1, 4, 10), 7, 2)
    with pytest.raises(ConfigError, match="max_experts_per_token=1"):
        ExpertChoice(8, 4, 2.0, max_experts_per_token=1)


@pytest.mark.parametrize("solver", ["feasible", "dykstra"])
def test_padding_takes_no_place(solver):
    torch.manual_seed(0)
    router = ExpertChoice(16, 4, 2.0, max_experts_per_token=2, cap_solver=solver)
    mask = torch.rand(64) < 0.7
    mask[:48] |= torch.arange(48) % 2 == 0
    mask = mask & (mask.cumsum(0) <= 40)
    z = torch.randn(64, 4)
    masked = router.assign(z, mask=mask).dense(64)
    alone = router.assign(z[mask]).dense(int(mask.sum()))
    assert (masked[~mask] == 0).all()
    assert (masked[mask] > 0).sum() == (alone > 0).sum() == 2 * mask.sum()
    torch.testing.assert_close(masked[mask].sum(), alone.sum(), rtol=2e-3, atol=0)


@pytest.mark.parametrize("kind", ["equal", "alike"])
def test_padding_changes_no_choice_where_all_tokens_are_alike(kind):
    S, place = scores(kind, 48, 6), torch.arange(64).view(16, 4)[:, 1:].flatten()
    padded, valid = torch.rand(1, 6, 64).index_copy(2, place, S), torch.arange(64)[None] % 4 > 0
    _, alone = capped_top_k(S, 16, 3)
    _, I = capped_top_k(padded, 16, 3, valid=valid, target=torch.tensor([16]))
    assert torch.equal(held(padded, I)[..., place], held(S, alone))


def test_a_router_solves_as_it_is_told():
    z = logits("peaked", 256, 16, 0)
    S, found = z.softmax(1).T[None], {}
    for solver in ("feasible", "dykstra"):
        chosen = ExpertChoice(8, 16, 2.0, max_experts_per_token=3, cap_solver=solver).assign(z)
        found[solver] = held(S, chosen.token[None])
        assert torch.equal(found[solver], held(S, capped_top_k(S, 32, 3, solver=solver)[1]))
    assert not torch.equal(*found.values())


def test_dykstras_filler_comes_last_whatever_its_scores():
    S, every = scores("random", 24, 4), torch.ones(1, 24, dtype=torch.bool)
    for target in torch.tensor([[9], [11]]):
        expected = dykstra(S, target, 2, every).topk(int(target), dim=2).indices
        _, I = capped_top_k(S, 12, 2, solver="dykstra", valid=every, target=target)
        assert torch.equal(I[..., : int(target)].sort().values, expected.sort().values)


def test_gradients_reach_the_chosen_scores():
    S = scores("random", 64, 8).requires_grad_()
    G, I = capped_top_k(S, 16, 2)
    G.sum().backward()
    assert torch.equal(S.grad, held(S, I))


def test_dykstra_converges_to_the_regularised_programme(monkeypatch):
    S, k, b, strength = scores("random", 24, 4).double(), 9, 2, 0.05
    every = torch.ones(1, 24, dtype=torch.bool)
    monkeypatch.setattr(capped, "REGULARIZATION", strength)
    monkeypatch.setattr(capped, "ITERATIONS", 3000)
    A = dykstra(S, torch.tensor([k]), b, every).exp()
    assert (A.sum(2) - k).abs().max() < 1e-6
    assert A.sum(1).max() < b + 1e-6 and A.max() < 1 + 1e-6

    # The optimum has A = min(1, exp((S - q - p) / lambda)) with p >= 0 only where a column is full.
    def value(A):
        return (S * A).sum() - strength * torch.special.xlogy(A, A).sum()

    Z = torch.rand(50, 4, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for B in held(Z, capped_top_k(Z, k, b)[1]):  # no step towards a feasible point improves it
        assert value(0.99 * A + 0.01 * B) <= value(A) + 1e-6


def test_the_papers_solver_stops_short_of_its_constraints():
    S, k, b = scores("peaked", 256, 16), 32, 2
    A = dykstra(S, torch.tensor([k]), b, torch.ones(1, 256, dtype=torch.bool)).exp()
    assert max((A.sum(2) - k).abs().max(), (A.sum(1) - b).max()) > 0.01
    most = {solver: held(S, capped_top_k(S, k, b, solver=solver)[1]).sum(1).max() for solver in ("dykstra", "feasible")}
    assert most["dykstra"] > b == most["feasible"]


def test_who_solves_is_looked_up_unless_the_caller_says(monkeypatch):
    told, S = [], scores("random", 64, 8)
    monkeypatch.setattr(capped, "fast", lambda kernels, S: told.append(kernels) or False)
    for keys in ({}, {"kernels": "plain"}):
        capped_top_k(S, 16, 2, **keys)
    assert told == ["auto", "plain"]


def test_the_papers_solver_has_the_papers_settings():
    assert (capped.REGULARIZATION, capped.ITERATIONS) == (0.001, 100)
