"""Communication between the routers of several ranks: sums of statistics, and pools of all ranks' tokens.

Letters: R ranks, g pools of m tokens per rank, e experts, S (g, e, m) scores. A pool of all ranks has R m positions,
rank after rank, as if one process had all batches in that order.
"""

import torch
import torch.distributed as dist
from torch import Tensor

ROWS = 128  # of a tile of the matrix products: a size takes as long as the next multiple


def ranks() -> int:
    """Return R; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def add_up(*tensors: Tensor) -> None:
    """Replace each tensor with its sum over all ranks, in place."""
    if ranks() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def gathered(S: Tensor) -> Tensor:
    """Concatenate (..., m) of all ranks to (..., R m), without gradients; all ranks must call it, with equal m."""
    every = [torch.empty_like(S, memory_format=torch.contiguous_format) for _ in range(ranks())]
    dist.all_gather(every, S.detach().contiguous())
    return torch.cat(every, -1)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def own(I: Tensor, m: int) -> Tensor:
    """Return (g, e, s): the positions of this rank's own tokens among I, (g, e, k) positions in the pools of all ranks.

    The order is kept. In I, R m marks an empty slot; in the result, m does. s, equal on all ranks, is the most tokens of
    one rank that an expert chose in a pool, rounded up to whole tiles.
    """
    owner = I // m
    won = int(torch.stack([(owner == rank).sum(2).max() for rank in range(ranks())]).max())  # waits for the device
    s = min(-(-won // ROWS) * ROWS, I.shape[2], m)
    mine = owner == dist.get_rank()
    first = (~mine).byte().argsort(dim=2, stable=True)[..., :s]  # own tokens first
    return torch.where(mine, I % m, m).gather(2, first)
