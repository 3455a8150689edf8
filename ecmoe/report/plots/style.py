"""How figures look: one colour and marker per arm, the same in every figure of every report."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

WIDTH = 9.0  # inches; a page shows it 900 pixels wide
# Okabe and Ito's palette without yellow, then Tol's dark tones: told apart with any colour vision.
_PALETTE = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#882255",
    "#44AA99", "#999933", "#661100", "#6F6F6F",
)  # fmt: skip
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "p", "h")
# The arms that are in nearly every figure; all others get theirs by their name.
_KNOWN = {
    "EC-CF2": ("#0072B2", "o"),
    "EC": ("#0072B2", "o"),
    "EC-CF1.5": ("#44AA99", "h"),
    "EC-CF1": ("#009E73", "^"),
    "EC-CF0.5": ("#56B4E9", "v"),
    "EC-CAP2": ("#882255", "<"),
    "EC-CAP3": ("#999933", ">"),
    "GShard top-2": ("#D55E00", "s"),
    "Switch top-1": ("#E69F00", "D"),
    "Hash": ("#CC79A7", "X"),
    "Dense": ("#000000", "P"),
}
# Gates that aren't raw: their lines, and how white their marks are.
_GATES = {"": ("-", 0.0), "renormalized": ("--", 1.0), "scaled": (":", 0.6)}


class Look(NamedTuple):
    """Colour, marker, line of an arm, and what its marks are filled with; gates that aren't raw have broken lines."""

    color: str
    marker: str
    line: str
    fill: str


def looks(arms: Iterable[str]) -> dict[str, Look]:
    """The look of each arm: its colour goes by its name, and no two in a figure are alike."""
    arms, found = list(dict.fromkeys(arms)), {}
    gates = {arm: next((word for word in arm.split() if word in _GATES), "") for arm in arms}
    names = {arm: " ".join(word for word in arm.split() if word != gates[arm]) for arm in arms}
    # Those that have a colour take it first; by name, so that another order of the arms changes none.
    for arm in sorted(arms, key=lambda arm: (names[arm] not in _KNOWN, arm)):
        name, (line, white), attempt = names[arm], _GATES[gates[arm]], 0
        color, marker = _KNOWN.get(name) or _by_name(name, 0)
        while any((look.color, look.line) == (color, line) for look in found.values()):
            attempt += 1
            color, marker = _by_name(name, attempt)
            if attempt == len(_PALETTE):  # more arms than colours: the marker tells
                break
        fill = to_hex([channel + white * (1 - channel) for channel in to_rgb(color)])
        found[arm] = Look(color, marker, line, fill)
    return {arm: found[arm] for arm in arms}


def _by_name(name: str, attempt: int) -> tuple[str, str]:
    i = zlib.crc32(name.encode()) + attempt
    return _PALETTE[i % len(_PALETTE)], _MARKERS[(i + i // len(_PALETTE)) % len(_MARKERS)]


def marks(look: Look) -> dict[str, object]:
    """matplotlib's arguments for an arm's markers."""
    return {
        "color": look.color,
        "marker": look.marker,
        "markerfacecolor": look.fill,
        "markeredgecolor": look.color,
    }


def count_colors(n: int = 9) -> list[str]:
    """Ordered colours for 0, 1, ... n - 1 experts a token, light to dark; grey for none at all."""
    return ["#c7c7c7", *(to_hex(color) for color in colormaps["viridis_r"](np.linspace(0.05, 1.0, n - 1)))]


def is_dark(color: str) -> bool:
    """Does white text stand out from this colour better than black?"""
    return float(np.dot(to_rgb(color), (0.299, 0.587, 0.114))) < 0.5


def new_figure(height: float, columns: int = 1, rows: int = 1, **kwargs: object) -> tuple[Figure, list[Axes]]:
    """A figure of page width and its axes in a flat list; no pyplot, so nothing shows by itself."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained", facecolor="white")
    axes = list(figure.subplots(rows, columns, squeeze=False, **kwargs).flat)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(color="0.9", linewidth=0.8)
        ax.set_axisbelow(True)
        ax.title.set_fontsize(11)
    return figure, axes


def legend_below(figure: Figure, ax: Axes, columns: int = 4) -> None:
    """One legend for the whole figure, under it, where it can hide nothing; no scale where nothing is."""
    for panel in [panel for panel in figure.axes if panel.get_visible()]:
        drawn = panel.patches or panel.images or any(collection.get_paths() for collection in panel.collections)
        if not drawn and not any(np.isfinite(line.get_ydata(orig=False)).any() for line in panel.lines):
            # Not by set_xticks: panels that share an axis would lose theirs too.
            panel.tick_params(left=False, bottom=False, labelleft=False, labelbottom=False)
            panel.text(0.5, 0.5, "not run", transform=panel.transAxes, ha="center", color="0.4")
    handles, labels = ax.get_legend_handles_labels()
    if handles:
        figure.legend(
            handles,
            labels,
            loc="outside lower center",
            ncols=min(columns, len(labels)),
            frameon=False,
        )
