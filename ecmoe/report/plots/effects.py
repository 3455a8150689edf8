"""Differences with their intervals, side by side: what is ahead of what, and how sure that is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from ecmoe.report.plots.draw import ranges
from ecmoe.report.plots.parts import Plot, drawn, interval_text, missing_text, nothing, short
from ecmoe.report.plots.style import GREY, INK, new_figure

# Below, above, and an interval that holds the line of no difference or isn't there.
_LOOKS = {"below": ("#0072B2", "<"), "above": ("#D55E00", ">"), "open": (GREY, "o")}


@drawn
def differences(effects: Mapping[str, Any], label: str, below: str = "", margin: float | None = None) -> Plot:
    """A row per difference: its mean, its 95% interval over paired seeds, and the line of no difference.

    Args:
        effects: what is compared -> an effect with mean, low, high, n. label: of the axis, with its unit. below: what
            being left of 0 means. margin: what counts as equal, shown as a band.
    """
    rows = [(name, e.mean, e.low, e.high, e.n) for name, e in effects.items()]
    data = pd.DataFrame(rows, columns=["name", "mean", "low", "high", "seeds"])
    data[["mean", "low", "high"]] = data[["mean", "low", "high"]].astype(float)
    if not data["seeds"].any():
        return nothing(label, list(effects))
    sides = [_side(row, 0.0) for row in data.itertuples()]
    figure, (ax,) = new_figure(1.5 + 0.4 * max(len(data), 2))
    if margin:
        ax.axvspan(-margin, margin, color=GREY, alpha=0.2, linewidth=0)
    ax.axvline(0, color=INK, linewidth=1)
    ranges(ax, data, *zip(*(_LOOKS[side] for side in sides), strict=True))
    ax.set_xlabel(
        label + (f"\nleft of 0: {below}" if below else "") + (f"; grey: within {margin:g}, equal" if margin else "")
    )
    return Plot(
        figure, f"{label}. {_said(data, sides)}.{missing_text(list(effects), data[data['seeds'] > 0]['name'])}", data
    )


@drawn
def all_effects(panels: Mapping[str, pd.DataFrame], colors: Mapping[str, str]) -> Plot:
    """Every part of every claim: a panel for each unit, all of it on that panel's one scale, right is what the paper says.

    Args:
        panels: unit -> name, mean, low, high, label; turned so that above 0 is on the paper's side.
        colors: label of a verdict -> its colour.
    """
    panels = {unit: rows.reset_index(drop=True) for unit, rows in panels.items() if rows["mean"].notna().any()}
    if not panels:
        return nothing("all effects")
    heights = [len(rows) + 1.5 for rows in panels.values()]
    figure, axes = new_figure(0.6 + 0.27 * sum(heights), 1, len(panels), height_ratios=heights)
    said = []
    for ax, (unit, rows) in zip(axes, panels.items(), strict=True):
        ax.axvline(0, color=INK, linewidth=1)
        ranges(ax, rows, [colors.get(label, GREY) for label in rows["label"]], ["o"] * len(rows))
        # An interval of few seeds may be hundreds wide: the marks decide how far the axis goes.
        reach = max(1.6 * rows["mean"].abs().max(), 1.1 * rows[["low", "high"]].abs().max(axis=1).median())
        ax.set_xlim(-reach, reach)
        ax.set_xlabel(f"{unit}; right of 0: as the paper says")
        ax.tick_params(axis="y", labelsize=8.5)
        said.append(
            f"{unit}: {'; '.join(f'{r.name} {short(r.mean)}{interval_text(r)}, {r.label}' for r in rows.itertuples() if not np.isnan(r.mean))}"
        )
    whole = pd.concat([rows.assign(unit=unit) for unit, rows in panels.items()], ignore_index=True)
    return Plot(figure, f"Effects, above 0 where they are on the paper's side. {'. '.join(said)}.", whole)


def _side(row: Any, neutral: float) -> str:
    if np.isnan(row.low) or row.low <= neutral <= row.high:
        return "open"
    return "below" if row.high < neutral else "above"


def _said(data: pd.DataFrame, sides: Sequence[str]) -> str:
    parts = []
    for row, side in zip(data.itertuples(), sides, strict=True):
        if row.seeds:
            parts.append(
                f"{row.name}: {short(row.mean)}{interval_text(row)}" + ("" if side == "open" else f", {side} 0")
            )
    return "; ".join(parts)
