"""Who chooses: one family a file. Every router returns an `Assignment`; `MoE` does the rest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ecmoe.routers import ROUTERS
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
    "altered",
    "build_router",
    "causal_routing",
    "pack",
    "routers",
    "watched",
]


def build_router(config: RunConfig, token_counts: Tensor | None = None) -> Router:
    """The router that a config names, as its row in ecmoe/routers.py says.

    Args:
        config: a checked RunConfig.
        token_counts: (V,) how often each token id occurs in the corpus; needed by hash_table=balanced.

    Raises:
        ValueError: the dense model has no router; token_counts is missing.
    """
    row = ROUTERS[config.router]
    if row.build is not None:
        return row.build(row.cls, config, token_counts)
    return row.cls(config.d_model, **{key: getattr(config, key) for key in row.keys})


def routers(model: nn.Module) -> list[Router]:
    """All routers of a model, first layer to last."""
    return [module for module in model.modules() if isinstance(module, Router)]


@contextmanager
def watched(model: nn.Module) -> Iterator[list[tuple[Tensor, Assignment]]]:
    """A list that fills with (logits (n, e), assignment) of every MoE layer, in order, as the model runs."""
    seen: list[tuple[Tensor, Assignment]] = []
    hooks = [router.register_forward_hook(lambda _, args, out: seen.append((*args, out))) for router in routers(model)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def altered(model: nn.Module, **attributes: Any) -> Iterator[nn.Module]:
    """Within it every router has these attributes: `altered(model, pool="sequence")`. Afterwards, those of before.

    Args:
        attributes: values; a function becomes a method, so that `assign=` replaces how a router chooses.
    """
    before = [(router, dict(vars(router))) for router in routers(model)]
    try:
        for router, _ in before:
            for name, value in attributes.items():
                setattr(router, name, MethodType(value, router) if callable(value) else value)
        yield model
    finally:
        for router, old in before:
            for name in attributes:
                if name in old:
                    setattr(router, name, old[name])
                else:
                    vars(router).pop(name, None)  # the class's own is seen again


@contextmanager
def causal_routing(model: nn.Module) -> Iterator[nn.Module]:
    """Within it no token's routing sees another token, and nothing is dropped.

    Expert choice routes by its running cut-offs, gathered by training forwards; token choice and hash
    routing see the token alone once there is no capacity.

    Args:
        model: any module with `MoE` layers in it.

    Raises:
        ValueError: a router has no cut-offs yet.
    """
    for router in routers(model):
        router.check_causal()
    with altered(model, causal=True):
        yield model
