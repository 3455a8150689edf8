"""Linear assignment against scipy's exact solver, by hand, and greedily in evaluation."""

import numpy as np
import pytest
import torch
from hypothesis import given
from scipy.optimize import linear_sum_assignment

from ecmoe import MoE, RunConfig, causal_routing
from ecmoe.config import ConfigError
from ecmoe.routing import LinearAssignment, build_router, linear_assignment
from ecmoe.routing.transport import transport
from tests.routing.problems import alone, check, generator, problems, random_logits, same_choice, two_hundred

D = 3


def optimum(S: np.ndarray) -> float:
    """Each expert as ceil(n / e) columns, each taken by at most one token."""
    n, e = S.shape
    columns = np.repeat(S, -(-n // e), axis=1)
    rows, taken = linear_sum_assignment(columns, maximize=True)
    return columns[rows, taken].sum()


def objective(logits, chosen) -> float:
    return logits[chosen.dense(len(logits)) > 0].double().sum().item()


@two_hundred
@given(problems(divisible=True))
def test_200_problems(problem):
    n, e = problem.logits.shape
    router = LinearAssignment(D, e)
    chosen = router.assign(problem.logits, mask=problem.mask)
    found = check(chosen, problem)
    logits = problem.logits[problem.valid]
    n_valid = len(logits)
    assert chosen.demand.sum() == len(found) == n_valid  # nothing is dropped
    assert (chosen.experts_per_token(n) == problem.valid).all()
    assert chosen.load(n).max() <= -(-n_valid // e)  # padding takes no place
    if n_valid % e == 0:  # balanced, and as if the others weren't there
        assert chosen.load(n).tolist() == [n_valid // e] * e
        same_choice(alone(chosen, problem), router.assign(logits).dense(n_valid))
    for (token, i), gate in found.items():
        assert gate == pytest.approx(1 / (1 + np.exp(-problem.logits[token, i].item())))
    # A shift makes all sums positive and moves them alike.
    low = float(logits.min()) - 1 if n_valid else 0.0
    ours = sum(problem.logits[place].item() - low for place in found)
    assert ours >= 0.999 * optimum(logits.numpy() - low)


@two_hundred
@given(problems())
def test_200_problems_in_evaluation_each_token_takes_its_best(problem):
    n, e = problem.logits.shape
    router = LinearAssignment(D, e).eval()
    chosen = router.assign(problem.logits, mask=problem.mask)
    check(chosen, problem)
    best = np.zeros((n, e))
    for place in range(n):
        i = int(np.argmax(problem.logits[place].numpy()))
        best[place, i] = float(problem.valid[place]) / (1 + np.exp(-problem.logits[place, i].item()))
    same_choice(chosen.dense(n), torch.from_numpy(best))


def logits_of(kind: str, n: int, e: int) -> torch.Tensor:
    draw = generator(n + e)
    z = torch.randn(n, e, generator=draw)
    match kind:
        case "random":
            return z
        case "peaked":
            return 8 * z
        case "one-hot":
            return (40 * z).softmax(1)
        case "biased":
            return z + 3 * torch.randn(e, generator=draw)
        case "peaked and biased":
            return 5 * z + 20 * torch.randn(e, generator=draw)
        case "offset by token":
            return z + 50 * torch.randn(n, 1, generator=draw)
        case "alike":  # six kinds of tokens that hardly differ
            kinds = 4 * torch.randn(6, e, generator=draw)
            return kinds[torch.randint(6, (n,), generator=draw)] + 0.05 * z
    raise AssertionError(kind)


KINDS = ["random", "peaked", "one-hot", "biased", "peaked and biased", "offset by token", "alike"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n, e", [(16, 16), (60, 4), (128, 16), (512, 16)])
def test_balanced_and_within_a_thousandth_of_scipy(kind, n, e):
    logits = logits_of(kind, n, e)
    chosen = LinearAssignment(D, e).assign(logits)
    assert chosen.load(n).tolist() == [n // e] * e
    assert (chosen.experts_per_token(n) == 1).all()
    best = optimum(logits.double().numpy())
    assert objective(logits, chosen) >= best - 1e-3 * abs(best)


def test_the_best_token_by_token_would_not_be_balanced():
    logits = logits_of("biased", 128, 16)
    assert torch.bincount(logits.argmax(1), minlength=16).max() > 2 * 128 / 16
    # Each expert's best free tokens, one expert after the other, lose more than a thousandth.
    free, greedy = torch.ones(128, dtype=torch.bool), 0.0
    for i in range(16):
        scores, tokens = logits[:, i].masked_fill(~free, -torch.inf).topk(8)
        free[tokens] = False
        greedy += scores.sum().item()
    assert greedy < 0.99 * optimum(logits.numpy())


def test_by_hand():
    # Both tokens prefer expert 0, the second by more: 1 + 4 is more than 2 + 2.
    logits = torch.tensor([[2.0, 1.0], [4.0, 2.0]])
    router = LinearAssignment(D, 2)
    chosen = router.assign(logits)
    assert chosen.token.tolist() == [[1], [0]]
    torch.testing.assert_close(chosen.gate, torch.tensor([[4.0], [1.0]]).sigmoid())
    with causal_routing(router):
        assert router.assign(logits).token.tolist() == [[0, 1], [2, 2]]


def test_gradient_is_that_of_the_sigmoid_at_the_chosen_scores():
    logits = random_logits(12, 3, 0).requires_grad_()
    chosen = LinearAssignment(D, 3).assign(logits)
    weights = torch.randn(12, 3, dtype=torch.float64, generator=generator(1))
    ours = torch.autograd.grad((chosen.dense(12) * weights).sum(), logits)[0]
    p = logits.detach().sigmoid()
    expected = p * (1 - p) * weights * (chosen.dense(12) > 0)
    torch.testing.assert_close(ours, expected)


def test_a_layer_of_it_trains_its_router():
    torch.manual_seed(0)
    moe = MoE(build_router(RunConfig(router="linear_assignment", d_model=8, heads=2)), 8, 16)
    assert isinstance(moe.router, LinearAssignment)
    moe(torch.randn(2, 16, 8)).square().sum().backward()
    assert moe.load.tolist() == [4] * 8 and (moe.experts_per_token[1] == 32).all()
    assert (moe.router.weight.grad.abs().sum(0) > 0).all()


def test_evaluation_needs_no_whole_number_of_tokens_but_training_does():
    router = LinearAssignment(D, 4)
    with pytest.raises(ConfigError, match="num_experts=4: must divide the n=7 tokens"):
        router.assign(random_logits(7, 4, 0))
    assert router.eval().assign(random_logits(7, 4, 0)).load(7).sum() == 7
    assert LinearAssignment(D, 1).assign(random_logits(7, 1, 0)).load(7).tolist() == [7]
    assert LinearAssignment(D, 4).assign(torch.zeros(0, 4)).load(0).tolist() == [0] * 4


def test_what_may_be_lost_is_a_share_of_how_far_scores_differ(monkeypatch):
    """Beside a token's own offset and an expert's, which change no choice, and without padding."""
    told, mask = [], torch.arange(12) % 3 > 0
    logits = random_logits(12, 4, 0) + 50 * random_logits(12, 1, 1) + 20 * random_logits(1, 4, 2)
    monkeypatch.setattr(linear_assignment, "transport", lambda *given: told.append(given) or transport(*given))
    LinearAssignment(D, 4).assign(logits.masked_fill(~mask[:, None], 1e6), mask=mask)
    z = logits[mask].numpy()
    z = z - z.mean(1, keepdims=True) - z.mean(0) + z.mean()
    ((scores, target, b, valid, unit, tolerance, fixed),) = told
    np.testing.assert_allclose(scores[0].T[mask].numpy(), z)
    assert (target.tolist(), b, tolerance, fixed) == ([2], 1, 1e-4, False) and torch.equal(valid[0], mask)
    assert unit.item() == pytest.approx(np.sqrt((z**2).mean()))


def test_a_score_that_is_no_number_counts_as_0(monkeypatch):
    told, logits = [], random_logits(12, 4, 0) + 5
    monkeypatch.setattr(linear_assignment, "transport", lambda *given: told.append(given[0]) or transport(*given))
    for value in (torch.nan, 0.0):
        logits[3, 2] = value
        LinearAssignment(D, 4).assign(logits)
    assert torch.equal(*told)
