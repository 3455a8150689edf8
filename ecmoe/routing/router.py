"""Router: the base class. A router decides which expert processes which token; the rest of the layer doesn't know how.

Letters: n tokens of width d, e experts.
"""

import inspect
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from ecmoe.config import ROUTER_KEYS, check_key
from ecmoe.routers import exact
from ecmoe.routing.assignment import Assignment, pack
from ecmoe.routing.cutoff import RunningState

TRITON, CUTE = (find_spec(package) is not None for package in ("triton", "quack"))
# From this n d on the kernels are faster in a compiled layer: on an H200 (EC-CF2, e 32, f 4 d, bf16) they took 1.04 to
# 1.97 of plain PyTorch's time up to an n d of 2^23, and 0.57 to 0.93 of it from 2^25 on (`ecmoe bench auto`).
FEW = 2**24


class Router(RunningState):
    """Base class of all routers: linear scores in float32, and an `assign` that each family implements. A router with
    other scores overrides `read`, which `MoE` and `logits` call.

    Args:
        d_model, num_experts: d, the width of a token, and e.
        learned: False for routers without a weight W_g, such as hash.

    Attributes:
        weight: (d, e) parameter W_g (Eq. 2), or None.
        causal: whether no token's routing may see another token; set by `causal_routing`.
        kernels: implementation to use, see `fast`; `MoE.kernels` reads and sets this attribute.
        static: whether tensor sizes in `assign` are independent of the data in training, with no read from the device.
        across: whether tokens of all ranks compete; tensor sizes then depend on the data.
    """

    static = across = False
    rounding = "exact"  # read only by routers that compute k = n c / e

    def __init__(self, d_model: int, num_experts: int, *, learned: bool = True) -> None:
        super().__init__()
        self.d_model, self.num_experts = d_model, num_experts
        Router.check(self)  # what a subclass checks isn't set yet
        self.weight = nn.Parameter(torch.empty(d_model, num_experts)) if learned else None
        self.causal, self.kernels = False, "plain"
        if learned:  # a class with other state calls it once it has that
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw W_g ~ N(0, 1/d), so that normalised tokens have logits of unit variance; ours, the paper is silent."""
        super().reset_parameters()
        if self.weight is not None:
            nn.init.normal_(self.weight, std=self.d_model**-0.5)

    def check(self, *names: str) -> None:
        """Raise a ConfigError if an attribute, by default any, is invalid as a key of RunConfig (see also `altered`)."""
        for name in names or vars(self):
            if name in ROUTER_KEYS:
                check_key(name, getattr(self, name))

    def logits(self, x: Tensor) -> Tensor:
        """Return (n, e) scores before the softmax for x, (..., d); at least in float32, whatever the dtype of x."""
        return self.read(x.reshape(-1, x.shape[-1]))[0]

    def read(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of x, (n, d), and x. With the returned x, both gradients of x may be added in one pass."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        if self.weight is None:
            return torch.zeros(x.shape[0], self.num_experts, dtype=dtype, device=x.device), x
        with full_precision(x):  # bf16 scores would tie and flip
            if self.fast(x, x.shape[0]):
                from ecmoe import kernels

                return kernels.logits(x, self.weight)
            return x.to(dtype) @ self.weight.to(dtype), x

    def at_once(self, x: Tensor, weights: Callable[[], tuple[Tensor, Tensor]], room: int, **more: Any) -> Tensor | None:
        """Return the layer's output for (n, d) tokens if it can run as one step of at most `room` slots, else None.
        weights: returns w1 and w2; called only if needed, as it may copy them."""
        return None

    def forward(self, logits: Tensor, **known: Any) -> Assignment:
        """Call `assign` as a PyTorch module, so that forward hooks see every choice (see `watched`)."""
        return self.assign(logits, **known)

    def assign(
        self,
        logits: Tensor,
        *,
        batch_shape: tuple[int, int] | None = None,
        token_ids: Tensor | None = None,
        task_ids: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Assignment:
        """Assign tokens to experts. With a mask, the result is the same as for the unmasked tokens alone.

        Args:
            logits: (n, e) from `logits`. mask: (n,) bool, False for padding.
            batch_shape: (B, T) with B T = n, for routers that must tell sequences apart.
            token_ids, task_ids: (n,) vocabulary ids and tasks of the tokens, for hash and task-level routing.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement assign")

    def fast(self, x: Tensor, n: int) -> bool:
        """Return whether the kernels compute n tokens on the device of x: see the function `fast`.

        One exception: in a compiled pass over few tokens (`FEW`), "auto" uses plain PyTorch, which then needs fewer
        launches, and launches take longer than the work; but not under deterministic algorithms, which slow it down.
        """
        compiled = torch.compiler.is_compiling() and not torch.are_deterministic_algorithms_enabled()
        return fast(self.kernels, x) and not (self.kernels == "auto" and compiled and n * self.d_model < FEW)

    def check_causal(self) -> None:
        """Raise a ValueError if the router can't route causally yet."""

    def end_step(self) -> None:
        """Update the running statistics. `ecmoe.track` calls it once after every optimiser step."""

    @property
    def moves(self) -> bool:
        """Whether the router has running statistics."""
        return type(self).end_step is not Router.end_step

    @property
    def gathers(self) -> bool:
        """Whether `assign` now collects running statistics: in training, neither causal nor in a recomputed pass."""
        return self.training and not self.causal and not recomputing()

    def extra_repr(self) -> str:
        kept = {name: getattr(self, name, ...) for name in inspect.signature(type(self)).parameters}
        return ", ".join(f"{name}={value}" for name, value in kept.items() if type(value) in (int, float, str))


