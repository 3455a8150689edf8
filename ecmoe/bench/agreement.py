"""Paths beside each other: how far each is from the plain one in float32, and whether it repeats to the bit."""

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ecmoe.model.moe import MoE


class Shared(nn.Module):
    """An expert choice layer whose choice of tokens is given: what two paths must agree in."""

    def __init__(self, layer: MoE) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        """(n, d), (e, k) -> the output, (n, d), and the gates, (e, k)."""
        gate = self.layer.router.logits(x).softmax(1).T.gather(1, token)
        return self.layer.experts(x, token, gate), gate


def agreement(layers: dict[str, MoE], x: Tensor, repeats: int = 20) -> list[dict]:
    """How far each layer (path -> one with the same weights, the first one plain) is from the plain path in float32 on x, (1, n, d).

    Returns:
        a row per path: the relative norm of the difference in the output and in each gradient, under one shared choice of
        tokens (none where there is no memory for float32); `same_bits`: whether all repeats, routing included, were equal.
    """
    first = next(iter(layers.values()))
    with torch.no_grad():
        token = first.router.assign(first.router.logits(x)).token
    gradient = torch.randn_like(x)

    def shared(layer: MoE, dtype: torch.dtype) -> dict[str, Tensor]:
        weights = {f"layer.{name}": p.detach().to(dtype).requires_grad_() for name, p in layer.named_parameters()}
        flat = x[0].detach().to(dtype).requires_grad_()
        out, gate = functional_call(Shared(layer), weights, (flat, token))
        wanted = {"x": flat, "gate": gate} | {name.removeprefix("layer."): p for name, p in weights.items()}
        gradients = torch.autograd.grad(out, list(wanted.values()), gradient[0].to(dtype))
        return {"output": out.detach()} | dict(zip(wanted, gradients, strict=True))

    def once(layer: MoE) -> list[Tensor]:
        out = layer(x)
        return [out.detach(), *torch.autograd.grad(out, [x, *layer.parameters()], gradient)]

    try:
        expected = shared(first, torch.promote_types(x.dtype, torch.float32))
    except torch.OutOfMemoryError:
        expected = {}
    rows = []
    for path, layer in layers.items():
        ours = shared(layer, x.dtype) if expected else {}
        apart = {part: float((ours.pop(part).to(t.dtype) - t).norm() / t.norm()) for part, t in expected.items()}
        bits = once(layer)
        same = all(all(map(torch.equal, bits, once(layer))) for _ in range(repeats - 1))
        rows.append({"path": path} | apart | {"same_bits": same})
    return rows
