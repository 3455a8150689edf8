"""`ecmoe bench`: the layer against its floor, the six matrix products that it can't do without.

Two products forward and four backward, on (e, k, d) x (e, d, f) with k = n c / e: no layer with these experts
can be faster. A share of 0.7 means that the layer takes 1/0.7 of the floor's time, routing included. All
rows are measured in one run, in turns, by one clock (`ecmoe.bench.clock`: on a GPU with the queue kept full, so that a
row is what the device does), on the same random data; times are medians.

Beside expert choice stand expert choice with a cap, and token choice on its fastest ways (`bench_baselines`). Where
triton and a GPU are, the kernels (ecmoe/kernels) are measured too, also as a CUDA graph, with the routing alone, and
held to the plain path in float32.
"""

from __future__ import annotations

import ctypes
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ecmoe.bench import clock as timing
from ecmoe.bench.baselines import Grouped, peers
from ecmoe.bench.clock import Call, reason
from ecmoe.bench.kernels import KINDS, agreement, kernels_run, passes
from ecmoe.config import bucket_size
from ecmoe.files import write_json
from ecmoe.model.moe import MoE
from ecmoe.routing import ExpertChoice, TokenChoice

FORWARD, BOTH, ROUTING = "forward", "forward + backward", "routing"
CAPS = (2, 3)  # of the experts of a token
# Rows that are not worth minutes of compiling: variants of others, and what no graph holds in one piece.
NOT_COMPILED = ("bmm", "cap ", "nothing dropped", "ScatterMoE", "Liger")

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
    dykstra: bool = False,
    dtype: torch.dtype | None = None,
) -> pd.DataFrame:
    """Time the layer, forward and forward + backward, beside its floor and its baselines.

    Args:
        n: tokens. d_model, d_ff: d and f. num_experts: e. None: the device's `SIZES`.
        capacity_factor: c; token choice gets the same slots.
        repeats: of each row; the median is reported.
        compiled: measure layers under torch.compile too.
        each_pass: time each kernel alone, too. dykstra: cap by the paper's solver, too, which is slow.
        dtype: of weights and tokens; None: bf16 on a GPU, float32 on a CPU.

    Returns:
        a row per layer: milliseconds with quartiles, share of the floor's speed, TFLOP/s, and on a GPU the memory
        that a call takes at most beyond what was there before it. Routing alone (scores to assignment) has its time
        as a share of the forward floor's, of_forward_floor; a capped layer what the cap adds to the same path
        without it, over_uncapped. `attrs` hold setting, agreement and passes (`bench_kernels`), and in absent what
        could not be measured, and why.

    Raises:
        ConfigError: k = n c / e is no whole number.
        ValueError: repeats below 2; each_pass where the kernels can't run.
    """
    device = timing.this_device()
    sizes = SIZES[device.type]
    n, d_model = n or sizes["n"], d_model or sizes["d_model"]
    d_ff, num_experts = d_ff or sizes["d_ff"], num_experts or sizes["num_experts"]
    if repeats < 2:
        raise ValueError(f"repeats={repeats}: must be at least 2, for a median with quartiles")
    k = bucket_size(n, num_experts, capacity_factor)  # before any time is spent
    if each_pass and not kernels_run(device):
        raise ValueError("--passes times the kernels, which need triton and a CUDA GPU")
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    keep_freed_memory(device)
    torch.manual_seed(0)
    x = torch.randn(1, n, d_model, device=device, dtype=dtype, requires_grad=True)
    with device:  # 8B/64E has 8.6 billion weights, which a CPU takes minutes to draw
        first = MoE(ExpertChoice(d_model, num_experts, capacity_factor), d_model, d_ff, kernels="plain").to(dtype)
    ours, capped = _expert_choice(first, dykstra)
    others, absent = _token_choice(first)
    checked = agreement(ours, x, 20 if device.type == "cuda" else 2)
    if "output" not in checked[0]:
        absent.append("agreement with float32 (no memory for it)")

    layers = ours | capped | others
    calls = {("floor", what): call for what, call in floor(first, x[0], k).items()}
    gradient = torch.randn_like(x)
    own = floor_on_own(first, x[0].detach(), gradient[0])
    calls |= {("floor, on the layer's numbers", what): call for what, call in own.items()}
    for name, layer in layers.items():
        steps = {name: layer}
        if compiled and not any(word in name for word in NOT_COMPILED):
            steps[f"{name}, compiled"] = torch.compile(layer, dynamic=False)
        if layer is first and n * n * capacity_factor <= 2**28:  # P has e k n entries
            steps[f"{name}, one-hot einsum"] = lambda x: one_hot_layer(first, x)
        for row, step in steps.items():
            calls |= {(row, what): call for what, call in forward_and_both(step, x, layer, gradient).items()}
    calls |= {(name, ROUTING): _routing(layer, x[0].detach()) for name, layer in (ours | capped).items()}
    with timing.compiling():
        calls, memory = timing.warmed(calls, absent, device)
        times = timing.in_turns(calls, repeats, device)
        if device.type == "cuda":  # they show what launching costs; token choice may read from the device
            for module in (part for layer in layers.values() for part in layer.modules()):
                if getattr(module, "aux_loss", None) is not None:  # its graph ties x to another stream than a capture's
                    module.aux_loss = None
            graphs = _graphs({key: call for key, call in calls.items() if key[0] in ours}, absent)
            times |= timing.in_turns(graphs, repeats, device)

    table = _table(times, memory, flops=4 * k * num_experts * d_model * d_ff)
    table.attrs |= {"absent": absent, "agreement": checked}
    if each_pass:
        table.attrs["passes"] = passes(n, d_model, d_ff, num_experts, capacity_factor, dtype, device, repeats)
    table.attrs["setting"] = {
        "n": n, "d_model": d_model, "d_ff": d_ff, "num_experts": num_experts, "capacity_factor": capacity_factor,
        "dtype": str(dtype).removeprefix("torch."), "repeats": repeats, **timing.machine(),
    }  # fmt: skip
    return table


