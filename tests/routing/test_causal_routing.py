"""Routing that sees one token alone: each router by itself, then through a Transformer's future and neighbours.

Plain expert choice must fail the same tests, or they couldn't tell.
"""

import pytest
import torch
from hypothesis import given

from ecmoe import RunConfig, build_model, causal_routing
from ecmoe.routing import (
    Dense,
    ExpertChoice,
    ExpertThreshold,
    Hash,
    KMeans,
    LinearAssignment,
    TaskLevel,
    TokenChoice,
)
from tests.routing.problems import check, demand, generator, problems, random_logits, same_choice, two_hundred

D, E, V = 3, 4, 10
ROUTERS = {
    "expert choice": lambda e: ExpertChoice(D, e, 2.0),
    "renormalized": lambda e: ExpertChoice(D, e, 2.0, gate="renormalized"),
    "scaled": lambda e: ExpertChoice(D, e, 2.0, gate="scaled"),
    "capped": lambda e: ExpertChoice(D, e, 1.0, 1),
    "switch": lambda e: TokenChoice(D, e, 1, 1.0),
    "gshard": lambda e: TokenChoice(D, e, 2, 1.0, gate="renormalized"),
    "batch priority": lambda e: TokenChoice(D, e, 2, 0.5, priority="score"),
    "hash": lambda e: Hash(D, e, V, 1.0),
    "dense": lambda e: Dense(D, e),
    "linear assignment": lambda e: LinearAssignment(D, e),
    "k-means": lambda e: KMeans(D, e, 0.5),
    "task level": lambda e: TaskLevel(D, e, V, "fixed"),
    "expert threshold": lambda e: ExpertThreshold(D, e, 2.0),
}


def ready(name: str, e: int):
    """A router that has seen a training batch in which n c / e is whole."""
    router = ROUTERS[name](e)
    ids = torch.arange(4 * e) % V
    logits = random_logits(4 * e, e, 0)
    if "capped" in name:  # its training is tested elsewhere; here only the cut-off matters
        router.cutoff.add(torch.full((1, e), 0.3))
    else:
        router.assign(logits, token_ids=ids, task_ids=ids)
    router.end_step()
    return router


@pytest.mark.parametrize("name", ROUTERS)
def test_200_problems_each_token_as_if_alone(name):
    routers = {e: ready(name, e) for e in range(2, 7)}

    @two_hundred
    @given(problems())
    def holds(problem):
        n, e = problem.logits.shape
        router = routers[e]
        with causal_routing(router):
            chosen = router.assign(problem.logits, token_ids=problem.ids, task_ids=problem.ids, mask=problem.mask)
            check(chosen, problem)
            assert demand(chosen, n) == chosen.load(n).tolist()  # nothing is dropped
            dense = chosen.dense(n)
            for i in range(n):
                ids = problem.ids[i : i + 1]
                alone = router.assign(problem.logits[i : i + 1], token_ids=ids, task_ids=ids).dense(1)[0]
                same_choice(dense[i], alone if problem.valid[i] else torch.zeros_like(alone))

    holds()


@pytest.mark.parametrize("name", ROUTERS)
def test_a_thousand_equal_tokens_all_get_what_one_gets(name):
    router = ready(name, E)
    row, ids = random_logits(1, E, 3, sharpness=3), torch.tensor([7])
    with causal_routing(router):
        one = router.assign(row, token_ids=ids, task_ids=ids).dense(1)
        many = router.assign(row.expand(1000, E), token_ids=ids.expand(1000), task_ids=ids.expand(1000)).dense(1000)
    assert torch.equal(many, one.expand(1000, E)) and (one > 0).any()


def test_cutoff_is_the_kth_largest_score_so_a_training_batch_is_routed_as_in_training():
    router, logits = ExpertChoice(D, E, 2.0), random_logits(16, E, 0)
    trained = router.assign(logits).dense(16)
    torch.testing.assert_close(router.cutoff.value(), logits.softmax(1).sort(0).values[-8].float())
    router.cutoff.double()  # float32 would round the k-th score itself across the cut-off
    router.cutoff.pending.copy_(logits.softmax(1).sort(0).values[-8])
    with causal_routing(router):
        same_choice(router.assign(logits).dense(16), trained)


