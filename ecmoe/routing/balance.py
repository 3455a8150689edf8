"""Auxiliary losses of token choice: load balance and z-loss. Letters: n tokens, e experts, S (n, e) scores."""

import torch
from torch import Tensor


def balance_loss(
    kind: str,
    logits: Tensor,
    S: Tensor,
    noise: Tensor,
    demand: Tensor,
    mask: Tensor | None,
    top_k: int,
) -> Tensor:
    """Return the balance loss called `kind` ("switch", "first_choice" or "importance_load") as a scalar tensor.

    Padding, where the mask (n,) is False, is ignored; if all tokens are padding the loss is 0.
    """
    if kind == "switch":
        return switch_loss(S, demand, mask)
    if kind == "first_choice":
        first = S.argmax(dim=1, keepdim=True) == torch.arange(S.shape[1], device=S.device)  # (n, e)
        return switch_loss(S, _sum(first, mask), mask)
    return 0.5 * (importance_loss(logits.softmax(dim=1), mask) + load_loss(logits, logits + noise, top_k, mask))


def switch_loss(S: Tensor, demand: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return e sum_i f_i P_i, with f_i the share of requests and P_i the mean score of expert i (Switch, Eq. 4).

    Args:
        S: (n, e) scores. mask: (n,) bool, False for padding. demand: (e,) requests per expert, before any is dropped.
            GShard's l_aux counts first choices only (Lepikhin et al. 2021, Algorithm 1): balance="first_choice".

    Returns:
        A scalar: 1 for a uniform router, e if all requests go to one expert whose score is always 1.
    """
    e = S.shape[1]
    f = demand.to(S.dtype) / demand.sum().clamp_min(1)
    return e * (f * _mean(S, mask)).sum()


def importance_loss(S: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the squared coefficient of variation of the experts' summed scores (V-MoE, Appendix A, Eq. 9)."""
    return _cv_squared(_sum(S, mask))


def load_loss(logits: Tensor, noisy: Tensor, top_k: int, mask: Tensor | None = None) -> Tensor:
    """Return the squared coefficient of variation of the experts' smooth load (V-MoE, Appendix A, Eq. 14).

    The smooth load sums, over tokens, the probability that the expert is in the top_k if its noise is drawn again.
    """
    e = logits.shape[1]
    threshold = noisy.topk(top_k, dim=1).values[:, -1:]
    chance = torch.special.ndtr((logits - threshold) * e)  # P(x + eps >= threshold), eps ~ N(0, 1/e^2)
    return _cv_squared(_sum(chance, mask))


def load_noise(logits: Tensor, active: bool) -> Tensor:
    """Return noise of standard deviation 1/e for the logits, which makes V-MoE's load smooth; zeros unless `active`."""
    return torch.randn_like(logits) / logits.shape[1] if active else torch.zeros_like(logits)


def z_loss(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the mean squared logarithm of the softmax normaliser (ST-MoE, Zoph et al. 2022, Eq. 5)."""
    return _mean(logits.logsumexp(dim=1).square(), mask)


def _sum(x: Tensor, mask: Tensor | None) -> Tensor:
    """Sum over unmasked tokens, (n, ...) -> (...)."""
    return x.sum(dim=0) if mask is None else x.where(mask.view(-1, *[1] * (x.dim() - 1)), 0).sum(dim=0)


def _mean(x: Tensor, mask: Tensor | None) -> Tensor:
    return x.mean(dim=0) if mask is None else _sum(x, mask) / mask.sum().clamp_min(1)


def _cv_squared(x: Tensor) -> Tensor:
    return x.var(correction=0) / x.mean().square().clamp_min(torch.finfo(x.dtype).tiny)
