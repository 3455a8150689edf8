"""Estimate what a model size costs without training it: parameters (counted on the meta device), FLOPs, GPU hours."""

import math
from collections.abc import Mapping

import pandas as pd

from ecmoe.config import RunConfig
from ecmoe.model.build import TABLE_1, count_parameters, flops_per_token
from ecmoe.provenance import PEAK_BF16
from ecmoe.study.speed import kept, setting

PEAK = PEAK_BF16["H100"]  # the same for the H200
ASSUMED_MFU = 0.4  # model FLOPs utilisation, if no timing has measured it


def table_1() -> pd.DataFrame:
    """Return Table 1 of the paper, a row per model: our parameter counts (without the embedding), the printed ones, their ratio."""
    rows = []
    for name, preset in TABLE_1.items():
        row, counted = {"model": name}, count_parameters(preset.config)
        for which in ("total", "active"):
            ours, text = getattr(counted, which), getattr(preset, which)
            printed = float(text[:-1]) * {"M": 1e6, "B": 1e9}[text[-1]]  # "1.9B"
            row |= {which: ours, f"printed_{which}": printed, f"{which}_ratio": ours / printed}
        rows.append(row)
    return pd.DataFrame(rows)


def hours(configs: Mapping[str, RunConfig], tokens: float | None = None, mfu: Mapping[str, float] = {}) -> pd.DataFrame:
    """Return the cost of one run of each config, a row per name: parameters, training FLOPs per token, tokens, hours on one GPU.

    tokens: number of training tokens; None: as in each config. mfu: name -> model FLOPs utilisation (MFU) of its own timed steps.
    All others get that of EC-CF2 in scale gpu's `bench_step`, on its best path; `ASSUMED_MFU` where nothing was timed."""
    rates = [row["mfu"] for row in kept("step", "gpu")["rows"] if row["arm"] == "EC-CF2" and row.get("mfu")]
    usual = (max(rates), f"timed for {setting('gpu')[0]}") if rates else (ASSUMED_MFU, "assumed")
    rows = []
    for name, config in configs.items():
        share, said = (mfu[name], "its own steps") if mfu.get(name, math.nan) > 0 else usual
        flops, count = flops_per_token(config), count_parameters(config)
        n = tokens or config.steps * config.tokens_per_batch
        rows.append({
            "name": name, "parameters": count.total, "active_parameters": count.active, "gflops_per_token": flops / 1e9,
            "million_tokens": n / 1e6, "gpu_hours": n * flops / (share * PEAK) / 3600, "at_mfu": f"{share:.2f}, {said}",
        })  # fmt: skip
    return pd.DataFrame(rows)
