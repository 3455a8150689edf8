"""plan: every run and measurement that a scale's pages rest on, from YAML alone.

    configs/arms.yaml                      name of an arm -> the keys of RunConfig in which it differs
    configs/scale/<scale>/arms.yaml        the same, where a scale needs other values
    configs/<page>.yaml, configs/scale/... what a page rests on: `arms`, `seeds`, `base`, `vary`, `measures`

No notebook is run and no torch is imported. engine.py carries the plan out, load.py reads what is there.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cache, cached_property
from itertools import chain, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ecmoe import paths
from ecmoe.config import ConfigError, RunConfig
from ecmoe.continual import ContinualConfig
from ecmoe.files import Damaged, check_known, read_yaml
from ecmoe.measures import MEASURES, Measurement, measurements
from ecmoe.study.parameters import check_scale, held_to, merge_parameters, merged, parameter_files

if TYPE_CHECKING:
    from ecmoe.training.result import Result

Keys = Mapping[str, Any]
LISTED = "configs/arms.yaml names them all"
# Keys that may be a share of the base's, and of what the result is a multiple; None: it must come out whole.
SHARES = {"steps": None, "warmup_steps": None, "batch_size": None, "d_ff": 8}


@dataclass(frozen=True)
class Planned:
    """A run of the plan: who wants it, under which names, and what is to be measured on it."""

    name: str  # of run and record: slug and digest
    config: RunConfig
    pages: tuple[str, ...]
    arms: tuple[str, ...]
    seed: int
    measures: tuple[Measurement, ...] = field(default=())

    @cached_property
    def of_all_seeds(self) -> str:
        """The name that every seed of an arm shares."""
        return self.config.replace(seed=0).name


def plan(scale: str, asked: Sequence[str] = ()) -> list[Planned]:
    """What the pages of a scale rest on, or those asked for: each run once, in the order of configs/order.yaml, seed by seed.

    Raises:
        ConfigError: no such scale or page; a file can't be read; an arm, key or measurement that can't be; names page and arm.
    """
    planned, wrong = sound(scale, asked)
    for error in wrong.values():
        raise error
    return planned


def sound(scale: str, asked: Sequence[str] = ()) -> tuple[list[Planned], dict[str, Exception]]:
    """The plan of all pages that can be planned, and what is wrong with the others: one of them stops no other's runs."""
    known = pages(scale)
    found: dict[str, Planned] = {}
    wrong: dict[str, Exception] = {}
    check_known("no page", asked, known)
    for page in asked or known:
        try:
            for one in of_page(page, scale):
                found[one.name] = _both(found[one.name], one) if one.name in found else one
        except (ConfigError, OSError) as error:
            wrong[page] = error
    blocks = [*_order(known), *([page] for page in known)]

    def place(one: Planned) -> tuple[int, int]:
        return next(i for i, block in enumerate(blocks) if not {*one.pages, *one.arms}.isdisjoint(block)), one.seed

    return sorted(found.values(), key=place), wrong


def _order(known: list[str]) -> list[list[str]]:
    """configs/order.yaml: blocks of pages and arms."""
    if not (file := paths.configs() / "order.yaml").exists():
        return []
    blocks = held_to(list[list[str]], read_yaml(file, "order of runs") or [], "order.yaml")
    check_known("order.yaml: there is no page or arm", chain(*blocks), [*known, *named_arms()], "leave it out")
    return blocks


def _both(other: Planned, one: Planned) -> Planned:
    """The same run, wanted by two pages or under two names."""
    pages, arms = (tuple(dict.fromkeys(x)) for x in (other.pages + one.pages, other.arms + one.arms))
    measures = {how.name: how for how in other.measures + one.measures}
    return replace(other, pages=pages, arms=arms, measures=tuple(measures.values()))


def pages(scale: str) -> list[str]:
    """The pages of this checkout that have a config, in their order."""
    check_scale(scale)
    return sorted(path.stem for path in paths.configs().glob("[0-9]*.yaml"))


