"""Every part of every claim with its interval: what is ahead of what, and how sure that is."""

from collections.abc import Mapping

import pandas as pd
from matplotlib.axes import Axes

from ecmoe.report.plots.draw import panels, ranges
from ecmoe.report.plots.parts import Plot, number
from ecmoe.report.plots.style import GREY, INK


def all_effects(units: Mapping[str, pd.DataFrame], colors: Mapping[str, str]) -> Plot:
    """A panel for each unit, all of it on that panel's one scale, right is what the paper says.

    Args:
        units: unit -> name, mean, low, high, label; turned so that above 0 is on the paper's side.
        colors: label of a verdict -> its colour.
    """

    def draw(ax: Axes, rows: pd.DataFrame) -> tuple[pd.DataFrame, str]:
        ax.axvline(0, color=INK, linewidth=1)
        ranges(ax, rows, [colors.get(label, GREY) for label in rows["label"]])
        # An interval of few seeds may be hundreds wide: the marks decide how far the axis goes.
        reach = max(1.6 * rows["mean"].abs().max(), 1.1 * rows[["low", "high"]].abs().max(axis=1).median())
        ax.set(xlim=(-reach, reach), xlabel="right of 0: as the paper says")
        ax.tick_params(axis="y", labelsize=9)
        return rows, "; ".join(f"{row.name} {number(row)}, {row.label}" for row in rows.itertuples())

    there = {unit: rows for unit, rows in units.items() if len(rows)}
    heights = [len(rows) + 1.5 for rows in there.values()]
    what = "effects, above 0 where they are on the paper's side"
    return panels(what, draw, there, 0.6 + 0.27 * sum(heights), rows=len(there), key="unit", height_ratios=heights)
