"""Benchmark training on several GPUs, as `ecmoe train` does it, by each strategy."""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from operator import itemgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd

from ecmoe import paths
from ecmoe.bench import clock as timing
from ecmoe.config import RunConfig
from ecmoe.training.gpus import place
from ecmoe.training.ranks import by_torchrun
from ecmoe.training.result import Result
from ecmoe.training.run import free_memory, train_run
from ecmoe.training.trainer import check_machine

EVERY = 10  # steps per sample


def bench_scaling(
    base: Mapping[str, Any], devices: Sequence[int], strategies: Sequence[str] = ("ddp", "fsdp2", "ep"),
    pools: Sequence[str] = ("rank", "batch"), *, repeats: int,
) -> Iterator[pd.DataFrame]:  # fmt: skip
    """Train for some steps on each number of devices, and, if there are several devices, with each strategy and pool.
    This is weak scaling: twice the GPUs process twice the tokens, ideally in the same time.

    base: keys of RunConfig; batch_size is that of a rank. devices: numbers of devices, in the order of training.
    strategies, pools: values of these keys on several devices; a router without the key `pool` is trained once.
    repeats: samples of `EVERY` steps, after one that isn't counted.

    Yields the table so far, after each run: a row per strategy, pool and number of devices, with milliseconds of a step
    and quartiles, tokens per second, of_ideal (share of linear speed-up), and the first rank's peak memory. `attrs`
    contain the setting, and in `absent` what could not be trained."""
    length = {"steps": EVERY * (repeats + 1), "eval_every": EVERY, "eval_batches": 1, "checkpoint_every": 10**9}
    rows, absent = [], []
    pools = pools if "pool" in RunConfig.from_dict(base).row.keys else ["batch"]
    ways = [(n, *way) for n in devices for way in (product(strategies, pools) if n > 1 else [("auto", "batch")])]
    for n, strategy, pool in ways:
        way = {"devices": n, "strategy": strategy, "pool": pool}
        try:
            config = RunConfig.from_dict({**base, **length, **way})
            result = _trained(config)
        except Exception as error:  # such as too few GPUs or out of memory: go on with the others
            absent.append(f"{strategy} on {n}, pool {pool} ({timing.reason(error)})")
        else:
            rates = result.curve["tokens_per_second"].iloc[1:]
            rate, took = rates.median(), timing.spread((config.tokens_per_batch / rates).tolist())
            rows.append(way | took | {"tokens_per_second": rate, "peak_mb": result.summary["peak_mb"]})
        rows.sort(key=itemgetter("devices"))
        one = next((row["tokens_per_second"] for row in rows if row["devices"] == 1), math.nan)
        shared = [row | {"of_ideal": row["tokens_per_second"] / row["devices"] / one} for row in rows]
        yield timing.tabled(shared, list(absent), {**base, "repeats": repeats})


def bench_losses(base: Mapping[str, Any], devices: int, strategy: str, steps: int = 200) -> pd.DataFrame:
    """Train the same model on one device, and on several that divide its batch but let all its tokens compete.

    Returns a row per tenth of the steps: step, train_loss and val_loss (nats) with the suffix _one or _several, and
    `difference`, train_loss_several - train_loss_one."""
    same = {"steps": steps, "eval_every": max(steps // 10, 1), "checkpoint_every": 10**9, "pool": "batch"}
    batch = base["batch_size"] // devices
    several = {"devices": devices, "strategy": strategy, "batch_size": batch, "eval_batches": devices}
    alone = {"batch_size": batch * devices, "eval_batches": 1}
    # Several first, as all devices are free now.
    curves = (_trained(RunConfig.from_dict({**base, **same, **keys})).curve for keys in (several, alone))
    other, one = (curve.set_index("step")[["train_loss", "val_loss"]] for curve in curves)
    table = one.join(other, suffixes=("_one", "_several")).reset_index().astype({"step": int})
    table["difference"] = table["train_loss_several"] - table["train_loss_one"]
    return timing.tabled(table.to_dict("records"), [], {**base, "devices": devices, "strategy": strategy})


def _trained(config: RunConfig) -> Result:
    """Train in a temporary folder, which is deleted: each call times the run anew. Raise an error if the run fails."""
    check_machine(config)
    free_memory()  # left by the previous run
    paths.cache().mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=paths.cache()) as name:
        if config.devices == 1:
            with place() as where:
                result = train_run(config, Path(name), where=where, keep_weights=False)
        else:
            result = by_torchrun(config, Path(name), lambda: None, keep_weights=False)
    if not result.ok:
        raise RuntimeError(result.summary["error"])
    return result
