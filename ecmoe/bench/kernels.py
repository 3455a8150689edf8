"""What `ecmoe bench` says of the kernels beyond the layer's time: agreement, same bits, and each pass alone.

Letters: n tokens of width d, e experts of hidden width f, k = n c / e slots of an expert.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from importlib import import_module
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ecmoe.bench import clock as timing
from ecmoe.config import bucket_size
from ecmoe.model.moe import MoE
from ecmoe.routing.router import TRITON

KINDS = ("triton", "triton-bmm")
# Passes that may be faster cut otherwise on another GPU: module of ecmoe/kernels, the constant there, what to try.
CUTS: dict[str, list[tuple[str, str, list[dict[str, int]]]]] = {
    "logits": [("routing", "LOGITS", [
        {"DEPTH": 32}, {"ROWS": 64, "num_warps": 4}, {"num_stages": 4}, {"DEPTH": 128}, {"ROWS": 64, "DEPTH": 128, "num_warps": 4},
    ])],
    "logits backward": [
        ("routing", "LOGITS_DX", [
            {"COLUMNS": 64}, {"COLUMNS": 256, "num_warps": 8}, {"ROWS": 128, "COLUMNS": 64, "num_warps": 8},
        ]),
        ("routing", "LOGITS_DW", [{"ROWS": 64}, {"ROWS": 64, "COLUMNS": 64, "num_warps": 4}, {"COLUMNS": 64, "num_warps": 4}]),
    ],
    "take": [
        ("selection", "CHUNK", [{"BLOCK": 1024}, {"BLOCK": 1024, "num_warps": 2}, {"num_warps": 8}]),
        ("selection", "SEARCH", [{"num_warps": 8}, {"num_warps": 4}, {"BLOCK": 2048, "num_warps": 8}]),
        ("selection", "GUESS", [{"num_warps": 4}, {"num_warps": 16}]),
    ],
    "gather": [("rows", "GATHER", [{"ROWS": 16}, {"ROWS": 16, "COLUMNS": 256}, {"ROWS": 8, "COLUMNS": 1024}])],
    "gather_dot": [("rows", "GATHER_DOT", [{"ROWS": 2}, {"ROWS": 8}, {"ROWS": 2, "num_warps": 2}])],
    "combine": [("rows", "COMBINE", [{"num_warps": 2}, {"ROWS": 2, "num_warps": 2}, {"COLUMNS": 512}])],
} | {
    f"cap {b}": [
        ("capped", "SAMPLE_TILE", [{"ELEMENTS": 1024}, {"ELEMENTS": 4096}, {"ELEMENTS": 4096, "num_warps": 8}]),
        ("capped", "TILE", [{"ELEMENTS": 4096}, {"ELEMENTS": 4096, "num_warps": 4}, {"ELEMENTS": 16384}]),
    ]
    for b in (2, 3)
}  # fmt: skip


def kernels_run(device: torch.device) -> bool:
    """Is it worth timing the kernels here: is triton installed, and is this a GPU, not Triton's interpreter?"""
    return device.type == "cuda" and TRITON


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
        router and the gates (none where there is no memory for float32); `same_bits`: whether all repeats, routing
        included, gave the same bits.
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

    try:
        expected = run(first, wide)
    except torch.OutOfMemoryError:
        expected = {}
    rows = []
    for name, layer in layers.items():
        ours = run(layer, x.dtype) if expected else {}
        row = {part: _distance(ours.pop(part), t) for part, t in expected.items()}
        rows.append({"layer": name} | row | {"same_bits": _same_bits(layer, x, repeats)})
    return rows


