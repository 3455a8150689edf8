"""Expert choice (section 3.2): each expert takes the k tokens that score highest for it.

The top-k over tokens sees the whole pool, including future tokens, which can lower the loss of a decoder.
`causal_routing` routes by running cut-offs instead and sees only the token itself.
Letters: n tokens, e experts, k = n c / e (Eq. 1), g pools of m tokens, S (n, e), G and I of Eq. 2.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ecmoe.files import ConfigError
from ecmoe.routers import bucket_size, check_cap, exact
from ecmoe.routing.assignment import Assignment, pack
from ecmoe.routing.capped import capped_top_k
from ecmoe.routing.cutoff import RunningCutoff
from ecmoe.routing.ranks import gathered, own, ranks
from ecmoe.routing.router import Router, without_padding


class ExpertChoice(Router):
    """Expert choice routing (Zhou et al. 2022, Eq. 1 and 2; capped: section 3.3).

    Args:
        d_model, num_experts: d, e.
        capacity_factor: c, the average number of experts per token.
        max_experts_per_token: b, the largest number of experts per token; None: no cap.
        pool: which tokens compete: "batch" (the paper), "sequence", "position" (the same position of all sequences),
            "rank" (this rank's own batch), or a number of consecutive tokens (a RunConfig wants whole sequences).
            "batch" and "position" span all ranks of the process group, which must route together, in evaluation too.
        gate: "softmax" (Eq. 4 as printed), "renormalized" (over the experts that took the token), or
            "scaled" (softmax x e/c: with a uniform router, a token's gates sum to 1 on average).
        cap_solver: "feasible" (ours: no token exceeds b, every expert is full) or "dykstra" (the paper's).
        rounding: "exact": n c / e must be a whole number, as in the study; "down": any n, k = max(1, floor(n c / e)).

    >>> router = ExpertChoice(d_model=16, num_experts=4, capacity_factor=2.0)
    >>> logits = router.logits(torch.randn(2, 8, 16))  # (..., d) -> (n, e), float32
    >>> token, gate = router.assign(logits, batch_shape=(2, 8))
    >>> logits.shape, token.shape  # k = n c / e = 16 x 2 / 4
    (torch.Size([16, 4]), torch.Size([4, 8]))
    """

    static = True

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        capacity_factor: float = 2.0,
        max_experts_per_token: int | None = None,
        pool: str | int = "batch",
        gate: str = "softmax",
        cap_solver: str = "feasible",
        rounding: str = "exact",
    ) -> None:
        super().__init__(d_model, num_experts)
        self.capacity_factor, self.max_experts_per_token = capacity_factor, max_experts_per_token
        self.pool, self.gate, self.cap_solver, self.rounding = pool, gate, cap_solver, rounding
        self.check()
        self.cutoff = RunningCutoff(num_experts, 0.99)  # for causal routing

    def check(self, *names: str) -> None:
        super().check(*names)
        if exact(self.capacity_factor) > self.num_experts:
            right = f"must be at most num_experts={self.num_experts}, as it is the average number of experts per token"
            raise ConfigError(f"capacity_factor={self.capacity_factor:g}: {right}")
        check_cap(self.max_experts_per_token, self.capacity_factor)
        if self.rounding not in ("exact", "down"):
            raise ConfigError(f"rounding={self.rounding!r}: must be one of exact, down")

    def assign(self, logits, *, batch_shape=None, token_ids=None, task_ids=None, mask=None) -> Assignment:
        n, e = logits.shape
        logits = without_padding(logits, mask)
        if self.causal:
            return self._weigh(self._above_cutoff(logits.softmax(dim=1), mask), n)
        ids = self._pools(n, batch_shape, logits.device)  # (g, m)
        S = logits.softmax(dim=1).T  # (e, n); a token's scores sum to 1
        S = pooled = S[None] if ids is None else S[:, ids].transpose(0, 1)  # (g, e, m)
        valid = None if mask is None else mask[None] if ids is None else mask[ids]  # (g, m)
        if self.across:
            pooled, valid = gathered(S), None if valid is None else gathered(valid)
        k = self._bucket(pooled.shape[2])
        if k == 0:  # no tokens, or too few for the cap
            return Assignment(torch.empty(e, 0, dtype=torch.long, device=logits.device), logits.new_empty(e, 0))
        target = None
        if valid is not None:  # padding takes no capacity: k shrinks with the valid tokens
            pooled, target = pooled.masked_fill(~valid[:, None], -1.0), self._valid_k(valid, k)
        G, I = self._select(pooled, k, valid, target)  # (g, e, k): each expert takes its k best tokens (Eq. 2)
        if self.gathers:
            self.cutoff.add(*(G.detach().amin(-1), None) if target is None else lowest(G, target))
        if target is not None:
            filled = torch.arange(k, device=logits.device) < target[:, None, None]
            I, G = torch.where(filled, I, pooled.shape[2]), torch.where(filled, G, 0.0)
        if self.across:
            I = own(I, S.shape[2])
            G = _At.apply(F.pad(S, (0, 1)), I)
        token = I if ids is None else F.pad(ids, (0, 1), value=n).gather(1, I.flatten(1)).view_as(I)
        token = token.transpose(0, 1).reshape(e, -1)  # (e, g k)
        return self._weigh(Assignment(token, G.transpose(0, 1).reshape(e, -1)), n)

    def _select(self, S: Tensor, k: int, valid: Tensor | None, target: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return scores and positions, both (g, e, k), chosen from (g, e, m) scores; best first if there is padding."""
        if (cap := self._cap) is not None:
            return capped_top_k(S, k, cap, solver=self.cap_solver, valid=valid, target=target, kernels=self.kernels)
        if valid is not None or not self.fast(S, S[:, 0].numel()):
            return S.topk(k, dim=2)
        from ecmoe.kernels import select

        I = select(S, k)
        return _At.apply(S, I), I

    @property
    def across(self) -> bool:  # type: ignore[override]
        return self.pool in ("batch", "position") and ranks() > 1

    @property
    def _cap(self) -> int | None:
        """b; None if there is no cap, or one that can't bind (b >= e)."""
        b = self.max_experts_per_token
        return b if b is not None and b < self.num_experts else None

    def _pools(self, n: int, batch_shape: tuple[int, int] | None, device: torch.device) -> Tensor | None:
        """Return (g, m) indices of the tokens of each pool; None if all tokens compete."""
        if self.pool in ("batch", "rank"):
            return None
        ids = torch.arange(n, device=device)
        if not isinstance(self.pool, str):
            if n % self.pool:
                raise ConfigError(f"pool={self.pool} must divide the n={n} tokens of the batch")
            return ids.view(-1, self.pool)
        if batch_shape is None:
            raise ValueError(f"pool={self.pool!r} needs sequences: batch_shape=(B, T), or x of shape (B, T, d)")
        ids = ids.view(batch_shape)
        return ids if self.pool == "sequence" else ids.T

    def _bucket(self, m: int) -> int:
        """Return k for a pool of m tokens; 0 if the cap leaves less than one token per expert."""
        k, b = bucket_size(m, self.num_experts, self.capacity_factor, self.rounding), self.max_experts_per_token
        return k if b is None else min(k, m * b // self.num_experts)

    def _valid_k(self, valid: Tensor, k: int) -> Tensor:
        """Return (g,) k for the unmasked tokens alone, floor(valid tokens x c / e), at most k."""
        share, tokens = exact(self.capacity_factor) / self.num_experts, valid.sum(1)
        taken = tokens * share.numerator // share.denominator
        if self.rounding == "down":
            taken = torch.maximum(taken, tokens.clamp(max=1))
            if self.max_experts_per_token is not None:
                taken = torch.minimum(taken, tokens * self.max_experts_per_token // self.num_experts)
        return taken.clamp(max=k)

    def _above_cutoff(self, S: Tensor, mask: Tensor | None) -> Assignment:
        """Assign to every expert the tokens at or above its cut-off: each decision sees one token only."""
        take = self.cutoff.value().to(S.dtype) <= S  # (n, e)
        if (cap := self._cap) is not None:
            best = S.masked_fill(~take, -1.0).topk(cap, dim=1).indices  # of the experts that would take the token
            take &= torch.zeros_like(take).scatter(1, best, True)
        if mask is not None:
            take &= mask[:, None]
        token, expert = take.nonzero(as_tuple=True)
        return pack(token, expert, S[token, expert], n=S.shape[0], e=S.shape[1], slots=None)

    @property
    def scale(self) -> float | None:
        """Factor between scores and gates; None if a token's gates are normalised to sum to 1."""
        return {"softmax": 1.0, "scaled": self.num_experts / self.capacity_factor, "renormalized": None}[self.gate]

    def _weigh(self, chosen: Assignment, n: int) -> Assignment:
        if self.scale is None:
            return chosen.renormalized(n)
        gate = chosen.gate if self.gate == "softmax" else chosen.gate * self.scale
        return Assignment(chosen.token, gate, chosen.demand)

    def at_once(self, x: Tensor, weights: Callable[[], tuple[Tensor, Tensor]], room: int, **more: Any) -> Tensor | None:
        """See `Router`. Needs one pool of all tokens, no cap, and no hook or subclass that reads the assignment."""
        if torch.compiler.is_compiling() or type(self) is not ExpertChoice or type(x) is not Tensor or not len(x):
            return None
        changed = self._forward_hooks or self._forward_pre_hooks or {"assign", "read"} & vars(self).keys()
        alone = self.pool in ("batch", "rank") and not self.across
        if self.causal or changed or not alone or self._cap is not None or not self.fast(x, x.shape[0]):
            return None
        from ecmoe.kernels import choice

        k, cutoff = self._bucket(len(x)), (self.cutoff.pending, self.cutoff.count) if self.gathers else None
        if k * self.num_experts > room or self.weight is None or not choice.available(x, self.weight, k):
            return None
        return choice.expert_choice(
            x, self.weight, *weights(), k, scale=self.scale, cutoff=cutoff, kernels=self.kernels, **more
        )

    def check_causal(self) -> None:
        if self.cutoff.empty():
            raise ValueError(
                "causal routing needs running cut-offs, but this expert choice router has seen no training "
                "batch yet: train it first, or load a trained run"
            )

    def end_step(self) -> None:
        self.cutoff.end_step()


def lowest(G: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return (g, e), each expert's score in place `target` (g,) of (g, e, k), best first; (g,) whether a pool has any."""
    last = (target - 1).clamp_min(0)[:, None, None].expand(-1, G.shape[1], 1)
    return G.detach().gather(2, last)[..., 0], target > 0


class _At(torch.autograd.Function):
    """S.gather(2, I) for distinct positions. Backward doesn't add gradients, so their order doesn't matter."""

    @staticmethod
    def forward(ctx, S: Tensor, I: Tensor) -> Tensor:
        ctx.save_for_backward(I)
        ctx.shape = S.shape
        return S.gather(2, I)

    @staticmethod
    def backward(ctx, dG: Tensor) -> tuple[Tensor, None]:
        (I,) = ctx.saved_tensors
        return dG.new_zeros(ctx.shape).scatter(2, I, dG), None
