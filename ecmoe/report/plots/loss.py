"""Figures of measured columns: lines over steps, a setting or tasks learned, and final values with a row per arm."""

from collections.abc import Collection, Sequence

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex

from ecmoe.report.plots.draw import LABELS, from_zero, in_decades, lines, minus, number, panels, points
from ecmoe.report.plots.style import INK, Look, Plot, looks
from ecmoe.study.units import counted

_ROUTINGS = {"as trained": Look("#0072B2", "o"), "causally": Look("#D55E00", "D")}


def over(
    frame: pd.DataFrame,
    x: str,
    columns: str | Sequence[str] = "val_loss",
    *,
    reference: str | None = None,
    levels: Collection[str] = (),
    log: bool = True,
) -> Plot:
    """Plot columns over "step" or "tokens", or over a setting with few values: a panel per column, a line per arm.

    frame: from `table.curves`, or a row per arm, seed and x. reference: an arm; the others are shown as differences from
    it, seed by seed, which makes small gaps visible. levels: arms with a single x or none, shown as horizontal lines for
    comparison. log: show the setting in powers of two."""
    columns = [columns] if isinstance(columns, str) else list(columns)
    arms, setting = list(dict.fromkeys(frame["arm"])), x not in ("step", "tokens")
    several, minus = len(columns) > 1, f" minus that of {reference}" if reference else ""
    ylabel = LABELS.get(columns[0], columns[0]) + minus.replace(" minus", "\nminus")
    what = f"{' and '.join(LABELS.get(column, column) for column in columns)}{minus} over {LABELS[x]}"
    there = frame[frame[x].notna() | frame["arm"].isin(levels)].dropna(subset=columns, how="all")
    measured = set(there["arm"]) if reference is None or reference in set(there["arm"]) else ()
    if setting and there.loc[~there["arm"].isin(levels), x].nunique() < 2:  # which shows no dependence on the setting
        measured = ()
    if reference and not setting:  # the large differences of the first steps would flatten the rest
        there = there[there[x] >= 0.25 * there[x].max()]

    def draw(ax: Axes, column: str) -> tuple[pd.DataFrame, str]:
        named = column == columns[-1] and (len(arms) > 1 or len(columns) == 1)
        data = lines(ax, there, x, column, looks(arms), reference=reference, levels=levels, log=setting and log,
                     ticks_at_values=setting, named=named)  # fmt: skip
        if not reference:
            in_decades(ax, "y", column)
        if not several:
            ax.set_ylabel(from_zero(ylabel, *ax.get_ylim()).replace("; ", ";\n"))
        else:
            ax.set_ylim(bottom=0)
            for line in ax.get_lines():  # whole, if they are at 0
                line.set(clip_on=False, zorder=3)
        if setting:
            at = data[x].map(" at {:g}".format, na_action="ignore").fillna("")
            each = pd.Series([number(row) for row in data.itertuples()], dtype=object) + at
            said = each.groupby(data["arm"], sort=False).agg(", ".join)
            return data, "; ".join(f"{arm}: {values}" for arm, values in said.items())
        ends = data.groupby("arm", sort=False).tail(1).sort_values("mean")
        return data, f"at the end, lowest first: {rows_text(ends, at=x)}"

    each = {LABELS.get(column, column) if several else "": column for column in columns}
    height = max(4.2, 1 + 0.3 * len(arms))  # enough for the arms' names, which may take two lines
    return panels(what, draw, each, height, arms, measured, key="measure")


