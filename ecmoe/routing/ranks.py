"""What routers of several ranks know of each other: sums of statistics, and pools of all ranks' tokens.

Letters: R ranks, g pools of m tokens of a rank, e experts, S (g, e, m) scores. A pool of all ranks has R m places, rank
after rank, as one process has that is given all their batches in that order.
"""

import torch
import torch.distributed as dist
from torch import Tensor

ROWS = 128  # of a tile of the products: sizes between two of its multiples take as long


def ranks() -> int:
    """R; 1 where no process group is."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def add_up(*tensors: Tensor) -> None:
    """Each becomes its sum over all ranks, in place."""
    if ranks() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def gathered(S: Tensor) -> Tensor:
    """(..., m) of every rank -> (..., R m), without gradients; all ranks must call it, with as many tokens."""
    every = [torch.empty_like(S, memory_format=torch.contiguous_format) for _ in range(ranks())]
    dist.all_gather(every, S.detach().contiguous())
    return torch.cat(every, -1)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def own(I: Tensor, m: int) -> Tensor:
    """Places, (g, e, s), that a rank's own tokens have of those chosen, (g, e, k), in the pools of all ranks, in that order.

    R m is no place, and m the place of an empty slot.

    s is the same on all ranks: what the luckiest of them won of an expert, rounded up to whole tiles.
    """
    owner = I // m
    won = int(torch.stack([(owner == rank).sum(2).max() for rank in range(ranks())]).max())  # waits for the device
    s = min(-(-won // ROWS) * ROWS, I.shape[2], m)
    mine = owner == dist.get_rank()
    first = (~mine).byte().argsort(dim=2, stable=True)[..., :s]  # the own before the others'
    return torch.where(mine, I % m, m).gather(2, first)
