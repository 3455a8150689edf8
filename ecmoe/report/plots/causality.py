"""Figures of causality: the same weights routed as trained and causally, side by side."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes

from ecmoe.report.plots.draw import lines, name_gaps, points, rows_text
from ecmoe.report.plots.parts import (
    Plot,
    bounds,
    drawn,
    interval_text,
    missing_text,
    nothing,
    over_seeds,
    sentence,
    short,
)
from ecmoe.report.plots.style import INK, legend_below, new_figure

TRAINED, CAUSAL = "as trained", "causally"
_COLORS = {TRAINED: "#0072B2", CAUSAL: "#D55E00"}
_MARKERS = {TRAINED: "o", CAUSAL: "D"}


@drawn
def leak(frame: pd.DataFrame, value: str, label: str, causal_first: bool = True) -> Plot:
    """How much the loss of the same weights changes by causal routing: an arm a row, over paired seeds.

    Args:
        frame: a row per arm, seed and routing ("as trained", "causally"), with `value`; NaN where not run.
        label: what `value` is, with its unit. causal_first: causally minus as trained; False: the reverse.
    """
    arms = list(dict.fromkeys(frame["arm"]))
    wide = frame.pivot_table(index=["arm", "seed"], columns="routing", values=value, sort=False)
    what = f"{label}, {f'{CAUSAL} minus {TRAINED}' if causal_first else f'{TRAINED} minus {CAUSAL}'}"
    if not {TRAINED, CAUSAL} <= set(wide):
        return nothing(what, arms)
    apart = (1 if causal_first else -1) * (wide[CAUSAL] - wide[TRAINED])
    figure, (ax,) = new_figure(1.5 + 0.4 * max(len(arms), 2))
    data = points(ax, apart.rename("difference").reset_index(), "difference", order=arms)
    ax.axvline(0, color=INK, linewidth=1)
    ax.set_xlabel(what)
    means = over_seeds(wide.reset_index().melt(["arm", "seed"]), ["arm", "routing"], "value")
    data = data.merge(means.pivot(index="arm", columns="routing", values="mean").reset_index(), on="arm", how="left")
    return Plot(
        figure, f"{sentence(what)}: {rows_text(data)}.{missing_text(arms, apart.dropna().index.unique('arm'))}", data
    )


@drawn
def leak_by_condition(frame: pd.DataFrame, value: str, condition: str, label: str) -> Plot:
    """What two routings of the same weights give, an arm a row, a panel for each condition.

    Args:
        frame: a row per arm, seed, routing and condition, with `value`; NaN where not run. condition: the column whose
            values are the panels' titles. label: what `value` is, with its unit.
    """
    arms, panels = list(dict.fromkeys(frame["arm"])), list(dict.fromkeys(frame[condition].dropna()))
    there = frame.dropna(subset=[value, condition])
    if not len(there):
        return nothing(label, arms)
    figure, axes = new_figure(1.7 + 0.4 * max(len(arms), 2), len(panels), sharey=True)
    for ax, panel in zip(axes, panels, strict=True):
        _two_routings(ax, there[there[condition] == panel], value, arms)
        ax.axvline(0, color=INK, linewidth=1)
        ax.set_title(panel, fontsize=10)
        ax.set_xlabel(label)
    legend_below(figure, axes[0])
    data = over_seeds(there, [condition, "arm", "routing"], value)
    said = "; ".join(
        f"{r[condition]}, {r.arm}, {r.routing} {short(r['mean'])}{interval_text(r)}" for _, r in data.iterrows()
    )
    return Plot(figure, f"{sentence(label)}: {said}.{missing_text(arms, data['arm'])}", data)


def _two_routings(ax: Axes, frame: pd.DataFrame, value: str, arms: Sequence[str]) -> None:
    sns.pointplot(
        frame, x=value, y="arm", hue="routing", order=arms, hue_order=list(_COLORS), palette=_COLORS, markers=list(_MARKERS.values()),
        dodge=0.25, errorbar=bounds, linestyle="none", markersize=7, linewidth=2, ax=ax,
    )  # fmt: skip
    ax.get_legend().remove()
    name_gaps(ax, [y for y, arm in enumerate(arms) if arm not in set(frame["arm"])])
    ax.set(ylabel="", ylim=(len(arms) - 0.5, -0.5))
    ax.locator_params(axis="x", nbins=4)


@drawn
def serving_cost(frame: pd.DataFrame, sequence: int) -> Plot:
    """What it costs to serve one trained model otherwise than as trained, by the number of tokens that compete.

    Args:
        frame: rows of `causality.losses_by_routing` with `seed`: way, pool_tokens, loss. sequence: T, tokens of one.
    """
    names = {"causally": "one sequence, by cut-offs", "global top-k": "one sequence, its best pairs"}
    what, frame = "loss minus that as trained, seed by seed (nats per token)", frame.dropna(subset=["loss"])
    trained = frame[frame["way"] == TRAINED].set_index("seed")["loss"]
    cost = frame.assign(cost=frame["loss"] - frame["seed"].map(trained)).dropna(subset=["cost"])
    if not len(cost):
        return nothing(what)
    pools = cost[~cost["way"].isin([*names, TRAINED, "position"])].assign(arm="pools of that size")
    figure, (ax,) = new_figure(4.2)
    # A way that has no pool is a level line from the smallest pool to the largest.
    span = pools["pool_tokens"].agg(["min", "max"])
    flat = [cost[cost["way"] == way].assign(arm=name, pool_tokens=x) for way, name in names.items() for x in span]
    shown = pd.concat([pools, *flat], ignore_index=True)
    data = lines(ax, shown, "pool_tokens", "cost", log=True, ticks_at_values=True)
    values = sorted(pools["pool_tokens"].unique())
    ax.set_xticks(values, [f"{v:,.0f}" + ("\n1 sequence" if v == sequence else "") for v in values])
    ax.axhline(0, color=INK, linewidth=1)
    ax.set(xlabel="tokens that compete", ylabel=what.replace(", ", ",\n"))
    data = over_seeds(cost, ["way", "pool_tokens"], "cost")
    said = "; ".join(f"{names.get(r.way, f'pools of {r.pool_tokens:,.0f} tokens')} {short(r.mean)}{interval_text(r)}"
                     for r in data[data["way"] != TRAINED].itertuples())  # fmt: skip
    return Plot(figure, f"{sentence(what)}, by how a model is served: {said}.", data)
