"""Routers: which expert processes which token; one family per file. All return an `Assignment`; `MoE` does the rest."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import Any

from torch import Tensor, compiler, nn

from ecmoe.config import RunConfig
from ecmoe.files import ConfigError, check_known
from ecmoe.routers import ROUTERS
from ecmoe.routing.assignment import Assignment, pack
from ecmoe.routing.dense import Dense
from ecmoe.routing.expert_choice import ExpertChoice
from ecmoe.routing.expert_threshold import ExpertThreshold
from ecmoe.routing.hash import Hash
from ecmoe.routing.kmeans import KMeans
from ecmoe.routing.linear_assignment import LinearAssignment
from ecmoe.routing.router import Router, without_padding
from ecmoe.routing.task_level import TaskLevel
from ecmoe.routing.token_choice import TokenChoice

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
    "without_padding",
]


def build_router(config: RunConfig, token_counts: Tensor | None = None) -> Router:
    """Return the router that a config names, built as its row in ecmoe/routers.py specifies.

    token_counts: (V,) how often each token id occurs in the corpus. Raises a ValueError if hash_table=balanced lacks
    them, or if the config is that of the dense model, which has no router.
    """
    row = ROUTERS[config.router]
    by_name = {key: getattr(config, key) for key in row.keys}
    return row.build(row.cls, config, token_counts) if row.build else row.cls(config.d_model, **by_name)


def routers(model: nn.Module) -> list[Router]:
    """Return all routers of a model, from the first layer to the last."""
    return [module for module in model.modules() if isinstance(module, Router)]


@contextmanager
def watched(model: nn.Module) -> Iterator[list[tuple[Tensor, Assignment]]]:
    """Yield a list to which every MoE layer, in order, appends (logits (n, e), assignment) as the model runs. A model
    that `torch.compile` has compiled, which would call no hook, runs uncompiled until the context exits."""
    seen: list[tuple[Tensor, Assignment]] = []
    with ExitStack() as hooks, compiler.set_stance("force_eager"):
        for router in routers(model):
            hooks.enter_context(router.register_forward_hook(lambda _, args, out: seen.append((*args, out))))
        yield seen


@contextmanager
def altered(model: nn.Module, **attributes: Any) -> Iterator[nn.Module]:
    """Set attributes of every router, as in `altered(model, pool="sequence")`; restore the old values on exit.
    A function is bound as a method, so that `assign=` replaces how a router chooses. Raises a ConfigError if no router of
    the model has the attribute, or a router can't work with the value.
    """
    before = [(router, dict(vars(router))) for router in routers(model)]
    known = {name for router, _ in before for name in dir(router) if name[0] != "_"} - set(dir(nn.Module))
    check_known("no router has", attributes if before else (), sorted(known))
    if before and (fixed := sorted(attributes.keys() & {"d_model", "num_experts"})):
        raise ConfigError(f"{fixed[0]}={attributes[fixed[0]]!r}: the weights fix it; build another model")
    try:
        for router, _ in before:
            for name, value in attributes.items():
                setattr(router, name, MethodType(value, router) if callable(value) else value)
            router.check(*attributes)
        yield model
    finally:
        for router, old in before:
            for name in attributes:
                vars(router).pop(name, None)  # uncovers a class attribute
            vars(router).update({name: old[name] for name in attributes if name in old})


@contextmanager
def causal_routing(model: nn.Module) -> Iterator[nn.Module]:
    """Route so that no token's routing sees another token and nothing is dropped, until the context exits.

    Expert choice then routes by its running cut-offs, and raises a ValueError if no training has set them yet. Other
    routers see only the token itself once their experts have no capacity limit. model: contains `MoE` layers.
    """
    for router in routers(model):
        router.check_causal()
    with altered(model, causal=True):
        yield model
