"""The four ways in which figures here are drawn: lines, points, ranges and heat maps, from long tables, by seaborn.

By hand stays what seaborn has no word for: names at the ends of lines (a reader needs no legend), ranges whose intervals were
computed elsewhere (a verdict's own), and the sentence that says what is missing.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes

from ecmoe.report.plots.parts import LABELS, bounds, factor, interval_text, over_seeds, seeds_text, short, thousands
from ecmoe.report.plots.style import GREY, INK, LINE, PAPER, Look, looks, marks

_DASHES = {"-": "", "--": (4, 2), ":": (1, 1.5)}


def lines(
    ax: Axes,
    frame: pd.DataFrame,
    x: str,
    y: str,
    *,
    by: str = "arm",
    reference: str | None = None,
    log: bool = False,
    ticks_at_values: bool = False,
    shown: Mapping[str, Look] | None = None,
    named: bool = True,
    hidden: str | None = None,
) -> pd.DataFrame:
    """A line per arm: the mean, and its 95% interval over seeds; each named where it ends.

    Args:
        frame: a row per arm, seed and x. by: the column that makes lines.
        reference: an arm that the others are shown as differences to, seed by seed.
        log: x in powers of two. ticks_at_values: and nowhere else. hidden: a name that is written, but has no line here.

    Returns:
        by, x, mean, low, high, seeds.
    """
    frame = frame.assign(**{y: frame[y] * factor(y)}).dropna(subset=[x, y])
    if reference is not None and reference in set(frame[by]):
        base = frame[frame[by] == reference].set_index(["seed", x])[y]
        others = frame[frame[by] != reference].join(base.rename("base"), on=["seed", x])
        frame = others.assign(**{y: others[y] - others["base"]}).dropna(subset=[y])
        ax.axhline(0, color=INK, linewidth=1.4)
    shown = shown or looks(frame[by])
    names = [name for name in shown if name in set(frame[by])]
    data = over_seeds(frame, [by, x], y).sort_values([by, x], ignore_index=True)
    if not names:
        return data
    bars = ticks_at_values
    sns.lineplot(
        frame[frame[by] != hidden], x=x, y=y, hue=by, style=by, hue_order=names, style_order=names, ax=ax, legend=False, linewidth=1.8,
        palette={name: shown[name].color for name in names}, markers=bars and {name: shown[name].marker for name in names},
        dashes={name: _DASHES[shown[name].line] for name in names}, errorbar=bounds, err_style="bars" if bars else "band",
        err_kws={} if bars else {"alpha": 0.18, "linewidth": 0}, markersize=7, markeredgecolor=PAPER,
    )  # fmt: skip
    if log:
        ax.set_xscale("log", base=2)
    if ticks_at_values:
        values = sorted(frame.loc[frame[by] != hidden, x].unique())
        ax.set_xticks(values, [f"{v:g}" for v in values])
        ax.minorticks_off()
    else:
        ax.xaxis.set_major_formatter(thousands)
    ax.set(xlabel=LABELS.get(x, x), ylabel="")
    if named:
        ends = {name: data[data[by] == name].iloc[-1] for name in names}
        places = {name: (end[x], end["mean"], shown[name].color) for name, end in ends.items()}
        if reference is not None:
            places[reference] = (frame[x].max(), 0.0, INK)
        name_ends(ax, places)
    return data


def name_ends(ax: Axes, ends: Mapping[str, tuple[float, float, str]]) -> None:
    """Write each line's name beside its end: name -> (x, y, colour); none over another."""
    low, high = ax.get_ylim()
    gap = 0.062 * (high - low) * 3.3 / max(ax.figure.get_size_inches()[1] - 1, 1)
    order = sorted(ends, key=lambda name: ends[name][1])
    at = [ends[name][1] for name in order]
    for i in range(1, len(at)):  # push up what is too near, then all back to the middle
        at[i] = max(at[i], at[i - 1] + gap)
    at = [y - (np.mean(at) - np.mean([ends[name][1] for name in order])) for y in at]
    for name, y in zip(order, at, strict=True):
        x, _, color = ends[name]
        text = "\n".join(textwrap.wrap(name, 30))
        ax.annotate(
            text, (1, y), (8, 0), xycoords=("axes fraction", "data"), textcoords="offset points", va="center",
            color=color, fontsize=9, annotation_clip=False, linespacing=0.95,
        )  # fmt: skip


