"""track: update the routers' running statistics once after every optimiser step, in any training loop.

Training forwards gather data for the cut-offs of expert choice, the centroids of k-means and the loss-free bias.
Without updates, a router is trained with its initial statistics; a loop that doesn't call `track` gets a warning.
"""

import sys
import warnings
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from ecmoe.routing import routers

# Layers for which `track` hasn't been called -> whether an optimiser has stepped on their experts yet.
_untracked: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


def track(model: nn.Module, optimizer: torch.optim.Optimizer) -> RemovableHandle:
    """Update the running statistics of all routers of a model, over all ranks, after every `optimizer.step()`.

    Args:
        model: any module that contains `MoE` layers. optimizer: the training loop's; call once per optimiser.

    Returns:
        a handle whose `remove()` stops the updates.
    """
    for module in model.modules():
        _untracked.pop(module, None)
    tracked = routers(model)

    def end_step(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for router in tracked:
            router.end_step()

    return optimizer.register_step_post_hook(end_step)


def expect_tracking(layer: Any) -> None:
    """Warn when an optimiser updates a layer's experts a second time and `track` hasn't been called for the layer."""
    _untracked[layer] = False


def _warn(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if not _untracked:
        return
    moved = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for layer, stepped in list(_untracked.items()):
        if id(layer.w1) not in moved or not layer.router.moves:  # its router may have been replaced
            continue
        _untracked[layer] = True
        if stepped:
            _untracked.clear()
            told = "which aren't updated: call ecmoe.track(model, optimizer) once, before the training loop"
            depth = 1  # of the loop's frame: torch has wrapped `step`, a scheduler perhaps too
            while sys._getframe(depth).f_globals.get("__name__", "").startswith("torch."):
                depth += 1
            warnings.warn(f"{type(layer.router).__name__} has running statistics, {told}", stacklevel=depth + 1)
            return


register_optimizer_step_post_hook(_warn)
