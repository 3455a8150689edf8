"""What a size costs before anyone trains it: parameters counted on the meta device, FLOPs, GPU hours."""

import statistics
from collections.abc import Mapping

import pandas as pd

from ecmoe import paths
from ecmoe.config import RunConfig
from ecmoe.model.build import TABLE_1, count_parameters, flops_per_token
from ecmoe.provenance import PEAK_BF16
from ecmoe.training.result import load_records

PEAK = PEAK_BF16["H100"]  # the H200's too
ASSUMED_MFU = 0.4  # where nothing has been measured


def table_1() -> pd.DataFrame:
    """Table 1: our counts, without the embedding, beside the printed ones; a row per model."""
    rows = []
    for name, preset in TABLE_1.items():
        row, counted = {"model": name}, count_parameters(preset.config)
        for which in ("total", "active"):
            ours, text = getattr(counted, which), getattr(preset, which)
            printed = float(text[:-1]) * {"M": 1e6, "B": 1e9}[text[-1]]  # "1.9B"
            row |= {which: ours, f"printed_{which}": printed, f"{which}_ratio": ours / printed}
        rows.append(row)
    return pd.DataFrame(rows)


def hours(configs: Mapping[str, RunConfig], tokens: float | None = None, scale: str = "gpu") -> pd.DataFrame:
    """What one run of each config takes: parameters, training FLOPs of a token, tokens, hours of one GPU; a row per name.

    Args:
        tokens: of the training run; None: its own.
        scale: whose committed runs give the share of the GPU's bf16 rate; without any the share is assumed, and the table
            says so.
    """
    rates = [rate for r in load_records(paths.records(scale)) if (rate := r.summary.get("mfu"))]
    share = statistics.median(rates) if rates else ASSUMED_MFU
    said = f"median of {len(rates)} runs" if rates else "assumed"
    rows = []
    for name, config in configs.items():
        flops, count = flops_per_token(config), count_parameters(config)
        n = tokens or config.steps * config.tokens_per_batch
        rows.append({
            "name": name, "parameters": count.total, "active_parameters": count.active, "gflops_per_token": flops / 1e9,
            "million_tokens": n / 1e6, "gpu_hours": n * flops / (share * PEAK) / 3600, "at_mfu": f"{share:.2f}, {said}",
        })  # fmt: skip
    return pd.DataFrame(rows)
