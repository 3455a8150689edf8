"""`Assignment`, the value that every router returns, and `pack`, which builds one from a list of requests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Assignment:
    """Which tokens each expert processes, and with what weight (I and G of Eq. 2); also demand and auxiliary loss.

    token: (e, k) int64, the j-th token of expert i; n (one past the last token) marks an empty slot.
    gate: (e, k) float, the combine weight of that token; 0 in an empty slot.
    demand: (e,) int64, requests per expert before any was dropped; None: no request was dropped, so demand equals load.
    aux_loss: scalar to add to the training loss; None: nothing to add.

    `token, gate = assignment` unpacks the first two.

    >>> chosen = Assignment(torch.tensor([[0, 1], [2, 3]]), torch.tensor([[0.9, 0.6], [0.8, 0.0]]))  # 3: an empty slot
    >>> chosen.dense(3)
    tensor([[0.9000, 0.0000],
            [0.6000, 0.0000],
            [0.0000, 0.8000]])
    >>> chosen.load(3), chosen.experts_per_token(3)
    (tensor([2, 1]), tensor([1, 1, 1]))
    """

    token: Tensor
    gate: Tensor
    demand: Tensor | None = None
    aux_loss: Tensor | None = None

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.token, self.gate))

    def dense(self, n: int) -> Tensor:
        """Return (n, e) combine weights, 0 where a token is not routed to an expert; their sum if an expert has it twice."""
        expert = torch.arange(len(self.token), device=self.token.device)[:, None].expand_as(self.token)
        table = self.gate.new_zeros(n + 1, len(self.token))  # empty slots write to the last row
        return table.index_put((self.token, expert), self.gate, accumulate=True)[:n]

    def experts_per_token(self, n: int) -> Tensor:
        """Return (n,) int64, the number of experts that took each token, including those whose gate is 0."""
        held = torch.zeros(n + 1, len(self.token), dtype=torch.int8, device=self.token.device)
        return held.scatter(0, self.token.T, 1)[:n].sum(1)

    def load(self, n: int) -> Tensor:
        """Return (e,) int64, the number of tokens that each expert processes; empty slots don't count."""
        return (self.token < n).sum(dim=1)

    def renormalized(self, n: int) -> Assignment:
        """Return the same choice with each token's gates divided by their sum over the experts that took it."""
        # `index_add` into (n,) sums would add in no fixed order on a GPU, forward or backward.
        table = self.gate.new_zeros(n + 1, len(self.token)).scatter(0, self.token.T, self.gate.T)  # (n + 1, e)
        table = table / table.sum(1, keepdim=True).clamp_min(torch.finfo(self.gate.dtype).tiny)
        return Assignment(self.token, table.gather(0, self.token.T).T, self.demand, self.aux_loss)


def pack(
    token: Tensor,
    expert: Tensor,
    gate: Tensor,
    *,
    n: int,
    e: int,
    slots: int | None,
    limit: Tensor | None = None,
) -> Assignment:
    """Return an (e, slots) Assignment: each expert serves its requests in order until it is full, and drops the rest.

    Args:
        token, expert, gate: (r,) one entry per request, else a ValueError; first served first. Expert e marks padding.
        n, e: number of tokens and of experts.
        slots: capacity of each expert; None: what the fullest one needs, so that nothing is dropped (waits for the device).
        limit: scalar tensor, a smaller capacity that depends on the data.

    >>> token, expert = torch.tensor([0, 1, 2]), torch.tensor([1, 1, 1])
    >>> token, gate = pack(token, expert, torch.tensor([0.9, 0.8, 0.7]), n=3, e=2, slots=2)  # all want expert 1
    >>> token
    tensor([[3, 3],
            [0, 1]])
    """
    if not token.shape == expert.shape == gate.shape:
        raise ValueError(f"{len(token)} tokens, {len(expert)} experts, {len(gate)} gates: one of each per request")
    by_expert = torch.argsort(expert, stable=True)  # keeps the order within an expert
    expert = expert[by_expert]
    ends = torch.searchsorted(expert, torch.arange(e + 1, device=expert.device), right=True)
    demand = ends.diff(prepend=ends.new_zeros(1))
    place = torch.arange(expert.numel(), device=expert.device) - (ends - demand)[expert]
    if slots is None:
        slots = max(int(demand[:e].max()), 1)
    full = place >= (slots if limit is None else limit.clamp(max=slots))
    # Each request without a place writes to its own spare slot behind the last one; these slots are cut off below. With
    # deterministic algorithms, a GPU would execute writes to a shared slot one after the other.
    spare = e * slots + torch.arange(expert.numel(), device=expert.device)
    slot = torch.where(full | (expert == e), spare, expert * slots + place)
    tokens = torch.full((e * slots + expert.numel(),), n, dtype=torch.long, device=token.device)
    gates = gate.new_zeros(e * slots + expert.numel())
    tokens = tokens.index_put((slot,), token[by_expert])[: e * slots].view(e, slots)
    gates = gates.index_put((slot,), gate[by_expert])[: e * slots].view(e, slots)
    return Assignment(tokens, gates, demand[:e])
