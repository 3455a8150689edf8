"""Where the time of an EC-CF2 training step goes, by kind of work.

torch.profiler tells which kernels ran on the GPU and which operators launched them; both names sort the time. What no
kernel fills is "idle". On a CPU operators' own time is sorted; attention's products, batched there, count as experts'.
"""

from __future__ import annotations

import json
import re
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path

import pandas as pd
import torch
from torch.profiler import ProfilerActivity, profile

from ecmoe.bench import clock as timing
from ecmoe.bench.rows import label
from ecmoe.bench.step import arms, setting, steps

ARM = "EC-CF2"
IDLE = "idle"
# The first pattern that is found in "operator kernel", in lower case, names the kind.
KINDS = {
    "experts' products": r"bmm|grouped_mm|_product_kernel|_product_backward",
    "attention": r"flash|fmha|scaled_dot_product",
    "loss": r"_losses_kernel|_scaled_kernel|log_softmax|logsumexp|nll_loss",
    "other products": r"nvjet|gemm|cutlass|cublas|xmma|aten::(mm|addmm|matmul|linear)\b",
    "optimiser": r"adam|_squares_kernel|multi_tensor_apply|foreach|clip_grad|vector_norm|lpnorm",
    "routing": r"ecmoe::(logits|select)|_(logits|weigh|guess|count|list|take|place|invert)_|_sum_kernel|topk|sort|radix|searchsorted",
    "gather and combine": r"_gather|_combine|gather|scatter|index",
    "activation": r"_activate|_scale_kernel|gelu",
    "copies and casts": r"memcpy|memset|direct_copy|aten::(copy_|_to_copy|to|cat|fill_|zero_)",
    "norms and other passes": r"",
}


def bench_profile(*, count: int = 3, compiled: bool = False, **sizes: int | None) -> pd.DataFrame:
    """Profile `count` steps of EC-CF2 on its fastest path; compiled, sizes: as for `bench_step`.

    Returns:
        a row per kind of work: kind, ms of a step, share of it; and the three names that took most of it. `attrs`
        hold the setting with the path, and step_ms, the step's time without the profiler.
    """
    device, configs = timing.this_device(), {ARM: arms(sizes)[ARM]}
    with timing.compiling():
        absent: list[str] = []
        # Kernels of a graph have no operators.
        rows = steps(configs, device, compiled=compiled, plain=(), captured=False)
        calls, _ = timing.warmed(rows, absent, device)
        times = timing.in_turns(calls, 3, device)
        best = min(times, key=lambda row: statistics.median(times[row]))
        spent = device_time(calls[best], count) if device.type == "cuda" else operator_time(calls[best], count)
    table = by_kind(spent)
    said = {"arm": ARM, "path": label(ARM, "", best.path, best.mode), "steps": count}
    table.attrs["setting"] = setting(configs, device) | said | timing.machine()
    table.attrs |= {"absent": absent, "step_ms": 1e3 * statistics.median(times[best])}
    return table


def device_time(call: timing.Call, count: int) -> dict[str, float]:
    """Milliseconds of a call by "operator kernel", from a trace of `count` calls on a GPU; and idle."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(count):
            call()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    spent = kernel_time(events)
    if not spent:
        raise RuntimeError("torch.profiler saw no kernels: CUPTI, which counts them, doesn't run on this machine")
    return {name: ms / count for name, ms in spent.items()}


def kernel_time(events: list[dict]) -> dict[str, float]:
    """Milliseconds by "operator kernel" of a Chrome trace; and idle, between the first kernel and the last."""
    called = (event for event in events if event.get("cat") == "cpu_op" and "External id" in event.get("args", {}))
    operators = {event["args"]["External id"]: event["name"] for event in called}
    spent: dict[str, float] = defaultdict(float)
    kernels = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    busy_until = min((event["ts"] for event in kernels), default=0)
    for event in sorted(kernels, key=lambda event: event["ts"]):
        operator = operators.get(event.get("args", {}).get("External id"), "")
        end = event["ts"] + event["dur"]
        spent[IDLE] += max(event["ts"] - busy_until, 0) / 1e3
        # What runs beside another kernel costs no time.
        spent[f"{operator} {event['name']}".strip()] += max(end - max(event["ts"], busy_until), 0) / 1e3
        busy_until = max(end, busy_until)
    return dict(spent)


def operator_time(call: timing.Call, count: int) -> dict[str, float]:
    """Milliseconds of a call by operator, children left out, on a CPU."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(count):
            call()
    return {event.key: event.self_cpu_time_total / 1e3 / count for event in profiler.key_averages()}


def kind_of(name: str) -> str:
    """The kind of work of an "operator kernel"."""
    return name if name == IDLE else next(kind for kind, how in KINDS.items() if re.search(how, name.lower()))


def by_kind(spent: dict[str, float]) -> pd.DataFrame:
    """Rows of kind, ms, share and most (names), the longest first."""
    kinds: dict[str, dict[str, float]] = defaultdict(dict)
    for name, ms in spent.items():
        kinds[kind_of(name)][name] = ms
    total, rows = sum(spent.values()), []
    for kind, names in kinds.items():
        most = "; ".join(name[:60] for name in sorted(names, key=names.__getitem__, reverse=True)[:3])
        ms = sum(names.values())
        rows.append({"kind": kind, "ms": ms, "share": ms / total, "most": most})
    return pd.DataFrame(rows).sort_values("ms", ascending=False, ignore_index=True)
