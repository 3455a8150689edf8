"""A notebook's parameters: find their YAML files, merge them, and check keys and types."""

import json
import keyword
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from ecmoe import paths
from ecmoe.files import ConfigError, nearest, read_yaml

# Pages whose parameters were checked in this process: their notebooks have defined other names since.
_CHECKED: set[str] = set()
_SCALE = re.compile(r"\w[\w.-]*")  # scales are used in shell commands and as folder names


class Held:
    """Base of dataclasses that `held_to` fills from YAML: unknown keys and numbers that aren't finite are errors."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)


def held_to(kind: Any, value: Any, where: str) -> Any:
    """Convert a value from YAML to a type, such as `dict[str, float]` or a dataclass with `Annotated` bounds, or raise a ConfigError."""
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        key, given = ": ".join(map(str, first["loc"])), first["input"]
        if first["type"] == "unexpected_keyword_argument":
            raise ConfigError(f"{where}: unknown key {key!r}: {nearest(key, kind.__dataclass_fields__)}") from error
        if first["type"] == "missing":
            raise ConfigError(f"{where}: {key} is missing") from error
        raise ConfigError(f"{where}: {f'{key}=' if key else ''}{given!r}: {first['msg']}") from error


def parameter_files(notebook: str, scale: str) -> list[Path]:
    """Return a notebook's YAML files, later ones override: the scale's, the notebook's, its own at that scale. Raises as `check_scale`."""
    configs = paths.configs()
    check_scale(scale)
    own = configs / "scale" / scale / f"{notebook}.yaml"
    return [configs / "scale" / f"{scale}.yaml", configs / f"{notebook}.yaml", *[own] * own.exists()]


def check_scale(scale: str) -> None:
    """Raise a ConfigError for an unknown scale, or for configs without scales or pages, as outside a checkout."""
    found = [path.stem for path in (paths.configs() / "scale").glob("*.yaml")]
    known = sorted(filter(_SCALE.fullmatch, found))
    if not known or not any(paths.configs().glob("[0-9]*.yaml")):
        raise ConfigError(f"{paths.configs()} plans no run: ECMOE_CONFIGS must be the configs/ of a checkout")
    if scale not in known:
        raise ConfigError(f"scale={scale!r}: must be one of {', '.join(known)}")


def merge_parameters(files: Iterable[str | Path]) -> dict[str, Any]:
    """Merge the parameters of YAML files, as `merged`. Raise a ConfigError if a file can't be read or isn't a mapping."""
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
    """Merge `later` over `values`, `base` (keys of RunConfig) key by key. Raise a ConfigError if base, vary or measures isn't a
    mapping, or papermill couldn't write `name = value` into a notebook."""
    for name, value in later.items():  # `a.b = value` would set an attribute
        if not (isinstance(name, str) and name.isidentifier() and not keyword.iskeyword(name)):
            right = "parameters have names that Python allows; keys of runs belong to base, as in base={steps: 3}"
            raise ConfigError(f"{name}={value!r}: {right}")
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            right = "must hold only text, numbers, lists and `key: value` lines; put others, such as dates, in quotes"
            raise ConfigError(f"{name}={value!r} {right} ({error})") from error
    both = {**values, **later}
    for key in ("base", "vary", "measures"):
        if not isinstance(both.get(key) or {}, Mapping):
            raise ConfigError(f"{key}={both[key]!r} must hold `key: value` lines")
    if "base" in both:
        both["base"] = {**(values.get("base") or {}), **(later.get("base") or {})}
    return both


def page_parameters(page: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters of a page: those of its YAML files, overridden by `given`. Raise a ConfigError for an unknown scale, a
    value whose type differs from the file's, such as "false" for false, and, at the first call for a page, an unknown name: at a
    later call, as when a cell is run again, the notebook has defined names of its own.

    given: such as the globals() of the notebook's first cell. Ignored are None, names of IPython or with an underscore in front,
    and unknown names whose values aren't strings, numbers, lists or dicts."""
    names = [name for name in given if not name.startswith("_") and name not in ("In", "Out")]
    given = {name: given[name] for name in names if given[name] is not None}
    values = {"train_missing": True} | merge_parameters(parameter_files(page, given.get("scale", "smoke")))
    check_kinds(page, {"train_missing": values["train_missing"]}, {"train_missing": True})
    ours = {name: value for name, value in given.items() if name in values}
    others = {name: value for name, value in given.items() if isinstance(value, str | int | float | list | dict)}
    kept = " (in an open notebook also restart the kernel: it keeps the wrong name)"
    check_kinds(page, ours if page in _CHECKED else others | ours, values, kept)
    _CHECKED.add(page)
    return merged(values, ours)


def check_kinds(where: str, given: Mapping[str, Any], known: Mapping[str, Any], hint: str = "") -> None:
    """Raise a ConfigError for a name that isn't in `known` (ending in `hint`), or a value of another type. None fits any type."""
    for name, value in given.items():
        if name not in known:
            near = nearest(name, known, f"it has {', '.join(known)}")
            raise ConfigError(f"{where} has no parameter {name!r} (given: {value!r}): {near}{hint}")
        usual = known[name]
        if isinstance(usual, Mapping):
            like, must = Mapping, "`key: value` lines"
        elif isinstance(usual, list | tuple):  # a mapping fits too: `arms` is a list of names, or name -> keys
            like, must = Mapping | list | tuple, f"a list, such as {list(usual)[:3]}"
        else:
            like = int | float if isinstance(usual, int | float) else type(usual)
            wrong = "YAML reads 1e-3 as text (write 1.0e-3), no as false, and 'false' as text; papermill's -p reads false as text (write False)"
            must = f"a {type(usual).__name__}; {wrong}"
        fits = isinstance(value, like) and isinstance(value, bool) == isinstance(usual, bool)
        if not fits and usual is not None and value is not None:
            raise ConfigError(f"{where}: {name}={value!r} must be {must}")
