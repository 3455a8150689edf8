"""What is timed, by name: the columns that every table of the layer has; read without torch."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ecmoe.files import ConfigError, nearest

FORWARD, BOTH, ROUTING = "forward", "forward + backward", "routing"
EAGER, COMPILED, GRAPH = "eager", "compiled", "CUDA graph"
PLAIN = "plain"
# Where nothing else is asked for: 0.1B/64E of Table 1 with a vocabulary of 32k on a GPU; what a CPU does in seconds. A layer has the first four.
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
CAPS = (2, 3)  # of the experts of a token


def sized(kind: str, keys: Sequence[str], given: Mapping[str, int]) -> dict[str, int]:
    """The sizes of a kind of device, but for those that are given: a ConfigError, where one isn't among `keys`, or no whole number above 0."""
    for key, value in given.items():
        if key not in keys:
            raise ConfigError(f"there is no size {key!r} (given: {value!r}): {nearest(key, keys)}")
        if not isinstance(value, int) or value < 1:
            raise ConfigError(f"{key}={value!r} must be a whole number above 0")
    return {key: SIZES[kind][key] for key in keys} | given


class Row(NamedTuple):
    """A layer ("floor", "EC-CF2", "top-2"), a variant of it, who computes, in which mode, and which part."""

    layer: str
    variant: str = ""
    path: str = PLAIN
    mode: str = EAGER
    what: str = ""

    def __str__(self) -> str:
        """For people; what is usual goes without saying."""
        return named(self._replace(path=self.path.replace(PLAIN, ""), mode=self.mode.replace(EAGER, "")))


def named(key: tuple[str, ...]) -> str:
    """What is timed, for people."""
    return ", ".join(filter(None, key))
