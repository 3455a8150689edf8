"""Figures of speed: layers against their floor, training steps, growth with each size, where a step's time goes."""

from __future__ import annotations

import pandas as pd
from matplotlib.ticker import LogLocator, NullLocator

from ecmoe.report.plots.parts import LABELS, Plot, missing_text, name_gaps, sentence
from ecmoe.report.plots.style import legend_below, looks, marks, new_figure

OURS, TOKENS, GREY = "#0072B2", "#D55E00", "0.45"
FORWARD, BOTH = "forward", "forward + backward"


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
    rows = rows[~floor & ~aside & rows["what"].ne("routing")]
    names = list(dict.fromkeys(rows["name"]))
    figure, axes = new_figure(1.6 + 0.3 * max(len(names), 2), len(sizes), sharey=True)
    parts = []
    for ax, size in zip(axes, sizes, strict=True):
        here = rows[rows["size"] == size]
        for what, marker, color, shift in ((FORWARD, "o", OURS, -0.14), (BOTH, "D", TOKENS, 0.14)):
            kind = here[here["what"] == what]
            y = [names.index(name) + shift for name in kind["name"]]
            ax.plot(100 * kind["share_of_floor"].astype(float), y, marker, color=color, label=what, markersize=6)
        ax.set(title=size, xlim=(0, 105))
        ax.axvline(100, color="0.2", linewidth=1)
        both = here[here["what"] == BOTH]
        if len(both):
            parts.append(f"{size}: " + ", ".join(f"{r.name} {100 * r.share_of_floor:.0f}%" for r in both.itertuples()))
        elif names:
            name_gaps(ax, [0])
    axes[len(axes) // 2].set_xlabel("share of the floor's speed (%)")  # beside each other they would touch
    if names:
        axes[0].set_yticks(range(len(names)), names, fontsize=9)
        axes[0].set_ylim(len(names) - 0.5, -0.5)
    legend_below(figure, axes[0])
    alt = (
        "Share of the floor's speed, forward + backward. "
        + ("; ".join(parts) or "Nothing")
        + "."
        + missing_text(sizes, rows["size"])
    )
    shown = ["size", "name", "what", "ms", "share_of_floor", "low_ms", "high_ms"]
    return Plot(figure, alt, rows[shown].rename(columns={"name": "layer"}).reset_index(drop=True))


def step_times(steps: pd.DataFrame) -> Plot:
    """Time of a training step by arm and path: median, and the middle half of the turns; own and even routing."""
    columns = ["arm", "path", "mode", "routing", "ms", "low_ms", "high_ms", "tokens_per_second", "mfu", "peak_mb"]
    data = steps.reindex(columns=columns)
    data["path"] = [
        ", ".join(part for part in pair if part != "eager") for pair in zip(data["path"], data.pop("mode"), strict=True)
    ]
    lines = list(dict.fromkeys(zip(data["arm"], data["path"], strict=True)))
    figure, (ax,) = new_figure(1.2 + 0.34 * max(len(lines), 2))
    look = looks(data["arm"])
    for row in data.itertuples():
        even = row.routing == "even"
        y = lines.index((row.arm, row.path)) + (
            0.17 if even else -0.17 if row.arm in set(data["arm"][data["routing"] == "even"]) else 0
        )
        style = marks(look[row.arm]) | ({"markerfacecolor": "white"} if even else {})
        ax.plot([row.low_ms, row.high_ms], [y, y], color=look[row.arm].color, linewidth=2)
        ax.plot([row.ms], [y], linestyle="", markersize=7, **style)
    for label, fill in (("routed by its own router", GREY), ("routed evenly, by force", "white")) if len(data) else ():
        ax.plot([], [], "o", color=GREY, markerfacecolor=fill, markersize=7, label=label)
    ax.set_yticks(range(len(lines)), [", ".join(line) for line in lines])
    ax.set_ylim(max(len(lines), 1) - 0.5, -0.5)
    ax.set_xlim(left=0)
    ax.set_xlabel("time of a training step (ms)")
    legend_below(figure, ax)
    text = "; ".join(f"{row.arm}, {row.routing} routing, {row.path} {row.ms:.1f} ms" for row in data.itertuples())
    return Plot(figure, f"Time of a training step, median. {text or 'Not run'}.", data)


def growth(grown: pd.DataFrame, exponents: pd.DataFrame) -> Plot:
    """Time of the EC layer as one size grows: a panel per size; its times, the power law fitted to them, the floor.

    Args:
        grown: of `bench_growth`. exponents: of `bench_growth.exponents`.
    """
    named = list(exponents["axis"]) or ["n"]
    figure, panels = new_figure(3.6, len(named), sharey=True)
    for ax, axis in zip(panels, named, strict=True):
        for fit in exponents[exponents["axis"] == axis].itertuples():
            here = grown[grown["axis"] == axis].sort_values("value")
            x = here["value"].astype(float)
            ax.plot(x, here["floor_ms"], "--", color=GREY, label="floor: six products")
            ax.plot(x, fit.at_1 * x**fit.exponent, "-", color=OURS, linewidth=1.5, label="fitted power")
            ax.vlines(x, here["low_ms"], here["high_ms"], color=OURS)
            ax.plot(x, here["ms"], "o", color=OURS, label="EC layer")
            ax.set(xscale="log", yscale="log", title=f"power {fit.exponent:.2f} ({fit.low:.2f} to {fit.high:.2f})")
            ax.set_xticks(x, [_short(v) for v in x], fontsize=8)
            ax.title.set_fontsize(9.5)
            ax.xaxis.set_minor_locator(NullLocator())
            ax.yaxis.set_minor_locator(NullLocator())
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        ax.set_xlabel(LABELS[axis] + (", f = 4 d" if axis == "d_model" else ""))
    panels[0].set_ylabel("forward + backward (ms)")
    legend_below(figure, panels[0])
    text = "; ".join(f"{LABELS[row.axis]} to the power {row.exponent:.2f}" for row in exponents.itertuples())
    data = grown.reindex(columns=["axis", "value", "ms", "low_ms", "high_ms", "floor_ms"])
    return Plot(
        figure, sentence(f"time of the EC layer, forward + backward, grows with {text or 'what was not run'}."), data
    )


def profile(kinds: pd.DataFrame) -> Plot:
    """Where a step's time goes: a bar per kind of work.

    Args:
        kinds: of `bench_profile`.
    """
    data = kinds.reindex(columns=["kind", "ms", "share", "most"])
    figure, (ax,) = new_figure(1.1 + 0.3 * max(len(data), 2))
    ax.barh(
        range(len(data)), 100 * data["share"].astype(float), color=[GREY if k == "idle" else OURS for k in data["kind"]]
    )
    for y, row in enumerate(data.itertuples()):
        ax.annotate(
            f"{row.ms:.1f} ms", (100 * row.share, y), (4, 0), textcoords="offset points", va="center", fontsize=9
        )
    ax.set_yticks(range(len(data)), data["kind"])
    ax.set_ylim(max(len(data), 1) - 0.5, -0.5)
    ax.margins(x=0.12)
    ax.set_xlim(left=0)
    ax.set_xlabel("share of a training step's time (%)")
    ax.grid(axis="y", visible=False)
    legend_below(figure, ax)
    text = "; ".join(f"{row.kind} {100 * row.share:.0f}%" for row in data.itertuples())
    return Plot(figure, f"Where the time of a training step goes. {text or 'Not run'}.", data)


def _short(x: float) -> str:
    """65536 as 64k: sizes are powers of two."""
    return f"{x / 1024:g}k" if x >= 8192 and x % 1024 == 0 else f"{x:g}"
