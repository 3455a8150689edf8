"""Figures of causality: the same weights routed as trained and causally, side by side."""

import pandas as pd
from matplotlib.axes import Axes

from ecmoe.report.plots.draw import lines, panels, points
from ecmoe.report.plots.loss import rows
from ecmoe.report.plots.parts import Plot, nothing, number, over_seeds
from ecmoe.report.plots.style import INK, Look

TRAINED, CAUSAL = "as trained", "causally"
_LOOKS = {TRAINED: Look("#0072B2", "o"), CAUSAL: Look("#D55E00", "D")}


def leak(frame: pd.DataFrame, value: str, label: str, causal_first: bool = True) -> Plot:
    """How much the loss of the same weights changes by causal routing: an arm a row, over paired seeds.

    Args:
        frame: a row per arm, seed and routing ("as trained", "causally"), with `value`; NaN where not run.
        label: what `value` is, with its unit. causal_first: causally minus as trained; False: the reverse.
    """
    arms, (first, second) = list(dict.fromkeys(frame["arm"])), (CAUSAL, TRAINED) if causal_first else (TRAINED, CAUSAL)
    what = f"{label}, {first} minus {second}"
    wide = frame.pivot_table(index=["arm", "seed"], columns="routing", values=value, sort=False).reset_index()
    if not {TRAINED, CAUSAL} <= set(wide):
        return nothing(what, arms)
    plot = rows(wide.assign(difference=wide[first] - wide[second]), "difference", what, arms, difference=True)
    means = wide.groupby("arm", sort=False)[[TRAINED, CAUSAL]].mean().reset_index()
    return plot._replace(data=plot.data.merge(means, on="arm", how="left"))


def leak_by_condition(frame: pd.DataFrame, value: str, condition: str, label: str) -> Plot:
    """What two routings of the same weights give, an arm a row, a panel for each condition.

    Args:
        frame: a row per arm, seed, routing and condition, with `value`; NaN where not run. condition: the column whose
            values are the panels' titles. label: what `value` is, with its unit.
    """
    arms, there = list(dict.fromkeys(frame["arm"])), frame.dropna(subset=[value, condition])

    def draw(ax: Axes, here: pd.DataFrame) -> tuple[pd.DataFrame, str]:
        data = points(ax, here, value, order=arms, hue="routing", pairs=_LOOKS)
        ax.axvline(0, color=INK, linewidth=1)
        ax.locator_params(axis="x", nbins=4)
        ax.set_xlabel(label)
        for name, look in _LOOKS.items():
            ax.plot([], [], look.marker, color=look.color, label=name)
        return data, "; ".join(f"{row.arm}, {row.routing} {number(row)}" for row in data.itertuples())

    each, height = dict(iter(there.groupby(condition, sort=False))), 1.7 + 0.4 * max(len(arms), 2)
    return panels(label, draw, each, height, arms, there["arm"], key=condition, legend=2, sharey=True)


def serving_cost(frame: pd.DataFrame, sequence: int) -> Plot:
    """What it costs to serve one trained model otherwise than as trained, by the number of tokens that compete.

    Args:
        frame: rows of `causality.losses_by_routing` with `seed`: way, pool_tokens, loss. sequence: T, tokens of one.
    """
    names = {CAUSAL: "one sequence, by cut-offs", "global top-k": "one sequence, its best pairs"}
    what, frame = "loss minus that as trained, seed by seed (nats per token)", frame.dropna(subset=["loss"])
    trained = frame[frame["way"] == TRAINED].set_index("seed")["loss"]
    cost = frame.assign(cost=frame["loss"] - frame["seed"].map(trained)).dropna(subset=["cost"])
    pools = cost[~cost["way"].isin([*names, TRAINED, "position"])].assign(arm="pools of that size")
    # A way that has no pool is a level line from the smallest pool to the largest.
    span = pools["pool_tokens"].agg(["min", "max"])
    flat = [cost[cost["way"] == way].assign(arm=name, pool_tokens=x) for way, name in names.items() for x in span]

    def draw(ax: Axes, shown: pd.DataFrame) -> tuple[pd.DataFrame, str]:
        lines(ax, shown, "pool_tokens", "cost", log=True, ticks_at_values=True)
        values = sorted(pools["pool_tokens"].unique())
        ax.set_xticks(values, [f"{v:,.0f}" + ("\n1 sequence" if v == sequence else "") for v in values])
        ax.axhline(0, color=INK, linewidth=1)
        ax.set(xlabel="tokens that compete")
        data = over_seeds(cost, ["way", "pool_tokens"], "cost")
        said = [
            f"{names.get(row.way, f'pools of {row.pool_tokens:,.0f} tokens')} {number(row)}"
            for row in data[data["way"] != TRAINED].itertuples()
        ]
        return data, "; ".join(said)

    each = {"": pd.concat([pools, *flat], ignore_index=True)}
    return panels(
        f"{what}, by how a model is served", draw, each, 4.2, measured=cost["way"], ylabel=what.replace(", ", ",\n")
    )
