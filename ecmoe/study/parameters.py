"""A notebook's parameters: in which YAML files they stand, how these are merged, and what may stand there."""

import ast
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from ecmoe import paths
from ecmoe.files import ConfigError, nearest, read_yaml

PLANNED = ("scale", "base", "seeds", "arms", "vary", "measures", "train_missing")  # what a plan is made of
_SCALE = re.compile(r"\w[\w.-]*")  # it stands in commands, and names a folder


class Held:
    """A dataclass that `held_to` fills from YAML: no other keys, and no number that isn't finite."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)


def held_to(kind: Any, value: Any, where: str) -> Any:
    """What YAML says, as a type, such as `dict[str, float]` or a dataclass with `Annotated` bounds; or a ConfigError."""
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        key, given = ": ".join(map(str, first["loc"])), first["input"]
        if first["type"] == "unexpected_keyword_argument":
            raise ConfigError(f"{where}: unknown key {key!r}: {nearest(key, kind.__dataclass_fields__)}") from error
        if first["type"] in ("missing", "missing_argument"):
            raise ConfigError(f"{where}: {key} is missing") from error
        raise ConfigError(f"{where}: {f'{key}=' if key else ''}{given!r}: {first['msg']}") from error


def parameter_files(notebook: str, scale: str) -> list[Path]:
    """The scale's file, the study's, and the study's at that scale, where it has one; later ones win. A ConfigError: as in `check_scale`."""
    configs = paths.configs()
    check_scale(scale)
    own = configs / "scale" / scale / f"{notebook}.yaml"
    return [configs / "scale" / f"{scale}.yaml", configs / f"{notebook}.yaml", *[own] * own.exists()]


def check_scale(scale: str) -> None:
    """Is there such a scale? Where there are no configs, as outside a checkout, any name will do. A ConfigError, where there are others."""
    found = [path.stem for path in (paths.configs() / "scale").glob("*.yaml")]
    known = sorted(name for name in found if _SCALE.fullmatch(name))
    if not isinstance(scale, str) or not (scale in known if known else _SCALE.fullmatch(scale)):
        raise ConfigError(f"scale={scale!r}: must be one of {', '.join(known) or 'letters and digits, such as smoke'}")


def merge_parameters(files: Iterable[str | Path]) -> dict[str, Any]:
    """The parameters of YAML files: later ones win; `base`, a run's keys, is merged key by key.

    Raises:
        ConfigError: a file can't be read, or it or its `base` holds no `key: value` lines.
    """
    found: dict[str, Any] = {}
    for file in files:
        values = read_yaml(file, "parameter file") or {}
        if not isinstance(values, dict):
            raise ConfigError(f"parameter file {str(file)!r} must hold `key: value` lines")
        try:
            found = merged(found, values)
        except ConfigError as error:
            raise ConfigError(f"parameter file {str(file)!r}: {error}") from error
    return found


def merged(values: Mapping[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    """Both, the later ones winning; `base`, a run's keys, key by key. A ConfigError, where something else stands below a key."""
    both = {**values, **later}
    for key in ("base", "vary", "measures"):
        if not isinstance(both.get(key) or {}, Mapping):
            raise ConfigError(f"{key}={both[key]!r} must hold `key: value` lines")
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
        ConfigError: an unknown scale or name; a value of another type than the files have, such as "false" for false.
    """
    names = [name for name in given if not (name[0] == "_" or name.isupper() or name in ("In", "Out"))]
    given = {name: given[name] for name in names if isinstance(given[name], str | int | float | list | dict)}
    scale = given.get("scale", "smoke")
    values = {"train_missing": True} | merge_parameters(parameter_files(page, scale))
    ours = {name: value for name, value in given.items() if name in values}
    check_kinds(page, given if unknown else ours, values)
    return merged(values, ours)


def check_parameters(notebook: Any, values: Mapping[str, Any], name: str) -> None:
    """Every key must be in the notebook's parameters cell, or be read by it from its page's YAML; with a value of the same kind."""
    known = notebook_parameters(notebook)
    if values and not known:
        raise ConfigError(f"{name} has no cell tagged `parameters`, but is given {list(values)}")
    page = Path(name).stem
    if (paths.configs() / f"{page}.yaml").exists() and "scale" in values:
        usual = merge_parameters(parameter_files(page, values["scale"]))
        code = "\n".join(cell.source for cell in notebook.cells)
        known = {key: usual[key] for key in usual if key in PLANNED or f'"{key}"' in code} | known
    check_kinds(name, values, known)


def check_kinds(where: str, given: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """A name must be known, and its value of the usual one's kind; None stands for anything."""
    for name, value in given.items():
        if name not in known:
            near = nearest(name, known, f"it has {', '.join(known)}")
            raise ConfigError(f"{where} has no parameter {name!r} (given: {value!r}): {near}")
        usual = known[name]
        if usual is None or value is None:
            continue
        if isinstance(usual, Mapping):
            fits, must = isinstance(value, Mapping), "`key: value` lines"
        elif isinstance(usual, list | tuple):  # arms are names, or name -> keys
            fits, must = isinstance(value, Mapping | list | tuple), f"a list, such as {list(usual)[:3]}"
        else:
            like = (int, float) if isinstance(usual, int | float) else type(usual)
            fits = isinstance(value, like) and isinstance(value, bool) == isinstance(usual, bool)
            wrong = "YAML takes 1e-3 for text (write 1.0e-3), no for false and 'false' for text; papermill's -p, too, false (write False)"
            must = f"a {type(usual).__name__}; {wrong}"
        if not fits:
            raise ConfigError(f"{where}: {name}={value!r} must be {must}")


def notebook_parameters(notebook: Any) -> dict[str, Any]:
    """Names in the parameters cell -> their defaults, None where a default is no literal.

    Read by Python's own parser: papermill's misses names whose comment has a `=`, or `int | None`.
    """
    found: dict[str, Any] = {}
    tagged = [cell.source for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    for line in (line for source in tagged for line in ast.parse(source).body):
        for target in line.targets if isinstance(line, ast.Assign) else [getattr(line, "target", None)]:
            if isinstance(target, ast.Name):
                try:
                    found[target.id] = ast.literal_eval(line.value)
                except (ValueError, TypeError):
                    found[target.id] = None
    return found
