"""How figures look: one colour and marker per arm, the same in every figure of every report; on white and on black.

A figure is drawn under matplotlib's own defaults and ours, whatever a user's matplotlibrc says.
"""

import io
import re
import zlib
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import matplotlib.style
import numpy as np
import pandas as pd
from markupsafe import escape
from matplotlib import colormaps
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

from ecmoe.files import written

WIDTH = 9.0  # inches; a page shows it 900 pixels wide
# What a page draws in the colours of its text and of its paper, so that a figure is right in the dark, too.
INK, LINE, PAPER = "#1d2126", "#d8dde3", "#fefefe"
_IN_PAGE = {INK: "currentColor", LINE: "var(--line, #d8dde3)", PAPER: "var(--paper, #fff)"}
GREY = "#7f868f"
_RC = {
    "font.size": 10, "axes.titlesize": 10, "axes.edgecolor": INK, "axes.labelcolor": INK, "text.color": INK,
    "xtick.color": INK, "ytick.color": INK, "axes.grid": True, "grid.color": LINE, "grid.linewidth": 0.8,
    "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False, "figure.facecolor": "white",
    "legend.frameon": False, "svg.fonttype": "none", "svg.hashsalt": "ecmoe",
}  # fmt: skip
# Okabe and Ito's palette without yellow and black, then Tol's: told apart with any colour vision, on white and on black.
_PALETTE = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#AA4499", "#44AA99", "#999933", "#CC6677",
)  # fmt: skip
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p")
# The arms that are in nearly every figure; all others get theirs by their name.
_KNOWN = {
    "EC-CF2": ("#0072B2", "o"),
    "EC": ("#0072B2", "o"),
    "EC-CF1.5": ("#44AA99", "p"),
    "EC-CF1": ("#009E73", "^"),
    "EC-CF0.5": ("#56B4E9", "v"),
    "EC-CAP2": ("#AA4499", "<"),
    "EC-CAP3": ("#999933", ">"),
    "GShard top-2": ("#D55E00", "s"),
    "Switch top-1": ("#E69F00", "D"),
    "Hash modulo": ("#CC79A7", "X"),
    "Dense": (INK, "P"),
    "one EC network": ("#0072B2", "o"),
    "one dense network": (INK, "P"),
}
# Other arms take their colours where nothing else is left.
_CENTRE = [_KNOWN[arm][0] for arm in ("EC-CF2", "GShard top-2", "Switch top-1")]
_GATES = {"renormalized": "", "raw": (4, 2), "scaled": (1, 1.5)}  # what a name says of the gate: its dashes


class Look(NamedTuple):
    """Colour, marker and dashes of an arm."""

    color: str
    marker: str
    dashes: str | tuple[float, float] = ""


def looks(arms: Iterable[str]) -> dict[str, Look]:
    """The look of each arm: its colour goes by its name, and no two in a figure are alike."""
    arms, found = list(dict.fromkeys(arms)), {}
    # Those that have a colour take it first; by name, so that another order of the arms changes none.
    for arm in sorted(arms, key=lambda arm: (_without_gate(arm) not in _KNOWN, arm)):
        name, dashes = _without_gate(arm), next((_GATES[word] for word in arm.split() if word in _GATES), "")
        start, count = zlib.crc32(name.encode()), len(_PALETTE)
        by_name = [(_PALETTE[i % count], _MARKERS[(i + i // count) % count]) for i in range(start, start + count)]
        by_name.sort(key=lambda one: one[0] in _CENTRE)
        mine = [_KNOWN[name], *by_name[1:]] if name in _KNOWN else by_name
        taken = {(look.color, look.dashes) for look in found.values()}
        found[arm] = Look(*next((one for one in mine if (one[0], dashes) not in taken), mine[-1]), dashes)
    return {arm: found[arm] for arm in arms}


def _without_gate(arm: str) -> str:
    return " ".join(word for word in arm.split() if word not in _GATES)


# For 0, 1, ... 7, 8 or more experts a token, light to dark; grey for none at all.
COUNT_COLORS = ["#c7c7c7", *map(to_hex, colormaps["viridis_r"](np.linspace(0.05, 1.0, 8)))]


def on_color(color: str) -> str:
    """The ink that is read best on this colour, white or black."""
    return "#fff" if np.dot(to_rgb(color), (0.299, 0.587, 0.114)) < 0.5 else "#000"


# matplotlib as we want it, whatever a user's matplotlibrc says; as it was, afterwards. Or a decorator: `@plain()`.
plain = partial(matplotlib.style.context, _RC, after_reset=True)


class PageFigure(Figure):
    """A figure that is saved as it was drawn: ticks are made only then."""

    savefig = plain()(Figure.savefig)


class Plot(NamedTuple):
    """A figure, its alternative text, and the numbers that it shows; no figure where nothing was run."""

    figure: Figure | None
    alt: str
    data: pd.DataFrame

    def svg(self) -> str:
        """The figure as SVG that stands in a page: its text is text, its ink that of the page; the same bytes each time."""
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        self.figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
        text = buffer.getvalue()
        # Two figures of a page would share the names of groups.
        text = re.sub(r'<g id="[^"]*"', "<g", text[text.index("<svg") :])
        text = re.sub(r"font-family: [^;]*; ?", "", text)  # the page's own
        view = re.search(r'viewBox="([^"]+)"', text)[1]
        for color, in_page in _IN_PAGE.items():
            text = text.replace(color, in_page)
        names = f'viewBox="{view}" role="img" aria-label="{escape(self.alt)}"'
        head = f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" {names}>'
        return re.sub(r"<svg [^>]*>", lambda _: head, text, count=1)

    def save(self, path: Path) -> None:
        """The figure as a PNG, for where a page can't be shown, written by rename; the same bytes each time."""
        with written(path) as temporary:
            self.figure.savefig(temporary, format="png", dpi=150, metadata={"Software": None})
