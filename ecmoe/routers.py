"""One row a router: all that a config, a label, a count of FLOPs or a page needs to know of it, without torch.

To add a router, write its class (ecmoe/routing/, one family a file) and its row here.

Letters are the paper's: n tokens compete, e experts choose, each takes k = n c / e (Eq. 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from importlib import import_module
from typing import Any

from ecmoe.files import ConfigError


def exact(factor: float) -> Fraction:
    """The fraction that a capacity factor stands for: 1.1 is 11/10 and 4/3 is 4/3, which no float is."""
    return Fraction(factor).limit_denominator(1_000_000)


def bucket_size(n: int, e: int, c: float, rounding: str = "exact") -> int:
    """k = n c / e (Eq. 1). The ablation is over c, so a fraction is an error, not something to round.

    Args:
        n: tokens that compete. e: experts. c: capacity factor, the average number of experts a token.
        rounding: "exact", or "down", with which any n works: k = max(1, floor), and never more than n.

    Raises:
        ConfigError: k is no whole number, or an expert would need more than the n tokens there are; not by "down".
    """
    share = exact(c) / e
    if rounding == "down":
        return min(max(n * share.numerator // share.denominator, 1), n)
    if share > 1 or n * share < 1:
        raise ConfigError(
            f"capacity_factor={c}: every expert would take k={float(min(share, 10**9)) * n:g} of n={n} tokens; k must lie in "  # type: ignore[arg-type]
            f"1..n, so capacity_factor in {e / n:g}..{e} (num_experts)"
        )
    if n * share.numerator % share.denominator:
        raise ConfigError(
            f"capacity_factor={c} gives every one of num_experts={e} experts n c / e = {float(share * n):g} of "
            f"n={n} tokens, which is no whole number: make n (batch_size x sequence_length for "
            f"pool=batch) a multiple of {share.denominator}, or change capacity_factor or num_experts; "
            "a layer of your own may round: ExpertChoice(..., rounding='down')"
        )
    return n * share.numerator // share.denominator


@dataclass(frozen=True)
class RouterRow:
    """What a router is.

    Attributes:
        layer: "module:Class"; None: the model has no layer with experts.
        keys: of RunConfig that it reads. Others don't make two runs different.
        label: says of a `Said` what its arms differ in.
        experts_per_token: of a config's keys, how many experts an average token is offered; FLOPs follow.
        build: class, config, (V,) token counts -> the router; None: the class takes d_model and `keys` by name.
        needs: of a config's keys, what else it reads: "token ids" and "tasks" of a batch, which images don't have;
            "token counts" of the corpus.
        capacity: has an expert so many places, set by capacity_factor, in evaluation?
        asked: of a config's keys, how many experts a token asks for; capacity_factor is a multiple of it.
        check: of a config that can't work, raises ConfigError with key, value and remedy.
    """

    layer: str | None
    keys: tuple[str, ...]
    label: Callable[[Said], None]
    experts_per_token: Callable[[Mapping[str, Any]], float] = lambda values: 1
    build: Callable[..., Any] | None = None
    needs: Callable[[Mapping[str, Any]], tuple[str, ...]] = lambda values: ()
    capacity: bool = False
    asked: Callable[[Mapping[str, Any]], int] = lambda values: 1
    check: Callable[[Any], None] = lambda config: None

    @property
    def cls(self) -> type:
        """The class itself; imports torch."""
        if self.layer is None:
            raise ValueError("the dense model has no layer with experts, and so no router")
        module, name = self.layer.split(":")
        return getattr(import_module(module), name)


class Said:
    """The words of a label, and the keys that they are made of."""

    words: list[str]

    def __init__(self, values: Mapping[str, Any], axes: Sequence[str]) -> None:
        self.values, self.axes, self.words = values, axes, []

    def __getitem__(self, key: str) -> Any:
        return self.values[key]

    def name(self, text: str) -> None:
        """Say it whatever the keys are."""
        self.words.append(text)

    def unusual(self, key: str, usual: Any, text: str | None = None) -> None:
        """Say a key where it isn't as usual; `text` says it in words."""
        value = self.values[key]
        if key not in self.axes and value != usual:
            self.words.append(text or f"{key}={f'{value:g}' if isinstance(value, float) else value}")

    def gate(self) -> None:
        """Said always: two arms that differ in it must not share a name."""
        if "gate" not in self.axes:
            self.words.append("raw" if self["gate"] == "softmax" else self["gate"])

    def capacity(self, usual: float) -> None:
        """Token choice's, where it isn't as usual."""
        c = self["capacity_factor"]
        self.unusual("capacity_factor", usual, "nothing dropped" if c is None else f"c={c:g}")


