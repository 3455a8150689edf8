"""track: running statistics of routers move once after every step of an optimiser, whoever's training loop it is.

Cut-offs of expert choice, centroids of k-means and the loss-free bias are gathered by training forwards. A loop that
never lets them move trains a router by what it was at first; the first loop that does so is told.
"""

import warnings
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from ecmoe.routing import routers

# Layers whose statistics nobody has moved yet: has an optimiser moved their experts once?
_untracked: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


def track(model: nn.Module, optimizer: torch.optim.Optimizer) -> RemovableHandle:
    """Move the running statistics of all routers of a model after every `optimizer.step()`; under several ranks, over all.

    Args:
        model: any module with `MoE` layers in it. optimizer: that of its loop; call once for each.

    Returns:
        a handle whose `remove()` ends it.
    """
    for module in model.modules():
        _untracked.pop(module, None)
    tracked = routers(model)

    def end_step(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for router in tracked:
            router.end_step()

    return optimizer.register_step_post_hook(end_step)


def expect_tracking(layer: Any) -> None:
    """Warn when an optimiser moves a layer's experts a second time, and nobody its router's statistics."""
    if layer.router.moves:
        _untracked[layer] = False


def _warn(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if not _untracked:
        return
    moved = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for layer, stepped in list(_untracked.items()):
        if id(layer.w1) not in moved or not layer.router.moves:  # it may have another router now
            continue
        _untracked[layer] = True
        if stepped:
            _untracked.clear()
            told = "which nobody moves: call ecmoe.track(model, optimizer) once, before the training loop"
            warnings.warn(f"{type(layer.router).__name__} has running statistics, {told}", stacklevel=4)
            return


register_optimizer_step_post_hook(_warn)