def test_cutoffs_are_an_average_over_the_last_hundred_steps_or_so():
    router, expected, steps = ExpertChoice(D, E, 1.0), 0.0, 3
    for step in range(steps):
        logits = random_logits(8, E, step)
        router.assign(logits)
        router.end_step()
        expected = 0.99 * expected + 0.01 * logits.softmax(1).sort(0).values[-2]
    torch.testing.assert_close(router.cutoff.value(), (expected / (1 - 0.99**steps)).float())


def test_cutoffs_average_pools_and_leave_out_padding():
    logits = random_logits(18, 2, 0)
    mask = torch.ones(3, 6, dtype=torch.bool)
    mask[1, 4:] = mask[2] = False
    router = ExpertChoice(D, 2, 1.0, pool="sequence")
    router.assign(logits, batch_shape=(3, 6), mask=mask.flatten())
    S = logits.softmax(1)
    expected = (S[:6].sort(0).values[-3] + S[6:10].sort(0).values[-2]) / 2
    torch.testing.assert_close(router.cutoff.value(), expected.float())


def test_a_cap_holds_also_causally():
    router = ExpertChoice(D, E, 2.0, 2)
    router.cutoff.add(torch.zeros(1, E))  # every expert would take every token
    with causal_routing(router):
        chosen = router.assign(random_logits(9, E, 0))
    assert chosen.experts_per_token(9).tolist() == [2] * 9
    best = random_logits(9, E, 0).topk(2, 1).indices.sort(1).values
    assert chosen.dense(9).nonzero()[:, 1].view(9, 2).tolist() == best.tolist()
    router.end_step()
    router.cutoff.average.copy_(0.3 * router.cutoff.weight)  # of their two best experts few want all
    with causal_routing(router):
        found = router.assign(random_logits(9, E, 0)).dense(9)
    S = random_logits(9, E, 0).softmax(1)
    expected = S * (S >= 0.3) * torch.zeros(9, E).scatter(1, best, 1.0)
    same_choice(found, expected)
    assert 0 < (found > 0).sum() < 18


def test_a_cap_counts_only_experts_that_would_take_the_token():
    router = ExpertChoice(D, 3, 1.0, 1)
    router.cutoff.add(torch.tensor([[0.5, 0.2, 0.1]]))
    scores = torch.tensor([[0.45, 0.35, 0.2], [0.6, 0.3, 0.1], [0.45, 0.11, 0.44]])
    with causal_routing(router):
        found = router.assign(scores.log()).dense(3)
    torch.testing.assert_close(found, torch.tensor([[0.0, 0.35, 0.0], [0.6, 0.0, 0.0], [0.0, 0.0, 0.44]]))


def test_evaluation_and_recomputation_move_no_statistic():
    router, logits = ExpertChoice(D, E, 2.0), random_logits(16, E, 0).requires_grad_()
    router.assign(logits)
    before = {name: value.clone() for name, value in router.state_dict().items()}
    router.eval().assign(logits)
    with causal_routing(router):
        router.assign(logits)
    router.train()

    class Recompute(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.sum()

        @staticmethod
        def backward(ctx, g):  # what activation checkpointing does
            router.assign(random_logits(16, E, 1))
            return g.expand(16, E)

    Recompute.apply(logits).backward()
    assert all(torch.equal(value, before[name]) for name, value in router.state_dict().items())
    router.assign(logits)
    assert not torch.equal(router.cutoff.count, before["cutoff.count"])  # a training forward does


def test_no_cutoffs_yet_is_an_error_and_leaves_the_model_as_it_was():
    model = torch.nn.ModuleList([TokenChoice(D, E, 1, 1.0), ExpertChoice(D, E)])
    with pytest.raises(ValueError, match="no training batch yet"), causal_routing(model):
        pass
    assert not any(router.causal for router in model)


def test_flags_come_back_after_an_error_and_when_nested():
    router = ready("expert choice", E)
    with pytest.raises(KeyError), causal_routing(router):
        with causal_routing(router):
            pass
        assert router.causal
        raise KeyError
    assert not router.causal


# Through a model -----------------------------------------------------------------------------------

B, T, HALF = 4, 16, 8


def model_of(dtype=torch.float64, **keys):
    config = RunConfig(
        layers=4,
        d_model=16,
        d_ff=32,
        heads=2,
        num_experts=4,
        sequence_length=T,
        batch_size=B,
        **keys,
    )
    model = build_model(config).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)  # sharper scores and larger outputs than at the start of training
        model(token_ids(9))
        model(token_ids(8))
    return model.eval()


def token_ids(seed: int) -> torch.Tensor:
    return torch.randint(256, (B, T), generator=generator(seed))


