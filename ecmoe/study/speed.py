"""Timings that pages show: layers, steps, growth with size and a profile (08_step_time), and steps of page 01's arms.

Each is measured once on one machine, stored as JSON, and read without torch. Those of scale gpu are committed, so that
pages can be drawn on any machine. `ecmoe bench all` takes them without a notebook.
"""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from itertools import product
from pathlib import Path
from pkgutil import resolve_name
from typing import Annotated, Any, get_type_hints

import pandas as pd
from pydantic import Field

from ecmoe import paths
from ecmoe.bench.rows import BOTH, FORWARD, GRAPH, ROUTING, Row
from ecmoe.config import RunConfig
from ecmoe.files import check_known, read_json
from ecmoe.study.parameters import check_kinds, check_scale, held_to, merge_parameters, parameter_files
from ecmoe.study.plan import of_page

STUDY, SPEED = "01_convergence", "08_step_time"  # page 01 also judges claims about time
Sizes = dict[str, int]
Job = Callable[[], pd.DataFrame]
Found = Mapping[str, Mapping[str, Any]]
NOTHING: dict[str, Any] = {"rows": [], "setting": {}, "absent": []}  # stands for a missing file
# Columns without which page 08 can't show a result, where it has rows at all.
COLUMNS = {
    "auto": ("n", "d_model", "mode", "what", "plain_ms", "auto_ms", "ratio"),
    "growth": ("axis", "value", "ms", "low_ms", "high_ms", "floor_ms"),
    "scaling": ("devices", "strategy", "pool", "of_ideal"),
    "scaling-layers": ("size", "devices", "share_of_floor"),
}


def jobs(
    layer_sizes: dict[str, Sizes],
    step_sizes: Sizes,
    growth_from: dict[str, float],
    growth_axes: dict[str, list[float]],
    study_arms: Mapping[str, RunConfig] | None = None,
    auto_sizes: list[Sizes] | None = None,
    *,
    compiled: bool = False,
    repeats: Annotated[int, Field(ge=2)],
    scaling: dict[str, list[int | str] | dict[str, Any]] | None = None,
    **_: Any,
) -> dict[str, Job]:
    """Return file name -> benchmark of all that pages show of one GPU. A ConfigError names an argument of a wrong type.

    layer_sizes: name -> arguments of `bench_layer`. step_sizes: of `bench_step` and `bench_profile`. growth_from,
    growth_axes: of `bench_growth`. auto_sizes: of `bench_auto`. study_arms: of `bench_study`, which has repeats of its
    own. compiled, repeats: of all others that take them. scaling: only checked here, see `scaling`."""
    _check_types(locals())
    usual = {"compiled": compiled, "repeats": repeats}
    found = {layer_file(name): job("layer", **usual | keys) for name, keys in layer_sizes.items()}
    if auto_sizes:
        found["auto"] = job("auto", sizes=auto_sizes, **usual)
    if study_arms:
        found[study_file(study_arms)] = job("study", configs=study_arms)
    found["step"] = job("step", **usual | step_sizes)
    found["growth"] = job("growth", base=growth_from, axes=growth_axes, repeats=repeats)
    found["profile"] = job("profile", **{"compiled": compiled} | step_sizes)
    return found


# Modules of `bench_auto` and `bench_study`; the module of every other benchmark has its name.
MODULES = {"auto": "layer", "study": "step"}


def job(name: str, /, **keys: Any) -> Job:
    """Return a function that checks these arguments and calls `bench_<name>` with them; only then is torch imported."""

    def measure() -> pd.DataFrame:
        bench = resolve_name(f"ecmoe.bench.{MODULES.get(name, name)}:bench_{name}")
        takes = signature(bench).parameters.values()
        sizes = [one.name for one in takes if one.kind is one.VAR_KEYWORD]  # **sizes, which the benchmark itself checks
        usual = {one.name: None if one.default is one.empty else one.default for one in takes if one.name not in sizes}
        check_kinds(f"bench {name}", {key: x for key, x in keys.items() if key in usual or not sizes}, usual)
        return bench(**keys)

    return measure


def plan(scale: str) -> dict[str, Any]:
    """Return the arguments of `jobs` at a scale: the checked parameters of 08_step_time, and page 01's arms."""
    values = merge_parameters(parameter_files(SPEED, scale))
    _check_types(values)
    return values | {"study_arms": study_arms(scale)}


