"""The layer with its experts shared out to several GPUs (expert parallelism), against its floor: the six matrix products of
what a GPU computes then, its experts on the tokens of all."""

import os
import signal
import statistics
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from types import SimpleNamespace
from typing import Any

import pandas as pd
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from ecmoe.bench import clock as timing
from ecmoe.bench.layer import floor, forward_and_both, layer_and_input
from ecmoe.model.expert_parallel import share_experts
from ecmoe.routers import bucket_size

# What torch, where it starts ranks, answers by an exception of its own.
ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


def bench_across(
    sizes: Mapping[str, Mapping[str, int]], devices: Sequence[int], *, repeats: int = 5
) -> Iterator[pd.DataFrame]:
    """Time layers on each number of GPUs, each of which has n tokens of its own.

    Args:
        sizes: name -> n, d_model, d_ff, num_experts. repeats: of each row.

    Yields:
        after each size and number the table so far, a row for each and part (forward; forward + backward): milliseconds with quartiles, floor_ms,
        share_of_floor, and the memory of the first GPU at most. `attrs` hold in absent what could not be timed.
    """
    rows, absent = [], []
    for name, many in product(sizes, devices):
        handlers = {number: signal.getsignal(number) for number in ENDING}
        how = LaunchConfig(1, 1, many, run_id="bench", rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0)
        try:
            found = elastic_launch(how, _rank)(sizes[name] | {"repeats": repeats})  # as torchrun would
            rows += [{"size": name, **row} for row in found[0]]
        except ChildFailedError as error:
            said = error.get_first_failure()[1].message  # where Python raised it, with the lines where
            absent.append(f"{name} on {many} ({(said['message'] if isinstance(said, dict) else said)[:160]})")
        finally:  # torch leaves its own, by which this process would end otherwise than before
            for number, handler in handlers.items():
                signal.signal(number, handler)
        yield timing.tabled(rows, list(absent), {"repeats": repeats})


def _rank(asked: Mapping[str, int]) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    found = of_this_rank(**asked).to_dict("records")
    dist.destroy_process_group()
    return found


def of_this_rank(*, repeats: int, **sizes: int) -> pd.DataFrame:
    """Rows of one size, on every rank of a process group."""
    device, ranks = timing.this_device(), dist.get_world_size()
    layer, x, gradient = layer_and_input(**sizes, kernels="auto", pool="rank")
    mesh = dist.device_mesh.init_device_mesh(device.type, (ranks,))
    share_experts(nn.ModuleList([layer]), mesh, device)
    local = SimpleNamespace(w1=layer.w1.to_local(), w2=layer.w2.to_local())  # type: ignore[operator]
    k = ranks * bucket_size(sizes["n"], sizes["num_experts"], layer.router.capacity_factor)
    calls = {("layer", what): call for what, call in forward_and_both(layer, x, layer, gradient).items()}
    calls |= {("floor", what): call for what, call in floor(local, x[0], k).items()}
    for call in calls.values():
        timing.warm_up(call, device)
    peaks = {key: timing.peak_mb(call, device) for key, call in calls.items()}
    times = timing.in_turns(calls, repeats, device, agreed=_of_first)
    rows = []
    for kind, what in calls:
        if kind == "layer":
            ms = 1e3 * statistics.median(times["floor", what])
            row = {"devices": ranks, "what": what} | timing.spread(times[kind, what])
            peak = peaks[kind, what]
            rows.append(row | {"floor_ms": ms, "share_of_floor": ms / row["ms"], "peak_mb": peak and peak[1]})
    return timing.tabled(rows, [], {**sizes, "repeats": repeats})


def _of_first(bursts: dict) -> dict:
    """All ranks make as many calls as the first: each waits for the others within."""
    box = [bursts]
    dist.broadcast_object_list(box, 0)
    return box[0]