def _distance(ours: Tensor, theirs: Tensor) -> float:
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
        products TFLOP/s. Products are timed with every `Tile` of `kernels.TILES`, other passes as they are and cut
        otherwise (`CUTS`); what doesn't fit says so.
    """
    from ecmoe import kernels
    from ecmoe.kernels.capped import capped
    from ecmoe.kernels.product import TILES, fusible, product, product_backward
    from ecmoe.kernels.rows import activate_, combine, gather, gather_dot_, invert, scale_

    k = bucket_size(n, e, c)
    made = {"device": device, "dtype": dtype}
    x, dout = torch.randn(n, d, **made), torch.randn(n, d, **made)
    w1, w2 = torch.randn(e, d, f, **made) * d**-0.5, torch.randn(e, f, d, **made) * f**-0.5
    w_g = torch.randn(d, e, device=device) * d**-0.5
    logits = kernels.logits(x, w_g)
    S, dS = kernels.scores(logits), torch.randn(e, n, device=device)
    token = kernels.select(S, k)
    gate = S.gather(1, token)
    x_in, dy, inverse = gather(x, token), gather(dout, token), invert(token, n)
    h, a, y = torch.bmm(x_in, w1), torch.randn(e, k, f, **made), torch.randn_like(x_in)
    slope, dh = product(x_in, w1, gate)[0] if fusible(x_in, w1) else activate_(h.clone(), gate)[0], torch.randn_like(h)
    size, counted = dtype.itemsize, [torch.empty(i, dtype=torch.long, device=device) for i in (e, 9)]
    X, XIN, H, W, SCORES = n * d * size, e * k * d * size, e * k * f * size, e * d * f * size, n * e * 4
    flops = 2 * e * k * d * f

    calls: dict[str, tuple[Callable, float, float]] = {  # what to call, bytes, FLOPs
        "logits": (lambda: kernels.logits(x, w_g), X + SCORES, 2 * n * d * e),
        "logits, PyTorch": (lambda: x.float() @ w_g, X + SCORES, 2 * n * d * e),
        "logits backward": (
            lambda: torch.ops.ecmoe.logits_backward(logits, dout, x, w_g), 3 * X + 2 * SCORES, 4 * n * d * e,
        ),
        "scores": (lambda: kernels.scores(logits), 2 * SCORES, 0),
        "scores, PyTorch": (lambda: logits.softmax(1).T.contiguous(), 4 * SCORES, 0),
        "scores backward": (lambda: torch.ops.ecmoe.scores_backward(dS, S), 3 * SCORES, 0),
        "take": (lambda: kernels.take(S, k), SCORES + 12 * e * k, 0),
        "take, topk": (lambda: S.topk(k), SCORES + 12 * e * k, 0),
        "cap 2": (lambda: capped(S[None], k, 2), SCORES, 0),
        "cap 3": (lambda: capped(S[None], k, 3), SCORES, 0),
        "tally": (lambda: kernels.tally_(token, n, *counted), 8 * e * k + 4 * n, 0),
        "invert": (lambda: invert(token, n), SCORES + 12 * e * k, 0),
        "gather": (lambda: gather(x, token), 2 * XIN, 0),
        "gather, index_select": (lambda: x.index_select(0, token.view(-1)), 2 * XIN, 0),
        "gather_dot": (lambda: gather_dot_(dout, y, token, gate), 3 * XIN, 0),
        "combine": (lambda: combine(y, inverse), XIN + X + SCORES, 0),
        "combine, index_add": (
            lambda: y.new_zeros(n, d).index_add(0, token.view(-1), y.view(-1, d)), XIN + X, 0,
        ),
        "activate": (lambda: activate_(h, gate), 2.5 * H, 0),
        "scale": (lambda: scale_(dh, slope, gate), 2.5 * H, 0),
        "x_in w1, bmm": (lambda: torch.bmm(x_in, w1), XIN + W + H, flops),
        "a w2, bmm": (lambda: torch.bmm(a, w2), XIN + W + H, flops),
        "dy w2^T, bmm": (lambda: torch.bmm(dy, w2.transpose(1, 2)), XIN + W + H, flops),
        "a^T dy, bmm": (lambda: torch.bmm(a.transpose(1, 2), dy), XIN + W + H, flops),
        "dh w1^T, bmm": (lambda: torch.bmm(dh, w1.transpose(1, 2)), XIN + W + H, flops),
        "x_in^T dh, bmm": (lambda: torch.bmm(x_in.transpose(1, 2), dh), XIN + W + H, flops),
    }  # fmt: skip
    calls = {name: timed for name, timed in calls.items() if not name.startswith("cap ") or c <= int(name[4:]) < e}
    for name, cuts in CUTS.items():
        for module, constant, others in cuts if name in calls else ():
            for other in others:
                call, *work = calls[name]
                otherwise = partial(_otherwise, call, f"ecmoe.kernels.{module}", constant, other)
                calls[f"{name}: {constant} {', '.join(f'{key} {value}' for key, value in other.items())}"] = (
                    otherwise,
                    *work,
                )
    for tile in TILES if fusible(x_in, w1) else ():
        name = ", ".join(f"{key} {value}" for key, value in tile._asdict().items())
        calls |= {
            f"x_in w1, a, slope: {name}": (
                lambda t=tile: product(x_in, w1, gate, tile=t), XIN + W + 1.5 * H, flops,
            ),
            f"x_in w1, a: {name}": (
                lambda t=tile: product(x_in, w1, gate, keep=False, tile=t), XIN + W + H, flops,
            ),
            f"dy w2^T, dh: {name}": (
                lambda t=tile: product_backward(dy, w2, slope, gate, out=dh, tile=t), XIN + W + 1.5 * H, flops,
            ),
        }  # fmt: skip
    table = []
    for name, (call, moved, work) in calls.items():
        try:
            timing.warm_up(call, device)
            seconds = statistics.median(timing.in_turns({name: call}, repeats, device)[name])
        except Exception as error:  # a tile that this GPU has no room for
            table.append({"pass": name, "error": f"{type(error).__name__}: {error}"[:200]})
            continue
        row = {"pass": name, "us": 1e6 * seconds, "mb": moved / 1e6, "gb_per_s": moved / seconds / 1e9}
        table.append(row | ({"tflops": work / seconds / 1e12} if work else {}))
    return table


def _otherwise(call: Callable, module: str, constant: str, cut: dict[str, int]) -> object:
    """The call with other values in a constant of its kernels."""
    with patch.dict(getattr(import_module(module), constant), cut):
        return call()
