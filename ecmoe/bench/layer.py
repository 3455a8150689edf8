"""Time the layer against its floor, the six matrix products that it can't avoid, and against other implementations.

The floor is two products forward and four backward, on (e, k, d) x (e, d, f) with k = n c / e: no layer with these
experts can be faster. A share of 0.7 means that the layer, including routing, takes 1/0.7 of the floor's time. All rows
are timed in one run, in turns (clock.py), on the same random data; times are medians. Routing is timed alone, too. On a
GPU with Triton, so are the kernels, also in a CUDA graph. A graph's floor is timed in a graph, too, because a GPU that
never waits for launches runs at lower clock rates. tests/kernels checks the kernels' accuracy.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from itertools import product

import pandas as pd
import torch
from torch import Tensor, nn

from ecmoe.bench import clock as timing
from ecmoe.bench.baselines import Grouped, peers
from ecmoe.bench.clock import Call
from ecmoe.bench.rows import BOTH, CAPS, COMPILED, EAGER, FORWARD, GRAPH, OF_LAYER, PLAIN, ROUTING, Row, sized
from ecmoe.model.moe import MoE
from ecmoe.routers import bucket_size
from ecmoe.routing import ExpertChoice, TokenChoice
from ecmoe.routing.router import CUTE, TRITON

KINDS = ("triton", "triton-bmm")
AUTO = [{"n": n, "d_model": d} for d in (256, 512, 1024, 2048, 4096) for n in (512, 2048, 8192, 32_768, 131_072)]


def bench_layer(
    *, capacity_factor: float = 2.0, repeats: int = 15, compiled: bool = False, **sizes: int
) -> pd.DataFrame:
    """Time the layer, forward and forward + backward, beside its floor and its baselines.

    capacity_factor: c; token choice gets the same number of slots. repeats: of each row, at least 2. compiled: also
    time with torch.compile. sizes: n, d_model, d_ff, num_experts; default: the device's in `SIZES`.

    Returns a row per `Row`: its fields, milliseconds with quartiles, share_of_floor (the floor's time over the row's; if the
    row is of a CUDA graph, of the floor in a graph), TFLOP/s, and on a GPU a call's peak memory above that before it.
    of_forward_floor: time of routing alone (scores to assignment) over the forward floor's. over_uncapped: relative extra
    time due to a cap, on the same path. `attrs` contain the setting, and in `absent` what could not be timed, and why."""
    size = sized(timing.this_device().type, sizes, OF_LAYER) | {"capacity_factor": capacity_factor}
    k = bucket_size(size["n"], size["num_experts"], capacity_factor)  # raises before any time is spent
    first, x, gradient = layer_and_input(**size)
    layers, absent = _layers(first)
    ours = [row for row in layers if row.layer.startswith("EC")]
    calls = _parts(Row("floor"), floor(first, x[0], k))
    for row, layer in layers.items():
        calls |= _parts(row, forward_and_both(layer, x, layer, gradient))
    for row, layer in layers.items() if compiled else ():
        # Others are caps, or have graph breaks, and would take minutes to compile.
        if row.path in (PLAIN, KINDS[0]) and (not row.variant or row.variant.startswith(("capacity", "grouped_mm"))):
            step = torch.compile(layer, dynamic=False)
            calls |= _parts(row._replace(mode=COMPILED), forward_and_both(step, x, layer, gradient))
    calls |= {row._replace(what=ROUTING): _routing(layers[row], x[0].detach()) for row in ours}

    def uncapped(works: Mapping[Row, Call], absent: list[str]) -> dict[Row, Call]:
        for layer in layers.values():
            layer.aux_loss = None  # its autograd graph ties x to a stream not captured
        plain = [Row("floor"), *(row for row in ours if not row.variant)]  # token choice may wait for the device
        return graphs({row: call for row, call in works.items() if row._replace(what="") in plain}, absent)

    found = timing.timed(calls, repeats, uncapped)
    setting = size | {"dtype": str(x.dtype).removeprefix("torch."), "repeats": repeats}
    rows = _rows(found, flops=4 * k * size["num_experts"] * size["d_model"] * size["d_ff"])
    return timing.tabled(rows, absent + found.absent, setting)


def bench_auto(
    sizes: Sequence[Mapping[str, int]] = AUTO, *, num_experts: int = 32, compiled: bool = False, repeats: int = 9
) -> pd.DataFrame:
    """Time the implementation that runs use (`kernels="auto"`) against the plain one: it must never be slower.

    sizes: n and d_model of each; d_ff = 4 d_model, c = 2. Returns a row per size, mode and part: n, d_model, mode,
    what, path (chosen by "auto"), plain_ms, auto_ms, and ratio = auto_ms / plain_ms. Where "auto" compiles to plain
    PyTorch, this is timed once: two timings of the same code would differ by noise alone."""
    absent, rows = [], []
    for size in sizes:
        bucket_size(size["n"], num_experts, 2.0)
    for size in sizes:
        plain, x, gradient = layer_and_input(**size, d_ff=4 * size["d_model"], num_experts=num_experts)
        auto = _twin(plain, ExpertChoice(size["d_model"], num_experts, 2.0), "auto")
        # Whether "auto" compiles to the code of the plain path, which is then timed once.
        once = compiled and not torch.compile(auto.router.fast, dynamic=False)(x, size["n"])
        calls: dict[Row, Call] = {}
        for path, mode in product((PLAIN, "auto"), (EAGER, COMPILED)[: 1 + compiled]):
            if not once or (path, mode) != ("auto", COMPILED):
                layer = plain if path == PLAIN else auto
                step = torch.compile(layer, dynamic=False) if mode == COMPILED else layer
                calls |= _parts(Row("EC-CF2", "", path, mode), forward_and_both(step, x, layer, gradient))
        found = timing.timed(calls, repeats, _eager_graphs)
        absent += found.absent
        ms = {row: 1e3 * statistics.median(samples) for row, samples in found.times.items()}
        for row in ms:
            chosen = row if once and row.mode == COMPILED else row._replace(path="auto")
            if row.path == PLAIN and chosen in ms:
                path = PLAIN if chosen == row or not kernels_run(x.device) else KINDS[0]
                took = {"path": path, "plain_ms": ms[row], "auto_ms": ms[chosen], "ratio": ms[chosen] / ms[row]}
                rows.append({**size, "mode": row.mode, "what": row.what, **took})
    return timing.tabled(rows, absent, {"num_experts": num_experts, "repeats": repeats})


def layer_and_input(
    *,
    n: int,
    d_model: int,
    d_ff: int,
    num_experts: int,
    capacity_factor: float = 2.0,
    kernels: str = PLAIN,
    pool: str = "batch",
) -> tuple[MoE, Tensor, Tensor]:
    """Return an expert choice layer, a random input (1, n, d), and a random gradient of its output (1, n, d)."""
    device = timing.this_device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    x = torch.randn(1, n, d_model, device=device, dtype=dtype, requires_grad=True)
    with device:  # 8B/64E has 8.6 billion weights, which take minutes to initialise on a CPU
        router = ExpertChoice(d_model, num_experts, capacity_factor, pool=pool)
        layer = MoE(router, d_model, d_ff, kernels=kernels).to(dtype)
    return layer, x, torch.randn_like(x)


def kernels_run(device: torch.device) -> bool:
    """Return whether to time the kernels: on a GPU with Triton installed, but not in Triton's interpreter on a CPU."""
    return device.type == "cuda" and TRITON


