"""Two ranks move running statistics, and fill pools, as one process that saw both batches."""

import pytest
import torch

from ecmoe.routing import ExpertChoice, ExpertThreshold, KMeans, TokenChoice, ranks

D, E = 3, 4
ROUTERS = {
    "k-means": (lambda: KMeans(D, E), ("centroids", "sums", "counts")),
    "loss-free bias": (lambda: TokenChoice(D, E, 1, balance="bias", bias_rate=0.5), ("bias",)),
    "expert threshold": (lambda: ExpertThreshold(D, E, 1.0), ("cutoff.average", "cutoff.weight", "steps")),
}
STEPS = torch.randn(3, 2, 16, D, generator=torch.Generator().manual_seed(0))  # two ranks' batches of each step


def moved(name: str, batches) -> dict[str, list]:
    """The statistics of a router after steps that see these batches each."""
    make, statistics = ROUTERS[name]
    torch.manual_seed(0)
    router = make()
    for step in batches:
        for x in step:
            router.assign(router.logits(x))
        router.end_step()
    return {key: router.state_dict()[key].tolist() for key in statistics}


POOLS = {
    "batch": {},
    "capped": {"max_experts_per_token": 2},
    "position": {"pool": "position", "capacity_factor": 1.0},
    "renormalized": {"gate": "renormalized"},
}
OWN = ("rank", "sequence", 8)
LOGITS = torch.randn(
    2, 2, 3 * 8, E, generator=torch.Generator().manual_seed(1), dtype=torch.float64
)  # batches of ranks
MASK = torch.rand(2, 2, 3 * 8, generator=torch.Generator().manual_seed(2)) > 0.3


def chosen(logits: torch.Tensor, mask: torch.Tensor, **keys) -> dict[str, list]:
    """Combine weights, their gradients, and the cut-offs after steps that see these batches each; without padding and with."""
    router = ExpertChoice(D, E, **{"rounding": "down"} | keys)
    logits = logits.clone().requires_grad_()
    weights = [
        router.assign(x, batch_shape=(len(x) // 8, 8), mask=m).dense(len(x))
        for step in zip(logits, mask, strict=True)
        for x, m in [(step[0], None), step]
    ]
    (torch.stack(weights) * torch.arange(1, E + 1)).square().sum().backward()
    router.end_step()
    return {
        "weights": torch.stack(weights).tolist(),
        "gradients": logits.grad.tolist(),
        "cutoffs": router.cutoff.average.tolist(),
    }


@pytest.fixture(scope="module")
def by_rank(two_ranks):
    def work(rank: int) -> dict[str, dict]:
        found = {name: moved(name, STEPS[:, rank : rank + 1]) for name in ROUTERS}
        found |= {name: chosen(LOGITS[:, rank], MASK[:, rank], **keys) for name, keys in POOLS.items()}
        return found | {pool: chosen(LOGITS[:, rank], MASK[:, rank], pool=pool) for pool in OWN}

    return two_ranks(work)


@pytest.mark.parametrize("luckiest", [0, 1])
@pytest.mark.parametrize(("m", "k", "most", "slots"), [(400, 300, 150, 256), (400, 120, 90, 120), (100, 130, 90, 100)])
def test_a_rank_keeps_all_that_it_won(monkeypatch, luckiest, m, k, most, slots):
    """Of m tokens a rank, as many slots as the luckiest of them won of an expert, in whole tiles; no more than k, or m."""
    draw, rows = torch.Generator().manual_seed(0), []
    for won in ((most, 25), (10, 80)):  # of two experts; some of their k places are empty
        own = [
            rank * m + torch.randperm(m, generator=draw)[:count] for rank, count in enumerate(won[:: 1 - 2 * luckiest])
        ]
        places = torch.cat([*own, torch.full((k - sum(won),), 2 * m)])
        rows.append(places[torch.randperm(k, generator=draw)])
    monkeypatch.setattr(ranks, "ranks", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(ranks.dist, "get_rank", lambda rank=rank: rank)
        found = ranks.own(torch.stack(rows)[None], m)[0]
        mine = [[place - rank * m for place in row.tolist() if place // m == rank] for row in rows]
        assert found.tolist() == [places + [m] * (slots - len(places)) for places in mine]


@pytest.mark.parametrize("name", ROUTERS)
def test_two_ranks_are_one_process(by_rank, name):
    assert by_rank[0][name] == by_rank[1][name]
    for key, value in moved(name, STEPS).items():
        torch.testing.assert_close(torch.tensor(by_rank[0][name][key]), torch.tensor(value))


@pytest.mark.parametrize("name", POOLS)
def test_tokens_of_two_ranks_compete_as_those_of_one_process(by_rank, name):
    one = chosen(LOGITS.flatten(1, 2), MASK.flatten(1, 2), **POOLS[name])
    for key in ("weights", "gradients"):
        both = [a + b for a, b in zip(by_rank[0][name][key], by_rank[1][name][key], strict=True)]
        assert both == one[key]
    assert by_rank[0][name]["cutoffs"] == by_rank[1][name]["cutoffs"] == one["cutoffs"]


def test_a_pool_of_a_rank_is_its_own_batch(by_rank):
    for rank in (0, 1):
        for pool in OWN:
            alone = chosen(LOGITS[:, rank], MASK[:, rank], pool=pool)
            assert by_rank[rank][pool]["weights"] == alone["weights"] != by_rank[rank]["batch"]["weights"]
