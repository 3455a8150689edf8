"""What `ecmoe bench` says of the kernels beyond the layer's time: agreement, same bits, and each pass alone.

Letters: n tokens of width d, e experts of hidden width f, k = n c / e slots of an expert.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ecmoe.config import bucket_size
from ecmoe.moe import MoE

KINDS = ("triton", "triton-bmm")


def kernels_run(device: torch.device) -> bool:
    """Is it worth timing the kernels here: is triton installed, and is this a GPU, not Triton's interpreter?"""
    return device.type == "cuda" and find_spec("triton") is not None


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
    """How far each layer is from the plain path in float32, under one shared choice of tokens.

    Args:
        layers: expert choice layers with the same weights, the first one plain. x: (1, n, d).
        repeats: of forward and backward on the same input, for `same_bits`.

    Returns:
        a row per layer: the relative norm of the difference in the output and in the gradients of x, w1, w2, the
        router and the gates; `same_bits`: whether all repeats, routing included, gave the same bits.
    """
    first = next(iter(layers.values()))
    with torch.no_grad():
        token = first.router.assign(first.router.logits(x)).token
    gradient = torch.randn_like(x[0])
    wide = torch.promote_types(x.dtype, torch.float32)

    def run(layer: MoE, dtype: torch.dtype) -> dict[str, Tensor]:
        weights = {f"layer.{name}": p.detach().to(dtype).requires_grad_() for name, p in layer.named_parameters()}
        flat = x[0].detach().to(dtype).requires_grad_()
        out, gate = functional_call(Shared(layer), weights, (flat, token))
        wanted = {"x": flat, "gate": gate} | {name.removeprefix("layer."): p for name, p in weights.items()}
        gradients = torch.autograd.grad(out, list(wanted.values()), gradient.to(dtype))
        return {"output": out.detach()} | dict(zip(wanted, gradients, strict=True))

    expected = {name: t.cpu() for name, t in run(first, wide).items()}  # the device's memory is for the others
    rows = []
    for name, layer in layers.items():
        ours = run(layer, x.dtype)
        row = {part: _distance(ours.pop(part), t) for part, t in expected.items()}
        rows.append({"layer": name} | row | {"same_bits": _same_bits(layer, x, repeats)})
    return rows


def _distance(ours: Tensor, theirs: Tensor) -> float:
    theirs = theirs.to(ours.device)
    return float(torch.linalg.vector_norm(ours.to(theirs.dtype) - theirs) / torch.linalg.vector_norm(theirs))


def _same_bits(layer: MoE, x: Tensor, repeats: int) -> bool:
    x = x.detach().requires_grad_()
    gradient = torch.randn_like(x)

    def run() -> list[Tensor]:
        out = layer(x)
        return [out.detach(), *torch.autograd.grad(out, [x, *layer.parameters()], gradient)]

    first = run()
    return all(all(torch.equal(a, b) for a, b in zip(first, run(), strict=True)) for _ in range(repeats - 1))


