"""Hash routing: a table over token ids alone determines the expert."""

import torch
from torch import Tensor, nn

from ecmoe.config import check_key
from ecmoe.routing.assignment import Assignment
from ecmoe.routing.router import Router, by_token, checked_ids


class Hash(Router):
    """Route each token to one expert by a fixed table over the vocabulary (Roller et al. 2021), with gate 1.

    Args:
        d_model, num_experts: d, e.
        vocab_size: V. Token ids must lie in 0 .. V - 1, which is checked on a CPU only.
        capacity_factor: an expert holds ceil(capacity_factor n / e) tokens; None: nothing is dropped.
        token_counts: (V,) how often each id occurs in the corpus, to balance the table by frequency
            (Roller et al., "balanced"); None: token id mod e, as in section 4.6 of the expert choice paper.
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        vocab_size: int,
        capacity_factor: float | None = None,
        token_counts: Tensor | None = None,
    ) -> None:
        super().__init__(d_model, num_experts, learned=False)
        self.capacity_factor, self.token_counts = capacity_factor, token_counts
        self.check()
        self.static = capacity_factor is not None  # else sizes depend on the fullest expert's load
        if token_counts is not None and len(token_counts) != vocab_size:
            raise ValueError(f"token_counts has {len(token_counts)} entries: must have vocab_size={vocab_size}")
        self.table = nn.Buffer(torch.empty(check_key("vocab_size", vocab_size), dtype=torch.long))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fill the table."""
        counts, modulo = self.token_counts, torch.arange(len(self.table)) % self.num_experts
        self.table.copy_(modulo if counts is None else balanced_table(counts, self.num_experts))

    def assign(self, logits, *, batch_shape=None, token_ids=None, task_ids=None, mask=None) -> Assignment:
        if token_ids is None:
            raise ValueError("hash routing needs token_ids: pass moe(x, token_ids=...)")
        n, e = logits.shape
        factor = None if self.causal else self.capacity_factor
        return by_token(
            self.table[checked_ids("token_ids", token_ids, len(self.table))], logits.new_ones(n), e, mask, factor
        )


def balanced_table(token_counts: Tensor, num_experts: int) -> Tensor:
    """Return (V,) experts for (V,) counts: most frequent id first, each to the expert with the least load so far."""
    counts = torch.as_tensor(token_counts, device="cpu").tolist()
    load, table = [0] * num_experts, [0] * len(counts)
    for v in sorted(range(len(counts)), key=lambda v: (-counts[v], v)):
        table[v] = load.index(min(load))
        load[table[v]] += counts[v]
    return torch.tensor(table)
