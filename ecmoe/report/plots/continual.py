"""Figures of continual learning: what is retained of each task, and which expert a task goes to."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex

from ecmoe.report.plots.draw import heat, lines, panels, points
from ecmoe.report.plots.parts import Plot, nothing, rows_text
from ecmoe.report.plots.style import GREY, Look


def retention(accuracies: pd.DataFrame) -> Plot:
    """Accuracy on each task over the sequence: a panel per approach, a line per task from where it was learned.

    Args:
        accuracies: of `continual.retained`: approach, seed, after, task, accuracy.
    """
    approaches, what = list(dict.fromkeys(accuracies["approach"])), "accuracy on each task while more are learned"
    there = accuracies.dropna(subset=["accuracy"])
    there = there.assign(percent=100 * there["accuracy"], task=[f"task {k:g}" for k in there["task"]])
    tasks = sorted(there["task"].unique())
    colors = colormaps["viridis"](np.linspace(0.15, 0.85, len(tasks)))
    shown = {task: Look(to_hex(colors[i]), "osD^vPX<>p"[i % 10]) for i, task in enumerate(tasks)}

    def draw(ax: Axes, here: pd.DataFrame) -> tuple[pd.DataFrame, str]:
        data = lines(ax, here, "after", "percent", by="task", ticks_at_values=True, shown=shown)
        ax.set(ylim=(-3, 103), xlabel="tasks learned")
        ends = data.groupby("task", sort=False)["mean"].agg(["first", "last"])
        return data, ", ".join(f"{task} {end['first']:.0f}% then {end['last']:.0f}%" for task, end in ends.iterrows())

    each = dict(iter(there.groupby("approach", sort=False)))
    rows, what = (len(each) + 1) // 2, f"{what}, right after it was learned and after the last"
    return panels(
        what,
        draw,
        each,
        2.9 * rows,
        approaches,
        there["approach"],
        rows=rows,
        key="approach",
        ylabel="accuracy (%)",
        sharey=True,
    )


def kept_and_lost(table: pd.DataFrame) -> Plot:
    """Final accuracy and forgetting by approach: a tick per seed, the mean, its 95% interval.

    Args:
        table: of `continual.table`: approach, seed, final_accuracy, forgetting, as shares.
    """
    approaches = list(dict.fromkeys(table["approach"]))
    ran, what = table.loc[table["final_accuracy"].notna(), "approach"], "accuracy after all tasks, and forgetting"

    def draw(ax: Axes, column: str) -> tuple[pd.DataFrame, str]:
        percent = table.assign(**{column: 100 * table[column]})
        data = points(ax, percent, column, by="approach", order=approaches)
        for text in ax.texts:  # learned at once, there is nothing to forget
            if approaches[round(text.get_position()[1])] in set(ran):
                text.set_text("none to measure: all tasks at once")
        ax.set(xlabel="", xlim=(-5, 105))
        return data, rows_text(data, "approach")

    each = {"accuracy after all tasks (%)": "final_accuracy", "forgetting (percentage points)": "forgetting"}
    return panels(what, draw, each, 1.4 + 0.4 * max(2, len(approaches)), approaches, ran, key="measure", sharey=True)


def gate_choices(confusion: pd.DataFrame | None, related: pd.DataFrame | None, tasks: Sequence[str]) -> Plot:
    """Which expert the gates send a task's images to, and how related they find the tasks.

    Args:
        confusion: (K, K) share of a row's images that a column's expert got; None: not run.
        related: (K, K) relatedness of a row's task to a column's. tasks: K names.
    """
    what = "which expert the gates send a task's images to"
    if confusion is None or related is None:
        return nothing(what)
    own, worst = confusion.to_numpy(float).diagonal(), int(confusion.to_numpy(float).diagonal().argmin())
    earlier = np.where(np.tri(len(related), k=-1, dtype=bool), related.to_numpy(float), -np.inf)
    i, j = np.unravel_index(earlier.argmax(), earlier.shape)
    found = f"on average {100 * own.mean():.1f}% of a task's images go to its own expert, fewest of {tasks[worst]} ({100 * own[worst]:.1f}%)"
    closest = f"1 to itself; to an earlier task at most {earlier[i, j]:.2f} ({tasks[i]} to {tasks[j]})"
    each = {
        "images sent to each expert (%)": (100 * confusion, found, "expert", ".1f", 100.0),
        "relatedness": (related, closest, "gate of task", ".2f", 1.0),
    }
    return _matrices(what, each, tasks, "images of task")


def overwritten(
    gate: pd.DataFrame | None, ec: pd.DataFrame | None, shares: pd.DataFrame | None, tasks: Sequence[str]
) -> Plot:
    """How far each task's training moved each expert's weights, and which experts serve which task at the end.

    Args:
        gate, ec: (K, experts) change relative to the weights before, of Expert Gate and of an expert choice layer; NaN: there
            was no such expert yet; None: not run.
        shares: (K, e) share of a row's tokens that a column's expert of the expert choice layer took. tasks: K names.
    """
    what, moved = "how far each task's training moved each expert's weights", [m for m in (gate, ec) if m is not None]
    if not moved:
        return nothing(what)
    top = 100 * max(float(np.nanmax(m.to_numpy(float))) for m in moved)
    changes = "learning a task changes the weights of the experts that were there by {}"
    even = "" if shares is None else f"; an even share is {100 / shares.shape[1]:.0f}%"
    each = {}
    for title, matrix, finding, darkest in (
        ("Expert Gate: weights changed (%)", gate, changes, top),
        ("EC layer: weights changed (%)", ec, changes, top),
        ("EC layer: tokens taken (%)", shares, "at the end an expert takes {} of a task's tokens" + even, 100.0),
    ):
        ends = [] if matrix is None else [f"{100 * end(matrix.to_numpy(float)):.0f}%" for end in (np.nanmin, np.nanmax)]
        percent = None if matrix is None else 100 * matrix
        each[title] = percent, finding.format(" to ".join(dict.fromkeys(ends))), "expert", ".0f", darkest
    return _matrices(what, each, tasks, "task")


def _matrices(
    what: str, each: dict[str, tuple[pd.DataFrame | None, str, str, str, float]], tasks: Sequence[str], rows: str
) -> Plot:
    """Heat maps side by side, a row per task. each: title -> matrix, what it shows, what columns are, form of a number, the darkest."""

    def draw(ax: Axes, given: tuple) -> tuple[pd.DataFrame, str]:
        matrix, finding, columns, form, top = given
        if matrix is None:
            ax.set_axis_off()
            ax.text(0.5, 0.5, "not run", transform=ax.transAxes, ha="center", color=GREY, style="italic")
            return pd.DataFrame(), "not run"
        named = matrix.set_axis([str(c + 1) for c in range(matrix.shape[1])], axis=1).set_axis(list(tasks))
        heat(ax, named, form, min(0.0, float(np.nanmin(named.to_numpy(float)))), top)
        ax.set_xlabel(columns)
        return named.rename_axis("task").reset_index(), finding

    return panels(what, draw, each, 1.5 + 0.42 * max(4, len(tasks)), ylabel=rows)
