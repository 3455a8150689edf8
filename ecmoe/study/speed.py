"""What takes how long: layers, training steps, growth and a profile for 08_step_time, and the steps of a study's arms; each
measured once on one machine, kept as JSON.

A time belongs to the machine that took it. At scale gpu measurements are taken on a GPU only, and committed, so that
the page can be drawn anywhere; at smoke they are ratios on a CPU. `ecmoe bench all` takes them without a notebook.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from ecmoe import paths
from ecmoe.bench import clock
from ecmoe.bench import layer as bench
from ecmoe.bench.growth import bench_growth
from ecmoe.bench.profile import bench_profile
from ecmoe.bench.step import bench_step, bench_study
from ecmoe.config import RunConfig
from ecmoe.files import read_json
from ecmoe.study.parameters import merge_parameters, parameter_files
from ecmoe.study.steps import SPEED, folder, layer_file, study_arms, study_file

Job = Callable[[], pd.DataFrame]
Found = Mapping[str, Mapping[str, Any] | None]


def jobs(
    layer_sizes: Mapping[str, Mapping[str, Any]],
    step_sizes: Mapping[str, Any],
    growth_from: Mapping[str, Any],
    growth_axes: Mapping[str, Sequence[float]],
    study_arms: Mapping[str, RunConfig] | None = None,
    auto_sizes: Sequence[Mapping[str, int]] = (),
    *,
    compiled: bool = False,
    repeats: int = 15,
    **_: Any,
) -> dict[str, Job]:
    """What there is to measure, by the name of its file.

    Args:
        layer_sizes: name -> keys of `bench_layer`. step_sizes: keys of `bench_step`.
        growth_from, growth_axes: of `bench_growth`. compiled, repeats: of all of these that have them.
        auto_sizes: of `bench_auto`. study_arms: of `bench_study`, on the path and with the repeats that page 01 has.
    """
    found: dict[str, Job] = {
        layer_file(name): lambda keys=keys: bench.bench_layer(**{"compiled": compiled, "repeats": repeats} | keys)
        for name, keys in layer_sizes.items()
    }
    if auto_sizes:
        found["auto"] = lambda: bench.bench_auto(auto_sizes, compiled=compiled, repeats=repeats)
    if study_arms:
        found[study_file(study_arms)] = lambda: bench_study(study_arms)
    return found | {
        "step": lambda: bench_step(repeats=repeats, compiled=compiled, **step_sizes),
        "step-bf16": lambda: bench_step(repeats=repeats, compiled=compiled, narrow=True, **step_sizes),
        "growth": lambda: bench_growth(growth_from, growth_axes, repeats=repeats),
        "profile": lambda: bench_profile(compiled=compiled, **step_sizes),
    }


def plan(scale: str) -> dict[str, Any]:
    """Arguments of `jobs` at a scale: the parameters of 08_step_time, as the notebook gets them, and of the study.

    Raises:
        ParameterError: no such scale; or this is no checkout, which has the configs.
    """
    return {"step_sizes": {}} | merge_parameters(parameter_files(SPEED, scale)) | {"study_arms": study_arms(scale)}


def take(
    wanted: Mapping[str, Job], into: Path, *, force: bool = False
) -> Iterator[tuple[str, pd.DataFrame | Exception | None]]:
    """Measure job after job, and keep each at once: name and table; None: it is there already; or what went wrong."""
    for name, job in wanted.items():
        path = into / f"{name}.json"
        if path.exists() and not force:
            yield name, None
            continue
        try:
            table = job()
        except Exception as error:  # the others are still wanted
            yield name, error
            continue
        clock.save(table, path)
        yield name, table


def measured(wanted: Mapping[str, Job], *, scale: str, measure: bool = True) -> dict[str, dict[str, Any] | None]:
    """Each job's rows and attributes, measured now where it is missing and this machine may; else None.

    What is measured here lies in runs/bench; only the engine's `ecmoe bench all` writes to reports.
    """
    places = folder(scale), paths.runs() / "bench" / scale
    kept = {name: [place / f"{name}.json" for place in places] for name in wanted}
    if measure and (scale == "smoke" or torch.cuda.is_available()):
        missing = {name: job for name, job in wanted.items() if not any(path.exists() for path in kept[name])}
        for _, outcome in take(missing, places[1]):
            if isinstance(outcome, Exception):
                raise outcome
    return {name: next((read_json(p) for p in found if p.exists()), None) for name, found in kept.items()}


def study_steps(arms: Mapping[str, RunConfig], *, scale: str, measure: bool = True) -> pd.DataFrame:
    """What a training step of each arm takes, alone on the device: a row per arm, by its name, as `bench_study` has them.

    Args:
        measure: now, where it is missing and this machine may.
    """
    name = study_file(arms)
    found = measured({name: lambda: bench_study(arms)}, scale=scale, measure=measure)[name]
    found = found or {"rows": [], "setting": {}}
    rows = pd.DataFrame(found["rows"], columns=["arm", "ms", "low_ms", "high_ms", "tokens_per_second", "mfu"])
    table = rows.set_index("arm").reindex(list(arms))
    table.attrs["device"] = found["setting"].get("device", "no device yet (`ecmoe bench all --only study`)")
    return table


def layers(found: Found, sizes: Sequence[str]) -> pd.DataFrame:
    """The rows of all layers, with their size and their name. A size that isn't measured is one empty row."""
    tables = []
    for size in sizes:
        one = found[layer_file(size)]
        tables.append(pd.DataFrame(one["rows"] if one else [dict.fromkeys(bench.Row._fields)]).assign(size=size))
    found_rows = pd.concat(tables, ignore_index=True)
    fields = found_rows.reindex(columns=["layer", "variant", "path", "mode"])
    found_rows["name"] = [
        bench.label(*row) if isinstance(row[0], str) else None for row in fields.itertuples(index=False)
    ]
    return found_rows