def points(ax: Axes, frame: pd.DataFrame, value: str, *, by: str = "arm", order: Sequence[str]) -> pd.DataFrame:
    """A row per arm: a tick for each seed, the mean, its 95% interval.

    Args:
        frame: a row per arm and seed. order: of the rows, from the top.

    Returns:
        by, mean, low, high, seeds, in that order.
    """
    frame = frame.assign(**{value: frame[value] * factor(value)})
    shown, there = looks(order), frame.dropna(subset=[value])
    palette = {name: shown[name].color for name in order}
    common = {"data": there, "x": value, "y": by, "order": order, "ax": ax}
    if len(there):
        sns.stripplot(
            **common, hue=by, palette=palette, legend=False, marker="|", size=9, linewidth=1.2, jitter=False, alpha=0.7
        )
        for name in order:  # one by one: seaborn gives all points of a plot one filling
            here = there[there[by] == name]
            if len(here):
                sns.pointplot(here, x=value, y=by, order=order, ax=ax, errorbar=bounds, linestyle="none",
                              markersize=7, linewidth=2, **marks(shown[name]))  # fmt: skip
    data = over_seeds(frame, [by], value).set_index(by).reindex(order).reset_index()
    name_gaps(ax, [i for i, n in enumerate(data["seeds"]) if not n > 0])
    ax.set_yticks(range(len(order)), order)
    ax.set(ylabel="", ylim=(len(order) - 0.5, -0.5))
    ax.grid(axis="y", visible=False)
    return data


def ranges(ax: Axes, data: pd.DataFrame, colors: Sequence[str], markers: Sequence[str]) -> None:
    """A row each of `data`: name, mean, low, high, an interval that is known already; a mark and its bar."""
    for y, (row, color, marker) in enumerate(zip(data.itertuples(), colors, markers, strict=True)):
        if not np.isnan(row.mean):
            ax.plot([row.low, row.high], [y, y], color=color, linewidth=2)
            ax.plot([row.mean], [y], marker, color=color, markersize=8)
    name_gaps(ax, [y for y, mean in enumerate(data["mean"]) if np.isnan(mean)])
    ax.set_yticks(range(len(data)), data["name"])
    ax.set_ylim(max(len(data), 1) - 0.5, -0.5)
    ax.grid(axis="y", visible=False)


def heat(ax: Axes, matrix: pd.DataFrame, form: str, low: float | None = None, top: float | None = None) -> None:
    """A heat map with every number written; a cell of NaN is empty."""
    sns.heatmap(
        matrix, ax=ax, cmap="Blues", vmin=low, vmax=top, annot=True, fmt=form, annot_kws={"fontsize": 9}, cbar=False,
        linewidths=1, linecolor=LINE,
    )  # fmt: skip
    ax.set(xlabel="", ylabel="")
    ax.tick_params(length=0, labelrotation=0)
    ax.grid(False)


def name_gaps(ax: Axes, rows: Sequence[int]) -> None:
    """Write "not run" where an arm has no measurement."""
    for y in rows:
        ax.text(0.01, y, "not run", transform=ax.get_yaxis_transform(), va="center", color=GREY, style="italic")


def ends_text(data: pd.DataFrame, x: str, by: str = "arm") -> str:
    """Where each line ends, lowest first."""
    last = data.groupby(by, sort=False).tail(1).sort_values("mean")
    return "; ".join(f"{row[by]} {short(row['mean'])}{interval_text(row)} at {row[x]:g}, {seeds_text(row['seeds'])}"
                     for _, row in last.iterrows())  # fmt: skip


def rows_text(data: pd.DataFrame, by: str = "arm") -> str:
    """What each row shows, in the order of the figure."""
    measured = data[data["seeds"] > 0]
    return "; ".join(f"{row[by]} {short(row['mean'])}{interval_text(row)}, {seeds_text(row['seeds'])}"
                     for _, row in measured.iterrows())  # fmt: skip


def series_text(data: pd.DataFrame, x: str, by: str = "arm") -> str:
    """What each line shows at each x."""
    return "; ".join(
        f"{name}: " + ", ".join(f"{short(row['mean'])}{interval_text(row)} at {row[x]:g}" for _, row in rows.iterrows())
        for name, rows in data[data["seeds"] > 0].groupby(by, sort=False)
    )
