"""Times of training steps that were measured (speed.py takes them), as verdicts need them; read without torch."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ecmoe import paths
from ecmoe.config import RunConfig
from ecmoe.files import read_json
from ecmoe.study import estimate
from ecmoe.study.estimate import Estimate, Unit
from ecmoe.study.parameters import merge_parameters, parameter_files
from ecmoe.study.plan import arms_of, configs

STUDY = "01_convergence"  # whose claims are about seconds, too


SPEED = "08_step_time"


def folder(scale: str) -> Path:
    """Where the engine keeps what was timed at a scale."""
    return paths.root() / "reports" / scale / "bench"


def files(scale: str) -> list[Path]:
    """Where all that pages of a scale want timed is kept, once it is there: `speed.jobs` takes each."""
    wanted = merge_parameters(parameter_files(SPEED, scale))
    names = [layer_file(size) for size in wanted["layer_sizes"]] + ["auto"] * bool(wanted.get("auto_sizes"))
    names += [study_file(study_arms(scale)), "step", "step-bf16", "growth", "profile"]
    return [folder(scale) / f"{name}.json" for name in names]


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


def step_ratio(scale: str, arm: str, other: str, routing: str = "even") -> Estimate:
    """Time of a step of `arm` over one of `other`, each on its best path, turn by turn.

    Args:
        routing: of token choice, whose rows are taken both "even" and by its "own" router.
    """
    rows = _rows(folder(scale) / "step.json")
    a, b = (_best([row for row in rows if row["arm"] == name], routing) for name in (arm, other))
    return estimate.of_values((x / y for x, y in zip(a, b, strict=False)), Unit.RATIO, "turn")


def setting(scale: str) -> tuple[str, str]:
    """Of the steps of `step_ratio`: the models' size in words, and the device."""
    path = folder(scale) / "step.json"
    found = read_json(path).get("setting", {}) if path.exists() else {}
    keys = ("layers", "d_model", "num_experts")
    size = (
        "{} layers of width {}, {} experts".format(*(found[key] for key in keys))
        if set(keys) <= set(found)
        else "one model"
    )
    return size, found.get("device", "an unknown device")


def step_times(scale: str, arm: str, other: str) -> float:
    """A step of an arm of the study over one of another, each alone on one device; NaN where that isn't measured."""
    ms = {row["arm"]: row["ms"] for row in _rows(folder(scale) / f"{study_file(study_arms(scale))}.json")}
    return ms[arm] / ms[other] if arm in ms and other in ms else math.nan


def _rows(path: Path) -> list[dict[str, Any]]:
    return read_json(path)["rows"] if path.exists() else []


def _best(rows: list[dict[str, Any]], routing: str) -> list[float]:
    """Samples of the fastest row, of those with that routing where there are any."""
    asked = [row for row in rows if row["routing"] == routing] or rows
    return min(asked, key=lambda row: row["ms"]).get("samples_ms", []) if asked else []
