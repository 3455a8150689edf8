"""Token choice: each token requests its top_k experts, and a full expert drops further requests.

Switch Transformer (Fedus et al. 2021) is top_k=1; GShard (Lepikhin et al. 2021) and GLaM (Du et al. 2022)
are top_k=2. Letters: n tokens, e experts, S (n, e) scores.
"""

import torch
from torch import Tensor

from ecmoe.files import ConfigError
from ecmoe.routers import check_top_k
from ecmoe.routing.assignment import Assignment, pack
from ecmoe.routing.balance import importance_loss, load_loss, masked_sum, switch_loss, z_loss
from ecmoe.routing.ranks import add_up
from ecmoe.routing.router import Router, capacity, without_padding


class TokenChoice(Router):
    """Top-k routing over experts (GShard, Algorithm 1; Switch, Eq. 2).

    Args:
        d_model, num_experts, top_k: d, e, experts requested per token.
        capacity_factor: an expert holds ceil(capacity_factor top_k n / e) tokens; None: nothing is dropped.
        gate: "softmax": raw probabilities (Switch); "renormalized": normalised over the token's top_k, before any
            is dropped (GShard, GLaM); "scaled": softmax x e / top_k.
        priority: which requests are served first, with all first choices before second ones: "order" of arrival
            (GShard), or "score": tokens with the largest top score (V-MoE's batch priority, Riquelme et al. 2021).
        aux_loss_weight: weight of the balance loss. z_loss_weight: weight of the router z-loss (ST-MoE).
        balance: "switch" (loss over all choices), "first_choice" (GShard: over first choices), "importance_load"
            (V-MoE), "bias" (Wang et al. 2024: no loss; the sign of the load error moves a bias on the choice), "none".
        bias_rate: change of that bias per step.

    >>> switch = TokenChoice(d_model=16, num_experts=4, top_k=1, capacity_factor=1.25)
    >>> switch.assign(torch.randn(16, 4)).token.shape  # ceil(1.25 x 1 x 16 / 4) slots
    torch.Size([4, 5])
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int,
        capacity_factor: float | None = None,
        gate: str = "softmax",
        priority: str = "order",
        aux_loss_weight: float = 0.01,
        z_loss_weight: float = 0.0,
        balance: str = "switch",
        bias_rate: float = 0.001,
    ) -> None:
        super().__init__(d_model, num_experts)
        self.top_k, self.capacity_factor = top_k, capacity_factor
        self.static = capacity_factor is not None  # else sizes depend on the fullest expert's load
        self.gate, self.priority, self.balance = gate, priority, balance
        self.aux_loss_weight, self.z_loss_weight, self.bias_rate = aux_loss_weight, z_loss_weight, bias_rate
        self.check()
        self.bias = self.zeros(num_experts)  # moves only with balance="bias"
        self.load_error = self.zeros(num_experts)

    def check(self, *names: str) -> None:
        super().check(*names)
        check_top_k(self.top_k, self.num_experts)
        if not isinstance(self.bias_rate, int | float):
            raise ConfigError(f"bias_rate={self.bias_rate!r}: must be a number, such as 0.001")

    def assign(self, logits, *, batch_shape=None, token_ids=None, task_ids=None, mask=None) -> Assignment:
        n, e = logits.shape
        k = self.top_k
        logits = without_padding(logits, mask)
        draws = self.balance == "importance_load" and self.training  # noise makes V-MoE's load smooth
        noise = torch.randn_like(logits) / e if draws else torch.zeros_like(logits)
        S = (logits + noise).softmax(dim=1)  # (n, e)
        choice = (S + self.bias.to(S.dtype)).topk(k, dim=1).indices  # (n, k), best first
        gate = S.gather(1, choice)
        if self.gate == "renormalized":
            gate = gate / gate.sum(dim=1, keepdim=True)
        elif self.gate == "scaled":
            gate = gate * (e / k)

        # Requests: all first choices, then all second ones; within each, tokens by priority.
        token, chooses = torch.arange(n, device=S.device), mask
        if self.priority == "score":
            token = S.detach().amax(dim=1).argsort(descending=True, stable=True)
            choice, gate, chooses = choice[token], gate[token], None if mask is None else mask[token]
        expert = choice.T.reshape(-1)
        if chooses is not None:
            expert = torch.where(chooses.repeat(k), expert, e)
        places = capacity(None if self.causal else self.capacity_factor, k, n, e, mask)
        chosen = pack(token.repeat(k), expert, gate.T.reshape(-1), n=n, e=e, **places)
        demand: Tensor = chosen.demand  # type: ignore[assignment]
        if self.gathers and self.moves:
            self.load_error.add_(demand.float().mean() - demand.float())
        if not self.training:
            return chosen
        loss = logits.new_zeros(())
        if self.aux_loss_weight and self.balance not in ("bias", "none"):
            loss = loss + self.aux_loss_weight * self._balance_loss(logits, noise, S, demand, mask)
        if self.z_loss_weight:
            loss = loss + self.z_loss_weight * z_loss(logits, mask)
        return Assignment(chosen.token, chosen.gate, demand, loss)

    def _balance_loss(self, logits: Tensor, noise: Tensor, S: Tensor, demand: Tensor, mask: Tensor | None) -> Tensor:
        if self.balance == "importance_load":
            importance = importance_loss(logits.softmax(dim=1), mask)
            return 0.5 * (importance + load_loss(logits, logits + noise, self.top_k, mask))
        if self.balance == "first_choice":  # the demand of GShard's l_aux (Lepikhin et al. 2021, Algorithm 1)
            demand = masked_sum(S.argmax(dim=1, keepdim=True) == torch.arange(S.shape[1], device=S.device), mask)
        return switch_loss(S, demand, mask)

    @property
    def moves(self) -> bool:
        return self.balance == "bias"

    def end_step(self) -> None:
        """Move each expert's bias by `bias_rate`: up if it got too few tokens, down if too many (Wang et al. 2024)."""
        if not self.moves:
            return
        add_up(self.load_error)
        self.bias.add_(self.bias_rate * self.load_error.sign())
        self.load_error.zero_()
