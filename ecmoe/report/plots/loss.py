"""Figures of what was measured: over training or a setting, as lines; and at the end of training, a row per arm."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes

from ecmoe.report.plots.draw import lines, panels, points
from ecmoe.report.plots.parts import LABELS, Plot, drawn, nothing, rows_text, series_text
from ecmoe.report.plots.style import INK, looks


@drawn
def over(
    frame: pd.DataFrame,
    x: str,
    columns: str | Sequence[str] = "val_loss",
    *,
    reference: str | None = None,
    level: str | None = None,
    log: bool = True,
) -> Plot:
    """Measured columns over "step", or over a setting with few values: a panel each, a line per arm, 95% intervals over seeds.

    Args:
        frame: of `table.curves`, or a row per arm, seed and x.
        reference: an arm that the others are shown as differences to, seed by seed: small gaps are then seen.
        level: an arm with one x, that others are read against: a line across, and no point. log: a setting in powers of two.
    """
    columns = [columns] if isinstance(columns, str) else list(columns)
    arms, setting = list(dict.fromkeys(frame["arm"])), x != "step"
    minus = f" minus that of {reference}" if reference else ""
    what = f"{' and '.join(LABELS[column] for column in columns)}{minus} over {LABELS[x]}"
    there = frame.dropna(subset=[x]).dropna(subset=columns, how="all")
    if not len(there) or (reference and reference not in set(there["arm"])):
        return nothing(what, arms)
    if reference and not setting:  # the first steps, where all lose ten times as much, would flatten the rest
        there = there[there["step"] >= 0.25 * there["step"].max()]

    def draw(ax: Axes, column: str) -> tuple[pd.DataFrame, str]:
        named = column == columns[-1] and (len(arms) > 1 or len(columns) == 1)
        data = lines(ax, there, x, column, reference=reference, level=level, log=setting and log, ticks_at_values=setting,
                     shown=None if reference else looks(arms), named=named)  # fmt: skip
        if setting:
            return data, series_text(data, x)
        ends = data.groupby("arm", sort=False).tail(1).sort_values("mean")
        return data, f"at the end, lowest first: {rows_text(ends, at=x)}"

    if len(columns) == 1:
        each = {"": lambda ax: draw(ax, columns[0])}
    else:
        each = {LABELS[column]: lambda ax, column=column: draw(ax, column) for column in columns}
    plot = panels(what, each, 4.2 if len(columns) == 1 else 4.0, arms, [*there["arm"]], key="measure",
                  ylabel=LABELS[columns[0]] + minus.replace(" minus", "\nminus") if len(columns) == 1 else "")  # fmt: skip
    for ax in plot.figure.axes if len(columns) > 1 else ():
        ax.set_ylim(bottom=0)
    return plot


@drawn
def final_loss(
    table: pd.DataFrame, column: str = "val_loss", reference: str | None = None, lowest_first: bool = True
) -> Plot:
    """What each arm ends with: a tick per seed, the mean and its 95% interval, sorted.

    Args:
        table: a row per arm and seed. column: a measured one, such as "bits_per_byte".
        reference: an arm that the others are shown as differences to, over the seeds that both have.
    """
    what = LABELS.get(column, column)
    if reference:
        base = table[table["arm"] == reference].set_index("seed")[column]
        table = table[table["arm"] != reference]
        table = table.assign(**{column: table[column] - table["seed"].map(base)})
        what += f" minus that of {reference}"
    means = table.groupby("arm", sort=False)[column].mean()
    order = list(means.sort_values(ascending=lowest_first, na_position="last").index)
    return rows(table, column, what, order, difference=bool(reference))


def rows(table: pd.DataFrame, column: str, what: str, order: Sequence[str], *, difference: bool) -> Plot:
    """A row per arm: a tick per seed, the mean, its 95% interval; of differences with a line at 0."""
    if not table[column].notna().any():
        return nothing(what, order)

    def draw(ax: Axes) -> tuple[pd.DataFrame, str]:
        data = points(ax, table, column, order=order)
        if difference:
            ax.axvline(0, color=INK, linewidth=1)
        low, high = ax.get_xlim()
        ax.set_xlabel(what + ("" if low <= 0 <= high else "; the axis doesn't start at 0"))
        return data, rows_text(data)

    return panels(what, {"": draw}, 1.3 + 0.4 * max(len(order), 2), order, table.dropna(subset=column)["arm"])
