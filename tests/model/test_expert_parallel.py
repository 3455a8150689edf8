"""Experts shared out to two ranks compute what one process does that holds all of them."""

import os
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from ecmoe import MoE, causal_routing
from ecmoe.config import ConfigError
from ecmoe.model import expert_parallel
from ecmoe.model import moe as moe_module
from ecmoe.model.expert_parallel import _Sent, share_experts
from ecmoe.routing import ExpertChoice, Hash, TokenChoice

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
D, E, FF, V = 5, 8, 16, 11  # a rank has more experts than there are ranks
ROUTERS = {
    "expert choice": lambda: ExpertChoice(D, E, 2.0),
    "of a rank's pool": lambda: ExpertChoice(D, E, 2.0, pool="rank"),
    "token choice, dropping": lambda: TokenChoice(D, E, 2, 1.0),
    "token choice, all kept": lambda: TokenChoice(D, E, 2),
    "hash": lambda: Hash(D, E, V),
}
X = torch.randn(4, 12, D, generator=torch.Generator().manual_seed(0))
IDS = torch.randint(V, (4, 12), generator=torch.Generator().manual_seed(0))


def layer(name: str, kernels: str = "plain") -> MoE:
    torch.manual_seed(0)
    return MoE(ROUTERS[name](), D, FF, kernels=kernels)


def stepped(moe: MoE, x: torch.Tensor, ids: torch.Tensor) -> dict:
    """Outputs in training, in evaluation and routed causally; gradients of the input and the weights."""
    x = x.clone().requires_grad_()
    out = moe(x, ids)
    (out * torch.arange(1.0, D + 1)).square().mean().backward()
    whole = [w.grad.full_tensor() if hasattr(w.grad, "full_tensor") else w.grad for w in (moe.w1, moe.w2)]
    router = moe.router.weight if moe.router.weight is None else moe.router.weight.grad
    moe.router.end_step()
    moe.eval()
    with torch.no_grad():
        evaluated = moe(x, ids)
        with causal_routing(moe):
            causal = moe(x, ids)
    found = {
        "out": out,
        "dx": x.grad,
        "evaluated": evaluated,
        "causal": causal,
        "w1": whole[0],
        "w2": whole[1],
        "router": router,
    }
    return {key: None if t is None else t.detach().tolist() for key, t in found.items()}


def trained(x: torch.Tensor, mesh: dist.device_mesh.DeviceMesh | None = None) -> list:
    """The weights after a step, with clipped gradients; on a mesh as README has it: experts by expert, all else by FSDP2."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, D), layer("expert choice"))
    if mesh:
        experts = share_experts(model, mesh, torch.device("cpu"))
        fully_shard(model, mesh=mesh, ignored_params=experts)
    model(x).square().mean().backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    weights = [norm, *model.parameters()]
    return [(w.full_tensor() if hasattr(w, "full_tensor") else w).tolist() for w in weights]


@pytest.fixture(scope="module")
def by_rank(two_ranks):
    def work(rank: int) -> dict:
        mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
        found = {"trained": trained(X.chunk(2)[rank], mesh)}
        for name in ROUTERS:
            moe = layer(name)
            assert len(share_experts(moe, mesh, torch.device("cpu"))) == 2
            own = moe.w1.to_local()
            assert (
                own.shape == (E // 2, D, FF) and own.untyped_storage().nbytes() == own.nbytes
            )  # nothing of the others
            found[name] = stepped(moe, X.chunk(2)[rank], IDS.chunk(2)[rank])
        if INTERPRETED:
            moe = layer("of a rank's pool", kernels="triton")
            share_experts(moe, mesh, torch.device("cpu"))
            found["by kernels"] = stepped(moe, X.chunk(2)[rank], IDS.chunk(2)[rank])
        # Without gradients as few slots at a time as there is room for, here one a token.
        moe_module.HELD, moe_module.SLOTS, widths, some = 0, 1, [], expert_parallel._some_slots
        expert_parallel._some_slots = lambda *given: widths.append(given[-1].shape[1]) or some(*given)
        moe = layer("token choice, all kept").eval()
        share_experts(moe, mesh, torch.device("cpu"))
        with torch.no_grad():
            found["in parts"] = moe(X.chunk(2)[rank], IDS.chunk(2)[rank]).tolist()
        return found | {"widths": widths}

    return two_ranks(work)


@pytest.mark.parametrize("name", ROUTERS)
def test_two_ranks_are_one_process(by_rank, name):
    ranks = [by_rank[rank][name] for rank in (0, 1)]
    parts = 1 if name == "expert choice" else 2  # there the tokens of both compete
    halves = [stepped(layer(name), x, ids) for x, ids in zip(X.chunk(parts), IDS.chunk(parts), strict=True)]
    for key in ("out", "evaluated", "dx"):
        ours = torch.cat([torch.tensor(rank[key]) for rank in ranks])
        wanted = torch.cat([torch.tensor(half[key]) for half in halves])
        scale = 2 if key == "dx" and len(halves) == 1 else 1  # a rank's loss is the mean over half as many tokens
        torch.testing.assert_close(ours, wanted * scale)
    for key in ("w1", "w2"):
        wanted = sum(torch.tensor(half[key]) for half in halves) / len(halves)
        for rank in ranks:
            torch.testing.assert_close(torch.tensor(rank[key]), wanted)
    if halves[0]["router"] is not None:
        ours = sum(torch.tensor(rank["router"]) for rank in ranks) / 2  # as data parallelism puts them together
        torch.testing.assert_close(ours, sum(torch.tensor(half["router"]) for half in halves) / len(halves))
    if len(halves) == 1:
        torch.testing.assert_close(
            torch.cat([torch.tensor(r["causal"]) for r in ranks]), torch.tensor(halves[0]["causal"])
        )


def test_a_step_with_fsdp2_for_the_other_weights_is_that_of_one_process(by_rank):
    norm, *weights = trained(X)
    assert norm > 0.01  # so that clipping it changes the step
    for rank in by_rank:
        for ours, wanted in zip(rank["trained"], [norm, *weights], strict=True):
            torch.testing.assert_close(torch.tensor(ours), torch.tensor(wanted))


def test_slots_are_sent_as_far_as_there_is_room(by_rank):
    for rank in by_rank:
        assert max(rank["widths"]) == 2 * 12 // E < sum(rank["widths"])
        torch.testing.assert_close(
            torch.tensor(rank["in parts"]), torch.tensor(rank["token choice, all kept"]["evaluated"])
        )


@pytest.mark.skipif(not INTERPRETED, reason="kernels take no tensor on a CPU here")
def test_kernels_compute_the_same(by_rank):
    for rank in by_rank:
        for key, value in rank["by kernels"].items():
            torch.testing.assert_close(torch.tensor(value), torch.tensor(rank["of a rank's pool"][key]))


def test_a_second_derivative_is_refused_not_wrong():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        x = torch.randn(4, requires_grad=True)
        (slope,) = torch.autograd.grad((_Sent.apply(x * x, dist.group.WORLD, 0.5) ** 2).sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            slope.sum().backward()
    finally:
        dist.destroy_process_group()


def test_experts_that_cannot_be_shared_out_evenly_are_named_before_any_rank_waits():
    model, mesh = nn.Sequential(layer("hash")), SimpleNamespace(size=lambda: 3)
    with pytest.raises(ConfigError, match="num_experts=8: must be a multiple of the 3 ranks"):
        share_experts(model, mesh, torch.device("cpu"))
    assert model[0].w1.shape[0] == E and model[0].exchange is None
