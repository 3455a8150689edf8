"""Figures of speed: layers against their floor, training steps, growth with each size, where a step's time goes.

Medians and middle halves of turns were taken by the bench: nothing is left to estimate, so these are drawn as they come.
"""

from __future__ import annotations

import pandas as pd
import seaborn as sns
from matplotlib.ticker import LogLocator, NullLocator

from ecmoe.report.plots.parts import LABELS, Plot, drawn, missing_text, nothing, sentence
from ecmoe.report.plots.style import GREY, INK, PAPER, legend_below, looks, marks, new_figure

FORWARD, BOTH = "forward", "forward + backward"
_COLORS = {FORWARD: "#0072B2", BOTH: "#D55E00"}


@drawn
def share_of_floor(layers: pd.DataFrame) -> Plot:
    """Each layer's speed as a share of its floor's, a panel per size; forward, and forward + backward.

    CUDA graphs and the paper's slow way to cap are in tables alone.

    Args:
        layers: of `speed.layers`.
    """
    sizes = list(dict.fromkeys(layers["size"]))
    columns = ["size", "layer", "variant", "mode", "name", "what", "ms", "share_of_floor", "low_ms", "high_ms"]
    rows = layers.dropna(subset=["layer"]).reindex(columns=columns)
    floor = rows["layer"].eq("floor") & rows["variant"].eq("")
    aside = rows["mode"].eq("CUDA graph") | rows["variant"].astype(str).str.endswith("Dykstra")
    rows = rows[~floor & ~aside & rows["what"].isin(_COLORS)].reset_index(drop=True)
    what = "speed of a layer, as a share of its floor's"
    if not len(rows):
        return nothing(what, sizes)
    rows["percent"] = 100 * rows["share_of_floor"].astype(float)
    names = list(dict.fromkeys(rows["name"]))
    figure, axes = new_figure(1.6 + 0.28 * max(len(names), 2), len(sizes), sharey=True)
    for ax, size in zip(axes, sizes, strict=True):
        sns.pointplot(rows[rows["size"] == size], x="percent", y="name", hue="what", order=names, hue_order=list(_COLORS), palette=_COLORS,
                      markers=["o", "D"], dodge=0.3, linestyle="none", errorbar=None, markersize=6, ax=ax)  # fmt: skip
        ax.get_legend().remove()
        ax.axvline(100, color=INK, linewidth=1)
        ax.set(title=size, xlim=(0, 105), xlabel="", ylabel="")
        ax.tick_params(axis="y", labelsize=9)
    axes[len(axes) // 2].set_xlabel("share of the floor's speed (%)")  # beside each other they would touch
    legend_below(figure, axes[0])
    both = rows[rows["what"] == BOTH]
    said = "; ".join(
        f"{size}: " + ", ".join(f"{r.name} {r.percent:.0f}%" for r in own.itertuples())
        for size, own in both.groupby("size", sort=False)
    )
    data = rows[["size", "name", "what", "ms", "share_of_floor", "low_ms", "high_ms"]].rename(columns={"name": "layer"})
    return Plot(figure, f"{sentence(what)}, {BOTH}. {said}.{missing_text(sizes, rows['size'])}", data)


@drawn
def step_times(steps: pd.DataFrame) -> Plot:
    """Time of a training step by arm and path: median, and the middle half of the turns; own and even routing."""
    data = steps.reindex(
        columns=["arm", "path", "mode", "routing", "ms", "low_ms", "high_ms", "tokens_per_second", "mfu", "peak_mb"]
    )
    data = data.dropna(subset=["ms"]).reset_index(drop=True)
    both = zip(data["path"], data.pop("mode"), strict=True)
    data["path"] = [", ".join(part for part in pair if part != "eager") for pair in both]
    if not len(data):
        return nothing("time of a training step")
    lines, shown = list(dict.fromkeys(zip(data["arm"], data["path"], strict=True))), looks(data["arm"])
    figure, (ax,) = new_figure(1.2 + 0.32 * max(len(lines), 2))
    for row in data.itertuples():
        y = lines.index((row.arm, row.path)) + (0.15 if row.routing == "even" else -0.15)
        fill = {"markerfacecolor": PAPER} if row.routing == "even" else {}
        ax.plot([row.low_ms, row.high_ms], [y, y], color=shown[row.arm].color, linewidth=2)
        ax.plot([row.ms], [y], linestyle="", markersize=7, **marks(shown[row.arm]) | fill)
    for label, fill in (("routed by its own router", GREY), ("routed evenly, by force", PAPER)):
        ax.plot([], [], "o", color=GREY, markerfacecolor=fill, markersize=7, label=label)
    ax.set_yticks(range(len(lines)), [", ".join(line) for line in lines])
    ax.set(ylim=(len(lines) - 0.5, -0.5), xlabel="time of a training step (ms); the axis doesn't start at 0")
    legend_below(figure, ax)
    said = "; ".join(f"{row.arm}, {row.routing} routing, {row.path} {row.ms:.1f} ms" for row in data.itertuples())
    return Plot(figure, f"Time of a training step, median. {said}.", data)


@drawn
def growth(grown: pd.DataFrame, exponents: pd.DataFrame) -> Plot:
    """Time of the EC layer as one size grows: a panel per size; its times, the power law fitted to them, the floor.

    Args:
        grown: of `bench_growth`. exponents: of `bench_growth.exponents`.
    """
    if not len(exponents):
        return nothing("how the time of the EC layer grows")
    figure, panels = new_figure(3.6, len(exponents), sharey=True)
    for ax, fit in zip(panels, exponents.itertuples(), strict=True):
        here = grown[grown["axis"] == fit.axis].sort_values("value")
        x = here["value"].astype(float)
        ax.plot(x, here["floor_ms"], "--", color=GREY, label="floor: six products")
        ax.plot(x, fit.at_1 * x**fit.exponent, "-", color=_COLORS[FORWARD], linewidth=1.5, label="fitted power")
        ax.vlines(x, here["low_ms"], here["high_ms"], color=_COLORS[FORWARD])
        ax.plot(x, here["ms"], "o", color=_COLORS[FORWARD], label="EC layer")
        ax.set(xscale="log", yscale="log", xlabel=LABELS[fit.axis] + (", f = 4 d" if fit.axis == "d_model" else ""))
        ax.set_title(f"power {fit.exponent:.2f} ({fit.low:.2f} to {fit.high:.2f})", fontsize=9.5)
        ax.set_xticks(x, [f"{v / 1024:g}k" if v >= 8192 and v % 1024 == 0 else f"{v:g}" for v in x], fontsize=8)
        ax.xaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panels[0].set_ylabel("forward + backward (ms)")
    legend_below(figure, panels[0])
    said = "; ".join(f"{LABELS[row.axis]} to the power {row.exponent:.2f}" for row in exponents.itertuples())
    data = grown.reindex(columns=["axis", "value", "ms", "low_ms", "high_ms", "floor_ms"])
    return Plot(figure, f"Time of the EC layer, forward + backward, grows with {said}.", data)


@drawn
def profile(kinds: pd.DataFrame) -> Plot:
    """Where a step's time goes: a bar per kind of work.

    Args:
        kinds: of `bench_profile`.
    """
    data = kinds.reindex(columns=["kind", "ms", "share", "most"])
    if not len(data):
        return nothing("where the time of a training step goes")
    percent = data.assign(percent=100 * data["share"].astype(float))
    figure, (ax,) = new_figure(1.1 + 0.3 * max(len(data), 2))
    sns.barplot(percent, x="percent", y="kind", hue=percent["kind"].eq("idle"), palette={True: GREY, False: _COLORS[FORWARD]},
                legend=False, dodge=False, errorbar=None, ax=ax)  # fmt: skip
    for y, row in enumerate(percent.itertuples()):
        ax.annotate(f"{row.ms:.1f} ms", (row.percent, y), (4, 0), textcoords="offset points", va="center", fontsize=9)
    ax.margins(x=0.12)
    ax.set(xlabel="share of a training step's time (%)", ylabel="")
    ax.grid(axis="y", visible=False)
    said = "; ".join(f"{row.kind} {100 * row.share:.0f}%" for row in data.itertuples())
    return Plot(figure, f"Where the time of a training step goes. {said}.", data)
