"""What a size costs before anyone trains it: parameters counted on the meta device, FLOPs, GPU hours."""

from __future__ import annotations

import pandas as pd

from ecmoe import paths
from ecmoe.model import TABLE_1, count_parameters, flops_per_token
from ecmoe.results import load_records, table

PEAK = 989e12  # FLOP/s in dense bf16 of an H100 or H200, NVIDIA's data sheet
ASSUMED_MFU = 0.4  # where nothing has been measured


def table_1() -> pd.DataFrame:
    """Table 1: our counts, without the embedding, beside the printed ones; a row per model."""
    rows = []
    for name, preset in TABLE_1.items():
        counted = count_parameters(preset.config)
        rows.append(
            {
                "model": name,
                "total": counted.total,
                "printed_total": _number(preset.total),
                "total_ratio": counted.total / _number(preset.total),
                "active": counted.active,
                "printed_active": _number(preset.active),
                "active_ratio": counted.active / _number(preset.active),
            }
        )
    return pd.DataFrame(rows)


def estimates(tokens: float = 100e9, scale: str = "gpu") -> pd.DataFrame:
    """Hours of one GPU for each model of Table 1.

    Args:
        tokens: of the training run. scale: whose committed runs give the share of the GPU's rate; without
            any the share is assumed, and the table says so.
    """
    measured = table(load_records(paths.records(scale)))
    rates = measured["mfu"].dropna() if len(measured) else pd.Series(dtype=float)
    share = float(rates.median()) if len(rates) else ASSUMED_MFU
    rows = []
    for name, preset in TABLE_1.items():
        flops = flops_per_token(preset.config)
        rows.append(
            {
                "model": name,
                "tokens": tokens,
                "flops_per_token": flops,
                "mfu": share,
                "mfu_source": f"median of {len(rates)} runs here" if len(rates) else "assumed",
                "gpu_hours": tokens * flops / (share * PEAK) / 3600,
            }
        )
    return pd.DataFrame(rows)


def _number(text: str) -> float:
    """ "1.9B" -> 1.9e9."""
    return float(text[:-1]) * {"M": 1e6, "B": 1e9}[text[-1]]