def passes(
    n: int, d: int, f: int, e: int, c: float, dtype: torch.dtype, device: torch.device, repeats: int
) -> list[dict]:
    """Time each kernel alone, and what it stands against in PyTorch, on random data.

    Returns:
        a row per pass: microseconds (median), the megabytes that it must read and write and their rate, and for
        products TFLOP/s. Products are timed with every `Tile` of `kernels.TILES`; one that doesn't fit says so.
    """
    from ecmoe import kernels

    k = bucket_size(n, e, c)
    made = {"device": device, "dtype": dtype}
    x, dout = torch.randn(n, d, **made), torch.randn(n, d, **made)
    w1, w2 = torch.randn(e, d, f, **made) * d**-0.5, torch.randn(e, f, d, **made) * f**-0.5
    w_g = torch.randn(d, e, device=device) * d**-0.5
    S = kernels.logits(x, w_g).softmax(1)
    by_expert = S.T.contiguous()
    token = kernels.select(by_expert, k)
    gate = by_expert.gather(1, token)
    x_in, dy, inverse = kernels.gather(x, token), kernels.gather(dout, token), kernels.invert(token, n)
    h, a = torch.bmm(x_in, w1), torch.randn(e, k, f, **made)
    dh, rows = torch.randn_like(h), torch.randn_like(x_in)
    size = dtype.itemsize
    X, XIN, H, W, SCORES = n * d * size, e * k * d * size, e * k * f * size, e * d * f * size, n * e * 4
    product = 2 * e * k * d * f

    calls: dict[str, tuple[Callable, float, float]] = {  # what to call, bytes, FLOPs
        "logits": (lambda: kernels.logits(x, w_g), X + SCORES, 2 * n * d * e),
        "logits, PyTorch": (lambda: x.float() @ w_g, X + SCORES, 2 * n * d * e),
        "logits backward": (
            lambda: torch.ops.ecmoe.logits_backward(S, x, w_g), 2 * X + 2 * SCORES, 4 * n * d * e,
        ),
        "softmax, transpose": (lambda: S.softmax(1).T.contiguous(), 4 * SCORES, 0),
        "select": (lambda: kernels.select(by_expert, k), SCORES + 8 * e * k, 0),
        "select, topk": (lambda: by_expert.topk(k), SCORES + 8 * e * k, 0),
        "invert": (lambda: kernels.invert(token, n), SCORES + 12 * e * k, 0),
        "gather": (lambda: kernels.gather(x, token), 2 * XIN, 0),
        "gather, index_select": (lambda: x.index_select(0, token.view(-1)), 2 * XIN, 0),
        "combine": (lambda: kernels.combine(rows, inverse), XIN + X + SCORES, 0),
        "combine, index_add": (
            lambda: rows.new_zeros(n, d).index_add(0, token.view(-1), rows.view(-1, d)), XIN + X, 0,
        ),
        "activate": (lambda: kernels.activate(h, gate), 2 * H, 0),
        "activate backward": (lambda: kernels.activate_backward_(dh, h, gate), 3 * H, 0),
        "x_in w1, bmm": (lambda: torch.bmm(x_in, w1), XIN + W + H, product),
        "a w2, bmm": (lambda: torch.bmm(a, w2), XIN + W + H, product),
        "dy w2^T, bmm": (lambda: torch.bmm(dy, w2.transpose(1, 2)), XIN + W + H, product),
        "a^T dy, bmm": (lambda: torch.bmm(a.transpose(1, 2), dy), XIN + W + H, product),
        "dh w1^T, bmm": (lambda: torch.bmm(dh, w1.transpose(1, 2)), XIN + W + H, product),
        "x_in^T dh, bmm": (lambda: torch.bmm(x_in.transpose(1, 2), dh), XIN + W + H, product),
    }  # fmt: skip
    if kernels.fusible(x_in, w1):
        for tile in kernels.TILES:
            name = ", ".join(f"{key} {value}" for key, value in tile._asdict().items())
            calls[f"x_in w1, a: {name}"] = (
                lambda t=tile: kernels.product(x_in, w1, gate, tile=t), XIN + W + 2 * H, product,
            )  # fmt: skip
            calls[f"x_in w1, a, no h: {name}"] = (
                lambda t=tile: kernels.product(x_in, w1, gate, keep=False, tile=t), XIN + W + H, product,
            )  # fmt: skip
            calls[f"dy w2^T, dh: {name}"] = (
                lambda t=tile: kernels.product_backward(dy, w2, h, gate, tile=t), XIN + W + 2 * H, product,
            )  # fmt: skip
    table = []
    for name, (call, moved, flops) in calls.items():
        try:
            seconds = _time(call, repeats, device)
        except Exception as error:  # a tile that this GPU has no room for
            table.append({"pass": name, "error": f"{type(error).__name__}: {error}"[:200]})
            continue
        row = {"pass": name, "us": 1e6 * seconds, "mb": moved / 1e6, "gb_per_s": moved / seconds / 1e9}
        table.append(row | ({"tflops": flops / seconds / 1e12} if flops else {}))
    return table


def _time(call: Callable, repeats: int, device: torch.device) -> float:
    """Median seconds; on a GPU of events around calls that queue up, so that launching costs nothing."""
    if device.type != "cuda":
        call()
        samples = []
        for _ in range(repeats):
            began = time.perf_counter()
            call()
            samples.append(time.perf_counter() - began)
        return statistics.median(samples)
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    torch.cuda._sleep(1_000_000)  # cycles in which the queue fills
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in zip(events, events[1:], strict=False)) / 1e3
