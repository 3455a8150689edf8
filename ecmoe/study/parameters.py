"""A notebook's parameters: in which YAML files they stand, how these are merged, and what may stand there."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ecmoe.config import ConfigError
from ecmoe.files import read_yaml

_CONFIGS = Path(__file__).resolve().parents[2] / "configs"


class ParameterError(ValueError):
    """A parameter that the notebook doesn't have, or that can't be what was meant."""


def parameter_files(notebook: str, scale: str, configs: Path | None = None) -> list[Path]:
    """The scale's file, the study's, and the study's at that scale, where it has one; later ones win.

    Args:
        configs: the folder; None: of this checkout.

    Raises:
        ParameterError: no such scale.
    """
    configs = configs or _CONFIGS
    check_scale(scale, configs)
    own = configs / "scale" / scale / f"{notebook}.yaml"
    return [configs / "scale" / f"{scale}.yaml", configs / f"{notebook}.yaml", *[own] * own.exists()]


def check_scale(scale: str, configs: Path | None = None) -> None:
    """Is there such a scale? Where there are no configs, as outside a checkout, nobody knows.

    Raises:
        ParameterError: there are others.
    """
    known = sorted(path.stem for path in ((configs or _CONFIGS) / "scale").glob("*.yaml"))
    if known and scale not in known:
        raise ParameterError(f"scale={scale!r}: must be one of {', '.join(known)}")


def merge_parameters(files: Iterable[str | Path]) -> dict[str, Any]:
    """The parameters of YAML files: later ones win; `base`, a run's keys, is merged key by key.

    Raises:
        ParameterError: a file can't be read, or it or its `base` holds no `key: value` lines.
    """
    merged: dict[str, Any] = {}
    for file in files:
        try:
            values = read_yaml(file, "parameter file") or {}
        except ConfigError as error:
            raise ParameterError(str(error)) from error
        if not isinstance(values, dict):
            raise ParameterError(f"parameter file {str(file)!r} must hold `key: value` lines")
        base = values.get("base") or {}
        if not isinstance(base, dict):
            raise ParameterError(
                f"parameter file {str(file)!r} must hold `key: value` lines below base, but holds {type(base).__name__}"
            )
        merged |= values | ({"base": merged.get("base", {}) | base} if "base" in values else {})
    return merged


def check_parameters(notebook: Any, values: Mapping[str, Any], name: str) -> None:
    """Every key must be in the notebook's parameters cell; a number must not be text (`1e-3`)."""
    known = notebook_parameters(notebook)
    if values and not known:
        raise ParameterError(f"{name} has no cell tagged `parameters`, but is given {list(values)}")
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(known)}"
            raise ParameterError(f"{name} has no parameter {key!r} (given: {value!r}): {hint}")
        default = known[key]
        mixed = isinstance(value, str) or isinstance(value, bool) != isinstance(default, bool)
        if isinstance(default, (int, float)) and mixed:
            raise ParameterError(
                f"{name}: {key}={value!r} must be a {type(default).__name__}; YAML takes 1e-3 "
                "for text (write 1.0e-3) and no for false"
            )


def notebook_parameters(notebook: Any) -> dict[str, Any]:
    """Names in the parameters cell -> their defaults, None where a default is no literal.

    Read by Python's own parser: papermill's misses names whose comment has a `=`, or `int | None`.
    """
    found: dict[str, Any] = {}
    for cell in notebook.cells:
        if "parameters" not in cell.metadata.get("tags", []):
            continue
        for line in ast.parse(cell.source).body:
            targets = line.targets if isinstance(line, ast.Assign) else [getattr(line, "target", None)]
            for target in targets:
                if isinstance(target, ast.Name):
                    try:
                        found[target.id] = ast.literal_eval(line.value)
                    except (ValueError, TypeError):
                        found[target.id] = None
    return found
