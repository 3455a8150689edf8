"""What figures share: the words on axes, means over seeds, lines with bands, the text of alt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ecmoe.model.metrics import METRICS
from ecmoe.report.plots.style import Look, looks, marks
from ecmoe.study.stats import interval

LABELS = {metric.name: metric.label for metric in METRICS} | {
    "num_experts": "number of experts e",
    "capacity_factor": "capacity factor c",
    "n": "tokens n",
    "d_model": "width d",
    "moe_init_scale": "initial scale of the MoE output, times fan-in",
    "capacity": "expert places per patch",
    "patches_left_out": "patches that no expert took (%)",
    "images_left_out": "images without any patch taken (%)",
}
PERCENT = [m.name for m in METRICS if m.unit == "share"] + ["patches_left_out", "images_left_out"]


class Plot(NamedTuple):
    """A figure, its alternative text, and the numbers that it shows."""

    figure: Figure
    alt: str
    data: pd.DataFrame


def over_seeds(group: pd.DataFrame, x: str, column: str) -> pd.DataFrame:
    """Mean and range over seeds on the first seed's grid, as far as all seeds got."""
    arm = group["arm"].iloc[0]
    seeds = [g.dropna(subset=[x, column]).sort_values(x) for _, g in group.groupby("seed")]
    seeds = [g for g in seeds if len(g)]
    if not seeds:
        return pd.DataFrame(
            {
                "arm": [arm],
                x: [math.nan],
                "mean": [math.nan],
                "low": [math.nan],
                "high": [math.nan],
                "n": [0],
            }
        )
    first, last = max(g[x].iloc[0] for g in seeds), min(g[x].iloc[-1] for g in seeds)
    grid = seeds[0][x].to_numpy(float)
    grid = grid[(grid >= first) & (grid <= last)]
    if not len(grid) or grid[-1] < last:
        grid = np.append(grid, last)  # clocks differ between seeds
    values = factor(column) * np.stack([np.interp(grid, g[x], g[column]) for g in seeds])
    return pd.DataFrame(
        {
            "arm": arm,
            x: grid,
            "mean": values.mean(0),
            "low": values.min(0),
            "high": values.max(0),
            "n": len(seeds),
        }
    )


def line_with_band(ax: Axes, rows: pd.DataFrame, x: str, arm: str, look: Look) -> None:
    """A line with the mean, a band with the range over seeds; a missing arm is named in the legend."""
    if not len(rows) or rows["mean"].isna().all():
        if not any(line.get_label().startswith(arm + " (") for line in ax.lines):
            ax.plot([], [], linestyle="", label=f"{arm} (not run)", color=look.color)
        return
    every = max(1, len(rows) // 8)
    ax.plot(
        rows[x],
        rows["mean"],
        linestyle=look.line,
        linewidth=1.8,
        markersize=6,
        markevery=every,
        label=arm,
        **marks(look),
    )
    if rows["n"].max() > 1:
        ax.fill_between(rows[x], rows["low"], rows["high"], color=look.color, alpha=0.18, linewidth=0)


def last_values(means: pd.DataFrame, x: str) -> pd.DataFrame:
    """Where each arm ends, lowest first."""
    last = means.dropna(subset=["mean"]).sort_values(x).groupby("arm", sort=False).tail(1)
    return last.sort_values("mean", ignore_index=True)[["arm", x, "mean", "low", "high", "n"]]


def grouped(table: pd.DataFrame, x: str, column: str) -> pd.DataFrame:
    """Mean and 95% interval over seeds for each arm and value of x."""
    rows = []
    for (arm, value), group in table.groupby(["arm", x], sort=False):
        effect = interval(group[column] * factor(column))
        rows.append((arm, value, effect.mean, effect.low, effect.high, effect.n))
    data = pd.DataFrame(rows, columns=["arm", x, "mean", "low", "high", "seeds"])
    return data.astype({"low": float, "high": float}).sort_values(["arm", x], ignore_index=True)


def lines_with_intervals(ax: Axes, data: pd.DataFrame, x: str) -> None:
    """A line per arm with the means; their intervals side by side, so that all are seen."""
    shown = looks(data["arm"])
    for i, (arm, look) in enumerate(shown.items()):
        rows = data[data["arm"] == arm]
        label = arm if rows["seeds"].any() else f"{arm} (not run)"
        at = rows[x] * 1.015 ** (i - (len(shown) - 1) / 2)
        ax.plot(at, rows["mean"], linestyle=look.line, linewidth=1.8, label=label, **marks(look))
        wide = rows.notna()["low"]
        ax.vlines(at[wide], rows["low"][wide], rows["high"][wide], color=look.color, linewidth=1.5)


def number_axis(ax: Axes, values: pd.Series, log: bool) -> None:
    """Ticks at the values that were run, and nowhere else; room beside the first and the last."""
    ticks = sorted(values.dropna().unique())
    log = log and bool(ticks) and ticks[0] > 0
    if log:
        ax.set_xscale("log", base=2)
    ax.set_xticks(ticks, [f"{v:g}" for v in ticks], minor=False)
    ax.minorticks_off()
    if len(ticks) > 1 and log:
        room = (ticks[-1] / ticks[0]) ** 0.06
        ax.set_xlim(ticks[0] / room, ticks[-1] * room)
    elif len(ticks) > 1:
        room = 0.06 * (ticks[-1] - ticks[0])
        ax.set_xlim(ticks[0] - room, ticks[-1] + room)


def name_gaps(ax: Axes, rows: Sequence[int]) -> None:
    """Write "not run" where an arm has no measurement."""
    for y in rows:
        ax.text(
            0.01,
            y,
            "not run",
            transform=ax.get_yaxis_transform(),
            va="center",
            color="0.4",
            style="italic",
        )


def factor(column: str) -> float:
    """100 for what figures show in percent."""
    return 100.0 if column in PERCENT else 1.0


def short(x: float) -> str:
    """Three decimals for losses, none for large numbers."""
    return f"{x:.3f}" if abs(x) < 100 else f"{x:,.0f}"


def seeds_text(n: float) -> str:
    """ "1 seed", "3 seeds"."""
    return f"{n:.0f} seed{'' if n == 1 else 's'}"


def interval_text(row: object) -> str:
    """A row's interval in brackets, or nothing."""
    low, high = row.low, row.high
    return "" if low is None or math.isnan(low) else f" ({short(low)} to {short(high)})"


def missing_text(arms: Sequence[str], measured: Sequence[str]) -> str:
    """A sentence that names the arms without a measurement."""
    missing = [str(arm) for arm in arms if arm not in set(measured)]
    return f" Not run: {', '.join(missing)}." if missing else ""


def series_text(data: pd.DataFrame, x: str) -> str:
    """What each arm shows at each value of x."""
    measured = data[data["seeds"] > 0]
    parts = [
        f"{arm}: " + ", ".join(f"{short(r['mean'])} at {r[x]:g}" for _, r in rows.iterrows())
        for arm, rows in measured.groupby("arm", sort=False)
    ]
    return "; ".join(parts) + "." + missing_text(list(dict.fromkeys(data["arm"])), measured["arm"])


def sentence(text: str) -> str:
    """The text with its first letter capital, the rest as it is (MFU)."""
    return text[:1].upper() + text[1:]


def thousands(value: float, _: object = None) -> str:
    """15000 as 15k, 65000000 as 65M: short enough for every tick."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"
