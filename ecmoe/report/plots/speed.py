"""Figures of speed: layers against their floor (the time of their matrix products alone), training steps, growth with
each size, and a step's time by kind of work. The bench has computed medians and quartiles already."""

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, LogLocator

from ecmoe.bench.rows import BOTH, EAGER, FORWARD
from ecmoe.report.plots.draw import LABELS, from_zero, panels
from ecmoe.report.plots.style import GREY, INK, PAPER, Plot, looks

_COLORS = {FORWARD: "#0072B2", BOTH: "#D55E00"}


def share_of_floor(layers: pd.DataFrame) -> Plot:
    """Plot each layer's speed as a share of its floor's, forward and forward + backward; a panel per size. layers: from `speed.layers`."""
    columns = ["size", "name", "what", "ms", "share_of_floor", "low_ms", "high_ms"]
    rows = layers.reindex(columns=columns)[layers["layer"].ne("floor") & layers["what"].isin(_COLORS)]
    rows = rows.assign(percent=100 * rows["share_of_floor"].astype(float))
    names, each = list(rows["name"].unique()), dict(iter(rows.groupby("size", sort=False)))

    def draw(ax: Axes, here: pd.DataFrame) -> tuple[pd.DataFrame, str]:
        sns.pointplot(here, x="percent", y="name", hue="what", order=names, hue_order=list(_COLORS), palette=_COLORS,
                      markers=["o", "D"], dodge=0.3, linestyle="none", errorbar=None, markersize=6, ax=ax)  # fmt: skip
        ax.get_legend().remove()
        ax.axvline(100, color=INK, linewidth=1)
        middle = here is list(each.values())[len(each) // 2]  # one label for all panels: adjacent labels would touch
        ax.set(xlim=(0, 105), ylabel="", xlabel="share of the floor's speed (%)" * middle)
        said = ", ".join(f"{row.name} {row.percent:.0f}%" for row in here[here["what"] == BOTH].itertuples())
        shown = here[["name", "what", "ms", "share_of_floor", "low_ms", "high_ms"]].rename(columns={"name": "layer"})
        return shown, said

    what, height = f"speed of a layer, as a share of its floor's, {BOTH}", 1.6 + 0.28 * max(len(names), 2)
    return panels(what, draw, each, height, layers["size"].unique(), each, key="size", legend=2, sharey=True)


def over_plain(auto: pd.DataFrame) -> Plot:
    """Plot the time of the layer that a run would choose, divided by plain PyTorch's, over size; a panel per mode. auto: from `bench_auto`."""
    width = LABELS["d_model"]
    rows = auto.sort_values("d_model", kind="stable").rename(columns={"d_model": width, "what": ""})
    rows[width] = rows[width].map("{:,}".format)

    def draw(ax: Axes, mode: str) -> tuple[pd.DataFrame, str]:
        here = rows[rows["mode"] == mode]
        sns.lineplot(here, x="n", y="ratio", hue=width, style="", style_order=[BOTH, FORWARD], markers=["o", "D"],
                     palette="colorblind", markeredgecolor=PAPER, errorbar=None, ax=ax)  # fmt: skip
        ax.get_legend().remove()
        samples, _ = ax.get_legend_handles_labels()
        for sample in samples[-2:]:  # of both kinds of line, which seaborn draws in a dark grey
            sample.set(color=INK)
        ax.axhline(1, color=INK, linewidth=1)
        ax.set(xscale="log", ylabel="", xlabel=LABELS["n"])
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))
        worst = here.loc[here["ratio"].idxmax()]
        where = f"n {worst['n']:,} and d {worst[width]}, {worst['']}"
        return auto[auto["mode"] == mode], f"{here['ratio'].min():.2f} to {worst['ratio']:.2f}, at {where}"

    what, each = "time of a layer as a run gets it, over that of plain PyTorch", {mode: mode for mode in rows["mode"]}
    return panels(what, draw, each, 3.4, ylabel="time / plain PyTorch's time", legend=8, sharey=True)


