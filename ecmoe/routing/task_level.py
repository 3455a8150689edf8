"""Task-level routing: all tokens of a task go to the task's expert."""

import torch
from torch import Tensor, nn

from ecmoe.config import check_key
from ecmoe.routing.assignment import Assignment
from ecmoe.routing.router import Router, by_token, checked_ids


class TaskLevel(Router):
    """Route each token to its task's expert (Kudugunta et al. 2021); nothing is dropped, so a task uses no other expert.

    Args:
        d_model, num_experts: d, e.
        num_tasks: number of tasks, whose ids are 0 .. num_tasks - 1, which is checked on a CPU only.
        table: "learned": a task has a score per expert; the best one serves it, with its softmax score as gate (section
            3.2, with a task embedding in place of the token's); "fixed": expert t modulo e serves task t, with gate 1.
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
        task = checked_ids("task_ids", task_ids, self.num_tasks)
        if self.kind == "learned":
            table = self.table.to(torch.promote_types(self.table.dtype, torch.float32))  # in 16 bits, scores would tie
            gate, expert = table.softmax(dim=1).topk(1, dim=1)  # (num_tasks, 1)
        else:
            expert, gate = self.table, torch.full_like(self.table, 1.0, dtype=logits.dtype)
        return by_token(expert[task].view(-1), gate[task].view(-1).to(logits.dtype), logits.shape[1], mask)
