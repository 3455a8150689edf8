"""plan: list every run and measurement that the pages of a scale need, from YAML alone.

    configs/arms.yaml                      name of an arm -> the RunConfig keys in which it differs from the base
    configs/<page>.yaml, configs/scale/... what a page needs: `arms`, `seeds`, `base`, `vary`, `measures`

No notebook is run and torch isn't imported. engine.py carries the plan out, load.py reads the results.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache, cached_property
from itertools import chain, product
from pathlib import Path
from typing import Any

from ecmoe import paths
from ecmoe.config import ConfigError, RunConfig
from ecmoe.continual import ContinualConfig
from ecmoe.files import check_known, read_yaml
from ecmoe.measures import MEASURES, Measurement, measurements
from ecmoe.study.parameters import check_scale, held_to, merge_parameters, merged, parameter_files

Keys = Mapping[str, Any]
# Keys that an arm may give as a fraction of the base's value -> multiple to round up to; 1: the result must be an integer.
SHARES = {"steps": 1, "warmup_steps": 1, "batch_size": 1, "d_ff": 8}


@dataclass(frozen=True)
class Planned:
    """A run of the plan: the pages that need it, the arm's names on these pages, and the measurements to make."""

    name: str  # of the run and its record: slug and digest
    config: RunConfig
    pages: tuple[str, ...]
    arms: tuple[str, ...]
    seed: int
    measures: tuple[Measurement, ...] = ()

    @cached_property
    def of_all_seeds(self) -> str:
        """A name that all seeds of the arm share: the run's name with seed 0."""
        return self.config.replace(seed=0).name

    def __or__(self, other: "Planned") -> "Planned":
        """Merge two plans of the same run, made by two pages or under two names."""
        pages, arms = (tuple(dict.fromkeys(x)) for x in (self.pages + other.pages, self.arms + other.arms))
        measures = {how.name: how for how in self.measures + other.measures}
        return replace(self, pages=pages, arms=arms, measures=tuple(measures.values()))

    @property
    def folder(self) -> Path:
        """The folder of the run's own files, if it was trained on this machine."""
        return paths.runs() / self.name


def plan(scale: str, asked: Sequence[str] = ()) -> list[Planned]:
    """Return the runs that the `asked` pages (default: all) need, each once, in the order of configs/order.yaml, seed by seed.
    Raise a ConfigError that names page and arm if anything there is unknown or invalid."""
    planned, wrong = sound(scale, asked)
    for error in wrong.values():
        raise error
    return planned


def sound(scale: str, asked: Sequence[str] = ()) -> tuple[list[Planned], dict[str, Exception]]:
    """Return the plan of all valid pages, and page -> error for the invalid ones, so that one bad page doesn't stop the others."""
    known, file = pages(scale), paths.configs() / "order.yaml"
    found: dict[str, Planned] = {}
    wrong: dict[str, Exception] = {}
    check_known("no page", asked, known)
    for page in asked or known:
        try:
            for one in of_page(page, scale):
                found[one.name] = found.get(one.name, one) | one
        except (ConfigError, OSError) as error:
            wrong[page] = error
    blocks = [[page] for page in known]
    if file.exists():
        first = held_to(list[list[str]], read_yaml(file, "order of runs") or [], "order.yaml")
        check_known("order.yaml: there is no page or arm", chain(*first), [*known, *named_arms()], "leave it out")
        blocks = first + blocks

    def place(one: Planned) -> tuple[int, int]:
        return next(i for i, block in enumerate(blocks) if not {*one.pages, *one.arms}.isdisjoint(block)), one.seed

    return sorted(found.values(), key=place), wrong


def pages(scale: str) -> list[str]:
    """Return the names of the pages that have a config, in order."""
    check_scale(scale)
    return sorted(path.stem for path in paths.configs().glob("[0-9]*.yaml"))


def of_page(page: str, scale: str, changes: Keys | None = None) -> list[Planned]:
    """Return the runs of a page, seed by seed, so that an interrupted study has complete pairs. changes: override the YAML files."""
    try:
        values = merged(merge_parameters(parameter_files(page, scale)), changes or {})
        if "base" not in values:
            raise ConfigError(f"base: configs/scale/{scale}.yaml must hold it, the keys of the scale's runs")
        if (seeds := values.get("seeds")) is not None:
            _check_list("seeds", seeds, int)
        for key, listed in (values.get("vary") or {}).items():
            _check_list(f"vary: {key}", listed)
        arms = arms_of(values)
        wanted = _measures(values.get("measures") or {}, list(arms), seeds or ())
        made = [(arm, config_of(arm, {**values["base"], **arms[arm]}, seed)) for seed in seeds or () for arm in arms]
    except ConfigError as error:
        raise ConfigError(f"page {page!r}: {error}") from error
    return [Planned(one.name, one, (page,), (arm,), one.seed, wanted.get((arm, one.seed), ())) for arm, one in made]


def by_arm(
    page: str, scale: str, planned: Sequence[Planned], arms: Sequence[str] | None = None
) -> dict[str, dict[int, Planned]]:
    """Return arm -> seed -> planned run for the arms of a page, with every seed that any page plans. planned: the plan of the scale.
    arms: names of the arms, configured with the page's base; None: the page's own."""
    # A claim about timings alone has no arms, which a page's YAML says by None.
    others = {} if arms is None else {"arms": arms or None, "vary": {}}
    names = {one.arms[0]: one.name for one in of_page(page, scale, {"seeds": [0], "measures": {}, **others})}
    return {arm: {one.seed: one for one in planned if one.of_all_seeds == name} for arm, name in names.items()}


