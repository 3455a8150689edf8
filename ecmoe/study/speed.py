"""What takes how long: layers, training steps, growth and a profile for 08_step_time, and the steps of a study's arms; each
measured once on one machine, kept as JSON.

A time belongs to the machine that took it. At scale gpu measurements are taken on a GPU only, and committed, so that
the page can be drawn anywhere; at smoke they are ratios on a CPU. `ecmoe bench --all` takes them without a notebook.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from ecmoe import paths
from ecmoe.bench import layer as bench
from ecmoe.bench.growth import bench_growth
from ecmoe.bench.profile import bench_profile
from ecmoe.bench.step import bench_step
from ecmoe.bench.study_steps import bench_study
from ecmoe.config import RunConfig
from ecmoe.files import read_json
from ecmoe.study.parameters import merge_parameters, parameter_files
from ecmoe.study.plan import arms_of, configs
from ecmoe.study.stats import Effect, interval

Job = Callable[[], pd.DataFrame]
Found = Mapping[str, Mapping[str, Any] | None]

NOTEBOOK = "08_step_time"
STUDY = "01_convergence"  # whose claims are about seconds, too


def jobs(
    layer_sizes: Mapping[str, Mapping[str, Any]],
    step_sizes: Mapping[str, Any],
    growth_from: Mapping[str, Any],
    growth_axes: Mapping[str, Sequence[float]],
    study_arms: Mapping[str, RunConfig] | None = None,
    *,
    compiled: bool = False,
    repeats: int = 15,
    **_: Any,
) -> dict[str, Job]:
    """What there is to measure, by the name of its file.

    Args:
        layer_sizes: name -> keys of `bench_layer`. step_sizes: keys of `bench_step`.
        growth_from, growth_axes: of `bench_growth`. compiled, repeats: of all of these that have them.
        study_arms: of `bench_study`, on the path and with the repeats that page 01 has.
    """
    found: dict[str, Job] = {
        layer_file(name): lambda keys=keys: bench.bench_layer(**{"compiled": compiled, "repeats": repeats} | keys)
        for name, keys in layer_sizes.items()
    }
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
    study = merge_parameters(parameter_files(STUDY, scale))
    arms = configs(study["base"], arms_of(study, scale), study["seeds"][:1])
    arms = {arm: by_seed[0] for arm, by_seed in arms.items()}
    return {"step_sizes": {}} | merge_parameters(parameter_files(NOTEBOOK, scale)) | {"study_arms": arms}


def folder(scale: str) -> Path:
    """Where measurements of a scale are kept."""
    return paths.runs() / "bench" if scale == "smoke" else paths.root() / "reports" / scale / "bench"


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
        bench.save(table, path)
        yield name, table


def measured(wanted: Mapping[str, Job], *, scale: str, measure: bool = True) -> dict[str, dict[str, Any] | None]:
    """Each job's rows and attributes, measured now where it is missing and this machine may; else None."""
    if measure and (scale == "smoke" or torch.cuda.is_available()):
        for _, outcome in take(wanted, folder(scale)):
            if isinstance(outcome, Exception):
                raise outcome
    files = {name: folder(scale) / f"{name}.json" for name in wanted}
    return {name: read_json(path) if path.exists() else None for name, path in files.items()}


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
    table.attrs["device"] = found["setting"].get("device", "no device yet (`ecmoe bench --all --only study`)")
    return table


def study_file(arms: Mapping[str, RunConfig]) -> str:
    """The name of the file of a study's steps: other arms, or arms of other keys, are measured anew, side by side."""
    names = ",".join(f"{arm} {config.replace(seed=0).name}" for arm, config in arms.items())
    return f"study-{hashlib.sha256(names.encode()).hexdigest()[:8]}"


def layer_file(size: str) -> str:
    """The name of a layer's file."""
    return "layer-" + "".join(letter if letter.isalnum() else "-" for letter in size.lower())


def layers(found: Found, sizes: Sequence[str]) -> pd.DataFrame:
    """The rows of all layers, with the size's name in front. A size that isn't measured is one empty row."""
    tables = []
    for size in sizes:
        one = found[layer_file(size)]
        tables.append(pd.DataFrame(one["rows"] if one else [{"layer": None}]).assign(size=size))
    return pd.concat(tables, ignore_index=True)