def of_page(page: str, scale: str, changes: Keys | None = None) -> list[Planned]:
    """What one page rests on, seed by seed, so that a study cut short is still a paired one. changes: win over the files' parameters."""
    try:
        values = merged(merge_parameters(parameter_files(page, scale)), changes or {})
        if "base" not in values:
            raise ConfigError(f"base: configs/scale/{scale}.yaml must hold it, the keys of the scale's runs")
        if (seeds := values.get("seeds")) is not None:
            _check_list("seeds", seeds, int)
        for key, listed in (values.get("vary") or {}).items():
            _check_list(f"vary: {key}", listed)
        arms = arms_of(values, scale)
        wanted = _measures(values.get("measures") or {}, list(arms), seeds or ())
        made = configs(values["base"], arms, seeds or ())
    except ConfigError as error:
        raise ConfigError(f"page {page!r}: {error}") from error
    return [
        Planned(config.name, config, (page,), (arm,), config.seed, tuple(wanted.get((arm, config.seed), ())))
        for of_seed in zip(*made.values(), strict=True)
        for arm, config in zip(made, of_seed, strict=True)
    ]


def _check_list(name: str, value: Any, of: type = object) -> None:
    """Raise a ConfigError where it is no list of such items, or has none; of arms it may be a mapping, too."""
    if not isinstance(value, list | tuple) and not (name == "arms" and isinstance(value, Mapping)):
        raise ConfigError(f"{name}={value!r} must be a list, such as [{value!r}]")
    if not value:
        raise ConfigError(f"{name}={value!r} must name at least one")
    for item in value:
        if not isinstance(item, of) or isinstance(item, bool) and of is int:
            items = "whole numbers" if of is int else "names"
            raise ConfigError(f"{name}={value!r} must be a list of {items}, not of {item!r}")
        if list(value).count(item) > 1:  # a seed would count as two
            raise ConfigError(f"{name}={value!r} holds {item!r} twice: leave one")


def arms_of(values: Keys, scale: str) -> dict[str, Keys]:
    """Name -> keys of the arms of a page, each at all values of `vary`, where the page has that.

    `arms` is a list of names; or name -> keys, for arms of one's own (no keys: by its name). configs/scale/<scale>/arms.yaml
    is what a scale changes of some, such as a family's own learning rate.
    """
    asked, vary = values.get("arms"), values.get("vary") or {}
    own = paths.configs() / "scale" / scale / "arms.yaml"
    if asked is not None:
        _check_list("arms", asked, str)
    changes, found = _arms_of(own) if own.exists() else {}, {}
    if changes:
        check_known("there is no arm", changes, named_arms(), LISTED)
    for name, keys in (asked if isinstance(asked, Mapping) else dict.fromkeys(asked or ())).items():
        if keys is not None and not isinstance(keys, Mapping):
            raise ConfigError(f"arm {name!r} must hold `key: value` lines, but holds {keys!r}")
        keys = arm_keys(name, values["base"], changes) if keys is None else keys
        for chosen in product(*vary.values()):
            varied = dict(zip(vary, chosen, strict=True))
            words = (f", {key.replace('_', ' ')} {value}" for key, value in varied.items())
            found[name + "".join(words)] = {**keys, **varied}
    return found


def named_arms() -> dict[str, dict[str, Any]]:
    """Name -> keys, as configs/arms.yaml has them; nothing else names an arm."""
    return _arms_of(paths.configs() / "arms.yaml")


@cache
def _arms_of(path: Path) -> dict[str, dict[str, Any]]:
    return held_to(dict[str, dict[str, Any]], read_yaml(path, "arms"), str(path))


