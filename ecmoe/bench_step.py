"""`ecmoe bench --step`: a whole training step on random tokens, expert choice against token choice (claim C2).

Forward, loss, backward, clipping, optimiser: what a run does, without data and logging. Every arm is measured
eagerly and, with --compile, compiled; on a GPU with triton also on the kernels, token choice too (its capacity
path has the same gather, products and combine). The fastest row of an arm is its best path.
"""

from __future__ import annotations

import contextlib
import gc
import math
import statistics
from collections.abc import Callable

import pandas as pd
import torch

from ecmoe import timing
from ecmoe.bench_kernels import kernels_run
from ecmoe.config import ConfigError, RunConfig
from ecmoe.lit import LitModel
from ecmoe.model import flops_per_token
from ecmoe.train import PEAK_BF16, device_name

ARMS = {
    "EC-CF2": {"router": "expert_choice", "capacity_factor": 2.0},
    "EC-CF1": {"router": "expert_choice", "capacity_factor": 1.0},
    "GShard top-2": {"router": "token_choice", "top_k": 2, "capacity_factor": 1.0, "gate": "renormalized"},
    "Switch top-1": {"router": "token_choice", "top_k": 1, "capacity_factor": 1.0},
}

# 0.1B/64E of Table 1 with a vocabulary of 32k on a GPU; what a CPU does in seconds.
SIZES = {
    "cuda": {
        "n": 65_536, "d_model": 768, "d_ff": 3072, "num_experts": 64, "layers": 12, "heads": 12,
        "sequence_length": 1024, "vocab_size": 32_000,
    },
    "cpu": {
        "n": 1024, "d_model": 64, "d_ff": 256, "num_experts": 8, "layers": 2, "heads": 4,
        "sequence_length": 128, "vocab_size": 512,
    },
}  # fmt: skip


def bench_step(*, repeats: int = 15, compiled: bool = False, **sizes: int | None) -> pd.DataFrame:
    """Time a training step of each of `ARMS`.

    Args:
        repeats: steps that are timed; the median is reported. compiled: measure each arm under torch.compile too.
        sizes: n (tokens of a step), d_model, d_ff, num_experts, layers, heads, sequence_length, vocab_size; None:
            the device's `SIZES`.

    Returns:
        a row per arm and path: milliseconds with quartiles, tokens per second, MFU of bf16's peak (where the
        device's is known), peak memory on a GPU; `attrs` hold the setting, and in samples the ms of every repeat.

    Raises:
        ConfigError: a size that no run may have. ValueError: repeats below 2.
    """
    device = timing.this_device()
    size = SIZES[device.type] | {key: value for key, value in sizes.items() if value is not None}
    if repeats < 2:
        raise ValueError(f"repeats={repeats}: must be at least 2, for a median with quartiles")
    n, T = size.pop("n"), size["sequence_length"]
    if n % T:
        raise ConfigError(f"n={n} tokens of a step must be whole sequences of sequence_length={T}")
    common = size | {"batch_size": n // T, "tokenizer": "bpe"}
    configs = {name: RunConfig.from_dict(common | keys) for name, keys in ARMS.items()}  # all checked before any runs
    peak = next((value for kind, value in PEAK_BF16.items() if kind in device_name()), math.nan)
    rows, absent, samples = [], [], {}
    for name, config in configs.items():
        for kernels in ("plain", "triton") if kernels_run(device) else ("plain",):
            for compile_it in (False, True) if compiled else (False,):
                path = kernels + (", compiled" if compile_it else "")
                try:
                    times, memory = _measure(_step(config, kernels, compile_it, device), repeats, device)
                except torch.OutOfMemoryError:
                    absent.append(f"{name}, {path}: out of memory")
                    continue
                samples[f"{name}, {path}"] = [1e3 * seconds for seconds in times]
                rate = n / statistics.median(times)
                rows.append({"arm": name, "path": path} | timing.spread(times) | {
                    "tokens_per_second": rate, "mfu": rate * flops_per_token(config) / peak, "peak_mb": memory,
                })  # fmt: skip
    table = pd.DataFrame(rows)
    table.attrs["setting"] = {"n": n} | size | {
        "parameters": "float32", "products": "bf16 (autocast)" if device.type == "cuda" else "float32",
        "optimizer": "AdamW, float32 moments", "repeats": repeats, **timing.machine(),
    }  # fmt: skip
    table.attrs |= {"absent": absent, "samples": samples}
    return table


def _step(config: RunConfig, kernels: str, compile_it: bool, device: torch.device) -> Callable[[], None]:
    lit = LitModel(config).to(device)
    for layer in lit.model.moe_layers:
        layer.kernels = layer.router.kernels = kernels
    if compile_it:
        torch._dynamo.reset()  # arms share code: a second capacity factor would become a variable and break the graph
        lit.model.compile()
    cuda = device.type == "cuda"
    optimizer = torch.optim.AdamW(lit.parameters(), lr=config.learning_rate, fused=cuda)
    generator = torch.Generator().manual_seed(config.seed)
    batch = torch.randint(config.vocab_size, (config.batch_size, config.sequence_length + 1), generator=generator)
    batch = batch.to(device)

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16) if cuda else contextlib.nullcontext():
            loss = lit.loss(batch)
            loss = loss + sum(layer.aux_loss for layer in lit.model.moe_layers if layer.aux_loss is not None)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(lit.parameters(), config.gradient_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for router in lit.routers:
            router.end_step()

    return step


def _measure(
    step: Callable[[], None], repeats: int, device: torch.device
) -> tuple[list[float], float | None]:
    """Seconds of each step, and the most memory at any moment of one, in MB on a GPU."""
    gc.collect()  # the arm before
    if device.type == "cuda":
        torch.cuda.empty_cache()
    timing.warm_up(step, device)
    peak = timing.peak_mb(step, device)
    return timing.in_turns({"step": step}, repeats, device)["step"], peak and peak[1]
