"""`ecmoe bench`: the layer against its floor, the six matrix products that it can't do without.

Two products forward and four backward, on (e, k, d) x (e, d, f) with k = n c / e: no layer with these experts
can be faster. A share of 0.7 means that the layer takes 1/0.7 of the floor's time, routing included. All
rows are measured in one run, in turns, on the same random data; times are medians.
"""

from __future__ import annotations

import ctypes
import json
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ecmoe.config import bucket_size
from ecmoe.moe import MoE
from ecmoe.routing import ExpertChoice, TokenChoice
from ecmoe.train import commit, device_name

PEERS = {"scattermoe": "ScatterMoE", "liger_kernel": "Liger"}

# n, d, f, e where nothing else is asked for: 0.1B/64E of Table 1 on a GPU, and what a CPU does in seconds.
SIZES = {
    "cuda": {"n": 65_536, "d_model": 768, "d_ff": 3072, "num_experts": 64},
    "cpu": {"n": 4096, "d_model": 256, "d_ff": 1024, "num_experts": 16},
}


def bench_layer(
    *,
    n: int | None = None,
    d_model: int | None = None,
    d_ff: int | None = None,
    num_experts: int | None = None,
    capacity_factor: float = 2.0,
    repeats: int = 15,
    compiled: bool = False,
    dtype: torch.dtype | None = None,
) -> pd.DataFrame:
    """Time the layer, forward and forward + backward, beside its floor and its baselines.

    Args:
        n: tokens. d_model, d_ff: d and f. num_experts: e. None: the device's `SIZES`.
        capacity_factor: c; token choice gets the same slots.
        repeats: of each row; the median is reported.
        compiled: measure each layer under torch.compile too.
        dtype: of weights and tokens; None: bf16 on a GPU, float32 on a CPU.

    Returns:
        a row per layer: milliseconds, share of the floor's speed, spread (quartiles) and peak memory on a GPU;
        `attrs` hold the setting and the peers that are not installed.

    Raises:
        ConfigError: k = n c / e is no whole number. ValueError: repeats below 2.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = SIZES[device.type]
    n, d_model = n or sizes["n"], d_model or sizes["d_model"]
    d_ff, num_experts = d_ff or sizes["d_ff"], num_experts or sizes["num_experts"]
    if repeats < 2:
        raise ValueError(f"repeats={repeats}: must be at least 2, for a median with quartiles")
    bucket_size(n, num_experts, capacity_factor)  # before any time is spent
    if device.type == "cpu":
        _keep_freed_memory()
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    torch.manual_seed(0)
    x = torch.randn(1, n, d_model, device=device, dtype=dtype, requires_grad=True)
    top_k = max(round(capacity_factor), 1)
    routers = {
        f"EC-CF{capacity_factor:g}": ExpertChoice(d_model, num_experts, capacity_factor),
        f"top-{top_k}, capacity {capacity_factor:g} n/e": TokenChoice(
            d_model, num_experts, top_k, capacity_factor / top_k, gate="renormalized"
        ),
        f"top-{top_k}, nothing dropped": TokenChoice(d_model, num_experts, top_k, gate="renormalized"),
    }
    steps: dict[str, Callable[[], Tensor]] = {}
    parameters: dict[str, list[Tensor]] = {}
    for name, router in routers.items():
        layer = MoE(router, d_model, d_ff).to(device, dtype)
        steps[name], parameters[name] = _call(layer, x), [x, *layer.parameters()]
        if compiled:
            steps[f"{name}, compiled"] = _call(torch.compile(layer), x)
            parameters[f"{name}, compiled"] = parameters[name]
        if name.startswith("EC") and n * n * capacity_factor <= 2**28:  # P has e k n entries
            steps[f"{name}, one-hot einsum"] = lambda layer=layer: one_hot_layer(layer, x)
            parameters[f"{name}, one-hot einsum"] = parameters[name]
    floor_forward, floor_both = _floor(n, d_model, d_ff, num_experts, capacity_factor, device, dtype)

    def forward_backward(step: Callable[[], Tensor], wanted: list[Tensor]) -> Callable[[], None]:
        return lambda: torch.autograd.grad(step(), wanted, grad_outputs=gradient, allow_unused=True)

    gradient = torch.randn_like(x)
    calls = {("floor", "forward"): floor_forward, ("floor", "forward + backward"): floor_both}
    for name, step in steps.items():
        calls[name, "forward"] = torch.no_grad()(step)
        calls[name, "forward + backward"] = forward_backward(step, parameters[name])
    times, memory = _measure(calls, repeats, device)

    flops = 4 * bucket_size(n, num_experts, capacity_factor) * num_experts * d_model * d_ff
    rows = []
    for (name, what), samples in times.items():
        median = statistics.median(samples)
        quartiles = statistics.quantiles(samples, n=4)
        rows.append({
            "layer": name,
            "what": what,
            "ms": 1e3 * median,
            "share_of_floor": statistics.median(times["floor", what]) / median,
            "low_ms": 1e3 * quartiles[0],
            "high_ms": 1e3 * quartiles[2],
            "tflops": flops * (1 if what == "forward" else 3) / median / 1e12,
            "peak_mb": memory.get((name, what)),
        })  # fmt: skip
    table = pd.DataFrame(rows)
    table.attrs["absent"] = [title for module, title in PEERS.items() if find_spec(module) is None]
    table.attrs["setting"] = {
        "n": n, "d_model": d_model, "d_ff": d_ff, "num_experts": num_experts, "capacity_factor": capacity_factor,
        "dtype": str(dtype).removeprefix("torch."), "device": device_name(), "torch": torch.__version__,
        "threads": torch.get_num_threads(), "repeats": repeats, "commit": commit(),
    }  # fmt: skip
    return table


def one_hot_layer(layer: MoE, x: Tensor) -> Tensor:
    """Eq. 2 to 4 as printed, by one-hot einsum: the layer's oracle, and what a TPU would run."""
    flat = x.flatten(0, 1)
    n = flat.shape[0]
    token, gate = layer.router.assign(layer.router.logits(flat), batch_shape=x.shape[:2])
    P = F.one_hot(token, n + 1)[..., :n].to(x.dtype)  # (e, k, n)
    x_in = torch.einsum("ekn,nd->ekd", P, flat)
    h = F.gelu(torch.einsum("ekd,edf->ekf", x_in, layer.w1), approximate="tanh")
    y = torch.einsum("ekf,efd->ekd", h, layer.w2)
    return torch.einsum("ekn,ek,ekd->nd", P, gate.to(x.dtype), y).view_as(x)


