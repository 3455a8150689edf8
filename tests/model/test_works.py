"""What works with `MoE` in a model of one's own: a test for each row of README's table."""

import copy
import math

import pytest
import torch
import torch._dynamo.testing
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from ecmoe import MoE, causal_routing, load_model, run_or_load, track
from ecmoe.config import ConfigError
from ecmoe.routing import ExpertChoice, ExpertThreshold, TokenChoice

D, E, FF = 8, 4, 16


def expert_choice(**keys):
    return ExpertChoice(D, E, 2.0, rounding="down", **keys)


ROUTERS = {"expert choice": expert_choice, "token choice": lambda: TokenChoice(D, E, 2, 1.0)}


def layer(router=expert_choice) -> MoE:
    torch.manual_seed(0)
    return MoE(router(), D, FF)


def tokens(*shape, seed=0):
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(seed))


# Any shape


@pytest.mark.parametrize("shape", [(7,), (1,), (0,), (3, 5), (1, 1), (2, 0), (0, 4)])
@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)
def test_any_shape(router, shape):
    moe, x = layer(router), tokens(*shape).requires_grad_()
    out = moe(x)
    assert out.shape == x.shape
    loss = out.square().sum() + (0.0 if moe.aux_loss is None else moe.aux_loss)
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in moe.parameters())
    assert moe.tokens == math.prod(shape) and moe.load.sum() <= moe.demand.sum()
    assert all(value.isfinite() == (moe.tokens > 0) for value in moe.statistics().values())
    if len(shape) == 2:  # the pool is the batch: sequences don't matter
        torch.testing.assert_close(moe(x.flatten(0, 1)).view_as(out), out)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 16])
def test_rounding_down_takes_the_floor_and_at_least_one(n):
    chosen = ExpertChoice(D, E, 1.0, rounding="down").assign(tokens(n)[:, :E])
    assert chosen.load(n).tolist() == [max(1, n // E)] * E
    capped = ExpertChoice(D, E, 1.0, 1, rounding="down").assign(tokens(n)[:, :E])
    assert capped.load(n).tolist() == [n // E] * E  # a token goes to one expert at most
    if n % E:
        with pytest.raises(ConfigError, match="isn't a whole number|must lie in"):
            ExpertChoice(D, E, 1.0).eval().assign(tokens(n)[:, :E])


@pytest.mark.parametrize("cap", [None, 1, 3])
def test_rounding_down_with_a_mask_routes_the_others_alone(cap):
    router = ExpertChoice(D, E, 1.0, cap, rounding="down")
    logits, place = tokens(13)[:, :E], torch.randperm(13)
    for valid in range(14):  # also fewer than one a expert
        mask = place < valid
        masked = router.assign(logits, mask=mask).dense(13)
        torch.testing.assert_close(masked[mask], router.assign(logits[mask]).dense(valid))
        assert not masked[~mask].any()


def test_a_loaded_run_takes_any_length(tiny_config):
    model = load_model(run_or_load(tiny_config(steps=2, eval_every=2), progress=False).path)
    ids = torch.arange(14).view(2, 7)
    assert model(ids[:, :7]).shape == (2, 7, 256) and model(ids[:1, :1]).isfinite().all()
    with pytest.raises(ConfigError, match="isn't a whole number"):  # a study doesn't round
        run_or_load(tiny_config(sequence_length=15, batch_size=1), progress=False)


# PyTorch's tools


@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)
def test_compiles_once_for_all_lengths(router):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    moe = layer(router)
    compiled = torch.compile(moe, backend=counter, fullgraph=True, dynamic=True)
    for B, T in [(2, 8), (3, 5), (4, 7), (5, 11)]:
        x = tokens(B, T)
        torch.testing.assert_close(compiled(x), moe(x))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("router", [lambda: ExpertChoice(D, E), lambda: ExpertThreshold(D, E)])
def test_a_router_that_does_not_round_compiles_for_other_lengths(router):
    torch._dynamo.reset()
    moe = layer(router)
    compiled = torch.compile(moe, backend="eager", fullgraph=True)
    for T in (8, 12):  # the second length makes it a variable
        torch.testing.assert_close(compiled(tokens(2, T)), moe(tokens(2, T)))


@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)
def test_exports_with_dynamic_dimensions(router):
    moe = layer(router).eval()
    sizes = {"x": {0: torch.export.Dim("B", min=2, max=64), 1: torch.export.Dim("T", min=2, max=512)}}
    exported = torch.export.export(moe, (tokens(3, 8),), dynamic_shapes=sizes).module()
    for B, T in [(3, 8), (2, 5), (7, 9)]:
        torch.testing.assert_close(exported(tokens(B, T)), moe(tokens(B, T)))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)
def test_checkpointing_changes_no_gradient_not_even_the_aux_loss(router, reentrant):
    gradients = []
    for again in (False, True):
        moe, x = layer(router), tokens(2, 8).requires_grad_()
        out = checkpoint(moe, x, use_reentrant=reentrant) if again else moe(x)
        loss = out.square().sum()
        if moe.aux_loss is not None:
            loss = loss + 3 * moe.aux_loss
        loss.backward()
        gradients.append([x.grad, *(p.grad for p in moe.parameters()), *(b.double() for b in moe.buffers())])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_bf16_learns_and_keeps_its_statistics_in_float32():
    moe = layer().bfloat16()
    optimizer = torch.optim.SGD(moe.parameters(), lr=0.1)
    track(moe, optimizer)
    x = tokens(4, 8).bfloat16()
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = (moe(x) - x).float().square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and moe.router.cutoff.average.dtype == torch.float32
    assert moe.router.cutoff.weight > 0.04


def test_copies_and_state_dicts_carry_the_cutoffs():
    moe, x = layer(), tokens(4, 8)
    moe(x)
    moe.router.end_step()
    loaded = layer()
    loaded.load_state_dict(moe.state_dict())
    with causal_routing(moe):
        expected = moe.eval()(x)
    for other in (copy.deepcopy(moe), loaded.eval()):
        with causal_routing(other):
            assert torch.equal(other(x), expected)


def two_layers() -> nn.Module:
    moe = layer()
    return nn.Sequential(nn.Linear(D, D), moe)


def test_two_ranks_by_ddp_and_by_fsdp2_step_as_one_process_over_both_halves(two_ranks):
    def work(rank: int) -> list:
        """This half of a batch, by DDP and by FSDP2: the weights and the cut-offs after a step."""
        found = []
        for shard in (False, True):
            model = two_layers()
            if shard:
                model = fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (2,)))
                wrapped = model
            else:
                wrapped = DistributedDataParallel(model, broadcast_buffers=False)
            optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
            track(model, optimizer)
            wrapped(tokens(4, 8).chunk(2)[rank]).square().mean().backward()
            optimizer.step()
            whole = [p.full_tensor() if shard else p for p in model.parameters()]
            found.append([t.detach().tolist() for t in (*whole, model[1].router.cutoff.value())])
        return found

    model = two_layers()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    track(model, optimizer)
    model(tokens(4, 8)).square().mean().backward()
    optimizer.step()
    expected = [*model.parameters(), model[1].router.cutoff.value()]
    for by_rank in two_ranks(work):
        for by_way in by_rank:
            for value, wanted in zip(by_way, expected, strict=True):
                torch.testing.assert_close(torch.tensor(value), wanted.detach())
