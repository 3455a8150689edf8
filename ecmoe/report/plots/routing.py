"""Figures of routing: who processes what, how evenly, and how many experts a token gets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from ecmoe.model.metrics import SHARES
from ecmoe.report.plots.parts import (
    LABELS,
    Plot,
    grouped,
    last_values,
    line_with_band,
    lines_with_intervals,
    missing_text,
    name_gaps,
    number_axis,
    over_seeds,
    sentence,
    series_text,
    thousands,
)
from ecmoe.report.plots.style import count_colors, is_dark, legend_below, looks, new_figure


def expert_shares(table: pd.DataFrame, by: str = "arm", paper: Mapping[str, float] | None = None) -> Plot:
    """Share of tokens by how many experts processed them (C7), one stacked bar per arm.

    Args:
        table: with share_0 ... share_8, such as of `results.table`; rows of an arm are averaged.
        by: what a bar is: "arm", or a column of your own, such as the kind of token.
        paper: shares to show in a bar below, by what is written there: {"3 or 4: 23%": .23}.
    """
    means = table.groupby(by, sort=False)[SHARES].mean()
    names = ["0", "1", "2", "3", "4", "5", "6", "7", "8+"]
    data = (100 * means).rename(columns=dict(zip(SHARES, names, strict=True))).round(2)
    figure, (ax,) = new_figure(1.5 + 0.5 * (len(data) + bool(paper)))
    ax.grid(False)
    colors = count_colors()
    labels = list(data.index)
    for y, (_, row) in enumerate(data.iterrows()):
        left = 0.0
        for name, color in zip(names, colors, strict=True):
            width = 0.0 if math.isnan(row[name]) else row[name]
            ax.barh(y, width, left=left, color=color, edgecolor="white", label=name if not y else None)
            _write_in_bar(ax, left, y, width, f"{width:.0f}%", color)
            left += width
    name_gaps(ax, [y for y, (_, row) in enumerate(data.iterrows()) if row.isna().all()])
    if paper:
        left, y = 0.0, len(labels)
        labels.append("the paper (100M/64E)")
        for name, share in paper.items():
            ax.barh(y, 100 * share, left=left, color="0.85", edgecolor="white")
            _write_in_bar(ax, left, y, 100 * share, name, "0.85")
            left += 100 * share
    ax.set_yticks(range(len(labels)), labels)
    ax.set_ylim(len(labels) - 0.5, -0.5)
    ax.set_xlim(0, 100)
    ax.set_xlabel("share of tokens (%), by the number of experts that processed them")
    legend_below(figure, ax, 9)
    parts = []
    for label, row in data.dropna(how="all").iterrows():
        one_or_two, more = row["1"] + row["2"], row[["5", "6", "7", "8+"]].sum()
        parts.append(
            f"{label}: {row['0']:.1f}% none, {one_or_two:.1f}% one or two, "
            f"{row['3'] + row['4']:.1f}% three or four, {more:.1f}% more"
        )
    alt = "Share of tokens by the number of experts that processed them. " + "; ".join(parts) + "."
    if paper:
        alt += " The paper: " + ", ".join(paper) + "."
    alt += missing_text(data.index, data.dropna(how="all").index)
    return Plot(figure, alt, data.reset_index())


def expert_shares_over_steps(curves: pd.DataFrame, x: str = "step") -> Plot:
    """Share of tokens by number of experts over training: a panel per arm, mean over seeds."""
    groups = {
        "none": SHARES[:1],
        "1 or 2": SHARES[1:3],
        "3 or 4": SHARES[3:5],
        "5 or more": SHARES[5:],
    }
    arms = list(dict.fromkeys(curves["arm"]))
    figure, axes = new_figure(
        3.0 * math.ceil(len(arms) / 2) + 0.6,
        min(2, len(arms)),
        math.ceil(len(arms) / 2),
        sharey=True,
    )
    frames, ends = [], []
    for ax, arm in zip(axes, arms, strict=False):
        curve = curves[curves["arm"] == arm].dropna(subset=[x, "share_0"]).groupby(x)[SHARES].mean()
        ax.set_title(arm)
        ax.set_xlabel(LABELS[x])
        ax.xaxis.set_major_formatter(thousands)
        if not len(curve):
            continue  # the legend's helper says "not run"
        shares = pd.DataFrame({name: 100 * curve[columns].sum(axis=1) for name, columns in groups.items()})
        colors = [count_colors()[i] for i in (0, 2, 4, 7)]
        ax.stackplot(shares.index, shares.T, labels=shares.columns, colors=colors)
        ax.set(xlim=(shares.index.min(), shares.index.max()), ylim=(0, 100))
        frames.append(shares.reset_index().assign(arm=arm))
        last = shares.iloc[-1]
        ends.append(f"{arm}: " + ", ".join(f"{last[name]:.1f}% {name}" for name in groups))
    for ax in axes[len(arms) :]:
        ax.set_visible(False)
    axes[0].set_ylabel("share of tokens (%)")
    drawn = next((ax for ax in axes if ax.get_legend_handles_labels()[0]), axes[0])
    legend_below(figure, drawn)
    data = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=["arm", x, *groups])
    alt = "Share of tokens by number of experts over training; at the end: " + ("; ".join(ends) or "nothing") + "."
    return Plot(figure, alt, data[["arm", x, *groups]])


def load(curves: pd.DataFrame, x: str = "step") -> Plot:
    """How unbalanced token choice is over training (C10): fullest expert, dropped requests."""
    arms = list(dict.fromkeys(curves["arm"]))
    figure, axes = new_figure(4.4, 2)
    finals = []
    for ax, column in zip(axes, ("over_capacity", "dropped"), strict=True):
        means = [over_seeds(curves[curves["arm"] == arm], x, column) for arm in arms]
        frame = pd.concat(means, ignore_index=True)
        for arm, look in looks(arms).items():
            line_with_band(ax, frame[frame["arm"] == arm], x, arm, look)
        ax.set_xlabel(LABELS[x])
        ax.xaxis.set_major_formatter(thousands)
        ax.set_title(LABELS[column])
        ax.set_ylim(bottom=0)
        finals.append(last_values(frame, x).assign(measure=LABELS[column]))
    legend_below(figure, axes[0], 3)
    data = pd.concat(finals, ignore_index=True)
    parts = []
    for measure, group in data.groupby("measure", sort=False):
        parts.append(f"{measure}: " + "; ".join(f"{r.arm} {r.mean:.1f}" for r in group.itertuples()))
    alt = "Load over training; at the end, " + ". ".join(parts) + "." + missing_text(arms, data["arm"])
    return Plot(figure, alt, data)


def capacity_demand(table: pd.DataFrame, x: str = "capacity_factor") -> Plot:
    """Dropped requests, and the fullest expert's demand, against the capacity factor.

    Args:
        table: of `results.table(..., axes=["capacity_factor"])`.
    """
    figure, axes = new_figure(4.4, 2)
    frames = []
    for ax, column in zip(axes, ("over_capacity", "dropped"), strict=True):
        data = grouped(table, x, column)
        lines_with_intervals(ax, data, x)
        number_axis(ax, data[x], log=True)
        ax.set_xlabel("capacity, times an equal share")
        ax.set_title(LABELS[column])
        top = data[["mean", "high"]].max().max()
        ax.set_ylim(0, 1.08 * top if top > 0 else None)
        frames.append(data.assign(measure=LABELS[column]))
    legend_below(figure, axes[0])
    data = pd.concat(frames, ignore_index=True)
    alt = " ".join(
        f"{sentence(name)} by capacity. {series_text(g, x)}" for name, g in data.groupby("measure", sort=False)
    )
    return Plot(figure, alt, data)


def routing_matrix(weights: Mapping[str, object], tokens: Sequence[str]) -> Plot:
    """Who processes what, with what weight: tokens x experts, a panel per router (Fig. 1).

    Args:
        weights: title -> (n, e) array or tensor of combine weights, 0 where not routed.
        tokens: n labels.
    """
    panels = {title: np.asarray(w, dtype=float) for title, w in weights.items()}
    figure, axes = new_figure(1.6 + 0.42 * len(tokens), len(panels), sharey=True)
    frames, parts = [], []
    for ax, (title, w) in zip(axes, panels.items(), strict=True):
        if w.shape[0] != len(tokens):
            raise ValueError(f"{title}: {w.shape[0]} rows of weights for {len(tokens)} tokens")
        ax.grid(False)
        ax.imshow(np.where(w > 0, w, np.nan), cmap="Blues", vmin=0, vmax=max(1.0, w.max()), aspect="auto")
        ax.set_title(title)
        for (t, i), value in np.ndenumerate(w):
            if value > 0:
                ax.text(
                    i,
                    t,
                    f"{value:.2f}",
                    ha="center",
                    va="center",
                    fontsize=9,
                    color="white" if value > 0.55 else "black",
                )
        load_ = (w > 0).sum(axis=0)
        ax.set_xticks(
            range(w.shape[1]),
            [f"expert {i}\n{n} token{'' if n == 1 else 's'}" for i, n in enumerate(load_)],
            fontsize=8,
        )
        ax.set_xticks(np.arange(w.shape[1] + 1) - 0.5, minor=True)
        ax.set_yticks(np.arange(len(tokens) + 1) - 0.5, minor=True)
        ax.grid(which="minor", color="0.85")
        ax.tick_params(which="both", length=0)
        none = [tokens[t] for t in np.flatnonzero((w > 0).sum(axis=1) == 0)]
        parts.append(
            f"{title}: experts hold {', '.join(map(str, load_))} tokens; "
            + (f"no expert takes {', '.join(none)}" if none else "every token is taken")
        )
        columns = [f"expert {i}" for i in range(w.shape[1])]
        frames.append(
            pd.DataFrame(w, columns=columns).assign(router=title, token=list(tokens))[["router", "token", *columns]]
        )
    axes[0].set_yticks(range(len(tokens)), tokens)
    return Plot(
        figure,
        "Combine weights, tokens by experts. " + ". ".join(parts) + ".",
        pd.concat(frames, ignore_index=True),
    )


def _write_in_bar(ax: Axes, left: float, y: float, width: float, text: str, color: object) -> None:
    """A number inside its part of a bar, if it fits there."""
    if width >= 1.1 * len(text) + 1:
        ax.text(
            left + width / 2,
            y,
            text,
            ha="center",
            va="center",
            fontsize=8.5,
            color="white" if is_dark(color) else "black",
        )
