"""K-means routing against plain numpy, its fixed point against scikit-learn, and when its state may move."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.cluster import KMeans as SklearnKMeans
from torch.utils.checkpoint import checkpoint

from ecmoe import MoE, causal_routing
from ecmoe.config import RunConfig
from ecmoe.routing import KMeans, build_router
from tests.routing.problems import alone, check, generator, problems, same_choice, two_hundred

D, E = 3, 4


def tokens(n: int, seed: int = 0, d: int = D) -> torch.Tensor:
    return torch.randn(n, d, generator=generator(seed))


def state(router) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in router.state_dict().items()}


def same_state(a: dict, b: dict) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


@two_hundred
@given(problems(), st.sampled_from([None, 0.5, 1, 1.25]))
def test_200_problems(problem, factor):
    n, e = problem.logits.shape
    x = torch.randn(n, D, generator=generator(n), dtype=torch.float64)
    router = KMeans(D, e, factor)
    chosen = router.assign(router.logits(x), mask=problem.mask)
    check(chosen, problem)

    centroids, seen = router.centroids.double().numpy(), x[problem.valid].numpy()
    capacity = n if factor is None else math.ceil(Fraction(str(factor)) * len(seen) / e)
    expected, held = torch.zeros(len(seen), e, dtype=torch.float64), [0] * e
    for place, token in enumerate(seen):  # the nearest centroid, while it has room
        i = int(np.argmin([np.linalg.norm(token - c) for c in centroids]))
        expected[place, i] = held[i] < capacity
        held[i] += 1
    same_choice(alone(chosen, problem), expected)
    assert chosen.demand.tolist() == held  # kept + dropped = all
    with causal_routing(router):  # nothing is dropped
        free = router.assign(router.logits(x), mask=problem.mask)
    assert (free.experts_per_token(n) == problem.valid).all()


def loop_of_online_k_means(steps: list[torch.Tensor], centroids: np.ndarray, beta: float):
    """Sums and counts of each cell, averaged exponentially over the steps; a centroid is their ratio."""
    centroids = centroids.astype(float)
    sums, counts = np.zeros_like(centroids), np.zeros(len(centroids))
    for x in steps:
        x = x.double().numpy()
        cell = np.array([np.argmin(((t - centroids) ** 2).sum(1)) for t in x])
        for i in range(len(centroids)):
            sums[i] = beta * sums[i] + (1 - beta) * x[cell == i].sum(0)
            counts[i] = beta * counts[i] + (1 - beta) * (cell == i).sum()
        centroids = np.where(counts[:, None] > 0, sums / np.maximum(counts, 1e-9)[:, None], centroids)
    return centroids


@pytest.mark.parametrize("beta", [0.0, 0.9])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_centroids_move_once_a_step_also_under_accumulation(beta, micro_batches):
    router = KMeans(D, E, beta=beta)
    steps = [tokens(24, seed) for seed in range(5)]
    expected = loop_of_online_k_means(steps, router.centroids.numpy(), beta)
    for x in steps:
        before = router.centroids.clone()
        for part in x.chunk(micro_batches):
            router.assign(router.logits(part))
        assert torch.equal(router.centroids, before)  # within a step the cells stay
        router.end_step()
    torch.testing.assert_close(router.centroids, torch.from_numpy(expected).float())
    assert not torch.equal(router.centroids, KMeans(D, E).centroids)


def test_full_batches_come_to_rest_where_scikit_learn_does():
    x = torch.cat([tokens(50, i) + 8 * torch.eye(E)[i, :D] for i in range(E)])
    router = KMeans(D, E, beta=0.0)
    start = router.centroids.numpy().copy()
    for _ in range(50):
        router.assign(router.logits(x))
        router.end_step()
    lloyd = SklearnKMeans(E, init=start, n_init=1, algorithm="lloyd", tol=0).fit(x.numpy())
    np.testing.assert_allclose(router.centroids.numpy(), lloyd.cluster_centers_, atol=1e-4)
    cells = router.eval().assign(router.logits(x)).dense(len(x)).argmax(1)
    assert cells.tolist() == lloyd.labels_.tolist()


def test_an_empty_cell_stays_and_a_step_without_tokens_moves_nothing():
    router = KMeans(D, E)
    far = 100 * router.centroids[:1].clone()
    before = router.centroids.clone()
    router.assign(router.logits(far.repeat(5, 1)))
    router.end_step()
    moved = (router.centroids != before).any(1)
    assert moved.sum() == 1
    after = state(router)
    router.end_step()
    assert same_state(state(router), after)


def test_padding_moves_no_centroid():
    x, mask = tokens(20), torch.arange(20) % 3 > 0
    masked, alone = KMeans(D, E), KMeans(D, E)
    masked.assign(masked.logits(x), mask=mask)
    alone.assign(alone.logits(x[mask]))
    for router in (masked, alone):
        router.end_step()
    torch.testing.assert_close(masked.centroids, alone.centroids)


def test_state_survives_a_checkpoint_in_the_middle_of_a_step():
    router = KMeans(D, E)
    for seed in range(3):
        router.assign(router.logits(tokens(16, seed)))
        router.end_step()
    router.assign(router.logits(tokens(16, 3)))
    loaded = KMeans(D, E, seed=1)
    loaded.load_state_dict(router.state_dict())
    for r in (router, loaded):
        r.assign(r.logits(tokens(16, 4)))
        r.end_step()
    assert same_state(state(loaded), state(router))
    x = tokens(16, 5)
    assert torch.equal(loaded.assign(loaded.logits(x)).token, router.assign(router.logits(x)).token)


def test_evaluation_moves_nothing():
    router = KMeans(D, E).eval()
    before = state(router)
    router.assign(router.logits(tokens(16)))
    router.train().end_step()
    assert same_state(state(router), before)


@pytest.mark.parametrize("whole_layer", [True, False])
def test_recomputation_counts_no_token_twice(whole_layer):
    torch.manual_seed(0)
    moe = MoE(KMeans(D, E), D, 5, recompute=not whole_layer)
    x = tokens(16).view(2, 8, D).requires_grad_()
    out = checkpoint(moe, x, use_reentrant=False) if whole_layer else moe(x)
    out.square().sum().backward()
    assert moe.router.pending_counts.sum() == 16
    assert x.grad.abs().sum() > 0


def test_no_gradient_passes_through_the_choice():
    torch.manual_seed(0)
    moe = MoE(KMeans(D, E), D, 5)
    assert list(moe.router.parameters()) == []
    logits = moe.router.logits(tokens(6).requires_grad_())
    assert not logits.requires_grad
    assert logits.dtype == torch.float32 and moe.router.logits(tokens(6).bfloat16()).dtype == torch.float32


def test_scores_are_the_distances_and_each_token_that_was_read_counts_once():
    router, x = KMeans(64, 32), tokens(6, d=64)
    assert router.centroids.std().item() == pytest.approx(0.1, rel=0.05)  # small: they split by direction
    with torch.autocast("cpu", torch.bfloat16):
        logits = router.logits(x)
    distances = [[sum((x[t] - c) ** 2).item() for c in router.centroids] for t in range(6)]
    torch.testing.assert_close(logits, -torch.tensor(distances), rtol=1e-4, atol=1e-4)
    router.assign(torch.zeros(5, 32))  # of other tokens
    router.logits(x)
    for _ in range(2):
        router.assign(logits)
    assert router.pending_counts.sum() == 6


def test_seed_decides_where_the_clusters_start():
    assert torch.equal(KMeans(D, E, seed=3).centroids, KMeans(D, E, seed=3).centroids)
    assert not torch.equal(KMeans(D, E, seed=3).centroids, KMeans(D, E, seed=4).centroids)
    with pytest.raises(ValueError, match="beta=1.0.*below 1"):
        KMeans(D, E, beta=1.0)


def test_a_cast_to_16_bits_leaves_the_clusters_what_they_are():
    narrow, wide = KMeans(D, E).to(torch.bfloat16), KMeans(D, E)
    for seed in range(3):
        for router in (narrow, wide):
            router.assign(router.logits(tokens(64, seed)))
            router.end_step()
    assert same_state(state(narrow), state(wide)) and narrow.centroids.dtype == torch.float32


def test_the_first_centroids_follow_from_the_seed_of_a_run():
    first, again, other = (build_router(RunConfig(router="kmeans", seed=seed)).centroids for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
