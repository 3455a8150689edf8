"""The style of figures: each arm has the same colour and marker in all reports, legible on white and on black."""

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

WIDTH = 9.0  # inches; pages show figures 900 pixels wide
# In a page's SVG these become the page's own text, line and background colours, so that figures work in dark mode.
INK, LINE, PAPER = "#1d2126", "#d8dde3", "#fefefe"
_IN_PAGE = {INK: "currentColor", LINE: "var(--line, #d8dde3)", PAPER: "var(--paper, #fff)"}
GREY = "#7f868f"
_RC = {
    "font.size": 10, "axes.titlesize": 10, "axes.edgecolor": INK, "axes.labelcolor": INK, "text.color": INK,
    "xtick.color": INK, "ytick.color": INK, "axes.grid": True, "grid.color": LINE, "grid.linewidth": 0.8,
    "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False, "figure.facecolor": "white",
    "legend.frameon": False, "svg.fonttype": "none", "svg.hashsalt": "ecmoe",
}  # fmt: skip
# Okabe and Ito's palette without yellow and black, then Tol's: distinguishable with any colour vision, on white and on black.
_PALETTE = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#AA4499", "#44AA99", "#999933", "#CC6677",
)  # fmt: skip
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p")
# Fixed looks of the most frequent arms, and of those that pages 02 and 05 show in several figures; other arms get one
# from a hash of their name. Arms of one row are never in one figure; arms whose lines are in one figure differ in colour.
_FIXED = {
    ("#0072B2", "o"): ["EC-CF2", "EC", "one EC network"],
    ("#D55E00", "s"): ["GShard top-2", "Top-2 raw, order of arrival"],
    ("#E69F00", "D"): ["Switch top-1", "Top-2 raw, batch priority"],
    ("#009E73", "^"): ["EC-CF1"],
    ("#56B4E9", "v"): ["EC-CF0.5"],
    ("#44AA99", "p"): ["EC-CF1.5"],
    ("#AA4499", "<"): ["EC-CAP2"],
    ("#999933", ">"): ["EC-CAP3"],
    ("#CC79A7", "X"): ["Hash modulo"],
    (INK, "P"): ["Dense", "one dense network"],
    ("#AA4499", "o"): ["Hash balanced"],
    ("#56B4E9", "P"): ["BASE"],
    ("#44AA99", ">"): ["K-means"],
    ("#CC6677", "v"): ["Task level"],
    ("#999933", "X"): ["Task level fixed"],
    ("#AA4499", "X"): ["Expert threshold"],
    ("#CC79A7", "<"): ["Batch priority"],
    ("#999933", "s"): ["Loss-free bias"],
    ("#56B4E9", "D"): ["Dense MoE, 8 experts"],
    ("#44AA99", "o"): ["EC-CF2 renormalized, 8 experts"],
    ("#CC6677", "p"): ["Switch top-1, no auxiliary loss"],
}
_KNOWN = {arm: look for look, arms in _FIXED.items() for arm in arms}
# The first three colours are used for other arms only if no other colour is left.
_CENTRE = [color for color, _ in _FIXED][:3]
_GATES = {"renormalized": "", "raw": (4, 2), "scaled": (1, 1.5)}  # gate in an arm's name -> dashes


class Look(NamedTuple):
    """Colour, marker and dashes of a line. Markers of dashed and dotted lines are open."""

    color: str
    marker: str
    dashes: str | tuple[float, float] = ""


def looks(arms: Iterable[str]) -> dict[str, Look]:
    """Return arm -> look: the colour is chosen by the arm's name; while colours are left, only arms that differ in their gates share one."""
    arms, found = list(dict.fromkeys(arms)), {}
    names = {arm: " ".join(word for word in arm.split() if word not in _GATES) for arm in arms}
    # Arms with a fixed look come first; sorted by name, so that looks don't depend on the order of the arms.
    for arm in sorted(arms, key=lambda arm: (names[arm] not in _KNOWN, arm)):
        name, dashes = names[arm], next((_GATES[word] for word in arm.replace(",", "").split() if word in _GATES), "")
        start, count = zlib.crc32(name.encode()), len(_PALETTE)
        by_name = [(_PALETTE[i % count], _MARKERS[(i + i // count) % count]) for i in range(start, start + count)]
        by_name.sort(key=lambda one: one[0] in _CENTRE)
        mine = [_KNOWN[name]] if name in _KNOWN else by_name
        taken = {look.color for other, look in found.items() if names[other] != name or look.dashes == dashes}
        found[arm] = Look(*next((one for one in mine if one[0] not in taken), mine[0]), dashes)
    return {arm: found[arm] for arm in arms}


# Colours for 0 (grey), 1, ... 7, 8 or more experts per token, light to dark.
COUNT_COLORS = ["#c7c7c7", *map(to_hex, colormaps["viridis_r"](np.linspace(0.05, 0.78, 8)))]


def on_color(color: str) -> str:
    """Return the text colour with more contrast on this colour, white or black."""
    return "#fff" if np.dot(to_rgb(color), (0.299, 0.587, 0.114)) < 0.5 else "#000"


# A context manager or decorator, `@plain()`, that applies our style, ignores the user's matplotlibrc, and restores it afterwards.
plain = partial(matplotlib.style.context, _RC, after_reset=True)


class PageFigure(Figure):
    """A figure that is also saved in our style, because matplotlib creates ticks only when it saves."""

    savefig = plain()(Figure.savefig)


class Plot(NamedTuple):
    """A figure, its alternative text, and the numbers it shows; `figure` is None if nothing was run."""

    figure: Figure | None
    alt: str
    data: pd.DataFrame

    def svg(self) -> str:
        """Return reproducible SVG to embed in a page, with real text and the page's colours."""
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        self.figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
        text = buffer.getvalue()
        # Without ids of groups, which would occur twice in a page with two figures, and in the page's font.
        text = re.sub(r'<g id="[^"]*"', "<g", text[text.index("<svg") :])
        text = re.sub(r"font-family: [^;]*; ?", "", text)
        view = re.search(r'viewBox="([^"]+)"', text)[1]
        for color, in_page in _IN_PAGE.items():
            text = text.replace(color, in_page)
        names = f'viewBox="{view}" role="img" aria-label="{escape(self.alt)}"'
        head = f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" {names}>'
        return re.sub(r"<svg [^>]*>", lambda _: head, text, count=1)

    def save(self, path: Path) -> None:
        """Save the figure as a reproducible PNG, for places that can't show a page, with an atomic write."""
        with written(path) as temporary:
            self.figure.savefig(temporary, format="png", dpi=150, metadata={"Software": None})
