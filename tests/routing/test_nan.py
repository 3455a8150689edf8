"""NaN and nothing: padding reaches nothing, a NaN token stays in no statistic, and no input at all is no error."""

import pytest
import torch

from ecmoe import MoE
from ecmoe.config import RunConfig
from ecmoe.routers import ROUTERS
from ecmoe.routing import ExpertChoice, ExpertThreshold, KMeans, LinearAssignment, build_router
from ecmoe.routing.capped import capped_top_k
from tests.routing.problems import random_logits

D, E, B, T = 8, 4, 2, 8
NAMES = [name for name, row in ROUTERS.items() if row.layer is not None]
CONFIGS = {name: {"router": name} for name in NAMES} | {
    "capped": {"max_experts_per_token": 2},
    "renormalized": {"gate": "renormalized"},
    "pool sequence": {"pool": "sequence"},
    "importance and load": {"router": "token_choice", "balance": "importance_load", "z_loss_weight": 0.1},
    "first choice": {"router": "token_choice", "balance": "first_choice", "gate": "renormalized"},
}


def layer(name: str) -> MoE:
    torch.manual_seed(0)
    keys = {"d_model": D, "heads": 2, "num_experts": E, "batch_size": B, "sequence_length": T, "capacity_factor": 2.0}
    return MoE(build_router(RunConfig(**keys | CONFIGS[name])), D, 16)


def passed(moe: MoE, x: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    """Output, loss and gradients of a training pass."""
    torch.manual_seed(1)  # V-MoE's noise
    x = x.clone().requires_grad_()
    ids = torch.arange(B * T).view(B, T) % 4
    out = moe(x, token_ids=ids, task_ids=ids, mask=mask)
    loss = out.square().sum() + (0.0 if moe.aux_loss is None else moe.aux_loss)
    loss.backward()
    return [out.detach(), loss.detach(), x.grad, *(p.grad for p in moe.parameters() if p.grad is not None)]


@pytest.mark.parametrize("name", CONFIGS)
def test_all_padding_gives_zeros_and_a_finite_loss(name):
    moe = layer(name)
    out, loss, *gradients = passed(moe, torch.full((B, T, D), torch.nan), torch.zeros(B, T, dtype=torch.bool))
    assert not out.any() and loss.isfinite() and all(not g.any() for g in gradients)
    moe.router.end_step()
    assert all(b.isfinite().all() for b in moe.buffers())


@pytest.mark.parametrize("name", CONFIGS)
def test_what_padding_holds_changes_nothing(name):
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[0, 5:] = mask[1, 1:3] = False
    x = torch.randn(B, T, D, generator=torch.Generator().manual_seed(0))
    results = [passed(layer(name), x.masked_fill(~mask[..., None], held), mask) for held in (0.0, torch.nan)]
    for zeros, nans in zip(*results, strict=True):
        assert torch.equal(zeros, nans)


@pytest.mark.parametrize("name", CONFIGS)
def test_scores_of_padding_change_no_choice_and_no_gradient(name):
    router, logits, mask = layer(name).router, random_logits(B * T, E, 0), torch.arange(B * T) % 5 > 0
    ids, dense, gradients = torch.arange(B * T) % 4, [], []
    for held in (0.0, torch.nan):
        torch.manual_seed(1)
        padded = logits.masked_fill(~mask[:, None], held).requires_grad_()
        chosen = router.assign(padded, batch_shape=(B, T), token_ids=ids, task_ids=ids, mask=mask)
        dense.append(chosen.dense(B * T))
        loss = 0 * padded[1].sum() + dense[-1].square().sum() + (0.0 if chosen.aux_loss is None else chosen.aux_loss)
        loss.backward()
        gradients.append(padded.grad)
    assert torch.equal(*dense) and torch.equal(*gradients) and not gradients[0][~mask].any()


@pytest.mark.parametrize(
    "router", [ExpertChoice(D, E), ExpertThreshold(D, E), KMeans(D, E)], ids=lambda r: type(r).__name__
)
def test_a_nan_token_stays_in_no_statistic(router):
    def step(seed: int, wrong: bool = False) -> dict[str, torch.Tensor]:
        x = torch.randn(16, D, generator=torch.Generator().manual_seed(seed))
        if wrong:
            x[3, 2] = torch.nan  # one number of it: sums of the others' are finite
        router.assign(router.logits(x))
        router.end_step()
        return {name: value.clone() for name, value in router.state_dict().items()}

    step(0)
    after, later = step(1, wrong=True), step(2)
    assert all(value.isfinite().all() for value in after.values())
    moved = "centroids" if isinstance(router, KMeans) else "cutoff.average"
    assert later[moved].isfinite().all() and not torch.equal(later[moved], after[moved])


@pytest.mark.parametrize("solver", ["feasible", "dykstra"])
def test_a_nan_score_breaks_no_cap(solver):
    S = random_logits(64, 8, 0).softmax(1).T[None].clone()
    S[0, :, 5] = torch.nan
    _, I = capped_top_k(S, 16, 2, solver=solver)
    taken = I.flatten().bincount(minlength=64)
    assert (taken <= 2).all() or solver == "dykstra"  # the paper's is cut off early
    assert all(len(set(row)) == 16 for row in I[0].tolist())
    G, _ = capped_top_k(S.nan_to_num(0.0), 16, 2, solver=solver)
    assert G.isfinite().all()
    assert not (capped_top_k(S, 8, 2, solver=solver)[1] == 5).any()  # last of all
    G, I = capped_top_k(S, 56, 7, solver=solver)  # nearly all are chosen
    assert torch.equal(G.isnan(), I == 5) and (I == 5).any()


def test_a_nan_token_leaves_the_others_balanced():
    logits = random_logits(16, 4, 0)
    logits[2] = torch.nan
    assert LinearAssignment(D, 4).assign(logits).load(16).tolist() == [4] * 4


def test_causally_no_expert_takes_a_nan_token():
    router, logits = ExpertChoice(D, E), random_logits(8, E, 0)
    router.assign(logits)
    router.end_step()
    router.causal = True
    logits[1] = torch.nan
    assert router.assign(logits).experts_per_token(8)[1] == 0
