"""Time a layer whose experts are spread over GPUs, against its floor: the six matrix products of a GPU's experts with
tokens of all GPUs. Each GPU's process imports no more than the layer, as starting takes longer than measuring."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import pandas as pd
import torch
import torch.distributed as dist
from torch import nn

from ecmoe.bench import clock as timing
from ecmoe.bench.layer import floor, forward_and_both, layer_and_input
from ecmoe.bench.rows import BOTH, FORWARD
from ecmoe.files import read_json
from ecmoe.model.expert_parallel import share_experts
from ecmoe.routers import bucket_size


def bench_across(
    sizes: Mapping[str, Mapping[str, int]], devices: Sequence[int], *, repeats: int
) -> Iterator[pd.DataFrame]:
    """Time expert-parallel layers. Yield the table so far, after each size and number of GPUs: rows of forward and of
    forward + backward, with milliseconds and quartiles, floor_ms, share_of_floor, and the first GPU's peak memory;
    `attrs["absent"]` lists what could not be timed.

    sizes: name -> n (of a GPU), d_model, d_ff, num_experts. devices: numbers of GPUs. repeats: of each row."""
    rows, absent = [], []
    for name, many in product(sizes, devices):
        with TemporaryDirectory() as folder:
            try:
                torch.multiprocessing.spawn(_rank, (many, folder, sizes[name] | {"repeats": repeats}), many)
                rows += [{"size": name, **row} for row in read_json(Path(folder) / "table.json")["rows"]]
            except Exception as error:  # go on with the others; the last line of a rank's traceback is its error
                absent.append(f"{name} on {many} ({str(error).strip().splitlines()[-1][:160]})")
        yield timing.tabled(rows, list(absent), {"repeats": repeats})


def _rank(rank: int, ranks: int, folder: str, asked: Mapping[str, int]) -> None:
    torch.set_num_threads(1)
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
    kind = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(kind, f"file://{folder}/ranks", rank=rank, world_size=ranks)
    with timing.in_this_thread():
        table = of_this_rank(**asked)
    if rank == 0:
        timing.save(table, Path(folder) / "table.json")
    dist.destroy_process_group()


def of_this_rank(*, repeats: int, **sizes: int) -> pd.DataFrame:
    """Time one size on this rank of a process group; every rank must call it."""
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

    def first_ranks(bursts: dict) -> dict:  # as calls wait for the other ranks, the numbers of calls must agree
        box = [bursts]
        dist.broadcast_object_list(box, 0)
        return box[0]

    times = timing.in_turns(calls, repeats, device, agreed=first_ranks)
    rows = []
    for what in (FORWARD, BOTH):
        row = {"devices": ranks, "what": what} | timing.spread(times["layer", what])
        ms, peak = timing.spread(times["floor", what])["ms"], peaks["layer", what]
        rows.append(row | {"floor_ms": ms, "share_of_floor": ms / row["ms"], "peak_mb": peak and peak[1]})
    return timing.tabled(rows, [], {**sizes, "repeats": repeats})