def _expert_choice(first: MoE, dykstra: bool) -> tuple[dict[str, MoE], dict[str, MoE]]:
    """The layer on each path, and with caps; all on the weights of `first`."""
    router, kinds = first.router, KINDS if kernels_run(first.w1.device) else ()
    sizes = router.d_model, router.num_experts, router.capacity_factor
    ec = f"EC-CF{router.capacity_factor:g}"
    ours = {ec: first} | {f"{ec}, {kind}": _twin(first, ExpertChoice(*sizes), kind) for kind in kinds}
    caps = {f"cap {b}": (b, "feasible") for b in CAPS if router.capacity_factor <= b < router.num_experts}
    if dykstra:
        caps |= {f"{name} by Dykstra": (b, "dykstra") for name, (b, _) in caps.items()}
    capped = {}
    for name, (b, solver) in caps.items():
        path = kinds[0] if kinds else "plain"  # beside the kernels the plain solvers take seconds a call
        row = f"{ec}, {name}" + (f", {path}" if path != "plain" else "")
        capped[row] = _twin(first, ExpertChoice(*sizes, b, cap_solver=solver), path)
    return ours, capped


def _token_choice(first: MoE) -> tuple[dict[str, nn.Module], list[str]]:
    """Top-k with as many places as expert choice has, and with as many as are asked for; and who is absent."""
    router, kinds = first.router, KINDS[:1] if kernels_run(first.w1.device) else ()
    d, e, c = router.d_model, router.num_experts, router.capacity_factor
    k = min(max(round(c), 1), e)
    layers: dict[str, nn.Module] = {}
    for name, share in {f"top-{k}, capacity {c:g} n/e": c / k, f"top-{k}, nothing dropped": None}.items():
        for path in ("plain", *kinds):
            row = name + (f", {path}" if path != "plain" else "")
            layers[row] = _twin(first, TokenChoice(d, e, k, share, gate="renormalized"), path)
    found, absent = peers(layers[name])
    layers |= {f"top-{k}, {peer}": layer for peer, layer in ({"grouped_mm": Grouped(layers[name])} | found).items()}
    return layers, absent


def _twin(first: MoE, router: nn.Module, kernels: str) -> MoE:
    """A layer with another router on the same weights, which are in memory once."""
    layer = MoE(router.to(first.w1), router.d_model, 1, kernels=kernels)
    layer.w1, layer.w2, router.weight = first.w1, first.w2, first.router.weight
    return layer.to(first.w1.device)


def _graphs(calls: Mapping[tuple[str, str], Call], absent: list[str]) -> dict[tuple[str, str], Call]:
    """The calls as CUDA graphs: their launches, recorded once; they share memory, for nobody reads their results.

    The first that can't be captured is the last that is tried: it leaves the allocator in a state to be left alone,
    which is why graphs come after all else.
    """
    graphs, pool = {}, torch.cuda.graph_pool_handle()
    for (name, what), call in calls.items():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):  # warm-up, as capturing asks for
                timing.warm_up(call, torch.device("cuda"))
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                call()
        except RuntimeError as error:
            absent.append(f"CUDA graphs from {name}, {what} on ({reason(error)})")
            break
        graphs[f"{name}, CUDA graph", what] = graph.replay
    return graphs


