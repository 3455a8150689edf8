"""LinearAssignment: BASE layers (Lewis et al. 2021). Experts get equally many tokens, at the largest sum of scores.

Letters: n tokens, e experts, S (n, e) scores.
"""

import torch
from torch import Tensor

from ecmoe.routers import equal_share
from ecmoe.routing.assignment import Assignment
from ecmoe.routing.router import Router, by_token, without_padding
from ecmoe.routing.transport import transport

# How far the mean score may fall below that of the best assignment, in standard deviations of the scores.
TOLERANCE = 1e-4


class LinearAssignment(Router):
    """Route each token to one expert: in evaluation the best-scoring one, in training balanced by an auction, so that no
    expert gets more than ceil(v / e) of v unmasked tokens. There `assign` raises a ConfigError unless e divides n.

    The gate is the sigmoid of the token's score for its expert (Lewis et al. 2021, section 3).

    Args:
        d_model, num_experts, learned: see `Router`.
    """

    def assign(self, logits, *, batch_shape=None, token_ids=None, task_ids=None, mask=None) -> Assignment:
        n, e = logits.shape
        logits = without_padding(logits, mask)
        balanced = self.training and not self.causal
        if balanced:
            equal_share(n, e)
        expert = _balanced(logits.detach(), mask) if balanced else logits.argmax(dim=1)
        gate = logits.gather(1, expert[:, None])[:, 0].sigmoid()
        return by_token(expert, gate, e, mask, factor=1.0 if balanced else None)


@torch.no_grad()
def _balanced(S: Tensor, mask: Tensor | None) -> Tensor:
    """Return (n,) experts for (n, e) scores, where e divides n."""
    n, e = S.shape
    if e == 1 or n == 0:
        return torch.zeros(n, dtype=torch.long, device=S.device)
    valid = torch.ones(n, dtype=torch.bool, device=S.device) if mask is None else mask
    # Filler is padding with equal scores for all experts: it makes v a multiple of e and fills the remaining places.
    filler = ~valid & ((~valid).cumsum(0) <= -valid.sum() % e)
    # Adding a constant per token or per expert changes no choice, but would hide the differences that matter.
    S = S.where(valid[:, None] & ~S.isnan(), 0.0)
    S = S - S.mean(dim=1, keepdim=True)
    mean = S.sum(dim=0) / valid.sum().clamp_min(1)
    seen = torch.where(valid[:, None], S - mean, 0.0)
    unit = (seen.square().sum() / (valid.sum() * e).clamp_min(1)).sqrt().view(1, 1, 1)
    valid = (valid | filler)[None]
    # The meta device has no numbers to look at.
    X = transport((S - mean).T[None], valid.sum(1) // e, 1, valid, unit, TOLERANCE, S.is_meta)[0]
    return X.long().argmax(dim=0)
