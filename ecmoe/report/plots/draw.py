"""Building blocks of figures: seaborn's lines, points and heat maps of long tables, and `panels`, which combines them.

Our own code adds what seaborn doesn't have: names at the ends of lines instead of a legend, and labels for missing runs.
"""

import math
import textwrap
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.markers import MarkerStyle
from matplotlib.ticker import EngFormatter
from matplotlib.transforms import ScaledTranslation, blended_transform_factory

from ecmoe.model.metrics import METRICS
from ecmoe.report.plots.style import GREY, INK, LINE, PAPER, WIDTH, Look, PageFigure, Plot, plain
from ecmoe.study.estimate import of_values
from ecmoe.study.protocol import protocol

LABELS = {metric.name: metric.label for metric in METRICS} | {
    "steps": "training steps in all",
    "num_experts": "number of experts e",
    "capacity_factor": "capacity factor c",
    "n": "tokens n",
    "devices": "GPUs",
    "of_ideal": "training speed, of ideal (%)",
    "d_model": "width d",
    "moe_init_scale": "initial scale of the MoE output, times fan-in",
    "capacity": "expert places per patch",
    "patches_left_out": "patches that no expert took (%)",
    "images_left_out": "images without any patch taken (%)",
    "loss": "loss (nats per token)",
    "final_accuracy": "accuracy after all tasks (%)",
    "forgetting": "forgetting (percentage points)",
}
PERCENT = [m.name for m in METRICS if m.unit == "share"] + [
    "patches_left_out", "images_left_out", "final_accuracy", "forgetting", "of_ideal",
]  # fmt: skip
DECADES = ("over_capacity",)  # below 10% for a balanced router, thousands for a collapsed one: needs a logarithmic axis


@plain()
def panels(
    what: str,
    draw: Callable[[Axes, Any], tuple[pd.DataFrame, str]],
    each: Mapping[str, Any],
    height: float,
    arms: Collection[str] = (),
    measured: Collection[str] | None = None,
    *,
    rows: int = 1,
    key: str = "panel",
    ylabel: str = "",
    legend: int = 0,
    **kwargs: object,
) -> Plot:
    """Draw a figure of one or more panels, and combine their numbers into one table and their texts into the alternative text.

    what: what the figure shows. draw: (axes, given) -> (numbers, text). each: title of a panel ("" for a single one) -> `given`.
    arms, measured: the planned arms, and those with results; without results there is no figure. key: the table's column of
    titles. legend: its number of columns (0: none), with the first panel's labels. kwargs: for `subplots`."""
    missing = ", ".join(str(arm) for arm in arms if measured is not None and arm not in set(measured))
    alt, missing = what[:1].upper() + what[1:], f" Not run: {missing}." * bool(missing)
    if not each or (measured is not None and not len(measured)):
        return Plot(None, f"{alt}: not run.{missing}", pd.DataFrame())
    figure = PageFigure(figsize=(WIDTH, height), layout="constrained")
    axes, frames = list(figure.subplots(rows, -(-len(each) // rows), squeeze=False, **kwargs).flat), []
    alt += ":" if "" in each else "."
    for ax, (title, given) in zip(axes, each.items(), strict=False):
        data, words = draw(ax, given)
        if title:
            ax.set_title(title)
            data, words = data.assign(**{key: title}), f"{title}: {words}"
        frames.append(data)
        alt += f" {words}."
    for ax in axes[len(each) :]:
        ax.set_visible(False)
    if ylabel:
        axes[0].set_ylabel(ylabel)
    if legend:  # below the panels, where it hides nothing
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=legend)
    return Plot(figure, alt + missing, pd.concat(frames, ignore_index=True))


def lines(
    ax: Axes,
    frame: pd.DataFrame,
    x: str,
    y: str,
    shown: Mapping[str, Look],
    *,
    by: str = "arm",
    reference: str | None = None,
    log: bool = False,
    ticks_at_values: bool = False,
    named: bool = True,
    levels: Collection[str] = (),
) -> pd.DataFrame:
    """Draw a line per arm, the mean and interval over seeds. Return the numbers shown: `by`, x, mean, low, high, seeds.

    frame: a row per arm, seed and x. by: the column whose values are the lines. shown: line -> look, in their order.
    reference, levels: as in `over`. log: x in powers of two. ticks_at_values: ticks and markers at the values of x only,
    and lines a few points apart. named: write each line's name at its end."""
    frame = in_percent(frame, y).dropna(subset=[y])
    frame = frame[frame[x].notna() | frame[by].isin(levels)]
    shown = {name: look if ticks_at_values else look._replace(marker="") for name, look in shown.items()}
    if reference in set(frame[by]):
        frame = minus(frame, y, reference, ["seed", x]).dropna(subset=[y])
        shown[reference] = look = shown[reference]._replace(marker="")
        ax.axhline(0, color=look.color, dashes=look.dashes, linewidth=1.4)
    data = over_seeds(frame.sort_values([by, x], kind="stable"), [by, x], y)
    across, names = frame[by].isin(levels), [name for name in shown if name in set(frame[by])]
    if not names:
        return data
    colors, markers, dashes = map(list, zip(*(shown[name] for name in names), strict=True))
    sns.lineplot(
        frame[~across], x=x, y=y, hue=by, style=by, hue_order=names, style_order=names, ax=ax, legend=False, linewidth=1.8,
        palette=colors, dashes=dashes, markers=ticks_at_values and markers, markersize=7, markeredgecolor=PAPER, markeredgewidth=0.6,
        errorbar=bounds, err_style="bars" if ticks_at_values else "band", err_kws={} if ticks_at_values else {"alpha": 0.18, "linewidth": 0},
    )  # fmt: skip
    for line in [line for line in ax.get_lines() if line.is_dashed()]:
        line.set(markerfacecolor=PAPER, markeredgecolor=line.get_color(), markeredgewidth=1.2)
    for level, height in frame[across].groupby(by)[y].mean().items():
        shown[level] = look = shown[level]._replace(marker="")
        ax.axhline(height, color=look.color, dashes=look.dashes, linewidth=1.4)
    if log:
        ax.set_xscale("log", base=2)
    if ticks_at_values:
        values = sorted(frame.loc[~across, x].unique())
        ax.margins(x=0.08)  # room for the lines at the sides, which are set apart
        ax.set_xticks(values, [f"{v:g}" for v in values])
        ax.minorticks_off()
        # Set the lines apart, so that no interval hides another.
        drawn = [line for line in ax.get_lines() if line.get_marker() not in ("", "None", None)]
        for i, (line, bars) in enumerate(zip(drawn, ax.containers, strict=True)):
            line.set_zorder(3)  # markers above bars
            aside = ScaledTranslation((i - (len(drawn) - 1) / 2) * 4 / 72, 0, ax.figure.dpi_scale_trans)
            for part in (line, *bars.get_children()):
                part.set_transform(ax.transData + aside)
    else:
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))  # 15k
    if data["mean"].max() >= 1e4:
        ax.yaxis.set_major_formatter(EngFormatter(sep=""))
    ax.set(xlabel=LABELS.get(x, x), ylabel="")
    if named:
        ends = data.groupby(by)["mean"].last().loc[names].to_dict()
        name_ends(ax, ends | ({} if reference is None else {reference: 0.0}), shown)
    return data