def fast(kernels: str, x: Tensor) -> bool:
    """Return whether the kernels of ecmoe/kernels compute on x. "plain": never; "auto": on CUDA if triton is
    installed, as the layer then takes 0.32 to 1.02 of plain PyTorch's time (`ecmoe bench auto`); all others: always.
    """
    return kernels != "plain" and (kernels != "auto" or x.is_cuda and TRITON)


def lacking(kernels: str) -> str:
    """Return which package `kernels` needs that isn't installed, and what to do; "" if none."""
    if kernels not in ("plain", "auto") and not TRITON:
        return f"kernels={kernels!r} needs triton: `pip install triton`, or use kernels='plain'"
    if kernels == "cute" and not CUTE:
        return "kernels='cute' needs quack-kernels: `pip install 'quack-kernels[cu13]'`, or use kernels='triton'"
    return ""


def full_precision(x: Tensor) -> torch.autocast:
    """Return a context without autocast on the device of x."""
    return torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False)  # the meta device has no autocast


def recomputing() -> bool:
    """Return whether this forward pass is a recomputation inside a backward pass (activation checkpointing)."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def without_padding(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Return (n, e) logits with 0 where mask (n,) is False, so that padding, even NaN, reaches no score or gradient."""
    return logits if mask is None else logits.masked_fill(~mask[:, None], 0.0)


def checked_ids(name: str, ids: Tensor, size: int) -> Tensor:
    """Return the ids, flat, int64. On a CPU, raise a ValueError if one isn't in 0..size-1; a GPU's host would wait."""
    ids = ids.reshape(-1).long()
    if ids.device.type == "cpu" and not torch.compiler.is_compiling() and len(wrong := ids[(ids < 0) | (ids >= size)]):
        raise ValueError(f"{name} has {int(wrong[0])}: must lie in 0..{size - 1}, also where it is padding")
    return ids


def by_token(expert: Tensor, gate: Tensor, e: int, mask: Tensor | None, factor: float | None = None) -> Assignment:
    """Call `pack` with one request per token, its expert and gate, both (n,); no request where mask is False."""
    n = len(expert)
    if mask is not None:
        expert = torch.where(mask, expert, e)
    token = torch.arange(n, device=expert.device)
    return pack(token, expert, gate, n=n, e=e, **capacity(factor, 1, n, e, mask))


def capacity(factor: float | None, top_k: int, n: int, e: int, mask: Tensor | None) -> dict[str, Any]:
    """Return what `pack` needs for token choice's capacity, ceil(factor top_k n / e); factor None: nothing is dropped.

    With a mask, only unmasked tokens count, so that the limit is a scalar tensor.
    """
    if factor is None:
        return {"slots": None}
    share = exact(factor) * top_k / e  # exact: a float error could round a whole number up
    slots = min(-(-n * share.numerator // share.denominator), n)  # rounded up
    return {"slots": slots, "limit": None if mask is None else -(-mask.sum() * share.numerator // share.denominator)}
