"""Router: what all routers share. A router decides who processes what; nothing else in the layer knows how.

Letters: n tokens of width d, e experts, k slots of an expert, S (n, e) the scores.
"""

import inspect
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from ecmoe.config import CHOICES
from ecmoe.routers import exact
from ecmoe.routing.assignment import Assignment, pack
from ecmoe.routing.cutoff import RunningState

TRITON = find_spec("triton") is not None
# Numbers in the tokens of a compiled layer, n d, from which the kernels are faster: on an H200 (EC-CF2, e 32, f 4 d, bf16) they
# took 1.04 to 1.97 of plain PyTorch's time at up to 2^23, and 0.57 to 0.93 from 2^25 on (`ecmoe bench auto`).
FEW = 2**24


class Router(RunningState):
    """Base of all routers: linear scores in float32, and an `assign` that each family writes. One with other scores
    overrides `read`, which `MoE` calls and `logits` is made of.

    Args:
        d_model: d, width of a token.
        num_experts: e.
        learned: False for routers without weights (hash).

    Attributes:
        weight: (d, e) parameter W_g (Eq. 2), or None.
        causal: set by `causal_routing`: no token's routing may see another token.
        kernels: who computes, see `fast`; a layer's `kernels` is its router's.
        static: does `assign` in training have sizes that depend on no data, and read nothing from the device?
        across: does it choose among the tokens of all ranks? Its sizes then depend on what they hold.
    """

    static = across = False

    def __init__(self, d_model: int, num_experts: int, *, learned: bool = True) -> None:
        super().__init__()
        if num_experts < 1:
            raise ValueError(f"num_experts={num_experts}: must be at least 1")
        self.d_model, self.num_experts = d_model, num_experts
        self.weight = nn.Parameter(torch.empty(d_model, num_experts)) if learned else None
        self.causal = False
        self.kernels = "plain"
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """W_g ~ N(0, 1/d): logits of unit variance for normalised tokens; ours, the paper is silent."""
        if self.weight is not None:
            nn.init.normal_(self.weight, std=self.d_model**-0.5)

    def logits(self, x: Tensor) -> Tensor:
        """(..., d) -> (n, e) scores before the softmax, in float32 whatever the dtype of x (float64 stays)."""
        return self.read(x.reshape(-1, x.shape[-1]))[0]

    def read(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(n, d) -> `logits`, and x: a layer that goes on with this x may get its two gradients added up in one pass."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        if self.weight is None:
            return torch.zeros(x.shape[0], self.num_experts, dtype=dtype, device=x.device), x
        with torch.autocast(x.device.type, enabled=False):  # bf16 scores would tie and flip
            if self.fast(x, x.shape[0]):
                from ecmoe import kernels

                return kernels.logits(x, self.weight)
            return x.to(dtype) @ self.weight.to(dtype), x

    def at_once(self, x: Tensor, w1: Tensor, w2: Tensor, room: int, **more: Any) -> Tensor | None:
        """What the layer returns for (n, d) tokens, if routing and experts can be one step for at most `room` slots."""
        return None

    def forward(self, logits: Tensor, **known: Any) -> Assignment:
        """`assign`, called as PyTorch calls a module: its hooks see every choice (see `watched`)."""
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
        """Choose. Routing with a mask is routing the unmasked tokens alone.

        Args:
            logits: (n, e) from `logits`.
            batch_shape: (B, T) with B T = n, for routers to which sequences matter.
            token_ids: (n,) vocabulary ids, for hash routing.
            task_ids: (n,) task of each token, for task-level routing.
            mask: (n,) bool, False for padding.
        """
        raise NotImplementedError(f"{type(self).__name__} doesn't say how it assigns")

    def fast(self, x: Tensor, n: int) -> bool:
        """Do the kernels compute, where x is and for n tokens?

        As the function `fast` says, but for "auto" in a compiled pass of few tokens (`FEW`): plain PyTorch is compiled to fewer
        launches, which then take longer than the work. That holds where sums may come in any order; in our runs they may not,
        and plain PyTorch is slow at that.
        """
        if not fast(self.kernels, x):
            return False
        if self.kernels != "auto" or not torch.compiler.is_compiling():
            return True
        return torch.are_deterministic_algorithms_enabled() or n * self.d_model >= FEW

    def check_causal(self) -> None:
        """Raise a ValueError if the router can't route causally yet."""

    def end_step(self) -> None:
        """Running statistics move here, once after every optimiser step: `ecmoe.track` sees to it."""

    @property
    def moves(self) -> bool:
        """Has it running statistics?"""
        return type(self).end_step is not Router.end_step

    @property
    def gathers(self) -> bool:
        """Do running statistics take in what `assign` sees now? In training, where tokens compete; not again where a pass is
        recomputed."""
        return self.training and not self.causal and not recomputing()

    def extra_repr(self) -> str:
        kept = {name: getattr(self, name, ...) for name in inspect.signature(type(self)).parameters}
        return ", ".join(f"{name}={value}" for name, value in kept.items() if type(value) in (int, float, str))


def fast(kernels: str, x: Tensor) -> bool:
    """Do the kernels of ecmoe/kernels compute on x? "plain": never; "triton", "triton-bmm": always; "auto": on CUDA, where
    triton is.

    On an H200 the layer (EC-CF2, e 32, bf16; n 512 to 131,072, d 256 to 4096) took 0.32 to 1.02 of plain PyTorch's time,
    forward and with the backward pass, launched kernel by kernel and as a CUDA graph: `ecmoe bench auto`.
    """
    return kernels != "plain" and (kernels != "auto" or x.is_cuda and TRITON)


def recomputing() -> bool:
    """Is this forward pass a recomputation inside a backward pass (activation checkpointing)?"""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def without_padding(logits: Tensor, mask: Tensor | None) -> Tensor:
    """(n, e) with 0 where the mask, (n,), is False: what padding holds, NaN too, reaches no score and no gradient."""
    return logits if mask is None else logits.masked_fill(~mask[:, None], 0.0)


def one_of(name: str, value: Any, key: str = "", choices: tuple[str, ...] = ()) -> Any:
    """The value, or a ValueError with the argument's name, the value and what it may be: as the key of a RunConfig called so."""
    choices = choices or CHOICES[key or name]
    if value not in choices:
        raise ValueError(f"{name}={value!r}: must be one of {', '.join(choices)}")
    return value


def by_token(
    expert: Tensor, gate: Tensor, e: int, mask: Tensor | None, slots: int | None, limit: Tensor | None = None
) -> Assignment:
    """`pack` with the expert, and its gate, that each of n tokens asks for, both (n,); none where mask is False."""
    if mask is not None:
        expert = torch.where(mask, expert, e)
    token = torch.arange(len(expert), device=expert.device)
    return pack(token, expert, gate, n=len(expert), e=e, slots=slots, limit=limit)


def capacity(
    factor: float | None, top_k: int, n: int, e: int, mask: Tensor | None = None
) -> tuple[int | None, Tensor | None]:
    """Token choice's capacity, ceil(factor top_k n / e): slots of an expert, and the limit under a mask.

    Args:
        factor: capacity factor; None: nothing is dropped.
        top_k, n, e: experts that a token asks for, tokens, experts.
        mask: (n,) bool: only unmasked tokens count in the limit, a scalar tensor (None without a mask).
    """
    if factor is None:
        return None, None
    share = exact(factor) * top_k / e  # a float would round up at whole numbers
    slots = min(-(-n * share.numerator // share.denominator), n)  # rounded up
    return slots, None if mask is None else -(-mask.sum() * share.numerator // share.denominator)
