"""KMeans: an expert is a cluster of the layer's input; the clusters move with the data, not by gradients.

Letters: n tokens x of width d, e experts with centroids c (e, d).
"""

import torch
from torch import Tensor, nn

from ecmoe.routers import check_capacity
from ecmoe.routing.assignment import Assignment
from ecmoe.routing.ranks import add_up
from ecmoe.routing.router import Router, by_token, capacity


class KMeans(Router):
    """One expert a token, that of the nearest centroid; gate 1.

    The clusters are online k-means: sums and counts of each cell are averaged exponentially over optimiser steps
    and over all ranks, and a centroid is their ratio (the update of van den Oord et al. 2017, appendix A.1). They
    start as small random vectors, which split the input by direction; the first step moves them to the means.

    Args:
        d_model, num_experts: d, e.
        capacity_factor: an expert holds ceil(capacity_factor n / e) tokens in order of arrival; None: nothing is
            dropped.
        beta: decay of the averages. seed: of the first centroids.
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        capacity_factor: float | None = None,
        beta: float = 0.99,
        seed: int = 0,
    ) -> None:
        super().__init__(d_model, num_experts, learned=False)
        if not 0 <= beta < 1:
            raise ValueError(f"beta={beta}: must be at least 0 and below 1")
        self.capacity_factor, self.beta = check_capacity(capacity_factor), beta
        generator = torch.Generator().manual_seed(seed)
        first = 0.1 * torch.randn(num_experts, d_model, generator=generator, device="cpu")
        self.centroids = nn.Buffer(first.to(torch.get_default_device()))
        self.sums = nn.Buffer(torch.zeros(num_experts, d_model))  # averages over steps
        self.counts = nn.Buffer(torch.zeros(num_experts))
        self.pending_sums = nn.Buffer(torch.zeros(num_experts, d_model))  # of this step
        self.pending_counts = nn.Buffer(torch.zeros(num_experts))
        self._input: Tensor | None = None

    def read(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(n, d) -> (n, e) negative squared distances to the centroids, which carry no gradient; and x."""
        rows = x.detach().to(torch.promote_types(x.dtype, torch.float32))
        centroids = self.centroids.to(rows.dtype)
        with torch.autocast(x.device.type, enabled=False):
            product = rows @ centroids.T
        # `assign` knows which tokens are padding, and gathers the others.
        self._input = rows if self.gathers else None
        return 2 * product - rows.square().sum(1, keepdim=True) - centroids.square().sum(1), x

    def assign(self, logits, *, batch_shape=None, token_ids=None, task_ids=None, mask=None) -> Assignment:
        n, e = logits.shape
        expert = logits.detach().argmax(dim=1)
        if self.gathers:
            self._gather(expert if mask is None else torch.where(mask, expert, e), n)
        places = capacity(None if self.causal else self.capacity_factor, 1, n, e, mask)
        return by_token(expert, logits.new_ones(n), e, mask, *places)

    @torch.no_grad()
    def _gather(self, expert: Tensor, n: int) -> None:
        """Add the tokens that `read` saw last to the sums of their cells; expert e is padding."""
        x, self._input = self._input, None
        if x is None or x.shape[0] != n:
            return
        cell = (expert[:, None] == torch.arange(self.num_experts, device=x.device)).to(x.dtype)
        self.pending_sums.add_(cell.T @ x)  # (e, d)
        self.pending_counts.add_(cell.sum(0))

    @torch.no_grad()
    def end_step(self) -> None:
        """Move the averages by what this step gathered, and the centroids to them."""
        add_up(self.pending_sums, self.pending_counts)
        # A step that saw no token moves nothing; nor does one that saw a NaN, which would stay for good.
        moves = (self.pending_counts.sum() > 0) & self.pending_sums.isfinite().all()
        beta = torch.where(moves, self.beta, 1.0)
        for average, pending in [(self.sums, self.pending_sums), (self.counts, self.pending_counts)]:
            average.mul_(beta).add_((1 - beta) * pending.where(moves, 0.0))
            pending.zero_()
        seen = self.counts[:, None] > 0  # a cell that was always empty stays where it is
        mean = self.sums / self.counts[:, None].clamp_min(torch.finfo(self.counts.dtype).tiny)
        self.centroids.copy_(torch.where(seen, mean, self.centroids))