def _check_types(values: Mapping[str, Any]) -> None:
    held = get_type_hints(jobs, include_extras=True)
    for key in held.keys() & values.keys() - {"study_arms"}:
        held_to(held[key], values[key], f"page {SPEED!r}: {key}")


def scaling(scale: str) -> dict[str, Any]:
    """Return the arguments of `bench_scaling`: `scaling` of 08_step_time, its `base` merged over the scale's; and
    `layers`, name -> sizes, whose experts `bench_across` distributes over GPUs."""
    values = plan(scale)
    asked, sizes = values["scaling"], values["layer_sizes"]
    check_known(f"page {SPEED!r}: scaling: layers names", asked.get("layers", []), sizes)
    layers = {name: sizes[name] for name in asked.get("layers", [])}
    return {"devices": [1]} | asked | {"base": values["base"] | asked.get("base", {}), "layers": layers}


def may(scale: str) -> bool:
    """Return whether this machine may take a scale's timings: any machine for smoke, one with CUDA for all others."""
    check_scale(scale)
    return scale == "smoke" or resolve_name("torch.cuda:is_available")()


def files(scale: str) -> list[Path]:
    """Return the paths of the timing files that a scale's pages need; a file exists once it has been measured."""
    return [paths.results(scale, "bench") / f"{name}.json" for name in jobs(**plan(scale))]


def layer_file(size: str) -> str:
    """Return the file name, without suffix, of a layer's timings."""
    return "layer-" + "".join(letter if letter.isalnum() else "-" for letter in size.lower())


def study_arms(scale: str) -> dict[str, RunConfig]:
    """Return the arms of page 01, whose training steps are timed: name -> config of the first seed."""
    planned = of_page(STUDY, scale)
    return {one.arms[0]: one.config for one in planned if one.seed == planned[0].seed}


def study_file(arms: Mapping[str, RunConfig]) -> str:
    """Return the file name of these arms' step times; its digest changes with any config, so that all are timed again."""
    names = ",".join(f"{arm} {config.replace(seed=0).name}" for arm, config in arms.items())
    return f"study-{hashlib.sha256(names.encode()).hexdigest()[:8]}"


def measured(wanted: Mapping[str, Job | None], *, scale: str, measure: bool = True) -> Found:
    """Return the results of each job: name -> rows and attributes. `measure`: if `may(scale)`, measure missing ones now,
    and store them in runs/bench, as only `ecmoe bench all` writes to reports/."""
    own = paths.runs() / "bench" / scale
    missing = {name: job for name, job in wanted.items() if kept(name, scale, own) is NOTHING}
    if measure and missing and may(scale):
        from ecmoe.bench.clock import save

        for name, job in missing.items():
            save(job(), own / f"{name}.json")
    return {name: kept(name, scale, own) for name in wanted}


def kept(name: str, scale: str, *more: Path) -> dict[str, Any]:
    """Read a result's rows and attributes from reports/<scale>/bench, else from one of these folders; else `NOTHING`.
    May raise Damaged."""
    places = [place / f"{name}.json" for place in (paths.results(scale, "bench"), *more)]
    found = next((read_json(path, sealed=True) for path in places if path.exists()), NOTHING)
    for row, column in product(found["rows"], COLUMNS.get(name, ())):
        row[column]  # if it is missing, this error names the file, which a table's would not
    return found


def setting(scale: str) -> tuple[str, str]:
    """Return what the scale's `bench_step` timed: the model size in words, and the device."""
    found = kept("step", scale)["setting"]
    size = "{layers} layers of width {d_model}, {num_experts} experts".format_map(found) if found else "one model"
    return size, found.get("device", "an unknown device")


def taken(found: Found, name: str) -> str:
    """Return where a result was measured, and with which code: "one NVIDIA H200 (4 CPU threads, commit a482a1b)"."""
    at = found[name]["setting"]
    return "one {device} ({threads} CPU threads, commit {commit})".format_map(at) if at else "no device yet"


