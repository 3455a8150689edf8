"""Losses that balance token choice, against their papers' formulas in numpy and scipy."""

import numpy as np
import pytest
import torch
from scipy.stats import norm

from ecmoe.routing import TokenChoice
from ecmoe.routing.balance import importance_loss, load_loss, switch_loss, z_loss
from tests.routing.problems import generator, random_logits

D, E, N = 3, 4, 24
LOGITS = random_logits(N, E, 0, bias=1)
MASK = torch.rand(N, generator=generator(1)) < 0.7


def test_switch_loss_by_hand():
    # f = (3/4, 1/4); P = (0.5, 0.5) -> 2 (0.375 + 0.125) = 1. P = (0.7, 0.3) -> 2 (0.525 + 0.075) = 1.2.
    demand = torch.tensor([3, 1])
    assert switch_loss(torch.full((4, 2), 0.5), demand).item() == pytest.approx(1)
    assert switch_loss(torch.tensor([[0.7, 0.3]] * 4), demand).item() == pytest.approx(1.2)


def test_switch_loss_is_1_if_uniform_and_e_if_collapsed():
    assert switch_loss(torch.full((8, 4), 0.25), torch.tensor([2, 2, 2, 2])).item() == pytest.approx(1)
    assert switch_loss(torch.eye(4)[[0] * 8], torch.tensor([8, 0, 0, 0])).item() == pytest.approx(4)


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_switch_loss_counts_the_requests_that_were_routed(top_k, masked):
    """GShard's l_aux over all top_k choices before capacity; padding in neither factor."""
    router = TokenChoice(D, E, top_k, 0.5, aux_loss_weight=0.3)
    chosen = router.assign(LOGITS, mask=MASK if masked else None)
    x = (LOGITS[MASK] if masked else LOGITS).numpy()
    S = np.exp(x) / np.exp(x).sum(1, keepdims=True)
    f = np.bincount(np.argsort(-S, 1)[:, :top_k].ravel(), minlength=E) / (len(x) * top_k)
    assert chosen.aux_loss.item() == pytest.approx(0.3 * E * (f * S.mean(0)).sum())


@pytest.mark.parametrize("masked", [False, True])
def test_gshards_loss_counts_first_choices(masked):
    """Lepikhin et al. 2021, Algorithm 1: c_e is counted where the first expert is dispatched, top-2 or not."""
    router = TokenChoice(D, E, 2, 0.5, aux_loss_weight=0.3, balance="first_choice")
    chosen = router.assign(LOGITS, mask=MASK if masked else None)
    x = (LOGITS[MASK] if masked else LOGITS).numpy()
    S = np.exp(x) / np.exp(x).sum(1, keepdims=True)
    f = np.bincount(S.argmax(1), minlength=E) / len(x)
    assert chosen.aux_loss.item() == pytest.approx(0.3 * E * (f * S.mean(0)).sum())


def test_importance_loss_is_the_squared_coefficient_of_variation():
    S = LOGITS.softmax(1)
    total = S.numpy().sum(0)
    assert importance_loss(S).item() == pytest.approx((total.std() / total.mean()) ** 2)
    assert importance_loss(torch.full((8, 4), 0.25)).item() == 0


def v_moes_load_loss(clean: np.ndarray, noisy: np.ndarray, top_k: int) -> float:
    """Riquelme et al. 2021, Eq. 10 to 14: the chance that new noise of 1/e lifts a logit over the threshold."""
    load = np.zeros(E)
    for x, y in zip(clean, noisy, strict=True):
        load += 1 - norm.cdf(np.sort(y)[-top_k] - x, scale=1 / E)
    return (load.std() / load.mean()) ** 2


def test_load_loss_is_v_moes():
    noisy = LOGITS + torch.randn(N, E, dtype=torch.float64, generator=generator(2)) / E
    assert load_loss(LOGITS, noisy, 2).item() == pytest.approx(v_moes_load_loss(LOGITS.numpy(), noisy.numpy(), 2))


