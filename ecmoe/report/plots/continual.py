"""Figures of continual learning: the accuracy retained on each task, and the expert to which a task's images are sent."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex

from ecmoe.report.plots.draw import heat, lines, panels
from ecmoe.report.plots.style import Look, Plot


def retention(accuracies: pd.DataFrame) -> Plot:
    """Plot accuracy over the number of tasks learned: a panel per arm, a line per task. accuracies: from `continual.retained`."""
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

    each = dict(iter(there.groupby("arm", sort=False)))
    rows, what = (len(each) + 1) // 2, "accuracy on each task, right after it was learned and after the last"
    return panels(what, draw, each, 2.9 * rows, accuracies["arm"].unique(), there["arm"], rows=rows, key="arm",
                  ylabel="accuracy (%)", sharey=True)  # fmt: skip


def gate_choices(confusion: pd.DataFrame | None, related: pd.DataFrame | None, tasks: Sequence[str]) -> Plot:
    """Plot which expert the gates send each task's images to, and how related the tasks are.

    Args:
        confusion: (K, K) share of the row task's images sent to the column's expert; None: not run.
        related: (K, K) relatedness of the row's task to the column's; None: not run. tasks: K names.
    """
    what = "which expert the gates send a task's images to"
    if confusion is None or related is None:
        return panels(what, None, {}, 0)
    own, worst = confusion.to_numpy(float).diagonal(), int(confusion.to_numpy(float).diagonal().argmin())
    earlier = np.where(np.tri(len(related), k=-1, dtype=bool), related.to_numpy(float), -np.inf)
    i, j = np.unravel_index(earlier.argmax(), earlier.shape)
    found = f"on average {100 * own.mean():.1f}% of a task's images go to its own expert, fewest of {tasks[worst]} ({100 * own[worst]:.1f}%)"
    closest = f"1 to itself; to an earlier task at most {earlier[i, j]:.2f} ({tasks[i]} to {tasks[j]})"

    def draw(ax: Axes, given: tuple) -> tuple[pd.DataFrame, str]:
        matrix, said, columns, form, top = given
        named = pd.DataFrame(matrix.to_numpy(float), list(tasks), [str(c + 1) for c in range(len(tasks))])
        heat(ax, named, form, min(0.0, float(named.min(axis=None))), top)
        ax.set_xlabel(columns)
        return named.rename_axis("task").reset_index(), said

    each = {
        "images sent to each expert (%)": (100 * confusion, found, "expert", ".1f", 100.0),
        "relatedness": (related, closest, "gate of task", ".2f", 1.0),
    }
    return panels(what, draw, each, 1.5 + 0.42 * max(4, len(tasks)), ylabel="images of task")
