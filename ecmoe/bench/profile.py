"""Profile a training step of EC-CF2 by kind of work.

On a GPU, torch.profiler records the kernels and the operators that launched them; both names determine the kind. Time
without a kernel is "idle". On a CPU, an operator's own time counts, and attention's batched products count as experts'.
"""

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
from ecmoe.bench.rows import GRAPH, Row
from ecmoe.bench.step import arms, setting, steps

ARM, STEPS = "EC-CF2", 3
IDLE = "idle"
# The kind is the first whose pattern is found in the lower-case name, "operator kernel".
KINDS = {
    "experts' products": r"bmm|grouped_mm|_product_kernel",
    "attention": r"flash|fmha|scaled_dot_product",
    "loss": r"_losses_kernel|_scaled_kernel|log_softmax|logsumexp|nll_loss",
    "other products": r"nvjet|gemm|cutlass|cublas|xmma|aten::(mm|addmm|matmul|linear)\b",
    "optimiser": r"adam|_squares_kernel|multi_tensor_apply|foreach|clip_grad|vector_norm|lpnorm",
    "routing": r"ecmoe::(logits|select)|_(logits|weigh|guess|list|take|place|invert)_|_sum_kernel|topk|sort|radix",
    "gather and combine": r"_combine|gather|scatter|index",
    "activation": r"_activate|gelu",
    "copies and casts": r"memcpy|memset|direct_copy|aten::(copy_|_to_copy|to|cat|fill_|zero_)",
    "norms and other passes": r"",
}


def bench_profile(*, compiled: bool = False, **sizes: int) -> pd.DataFrame:
    """Profile `STEPS` steps of EC-CF2 with its fastest implementation; compiled, sizes: as in `bench_step`.

    Returns a row per kind of work: kind, ms per step, share of all time, and most, the three names with most time.
    `attrs` contain the setting with the path, and step_ms, the time of a step without the profiler."""
    device, configs = timing.this_device(), {ARM: arms(sizes)[ARM]}
    every = steps(configs, device, compiled=compiled)
    calls = {row: call for row, call in every.items() if GRAPH not in row.mode}  # a graph's kernels have no operators
    found = timing.timed(calls, 3)
    medians = {row: statistics.median(samples) for row, samples in found.times.items()}
    best = min(medians, key=medians.__getitem__)
    cuda = [ProfilerActivity.CUDA] if device.type == "cuda" else []
    with timing.in_this_thread(), profile(activities=[ProfilerActivity.CPU, *cuda]) as profiler:
        for _ in range(STEPS):
            calls[best]()
        if cuda:
            torch.cuda.synchronize()
    if cuda:
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            profiler.export_chrome_trace(file.name)
            spent = kernel_time(json.loads(Path(file.name).read_text(encoding="utf-8"))["traceEvents"])
    else:  # by operator, without the time of the operators that it calls
        spent = {event.key: event.self_cpu_time_total / 1e3 for event in profiler.key_averages()}
    if not spent:
        raise RuntimeError("torch.profiler saw no kernels: CUPTI, which counts them, doesn't run on this machine")
    said = {"arm": ARM, "path": str(Row(ARM, path=best.path, mode=best.mode)), "steps": STEPS}
    shares = by_kind({name: ms / STEPS for name, ms in spent.items()}).to_dict("records")
    return timing.tabled(shares, found.absent, setting(sizes) | said, step_ms=1e3 * medians[best])


def kernel_time(events: list[dict]) -> dict[str, float]:
    """Return milliseconds by "operator kernel" in a Chrome trace, and "idle" time between the first and last kernel."""
    called = (event for event in events if event.get("cat") == "cpu_op" and "External id" in event.get("args", {}))
    operators = {event["args"]["External id"]: event["name"] for event in called}
    spent: dict[str, float] = defaultdict(float)
    kernels = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    busy_until = min((event["ts"] for event in kernels), default=0)
    for event in sorted(kernels, key=lambda event: event["ts"]):
        operator = operators.get(event.get("args", {}).get("External id"), "")
        end = event["ts"] + event["dur"]
        spent[IDLE] += max(event["ts"] - busy_until, 0) / 1e3
        # Count the time of kernels that overlap only once.
        spent[f"{operator} {event['name']}".strip()] += max(end - max(event["ts"], busy_until), 0) / 1e3
        busy_until = max(end, busy_until)
    return dict(spent)


def kind_of(name: str) -> str:
    """Return the kind of work of an "operator kernel" name."""
    return name if name == IDLE else next(kind for kind, how in KINDS.items() if re.search(how, name.lower()))


def by_kind(spent: dict[str, float]) -> pd.DataFrame:
    """Return rows of kind, ms, share and most (the three names with most time), sorted by ms, largest first."""
    names = pd.Series(spent).sort_values(ascending=False)
    kinds = names.groupby(kind_of)
    most = kinds.apply(lambda of: "; ".join(name[:60] for name in of.index[:3]))
    table = pd.DataFrame({"ms": kinds.sum(), "share": kinds.sum() / names.sum(), "most": most})
    return table.rename_axis("kind").sort_values("ms", ascending=False).reset_index()