def final_loss(
    table: pd.DataFrame, column: str = "val_loss", reference: str | None = None, lowest_first: bool = True
) -> Plot:
    """Plot each arm's final value: a tick per seed, the mean and its interval, sorted by the mean.

    table: a row per arm and seed. column: a measured column, such as "bits_per_byte". reference: an arm; the others are shown as
    differences from it over common seeds. Or another column, such as "val_loss", which is subtracted from this one."""
    what, shown = LABELS.get(column, column), looks(table["arm"])  # the reference's, too: it takes a colour elsewhere
    if reference in table:
        table = table.assign(**{column: table[column] - table[reference]})
        what += f" minus {LABELS.get(reference, reference)}"
    elif reference:
        table = minus(table, column, reference)
        what += f" minus that of {reference}"
    means = table.groupby("arm", sort=False)[column].mean()
    order = list(means.sort_values(ascending=lowest_first, na_position="last").index)

    def draw(ax: Axes, table: pd.DataFrame) -> tuple[pd.DataFrame, str]:
        data = points(ax, table, column, order, {arm: shown[arm] for arm in order})
        if reference:
            ax.axvline(0, color=INK, linewidth=1)
        else:
            in_decades(ax, "x", column)
        ax.set_xlabel(from_zero(what, *ax.get_xlim()).replace(" minus", "\nminus"))  # too wide for one line
        return data, rows_text(data)

    measured = table.loc[table[column].notna(), "arm"]
    return panels(what, draw, {"": table}, 1.3 + 0.4 * max(len(order), 2), order, measured)


def by_routing(frame: pd.DataFrame, value: str, panel: str, label: str) -> Plot:
    """Compare two routings of the same weights, "as trained" and "causally": a row per arm, a panel per condition.

    frame: a row per arm, seed, `routing` and condition; `value` is NaN where not run. panel: the column with the conditions,
    which are the panels' titles. label: name and unit of `value`."""
    arms, there = list(dict.fromkeys(frame["arm"])), frame.dropna(subset=[value, panel])

    def draw(ax: Axes, here: pd.DataFrame) -> tuple[pd.DataFrame, str]:
        data = points(ax, here, value, arms, _ROUTINGS, hue="routing")
        ax.axvline(0, color=INK, linewidth=1)
        ax.locator_params(axis="x", nbins=4)
        ax.set_xlabel(label)
        for name, look in _ROUTINGS.items():
            ax.plot([], [], look.marker, color=look.color, label=name)
        return data, "; ".join(f"{row.arm}, {row.routing} {number(row)}" for row in data.itertuples())

    each, height = dict(iter(there.groupby(panel, sort=False))), 1.7 + 0.4 * max(len(arms), 2)
    return panels(label, draw, each, height, arms, there["arm"], key=panel, legend=2, sharey=True)


def retention(accuracies: pd.DataFrame) -> Plot:
    """Plot accuracy over the number of tasks learned: a panel per arm, a line per task. accuracies: from `continual.retained`."""
    there = accuracies.dropna(subset=["accuracy"])
    tasks = [f"task {k:g}" for k in sorted(there["task"].unique())]
    names = pd.Categorical(there["task"].map("task {:g}".format), tasks)  # sorted as numbers: 2 before 10
    there = there.assign(percent=100 * there["accuracy"], task=names)
    colors = colormaps["viridis"](np.linspace(0.3, 0.75, len(tasks)))  # seen on black and on white
    shown = {task: Look(to_hex(colors[i]), "osD^vPX<>p"[i % 10]) for i, task in enumerate(tasks)}

    def draw(ax: Axes, here: pd.DataFrame) -> tuple[pd.DataFrame, str]:
        ax.set_ylim(-3, 103)  # before the names, which stand where it ends
        data = lines(ax, here, "after", "percent", shown, by="task", ticks_at_values=True)
        ax.set_xlabel("tasks learned")
        ends = data.groupby("task", sort=False)["mean"].agg(["first", "last"])
        return data, ", ".join(f"{task} {end['first']:.0f}% then {end['last']:.0f}%" for task, end in ends.iterrows())

    each = dict(iter(there.groupby("arm", sort=False)))
    rows, what = (len(each) + 1) // 2, "accuracy on each task, right after it was learned and after the last"
    return panels(what, draw, each, 2.9 * rows, accuracies["arm"].unique(), there["arm"], rows=rows, key="arm",
                  ylabel="accuracy (%)", sharey=True)  # fmt: skip


def rows_text(data: pd.DataFrame, at: str | None = None) -> str:
    """Describe each row in words, in the figure's order. at: a column with the x value of the row."""
    there = data.dropna(subset=["mean"])
    where = there[at].map(" at {:.10g}".format) if at else [""] * len(there)
    rows = zip(there.itertuples(), where, strict=True)
    return "; ".join(f"{row.arm} {number(row)}{w}, {counted(int(row.seeds), 'seed')}" for row, w in rows)
