"""What a size costs before anyone trains it: parameters counted on the meta device, FLOPs, GPU hours."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from ecmoe import paths
from ecmoe.config import RunConfig
from ecmoe.model.build import TABLE_1, count_parameters, flops_per_token
from ecmoe.provenance import PEAK_BF16
from ecmoe.study import plan as study
from ecmoe.study.table import table
from ecmoe.training.result import load_records

PEAK = PEAK_BF16["H100"]  # the H200's too
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
    """Hours of one GPU for each model of Table 1, a row per model.

    Args:
        tokens: of the training run. scale: see `of_study`.
    """
    configs = {name: preset.config for name, preset in TABLE_1.items()}
    return _hours(configs, dict.fromkeys(configs, tokens), scale).rename(columns={"arm": "model"})


def of_study(base: Mapping, arms: Mapping[str, Mapping], scale: str = "gpu") -> pd.DataFrame:
    """What one run of each arm takes: parameters, training FLOPs of a token, tokens, GPU hours.

    Args:
        base, arms: as in `ecmoe.study.plan.run_study`.
        scale: whose committed runs give the share of the GPU's bf16 rate; without any the share is
            assumed, and the table says so.
    """
    configs = {label: by_seed[0] for label, by_seed in study.configs(base, arms, [0]).items()}
    table = _hours(configs, {label: c.steps * c.tokens_per_batch for label, c in configs.items()}, scale)
    counts = [count_parameters(config) for config in configs.values()]
    table.insert(1, "parameters", [count.total for count in counts])
    table.insert(2, "active_parameters", [count.active for count in counts])
    return table


def _hours(configs: Mapping[str, RunConfig], tokens: Mapping[str, float], scale: str) -> pd.DataFrame:
    measured = table(r for r in load_records(paths.records(scale)) if "router" in r.summary["config"])
    rates = measured["mfu"].dropna() if len(measured) else pd.Series(dtype=float)
    share = float(rates.median()) if len(rates) else ASSUMED_MFU
    flops = {name: flops_per_token(config) for name, config in configs.items()}
    rows = [
        {
            "arm": name,
            "gflops_per_token": flops[name] / 1e9,
            "million_tokens": tokens[name] / 1e6,
            "gpu_hours": tokens[name] * flops[name] / (share * PEAK) / 3600,
            "at_mfu": f"{share:.2f}, " + (f"median of {len(rates)} runs" if len(rates) else "assumed"),
        }
        for name in configs
    ]
    return pd.DataFrame(rows)


def _number(text: str) -> float:
    """ "1.9B" -> 1.9e9."""
    return float(text[:-1]) * {"M": 1e6, "B": 1e9}[text[-1]]
