"""Assignment: the one value that every router returns, and `pack`, which fills it from requests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Assignment:
    """Which tokens each expert processes, and with what weight (I and G of Eq. 2); and all else that a router has to say.

    token: (e, k) int64, the j-th token of expert i; n (one past the last token) marks an empty slot.
    gate:  (e, k) float, its combine weight; 0 in an empty slot.
    demand: (e,) int64, requests before any was dropped; None: none was, they are the load.
    aux_loss: scalar to add to the loss, in training; None: nothing.

    `token, gate = assignment` takes the first two.

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
        """(n, e) combine weights, 0 where a token is not routed to an expert."""
        e = self.token.shape[0]
        out = self.gate.new_zeros(n + 1, e)
        expert = torch.arange(e, device=self.token.device)[:, None].expand_as(self.token)
        return out.index_put((self.token, expert), self.gate, accumulate=True)[:n]

    def experts_per_token(self, n: int) -> Tensor:
        """(n,) int64: how many experts took each token. A slot counts also where its gate is 0."""
        held = torch.zeros(n + 1, len(self.token), dtype=torch.int8, device=self.token.device)
        return held.scatter(0, self.token.T, 1)[:n].sum(1)

    def load(self, n: int) -> Tensor:
        """(e,) int64: tokens that each expert processes, empty slots left out."""
        return (self.token < n).sum(dim=1)

    def renormalized(self, n: int) -> Assignment:
        """The same choice with each token's gates divided by their sum over the experts that took it.

        By way of an (n + 1, e) table, in which no two slots of tokens meet: a sum by index would add up in no fixed
        order on a GPU, forward or backward.
        """
        token = self.token.T  # (k, e)
        table = self.gate.new_zeros(n + 1, token.shape[1]).scatter(0, token, self.gate.T)
        table = table / table.sum(1, keepdim=True).clamp_min(torch.finfo(self.gate.dtype).tiny)
        return self.weighing(table.gather(0, token).T)

    def weighing(self, gate: Tensor) -> Assignment:
        """The same choice with other gates, (e, k)."""
        return Assignment(self.token, gate, self.demand, self.aux_loss)


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
    """Serve requests in the order given until an expert is full; the rest is dropped.

    Args:
        token, expert, gate: (r,) one request each, best first; expert e marks no request (padding).
        n, e: number of tokens and of experts.
        slots: places of an expert; None: as many as the fullest needs, nothing is dropped
            (this reads one number from the device).
        limit: scalar tensor, a capacity below `slots` that depends on the data.

    Returns:
        (e, slots), with its demand.

    >>> token, expert = torch.tensor([0, 1, 2]), torch.tensor([1, 1, 1])
    >>> token, gate = pack(token, expert, torch.tensor([0.9, 0.8, 0.7]), n=3, e=2, slots=2)  # all want expert 1
    >>> token
    tensor([[3, 3],
            [0, 1]])

    Raises:
        ValueError: not as many tokens as experts and gates.
    """
    if not token.shape == expert.shape == gate.shape:
        raise ValueError(f"{len(token)} tokens, {len(expert)} experts, {len(gate)} gates: a request has one of each")
    by_expert = torch.argsort(expert, stable=True)  # keeps the order within an expert
    expert = expert[by_expert]
    ends = torch.searchsorted(expert, torch.arange(e + 1, device=expert.device), right=True)
    demand = ends.diff(prepend=ends.new_zeros(1))
    place = torch.arange(expert.numel(), device=expert.device) - (ends - demand)[expert]
    if slots is None:
        slots = max(int(demand[:e].max()), 1)
    full = place >= (slots if limit is None else limit.clamp(max=slots))
    # What has no place goes to a spare slot of its own behind the last, all cut off: a GPU that repeats its bits writes one
    # after the other what shares a slot.
    spare = e * slots + torch.arange(expert.numel(), device=expert.device)
    slot = torch.where(full | (expert == e), spare, expert * slots + place)
    tokens = torch.full((e * slots + expert.numel(),), n, dtype=torch.long, device=token.device)
    gates = gate.new_zeros(e * slots + expert.numel())
    tokens = tokens.index_put((slot,), token[by_expert])[: e * slots].view(e, slots)
    gates = gates.index_put((slot,), gate[by_expert])[: e * slots].view(e, slots)
    return Assignment(tokens, gates, demand[:e])
