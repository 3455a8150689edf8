"""Dense: every expert processes every token, weighted by a softmax over experts (Jacobs et al. 1991)."""

import torch

from ecmoe.routing.assignment import Assignment
from ecmoe.routing.router import Router, without_padding


class Dense(Router):
    """Route all n tokens to all e experts: e times the compute of one expert, with nothing to balance or drop.
    Its key in a config is `dense_moe`; `dense` is the model without a router.

    Args:
        d_model, num_experts, learned: see `Router`.
    """

    static = True

    def assign(self, logits, *, batch_shape=None, token_ids=None, task_ids=None, mask=None) -> Assignment:
        n, e = logits.shape
        gate = without_padding(logits, mask).softmax(dim=1).T  # (e, n)
        token = torch.arange(n, device=logits.device).expand(e, n)
        if mask is not None:
            token, gate = torch.where(mask, token, n), torch.where(mask, gate, 0.0)
        return Assignment(token.contiguous(), gate.contiguous())
