"""What a size costs before anyone trains it: parameters counted on the meta device, FLOPs, GPU hours."""

from collections.abc import Mapping

import pandas as pd

from ecmoe import paths
from ecmoe.config import RunConfig
from ecmoe.model.build import TABLE_1, count_parameters, flops_per_token
from ecmoe.provenance import PEAK_BF16
from ecmoe.study.plan import configs
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


def estimates(tokens: float = 100e9, scale: str = "gpu") -> pd.DataFrame:
    """Hours of one GPU for each model of Table 1, a row per model.

    Args:
        tokens: of the training run. scale: see `of_study`.
    """
    rows = _hours({name: preset.config for name, preset in TABLE_1.items()}, scale, tokens)
    return rows.drop(columns=["parameters", "active_parameters"]).rename(columns={"arm": "model"})


def of_study(base: Mapping, arms: Mapping[str, Mapping], scale: str = "gpu") -> pd.DataFrame:
    """What one run of each arm takes: parameters, training FLOPs of a token, tokens, GPU hours.

    Args:
        base, arms: as in `ecmoe.study.plan.configs`.
        scale: whose committed runs give the share of the GPU's bf16 rate; without any the share is
            assumed, and the table says so.
    """
    return _hours({arm: by_seed[0] for arm, by_seed in configs(base, arms, [0]).items()}, scale)


def _hours(configs: Mapping[str, RunConfig], scale: str, tokens: float | None = None) -> pd.DataFrame:
    rates = [rate for r in load_records(paths.records(scale)) if (rate := r.summary.get("mfu"))]
    share = float(pd.Series(rates).median()) if rates else ASSUMED_MFU
    rows = []
    for name, config in configs.items():
        flops, count, n = (
            flops_per_token(config),
            count_parameters(config),
            tokens or config.steps * config.tokens_per_batch,
        )
        rows.append(
            {
                "arm": name,
                "parameters": count.total,
                "active_parameters": count.active,
                "gflops_per_token": flops / 1e9,
                "million_tokens": n / 1e6,
                "gpu_hours": n * flops / (share * PEAK) / 3600,
                "at_mfu": f"{share:.2f}, " + (f"median of {len(rates)} runs" if rates else "assumed"),
            }
        )
    return pd.DataFrame(rows)
