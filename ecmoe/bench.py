"""`ecmoe bench`: the layer against its floor, the six matrix products that it can't do without.

Two products forward and four backward, on (e, k, d) x (e, d, f) with k = n c / e: no layer with these experts
can be faster. A share of 0.7 means that the layer takes 1/0.7 of the floor's time, routing included. All
rows are measured in one run, in turns, on the same random data; times are medians. Where triton and a GPU are,
expert choice is measured on the kernels too (ecmoe/kernels.py), also as a CUDA graph, with its routing alone, and
held to the plain path in float32. On a GPU, everything at once:

    ecmoe bench --compile --passes --json layer.json; ecmoe bench --step --compile --json step.json
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

from ecmoe.bench_kernels import KINDS, agreement, kernels_run, passes
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
    each_pass: bool = False,
    only_ec: bool = False,
    dtype: torch.dtype | None = None,
) -> pd.DataFrame:
    """Time the layer, forward and forward + backward, beside its floor and its baselines.

    Args:
        n: tokens. d_model, d_ff: d and f. num_experts: e. None: the device's `SIZES`.
        capacity_factor: c; token choice gets the same slots.
        repeats: of each row; the median is reported.
        compiled: measure each layer under torch.compile too.
        each_pass: time each kernel alone, too. only_ec: leave out token choice and the one-hot einsum.
        dtype: of weights and tokens; None: bf16 on a GPU, float32 on a CPU.

    Returns:
        a row per layer: milliseconds, share of the floor's speed, spread (quartiles) and peak memory on a GPU;
        routing alone (scores to assignment) as a share of the forward floor's time, of_forward_floor. `attrs` hold
        setting, agreement and passes (`bench_kernels`), and in absent what could not be measured.

    Raises:
        ConfigError: k = n c / e is no whole number.
        ValueError: repeats below 2; each_pass where the kernels can't run.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = SIZES[device.type]
    n, d_model = n or sizes["n"], d_model or sizes["d_model"]
    d_ff, num_experts = d_ff or sizes["d_ff"], num_experts or sizes["num_experts"]
    if repeats < 2:
        raise ValueError(f"repeats={repeats}: must be at least 2, for a median with quartiles")
    bucket_size(n, num_experts, capacity_factor)  # before any time is spent
    if each_pass and not kernels_run(device):
        raise ValueError("--passes times the kernels, which need triton and a CUDA GPU")
    if device.type == "cpu":
        _keep_freed_memory()
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    torch.manual_seed(0)
    x = torch.randn(1, n, d_model, device=device, dtype=dtype, requires_grad=True)
    top_k = max(round(capacity_factor), 1)
    ec = f"EC-CF{capacity_factor:g}"
    routers = {
        ec: ExpertChoice(d_model, num_experts, capacity_factor),
        f"top-{top_k}, capacity {capacity_factor:g} n/e": TokenChoice(
            d_model, num_experts, top_k, capacity_factor / top_k, gate="renormalized"
        ),
        f"top-{top_k}, nothing dropped": TokenChoice(d_model, num_experts, top_k, gate="renormalized"),
    }
    if only_ec:
        routers = {ec: routers[ec]}
    layers = {name: MoE(router, d_model, d_ff, kernels="plain").to(device, dtype) for name, router in routers.items()}
    for kind in KINDS if kernels_run(device) else ():
        router = ExpertChoice(d_model, num_experts, capacity_factor)
        router.load_state_dict(layers[ec].router.state_dict())
        layers[f"{ec}, {kind}"] = MoE(router, d_model, d_ff, kernels=kind).to(device, dtype)
    for layer in layers.values():  # the same experts, once in memory
        layer.w1, layer.w2 = layers[ec].w1, layers[ec].w2
    failed = []
    try:
        table_of_agreement = agreement(
            {name: layer for name, layer in layers.items() if name.startswith(ec)}, x, 20 if device.type == "cuda" else 2
        )
    except torch.OutOfMemoryError:
        table_of_agreement, failed = [], ["agreement, whose float32 reference needs more memory"]

    steps: dict[str, Callable[[], Tensor]] = {}
    wanted: dict[str, list[Tensor]] = {}
    for name, layer in layers.items():
        steps[name], wanted[name] = _call(layer, x), [x, *layer.parameters()]
        if compiled:
            torch._dynamo.config.specialize_float = True  # a second capacity factor is no variable of the graph
            steps[f"{name}, compiled"] = _call(torch.compile(layer), x)
            wanted[f"{name}, compiled"] = wanted[name]
        if name == ec and not only_ec and n * n * capacity_factor <= 2**28:  # P has e k n entries
            steps[f"{name}, one-hot einsum"] = lambda layer=layer: one_hot_layer(layer, x)
            wanted[f"{name}, one-hot einsum"] = wanted[name]
    gradient = torch.randn_like(x)
    floor_forward, floor_both = _floor(layers[ec], x[0], bucket_size(n, num_experts, capacity_factor))
    calls = {("floor", "forward"): floor_forward, ("floor", "forward + backward"): floor_both}
    for name, step in steps.items():
        calls[name, "forward"] = torch.no_grad()(step)
        calls[name, "forward + backward"] = _forward_backward(step, wanted[name], gradient)
    for name, layer in layers.items():
        if name.startswith(ec):
            calls[name, "routing"] = _routing(layer, x[0].detach())
    if device.type == "cuda":  # graphs show what launching costs; token choice may read from the device
        pool = torch.cuda.graph_pool_handle()
        for name, what in [key for key in calls if key[0] in layers and key[0].startswith(ec)]:
            try:
                calls[f"{name}, CUDA graph", what] = _graph(calls[name, what], pool)
            except RuntimeError as error:
                failed.append(f"{name}, CUDA graph ({what}): {str(error).splitlines()[0]}")
    times, memory = _measure(calls, repeats, device)

    flops = 4 * bucket_size(n, num_experts, capacity_factor) * num_experts * d_model * d_ff
    rows = []
    for (name, what), samples in times.items():
        median = statistics.median(samples)
        quartiles = statistics.quantiles(samples, n=4)
        floor = statistics.median(times["floor", "forward" if what == "routing" else what])
        rows.append({
            "layer": name,
            "what": what,
            "ms": 1e3 * median,
            "share_of_floor": None if what == "routing" else floor / median,
            "of_forward_floor": median / floor if what == "routing" else None,
            "low_ms": 1e3 * quartiles[0],
            "high_ms": 1e3 * quartiles[2],
            "tflops": None if what == "routing" else flops * (1 if what == "forward" else 3) / median / 1e12,
            "peak_mb": None if name.endswith("graph") else memory.get((name, what)),
        })  # fmt: skip
    table = pd.DataFrame(rows)
    table.attrs["absent"] = [title for module, title in PEERS.items() if find_spec(module) is None] + failed
    table.attrs["agreement"] = table_of_agreement
    if each_pass:
        table.attrs["passes"] = passes(n, d_model, d_ff, num_experts, capacity_factor, dtype, device, repeats)
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


