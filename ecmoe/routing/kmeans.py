"""KMeans: each expert is a cluster of the layer's inputs. Clusters follow the data, not gradients.

Letters: n tokens x of width d, e experts with centroids c (e, d).
"""

import torch
from torch import Tensor

from ecmoe.routing.assignment import Assignment
from ecmoe.routing.ranks import add_up
from ecmoe.routing.router import Router, by_token, full_precision


class KMeans(Router):
    """Route each token to the expert with the nearest centroid; the gate is 1.

    Online k-means: each cluster's sum and count of tokens, over all ranks, enter exponential moving averages over
    optimiser steps, and a centroid is their ratio (the update of van den Oord et al. 2017, appendix A.1). Centroids
    start as small random vectors, which split the input by direction; the first step moves them to the means.

    Args:
        d_model, num_experts: d, e.
        capacity_factor: an expert holds ceil(capacity_factor n / e) tokens, the first ones; None: nothing is dropped.
        beta: decay of the averages. seed: seed of the initial centroids.
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
        self.capacity_factor, self.beta, self.seed = capacity_factor, beta, seed
        self.check()
        self.centroids = self.zeros(num_experts, d_model)
        self.sums = self.zeros(num_experts, d_model)  # averages over steps
        self.counts = self.zeros(num_experts)
        self.pending_sums = self.zeros(num_experts, d_model)  # of this step
        self.pending_counts = self.zeros(num_experts)
        self._input: Tensor | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the centroids from `seed`, the same on every device, and forget all tokens."""
        super().reset_parameters()
        generator = torch.Generator().manual_seed(self.seed)
        first = torch.randn(self.centroids.shape, generator=generator, dtype=self.centroids.dtype, device="cpu")
        self.centroids.copy_(0.1 * first)

    def read(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return (n, e) negative squared distances of x, (n, d), to the centroids, without gradients; and x."""
        rows = x.detach().to(torch.promote_types(x.dtype, torch.float32))
        centroids = self.centroids.to(rows.dtype)
        with full_precision(x):
            product = rows @ centroids.T
        self._input = rows if self.gathers else None  # for `assign`, which knows the padding
        return 2 * product - rows.square().sum(1, keepdim=True) - centroids.square().sum(1), x

    def assign(self, logits, *, batch_shape=None, token_ids=None, task_ids=None, mask=None) -> Assignment:
        n, e = logits.shape
        expert = logits.detach().argmax(dim=1)
        x, self._input = self._input, None
        if self.gathers and x is not None and len(x) == n:
            cluster = expert if mask is None else torch.where(mask, expert, e)  # e: padding
            cell = (cluster[:, None] == torch.arange(e, device=x.device)).to(x.dtype)
            self.pending_sums.add_(cell.T @ x)  # (e, d)
            self.pending_counts.add_(cell.sum(0))
        return by_token(expert, logits.new_ones(n), e, mask, None if self.causal else self.capacity_factor)

    @torch.no_grad()
    def end_step(self) -> None:
        add_up(self.pending_sums, self.pending_counts)
        # Skip steps without tokens, and steps with a NaN, which would stay in the averages forever.
        moves = (self.pending_counts.sum() > 0) & self.pending_sums.isfinite().all()
        beta = torch.where(moves, self.beta, 1.0)
        for average, pending in [(self.sums, self.pending_sums), (self.counts, self.pending_counts)]:
            average.mul_(beta).add_((1 - beta) * pending.where(moves, 0.0))
            pending.zero_()
        seen = self.counts[:, None] > 0  # a cluster that never had a token stays where it is
        mean = self.sums / self.counts[:, None].clamp_min(torch.finfo(self.counts.dtype).tiny)
        self.centroids.copy_(torch.where(seen, mean, self.centroids))