def arm_label(config: Any, axes: Sequence[str] = ()) -> str:
    """What a reader calls an arm: "EC-CF2 renormalized", "GShard top-2 raw", "Switch top-1 c=2".

    Gates are always said where there is a choice. The usual settings go without saying: batch pools, an auxiliary loss
    of weight 0.01, capacity 1.25 for top-1, hash routing and k-means, and 1 for top-k.

    Args:
        config: a RunConfig, or the keys of one. axes: keys that stand on a figure's axis, and are left out.
    """
    said = Said(config if isinstance(config, Mapping) else config.to_dict(), axes)
    row = ROUTERS[said["router"]]
    row.label(said)
    if row.layer is not None:
        said.unusual("moe_init_scale", 1.0, f"init={said['moe_init_scale']:g}")
    return " ".join(said.words)


def experts_per_token(values: Mapping[str, Any]) -> float:
    """Experts that an average token is offered, by a config's keys."""
    return ROUTERS[values["router"]].experts_per_token(values)


# The families, in a row's terms


def _expert_choice(said: Said) -> None:
    cap = None if "max_experts_per_token" in said.axes else said["max_experts_per_token"]
    c = "" if "capacity_factor" in said.axes else f"{said['capacity_factor']:g}"
    said.name(f"EC-CAP{cap}" if cap is not None else f"EC-CF{c}" if c else "EC")
    if cap is not None:
        said.unusual("capacity_factor", 2.0, f"c={c}")
    said.gate()
    if cap is not None:
        said.unusual("cap_solver", "feasible", said["cap_solver"])
    said.unusual("pool", "batch")


def _check_expert_choice(config: Any) -> None:
    b, c, e = config.max_experts_per_token, config.capacity_factor, config.num_experts
    _check_bucket(config, config.pool_tokens)
    if b is not None and b < c:
        raise ConfigError(f"max_experts_per_token={b}: {e} experts take {c:g} n tokens in all, but {b} n places are "
                          f"allowed (n b >= e k): use at least {math.ceil(c)}, or a capacity_factor of at most {b}")  # fmt: skip


def _check_bucket(config: Any, n: int) -> None:
    if config.capacity_factor is None:
        raise ConfigError(f"capacity_factor=null: {config.router} needs a number, such as 2.0 (k = n c / e)")
    bucket_size(n, config.num_experts, config.capacity_factor)


def _expert_threshold(said: Said) -> None:
    said.name("Threshold" + ("" if "capacity_factor" in said.axes else f"-CF{said['capacity_factor']:g}"))
    said.gate()
    said.unusual("threshold_beta", 0.999, f"beta={said['threshold_beta']:g}")


def _token_choice(said: Said) -> None:
    k, balance = said["top_k"], said["balance"]
    said.name("Token choice" if "top_k" in said.axes else {1: "Switch top-1", 2: "GShard top-2"}.get(k, f"Top-{k}"))
    if k > 1 or "top_k" in said.axes:
        said.gate()
    else:  # renormalized, a single gate would be 1
        said.unusual("gate", "softmax", said["gate"])
    said.capacity(1.25 if k == 1 else 1.0)
    said.unusual("priority", "order", "batch priority")
    said.unusual("balance", "switch", {"bias": "loss-free bias", "first_choice": "first choices counted"}.get(balance))
    if balance not in ("none", "bias"):
        said.unusual("aux_loss_weight", 0.01, f"aux={said['aux_loss_weight']:g}")
    said.unusual("z_loss_weight", 0.0, f"z={said['z_loss_weight']:g}")


