"""Routing by a table: a token's id (Hash) or its task (TaskLevel) alone determines the expert."""

import torch
from torch import Tensor, nn

from ecmoe.config import check_key
from ecmoe.routing.assignment import Assignment
from ecmoe.routing.router import Router, by_token


class Hash(Router):
    """Route each token to one expert by a fixed table over the vocabulary (Roller et al. 2021), with gate 1.

    Args:
        d_model, num_experts: d, e.
        vocab_size: V. Token ids must lie in 0 .. V - 1; a check of them would wait for the device.
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
        return by_token(self.table[token_ids.reshape(-1).long()], logits.new_ones(n), e, mask, factor)


def balanced_table(token_counts: Tensor, num_experts: int) -> Tensor:
    """Return (V,) experts for (V,) counts: most frequent id first, each to the expert with the least load so far."""
    counts = torch.as_tensor(token_counts, device="cpu").tolist()
    load, table = [0] * num_experts, [0] * len(counts)
    for v in sorted(range(len(counts)), key=lambda v: (-counts[v], v)):
        table[v] = load.index(min(load))
        load[table[v]] += counts[v]
    return torch.tensor(table)


class TaskLevel(Router):
    """Route each token to its task's expert (Kudugunta et al. 2021); nothing is dropped, so a task uses no other expert.

    Args:
        d_model, num_experts: d, e.
        num_tasks: number of tasks, whose ids are 0 .. num_tasks - 1; a check of ids would wait for the device.
        table: "learned": a score for every task and expert; the task's best expert serves it, with its softmax score as
            gate (Kudugunta et al., section 3.2, with a task embedding in place of the token's); "fixed": expert
            t modulo e serves task t, with gate 1.
    """

    def __init__(self, d_model: int, num_experts: int, num_tasks: int, table: str = "learned") -> None:
        super().__init__(d_model, num_experts, learned=False)
        self.num_tasks, self.kind = num_tasks, check_key("task_table", table)
        self.check()
        if table == "learned":
            self.table: Tensor = nn.Parameter(torch.empty(num_tasks, num_experts))
        else:
            self.table = nn.Buffer(torch.empty(num_tasks, 1, dtype=torch.long))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw scores ~ N(0, 1 / num_tasks), so that tasks start with different experts; ours. Fill a fixed table."""
        if self.kind == "learned":
            nn.init.normal_(self.table, std=self.num_tasks**-0.5)
        else:
            self.table.copy_(torch.arange(self.num_tasks)[:, None] % self.num_experts)

    def assign(self, logits, *, batch_shape=None, token_ids=None, task_ids=None, mask=None) -> Assignment:
        if task_ids is None:
            raise ValueError("task-level routing needs task_ids: pass moe(x, task_ids=...)")
        task = task_ids.reshape(-1).long()
        if self.kind == "learned":
            gate, expert = self.table.softmax(dim=1).topk(1, dim=1)  # (num_tasks, 1)
        else:
            expert, gate = self.table, torch.full_like(self.table, 1.0, dtype=logits.dtype)
        return by_token(expert[task].view(-1), gate[task].view(-1).to(logits.dtype), logits.shape[1], mask)
