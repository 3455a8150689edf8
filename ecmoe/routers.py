"""The table of routers: the facts that configs, FLOP counts and report pages need about each one, without torch.

Letters are the paper's: n tokens compete, e experts choose, each expert takes k = n c / e tokens (Eq. 1)."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from importlib import import_module
from typing import Any

from ecmoe.files import ConfigError


def exact(factor: float | None) -> Fraction:
    """Return the fraction that a capacity factor stands for: 11/10 for 1.1, 4/3 for 4 / 3 (no float equals either)."""
    if factor is None:
        raise ConfigError("capacity_factor=null: must be a number, such as 2.0 (k = n c / e)")
    return Fraction(factor).limit_denominator(1_000_000)


def bucket_size(n: int, e: int, c: float | None, rounding: str = "exact") -> int:
    """Return k = n c / e (Eq. 1), the tokens that each of e experts takes of n, for c experts per token on average.

    The study compares values of c, so by default a k that isn't a whole number in 1..n is a ConfigError, as is c=None;
    rounding="down" accepts any n: k = max(1, floor(n c / e)), but at most n."""
    share = exact(c) / e
    if rounding == "down":
        return min(max(n * share.numerator // share.denominator, 1), n)
    remedy = "a router outside a RunConfig may round: rounding='down', or altered(model, rounding='down')"
    if share > 1 or n * share.numerator < share.denominator:
        k = float(min(share, 10**9)) * n  # type: ignore[arg-type]
        raise ConfigError(f"capacity_factor={c}: every expert would take k={k:g} of n={n} tokens; k must lie in 1..n, so "
                          f"capacity_factor in {e / n:g}..{e} (num_experts); {remedy}")  # fmt: skip
    if n * share.numerator % share.denominator:
        raise ConfigError(
            f"capacity_factor={c} gives every one of num_experts={e} experts n c / e = {float(share * n):g} of n={n} "
            f"tokens, which isn't a whole number: make n (batch_size x sequence_length for pool=batch) a multiple of "
            f"{share.denominator}, or change capacity_factor or num_experts; {remedy}"
        )
    return n * share.numerator // share.denominator


def equal_share(n: int, e: int) -> int:
    """Return n / e, the tokens per expert if all get the same number; raise a ConfigError if e doesn't divide n."""
    if n % e:
        raise ConfigError(f"num_experts={e}: must divide the n={n} tokens of a batch (batch_size x sequence_length)")
    return n // e


def check_cap(b: int | None, c: float) -> None:
    """Raise a ConfigError if b < c: with at most b experts per token, the average can't be c."""
    if b is not None and b < c:
        raise ConfigError(f"max_experts_per_token={b}: capacity_factor={c:g} is the average per token, above the cap of {b} "
                          f"(n b >= e k must hold): use at least {math.ceil(c)}, or a capacity_factor of at most {b}")  # fmt: skip


def check_top_k(top_k: int, e: int) -> None:
    """Raise a ConfigError unless 1 <= top_k <= e."""
    if not 1 <= top_k <= e:
        raise ConfigError(f"top_k={top_k}: must lie in 1..{e} (num_experts={e}: a token can't choose an expert twice)")


@dataclass(frozen=True)
class RouterRow:
    """The facts about one router. Where a fact depends on a config, it is a function of the config's values."""

    layer: str | None  # "module:Class"; None for the dense model, which has no MoE layer
    keys: tuple[str, ...]  # RunConfig keys that it reads; two runs that differ only in other routers' keys are the same
    # The average number of experts offered per token, to count FLOPs; and whether it is an estimate, as where tokens
    # request more experts or fewer by their scores.
    experts_per_token: Callable[[Mapping[str, Any]], float] = lambda values: 1
    estimated: bool = False
    # Class, config, (V,) token counts -> router. None: call the class with d_model and `keys` by name.
    build: Callable[..., Any] | None = None
    # Further inputs: "token ids" and "tasks" of a batch, which images don't have, or "token counts" of the corpus.
    needs: Callable[[Mapping[str, Any]], tuple[str, ...]] = lambda values: ()
    capacity: bool = False  # whether capacity_factor limits the tokens per expert in evaluation
    check: Callable[[Any], object] = lambda config: None  # raises a ConfigError if the config can't work

    @property
    def cls(self) -> type:
        """The router class; reading it imports torch. Raises a ValueError for the dense model."""
        if self.layer is None:
            raise ValueError("the dense model has no layer with experts, and so no router")
        module, name = self.layer.split(":")
        return getattr(import_module(module), name)


