"""Time of the layer that runs use ("auto"), forward + backward, and of its floor (layer.py), as one size grows alone."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from ecmoe.bench import clock as timing
from ecmoe.bench.layer import floor, forward_and_both, layer_and_input
from ecmoe.bench.rows import BOTH
from ecmoe.files import check_known
from ecmoe.routers import bucket_size

AXES = ("n", "num_experts", "capacity_factor", "d_model")


def bench_growth(base: Mapping[str, Any], axes: Mapping[str, Sequence[float]], *, repeats: int = 9) -> pd.DataFrame:
    """Time the layer at each value of each axis; return a row for each, with ms, quartiles and floor_ms.

    base: n, d_model, d_ff, num_experts, capacity_factor. axes: a name in `AXES` -> values; d_ff is scaled with d_model.
    Raises a ConfigError before anything is timed if k = n c / e is not a whole number, or an axis is unknown."""
    check_known("axes", axes, AXES)
    points, rows, absent = [], [], []
    for axis, value in ((axis, value) for axis, values in axes.items() for value in values):
        size = {**base, axis: value}
        size["d_ff"] = base["d_ff"] * size["d_model"] // base["d_model"]
        points.append((axis, size, bucket_size(size["n"], size["num_experts"], size["capacity_factor"])))
    for axis, size, k in points:
        layer, x, gradient = layer_and_input(**size, kernels="auto")
        both = forward_and_both(layer, x, layer, gradient)[BOTH]
        found = timing.timed({("layer",): both, ("floor",): floor(layer, x[0], k)[BOTH]}, repeats)
        absent += found.absent
        if len(found.times) == 2:
            row = {"axis": axis, "value": size[axis]} | timing.spread(found.times["layer",])
            rows.append(row | {"floor_ms": timing.spread(found.times["floor",])["ms"]})
    return timing.tabled(rows, absent, dict(base) | {"repeats": repeats})


def exponents(grown: pd.DataFrame) -> pd.DataFrame:
    """Return by axis the power of the size that times grow with: exponent, of_floor (the floor's), at_1 (ms at size 1).

    It is taken between the two largest sizes: at small ones launching may take all the time, which is no power of a size."""
    rows = []
    for axis, group in grown.groupby("axis", sort=False):
        last = np.log(group.sort_values("value")[["value", "ms", "floor_ms"]].tail(2).astype(float))
        size, ms, floor_ms = last.diff().iloc[-1]
        at_1 = float(np.exp(last["ms"].iloc[-1] - ms / size * last["value"].iloc[-1]))
        rows.append((axis, ms / size, floor_ms / size, at_1))
    return pd.DataFrame(rows, columns=["axis", "exponent", "of_floor", "at_1"])
