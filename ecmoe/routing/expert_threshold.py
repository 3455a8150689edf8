"""Expert threshold (arXiv 2603.11535): each expert takes every token that reaches its running cut-off.

The cut-off is a moving average of the k-th largest score, so an expert gets k tokens on average, and no token's routing
sees another token. Letters: n tokens, e experts, k = n c / e (Eq. 1), S (n, e) scores.
"""

import torch
from torch import Tensor, nn

from ecmoe.routing.assignment import Assignment
from ecmoe.routing.cutoff import RunningCutoff
from ecmoe.routing.expert_choice import ExpertChoice, lowest
from ecmoe.routing.router import without_padding


class ExpertThreshold(ExpertChoice):
    """Expert choice that compares tokens with a cut-off, not with each other; evaluation drops nothing.

    Args:
        d_model, num_experts, capacity_factor: d, e, c.
        beta: decay of the cut-offs' moving average, see `RunningCutoff`.
        gate, rounding: see `ExpertChoice`.

    Attributes:
        warmup_steps: number of first optimiser steps that use plain expert choice, because the cut-offs of a router
            that still changes fast are outdated at once; ours, since the paper's value depends on its schedule.
        slack: in training an expert takes its best tokens, at least k / slack and at most slack k of them; ours.
    """

    warmup_steps, slack = 10, 2.0

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        capacity_factor: float = 2.0,
        beta: float = 0.999,
        gate: str = "softmax",
        rounding: str = "exact",
    ) -> None:
        super().__init__(d_model, num_experts, capacity_factor, pool="rank", gate=gate, rounding=rounding)
        self.cutoff = RunningCutoff(num_experts, beta)
        self.steps = nn.Buffer(torch.zeros((), dtype=torch.long))  # optimiser steps that moved the cut-offs

    def assign(self, logits, *, batch_shape=None, token_ids=None, task_ids=None, mask=None) -> Assignment:
        S = without_padding(logits, mask).softmax(dim=1)  # (n, e)
        if not (self.training or self.causal) and self.cutoff.empty():  # no cut-offs yet: plain expert choice
            return super().assign(logits, mask=mask)
        trains = self.training and not self.causal
        return self._weigh(self._bounded(S, mask) if trains else self._above_cutoff(S, mask), len(S))

    def _bounded(self, S: Tensor, mask: Tensor | None) -> Assignment:
        """Assign, in training, the tokens above the cut-off, best first, as many as `slack` allows."""
        n, e = S.shape
        k = self._bucket(n)
        slots = min(int(k * self.slack), n)
        valid = torch.ones(1, n, dtype=torch.bool, device=S.device) if mask is None else mask[None]
        scores = S.T.masked_fill(~valid, -1.0)  # (e, n); a score is never below 0
        G, token = scores.topk(slots, dim=1)  # (e, slots), best first

        share = self._valid_k(valid, k)  # (1,) k of the valid tokens
        kth, known = lowest(G[None], share)
        own = kth[0].where(known, 1.0)
        # During warm-up, the cut-offs are this batch's k-th scores, as in expert choice; then those of finished steps.
        average, weight = self.cutoff.average, self.cutoff.weight
        warming = self.steps < self.warmup_steps
        cutoff = torch.where(warming, own, average / weight.clamp_min(torch.finfo(weight.dtype).tiny))
        taken = scores.detach() >= cutoff.to(S.dtype)[:, None]
        count = (taken & valid).sum(1)  # (e,)
        load = count.clamp(torch.ceil(share / self.slack).long(), (share * self.slack).long().clamp(max=slots))
        if self.gathers:
            self.cutoff.add(kth, known)
        filled = torch.arange(slots, device=S.device) < load[:, None]
        return Assignment(torch.where(filled, token, n), torch.where(filled, G, 0.0), torch.maximum(count, load))

    def end_step(self) -> None:
        self.steps.add_(self.cutoff.end_step())
