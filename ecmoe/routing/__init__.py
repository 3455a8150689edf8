"""Who chooses: one family a file. Every router returns an `Assignment`; `MoE` does the rest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ecmoe.routing.assignment import Assignment, pack
from ecmoe.routing.dense import Dense
from ecmoe.routing.expert_choice import ExpertChoice
from ecmoe.routing.expert_threshold import ExpertThreshold
from ecmoe.routing.hash import Hash
from ecmoe.routing.kmeans import KMeans
from ecmoe.routing.linear_assignment import LinearAssignment
from ecmoe.routing.router import Router
from ecmoe.routing.task_level import TaskLevel
from ecmoe.routing.token_choice import TokenChoice

if TYPE_CHECKING:
    from ecmoe.config import RunConfig

__all__ = [
    "Assignment",
    "Dense",
    "ExpertChoice",
    "ExpertThreshold",
    "Hash",
    "KMeans",
    "LinearAssignment",
    "Router",
    "TaskLevel",
    "TokenChoice",
    "build_router",
    "causal_routing",
    "pack",
]


def build_router(config: RunConfig, token_counts: Tensor | None = None) -> Router:
    """The router that a config names.

    Args:
        config: a checked RunConfig.
        token_counts: (V,) how often each token id occurs in the corpus; needed by hash_table=balanced.
    """
    d, e, c = config.d_model, config.num_experts, config.capacity_factor
    match config.router:
        case "expert_choice":
            return ExpertChoice(d, e, c, config.max_experts_per_token, config.pool, config.gate, config.cap_solver)
        case "token_choice":
            return TokenChoice(
                d,
                e,
                config.top_k,
                c,
                gate=config.gate,
                priority=config.priority,
                aux_loss_weight=config.aux_loss_weight,
                z_loss_weight=config.z_loss_weight,
                balance=config.balance,
            )
        case "hash":
            if config.hash_table == "balanced" and token_counts is None:
                raise ValueError("hash_table=balanced needs token_counts, the corpus' token frequencies")
            counts = token_counts if config.hash_table == "balanced" else None
            return Hash(d, e, config.vocab_size, c, counts)
        case "dense_moe":
            return Dense(d, e)
        case "linear_assignment":
            return LinearAssignment(d, e)
        case "kmeans":
            return KMeans(d, e, c, seed=config.seed)
        case "task_level":
            return TaskLevel(d, e, config.num_tasks, config.task_table)
        case "expert_threshold":
            return ExpertThreshold(d, e, c, config.threshold_beta, config.gate)
    raise ValueError(f"router={config.router!r} has no MoE layer")


@contextmanager
def causal_routing(model: nn.Module) -> Iterator[nn.Module]:
    """Within it no token's routing sees another token, and nothing is dropped.

    Expert choice routes by its running cut-offs, gathered by training forwards; token choice and hash
    routing see the token alone once there is no capacity.

    Raises:
        ValueError: a router has no cut-offs yet.
    """
    routers = [module for module in model.modules() if isinstance(module, Router)]
    for router in routers:
        router.check_causal()
    before = [router.causal for router in routers]
    try:
        for router in routers:
            router.causal = True
        yield model
    finally:
        for router, causal in zip(routers, before, strict=True):
            router.causal = causal