def _check_list(name: str, value: Any, of: type = object) -> None:
    """Raise a ConfigError if the value isn't a list of distinct items of this type, or is empty. `arms` may be a mapping."""
    if not isinstance(value, list | tuple) and not (name == "arms" and isinstance(value, Mapping)):
        raise ConfigError(f"{name}={value!r} must be a list, such as [{value!r}]")
    if not value:
        raise ConfigError(f"{name}={value!r} must name at least one")
    for item in value:
        if not isinstance(item, of) or isinstance(item, bool) and of is int:
            items = "whole numbers" if of is int else "names"
            raise ConfigError(f"{name}={value!r} must be a list of {items}, not of {item!r}")
        if list(value).count(item) > 1:  # a repeated seed would count twice
            raise ConfigError(f"{name}={value!r} holds {item!r} twice: remove one")


def arms_of(values: Keys) -> dict[str, Keys]:
    """Return arm -> RunConfig keys for a page, one arm for each combination of the values in `vary`.

    `arms` is a list of names, or a mapping name -> keys that defines new arms (no keys: the arm of that name)."""
    asked, vary, found = values.get("arms"), values.get("vary") or {}, {}
    if asked is not None:
        _check_list("arms", asked, str)
    for name, keys in (asked if isinstance(asked, Mapping) else dict.fromkeys(asked or ())).items():
        if keys is not None and not isinstance(keys, Mapping):
            raise ConfigError(f"arm {name!r} must hold `key: value` lines, but holds {keys!r}")
        keys = arm_keys(name, values["base"]) if keys is None else keys
        for chosen in product(*vary.values()):
            varied = dict(zip(vary, chosen, strict=True))
            words = (f", {key.replace('_', ' ')} {value}" for key, value in varied.items())
            found[name + "".join(words)] = {**keys, **varied}
    return found


def named_arms() -> dict[str, dict[str, Any]]:
    """Return name -> keys of all arms in configs/arms.yaml."""
    return _arms_of(paths.configs() / "arms.yaml")


@cache
def _arms_of(path: Path) -> dict[str, dict[str, Any]]:
    return held_to(dict[str, dict[str, Any]], read_yaml(path, "arms"), str(path))


def arm_keys(name: str, base: Keys) -> dict[str, Any]:
    """Return the RunConfig keys of a named arm, without its seed: `base`, overridden by the arm. Raise a ConfigError for an
    unknown name, or a fraction that gives no integer."""
    check_known("there is no arm", [name], named_arms(), "configs/arms.yaml names them all")
    return {**base, **{key: _share(name, key, value, base) for key, value in named_arms()[name].items()}}


def _share(name: str, key: str, value: Any, base: Keys) -> Any:
    """Resolve a fraction such as "1/2" to that share of the base's value; return any other value unchanged."""
    if not isinstance(value, str) or key not in SHARES:
        return value
    whole = base.get(key, getattr(RunConfig, key))
    if not isinstance(whole, int):
        raise ConfigError(f"base: {key}={whole!r} must be a whole number: arm {name!r} has {value} of it")
    try:
        share = whole * Fraction(value)
    except (ValueError, ZeroDivisionError) as error:
        raise ConfigError(f"arm {name!r}: {key}={value!r} must be a number, or a share such as 1/2") from error
    multiple = SHARES[key]
    if multiple == 1 and share.denominator != 1:
        raise ConfigError(f"arm {name!r}: {value} of the scale's {key} is {float(share):g}, which is no whole number")
    return math.ceil(share / multiple) * multiple


def config_class(keys: Keys) -> type[RunConfig]:
    """Return the class of the config that has these keys."""
    return ContinualConfig if "approach" in keys else RunConfig


def config_of(arm: str, keys: Keys, seed: int) -> RunConfig:
    """Return an arm's config. Raise a ConfigError that names the arm if it is invalid."""
    try:
        if "seed" in keys:
            raise ConfigError(f"seed={keys['seed']!r} can't be set by an arm: list it in `seeds`, for all arms")
        return config_class(keys).from_dict({**keys, "seed": seed})
    except ConfigError as error:
        raise ConfigError(f"arm {arm!r}: {error}") from error


def _measures(asked: Any, arms: list[str], seeds: Sequence[int]) -> dict[tuple[str, int], tuple[Measurement, ...]]:
    """Return (arm, seed) -> measurements: on all arms and seeds of the page, unless a measurement has its own `arms` or `seeds`."""
    wanted: dict[tuple[str, int], tuple[Measurement, ...]] = {}
    for what, keys in asked.items():
        if not isinstance(keys or {}, Mapping):
            raise ConfigError(f"measures: {what}={keys!r} must hold `key: value` lines, or nothing")
        keys = dict(keys or {})
        of_arms, of_seeds = keys.pop("arms", arms), keys.pop("seeds", seeds)
        _check_list(f"measures: {what}: arms", of_arms, str)
        if of_seeds is not seeds:  # a page without seeds plans no run, so it measures none
            _check_list(f"measures: {what}: seeds", of_seeds, int)
        check_known(f"measurement {what!r} names arm", of_arms, arms)
        for how in measurements(what, keys):
            for key, value in how.keys.items():
                held_to(MEASURES[what].keys[key], value, f"measurement {what!r}: {key}={value!r}")
            for arm, seed in product(of_arms, of_seeds):
                wanted[arm, seed] = (*wanted.get((arm, seed), ()), how)
    return wanted


def record(one: Planned, scale: str) -> Path:
    """Return the path of the run's record, which exists once the run has ended."""
    return paths.results(scale, "runs") / f"{one.name}.json"
