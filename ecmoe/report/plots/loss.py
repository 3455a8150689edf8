"""Figures of loss, speed and size."""

from __future__ import annotations

import math

import pandas as pd

from ecmoe.report.plots.parts import (
    LABELS,
    Plot,
    factor,
    grouped,
    interval_text,
    last_values,
    line_with_band,
    lines_with_intervals,
    missing_text,
    name_gaps,
    number_axis,
    over_seeds,
    seeds_text,
    sentence,
    series_text,
    short,
    thousands,
)
from ecmoe.report.plots.style import legend_below, looks, marks, new_figure
from ecmoe.study.stats import interval


def loss_over_steps(curves: pd.DataFrame, x: str = "step", column: str = "val_loss", zoom: bool = True) -> Plot:
    """Loss over steps, tokens or seconds, a line per arm; the second panel shows the last half.

    Args:
        curves: of `results.curves`. x: "step", "tokens" or "seconds". column: which loss.
        zoom: the second panel, without which late differences can't be seen.
    """
    arms = list(dict.fromkeys(curves["arm"]))
    means = pd.concat([over_seeds(curves[curves["arm"] == arm], x, column) for arm in arms], ignore_index=True)
    figure, axes = new_figure(4.6, 2 if zoom else 1)
    half = means.loc[means["mean"].notna(), x].max() / 2
    for ax, start in zip(axes, (0, half), strict=False):
        for arm, look in looks(arms).items():
            line_with_band(ax, means[(means["arm"] == arm) & ~(means[x] < start)], x, arm, look)
        ax.set_xlabel(LABELS[x])
        ax.xaxis.set_major_formatter(thousands)
    axes[0].set_ylabel(LABELS[column])
    if zoom:
        axes[0].set_title("whole training")
        axes[1].set_title("second half (both axes cut)")
    legend_below(figure, axes[0], 3)
    finals = last_values(means, x)
    text = "; ".join(f"{r.arm} {short(r.mean)} ({seeds_text(r.n)})" for r in finals.itertuples())
    missing = missing_text(arms, finals["arm"])
    alt = f"{sentence(LABELS[column])} over {LABELS[x]}. At the end, lowest first: "
    alt += f"{text or 'nothing'}.{missing}"
    return Plot(figure, alt, finals)


def final_loss(table: pd.DataFrame, column: str = "val_loss", lowest_first: bool = True, by: str = "arm") -> Plot:
    """A dot per seed, the mean and its 95% interval per arm, sorted.

    Args:
        table: of `results.table`. column: a measured one, such as "bits_per_byte" or "step_ms".
    """
    rows = []
    for arm, group in table.groupby(by, sort=False):
        effect = interval(group[column] * factor(column))
        rows.append((arm, effect.mean, effect.low, effect.high, effect.n))
    data = pd.DataFrame(rows, columns=["arm", "mean", "low", "high", "seeds"])
    data = data.sort_values("mean", ascending=lowest_first, na_position="last", ignore_index=True)
    figure, (ax,) = new_figure(1.2 + 0.42 * max(len(data), 2))
    for y, row in enumerate(data.itertuples()):
        look = looks(data["arm"])[row.arm]
        if not row.seeds:
            continue
        values = table.loc[table[by] == row.arm, column].dropna() * factor(column)
        ax.plot(
            values,
            [y] * len(values),
            linestyle="",
            marker="|",
            markersize=11,
            color=look.color,
            alpha=0.6,
        )
        if row.low is not None and not math.isnan(row.low):
            ax.plot([row.low, row.high], [y, y], color=look.color, linewidth=2)
        ax.plot([row.mean], [y], linestyle="", markersize=8, **marks(look))
    measured = data[data["seeds"] > 0]
    name_gaps(ax, [y for y, n in enumerate(data["seeds"]) if not n])
    ax.set_yticks(range(len(data)), data["arm"])
    ax.set_ylim(len(data) - 0.5, -0.5)
    low, high = ax.get_xlim()
    zero = "" if not len(measured) or low <= 0 <= high else "; the axis doesn't start at 0"
    ax.set_xlabel(LABELS.get(column, column) + zero)
    text = "; ".join(f"{r.arm} {short(r.mean)}{interval_text(r)}, {seeds_text(r.seeds)}" for r in measured.itertuples())
    alt = f"{sentence(LABELS.get(column, column))} by arm: {text or 'nothing'}." + missing_text(
        data["arm"], measured["arm"]
    )
    return Plot(figure, alt, data)


def loss_against(table: pd.DataFrame, x: str, column: str = "val_loss", log: bool = True) -> Plot:
    """A measured column against a config key, such as num_experts: mean and 95% interval per arm.

    Args:
        table: of `results.table(..., axes=[x])`, so that x is no part of the arms' labels.
        x: a config key with numbers. log: x in powers of two.
    """
    data = grouped(table, x, column)
    figure, (ax,) = new_figure(4.4)
    lines_with_intervals(ax, data, x)
    number_axis(ax, data[x], log)
    ax.set_xlabel(LABELS.get(x, x))
    ax.set_ylabel(LABELS.get(column, column))
    legend_below(figure, ax)
    alt = f"{sentence(LABELS.get(column, column))} against {LABELS.get(x, x)}. "
    alt += series_text(data, x)
    return Plot(figure, alt, data)


def parameter_counts(table: pd.DataFrame) -> Plot:
    """Counted against printed parameters (Table 1).

    Args:
        table: columns model, total, active (counted), printed_total, printed_active; in parameters.
    """
    figure, axes = new_figure(1.4 + 0.42 * len(table), 2, sharey=True)
    data = table.copy()
    for ax, what in zip(axes, ("total", "active"), strict=True):
        y = range(len(data))
        ax.plot(
            data[f"printed_{what}"],
            y,
            linestyle="",
            marker="o",
            markersize=11,
            markerfacecolor="none",
            color="#D55E00",
            label="printed in the paper",
        )
        ax.plot(
            data[what],
            y,
            linestyle="",
            marker="x",
            markersize=7,
            markeredgewidth=2,
            color="#0072B2",
            label="counted here",
        )
        ax.set_xscale("log")
        ax.set_title(f"{what} parameters")
        ax.set_xlabel("parameters, embedding left out (log)")
        data[f"{what}_off_percent"] = (100 * (data[what] / data[f"printed_{what}"] - 1)).round(1)
    axes[0].set_yticks(range(len(data)), data["model"])
    axes[0].set_ylim(len(data) - 0.5, -0.5)
    legend_below(figure, axes[0])
    worst = data.loc[data["total_off_percent"].abs().idxmax()]
    text = "; ".join(f"{r.model} {r.total:.3g} counted, {r.printed_total:.3g} printed" for r in data.itertuples())
    alt = f"Total parameters: {text}. Furthest apart: {worst['model']}, "
    alt += f"{worst['total_off_percent']:+.1f}%."
    return Plot(figure, alt, data)