def _parts(row: Row, parts: Mapping[str, Call]) -> dict[Row, Call]:
    return {row._replace(what=what): call for what, call in parts.items()}


def _layers(first: MoE) -> tuple[dict[Row, nn.Module], list[str]]:
    """Return expert choice on each path and with caps, and token choice with as many slots and without dropping, all on
    the weights of `first`; and what is absent."""
    kinds = (*KINDS, *["cute"] * CUTE) if kernels_run(first.w1.device) else ()
    d, e, c = first.router.d_model, first.router.num_experts, first.router.capacity_factor
    k = max(round(c), 1)
    ec, top = Row(f"EC-CF{c:g}"), Row(f"top-{k}")
    routers: dict[Row, nn.Module] = {ec._replace(path=path): ExpertChoice(d, e, c) for path in (PLAIN, *kinds)}
    for b in [b for b in CAPS if c <= b < e]:
        path = kinds[0] if kinds else PLAIN  # with kernels, skip the plain solver, which takes seconds per call
        routers[ec._replace(variant=f"cap {b}", path=path)] = ExpertChoice(d, e, c, b)
    for variant, share in {f"capacity {c:g} n/e": c / k, "nothing dropped": None}.items():
        for path in (PLAIN, *kinds[:1]):
            routers[top._replace(variant=variant, path=path)] = TokenChoice(d, e, k, share, gate="renormalized")
    layers: dict[Row, nn.Module] = {row: _twin(first, router, row.path) for row, router in routers.items()}
    *_, dropless = layers.values()
    found, absent = peers(dropless)
    absent += ["cute (quack-kernels is not installed)"] * bool(kinds and not CUTE)
    others = {"grouped_mm": Grouped(dropless), **found}
    return layers | {top._replace(variant=name): other for name, other in others.items()}, absent


