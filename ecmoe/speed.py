"""What 08_step_time measures: layers, training steps and growth, each measured once on one machine and kept as JSON.

A time belongs to the machine that took it. At scale gpu measurements are taken on a GPU only, and committed, so that
the page can be drawn anywhere; at smoke they are ratios on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from ecmoe import bench, paths
from ecmoe.bench_step import bench_step
from ecmoe.plots.parts import LABELS
from ecmoe.results import read_json, write_json
from ecmoe.stats import Effect, interval


def layers(sizes: Mapping[str, Mapping[str, Any]], *, scale: str, measure: bool = True, **options: Any) -> pd.DataFrame:
    """`bench_layer` at each size: its rows, with the size's name in front. A size that isn't measured is one empty row.

    Args:
        sizes: name -> keys of `bench_layer`. measure: take what is missing. options: of `bench_layer`, for all sizes.
    """
    tables = []
    for name, keys in sizes.items():
        found = _kept(f"layer-{_slug(name)}", lambda keys=keys: bench.bench_layer(**keys, **options), scale, measure)
        rows = pd.DataFrame(found["rows"] if found else [{"layer": None}])
        tables.append(rows.assign(size=name, device=found and found["setting"]["device"]))
    return pd.concat(tables, ignore_index=True)


def steps(sizes: Mapping[str, Any], *, scale: str, measure: bool = True, **options: Any) -> dict[str, Any]:
    """`bench_step`: rows, setting, and samples (ms of every repeat by arm and path). No rows if it isn't measured."""
    found = _kept("step", lambda: bench_step(**sizes, **options), scale, measure)
    return found or {"rows": [], "setting": {}, "samples": {}, "absent": []}


def growth(
    base: Mapping[str, Any], axes: Mapping[str, Sequence[float]], *, scale: str, measure: bool = True, repeats: int = 9
) -> pd.DataFrame:
    """Time of the EC layer, forward + backward, as one size grows and the others stay: axis, value, ms, floor_ms.

    Args:
        base: keys of `bench_layer`. axes: of n, num_experts, capacity_factor, d_model -> values. The hidden width f grows with d.
    """

    def compute() -> pd.DataFrame:
        rows = []
        for axis, values in axes.items():
            for value in values:
                keys = dict(base) | {axis: value}
                if axis == "d_model":
                    keys["d_ff"] = base["d_ff"] * value // base["d_model"]
                table = bench.bench_layer(**keys, repeats=repeats)
                both = table[table["what"] == "forward + backward"].set_index("layer")["ms"]
                floor = both.pop("floor")
                for name, ms in both.items():  # "EC-CF2, triton": c may be the axis
                    if name.count(",") > 1 or not name.startswith("EC") or "cap " in name or "einsum" in name:
                        continue
                    path = name.partition(", ")[2] or "plain"
                    rows.append({"axis": axis, "value": value, "path": path, "ms": ms, "floor_ms": floor})
        grown = pd.DataFrame(rows)
        grown.attrs |= table.attrs
        return grown

    found = _kept("growth", compute, scale, measure)
    return pd.DataFrame(found["rows"] if found else [], columns=["axis", "value", "path", "ms", "floor_ms"])


def exponents(grown: pd.DataFrame) -> pd.DataFrame:
    """The power by which time grows with each size: least squares in the logarithms, a row per axis and path."""
    rows = []
    for (axis, path), group in grown.groupby(["axis", "path"], sort=False):
        x = np.log(group["value"].to_numpy(float))
        slopes = [np.polyfit(x, np.log(group[column].to_numpy(float)), 1)[0] for column in ("ms", "floor_ms")]
        rows.append({"size": LABELS[axis], "path": path, "exponent": slopes[0], "of its floor": slopes[1]})
    return pd.DataFrame(rows, columns=["size", "path", "exponent", "of its floor"])


def best_paths(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Arm -> the path on which its step is fastest."""
    fastest: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        if row["arm"] not in fastest or row["ms"] < fastest[row["arm"]]["ms"]:
            fastest[row["arm"]] = row
    return {arm: row["path"] for arm, row in fastest.items()}


def step_ratio(measured: Mapping[str, Any], arm: str, other: str) -> Effect:
    """Time of a step of `arm` over one of `other`, each on its best path; the interval is over repeats, not seeds."""
    best = best_paths(measured["rows"])
    if arm not in best or other not in best:
        return interval([], "ratio", "repeat")
    a, b = (measured["samples"][f"{name}, {best[name]}"] for name in (arm, other))
    return interval((x / y for x, y in zip(a, b, strict=True)), "ratio", "repeat")


def _kept(what: str, compute: Callable[[], pd.DataFrame], scale: str, measure: bool) -> dict[str, Any] | None:
    folder = paths.runs() / "bench" if scale == "smoke" else paths.root() / "reports" / scale / "bench"
    path = folder / f"{what}.json"
    if not path.exists():
        if not measure or (scale != "smoke" and not torch.cuda.is_available()):
            return None
        table = compute()
        write_json(path, {**table.attrs, "rows": table.to_dict("records")})
    return read_json(path)


def _slug(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name.lower())
