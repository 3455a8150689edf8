"""What a training step of each arm of a study takes, alone on the device: it makes steps to a loss seconds to a loss.

Runs of a study come from several machines, and may have shared one: their own seconds compare with nobody's. Here all
arms take their steps in turns, on the path that runs take: compiled and as CUDA graphs where their configs say so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
import torch

from ecmoe.bench import clock as timing
from ecmoe.bench.clock import Call
from ecmoe.bench.step import measured_row, step_of
from ecmoe.config import RunConfig
from ecmoe.training import cuda_graph as graph
from ecmoe.training.lit import LitModel


def bench_study(configs: Mapping[str, RunConfig], *, repeats: int = 15) -> pd.DataFrame:
    """Time a step of every arm on random tokens, at the initial values and a learning rate of 0.

    Args:
        configs: name of an arm -> its config; of text. repeats: turns; the median is reported.

    Returns:
        a row per arm, as `bench_step` has them, without memory: all arms' models are held. `attrs` hold the setting, and
        what could not be timed.
    """
    device, absent = timing.this_device(), []
    # Steps are over one by one, so their graphs can share the memory of what only a step needs.
    pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
    with timing.compiling():
        calls = {(arm,): _step(config, device, pool) for arm, config in configs.items()}
        calls, _ = timing.warmed(calls, absent, device)
        times = timing.in_turns(calls, repeats, device)
    rows = [{"arm": key[0], **measured_row(configs[key[0]], samples)} for key, samples in times.items()]
    table = pd.DataFrame(rows, columns=None if rows else ["arm", "ms"])
    table.attrs |= {"setting": {"repeats": repeats} | timing.machine(), "absent": absent}
    return table


def _step(config: RunConfig, device: torch.device, pool: Any) -> Call:
    counts = torch.ones(config.vocab_size)  # what a hash table balances doesn't change its time
    lit = LitModel(config, counts).to(device)
    optimizer = lit.configure_optimizers()["optimizer"]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    if config.compile:
        for block in lit.model.blocks:
            block.compile(dynamic=False)
    generator = torch.Generator().manual_seed(config.seed)
    batch = torch.randint(config.vocab_size, (config.batch_size, config.sequence_length + 1), generator=generator)
    captured = config.cuda_graph and device.type == "cuda" and graph.capturable(lit)
    return step_of(lit, optimizer, batch.to(device), pool=pool if captured else None)