def name_ends(ax: Axes, ends: Mapping[str, float], shown: Mapping[str, Look]) -> None:
    """Write each line's name beside its end without overlaps, after a sample of the line. ends: name -> y."""
    low, high = ax.get_ylim()
    inches = ax.figure.get_size_inches()[1] / ax.get_subplotspec().get_gridspec().nrows  # of the axes, title and labels
    gap = 0.062 * (high - low) * 3.3 / max(inches - 1, 1)
    order = sorted(ends, key=ends.get)
    at, text = [ends[name] for name in order], [textwrap.wrap(name, 30) for name in order]
    for i in range(1, len(at)):  # move names up that are too close, then shift all back towards the lines' ends
        further = (len(text[i]) + len(text[i - 1])) / 2 - 1  # additional lines of text between the names' centres
        at[i] = max(at[i], at[i - 1] + gap * (1 + 0.7 * further))
    at = np.array(at) - (np.mean(at) - np.mean(list(ends.values())))
    below, above = at[0] - gap / 2 - low, high - at[-1] - gap / 2  # free space in the axes
    at += max(-below, 0) - max(-above, 0) if below + above > 0 else (above - below) / 2
    beside = ax.figure.dpi_scale_trans + ScaledTranslation(1, 0, ax.transAxes)  # inches to the right of the axes
    for name, lines, y in zip(order, text, at, strict=True):
        look = shown.get(name, Look(INK, ""))
        ax.figure.add_artist(Line2D(
            (0.1, 0.25, 0.4), (y, y, y), color=look.color, dashes=look.dashes, linewidth=1.8, marker=look.marker, markevery=[1],
            markerfacecolor=PAPER if look.dashes else look.color, transform=blended_transform_factory(beside, ax.transData),
        ))  # fmt: skip
        ax.annotate(
            "\n".join(lines), (1, y), (33, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
            va="center", color=INK, fontsize=9, annotation_clip=False, linespacing=0.95,
        )  # fmt: skip


def points(
    ax: Axes, frame: pd.DataFrame, value: str, order: Sequence[str], shown: Mapping[str, Look], hue: str = "arm"
) -> pd.DataFrame:
    """Draw a row per arm: a tick for each seed, mean and interval. Return what is shown: arm, `hue`, mean, low, high, seeds.

    frame: a row per arm and seed. value: the column shown. order: arms from top to bottom. hue: a column whose values are
    separate points in a row, without ticks. shown: value of `hue` -> look, in the order of the points."""
    there, single = in_percent(frame, value).dropna(subset=[value]), hue == "arm"
    if len(there):
        common = {"data": there, "x": value, "y": "arm", "order": order, "ax": ax, "legend": False}
        common |= {"hue": hue, "hue_order": list(shown), "palette": [look.color for look in shown.values()]}
        markers = [MarkerStyle(look.marker, "none" if look.dashes else "full") for look in shown.values()]
        if single:
            sns.stripplot(**common, marker="|", size=9, linewidth=1.2, jitter=False, alpha=0.7)
        sns.pointplot(**common, markers=markers, dodge=False if single else 0.25, errorbar=bounds, linestyle="none",
                      markersize=7, linewidth=2)  # fmt: skip
    name_rows(ax, order, set(there["arm"]))
    data = over_seeds(there, ["arm"] if single else ["arm", hue], value)
    return data.set_index("arm").reindex(order).reset_index() if single else data


def heat(ax: Axes, matrix: pd.DataFrame, form: str, low: float | None, top: float | None) -> None:
    """Draw a heat map with a number in each cell, none where it is NaN. low, top: range of the colours; None: the numbers'."""
    look = {"cmap": "Blues", "annot_kws": {"fontsize": 9}, "cbar": False, "linewidths": 1, "linecolor": LINE}
    sns.heatmap(matrix, ax=ax, vmin=low, vmax=top, annot=True, fmt=form, **look)
    ax.set(xlabel="", ylabel="")
    ax.tick_params(length=0, labelrotation=0)
    ax.grid(False)


def name_rows(ax: Axes, names: Sequence[str], measured: Collection[str], **text: Any) -> None:
    """Label the rows of the y axis, from top to bottom, and write "not run" in those that weren't measured."""
    ax.set_yticks(range(len(names)), names, **text)
    ax.set(ylabel="", ylim=(len(names) - 0.5, -0.5))
    ax.grid(axis="y", visible=False)
    above = {"facecolor": PAPER, "edgecolor": "none", "pad": 1}  # hides the grid lines behind the text
    for y in [y for y, name in enumerate(names) if name not in measured]:
        place = ax.get_yaxis_transform()
        ax.text(0.01, y, "not run", transform=place, va="center", color=GREY, style="italic", bbox=above)


def minus(frame: pd.DataFrame, value: str, reference: str, keys: Sequence[str] = ("seed",)) -> pd.DataFrame:
    """Return the other arms with `value` minus that of the reference at the same keys; NaN if the reference has none."""
    base = frame[frame["arm"] == reference].set_index(list(keys))[value].rename("base")
    others = frame[frame["arm"] != reference].join(base, on=list(keys))
    return others.assign(**{value: others[value] - others["base"]}).drop(columns="base")


def in_decades(ax: Axes, which: str, column: str) -> None:
    """Make an axis, "x" or "y", logarithmic above 10 if the column is in `DECADES`."""
    if column in DECADES:
        getattr(ax, f"set_{which}scale")("symlog", linthresh=10)
        ax.autoscale(axis=which)
        getattr(ax, f"set_{which}lim")(-3)  # space for a marker at 0, but no negative decades
        getattr(ax, f"{which}axis").set_major_formatter("{x:g}")


def over_seeds(frame: pd.DataFrame, keys: Sequence[str], value: str) -> pd.DataFrame:
    """Return a row per group of the keys, in order of appearance: mean, its `bounds` (low, high), number of seeds."""
    groups = frame.groupby(list(keys), sort=False, dropna=False)[value]
    rows = [(*found, of_values(of).mean, *bounds(of), of_values(of).n) for found, of in groups]
    data = pd.DataFrame(rows, columns=[*keys, "mean", "low", "high", "seeds"])
    return data.astype({"mean": float, "low": float, "high": float, "seeds": int})


def bounds(values: pd.Series) -> tuple[float, float]:
    """Return the interval over seeds, in the form of seaborn's `errorbar` argument; NaN for fewer seeds than a verdict needs."""
    return of_values(values).interval(least=protocol().least_seeds) or (math.nan, math.nan)


def in_percent(frame: pd.DataFrame, column: str) -> pd.DataFrame:
    """Return the frame with the column times 100 if figures show it in percent."""
    return frame.assign(**{column: 100 * frame[column]}) if column in PERCENT else frame


def from_zero(label: str, low: float, high: float) -> str:
    """Return the label of an axis with these limits, with a note if they don't contain 0."""
    return label if low <= 0 <= high else f"{label}; the axis doesn't start at 0"


def number(row: object) -> str:
    """Format a row's mean, with its interval in parentheses if it has one: three decimals below 100, else whole numbers."""
    mean, low, high = (f"{x:.3f}" if abs(x) < 100 else f"{x:,.0f}" for x in (row.mean, row.low, row.high))
    return mean if math.isnan(row.low) else f"{mean} ({low} to {high})"