def step_times(steps: pd.DataFrame) -> Plot:
    """Plot the median time of a training step and its quartiles, a row per arm and path, for own and even routing."""
    columns = ["arm", "path", "mode", "routing", "ms", "low_ms", "high_ms", "tokens_per_second", "mfu", "peak_mb"]
    data = steps.reindex(columns=columns).dropna(subset=["ms"]).reset_index(drop=True)
    data = data.astype({"arm": str, "path": str, "mode": str})  # without rows they are columns of numbers
    data["path"] += data.pop("mode").map(lambda mode: "" if mode == EAGER else f", {mode}")
    row, lines = pd.factorize(data["arm"] + ", " + data["path"])
    shown, even = looks(data["arm"]), data["routing"].eq("even")

    def draw(ax: Axes, data: pd.DataFrame) -> tuple[pd.DataFrame, str]:
        colors, y = np.array([shown[arm].color for arm in data["arm"]]), row + np.where(even, 0.15, -0.15)
        ax.hlines(y, data["low_ms"], data["high_ms"], color=colors, linewidth=2)
        ax.scatter(data["ms"], y, s=49, c=np.where(even, PAPER, colors), edgecolors=colors, zorder=3)
        for label, fill in (("routed by its own router", GREY), ("routed evenly, by force", PAPER)):
            ax.plot([], [], "o", color=GREY, markerfacecolor=fill, markersize=7, label=label)
        ax.set_yticks(range(len(lines)), lines)
        ax.set(ylim=(len(lines) - 0.5, -0.5), xlabel=from_zero("time of a training step (ms)", *ax.get_xlim()))
        return data, "; ".join(f"{r.arm}, {r.routing} routing, {r.path} {r.ms:.1f} ms" for r in data.itertuples())

    height = 1.2 + 0.32 * max(len(lines), 2)
    return panels("time of a training step, median", draw, {"": data}, height, measured=data["arm"], legend=2)


def growth(grown: pd.DataFrame, exponents: pd.DataFrame) -> Plot:
    """Plot the EC layer's time as one size grows, a panel per size: times (from `bench_growth`), floor, and powers (`exponents`)."""

    def draw(ax: Axes, fit: object) -> tuple[pd.DataFrame, str]:
        here = grown[grown["axis"] == fit.axis].sort_values("value")
        x = here["value"].astype(float)
        ax.plot(x, here["floor_ms"], "--", color=GREY, label="floor: six products")
        last = x.tail(2)
        ax.plot(last, fit.at_1 * last**fit.exponent, color=_COLORS[FORWARD], linewidth=1.5, label="power of the size")
        ax.vlines(x, here["low_ms"], here["high_ms"], color=_COLORS[FORWARD])
        ax.plot(x, here["ms"], "o", color=_COLORS[FORWARD], label="EC layer")
        ax.set(xscale="log", yscale="log")
        ax.set_xlabel(f"power {fit.exponent:.2f}, floor {fit.of_floor:.2f}", fontsize=9)
        ax.set_xticks(x, [f"{v / 1024:g}k" if v >= 8192 and v % 1024 == 0 else f"{v:g}" for v in x], fontsize=9)
        ax.minorticks_off()
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        shown = here.reindex(columns=["axis", "value", "ms", "low_ms", "high_ms", "floor_ms"])
        return shown, f"to the power {fit.exponent:.2f}, the floor {fit.of_floor:.2f}"

    each = {LABELS[fit.axis] + ", f = 4 d" * (fit.axis == "d_model"): fit for fit in exponents.itertuples()}
    what = "how the time of the EC layer, forward + backward, grows"
    return panels(what, draw, each, 3.6, ylabel="forward + backward (ms)", legend=3, sharey=True)


def profile(kinds: pd.DataFrame) -> Plot:
    """Plot a training step's time by kind of work, a bar each. kinds: from `bench_profile`."""
    data = kinds.reindex(columns=["kind", "ms", "share", "most"])

    def draw(ax: Axes, data: pd.DataFrame) -> tuple[pd.DataFrame, str]:
        colors = [GREY if kind == "idle" else _COLORS[FORWARD] for kind in data["kind"]]
        bars = ax.barh(data["kind"], 100 * data["share"].astype(float), color=colors)
        ax.bar_label(bars, [f"{ms:.1f} ms" for ms in data["ms"]], padding=4, fontsize=9)
        ax.margins(x=0.12)
        ax.invert_yaxis()
        ax.set(xlabel="share of a training step's time (%)")
        ax.grid(axis="y", visible=False)
        return data, "; ".join(f"{row.kind} {100 * row.share:.0f}%" for row in data.itertuples())

    what, height = "where the time of a training step goes", 1.1 + 0.3 * max(len(data), 2)
    return panels(what, draw, {"": data}, height, measured=data["kind"])
