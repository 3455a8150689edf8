"""What is timed, by name: the columns that every table of the layer has; read without torch."""

from __future__ import annotations

from typing import NamedTuple

FORWARD, BOTH, ROUTING = "forward", "forward + backward", "routing"
EAGER, COMPILED, GRAPH = "eager", "compiled", "CUDA graph"
PLAIN = "plain"
CAPS = (2, 3)  # of the experts of a token


class Row(NamedTuple):
    """A layer ("floor", "EC-CF2", "top-2"), a variant of it, who computes, in which mode, and which part."""

    layer: str
    variant: str = ""
    path: str = PLAIN
    mode: str = EAGER
    what: str = ""


def named(key: tuple[str, ...]) -> str:
    """What is timed, for people."""
    return ", ".join(filter(None, key))


def label(layer: str, variant: str = "", path: str = PLAIN, mode: str = EAGER, what: str = "") -> str:
    """A row's name for people; what is usual goes without saying."""
    return named((layer, variant, path.replace(PLAIN, ""), mode.replace(EAGER, ""), what))