def by_layer(layers: pd.DataFrame) -> pd.DataFrame:
    """A row per size and layer, as a table shows them: forward, with backward, routing, what a cap adds, memory."""
    rows = []
    for (size, layer), group in layers.dropna(subset=["layer"]).groupby(["size", "layer"], sort=False):
        of = group.drop_duplicates("what").set_index("what").reindex([bench.FORWARD, bench.BOTH, bench.ROUTING])
        of = of.reindex(columns=["ms", "share_of_floor", "of_forward_floor", "over_uncapped", "peak_mb"])
        rows.append({
            "size": size, "layer": layer,
            "forward, ms": of["ms"][bench.FORWARD], "share of floor": of["share_of_floor"][bench.FORWARD],
            "with backward, ms": of["ms"][bench.BOTH], "its share": of["share_of_floor"][bench.BOTH],
            "a cap adds": of["over_uncapped"][bench.BOTH], "routing, of floor": of["of_forward_floor"][bench.ROUTING],
            "peak MB": of["peak_mb"][bench.BOTH],
        })  # fmt: skip
    return pd.DataFrame(rows, columns=None if rows else ["size", "layer"]).dropna(axis=1, how="all")


def agreement(found: Found, sizes: Sequence[str]) -> pd.DataFrame:
    """How far each path is from the plain one in float32, and whether it gives the same bits, at each size."""
    rows = [{"size": size} | row for size in sizes for row in (found[layer_file(size)] or {}).get("agreement", [])]
    return pd.DataFrame(rows, columns=None if rows else ["size", "layer", "same_bits"])


def rows(found: Found, name: str) -> pd.DataFrame:
    """The rows of one file; none if it isn't measured."""
    return pd.DataFrame((found[name] or {"rows": []})["rows"])


def absent(found: Found) -> list[str]:
    """What could not be measured, and why."""
    return list(dict.fromkeys(line for one in found.values() for line in (one or {}).get("absent", [])))


def figures(layers: pd.DataFrame) -> pd.DataFrame:
    """The figures asked of our layer, a row per size: its best path, shares of the floor, routing, caps, memory."""
    out = []
    for size, all_rows in layers.groupby("size", sort=False):
        row: dict[str, Any] = {"size": size}
        named = all_rows.dropna(subset=["layer"])
        # A layer of ours that runs do take: neither as a graph nor with a cap, nor the oracle.
        ours = named[named["layer"].str.match(r"EC-CF[\d.]+(, (triton(-bmm)?|compiled))*$")]
        if len(ours):
            both = ours[ours["what"] == bench.BOTH].set_index("layer")
            best = both["ms"].idxmin()
            of_best = ours[ours["layer"] == best].set_index("what")
            uncompiled = best.removesuffix(", compiled")
            routing = ours[(ours["what"] == bench.ROUTING) & (ours["layer"] == uncompiled)]
            row |= {
                "best path": best,
                "forward, share of floor": of_best["share_of_floor"].get(bench.FORWARD),
                "forward + backward, share of floor": of_best["share_of_floor"][bench.BOTH],
                "routing, share of forward floor": routing["of_forward_floor"].min(),
            }
            path = uncompiled.partition(", ")[2]
            for cap in bench.CAPS:
                name = ", ".join(filter(None, [uncompiled.partition(",")[0], f"cap {cap}", path.replace("-bmm", "")]))
                capped = named[(named["layer"] == name) & (named["what"] == bench.BOTH)]
                row[f"cap {cap} adds"] = capped["over_uncapped"].min()
            if both["peak_mb"].notna().all():
                plain = both["peak_mb"].iloc[0]
                row["memory of plain's"] = both["peak_mb"][uncompiled] / plain
        out.append(row)
    return pd.DataFrame(out)


def best_paths(steps: pd.DataFrame, routing: str = "even") -> dict[str, str]:
    """Arm -> the name of its fastest row; token choice's as `routing` says."""
    if not len(steps):
        return {}
    forced = steps[steps["routing"] == routing]["arm"].unique()
    asked = steps[(steps["routing"] == routing) | ~steps["arm"].isin(forced)]
    best = asked.loc[asked.groupby("arm", sort=False)["ms"].idxmin()]
    return {row.arm: ", ".join([row.arm, row.routing, row.path]) for row in best.itertuples()}


def step_ratio(found: Found, arm: str, other: str, routing: str = "even") -> Effect:
    """Time of a step of `arm` over one of `other`, each on its best path; the interval is over turns, not seeds."""
    best = best_paths(rows(found, "step"), routing)
    if arm not in best or other not in best:
        return interval([], "ratio", "turn")
    a, b = (found["step"]["samples"][best[name]] for name in (arm, other))
    return interval((x / y for x, y in zip(a, b, strict=True)), "ratio", "turn")