def _table(
    times: Mapping[tuple[str, str], list[float]], memory: Mapping[tuple[str, str], tuple | None], flops: float
) -> pd.DataFrame:
    """Rows out of samples; flops: of the two forward products."""
    medians = {key: statistics.median(samples) for key, samples in times.items()}
    rows = []
    for (name, what), samples in times.items():
        seconds, routing = medians[name, what], what == ROUTING
        share = medians["floor", FORWARD if routing else what] / seconds
        uncapped = ", ".join(part for part in name.split(", ") if not part.startswith("cap "))
        capped = uncapped != name and (uncapped, what) in medians
        peak = memory.get((name, what))
        rows.append({"layer": name, "what": what} | timing.spread(samples) | {
            "share_of_floor": None if routing else share,
            "of_forward_floor": 1 / share if routing else None,
            "over_uncapped": seconds / medians[uncapped, what] - 1 if capped else None,
            "tflops": None if routing else flops * (1 if what == FORWARD else 3) / seconds / 1e12,
            "peak_mb": peak and peak[1] - peak[0],
        })  # fmt: skip
    return pd.DataFrame(rows)


def floor(layer: MoE, x: Tensor, k: int) -> dict[str, Call]:
    """The two forward products, and all six, on the layer's weights and random operands."""
    e, d, f = layer.w1.shape
    x_in, dy = (x.new_empty(e, k, d).normal_() for _ in range(2))
    h, dh = (x.new_empty(e, k, f).normal_() for _ in range(2))
    return _products(layer, x_in, h, dy, dh)


def floor_on_own(layer: MoE, x: Tensor, gradient: Tensor) -> dict[str, Call]:
    """The same six products, on the numbers that the layer has there.

    Half of what leaves a GELU is near 0. A chip at the limit of its power takes another time for that than for random
    numbers, so that a layer can pass its floor on those.
    """
    with torch.no_grad():
        token, gate = layer.router.assign(layer.router.logits(x))
        gate = gate[..., None].to(x.dtype)
        x_in, dy = x[token], gradient[token]
    h = torch.bmm(x_in, layer.w1.detach()).requires_grad_()
    a = gate * F.gelu(h, approximate="tanh")
    (dh,) = torch.autograd.grad(a, h, torch.bmm(dy, layer.w2.detach().transpose(1, 2)))
    return _products(layer, x_in, a.detach(), dy, dh)


def _products(layer: MoE, x_in: Tensor, a: Tensor, dy: Tensor, dh: Tensor) -> dict[str, Call]:
    w1, w2 = layer.w1.detach(), layer.w2.detach()

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


def forward_and_both(
    step: Callable[[Tensor], Tensor], x: Tensor, layer: nn.Module, gradient: Tensor
) -> dict[str, Call]:
    """The step alone, and with its gradients for x and all weights of the layer."""
    wanted = [x, *layer.parameters()]

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(step(x), wanted, grad_outputs=gradient, allow_unused=True)

    return {FORWARD: torch.no_grad()(lambda: step(x)), BOTH: both}


def _routing(layer: MoE, x: Tensor) -> Call:
    """From scores to the assignment."""
    with torch.no_grad():
        logits = layer.router.logits(x)
    return torch.no_grad()(lambda: layer.router.assign(logits))


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


def keep_freed_memory(device: torch.device) -> None:
    """On a CPU, make glibc reuse large blocks, as the allocators of GPUs do.

    It hands blocks above 32 MB back to the kernel at once; both the floor and the layers would then
    mostly measure page faults. Elsewhere than on glibc nothing happens.
    """
    m_trim_threshold, m_mmap_max = -1, -4
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    if device.type == "cpu":
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2**31 - 1)


def shown(rows: pd.DataFrame | list[dict]) -> str:
    """A table as text, without empty columns."""
    table = pd.DataFrame(rows).dropna(axis=1, how="all")
    return table.to_string(index=False, float_format="{:.4g}".format, na_rep="")


def save(table: pd.DataFrame, path: Path) -> None:
    """Write what was measured, and where, as JSON."""
    write_json(path, {**table.attrs, "rows": table.to_dict("records")})
