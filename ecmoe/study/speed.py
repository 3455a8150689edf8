"""What takes how long: layers, training steps, growth and a profile for 08_step_time, and the steps of a study's arms; each
measured once on one machine, kept as JSON, and read without torch.

A time belongs to the machine that took it. At scale gpu measurements are taken on a GPU only, and committed, so that
the page can be drawn anywhere; at smoke they are ratios on a CPU. `ecmoe bench all` takes them without a notebook.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import pandas as pd

from ecmoe import paths
from ecmoe.bench.rows import BOTH, FORWARD, ROUTING, Row, label
from ecmoe.config import RunConfig
from ecmoe.files import read_json
from ecmoe.study import estimate
from ecmoe.study.estimate import Estimate, Unit
from ecmoe.study.parameters import merge_parameters, parameter_files
from ecmoe.study.plan import arms_of, configs

STUDY, SPEED = "01_convergence", "08_step_time"  # the first has claims about seconds, too
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
    usual = {"compiled": compiled, "repeats": repeats}
    found = {layer_file(name): _job("layer:bench_layer", **usual | keys) for name, keys in layer_sizes.items()}
    if auto_sizes:
        found["auto"] = _job("layer:bench_auto", auto_sizes, **usual)
    if study_arms:
        found[study_file(study_arms)] = _job("step:bench_study", study_arms)
    return found | {
        "step": _job("step:bench_step", **usual | step_sizes),
        "step-bf16": _job("step:bench_step", narrow=True, **usual | step_sizes),
        "growth": _job("growth:bench_growth", growth_from, growth_axes, repeats=repeats),
        "profile": _job("profile:bench_profile", compiled=compiled, **step_sizes),
    }


def _job(what: str, *arguments: Any, **keys: Any) -> Job:
    module, _, function = what.partition(":")
    return lambda: getattr(import_module(f"ecmoe.bench.{module}"), function)(*arguments, **keys)


def plan(scale: str) -> dict[str, Any]:
    """Arguments of `jobs` at a scale: the parameters of 08_step_time, as the notebook gets them, and of the study.

    Raises:
        ParameterError: no such scale; or this is no checkout, which has the configs.
    """
    return {"step_sizes": {}} | merge_parameters(parameter_files(SPEED, scale)) | {"study_arms": study_arms(scale)}


def scaling(scale: str) -> dict[str, Any]:
    """Arguments of `bench_scaling` at a scale: `scaling` of 08_step_time, whose `base` wins over that of the scale."""
    values = merge_parameters(parameter_files(SPEED, scale))
    return values["scaling"] | {"base": values["base"] | values["scaling"].get("base", {})}


def folder(scale: str) -> Path:
    """Where the engine keeps what was timed at a scale."""
    return paths.records(scale).with_name("bench")


def files(scale: str) -> list[Path]:
    """Where all that pages of a scale want timed is kept, once it is there."""
    return [folder(scale) / f"{name}.json" for name in jobs(**plan(scale))]


def layer_file(size: str) -> str:
    """The name of a layer's file."""
    return "layer-" + "".join(letter if letter.isalnum() else "-" for letter in size.lower())


def study_arms(scale: str) -> dict[str, RunConfig]:
    """The arms whose steps are timed side by side: name -> config of a seed."""
    study = merge_parameters(parameter_files(STUDY, scale))
    made = configs(study["base"], arms_of(study, scale), study["seeds"][:1])
    return {arm: by_seed[0] for arm, by_seed in made.items()}


def study_file(arms: Mapping[str, RunConfig]) -> str:
    """The name of the file of a study's steps: other arms, or arms of other keys, are measured anew, side by side."""
    names = ",".join(f"{arm} {config.replace(seed=0).name}" for arm, config in arms.items())
    return f"study-{hashlib.sha256(names.encode()).hexdigest()[:8]}"


def take(
    wanted: Mapping[str, Job], into: Path, *, force: bool = False
) -> Iterator[tuple[str, pd.DataFrame | Exception | None]]:
    """Measure job after job, and keep each at once: name and table; None: it is there already; or what went wrong."""
    from ecmoe.bench import clock

    for name, job in wanted.items():
        path, outcome = into / f"{name}.json", None
        if force or not path.exists():
            try:
                outcome = job()
                clock.save(outcome, path)
            except Exception as error:  # the others are still wanted
                outcome = error
        yield name, outcome


def measured(wanted: Mapping[str, Job], *, scale: str, measure: bool = True) -> dict[str, dict[str, Any] | None]:
    """Each job's rows and attributes, measured now where it is missing and this machine may; else None.

    What is measured here lies in runs/bench; only the engine's `ecmoe bench all` writes to reports.
    """
    places = folder(scale), paths.runs() / "bench" / scale
    kept = {name: [place / f"{name}.json" for place in places] for name in wanted}
    missing = {name: job for name, job in wanted.items() if not any(path.exists() for path in kept[name])}
    if measure and missing and (scale == "smoke" or import_module("torch").cuda.is_available()):
        for _, outcome in take(missing, places[1]):
            if isinstance(outcome, Exception):
                raise outcome
    return {name: next((read_json(p) for p in found if p.exists()), None) for name, found in kept.items()}


