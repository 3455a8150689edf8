"""Expert threshold: cut-offs and bounded buckets against loops, and when its state may move."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from ecmoe import MoE, causal_routing
from ecmoe.routing import ExpertChoice, ExpertThreshold
from tests.routing.problems import alone, check, generator, problems, random_logits, same_choice, two_hundred

D, E = 3, 4


def softmax(logits: torch.Tensor) -> np.ndarray:
    z = np.exp(logits.numpy() - logits.numpy().max(1, keepdims=True))
    return z / z.sum(1, keepdims=True)


def kth_largest(logits: torch.Tensor, k: int) -> np.ndarray:
    return np.sort(softmax(logits), axis=0)[-k]


def threshold(*args, warmup_steps: int, slack: float = 2.0, **keys) -> ExpertThreshold:
    router = ExpertThreshold(*args, **keys)
    router.warmup_steps, router.slack = warmup_steps, slack
    return router


def trained(e: int = E, c: float = 1.0, steps: int = 1, **keys) -> ExpertThreshold:
    """A router that has warmed up on `steps` batches of 8 e tokens."""
    router = threshold(D, e, c, warmup_steps=steps, **keys)
    for step in range(steps):
        router.assign(random_logits(8 * e, e, 100 + step))
        router.end_step()
    return router


def state(router) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in router.state_dict().items()}


def same_state(a: dict, b: dict) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def weighed(chosen: np.ndarray, S: np.ndarray, gate: str, c: float) -> torch.Tensor:
    """(n, e) combine weights of the chosen (n, e) pairs."""
    weights = np.where(chosen, S, 0.0)
    if gate == "renormalized":
        weights /= np.maximum(weights.sum(1, keepdims=True), 1e-300)
    return torch.from_numpy(weights * (S.shape[1] / c if gate == "scaled" else 1))


gates = st.sampled_from(["softmax", "renormalized", "scaled"])
factors = st.sampled_from([0.5, 1, 2])


@two_hundred
@given(problems(), factors, gates, st.sampled_from([1.0, 1.5, 2.0]))
def test_200_problems_in_training(problem, c, gate, slack):
    n, e = problem.logits.shape
    k = n * c / e
    assume(k == int(k) >= 1)
    router = trained(e, c, gate=gate, slack=slack)
    cutoff = kth_largest(random_logits(8 * e, e, 100), int(8 * c)).astype(np.float32)
    chosen = router.assign(problem.logits, mask=problem.mask)
    check(chosen, problem)

    S = softmax(problem.logits[problem.valid])
    n_valid = len(S)
    share = int(k * n_valid / n + 1e-9)  # padding takes no place
    expected, above, load = np.zeros((n_valid, e), dtype=bool), [], []
    for i in range(e):
        above.append(int((S[:, i] >= cutoff[i]).sum()))
        bounded = max(above[i], math.ceil(share / slack))  # at least k / slack, at most slack k
        load.append(min(bounded, int(share * slack), n_valid))
        expected[np.argsort(-S[:, i])[: load[i]], i] = True
    same_choice(alone(chosen, problem), weighed(expected, S, gate, c))
    assert chosen.load(n).tolist() == load
    overflow = [max(count - kept, 0) for count, kept in zip(above, load, strict=True)]
    assert (chosen.demand - chosen.load(n)).tolist() == overflow  # what is dropped is counted


@two_hundred
@given(problems(), factors, gates)
def test_200_problems_in_evaluation_nothing_is_dropped(problem, c, gate):
    n, e = problem.logits.shape
    router = trained(e, c, gate=gate).eval()
    cutoff = kth_largest(random_logits(8 * e, e, 100), int(8 * c)).astype(np.float32)
    before = state(router)
    chosen = router.assign(problem.logits, mask=problem.mask)
    check(chosen, problem)
    S = softmax(problem.logits[problem.valid])
    same_choice(alone(chosen, problem), weighed(cutoff <= S, S, gate, c))
    assert chosen.demand.tolist() == (cutoff <= S).sum(0).tolist() == chosen.load(n).tolist()
    assert same_state(state(router), before)  # evaluation moves nothing


def test_a_crowd_is_bounded_in_training_and_served_whole_in_evaluation():
    router = trained(c=1.0, slack=1.5)
    crowd = torch.tensor([[9.0, 0.0, 0.0, 0.0]]).repeat(32, 1) + 1e-3 * random_logits(32, E, 0)
    chosen = router.assign(crowd)
    assert chosen.load(32).tolist() == [12, 6, 6, 6]  # k = 8: at most 12, at least 8 / 1.5
    assert chosen.demand.tolist() == [32, 6, 6, 6]
    served = router.eval().assign(crowd)
    assert served.load(32).tolist() == served.demand.tolist() == [32, 0, 0, 0]


def test_an_expert_to_which_too_few_tokens_belong_asks_for_none_in_warm_up():
    router, mask = ExpertThreshold(D, E, capacity_factor=1.0).train(), torch.arange(8) < 2  # of two tokens, half a one
    found = router.assign(torch.randn(8, E, generator=generator(0)), mask=mask)
    assert found.demand.tolist() == E * [0] and (found.token == 8).all()


def test_untrained_it_is_plain_expert_choice():
    z, mask = random_logits(32, E, 0), torch.arange(32) % 4 > 0
    fresh, plain = (make(D, E, 2.0).eval().assign(z, mask=mask) for make in (ExpertThreshold, ExpertChoice))
    assert torch.equal(fresh.dense(32), plain.dense(32)) and not fresh.dense(32)[~mask].any()


def test_warm_up_is_plain_expert_choice_and_then_no_expert_takes_more_than_twice_as_many():
    router, plain = ExpertThreshold(D, E, 2.0), ExpertChoice(D, E, 2.0)
    for step in range(12):
        logits = random_logits(32, E, step, sharpness=1 + step)
        same = torch.equal(router.assign(logits).dense(32), plain.assign(logits).dense(32))
        assert same == (step < 10)
        router.end_step()
    crowd = torch.tensor([[9.0, 0.0, 0.0, 0.0]]).repeat(64, 1)
    assert router.assign(crowd).load(64).tolist() == [64, 16, 16, 16] and router.pool == "rank"  # k = 32


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.999])
@pytest.mark.parametrize("micro_batches", [1, 4])
def test_one_update_an_optimiser_step_also_under_accumulation(beta, micro_batches):
    router = threshold(D, E, 1.0, beta, warmup_steps=2)
    average = np.zeros(E)
    for step in range(6):
        micro = random_logits(64, E, step).chunk(micro_batches)
        before = router.cutoff.average.clone()
        for logits in micro:
            router.assign(logits)
        assert torch.equal(router.cutoff.average, before)  # within a step the cut-offs stay
        router.end_step()
        mean = np.mean([kth_largest(logits, len(logits) // E) for logits in micro], axis=0)
        average = beta * average + (1 - beta) * mean
        corrected = torch.from_numpy(average / (1 - beta ** (step + 1))).float()
        torch.testing.assert_close(router.cutoff.value(), corrected)
    assert router.steps == 6


def test_micro_batches_of_a_step_see_the_same_cutoffs():
    router, first, second = trained(), random_logits(32, E, 0), random_logits(32, E, 1)
    alone_ = router.assign(second).dense(32)
    router = trained()
    router.assign(first)
    assert torch.equal(router.assign(second).dense(32), alone_)


def test_state_survives_a_checkpoint_in_the_middle_of_a_step():
    router = trained(steps=3)
    router.assign(random_logits(32, E, 0))
    loaded = threshold(D, E, 1.0, warmup_steps=3)
    loaded.load_state_dict(router.state_dict())
    for r in (router, loaded):
        r.assign(random_logits(32, E, 1))
        r.end_step()
    assert same_state(state(loaded), state(router))
    logits = random_logits(32, E, 2)
    assert torch.equal(loaded.assign(logits).dense(32), router.assign(logits).dense(32))


def test_evaluation_causal_routing_and_empty_steps_move_nothing():
    router = trained(steps=2)
    before = state(router)
    router.eval().assign(random_logits(32, E, 0))
    router.train()
    with causal_routing(router):
        router.assign(random_logits(32, E, 0))
    router.end_step()
    assert same_state(state(router), before)
    router.assign(random_logits(32, E, 0))
    router.end_step()
    assert not same_state(state(router), before)  # a training step does


@pytest.mark.parametrize("whole_layer", [True, False])
def test_recomputation_moves_nothing(whole_layer):
    torch.manual_seed(0)
    moe = MoE(ExpertThreshold(D, E, 1.0), D, 5, recompute=not whole_layer)
    x = torch.randn(2, 8, D, generator=generator(0)).requires_grad_()
    out = checkpoint(moe, x, use_reentrant=False) if whole_layer else moe(x)
    out.square().sum().backward()
    assert moe.router.cutoff.count == 1


def test_each_token_is_judged_alone_once_trained():
    router, logits = trained(c=2.0).eval(), random_logits(20, E, 0)
    dense = router.assign(logits).dense(20)
    for place in range(20):
        same_choice(router.assign(logits[place : place + 1]).dense(1)[0], dense[place])
    # On data like those of training an expert takes about k tokens.
    many = random_logits(4000, E, 1)
    k = 4000 * 2.0 / E
    assert (router.assign(many).load(4000) / k - 1).abs().max() < 0.25


def test_gradient_is_that_of_the_kept_scores():
    router, logits = trained(), random_logits(32, E, 0).requires_grad_()
    chosen = router.assign(logits).dense(32)
    weights = torch.randn(32, E, dtype=torch.float64, generator=generator(1))
    expected = (logits.softmax(1) * (chosen > 0) * weights).sum()
    ours = torch.autograd.grad((chosen * weights).sum(), logits)[0]
    torch.testing.assert_close(ours, torch.autograd.grad(expected, logits)[0])


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: ExpertThreshold(D, E, beta=1.0), "beta=1.0.*below 1"),
        (lambda: ExpertThreshold(D, E, gate="raw"), "gate='raw'"),
        (lambda: ExpertThreshold(D, E, 1.0).assign(torch.zeros(7, E)), "capacity_factor=1.0.*n=7"),
        (
            lambda: ExpertThreshold(D, E).check_causal(),
            "no training batch yet|has seen no training",
        ),
    ],
)
def test_errors_name_key_value_and_remedy(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("n", [1, 3, 7, 13])
def test_rounded_down_an_expert_takes_at_least_one_of_any_number_of_tokens(n):
    router, logits = threshold(D, E, 1.0, warmup_steps=1, rounding="down"), random_logits(n, E, 0)
    k = max(1, n // E)
    assert router.assign(logits).load(n).tolist() == [k] * E  # warming up, as expert choice
    np.testing.assert_allclose(router.cutoff.pending.numpy(), kth_largest(logits, k), rtol=1e-6)
    with pytest.raises(ValueError, match="rounding='down'"):
        threshold(D, E, 1.0, warmup_steps=1).assign(logits)