def save(tables: list[pd.DataFrame], path: Path) -> None:
    """Write what was measured, and where, as JSON."""
    content = [{"setting": t.attrs["setting"], "absent": t.attrs["absent"], "rows": t.to_dict("records")} for t in tables]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")


def _call(layer: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    return lambda: layer(x)


def _keep_freed_memory() -> None:
    """Make glibc reuse large blocks, as the allocators of GPUs do.

    It hands blocks above 32 MB back to the kernel at once; both the floor and the layers would then
    mostly measure page faults. Elsewhere than on glibc nothing happens.
    """
    m_trim_threshold, m_mmap_max = -1, -4
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(m_mmap_max, 0)
    mallopt(m_trim_threshold, 2**31 - 1)


def _floor(
    n: int, d: int, f: int, e: int, c: float, device: torch.device, dtype: torch.dtype
) -> tuple[Callable[[], None], Callable[[], None]]:
    """The two forward products, and all six, on random operands of their own."""
    k = bucket_size(n, e, c)
    shapes = {"x": (e, k, d), "h": (e, k, f), "w1": (e, d, f), "w2": (e, f, d), "dy": (e, k, d), "dh": (e, k, f)}
    t = {name: torch.randn(shape, device=device, dtype=dtype) for name, shape in shapes.items()}

    def forward() -> None:
        torch.bmm(t["x"], t["w1"])
        torch.bmm(t["h"], t["w2"])

    def both() -> None:
        forward()
        torch.bmm(t["dy"], t["w2"].transpose(1, 2))
        torch.bmm(t["h"].transpose(1, 2), t["dy"])
        torch.bmm(t["dh"], t["w1"].transpose(1, 2))
        torch.bmm(t["x"].transpose(1, 2), t["dh"])

    return forward, both


def _measure(
    calls: dict[tuple[str, str], Callable], repeats: int, device: torch.device
) -> tuple[dict[tuple[str, str], list[float]], dict[tuple[str, str], float]]:
    """Seconds of each call, taken in turns so that a slow moment hits all rows alike; peak memory in MB on a GPU."""
    cuda = device.type == "cuda"
    times: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    memory: dict[tuple[str, str], float] = {}
    for key, call in calls.items():  # warm-up: allocator, compilation, clocks
        for _ in range(3 if cuda else 1):
            call()
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            call()
            torch.cuda.synchronize()
            memory[key] = (torch.cuda.max_memory_allocated() - before) / 1e6
    for _ in range(repeats):
        for key, call in calls.items():
            if cuda:
                torch.cuda.synchronize()
            began = time.perf_counter()
            call()
            if cuda:
                torch.cuda.synchronize()
            times[key].append(time.perf_counter() - began)
    return times, memory
