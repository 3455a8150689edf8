"""Figures of continual learning: what is retained of each task, and which expert a task goes to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.colors import to_hex

from ecmoe.report.plots.draw import heat, lines, points
from ecmoe.report.plots.parts import Plot, drawn, missing_text, nothing, rows_text, sentence
from ecmoe.report.plots.style import GREY, Look, new_figure


@drawn
def retention(accuracies: pd.DataFrame) -> Plot:
    """Accuracy on each task over the sequence: a panel per approach, a line per task from where it was learned.

    Args:
        accuracies: of `continual.retained`: approach, seed, after, task, accuracy.
    """
    approaches, what = list(dict.fromkeys(accuracies["approach"])), "accuracy on each task while more are learned"
    there = accuracies.dropna(subset=["accuracy"])
    if not len(there):
        return nothing(what, approaches)
    there = there.assign(percent=100 * there["accuracy"], task=[f"task {k:g}" for k in there["task"]])
    tasks = sorted(there["task"].unique())
    colors = [to_hex(color) for color in colormaps["viridis"](np.linspace(0.15, 0.85, len(tasks)))]
    shown = {task: Look(colors[i], "osD^vPX<>p"[i % 10]) for i, task in enumerate(tasks)}
    measured = [name for name in approaches if name in set(there["approach"])]
    figure, axes = new_figure(
        2.9 * ((len(measured) + 1) // 2), min(2, len(measured)), (len(measured) + 1) // 2, sharey=True
    )
    frames, said = [], []
    for ax, approach in zip(axes, measured, strict=False):
        data = lines(
            ax, there[there["approach"] == approach], "after", "percent", by="task", ticks_at_values=True, shown=shown
        )
        ax.set(title=approach, ylim=(-3, 103), xlabel="tasks learned")
        frames.append(data.assign(approach=approach))
        ends = data.groupby("task", sort=False)["mean"].agg(["first", "last"])
        said.append(
            f"{approach}: " + ", ".join(f"{t} {e['first']:.0f}% then {e['last']:.0f}%" for t, e in ends.iterrows())
        )
    for ax in axes[len(measured) :]:
        ax.set_visible(False)
    axes[0].set_ylabel("accuracy (%)")
    alt = f"{sentence(what)}, right after it was learned and after the last. {'; '.join(said)}."
    return Plot(figure, alt + missing_text(approaches, measured), pd.concat(frames, ignore_index=True))


@drawn
def kept_and_lost(table: pd.DataFrame) -> Plot:
    """Final accuracy and forgetting by approach: a tick per seed, the mean, its 95% interval.

    Args:
        table: of `continual.table`: approach, seed, final_accuracy, forgetting, as shares.
    """
    approaches = list(dict.fromkeys(table["approach"]))
    panels = {"final_accuracy": "accuracy after all tasks (%)", "forgetting": "forgetting (percentage points)"}
    if not table["final_accuracy"].notna().any():
        return nothing("accuracy after all tasks, and forgetting", approaches)
    figure, axes = new_figure(1.4 + 0.4 * max(2, len(approaches)), 2, sharey=True)
    found, said = [], []
    for ax, (column, label) in zip(axes, panels.items(), strict=True):
        percent = table.assign(**{column: 100 * table[column]})
        ran = set(table.loc[table["final_accuracy"].notna(), "approach"])
        data = points(ax, percent, column, by="approach", order=approaches)
        for text in ax.texts:  # learned at once, there is nothing to forget
            name = approaches[round(text.get_position()[1])]
            text.set_text("none to measure: all tasks at once" if name in ran else "not run")
        ax.set(xlabel=label, xlim=(-5, 105))
        found.append(data.assign(measure=label))
        said.append(f"{sentence(label)}: {rows_text(data, 'approach')}.")
    return Plot(figure, " ".join(said) + missing_text(approaches, list(ran)), pd.concat(found, ignore_index=True))


class Panel(NamedTuple):
    """A matrix to draw, a row per task; None: not run. `finding`: with numbers; `form`: of a number; `top`: the darkest."""

    title: str
    matrix: pd.DataFrame | None
    columns: str
    finding: str = ""
    form: str = ".0f"
    top: float | None = None


@drawn
def gate_choices(confusion: pd.DataFrame | None, related: pd.DataFrame | None, tasks: Sequence[str]) -> Plot:
    """Which expert the gates send a task's images to, and how related they find the tasks.

    Args:
        confusion: (K, K) share of a row's images that a column's expert got; None: not run.
        related: (K, K) relatedness of a row's task to a column's. tasks: K names.
    """
    if confusion is None or related is None:
        return nothing("which expert the gates send a task's images to")
    own, worst = confusion.to_numpy(float).diagonal(), int(confusion.to_numpy(float).diagonal().argmin())
    earlier = np.where(np.tri(len(related), k=-1, dtype=bool), related.to_numpy(float), -np.inf)
    i, j = np.unravel_index(earlier.argmax(), earlier.shape)
    found = f"on average {100 * own.mean():.1f}% of a task's images go to its own expert, fewest of {tasks[worst]} ({100 * own[worst]:.1f}%)"
    closest = f"1 to itself; to an earlier task at most {earlier[i, j]:.2f} ({tasks[i]} to {tasks[j]})"
    return _matrices([
        Panel("images sent to each expert (%)", 100 * confusion, "expert", found, ".1f", 100.0),
        Panel("relatedness", related, "gate of task", closest, ".2f", 1.0),
    ], tasks, "images of task")  # fmt: skip


@drawn
def overwritten(
    gate: pd.DataFrame | None, ec: pd.DataFrame | None, shares: pd.DataFrame | None, tasks: Sequence[str]
) -> Plot:
    """How far each task's training moved each expert's weights, and which experts serve which task at the end.

    Args:
        gate, ec: (K, experts) change relative to the weights before, of Expert Gate and of an expert choice layer; NaN: there
            was no such expert yet; None: not run.
        shares: (K, e) share of a row's tokens that a column's expert of the expert choice layer took. tasks: K names.
    """
    moved = [100 * m for m in (gate, ec) if m is not None]
    if not moved:
        return nothing("how far each task's training moved each expert's weights")
    top = max(float(np.nanmax(m.to_numpy(float))) for m in moved)
    changes = "learning a task changes the weights of the experts that were there by {}"
    even = "" if shares is None else f"; an even share is {100 / shares.shape[1]:.0f}%"
    panels = []
    for title, matrix, finding, darkest in (
        ("Expert Gate: weights changed (%)", gate, changes, top),
        ("EC layer: weights changed (%)", ec, changes, top),
        ("EC layer: tokens taken (%)", shares, "at the end an expert takes {} of a task's tokens" + even, 100.0),
    ):
        percent = None if matrix is None else 100 * matrix
        ends = [] if percent is None else [f"{end(percent.to_numpy(float)):.0f}%" for end in (np.nanmin, np.nanmax)]
        span = " to ".join(dict.fromkeys(ends))
        panels.append(Panel(title, percent, "expert", finding.format(span), top=darkest))
    return _matrices(panels, tasks, "task")


def _matrices(panels: Sequence[Panel], tasks: Sequence[str], rows: str) -> Plot:
    """Heat maps side by side, a row per task."""
    figure, axes = new_figure(1.5 + 0.42 * max(4, len(tasks)), len(panels))
    frames, there = [], [panel for panel in panels if panel.matrix is not None]
    for ax, panel in zip(axes, panels, strict=True):
        ax.set_title(panel.title, fontsize=10)
        if panel.matrix is None:
            ax.set_axis_off()
            ax.text(0.5, 0.5, "not run", transform=ax.transAxes, ha="center", color=GREY, style="italic")
            continue
        named = panel.matrix.set_axis([str(c + 1) for c in range(panel.matrix.shape[1])], axis=1).set_axis(list(tasks))
        heat(ax, named, panel.form, min(0.0, float(np.nanmin(named.to_numpy(float)))), panel.top)
        ax.set_xlabel(panel.columns)
        frames.append(named.rename_axis("task").reset_index().assign(panel=panel.title))
    axes[0].set_ylabel(rows)
    alt = " ".join(f"{sentence(p.title)}: {p.finding}." for p in there) + missing_text(
        [p.title for p in panels], [p.title for p in there]
    )
    data = pd.concat(frames, ignore_index=True)
    return Plot(figure, alt, data[["panel", *data.columns.drop("panel")]])
