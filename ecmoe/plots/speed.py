"""Figures of speed: layers against their floor, training steps, growth with each size."""

from __future__ import annotations

import pandas as pd
from matplotlib.ticker import LogLocator

from ecmoe.plots.parts import LABELS, Plot, missing_text, name_gaps, sentence
from ecmoe.plots.style import legend_below, looks, marks, new_figure


def share_of_floor(layers: pd.DataFrame) -> Plot:
    """Each layer's speed as a share of its floor's, a panel per size; forward, and forward + backward.

    Args:
        layers: of `speed.layers`.
    """
    sizes = list(dict.fromkeys(layers["size"]))
    rows = layers.dropna(subset=["layer"]) if "share_of_floor" in layers else layers.iloc[:0]
    rows = rows[rows["layer"].ne("floor") & rows["what"].ne("routing")] if len(rows) else rows
    names = list(dict.fromkeys(rows["layer"])) if len(rows) else []
    figure, axes = new_figure(1.6 + 0.36 * max(len(names), 2), len(sizes), sharey=True)
    kinds = {"forward": ("o", "#0072B2", -0.12), "forward + backward": ("D", "#D55E00", 0.12)}
    parts = []
    for ax, size in zip(axes, sizes, strict=True):
        here = rows[rows["size"] == size] if len(rows) else rows
        for what, (marker, color, shift) in kinds.items():
            of_kind = here[here["what"] == what] if len(here) else here
            y = [names.index(name) + shift for name in of_kind["layer"]]
            ax.plot(100 * of_kind["share_of_floor"] if len(of_kind) else [], y, marker, color=color, label=what, markersize=7)
        ax.set(title=size, xlim=(0, 105), xlabel="share of the floor's speed (%)")
        ax.axvline(100, color="0.2", linewidth=1)
        both = here[here["what"] == "forward + backward"] if len(here) else here
        if len(both):
            parts.append(f"{size}: " + ", ".join(f"{r.layer} {100 * r.share_of_floor:.0f}%" for r in both.itertuples()))
        elif names:
            name_gaps(ax, [0])
    if names:
        axes[0].set_yticks(range(len(names)), names)
        axes[0].set_ylim(len(names) - 0.5, -0.5)
    legend_below(figure, axes[0])
    measured = rows["size"].unique() if len(rows) else []
    alt = "Share of the floor's speed, forward + backward. " + ("; ".join(parts) or "Nothing") + "." + missing_text(sizes, measured)
    columns = ["size", "layer", "what", "ms", "share_of_floor", "low_ms", "high_ms"]
    return Plot(figure, alt, rows.reindex(columns=columns).reset_index(drop=True))


def step_times(rows: list[dict]) -> Plot:
    """Time of a training step by arm and path: median, and the middle half of the repeats."""
    data = pd.DataFrame(rows, columns=["arm", "path", "ms", "low_ms", "high_ms", "tokens_per_second", "mfu", "peak_mb"])
    figure, (ax,) = new_figure(1.2 + 0.42 * max(len(data), 2))
    for y, row in enumerate(data.itertuples()):
        look = looks(data["arm"])[row.arm]
        ax.plot([row.low_ms, row.high_ms], [y, y], color=look.color, linewidth=2)
        ax.plot([row.ms], [y], linestyle="", markersize=8, **marks(look))
    ax.set_yticks(range(len(data)), [f"{row.arm}, {row.path}" for row in data.itertuples()])
    ax.set_ylim(max(len(data), 1) - 0.5, -0.5)
    ax.set_xlim(left=0)
    ax.set_xlabel("time of a training step (ms)")
    legend_below(figure, ax)
    text = "; ".join(f"{row.arm}, {row.path} {row.ms:.1f} ms" for row in data.itertuples())
    return Plot(figure, f"Time of a training step, median. {text or 'Not run'}.", data)


def growth(grown: pd.DataFrame, exponents: pd.DataFrame) -> Plot:
    """Time of the EC layer as one size grows: a panel per size, lines per path, and the floor.

    Args:
        grown: of `speed.growth`. exponents: of `speed.exponents`.
    """
    axes_named = list(dict.fromkeys(grown["axis"])) or ["n"]
    figure, panels = new_figure(3.4, len(axes_named))
    paths = list(dict.fromkeys(grown["path"]))
    for ax, axis in zip(panels, axes_named, strict=True):
        here = grown[grown["axis"] == axis]
        for path, look in looks(paths).items():
            rows = here[here["path"] == path]
            ax.plot(rows["value"], rows["ms"], linestyle=look.line, label=f"EC layer, {path}", **marks(look))
        floor = here.drop_duplicates("value")
        ax.plot(floor["value"], floor["floor_ms"], "--", color="0.4", label="floor: six products")
        if len(here):
            ax.set(xscale="log", yscale="log")
            ax.set_xticks(sorted(here["value"].unique()), [f"{v:,g}" for v in sorted(here["value"].unique())], fontsize=8)
            ax.minorticks_off()
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        ax.set_xlabel(LABELS[axis])
    panels[0].set_ylabel("forward + backward (ms)")
    legend_below(figure, panels[0])
    text = "; ".join(f"{row.path}, {row.size}: to the power {row.exponent:.2f}" for row in exponents.itertuples())
    return Plot(figure, sentence(f"time of the EC layer, forward + backward, grows with {text or 'what was not run'}."), grown)