@pytest.mark.parametrize(("mask", "top_k"), [(None, 2), (MASK, 3)])
def test_importance_and_load_draw_noise_in_training_only(mask, top_k):
    router = TokenChoice(D, E, top_k, balance="importance_load", aux_loss_weight=0.3, z_loss_weight=0.1)
    torch.manual_seed(0)
    noise = torch.randn_like(LOGITS) / E
    torch.manual_seed(0)
    chosen = router.assign(LOGITS, mask=mask)
    x, y = (z if mask is None else z[mask] for z in (LOGITS, LOGITS + noise))
    importance = x.softmax(1).sum(0).numpy()
    balance = 0.5 * ((importance.std() / importance.mean()) ** 2 + v_moes_load_loss(x.numpy(), y.numpy(), top_k))
    z = x.logsumexp(1).square().mean().item()
    assert chosen.aux_loss.item() == pytest.approx(0.3 * balance + 0.1 * z)
    noisy = y.softmax(1)
    dense = chosen.dense(N) if mask is None else chosen.dense(N)[mask]
    torch.testing.assert_close(dense, noisy * (noisy >= noisy.topk(top_k, 1).values[:, -1:]))
    quiet = TokenChoice(D, E, top_k, balance="none").assign(LOGITS, mask=mask).dense(N)
    assert torch.equal(router.eval().assign(LOGITS, mask=mask).dense(N), quiet)
    assert not torch.equal(chosen.dense(N), quiet)


@pytest.mark.parametrize("masked", [False, True])
def test_z_loss(masked):
    mask = MASK if masked else None
    x = (LOGITS[MASK] if masked else LOGITS).numpy()
    expected = np.mean(np.log(np.exp(x).sum(1)) ** 2)  # Zoph et al. 2022, Eq. 5
    assert z_loss(LOGITS, mask).item() == pytest.approx(expected)
    router = TokenChoice(D, E, 2, aux_loss_weight=0.0, z_loss_weight=0.1)
    chosen = router.assign(LOGITS, mask=mask)
    assert chosen.aux_loss.item() == pytest.approx(0.1 * expected)


def test_gradient_pushes_towards_balance():
    """The crowded expert's logits fall, whichever the loss."""
    logits = torch.zeros(8, 4, dtype=torch.float64) + torch.tensor([1.0, 0, 0, 0])
    for balance in ("switch", "importance_load"):
        leaf = logits.clone().requires_grad_()
        router = TokenChoice(D, 4, 1, balance=balance)
        torch.manual_seed(0)
        gradient = torch.autograd.grad(router.assign(leaf).aux_loss, leaf)[0].sum(0)
        assert gradient[0] > 0 and (gradient[1:] < 0).all()


def test_bias_moves_once_a_step_against_the_load_and_leaves_the_gates():
    """Wang et al. 2024, Algorithm 1: b_i <- b_i + u sign(mean load - load_i); gates from the score alone."""
    router = TokenChoice(D, E, 1, balance="bias", bias_rate=0.5)
    logits = torch.eye(E)[[0, 0, 0, 0, 1, 1, 2, 3]].double() * 3  # loads 4, 2, 1, 1; mean 2
    assert router.assign(logits).aux_loss.item() == 0 and not router.bias.any()
    router.assign(logits)  # a second micro-batch
    router.end_step()
    assert router.bias.tolist() == [-0.5, 0, 0.5, 0.5]
    router.end_step()  # nothing seen since
    assert router.bias.tolist() == [-0.5, 0, 0.5, 0.5]
    router.eval().assign(logits)
    assert not router.load_error.any()  # of training alone
    router.bias.copy_(torch.tensor([-9.0, 0.25, 0.5, 0.125]))
    chosen = router.assign(logits)
    assert chosen.load(8)[0] == 0
    S = logits.softmax(1)
    dense = chosen.dense(8)
    assert torch.equal(dense[dense > 0], S[dense > 0])


def test_bias_balances_a_stubborn_router():
    router = TokenChoice(D, E, 2, balance="bias", bias_rate=0.01)
    logits = random_logits(400, E, 0, bias=2)
    before = router.assign(logits).demand.max().item()
    for _ in range(200):
        router.assign(logits)
        router.end_step()
    assert before > 300 and router.assign(logits).demand.max().item() < 220  # 200 is equal