@torch.no_grad()
def decisions_and_output(model, ids):
    """Which experts took each token, (layers, B, T, e), and the logits (B, T, V)."""
    seen = []
    for layer in model.moe_layers:
        assign = type(layer.router).assign

        def record(logits, *, router=layer.router, assign=assign, **keys):
            chosen = assign(router, logits, **keys)
            seen.append(chosen.dense(len(logits)).view(B, T, -1) != 0)
            return chosen

        layer.router.assign = record
    try:
        return model(ids), torch.stack(seen)
    finally:
        for layer in model.moe_layers:
            del layer.router.assign


def other_future(ids: torch.Tensor) -> torch.Tensor:
    """The second half of each sequence made the same one byte: all its tokens crowd the same experts."""
    return torch.cat([ids[:, :HALF], torch.full_like(ids[:, HALF:], 65)], dim=1)


def other_sequences(ids: torch.Tensor) -> torch.Tensor:
    return torch.cat([ids[:1], torch.full_like(ids[1:], 65)])


CHANGES = {
    "future": (other_future, (slice(None), slice(HALF))),
    "neighbours": (other_sequences, slice(1)),
}
ARMS = {
    "ec": dict(router="expert_choice"),
    "ec renormalized": dict(router="expert_choice", gate="renormalized"),
    "ec position": dict(router="expert_choice", pool="position"),
    "ec sequence": dict(router="expert_choice", pool="sequence"),
    "gshard": dict(router="token_choice", capacity_factor=1.0),
    "switch": dict(router="token_choice", top_k=1, capacity_factor=1.0),
    "hash": dict(router="hash", capacity_factor=1.0),
    "linear assignment": dict(router="linear_assignment"),
    "k-means": dict(router="kmeans", capacity_factor=1.0),
    "expert threshold": dict(router="expert_threshold"),
    "dense mixture": dict(router="dense_moe"),
}


def difference(model, change: str) -> tuple[int, float]:
    """Decisions that changed, and the largest change of an output, where nothing of its own was changed."""
    change, kept = CHANGES[change]
    ids = token_ids(0)
    (out_a, chosen_a), (out_b, chosen_b) = (decisions_and_output(model, x) for x in (ids, change(ids)))
    flips = sum(int((a[kept] != b[kept]).sum()) for a, b in zip(chosen_a, chosen_b, strict=True))
    return flips, float((out_a[kept] - out_b[kept]).abs().max())


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("dtype, rounding", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_causally_nothing_sees_the_future_or_a_neighbour(arm, change, dtype, rounding):
    model = model_of(dtype, **ARMS[arm])
    with causal_routing(model):
        flips, largest = difference(model, change)
    assert flips == 0 and largest < rounding


@pytest.mark.parametrize(
    "arm, change, leaks",
    [
        ("ec", "future", True),
        ("ec", "neighbours", True),
        ("ec position", "future", False),
        ("ec position", "neighbours", True),
        ("ec sequence", "future", True),
        ("ec sequence", "neighbours", False),
        # Top-1 in order of arrival: the first sequence is served first ...
        ("switch", "neighbours", False),
        # ... but the second is dropped for the first one's future.
        ("switch", "future", True),
        ("hash", "future", True),
        ("k-means", "future", True),
        # These judge each token alone already in evaluation.
        ("linear assignment", "neighbours", False),
        ("expert threshold", "future", False),
        ("expert threshold", "neighbours", False),
    ],
)
def test_as_trained_who_sees_what(arm, change, leaks):
    flips, largest = difference(model_of(**ARMS[arm]), change)
    if leaks:
        assert flips > 10 and largest > 1e-3
    else:
        assert flips == 0 and largest < 1e-12


@pytest.mark.parametrize(
    "router", [ExpertChoice(D, E), ExpertThreshold(D, E), KMeans(D, E), TokenChoice(D, E, 2, 1.0, balance="bias")]
)
def test_running_statistics_take_in_training_batches_as_they_are_trained_and_nothing_routed_causally(router):
    x = torch.randn(16, D, generator=generator(0))
    first = None
    for again in (False, True):
        router.causal = again
        router.assign(router.read(x)[0])
        state = {name: value.clone() for name, value in router.state_dict().items()}
        assert first is None or all(torch.equal(state[name], value) for name, value in first.items())
        first = state
    router.causal = False
    router.assign(router.read(x)[0])
    assert any(not torch.equal(value, first[name]) for name, value in router.state_dict().items())
