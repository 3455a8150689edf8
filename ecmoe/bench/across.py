"""The layer with its experts shared out to several GPUs (expert parallelism), against its floor: the six matrix products of
what a GPU computes then, its experts on the tokens of all. A rank of torchrun is `-m ecmoe.bench.across SIZES.json TABLE.json`.
"""

import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import pandas as pd
import torch
import torch.distributed as dist
from torch import nn

from ecmoe import paths
from ecmoe.bench import clock as timing
from ecmoe.bench.layer import floor, forward_and_both, layer_and_input
from ecmoe.files import read_json, write_json
from ecmoe.model.expert_parallel import share_experts
from ecmoe.routers import bucket_size
from ecmoe.training.ranks import torchrun


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
    paths.cache().mkdir(parents=True, exist_ok=True)
    for name, many in product(sizes, devices):
        with TemporaryDirectory(dir=paths.cache()) as folder:
            asked, table = Path(folder) / "sizes.json", Path(folder) / "table.json"
            write_json(asked, {**sizes[name], "repeats": repeats})
            command = torchrun(many, "ecmoe.bench.across", str(asked), str(table))
            done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
            if table.exists():
                rows += [{"size": name, **row} for row in read_json(table)["rows"]]
            else:
                said = [line for line in done.stderr.splitlines() if "Error" in line] or [f"code {done.returncode}"]
                absent.append(f"{name} on {many} ({said[0][:160]})")
        yield timing.tabled(rows, list(absent), {"repeats": repeats})


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


def main() -> None:
    """A rank of torchrun, started by `bench_across`."""
    asked, table = map(Path, sys.argv[1:])
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    found = of_this_rank(**read_json(asked))
    if dist.get_rank() == 0:
        timing.save(found, table)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
