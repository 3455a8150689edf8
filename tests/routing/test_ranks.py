"""Two ranks move running statistics as one process that saw both batches."""

import multiprocessing
import socket

import pytest
import torch

from ecmoe.routing import ExpertThreshold, KMeans, TokenChoice

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


def _rank(rank: int, port: int, results) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    results.put({name: moved(name, STEPS[:, rank : rank + 1]) for name in ROUTERS})
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def by_rank():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    ranks = [context.Process(target=_rank, args=(rank, port, results)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    found = [results.get(timeout=60) for _ in ranks]
    for rank in ranks:
        rank.join(timeout=60)
    return found


@pytest.mark.parametrize("name", ROUTERS)
def test_two_ranks_are_one_process(by_rank, name):
    assert by_rank[0][name] == by_rank[1][name]
    for key, value in moved(name, STEPS).items():
        torch.testing.assert_close(torch.tensor(by_rank[0][name][key]), torch.tensor(value))
