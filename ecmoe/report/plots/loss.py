"""Figures of loss: over training, at its end, and against a setting."""

from __future__ import annotations

import pandas as pd

from ecmoe.report.plots.draw import ends_text, lines, points, rows_text, series_text
from ecmoe.report.plots.parts import LABELS, Plot, drawn, factor, missing_text, nothing, sentence
from ecmoe.report.plots.style import looks, new_figure


@drawn
def loss_over_steps(curves: pd.DataFrame, reference: str | None = None, column: str = "val_loss") -> Plot:
    """Loss over training, a line per arm; against `reference`, seed by seed, where it is given: small gaps are then seen.

    Args:
        curves: of `table.curves`: arm, seed, step and losses.
    """
    arms = list(dict.fromkeys(curves["arm"]))
    what = LABELS[column] + (f" minus that of {reference}" if reference else "")
    there = curves.dropna(subset=["step", column])
    if not len(there) or (reference and reference not in set(there["arm"])):
        return nothing(what, arms)
    figure, (ax,) = new_figure(4.4)
    if reference:  # the first steps, where all lose ten times as much, would flatten the rest
        there = there[there["step"] >= 0.25 * there["step"].max()]
    data = lines(ax, there, "step", column, reference=reference)
    ax.set_ylabel("\nminus that of ".join(what.split(" minus that of ")))
    measured = {*data["arm"], *([reference] if reference else [])}
    return Plot(figure, f"{sentence(what)}, over training; at the end, lowest first: {ends_text(data, 'step')}."
                + missing_text(arms, measured), data)  # fmt: skip


@drawn
def final_loss(
    table: pd.DataFrame,
    column: str = "val_loss",
    by: str = "arm",
    reference: str | None = None,
    lowest_first: bool = True,
) -> Plot:
    """What each arm ends with: a tick per seed, the mean and its 95% interval, sorted.

    Args:
        table: a row per arm and seed. column: a measured one, such as "bits_per_byte".
        reference: an arm that the others are shown as differences to, over the seeds that both have.
    """
    what = LABELS.get(column, column)
    if reference:
        base = table[table[by] == reference].set_index("seed")[column]
        table = table[table[by] != reference]
        table = table.assign(**{column: table[column] - table["seed"].map(base)})
        what += f" minus that of {reference}"
    names = list(dict.fromkeys(table[by]))
    means = table.groupby(by, sort=False)[column].mean()
    if not means.notna().any():
        return nothing(what, names)
    order = list(means.sort_values(ascending=lowest_first, na_position="last").index)
    figure, (ax,) = new_figure(1.2 + 0.4 * max(len(order), 2))
    data = points(ax, table, column, by=by, order=order)
    if reference:
        ax.axvline(0, color=ax.xaxis.label.get_color(), linewidth=1)
    low, high = ax.get_xlim()
    ax.set_xlabel(what + ("" if low <= 0 <= high else "; the axis doesn't start at 0"))
    return Plot(figure, f"{sentence(what)}: {rows_text(data, by)}." + missing_text(order, means.dropna().index), data)


@drawn
def loss_against(
    table: pd.DataFrame, x: str, column: str = "val_loss", by: str = "arm", log: bool = True, level: str | None = None
) -> Plot:
    """A measured column against a setting, such as num_experts: mean and 95% interval per arm.

    Args:
        table: a row per arm, seed and x. x: a column with numbers. log: x in powers of two.
        level: an arm with one x, that others are read against: a line across, and no point.
    """
    what, names = f"{LABELS.get(column, column)} against {LABELS.get(x, x)}", list(dict.fromkeys(table[by]))
    if not table[column].notna().any():
        return nothing(what, names)
    across = table[table[by] == level] if level else table.iloc[:0]
    figure, (ax,) = new_figure(4.2)
    data = lines(ax, table, x, column, by=by, log=log, ticks_at_values=True, hidden=level)
    if across[column].notna().any():
        ax.axhline(
            across[column].mean() * factor(column), color=looks([level])[level].color, linestyle="--", linewidth=1.4
        )
    ax.set_ylabel(LABELS.get(column, column))
    return Plot(figure, f"{sentence(what)}. {series_text(data, x, by)}." + missing_text(names, data[by]), data)