def _check_expert_choice(config: Any) -> None:
    bucket_size(config.pool_tokens, config.num_experts, config.capacity_factor)
    check_cap(config.max_experts_per_token, config.capacity_factor)


def _build_hash(cls: type, config: Any, token_counts: Any) -> Any:
    if config.hash_table == "modulo":
        token_counts = None
    elif token_counts is None:
        raise ValueError("hash_table=balanced needs token_counts, the corpus' token frequencies")
    return cls(config.d_model, config.num_experts, config.vocab_size, config.capacity_factor, token_counts)


def _no_more_than_all(values: Mapping[str, Any]) -> float:
    return min(values["capacity_factor"], values["num_experts"])


ROUTERS: dict[str, RouterRow] = {
    "expert_choice": RouterRow(
        "ecmoe.routing.expert_choice:ExpertChoice",
        ("num_experts", "capacity_factor", "gate", "pool", "max_experts_per_token", "cap_solver"),
        experts_per_token=_no_more_than_all,
        capacity=True,
        check=_check_expert_choice,
    ),
    "token_choice": RouterRow(
        "ecmoe.routing.token_choice:TokenChoice",
        ("num_experts", "capacity_factor", "top_k", "gate", "priority", "balance", "aux_loss_weight", "z_loss_weight"),
        experts_per_token=lambda values: values["top_k"],
        capacity=True,
        check=lambda c: check_top_k(c.top_k, c.num_experts),
    ),
    "hash": RouterRow(
        "ecmoe.routing.hash:Hash",
        ("num_experts", "capacity_factor", "hash_table"),
        build=_build_hash,
        needs=lambda values: ("token ids", "token counts") if values["hash_table"] == "balanced" else ("token ids",),
        capacity=True,
    ),
    "dense_moe": RouterRow(
        "ecmoe.routing.dense:Dense", ("num_experts",), experts_per_token=lambda values: values["num_experts"]
    ),
    "dense": RouterRow(None, ()),
    "linear_assignment": RouterRow(
        "ecmoe.routing.linear_assignment:LinearAssignment",
        ("num_experts",),
        check=lambda c: equal_share(c.batch_size * c.sequence_length, c.num_experts),
    ),
    "kmeans": RouterRow(
        "ecmoe.routing.kmeans:KMeans",
        ("num_experts", "capacity_factor"),
        build=lambda cls, c, _: cls(c.d_model, c.num_experts, c.capacity_factor, seed=c.seed),
        capacity=True,
    ),
    "task_level": RouterRow(
        "ecmoe.routing.task_level:TaskLevel",
        ("num_experts", "num_tasks", "task_table"),
        build=lambda cls, c, _: cls(c.d_model, c.num_experts, c.num_tasks, c.task_table),
        needs=lambda values: ("tasks",),
    ),
    "expert_threshold": RouterRow(
        "ecmoe.routing.expert_threshold:ExpertThreshold",
        ("num_experts", "capacity_factor", "gate", "threshold_beta"),
        experts_per_token=_no_more_than_all,
        build=lambda cls, c, _: cls(c.d_model, c.num_experts, c.capacity_factor, c.threshold_beta, c.gate),
        check=lambda c: bucket_size(c.batch_size * c.sequence_length, c.num_experts, c.capacity_factor),
    ),
}
