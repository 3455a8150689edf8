"""Capped expert choice (section 3.3): every expert takes k tokens, no token goes to more than b experts.

Solver "dykstra" is the paper's. "feasible" is ours: it solves a transport problem (transport.py). On a GPU,
ecmoe/kernels/capped.py solves it nearly as well in far fewer steps.

Letters: g pools of m tokens, e experts, S (g, e, m) scores, X (g, e, m) bool: True where an expert takes a token,
k = m c / e (Eq. 1), b the cap.
"""

import math

import torch
from torch import Tensor

from ecmoe.files import ConfigError
from ecmoe.routing.router import fast
from ecmoe.routing.transport import transport

REGULARIZATION, ITERATIONS = 0.001, 100  # of `dykstra`, as in the paper
TOLERANCE = 1e-3  # "feasible" may lose this much per place, as a share of the mean score of a plain top-k


def capped_top_k(
    S: Tensor,
    k: int,
    b: int,
    *,
    solver: str = "feasible",
    valid: Tensor | None = None,
    target: Tensor | None = None,
    kernels: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Choose k tokens for each expert, with no token in more than b experts; a ConfigError if m b < e k.

    Args:
        S: (g, e, m) scores; gradients flow to the chosen ones. k: tokens per expert. b: most experts per token.
        solver: "feasible": exactly k and at most b, with a sum of chosen scores within 1% of the largest possible;
            "dykstra": the paper's entropy-regularised programme, stopped after 100 iterations (see `dykstra`).
        valid: (g, m) bool, False for padding. An expert then takes `target` (g,) tokens of each pool, at most k: the
            first entries of the result; the other entries are filler.
        kernels: implementation to use, see `MoE`. The kernels take float32 scores without padding. Their sum is within
            1% of the largest too, except if tokens fall into a few groups of equal scores: then it may lose 10%.

    Returns:
        (G, I), both (g, e, k): scores and positions of the chosen tokens, best first (from the kernels: by position).
    """
    g, e, m = S.shape
    if m * b < e * k:
        raise ConfigError(
            f"max_experts_per_token={b}: {e} experts take k={k} of n={m} tokens each, {e * k} places, but "
            f"n b = {m * b}: use at least {-(-e * k // m)}"
        )
    scores, S = S, S.detach().nan_to_num(0.0)  # for the choice NaN is 0; its gate stays NaN
    if solver == "feasible" and valid is None and fast(kernels, S):
        from ecmoe.kernels import capped as ours

        if ours.available(S, b):
            I = ours.capped(S, k, b)
            return scores.gather(2, I), I
    if valid is None or target is None:
        valid, target = S.new_ones(g, m, dtype=torch.bool), torch.full((g,), k, device=S.device)
    with torch.no_grad():
        if solver == "dykstra":
            I = dykstra(S, target, b, valid).topk(k, dim=2).indices  # the paper's I = TopK(A, k)
            filler = torch.arange(k, device=S.device) >= target[:, None, None]
            I = I.gather(2, S.gather(2, I).masked_fill(filler, -2.0).argsort(2, descending=True))
        else:
            ranked = S.masked_fill(~valid[:, None], 0.0).sort(dim=2, descending=True).values
            inside = torch.arange(m, device=S.device) < target[:, None, None]
            unit = (ranked * inside).sum((1, 2), keepdim=True) / (e * target[:, None, None]).clamp_min(1)
            X = transport(S, target, b, valid, unit, TOLERANCE, S.device.type != "cpu")
            I = S.masked_fill(~X, -2.0).topk(k, dim=2).indices
    return scores.gather(2, I), I


def dykstra(S: Tensor, target: Tensor, b: int, valid: Tensor) -> Tensor:
    """Return log A, (g, e, m), of section 3.3: max <S, A> + lambda H(A), rows sum to k, columns to <= b, 0 <= A <= 1.

    Runs Dykstra's alternating Kullback-Leibler projections in the log domain, starting from exp(S / lambda); the paper
    doesn't print its own. The inequalities (columns; entries <= 1) need Dykstra's correction; the equality of rows
    doesn't. log A is always S / lambda minus one term per constraint.
    """
    Z = (S / REGULARIZATION).masked_fill(~valid[:, None], float("-inf"))
    log_k = target.to(S.dtype).log()[:, None, None]
    row, column, box = torch.zeros_like(Z[:, :, :1]), torch.zeros_like(S[:, :1]), torch.zeros_like(S)
    for _ in range(ITERATIONS):
        row = row + (Z - row - column - box).logsumexp(2, keepdim=True) - log_k  # exactly k
        column = ((Z - row - box).logsumexp(1, keepdim=True) - math.log(b)).clamp_min(0)  # at most b
        box = (Z - row - column).clamp_min(0)  # at most 1
    return Z - row - column - box