def study_steps(arms: Mapping[str, RunConfig], *, scale: str, measure: bool = True) -> pd.DataFrame:
    """Return the step time of each arm, alone on the device, a row per name. measure: measure missing ones now."""
    name = study_file(arms)
    found = measured({name: job("study", configs=arms)}, scale=scale, measure=measure)
    table = rows(found, name).reindex(columns=["arm", "ms", "low_ms", "high_ms", "tokens_per_second", "mfu"])
    table = table.set_index("arm").reindex(list(arms)).astype(float)
    table.attrs["device"] = found[name]["setting"].get("device", "no device yet (`ecmoe bench all --only study`)")
    return table


def rows(found: Found, name: str) -> pd.DataFrame:
    """Return the rows of one result, without the individual samples; empty if not measured."""
    return pd.DataFrame(found[name]["rows"]).drop(columns="samples_ms", errors="ignore")


def layers(found: Found, sizes: Sequence[str]) -> pd.DataFrame:
    """Return the rows of all layers, with size and name. A size that isn't measured is one empty row."""
    gap, tables = dict.fromkeys((*Row._fields, "name", "share_of_floor")), []
    for size in sizes:
        timed = [row | {"name": str(Row(*map(row.get, Row._fields[:4])))} for row in found[layer_file(size)]["rows"]]
        tables.append(pd.DataFrame(timed or [gap]).assign(size=size))
    return pd.concat(tables, ignore_index=True)


def by_layer(layers: pd.DataFrame) -> pd.DataFrame:
    """Return a row per size and layer: time forward, with backward and of routing, the cost of a cap, and memory."""
    columns = {
        "forward, ms": (FORWARD, "ms"), "share of floor": (FORWARD, "share_of_floor"),
        "with backward, ms": (BOTH, "ms"), "its share": (BOTH, "share_of_floor"), "a cap adds": (BOTH, "over_uncapped"),
        "routing, of floor": (ROUTING, "of_forward_floor"), "peak MB": (BOTH, "peak_mb"),
    }  # fmt: skip
    rows = []
    for (size, name), group in layers.dropna(subset=["name"]).groupby(["size", "name"], sort=False):
        of = group.drop_duplicates("what").set_index("what").stack()
        rows.append({"size": size, "layer": name} | {shown: of.get(at) for shown, at in columns.items()})
    return pd.DataFrame(rows, columns=None if rows else ["size", "layer"]).dropna(axis=1, how="all")


def longer(auto: pd.DataFrame) -> str:
    """Return where a run's default path is over 2% slower than plain PyTorch: "compiled, n 512, d 256: 1.84 times"."""
    most = auto[auto["ratio"] > 1.02].groupby(["mode", "n", "d_model"], sort=False)["ratio"].max().items()
    return "; ".join(f"{mode}, n {n:,}, d {d:,}: {ratio:.2f} times" for (mode, n, d), ratio in most) or "nowhere"


def fastest(layers: pd.DataFrame) -> str:
    """Return each size's fastest row of each router, with backward: "small: EC, triton (37%), top-2, grouped_mm (23%)".
    In CUDA graphs only expert choice is timed, so they don't count."""
    both = layers[(layers["what"] == BOTH) & ~layers["layer"].eq("floor") & ~layers["mode"].eq(GRAPH)]
    both = both.dropna(subset=["share_of_floor"]).sort_values("share_of_floor", ascending=False)
    both = both.drop_duplicates(["size", "layer"]).sort_index()
    said = both["name"] + both["share_of_floor"].map(" ({:.0%})".format).astype(str)
    return "; ".join(f"{size}: {', '.join(each)}" for size, each in said.groupby(both["size"], sort=False)) or "nothing"


def absent(found: Found) -> list[str]:
    """Return what could not be measured, why, and for which results: "Liger (not installed) for small"."""
    of: dict[str, dict[str, None]] = {}  # line -> names, each once
    for name, one in found.items():
        for line in one["absent"]:
            of.setdefault(re.sub(r"\(ModuleNotFoundError: .*\)", "(not installed)", line), {})[name] = None
    paths = {name: {row["path"] for row in one.get("rows", ()) if "layer" in row} for name, one in found.items()}
    for path, name in product(sorted(set().union(*paths.values())), filter(paths.get, paths)):
        said = any(line.startswith(f"{path} (") for line in found[name]["absent"])
        if path not in paths[name] and not said:
            of.setdefault(f"{path} (not timed)", {})[name] = None
    return [f"{line} for {', '.join(names)}" for line, names in of.items()]