def _eager_graphs(calls: Mapping[Row, Call], absent: list[str]) -> dict[Row, Call]:
    return graphs({row: call for row, call in calls.items() if row.mode == EAGER}, absent)


def _twin(first: MoE, router: nn.Module, kernels: str) -> MoE:
    """Return a layer with another router that shares the weights of `first`."""
    layer = MoE(router, router.d_model, 1, kernels=kernels)
    layer.w1, layer.w2, router.weight = first.w1, first.w2, first.router.weight
    return layer.to(first.w1.device)


def graphs(calls: Mapping[Row, Call], absent: list[str]) -> dict[Row, Call]:
    """Capture eager calls as CUDA graphs, which share memory because their results aren't used.

    Stop at the first failure, which leaves the allocator in a bad state; for that reason, graphs are timed last."""
    captured, pool = {}, torch.cuda.graph_pool_handle()
    for row, call in calls.items():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):  # capture requires a warm-up on a side stream
                timing.warm_up(call, torch.device("cuda"))
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                call()
        except RuntimeError as error:
            absent.append(f"CUDA graphs from {row} on ({timing.reason(error)})")
            break
        captured[row._replace(mode=GRAPH)] = graph.replay
    return captured


def _rows(found: timing.Timed, flops: float) -> list[dict]:
    """Return the rows of `bench_layer`'s table; flops: of the two forward products."""
    medians = {row: statistics.median(samples) for row, samples in found.times.items()}
    rows = []
    for row, took in medians.items():
        routing, peak = row.what == ROUTING, found.memory.get(row)
        mode = GRAPH if row.mode == GRAPH else EAGER
        share = medians[Row("floor", mode=mode, what=FORWARD if routing else row.what)] / took
        uncapped = medians.get(row._replace(variant="")) if row.variant.startswith("cap ") else None
        rows.append(row._asdict() | timing.spread(found.times[row]) | {
            "share_of_floor": None if routing else share,
            "of_forward_floor": 1 / share if routing else None,
            "over_uncapped": took / uncapped - 1 if uncapped else None,
            "tflops": None if routing else flops * (1 if row.what == FORWARD else 3) / took / 1e12,
            "peak_mb": peak and peak[1] - peak[0],
        })  # fmt: skip
    return rows


def floor(layer: MoE, x: Tensor, k: int) -> dict[str, Call]:
    """Return calls of the two forward products, and of all six, on the layer's weights and random operands."""
    (e, d, f), w1, w2 = layer.w1.shape, layer.w1.detach(), layer.w2.detach()
    x_in, dy = (x.new_empty(e, k, d).normal_() for _ in range(2))
    a, dh = (x.new_empty(e, k, f).normal_() for _ in range(2))

    def forward() -> None:
        torch.bmm(x_in, w1)
        torch.bmm(a, w2)

    def both() -> None:
        forward()
        torch.bmm(dy, w2.transpose(1, 2))
        torch.bmm(a.transpose(1, 2), dy)
        torch.bmm(dh, w1.transpose(1, 2))
        torch.bmm(x_in.transpose(1, 2), dh)

    return {FORWARD: forward, BOTH: both}


def forward_and_both(step: Callable, x: Tensor, layer: nn.Module, gradient: Tensor) -> dict[str, Call]:
    """Return calls of the step alone, and with gradients for x and all weights of the layer."""
    wanted = [x, *layer.parameters()]

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(step(x), wanted, grad_outputs=gradient, allow_unused=True)

    return {FORWARD: torch.no_grad()(lambda: step(x)), BOTH: both}


def _routing(layer: MoE, x: Tensor) -> Call:
    """Return a call of routing alone, from logits to the assignment."""
    with torch.no_grad():
        logits = layer.router.logits(x)
    return lambda: layer.router.assign(logits)
