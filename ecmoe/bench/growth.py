"""The EC layer's time, forward + backward, as one size grows and the others stay.

The layer is what a run gets ("auto"), beside the floor of the same sizes. A power law's exponent is least squares in
the logarithms, with Student's interval over the sizes: it says how straight the line is, too.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import stats

from ecmoe.bench import clock as timing
from ecmoe.bench.layer import floor, forward_and_both
from ecmoe.bench.rows import BOTH
from ecmoe.model.moe import MoE
from ecmoe.routers import bucket_size
from ecmoe.routing import ExpertChoice

AXES = ("n", "num_experts", "capacity_factor", "d_model")


def bench_growth(base: Mapping[str, Any], axes: Mapping[str, Sequence[float]], *, repeats: int = 9) -> pd.DataFrame:
    """Time the layer at each value of each axis: a row with ms, quartiles and floor_ms.

    base: n, d_model, d_ff, num_experts, capacity_factor. axes: of `AXES` -> values; f grows with d. A ConfigError, before
    anything is timed, where k = n c / e is no whole number.
    """
    if unknown := set(axes) - set(AXES):
        raise ValueError(f"axes={sorted(unknown)}: must be of {', '.join(AXES)}")
    points = []
    for axis, values in axes.items():
        for value in values:
            size = dict(base) | {axis: value}
            size["d_ff"] = base["d_ff"] * size["d_model"] // base["d_model"]
            bucket_size(size["n"], size["num_experts"], size["capacity_factor"])
            points.append((axis, value, size))
    device = timing.this_device()
    rows = []
    for axis, value, size in points:
        times = timing.in_turns(_calls(size, device), repeats, device)
        row = {"axis": axis, "value": value} | timing.spread(times["layer"])
        rows.append(row | {"floor_ms": 1e3 * statistics.median(times["floor"])})
    table = pd.DataFrame(rows)
    table.attrs["setting"] = dict(base) | {"repeats": repeats} | timing.machine()
    return table


def _calls(size: Mapping[str, Any], device: torch.device) -> dict[str, timing.Call]:
    """Layer and floor, warm."""
    n, d, e, c = (size[key] for key in ("n", "d_model", "num_experts", "capacity_factor"))
    dtype = timing.products_in(device)
    torch.manual_seed(0)
    with device:
        layer = MoE(ExpertChoice(d, e, c), d, size["d_ff"]).to(dtype)
    x = torch.randn(1, n, d, device=device, dtype=dtype, requires_grad=True)
    calls = {
        "layer": forward_and_both(layer, x, layer, torch.randn_like(x))[BOTH],
        "floor": floor(layer, x[0], bucket_size(n, e, c))[BOTH],
    }
    for call in calls.values():
        timing.warm_up(call, device)
    return calls


def exponents(grown: pd.DataFrame) -> pd.DataFrame:
    """The power by which time grows along each axis: axis, exponent, low, high, of_floor; and at, the fit's time at 1."""
    rows = []
    for axis, group in grown.groupby("axis", sort=False):
        x = np.log(group["value"].to_numpy(float))
        fits = [stats.linregress(x, np.log(group[column].to_numpy(float))) for column in ("ms", "floor_ms")]
        half = stats.t.ppf(0.975, len(x) - 2) * fits[0].stderr if len(x) > 2 else np.nan
        slope, at_1 = fits[0].slope, float(np.exp(fits[0].intercept))
        rows.append((axis, slope, slope - half, slope + half, fits[1].slope, at_1))
    return pd.DataFrame(rows, columns=["axis", "exponent", "low", "high", "of_floor", "at_1"])
