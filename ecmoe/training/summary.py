"""The summary of a training run: how it ended, its losses, speed, size, data, device and code."""

import datetime
import math
from collections.abc import Mapping
from typing import Any

import pandas as pd
import torch

from ecmoe.config import RunConfig
from ecmoe.model import metrics
from ecmoe.model.build import count_parameters, flops_per_token
from ecmoe.provenance import code_digest, commit, device_name, peak_flops, versions
from ecmoe.training.result import not_run
from ecmoe.training.trainer import resolved_precision


def summarize(
    config: RunConfig,
    curve: pd.DataFrame,
    data: Any,
    made: Mapping[str, Any],
    *,
    status: str,
    error: str | None = None,
    sharing: int = 1,
) -> dict[str, Any]:
    """Return the summary of a run that ended with `status` after the last row of `curve`. Validation results are NaN
    unless it finished. data: the run's `RunData`. made: its `circumstances`. sharing: runs on its device, itself included."""
    last = curve.iloc[-1].to_dict() if len(curve) else {}
    valid = last if status == "finished" else {}
    losses = {key: valid.get(key, math.nan) for key in metrics.results() if key in metrics.curve()}
    val_loss = losses["val_loss"]
    rate = float(curve["tokens_per_second"].median()) if len(curve) else math.nan
    count, world = count_parameters(config), config.ranks
    found = {
        "status": status,
        "error": error,
        **losses,
        "perplexity": math.exp(val_loss) if val_loss < 700 and not config.images else math.nan,
        "bits_per_byte": val_loss / math.log(2) / getattr(data, "bytes_per_token", math.nan),
        "train_loss": last.get("train_loss", math.nan),
        "steps": int(last.get("step", 0)),
        "tokens": int(last.get("tokens", 0)),
        "seconds": last.get("seconds", math.nan),
        "tokens_per_second": rate,
        "step_ms": 1e3 * config.tokens_per_batch / rate if rate else math.nan,
        "mfu": rate * flops_per_token(config) / (peak_flops() * world),
        "peak_mb": torch.cuda.max_memory_allocated() / 1e6 if torch.cuda.is_available() else math.nan,
        "parameters": count.total,
        "active_parameters": count.active,
        "precision": resolved_precision(config),
        "world_size": world,
        "sharing": sharing,
        "data": data.provenance,
        "routing": {metric.name: last.get(metric.name, math.nan) for metric in metrics.of_layers()} if last else {},
    }
    return not_run(config).summary | found | made | {"finished": now()}


def circumstances() -> dict[str, Any]:
    """Return a run's device, code, library versions and start time. Call it first: files may change during a run."""
    return {
        "device": device_name(),
        "commit": commit(),
        "code": code_digest(),
        "versions": versions("torch", "lightning", "datasets", "tokenizers", "numpy"),
        "started": now(),
    }


def now() -> str:
    """Return the current time in UTC, ISO format, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
