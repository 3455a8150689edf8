"""Figures of routing: who processes what, how evenly, and how many experts a token gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from ecmoe.model.metrics import SHARES
from ecmoe.report.plots.draw import ends_text, heat, lines, name_gaps, series_text
from ecmoe.report.plots.parts import LABELS, Plot, drawn, missing_text, nothing, sentence
from ecmoe.report.plots.style import PAPER, count_colors, is_dark, legend_below, looks, new_figure


@drawn
def expert_shares(table: pd.DataFrame, by: str = "arm", paper: Mapping[str, float] | None = None) -> Plot:
    """Share of tokens by how many experts processed them (C7): a stacked bar per arm, which seaborn has none of.

    Args:
        table: with share_0 ... share_8; rows of an arm are averaged.
        by: what a bar is: "arm", or a column of your own, such as the kind of token.
        paper: shares to show in a bar below, by what is written there: {"3 or 4: 23%": .23}.
    """
    names = [*map(str, range(8)), "8+"]
    data = (100 * table.groupby(by, sort=False)[SHARES].mean()).set_axis(names, axis=1)
    what = "share of tokens by the number of experts that processed them"
    if not data.notna().any(axis=None):
        return nothing(what, list(data.index))
    figure, (ax,) = new_figure(1.5 + 0.5 * (len(data) + bool(paper)))
    rows = {name: list(zip(row, names, count_colors(), strict=True)) for name, row in data.iterrows()}
    if paper:
        rows["the paper (100M/64E)"] = [(100 * share, text, "#d8dde3") for text, share in paper.items()]
    for y, parts in enumerate(rows.values()):
        left = 0.0
        for width, name, color in parts:
            width = 0.0 if np.isnan(width) else width
            ax.barh(y, width, left=left, color=color, edgecolor=PAPER, label=None if y else name)
            text = f"{width:.0f}%" if name in names else name
            if width >= 1.1 * len(text) + 1:
                ink = "#fff" if is_dark(color) else "#111"
                ax.text(left + width / 2, y, text, ha="center", va="center", fontsize=8.5, color=ink)
            left += width
    name_gaps(ax, [y for y, (_, row) in enumerate(data.iterrows()) if row.isna().all()])
    ax.set_yticks(range(len(rows)), list(rows))
    ax.set(ylim=(len(rows) - 0.5, -0.5), xlim=(0, 100), xlabel="share of tokens (%), by the number of experts")
    ax.grid(False)
    legend_below(figure, ax, 9)
    there = data.dropna(how="all")
    said = "; ".join(
        f"{label}: {row['0']:.1f}% none, {row['1'] + row['2']:.1f}% one or two, {row['3'] + row['4']:.1f}% three or four, "
        f"{row[names[5:]].sum():.1f}% more" for label, row in there.iterrows()
    )  # fmt: skip
    also = f" The paper: {', '.join(paper)}." if paper else ""
    return Plot(figure, f"{sentence(what)}. {said}.{also}" + missing_text(data.index, there.index), data.reset_index())


@drawn
def expert_shares_over_steps(curves: pd.DataFrame, arm: str) -> Plot:
    """Share of tokens of one arm by number of experts, over training: the mean over seeds."""
    groups = {"none": SHARES[:1], "1 or 2": SHARES[1:3], "3 or 4": SHARES[3:5], "5 or more": SHARES[5:]}
    curve = curves[curves["arm"] == arm].dropna(subset=["step", "share_0"])
    what = f"share of the tokens of {arm} by number of experts, over training"
    if not len(curve):
        return nothing(what)
    means = curve.groupby("step")[SHARES].mean()
    data = pd.DataFrame({name: 100 * means[columns].sum(axis=1) for name, columns in groups.items()})
    figure, (ax,) = new_figure(3.6)
    ax.stackplot(data.index, data.T, labels=data.columns, colors=[count_colors()[i] for i in (0, 2, 4, 7)])
    ax.set(
        xlim=(data.index.min(), data.index.max()), ylim=(0, 100), xlabel=LABELS["step"], ylabel="share of tokens (%)"
    )
    legend_below(figure, ax)
    ends = ", ".join(f"{data[name].iloc[-1]:.1f}% {name}" for name in groups)
    return Plot(figure, f"{sentence(what)}; at the end {ends}.", data.reset_index())


@drawn
def load(frame: pd.DataFrame, x: str = "step") -> Plot:
    """How unbalanced token choice is (C10): the fullest expert's demand, and requests dropped, over training or a setting.

    Args:
        frame: a row per arm, seed and x with over_capacity and dropped. x: "step", or a setting with few values.
    """
    arms, setting = list(dict.fromkeys(frame["arm"])), x != "step"
    columns = ("over_capacity", "dropped")
    if not frame[list(columns)].notna().any(axis=None):
        return nothing(f"load by {LABELS.get(x, x)}", arms)
    figure, axes = new_figure(4.0, 2)
    said, found, shown = [], [], looks(arms)
    for ax, column in zip(axes, columns, strict=True):
        last = column == columns[-1]
        data = lines(
            ax, frame, x, column, log=setting, ticks_at_values=setting, shown=shown, named=last and len(arms) > 1
        )
        ax.set_title(LABELS[column], fontsize=10)
        ax.set_ylim(bottom=0)
        said.append(f"{sentence(LABELS[column])}: {series_text(data, x) if setting else ends_text(data, x)}.")
        found.append(data.assign(measure=LABELS[column]))
    whole = pd.concat(found, ignore_index=True)
    return Plot(figure, f"Load by {LABELS.get(x, x)}. {' '.join(said)}{missing_text(arms, whole['arm'])}", whole)


@drawn
def routing_matrix(weights: Mapping[str, object], tokens: Sequence[str]) -> Plot:
    """Who processes what, with what weight: tokens x experts, a panel per router (Fig. 1).

    Args:
        weights: title -> (n, e) array or tensor of combine weights, 0 where not routed. tokens: n labels.
    """
    figure, axes = new_figure(1.6 + 0.42 * len(tokens), len(weights), sharey=True)
    frames, said = [], []
    for ax, (title, given) in zip(axes, weights.items(), strict=True):
        w = np.asarray(given, dtype=float)
        if w.shape[0] != len(tokens):
            raise ValueError(f"{title}: {w.shape[0]} rows of weights for {len(tokens)} tokens")
        held = (w > 0).sum(axis=0)
        columns = [f"expert {i}" for i in range(w.shape[1])]
        _matrix(ax, pd.DataFrame(np.where(w > 0, w, np.nan), tokens, columns), ".2f", 1.0)
        ax.set_title(title)
        ax.set_xticklabels([f"{name}\n{n} tokens" for name, n in zip(columns, held, strict=True)], fontsize=8)
        none = [tokens[t] for t in np.flatnonzero((w > 0).sum(axis=1) == 0)]
        left = f"no expert takes {', '.join(none)}" if none else "every token is taken"
        said.append(f"{title}: experts hold {', '.join(map(str, held))} tokens; {left}")
        frames.append(pd.DataFrame(w, columns=columns).assign(router=title, token=list(tokens)))
    data = pd.concat(frames, ignore_index=True)
    data = data[["router", "token", *data.columns.drop(["router", "token"])]]
    return Plot(figure, f"Combine weights, tokens by experts. {'. '.join(said)}.", data)


def _matrix(ax: Axes, matrix: pd.DataFrame, form: str, top: float) -> None:
    heat(ax, matrix, form, 0.0, max(top, float(np.nanmax(matrix.to_numpy(float), initial=0.0))))
