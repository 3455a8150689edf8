"""Expert parallelism: of R ranks each holds e/R of a layer's experts, and computes them for the tokens of all.

    rows = P x           gather: what each expert takes of this rank's tokens, s slots of each of the e experts
    rows -> all ranks    all-to-all: e/R experts' slots from each rank, R s of an expert
    y = gelu(rows w1) w2                  the layer's own path, with its gates
    y -> all ranks       all-to-all back
    out = P^T y          combine

Expert choice gives every expert as many tokens, known in advance: sizes are fixed, and nobody waits for counts. Routers whose
sizes depend on the data first agree on the largest (GShard, Lepikhin et al. 2021, section 3.3, pads likewise).

Losses are means over a rank's tokens, and their gradients' mean over ranks is what data parallelism takes of all other
weights. An expert's gradient has all ranks' tokens in it already: so what comes back to it is divided by R.
"""

from functools import reduce
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn import functional as F

from ecmoe.model.moe import MoE


def share_experts(model: nn.Module, mesh: DeviceMesh, device: torch.device) -> set[nn.Parameter]:
    """Leave each rank of a one-dimensional mesh its part of all experts, on its device; the parameters that are now shared out.

    They are DTensors: `clip_grad_norm_`, checkpoints and optimisers of PyTorch know what they are parts of.
    """
    group = dist.new_group(mesh.mesh.flatten().tolist())  # of its own: tokens must not wait for gradients
    shared = set()
    for layer in (module for module in model.modules() if isinstance(module, MoE)):
        for name in ("w1", "w2"):
            part = getattr(layer, name).detach().chunk(mesh.size())[mesh.get_local_rank()]
            whole = DTensor.from_local(part.to(device, copy=True), mesh, [Shard(0)], run_check=False)
            setattr(layer, name, nn.Parameter(whole))
            shared.add(getattr(layer, name))
        layer.exchange = Exchange(group)
    return shared


class Exchange:
    """`MoE.experts` where the experts lie on the ranks of a group."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.ranks = group, dist.get_world_size(group)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, layer: MoE, x: Tensor, token: Tensor, gate: Tensor) -> Tensor:
        """(n, d) tokens, (e, s) assignment -> (n, d), all of this rank; every rank must call it."""
        n, e = len(x), len(token)
        if not (layer.router.static and layer.training):
            most = torch.tensor(token.shape[1], device=x.device)
            dist.all_reduce(most, dist.ReduceOp.MAX, self.group)
            more = (0, int(most) - token.shape[1])
            token, gate = F.pad(token, more, value=n), F.pad(gate, more)
        slots = max(layer.room(x) // e, 1)
        parts = zip(token.split(slots, 1), gate.split(slots, 1), strict=True)  # one expert may get nearly all tokens
        return reduce(torch.add, (self._some(layer, x, *part) for part in parts))

    def _some(self, layer: MoE, x: Tensor, token: Tensor, gate: Tensor) -> Tensor:
        e, R, dtype = len(token), self.ranks, x.dtype
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        rows, back = _gathered(layer.router.fast(x, len(x)), x, token)
        # (R e/R s, d): slots of all ranks, rank after rank; `slot` sorts them by expert.
        slot = torch.arange(len(rows), device=x.device).view(R, e // R, -1).transpose(0, 1).reshape(e // R, -1)
        gates = _Sent.apply(gate, self.group, R).view(-1)[slot]
        w1, w2 = (w.to_local() for w in (layer.w1, layer.w2))  # type: ignore[attr-defined]
        y = layer.compute(_Sent.apply(rows, self.group, R), w1, w2, slot, gates)
        return back(_Sent.apply(y, self.group, 1 / R)).to(dtype)


class _Sent(torch.autograd.Function):
    """The first part of the rows to the first rank, and so on: what the ranks sent, in their order. Gradients go back times a factor."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup, factor: float) -> Tensor:
        ctx.group, ctx.factor = group, factor
        rows = rows.contiguous()
        dist.all_to_all_single(out := torch.empty_like(rows), rows, group=group)
        return out

    @staticmethod
    @once_differentiable  # a second pass would have to know which factors are those of a first
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None, None]:
        return _Sent.apply(dout, ctx.group, 1.0).mul_(ctx.factor), None, None


def _gathered(fast: bool, x: Tensor, token: Tensor) -> tuple[Tensor, Any]:
    """P x, (e s, d), and the function P^T of such rows; an empty slot (token n) reads any row, and is added to none."""
    n, d = x.shape
    if fast:
        from ecmoe.kernels.rows import invert

        inverse = invert(token, n)
        return _Gather.apply(x, token, inverse), lambda rows: _Combine.apply(rows, token, inverse)
    slots = token.reshape(-1)
    rows = x.index_select(0, slots.clamp(max=n - 1))
    return rows, lambda rows: rows.new_zeros(n + 1, d).index_add(0, slots, rows)[:-1]


class _Gather(torch.autograd.Function):
    """P x by kernels, and its transpose backwards."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, inverse: Tensor) -> Tensor:
        from ecmoe.kernels.rows import gather

        ctx.save_for_backward(token, inverse)
        return gather(x.contiguous(), token).flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, drows: Tensor) -> tuple[Tensor, None, None]:
        token, inverse = ctx.saved_tensors
        return _Combine.apply(drows, token, inverse), None, None


class _Combine(torch.autograd.Function):
    """P^T rows by kernels, and its transpose backwards."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, token: Tensor, inverse: Tensor) -> Tensor:
        from ecmoe.kernels.rows import combine

        ctx.save_for_backward(token, inverse)
        return combine(rows.contiguous().view(*token.shape, -1), inverse)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None, None]:
        token, inverse = ctx.saved_tensors
        return _Gather.apply(dout, token, inverse), None, None
