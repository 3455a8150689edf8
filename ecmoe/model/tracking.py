"""track: update the routers' running statistics after every optimiser step; a loop that doesn't call it gets a warning.

Training forwards gather data for the cut-offs of expert choice, the centroids of k-means and the loss-free bias.
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

# MoE layers for which `track` hasn't been called -> whether an optimiser has updated their experts. At the second update
# there is a warning; a single step needs no statistics.
untracked: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


def track(model: nn.Module, optimizer: torch.optim.Optimizer) -> RemovableHandle:
    """Update the running statistics of all routers of a model, over all ranks, after every `optimizer.step()`.

    model: any module that contains `MoE` layers. optimizer: the training loop's; call once per optimiser. The updates
    stop when `remove()` of the returned handle is called.
    """
    for module in model.modules():
        untracked.pop(module, None)
    tracked = routers(model)

    def end_step(*_: Any) -> None:
        for router in tracked:
            router.end_step()

    return optimizer.register_step_post_hook(end_step)


def _warn(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    if not untracked:
        return
    moved = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for layer, stepped in list(untracked.items()):
        if id(layer.w1) not in moved or not layer.router.moves:  # its router may have been replaced
            continue
        untracked[layer] = True
        if stepped:
            untracked.clear()
            told = "which aren't updated: call ecmoe.track(model, optimizer) once, before the training loop"
            depth = 1  # of the loop's frame: torch has wrapped `step`, a scheduler perhaps too
            while sys._getframe(depth).f_globals.get("__name__", "").startswith("torch."):
                depth += 1
            warnings.warn(f"{type(layer.router).__name__} has running statistics, {told}", stacklevel=depth + 1)
            return


register_optimizer_step_post_hook(_warn)
