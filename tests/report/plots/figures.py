"""Runs to draw, and a look at what was drawn."""

import re
import xml.etree.ElementTree as xml

import numpy as np
import pandas as pd
from matplotlib import pyplot
from matplotlib.colors import to_rgb

from ecmoe.config import RunConfig
from ecmoe.model import metrics
from ecmoe.report.plots import style
from ecmoe.training.result import Result

EC, TOP2, HASH = RunConfig(), RunConfig(router="token_choice", top_k=2, capacity_factor=1.0), RunConfig(router="hash")


def run(config: RunConfig, loss: float, rows: int = 5, **routing: float) -> Result:
    x = np.linspace(0, 100, rows)
    shares = {f"share_{j}": (j + 1) / 45 for j in range(9)}  # no two alike
    routing = {"dropped": 0.1, "over_capacity": 0.3, **shares, **routing}
    curve = pd.DataFrame({"step": x, "val_loss": loss + 1 - x / 100}).assign(**routing).reindex(columns=metrics.curve())
    summary = {"config": config.to_dict(), "name": config.name, "seed": config.seed, "status": "finished"}
    return Result(summary | {"val_loss": loss, "routing": routing}, curve)


def drawn(plot):
    """Draw it as a page does, and look that its SVG is XML, says what it shows, and has no colour of a white page."""
    svg = plot.svg()
    root = xml.fromstring(svg)
    assert root.get("aria-label") == plot.alt and len(plot.alt) > 30 and re.match(r"0 0 \d+", root.get("viewBox"))
    assert not pyplot.get_fignums()  # shown by the report alone
    assert {group.get("id") for group in root.iter("g")} == {None}  # two figures of a page would share names
    assert all(ax.get_xlabel() for ax in plot.figure.axes) or "Combine weights" in plot.alt  # whose columns are named
    assert not re.search(f"<metadata|font-family|{style.INK}|{style.PAPER}", svg)
    return plot


def across(line) -> bool:
    """Whether a line runs from side to side of its axes, at no x of its own."""
    return list(line.get_xdata()) == [0, 1]


def legend(plot) -> list[str]:
    (one,) = plot.figure.legends
    return [text.get_text() for text in one.get_texts()]


def texts(plot) -> list[str]:
    return [text.get_text() for ax in plot.figure.axes for text in ax.texts]


def luminance(color: str) -> float:
    """Of WCAG 2."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))
