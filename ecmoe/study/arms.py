"""Arms by name: configs/arms.yaml says in which keys each differs from its scale's base; nothing else names an arm."""

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import cache
from typing import Any

from ecmoe import paths
from ecmoe.config import ConfigError, RunConfig
from ecmoe.files import nearest, read_yaml

# Keys that may be a share of the base's, and of what the result is a multiple; None: it must come out whole.
SHARES = {"steps": None, "warmup_steps": None, "batch_size": None, "d_ff": 8}


@cache
def named() -> dict[str, dict[str, Any]]:
    """Name -> keys, as configs/arms.yaml has them."""
    return read_yaml(paths.configs() / "arms.yaml", "arms")


def own(scale: str) -> dict[str, dict[str, Any]]:
    """What a scale changes of some arms, such as a family's own learning rate: configs/scale/<scale>/arms.yaml, if it is there."""
    path = paths.configs() / "scale" / scale / "arms.yaml"
    return read_yaml(path, "arms") if path.exists() else {}


def keys(name: str, base: Mapping[str, Any], own: Mapping[str, Mapping[str, Any]] | None = None) -> dict[str, Any]:
    """The keys of RunConfig of an arm, but for its seed: base, what the arm changes, and what its scale changes of that arm.

    Args:
        base: of the scale. own: name -> keys, of `own(scale)`.

    Raises:
        ConfigError: no arm has that name (the nearest is suggested), or its share of one of the base's keys is no whole number.
    """
    if name not in named():
        hint = nearest(name, named(), "configs/arms.yaml names them all")
        raise ConfigError(f"there is no arm {name!r}: {hint}")
    changes = {**named()[name], **(own or {}).get(name, {})}
    return {**base, **{key: _share(name, key, value, base) for key, value in changes.items()}}


def size(configs: Sequence[RunConfig]) -> str:
    """The size of models in words: "8 layers of width 512, 16 to 128 experts"; of experts only where there are some."""

    def span(key: str, of: Sequence[RunConfig]) -> str:
        least, most = (pick(getattr(config, key) for config in of) for pick in (min, max))
        return f"{least}" if least == most else f"{least} to {most}"

    text = f"{span('layers', configs)} layers of width {span('d_model', configs)}"
    moe = [config for config in configs if config.row.layer is not None]
    return f"{text}, {span('num_experts', moe)} experts" if moe else text


def _share(name: str, key: str, value: Any, base: Mapping[str, Any]) -> Any:
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
