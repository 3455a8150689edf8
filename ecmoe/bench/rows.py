"""Names and sizes of what is timed, and the columns of layer tables; imported without torch."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from ecmoe.files import ConfigError, nearest

FORWARD, BOTH, ROUTING = "forward", "forward + backward", "routing"
EAGER, COMPILED, GRAPH = "eager", "compiled", "CUDA graph"
PLAIN = "plain"
# Default sizes: on a GPU, 0.1B/64E of Table 1 with a vocabulary of 32k; on a CPU, sizes that take seconds.
SIZES = {
    "cuda": {
        "n": 65_536, "d_model": 768, "d_ff": 3072, "num_experts": 64, "layers": 12, "heads": 12,
        "sequence_length": 1024, "vocab_size": 32_000,
    },
    "cpu": {
        "n": 1024, "d_model": 64, "d_ff": 256, "num_experts": 8, "layers": 2, "heads": 4,
        "sequence_length": 128, "vocab_size": 512,
    },
}  # fmt: skip
OF_LAYER = ("n", "d_model", "d_ff", "num_experts")
CAPS = (2, 3)  # maximum numbers of experts per token


def sized(kind: str, given: Mapping[str, int], keys: Iterable[str] = tuple(SIZES["cpu"])) -> dict[str, int]:
    """Return a device's default sizes, updated by `given`; raise a ConfigError for an unknown key or invalid value."""
    for key, value in given.items():
        if key not in keys:
            raise ConfigError(f"there is no size {key!r} (given: {value!r}): {nearest(key, keys)}")
        if not isinstance(value, int) or value < 1:
            raise ConfigError(f"{key}={value!r} must be a whole number above 0")
    return {key: SIZES[kind][key] for key in keys} | given


class Row(NamedTuple):
    """A layer ("floor", "EC-CF2", "top-2"), its variant, implementation (path), mode, and the part timed (what)."""

    layer: str
    variant: str = ""
    path: str = PLAIN
    mode: str = EAGER
    what: str = ""

    def __str__(self) -> str:
        return named(tuple(field for field in self if field not in (PLAIN, EAGER)))


def named(key: tuple[str, ...]) -> str:
    """Join the non-empty fields of a key by commas."""
    return ", ".join(filter(None, key))
