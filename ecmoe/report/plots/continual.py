"""Figures of continual learning: what is retained of each task, and which expert a task goes to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex

from ecmoe.report.plots.parts import Plot, line_with_band, missing_text, name_gaps, seeds_text, sentence
from ecmoe.report.plots.style import Look, is_dark, legend_below, looks, marks, new_figure
from ecmoe.study.stats import interval


def retention(accuracies: pd.DataFrame) -> Plot:
    """Accuracy on each task over the sequence: a panel per approach, a line per task from where it was learned.

    Args:
        accuracies: of `continual.retained`: approach, seed, after, task, accuracy.
    """
    approaches = list(dict.fromkeys(accuracies["approach"]))
    tasks = sorted(accuracies["task"].dropna().unique())
    shown = _ordered([f"task {k:g}" for k in tasks])
    rows = math.ceil(len(approaches) / 2)
    figure, axes = new_figure(2.8 * rows + 0.5, min(2, len(approaches)), rows, sharex=True, sharey=True)
    frames, parts = [], []
    for ax, approach in zip(axes, approaches, strict=False):
        ax.set_title(approach)
        means = _over_seeds(accuracies[accuracies["approach"] == approach])
        for name, look in shown.items():
            line = means[means["task"] == name]
            if len(line):
                line_with_band(ax, line, "after", name, look)
        frames.append(means.assign(approach=approach))
        if len(means):
            parts.append(f"{approach}: " + ", ".join(_then_and_now(means, name) for name in shown))
        else:
            ax.text(0.5, 0.5, "not run", transform=ax.transAxes, ha="center", color="0.4", style="italic")
    for ax in axes[len(approaches) :]:
        ax.set_visible(False)
    last = int(max(tasks, default=1))
    axes[0].set(ylim=(-3, 103), xlim=(0.8, last + 0.2), xticks=range(1, last + 1))
    for ax in axes[::2]:
        ax.set_ylabel("accuracy (%)")
    for ax in axes[-2:]:
        ax.set_xlabel("tasks learned")
    drawn = next((ax for ax in axes if ax.get_legend_handles_labels()[0]), axes[0])
    legend_below(figure, drawn, 5)
    data = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()
    alt = (
        "Accuracy on each task, right after it was learned and after the last. " + "; ".join(parts or ["nothing"]) + "."
    )
    measured = data["approach"] if len(data) else []
    columns = ["approach", "task", "after", "mean", "low", "high", "n"]
    return Plot(figure, alt + missing_text(approaches, measured), data.reindex(columns=columns))


def kept_and_lost(table: pd.DataFrame) -> Plot:
    """Final accuracy and forgetting by approach: a tick per seed, the mean, its 95% interval.

    Args:
        table: of `continual.table`: approach, seed, final_accuracy, forgetting, as shares.
    """
    approaches = list(dict.fromkeys(table["approach"]))
    panels = {"final_accuracy": "accuracy after all tasks (%)", "forgetting": "forgetting (percentage points)"}
    figure, axes = new_figure(1.4 + 0.42 * max(2, len(approaches)), 2, sharey=True)
    rows, parts = [], []
    for ax, (column, label) in zip(axes, panels.items(), strict=True):
        for y, approach in enumerate(approaches):
            values = 100 * table.loc[table["approach"] == approach, column].dropna()
            effect, look = interval(values), looks(approaches)[approach]
            rows.append((label, approach, effect.mean, effect.low, effect.high, effect.n))
            if not effect.n:
                continue
            ax.plot(values, [y] * len(values), linestyle="", marker="|", markersize=11, color=look.color, alpha=0.6)
            if effect.low is not None:
                ax.plot([effect.low, effect.high], [y, y], color=look.color, linewidth=2)
            ax.plot([effect.mean], [y], linestyle="", markersize=8, **marks(look))
        ax.set(xlabel=label, xlim=(-5, 105))
    ran = set(table.loc[table["final_accuracy"].notna(), "approach"])
    forgot = set(table.loc[table["forgetting"].notna(), "approach"])
    for ax in axes:
        name_gaps(ax, [y for y, name in enumerate(approaches) if name not in ran])
    for y, name in enumerate(approaches):
        if name in ran - forgot:
            axes[1].text(0.01, y, "none to measure: all tasks at once", transform=axes[1].get_yaxis_transform(),
                         va="center", color="0.4", style="italic", fontsize=9)  # fmt: skip
    axes[0].set_yticks(range(len(approaches)), approaches)
    axes[0].set_ylim(len(approaches) - 0.5, -0.5)
    data = pd.DataFrame(rows, columns=["measure", "approach", "mean", "low", "high", "seeds"]).astype(
        {"low": float, "high": float}
    )
    for label, group in data[data["seeds"] > 0].groupby("measure", sort=False):
        said = (f"{r.approach} {r.mean:.1f}{_between(r)}, {seeds_text(r.seeds)}" for r in group.itertuples())
        parts.append(f"{sentence(label)}: {'; '.join(said)}.")
    return Plot(figure, " ".join(parts or ["Nothing was measured."]) + missing_text(approaches, list(ran)), data)


def gate_choices(confusion: pd.DataFrame | None, related: pd.DataFrame | None, tasks: Sequence[str]) -> Plot:
    """Which expert the gates send a task's images to, and how related they find the tasks.

    Args:
        confusion: (K, K) share of a row's images that a column's expert got; None: not run.
        related: (K, K) relatedness of a row's task to a column's. tasks: K names.
    """
    if confusion is None or related is None:
        confusion = related = None
        found = ["", ""]
    else:
        c, r = confusion.to_numpy(float), related.to_numpy(float)
        own, other = c.diagonal(), np.where(np.eye(len(c), dtype=bool), -1, c)
        worst, (a, b) = int(own.argmin()), np.unravel_index(other.argmax(), c.shape)
        i, j = np.unravel_index(np.where(np.tri(len(r), k=-1, dtype=bool), r, -np.inf).argmax(), r.shape)
        found = [
            f"on average {100 * own.mean():.1f}% of a task's images go to its own expert, fewest of {tasks[worst]} "
            f"({100 * own[worst]:.1f}%); most that go astray: {100 * other[a, b]:.1f}% of {tasks[a]}, to the expert of {tasks[b]}",
            f"1 to itself; to an earlier task at most {r[i, j]:.2f} ({tasks[i]} to {tasks[j]})",
        ]
    percent = None if confusion is None else 100 * confusion
    panels = [
        _Panel("images sent to each expert (%)", percent, "expert", found[0], "{:.1f}", 100.0),
        _Panel("relatedness", related, "gate of task", found[1], "{:.2f}", 1.0),
    ]
    return _matrices(panels, tasks, "images of task")


def overwritten(
    gate: pd.DataFrame | None, ec: pd.DataFrame | None, shares: pd.DataFrame | None, tasks: Sequence[str]
) -> Plot:
    """How far each task's training moved each expert's weights, and which experts serve which task at the end.

    Args:
        gate, ec: (K, experts) change relative to the weights before, of Expert Gate and of an expert choice layer; NaN: there
            was no such expert yet; None: not run.
        shares: (K, e) share of a row's tokens that a column's expert of the expert choice layer took. tasks: K names.
    """
    top = max((float(np.nanmax(100 * m.to_numpy(float))) for m in (gate, ec) if m is not None), default=0.0)

    def panel(title: str, matrix: pd.DataFrame | None, finding: str, top: float) -> _Panel:
        if matrix is None:
            return _Panel(title, None, "expert", "")
        least, most = np.nanmin(100 * matrix.to_numpy(float)), np.nanmax(100 * matrix.to_numpy(float))
        span = f"{least:.0f}% to {most:.0f}%" if most > least else f"{most:.0f}%"
        return _Panel(title, 100 * matrix, "expert", finding.format(span), top=top)

    moved = "learning a task changes the weights of the experts that were there by {}"
    even = "" if shares is None else f"; an even share is {100 / shares.shape[1]:.0f}%"
    panels = [
        panel("Expert Gate: weights changed (%)", gate, moved, top),
        panel("EC layer: weights changed (%)", ec, moved, top),
        panel("EC layer: tokens taken (%)", shares, "at the end an expert takes {} of a task's tokens" + even, 100.0),
    ]
    return _matrices(panels, tasks, "task")


class _Panel(NamedTuple):
    """A matrix to draw, a row per task; None: not run. `form`: of a number; `top`: what is darkest."""

    title: str
    matrix: pd.DataFrame | None
    columns: str
    finding: str
    form: str = "{:.0f}"
    top: float | None = None


def _matrices(panels: Sequence[_Panel], tasks: Sequence[str], rows: str) -> Plot:
    """Heat maps side by side, every number written; a cell of NaN is empty."""
    figure, axes = new_figure(1.5 + 0.42 * max(4, len(tasks)), len(panels))
    frames = []
    for ax, panel in zip(axes, panels, strict=True):
        ax.grid(False)
        ax.set_title(panel.title, fontsize=10)
        if panel.matrix is None:
            ax.set(xticks=[], yticks=[])
            ax.text(0.5, 0.5, "not run", transform=ax.transAxes, ha="center", color="0.4", style="italic")
            continue
        _heat(ax, panel)
        ax.set_yticks(range(len(tasks)), tasks)
        ax.set_xlabel(panel.columns)
        named = panel.matrix.set_axis([str(c + 1) for c in range(panel.matrix.shape[1])], axis=1)
        frames.append(named.assign(panel=panel.title, task=list(tasks))[["panel", "task", *named.columns]])
    axes[0].set_ylabel(rows)
    there = [p for p in panels if p.matrix is not None]
    text = " ".join(f"{sentence(p.title)}: {p.finding}." for p in there)
    text += missing_text([p.title for p in panels], [p.title for p in there])
    return Plot(figure, text.strip(), pd.concat(frames, ignore_index=True) if frames else pd.DataFrame({"panel": []}))


def _heat(ax: Axes, panel: _Panel) -> None:
    values = panel.matrix.to_numpy(float)
    top = np.nanmax(values) if panel.top is None else panel.top
    low = min(0.0, float(np.nanmin(values)))
    ax.imshow(values, cmap="Blues", vmin=low, vmax=top, aspect="auto")
    for (t, i), value in np.ndenumerate(values):
        if not math.isnan(value):
            shade = to_hex(colormaps["Blues"]((value - low) / (top - low) if top > low else 0.0))
            ax.text(
                i,
                t,
                panel.form.format(value),
                ha="center",
                va="center",
                fontsize=9,
                color="white" if is_dark(shade) else "black",
            )
    ax.set_xticks(range(values.shape[1]), [str(i + 1) for i in range(values.shape[1])])
    ax.set_xticks(np.arange(values.shape[1] + 1) - 0.5, minor=True)
    ax.set_yticks(np.arange(values.shape[0] + 1) - 0.5, minor=True)
    ax.grid(which="minor", color="0.85")
    ax.tick_params(which="both", length=0)


def _ordered(names: Sequence[str]) -> dict[str, Look]:
    """Colours from dark to light, as tasks have an order, and a marker each."""
    colors = [to_hex(color) for color in colormaps["viridis"](np.linspace(0, 0.85, len(names)))]
    return {name: Look(colors[i], "osD^vPX<>*"[i % 10], "-", colors[i]) for i, name in enumerate(names)}


def _over_seeds(accuracies: pd.DataFrame) -> pd.DataFrame:
    """Mean and range in percent, for each task and number of tasks learned."""
    there = accuracies.dropna(subset=["accuracy"])
    found = (100 * there["accuracy"]).groupby([there["task"], there["after"]]).agg(["mean", "min", "max", "count"])
    found = found.set_axis(["mean", "low", "high", "n"], axis=1).reset_index()
    return found.assign(task=[f"task {k:g}" for k in found["task"]])


def _then_and_now(means: pd.DataFrame, name: str) -> str:
    line = means[means["task"] == name]
    first, last = line.iloc[0]["mean"], line.iloc[-1]["mean"]
    return f"{name} {last:.0f}%" if len(line) == 1 else f"{name} {first:.0f}% then {last:.0f}%"


def _between(row: object) -> str:
    return "" if math.isnan(row.low) else f" ({row.low:.1f} to {row.high:.1f})"
