"""Expert parallelism: each of R ranks holds e/R of a layer's experts, and computes them for the tokens of all ranks.

    rows = P x           gather: this rank's tokens, s slots for each of the e experts
    rows -> all ranks    all-to-all: each rank gets the slots of its e/R experts from all ranks, R s per expert
    y = gelu(rows w1) w2                  as in a layer on one rank, with the gates
    y -> all ranks       all-to-all back
    out = P^T y          combine

Expert choice gives all experts the same number of tokens: sizes are fixed, and no rank waits for counts. If a router's
sizes depend on the data, ranks first agree on the largest (GShard, Lepikhin et al. 2021, section 3.3, pads likewise).
Data parallelism averages gradients over ranks; an expert's already sums over all ranks' tokens and is divided by R.
"""

from functools import partial, reduce
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn import functional as F

from ecmoe.files import ConfigError
from ecmoe.model.moe import MoE


def share_experts(model: nn.Module, mesh: DeviceMesh, device: torch.device) -> set[nn.Parameter]:
    """Keep only this rank's part of all experts, moved to `device`, and return the sharded parameters, as DTensors on the
    one-dimensional mesh: PyTorch's `clip_grad_norm_`, checkpoints and optimisers work with these. Raises a ConfigError, on
    every rank, if their number doesn't divide a layer's experts.
    """
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    for layer in layers:
        if layer.router.num_experts % mesh.size():
            raise ConfigError(f"num_experts={layer.router.num_experts}: must be a multiple of the {mesh.size()} ranks")
    group = dist.new_group(mesh.mesh.flatten().tolist())  # a separate group, so that tokens don't wait for gradients
    shared = set()
    for layer in layers:
        for name in ("w1", "w2"):
            part = getattr(layer, name).detach().chunk(mesh.size())[mesh.get_local_rank()]
            whole = DTensor.from_local(part.to(device, copy=True), mesh, [Shard(0)], run_check=False)
            setattr(layer, name, nn.Parameter(whole))
            shared.add(getattr(layer, name))
        layer.exchange = partial(_exchanged, group)
    return shared


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _exchanged(group: dist.ProcessGroup, layer: MoE, x: Tensor, token: Tensor, gate: Tensor) -> Tensor:
    """`MoE.experts` for experts that are spread over a group's ranks, all of which must call it: (n, d) outputs for this
    rank's (n, d) tokens and their (e, s) assignment."""
    n, e = len(x), len(token)
    if not (layer.router.static and layer.training):
        most = torch.tensor(token.shape[1], device=x.device)
        dist.all_reduce(most, dist.ReduceOp.MAX, group)
        more = (0, int(most) - token.shape[1])
        token, gate = F.pad(token, more, value=n), F.pad(gate, more)
    slots = max(layer.room(x) // e, 1)
    parts = zip(token.split(slots, 1), gate.split(slots, 1), strict=True)  # if one expert gets nearly all tokens
    return reduce(torch.add, (_some_slots(group, layer, x, *part) for part in parts))


def _some_slots(group: dist.ProcessGroup, layer: MoE, x: Tensor, token: Tensor, gate: Tensor) -> Tensor:
    e, R, dtype, kind = len(token), dist.get_world_size(group), x.dtype, x.device.type
    if torch.is_autocast_enabled(kind):
        x = x.to(torch.get_autocast_dtype(kind))
    rows, back = _gathered(layer.router.fast(x, len(x)), x, token)
    # (R e/R s, d): the slots of all ranks, ordered by rank; `slot` reorders them by expert.
    slot = torch.arange(len(rows), device=x.device).view(R, e // R, -1).transpose(0, 1).reshape(e // R, -1)
    gates = _Sent.apply(gate, group, R).view(-1)[slot]
    w1, w2 = (w.to_local() for w in (layer.w1, layer.w2))  # type: ignore[attr-defined]
    y = layer.compute(_Sent.apply(rows, group, R), w1, w2, slot, gates)
    return back(_Sent.apply(y, group, 1 / R)).to(dtype)


class _Sent(torch.autograd.Function):
    """Send the i-th part of the rows to rank i; return the received parts, by rank. Gradients are scaled by factor."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup, factor: float) -> Tensor:
        ctx.group, ctx.factor = group, factor
        rows = rows.contiguous()
        dist.all_to_all_single(out := torch.empty_like(rows), rows, group=group)
        return out

    @staticmethod
    @once_differentiable  # a second derivative would apply the factor wrongly
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None, None]:
        return _Sent.apply(dout, ctx.group, 1.0).mul_(ctx.factor), None, None


def _gathered(fast: bool, x: Tensor, token: Tensor) -> tuple[Tensor, Any]:
    """Return P x, (e s, d), and a function that applies P^T. Empty slots (token n) read any row and add to none."""
    n, d = x.shape
    if fast:
        from ecmoe.kernels.rows import invert

        inverse = invert(token, n)
        return _Moved.apply(x, token, inverse, False), lambda rows: _Moved.apply(rows, token, inverse, True)
    slots = token.reshape(-1)
    rows = x.index_select(0, slots.clamp(max=n - 1))
    return rows, lambda rows: rows.new_zeros(n + 1, d).index_add(0, slots, rows)[:-1]


class _Moved(torch.autograd.Function):
    """P x, or P^T x if `back`, computed by kernels; the backward pass applies the transpose."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, inverse: Tensor, back: bool) -> Tensor:
        from ecmoe.kernels.rows import combine, gather

        ctx.save_for_backward(token, inverse)
        ctx.back = back
        if back:
            return combine(x.contiguous().view(*token.shape, -1), inverse)
        return gather(x.contiguous(), token).flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None, None, None]:
        return _Moved.apply(dout, *ctx.saved_tensors, not ctx.back), None, None, None