def arm_keys(name: str, base: Keys, own: Mapping[str, Keys] | None = None) -> dict[str, Any]:
    """The keys of RunConfig of a named arm, but for its seed: base, what the arm changes, and what its scale changes of that arm (`own`).

    Raises:
        ConfigError: no arm has that name (the nearest is suggested), or its share of one of the base's keys is no whole number.
    """
    check_known("there is no arm", [name], named_arms(), LISTED)
    changes = {**named_arms()[name], **(own or {}).get(name, {})}
    return {**base, **{key: _share(name, key, value, base) for key, value in changes.items()}}


def _share(name: str, key: str, value: Any, base: Keys) -> Any:
    """1/2 of the base's value; any other value as it is."""
    if not isinstance(value, str) or key not in SHARES:
        return value
    whole = base.get(key, getattr(RunConfig, key))
    if not isinstance(whole, int):
        raise ConfigError(f"base: {key}={whole!r} must be a whole number: arm {name!r} has {value} of it")
    try:
        share = whole * Fraction(value)
    except (ValueError, ZeroDivisionError) as error:
        raise ConfigError(f"arm {name!r}: {key}={value!r} must be a number, or a share such as 1/2") from error
    multiple = SHARES[key] or 1
    if SHARES[key] is None and share.denominator != 1:
        raise ConfigError(f"arm {name!r}: {value} of the scale's {key} is {float(share):g}, which is no whole number")
    return math.ceil(share / multiple) * multiple


def configs(base: Keys, arms: Mapping[str, Keys], seeds: Sequence[int]) -> dict[str, list[RunConfig]]:
    """Name of an arm -> its config for each seed.

    Args:
        base: RunConfig keys that all arms share. arms: name -> the keys in which the arm differs; where `approach` is among
            them all, it is a ContinualConfig.

    Raises:
        ConfigError: names the arm beside key, value and remedy.
    """
    made = {}
    for arm, keys in arms.items():
        keys = {**base, **keys}
        try:
            if "seed" in keys:
                raise ConfigError(
                    f"seed={keys['seed']!r} is none of an arm: name it in `seeds`, which all arms are trained with"
                )
            kind = ContinualConfig if "approach" in keys else RunConfig
            made[arm] = [kind.from_dict({**keys, "seed": seed}) for seed in seeds]
        except ConfigError as error:
            raise ConfigError(f"arm {arm!r}: {error}") from error
    return made


def _measures(asked: Any, arms: list[str], seeds: Sequence[int]) -> dict[tuple[str, int], list[Measurement]]:
    """What is measured on which arm and seed: on all of a page's, unless `arms` or `seeds` stand beside the keys."""
    wanted: dict[tuple[str, int], list[Measurement]] = {}
    for what, keys in asked.items():
        if not isinstance(keys or {}, Mapping):
            raise ConfigError(f"measures: {what}={keys!r} must hold `key: value` lines, or nothing")
        keys = dict(keys or {})
        of_arms, of_seeds = keys.pop("arms", arms), keys.pop("seeds", seeds)
        _check_list(f"measures: {what}: arms", of_arms, str)
        _check_list(f"measures: {what}: seeds", of_seeds, int)
        check_known(f"measurement {what!r} names arm", of_arms, arms)
        for how in measurements(what, keys):
            for key, value in how.keys.items():
                held_to(MEASURES[what].keys[key], value, f"measurement {what!r}: {key}={value!r}")
            for arm, seed in product(of_arms, of_seeds):
                wanted.setdefault((arm, seed), []).append(how)
    return wanted


def record(one: Planned, scale: str) -> Path:
    """Where the run's record is kept, once it is there."""
    return paths.records(scale) / f"{one.name}.json"


def recorded(one: Planned, scale: str) -> "Result | None":
    """What the run's record holds; None where there is none. Damaged: it isn't what was written, or it is another run's."""
    from ecmoe.training.result import read_record  # a plan needs no pandas

    if not (path := record(one, scale)).exists():
        return None
    result = read_record(path)
    if result.summary["name"] != one.name:
        raise Damaged(path, f"it holds the run {result.summary['name']}")
    return result
