"""A notebook's parameters: in which YAML files they stand, how these are merged, and what may stand there."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ecmoe import paths
from ecmoe.files import ConfigError, read_yaml

PLANNED = ("scale", "base", "seeds", "arms", "vary", "measures", "train_missing")  # what a plan is made of


class ParameterError(ValueError):
    """A parameter that the notebook doesn't have, or that can't be what was meant."""


def parameter_files(notebook: str, scale: str, configs: Path | None = None) -> list[Path]:
    """The scale's file, the study's, and the study's at that scale, where it has one; later ones win.

    Args:
        configs: the folder; None: of this checkout.

    Raises:
        ParameterError: no such scale.
    """
    configs = configs or paths.configs()
    check_scale(scale, configs)
    own = configs / "scale" / scale / f"{notebook}.yaml"
    return [configs / "scale" / f"{scale}.yaml", configs / f"{notebook}.yaml", *[own] * own.exists()]


def check_scale(scale: str, configs: Path | None = None) -> None:
    """Is there such a scale? Where there are no configs, as outside a checkout, nobody knows.

    Raises:
        ParameterError: there are others.
    """
    known = sorted(path.stem for path in ((configs or paths.configs()) / "scale").glob("*.yaml"))
    if known and (not isinstance(scale, str) or scale not in known):
        raise ParameterError(f"scale={scale!r}: must be one of {', '.join(known)}")


def merge_parameters(files: Iterable[str | Path]) -> dict[str, Any]:
    """The parameters of YAML files: later ones win; `base`, a run's keys, is merged key by key.

    Raises:
        ParameterError: a file can't be read, or it or its `base` holds no `key: value` lines.
    """
    found: dict[str, Any] = {}
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
        found = merged(found, values)
    return found


def merged(values: Mapping[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    """Both, the later ones winning; `base`, a run's keys, key by key."""
    both = {**values, **later}
    if "base" in both:
        both["base"] = {**(values.get("base") or {}), **(later.get("base") or {})}
    return both


def page_parameters(page: str, given: Mapping[str, Any], *, unknown: bool = True) -> dict[str, Any]:
    """The parameters of a page: those of its scale's files, and what is given on top, checked before any work.

    Args:
        given: such as the globals() of the notebook's first cell. None means: as the files have it. What is no data, or
            has the name of a constant or an underscore in front, is none of ours.
        unknown: is a name that the page doesn't have an error? Not where the rest of a notebook has run already.

    Raises:
        ParameterError: an unknown scale or name; a value of another type than the files have, such as "false" for false.
    """
    given = {name: value for name, value in given.items() if value is not None and _is_data(name, value)}
    scale = given.get("scale", "smoke")
    check_scale(scale)
    values = {"train_missing": True} | merge_parameters(parameter_files(page, scale))
    for name, value in given.items():
        if name in values:
            _check_type(f"{page}: {name}", value, values[name])
        elif unknown:
            raise ParameterError(f"{page} has no parameter {name!r} (given: {value!r}): {_near(name, values)}")
    return merged(values, {name: value for name, value in given.items() if name in values})


def check_parameters(notebook: Any, values: Mapping[str, Any], name: str) -> None:
    """Every key must be in the notebook's parameters cell, or be read by it from its page's YAML; with a value of the same kind."""
    known = notebook_parameters(notebook)
    if values and not known:
        raise ParameterError(f"{name} has no cell tagged `parameters`, but is given {list(values)}")
    page = Path(name).stem
    if (paths.configs() / f"{page}.yaml").exists() and "scale" in values:
        usual = merge_parameters(parameter_files(page, values["scale"]))
        code = "\n".join(cell.source for cell in notebook.cells)
        known = {key: usual[key] for key in usual if key in PLANNED or f'"{key}"' in code} | known
    for key, value in values.items():
        if key not in known:
            raise ParameterError(f"{name} has no parameter {key!r} (given: {value!r}): {_near(key, known)}")
        _check_type(f"{name}: {key}", value, known[key])


def _check_type(name: str, value: Any, usual: Any) -> None:
    if usual is None or value is None:
        return
    if isinstance(usual, Mapping) or isinstance(usual, (list, tuple)):
        # Arms are names, or name -> keys.
        if (
            not isinstance(value, (Mapping, list, tuple))
            or isinstance(usual, Mapping)
            and not isinstance(value, Mapping)
        ):
            kind = "`key: value` lines" if isinstance(usual, Mapping) else f"a list, such as {list(usual)[:3]}"
            raise ParameterError(f"{name}={value!r} must be {kind}")
    elif isinstance(value, bool) != isinstance(usual, bool) or not isinstance(
        value, (int, float) if isinstance(usual, (int, float)) else type(usual)
    ):
        raise ParameterError(
            f"{name}={value!r} must be a {type(usual).__name__}; YAML takes 1e-3 for text (write 1.0e-3), no for false "
            "and 'false' for text"
        )


def _is_data(name: str, value: Any) -> bool:
    plain = isinstance(value, (str, int, float, list, dict)) or value is None
    return plain and not name.startswith("_") and not name.isupper() and name not in ("In", "Out")


def _near(name: Any, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f"did you mean {near[0]}?" if near else f"it has {', '.join(known)}"


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