# As verdicts and page 01 read it


def step_ratio(scale: str, arm: str, other: str, routing: str = "even") -> Estimate:
    """Time of a step of `arm` over one of `other`, each on its best path, turn by turn.

    Args:
        routing: of token choice, whose rows are taken both "even" and by its "own" router.
    """

    def best(name: str) -> list[float]:
        of_arm = [row for row in _kept(scale, "step").get("rows", []) if row["arm"] == name]
        asked = [row for row in of_arm if row["routing"] == routing] or of_arm
        return min(asked, key=lambda row: row["ms"]).get("samples_ms", []) if asked else []

    pairs = zip(best(arm), best(other), strict=False)
    return estimate.of_values((x / y for x, y in pairs), Unit.RATIO, "turn")


def setting(scale: str) -> tuple[str, str]:
    """Of the steps of `step_ratio`: the models' size in words, and the device."""
    found = _kept(scale, "step").get("setting", {})
    size = "{layers} layers of width {d_model}, {num_experts} experts".format_map(found) if found else "one model"
    return size, found.get("device", "an unknown device")


def step_times(scale: str, arm: str, other: str) -> float:
    """A step of an arm of the study over one of another, each alone on one device; NaN where that isn't measured."""
    ms = {row["arm"]: row["ms"] for row in _kept(scale, study_file(study_arms(scale))).get("rows", [])}
    return ms[arm] / ms[other] if arm in ms and other in ms else math.nan


def _kept(scale: str, name: str) -> dict[str, Any]:
    path = folder(scale) / f"{name}.json"
    return read_json(path) if path.exists() else {}


def study_steps(arms: Mapping[str, RunConfig], *, scale: str, measure: bool = True) -> pd.DataFrame:
    """What a training step of each arm takes, alone on the device: a row per arm, by its name, as `bench_study` has them.

    Args:
        measure: now, where it is missing and this machine may.
    """
    name = study_file(arms)
    found = measured({name: _job("step:bench_study", arms)}, scale=scale, measure=measure)
    table = rows(found, name).reindex(columns=["arm", "ms", "low_ms", "high_ms", "tokens_per_second", "mfu"])
    table = table.set_index("arm").reindex(list(arms)).astype(float)
    setting = (found[name] or {}).get("setting", {})
    table.attrs["device"] = setting.get("device", "no device yet (`ecmoe bench all --only study`)")
    return table


# As page 08 shows it


def rows(found: Found, name: str) -> pd.DataFrame:
    """The rows of one file, without the single samples; none if it isn't measured."""
    return pd.DataFrame((found[name] or {"rows": []})["rows"]).drop(columns="samples_ms", errors="ignore")


def layers(found: Found, sizes: Sequence[str]) -> pd.DataFrame:
    """The rows of all layers, with their size and their name. A size that isn't measured is one empty row."""
    tables = []
    for size in sizes:
        one = found[layer_file(size)]
        table = pd.DataFrame(one["rows"] if one else [dict.fromkeys(Row._fields)]).assign(size=size)
        parts = table[[*Row._fields[:4]]].itertuples(index=False)
        tables.append(table.assign(name=[label(*row) if one else None for row in parts]))
    return pd.concat(tables, ignore_index=True)


def by_layer(layers: pd.DataFrame) -> pd.DataFrame:
    """A row per size and layer, as a table shows them: forward, with backward, routing, what a cap adds, memory."""
    columns = {
        "forward, ms": (FORWARD, "ms"), "share of floor": (FORWARD, "share_of_floor"),
        "with backward, ms": (BOTH, "ms"), "its share": (BOTH, "share_of_floor"), "a cap adds": (BOTH, "over_uncapped"),
        "routing, of floor": (ROUTING, "of_forward_floor"), "peak MB": (BOTH, "peak_mb"),
    }  # fmt: skip
    rows = []
    for (size, name), group in layers.dropna(subset=["name"]).groupby(["size", "name"], sort=False):
        of = group.drop_duplicates("what").set_index("what").reindex([FORWARD, BOTH, ROUTING])
        of = of.reindex(columns=list(dict.fromkeys(column for _, column in columns.values())))
        rows.append({"size": size, "layer": name} | {shown: of.loc[at] for shown, at in columns.items()})
    return pd.DataFrame(rows, columns=None if rows else ["size", "layer"]).dropna(axis=1, how="all")


def agreement(found: Found, sizes: Sequence[str]) -> pd.DataFrame:
    """How far each path is from the plain one in float32, and whether it gives the same bits, at each size."""
    rows = [{"size": size} | row for size in sizes for row in (found[layer_file(size)] or {}).get("agreement", [])]
    return pd.DataFrame(rows, columns=None if rows else ["size", "path", "same_bits"])


def absent(found: Found) -> list[str]:
    """What could not be measured, and why."""
    return list(dict.fromkeys(line for one in found.values() for line in (one or {}).get("absent", [])))
