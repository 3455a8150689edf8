"""Auxiliary losses of token choice: load balance and z-loss.

Letters: n tokens, e experts, S (n, e) scores; a mask (n,) is False for padding, which no loss counts.
"""

import torch
from torch import Tensor


def switch_loss(S: Tensor, demand: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return e sum_i f_i P_i, with f_i the share of requests and P_i the mean score of expert i (Switch, Eq. 4).

    demand: (e,) requests per expert, before any is dropped. The result is 1 for a uniform router, and e if all requests
    go to one expert whose score is always 1.
    """
    f = demand.to(S.dtype) / demand.sum().clamp_min(1)
    return S.shape[1] * (f * _mean(S, mask)).sum()


def importance_loss(S: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the squared coefficient of variation of the experts' summed scores (V-MoE, Appendix A, Eq. 9)."""
    return _cv_squared(masked_sum(S, mask))


def load_loss(logits: Tensor, noisy: Tensor, top_k: int, mask: Tensor | None = None) -> Tensor:
    """Return the squared coefficient of variation of the experts' smooth load (V-MoE, Appendix A, Eq. 14).

    The smooth load sums, over tokens, the probability that the expert is in the top_k if its noise is drawn again.
    """
    threshold = noisy.topk(top_k, dim=1).values[:, -1:]
    chance = torch.special.ndtr((logits - threshold) * logits.shape[1])  # P(x + eps >= threshold), eps ~ N(0, 1/e^2)
    return _cv_squared(masked_sum(chance, mask))


def z_loss(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the mean squared logarithm of the softmax normaliser (ST-MoE, Zoph et al. 2022, Eq. 5)."""
    return _mean(logits.logsumexp(dim=1).square(), mask)


def masked_sum(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return the sum over tokens, the first dimension of x."""
    return x.sum(dim=0) if mask is None else x.where(mask.view(-1, *[1] * (x.dim() - 1)), 0).sum(dim=0)


def _mean(x: Tensor, mask: Tensor | None) -> Tensor:
    return x.mean(dim=0) if mask is None else masked_sum(x, mask) / mask.sum().clamp_min(1)


def _cv_squared(x: Tensor) -> Tensor:
    return x.var(correction=0) / x.mean().square().clamp_min(torch.finfo(x.dtype).tiny)