def _check_token_choice(config: Any) -> None:
    if config.top_k > config.num_experts:
        raise ConfigError(
            f"top_k={config.top_k} is more than num_experts={config.num_experts}: a token can't choose an expert twice"
        )


def _hash(said: Said) -> None:
    said.name("Hash")
    said.unusual("hash_table", "modulo", said["hash_table"])
    said.capacity(1.25)


def _build_hash(cls: type, config: Any, token_counts: Any) -> Any:
    if config.hash_table == "modulo":
        token_counts = None
    elif token_counts is None:
        raise ValueError("hash_table=balanced needs token_counts, the corpus' token frequencies")
    return cls(config.d_model, config.num_experts, config.vocab_size, config.capacity_factor, token_counts)


def _kmeans(said: Said) -> None:
    said.name("K-means")
    said.capacity(1.25)


def _task_level(said: Said) -> None:
    said.name("Task level")
    said.unusual("task_table", "learned", said["task_table"])


def _check_linear_assignment(config: Any) -> None:
    n = config.batch_size * config.sequence_length
    if n % config.num_experts:
        raise ConfigError(f"num_experts={config.num_experts}: linear assignment gives every expert n/e tokens, so it must "
                          f"divide n=batch_size x sequence_length={n}")  # fmt: skip


def _no_more_than_all(values: Mapping[str, Any]) -> float:
    return min(values["capacity_factor"], values["num_experts"])


ROUTERS: dict[str, RouterRow] = {
    "expert_choice": RouterRow(
        "ecmoe.routing.expert_choice:ExpertChoice",
        ("num_experts", "capacity_factor", "gate", "pool", "max_experts_per_token", "cap_solver"),
        _expert_choice,
        experts_per_token=_no_more_than_all,
        capacity=True,
        check=_check_expert_choice,
    ),
    "token_choice": RouterRow(
        "ecmoe.routing.token_choice:TokenChoice",
        ("num_experts", "capacity_factor", "top_k", "gate", "priority", "balance", "aux_loss_weight", "z_loss_weight"),
        _token_choice,
        experts_per_token=lambda values: values["top_k"],
        capacity=True,
        asked=lambda values: values["top_k"],
        check=_check_token_choice,
    ),
    "hash": RouterRow(
        "ecmoe.routing.hash:Hash",
        ("num_experts", "capacity_factor", "hash_table"),
        _hash,
        build=_build_hash,
        needs=lambda values: ("token ids", "token counts") if values["hash_table"] == "balanced" else ("token ids",),
        capacity=True,
    ),
    "dense_moe": RouterRow(
        "ecmoe.routing.dense:Dense",
        ("num_experts",),
        lambda said: said.name("Dense MoE"),
        experts_per_token=lambda values: values["num_experts"],
    ),
    "dense": RouterRow(None, (), lambda said: said.name("Dense")),
    "linear_assignment": RouterRow(
        "ecmoe.routing.linear_assignment:LinearAssignment",
        ("num_experts",),
        lambda said: said.name("BASE"),
        check=_check_linear_assignment,
    ),
    "kmeans": RouterRow(
        "ecmoe.routing.kmeans:KMeans",
        ("num_experts", "capacity_factor"),
        _kmeans,
        build=lambda cls, c, _: cls(c.d_model, c.num_experts, c.capacity_factor, seed=c.seed),
        capacity=True,
    ),
    "task_level": RouterRow(
        "ecmoe.routing.task_level:TaskLevel",
        ("num_experts", "num_tasks", "task_table"),
        _task_level,
        build=lambda cls, c, _: cls(c.d_model, c.num_experts, c.num_tasks, c.task_table),
        needs=lambda values: ("tasks",),
    ),
    "expert_threshold": RouterRow(
        "ecmoe.routing.expert_threshold:ExpertThreshold",
        ("num_experts", "capacity_factor", "gate", "threshold_beta"),
        _expert_threshold,
        experts_per_token=_no_more_than_all,
        build=lambda cls, c, _: cls(c.d_model, c.num_experts, c.capacity_factor, c.threshold_beta, c.gate),
        check=lambda config: _check_bucket(config, config.batch_size * config.sequence_length),
    ),
}