def by_layer(layers: pd.DataFrame) -> pd.DataFrame:
    """A row per size and layer, as a table shows them: forward, with backward, routing, what a cap adds, memory."""
    rows = []
    for (size, name), group in layers.dropna(subset=["name"]).groupby(["size", "name"], sort=False):
        of = group.drop_duplicates("what").set_index("what").reindex([bench.FORWARD, bench.BOTH, bench.ROUTING])
        of = of.reindex(columns=["ms", "share_of_floor", "of_forward_floor", "over_uncapped", "peak_mb"])
        rows.append({
            "size": size, "layer": name,
            "forward, ms": of["ms"][bench.FORWARD], "share of floor": of["share_of_floor"][bench.FORWARD],
            "with backward, ms": of["ms"][bench.BOTH], "its share": of["share_of_floor"][bench.BOTH],
            "a cap adds": of["over_uncapped"][bench.BOTH], "routing, of floor": of["of_forward_floor"][bench.ROUTING],
            "peak MB": of["peak_mb"][bench.BOTH],
        })  # fmt: skip
    return pd.DataFrame(rows, columns=None if rows else ["size", "layer"]).dropna(axis=1, how="all")


def agreement(found: Found, sizes: Sequence[str]) -> pd.DataFrame:
    """How far each path is from the plain one in float32, and whether it gives the same bits, at each size."""
    rows = [{"size": size} | row for size in sizes for row in (found[layer_file(size)] or {}).get("agreement", [])]
    return pd.DataFrame(rows, columns=None if rows else ["size", "path", "same_bits"])


def rows(found: Found, name: str) -> pd.DataFrame:
    """The rows of one file, without the single samples; none if it isn't measured."""
    return pd.DataFrame((found[name] or {"rows": []})["rows"]).drop(columns="samples_ms", errors="ignore")


def absent(found: Found) -> list[str]:
    """What could not be measured, and why."""
    return list(dict.fromkeys(line for one in found.values() for line in (one or {}).get("absent", [])))


def figures(layers: pd.DataFrame) -> pd.DataFrame:
    """The figures asked of our layer, a row per size: its best path, shares of the floor, routing, caps, memory."""
    out = []
    for size, all_rows in layers.groupby("size", sort=False):
        row: dict[str, Any] = {"size": size}
        named = all_rows.dropna(subset=["layer"])
        # Ours, as runs take it: neither as a graph nor with a cap, nor the oracle.
        ours = named[
            named["layer"].astype(str).str.startswith("EC") & named["variant"].eq("") & named["mode"].ne(bench.GRAPH)
        ]
        if len(ours):
            both = ours[ours["what"] == bench.BOTH].set_index(["path", "mode"])
            path, mode = both["ms"].idxmin()
            of_best = ours[(ours["path"] == path) & (ours["mode"] == mode)].set_index("what")
            routing = ours[(ours["path"] == path) & (ours["what"] == bench.ROUTING)]
            row |= {
                "best path": of_best["name"].iloc[0],
                "forward, share of floor": of_best["share_of_floor"].get(bench.FORWARD),
                "forward + backward, share of floor": of_best["share_of_floor"][bench.BOTH],
                "routing, share of forward floor": routing["of_forward_floor"].min(),
            }
            for cap in bench.CAPS:
                capped = named[(named["variant"] == f"cap {cap}") & (named["what"] == bench.BOTH)]
                row[f"cap {cap} adds"] = capped["over_uncapped"].min()
            memory = both["peak_mb"]
            if memory.notna().all() and (bench.PLAIN, bench.EAGER) in memory:
                row["memory of plain's"] = memory[path, bench.EAGER] / memory[bench.PLAIN, bench.EAGER]
        out.append(row)
    return pd.DataFrame(out)