def shown(rows: pd.DataFrame | list[dict]) -> str:
    """A table as text, without empty columns."""
    table = pd.DataFrame(rows).dropna(axis=1, how="all")
    return table.to_string(index=False, float_format="{:.4g}".format, na_rep="")


def save(tables: list[pd.DataFrame], path: Path) -> None:
    """Write what was measured, and where, as JSON."""
    content = [{**t.attrs, "rows": t.astype(object).where(t.notna(), None).to_dict("records")} for t in tables]
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


def _forward_backward(step: Callable[[], Tensor], wanted: list[Tensor], gradient: Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(step(), wanted, grad_outputs=gradient, allow_unused=True)


def _routing(layer: MoE, x: Tensor) -> Callable[[], object]:
    """From scores to the assignment."""
    with torch.no_grad():
        logits = layer.router.logits(x)
    return torch.no_grad()(lambda: layer.router.assign(logits))


def _graph(call: Callable[[], object], pool: tuple[int, int]) -> Callable[[], None]:
    """The call as a CUDA graph: its launches, recorded once; graphs share the pool, for nobody reads their results."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # warm-up, as capturing asks for
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        call()
    return graph.replay


def _floor(layer: MoE, x: Tensor, k: int) -> tuple[Callable[[], None], Callable[[], None]]:
    """The two forward products, and all six, on the layer's weights and random operands."""
    (e, d, f), w1, w2 = layer.w1.shape, layer.w1.detach(), layer.w2.detach()
    x_in, dy = (x.new_empty(e, k, d).normal_() for _ in range(2))
    h, dh = (x.new_empty(e, k, f).normal_() for _ in range(2))

    def forward() -> None:
        torch.bmm(x_in, w1)
        torch.bmm(h, w2)

    def both() -> None:
        forward()
        torch.bmm(dy, w2.transpose(1, 2))
        torch.bmm(h.transpose(1, 2), dy)
        torch.bmm(dh, w1.transpose(1, 2))
        torch.bmm(x_in.transpose(1, 2), dh)

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
