"""Figures of causality: the same weights routed as trained and causally, side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes

from ecmoe.report.plots.parts import Plot, interval_text, missing_text, name_gaps, seeds_text, short
from ecmoe.report.plots.style import legend_below, new_figure
from ecmoe.study.stats import interval

TRAINED, CAUSAL = "as trained", "causally"
_MARKS = {
    TRAINED: {"color": "#0072B2", "marker": "o", "markersize": 8},
    CAUSAL: {"color": "#D55E00", "marker": "D", "markersize": 7, "markerfacecolor": "white", "markeredgewidth": 1.6},
}
_BETWEEN = "#000000"


def leak(frame: pd.DataFrame, value: str, label: str, difference: str, causal_first: bool = True) -> Plot:
    """What two routings of the same weights give, an arm a row; beside it their difference with its 95% interval.

    Args:
        frame: a row per arm, seed and routing ("as trained", "causally"), with `value`; NaN where not run. The arms'
            order is kept.
        value: the column. label: what it is, with its unit.
        difference: label of the second panel. causal_first: it is causally minus as trained; False: the reverse.
    """
    sign = 1 if causal_first else -1
    arms = list(dict.fromkeys(frame["arm"]))
    data = pd.concat([_means(frame, arm, value, sign) for arm in arms], ignore_index=True)
    figure, axes = new_figure(1.5 + 0.42 * max(len(arms), 2), 2, sharey=True)
    for name, marks in _MARKS.items():
        _rows(axes[0], data[data["routing"] == name], arms, name, marks)
    apart = data[data["routing"] == "difference"]
    _rows(axes[1], apart, arms, "difference", {"color": _BETWEEN, "marker": "s", "markersize": 7})
    axes[1].axvline(0, color="0.4", linewidth=1)
    axes[1].set_xlabel(difference)
    axes[0].set_xlabel(label + _from_zero(axes[0]))
    _name_rows(axes, arms, data)
    legend_below(figure, axes[0])
    return Plot(figure, _alt(data, arms, f"{label}, and {difference}"), data)


def leak_by_condition(frame: pd.DataFrame, value: str, condition: str, label: str) -> Plot:
    """What two routings of the same weights give, an arm a row, a panel for each condition.

    Args:
        frame: a row per arm, seed, routing and condition, with `value`; NaN where not run. condition: the column whose
            values are the panels' titles. label: what `value` is, with its unit.
    """
    arms, panels = list(dict.fromkeys(frame["arm"])), list(dict.fromkeys(frame[condition].dropna()))
    figure, axes = new_figure(1.7 + 0.42 * max(len(arms), 2), max(len(panels), 1), sharey=True)
    parts, frames = [], []
    for ax, panel in zip(axes, panels, strict=False):
        here = frame[(frame[condition] == panel) | frame[condition].isna()]
        data = pd.concat([_means(here, arm, value) for arm in arms], ignore_index=True)
        data = data[data["routing"] != "difference"]
        for name, marks in _MARKS.items():
            _rows(ax, data[data["routing"] == name], arms, name, marks)
        ax.axvline(0, color="0.4", linewidth=1)
        ax.set_title(panel)
        ax.set_xlabel(label)
        _name_rows([ax], arms, data)
        frames.append(data.assign(**{condition: panel}))
        parts.append(_alt(data, arms, f"{label}, {panel}"))
    legend_below(figure, axes[0])
    whole = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=["arm", "routing", "mean"])
    return Plot(figure, " ".join(parts) or f"{label}: nothing was run." + missing_text(arms, []), whole)


def serving_cost(frame: pd.DataFrame, sequence: int) -> Plot:
    """What it costs to serve one trained model otherwise than as trained, by the number of tokens that compete.

    Losses are compared seed by seed, so that what seeds have in common doesn't blur what the routing does.

    Args:
        frame: rows of `causality.losses_by_routing` with `seed`: way, pool_tokens, loss. sequence: T, tokens of one.
    """
    ways = {"causally": ("#D55E00", "-"), "global top-k": ("#009E73", ":")}
    names = {
        "causally": "one sequence, by running cut-offs",
        "global top-k": "one sequence, its best pairs (global top-k)",
    }
    frame = frame.dropna(subset="loss")
    trained = frame[frame["way"] == "as trained"].set_index("seed")["loss"]
    frame = frame.assign(cost=frame["loss"] - frame["seed"].map(trained))
    rows = []
    for (way, tokens), group in frame.groupby(["way", "pool_tokens"], dropna=False, sort=False):
        effect = interval(group["cost"])
        rows.append((way, tokens, effect.mean, effect.low, effect.high, effect.n))
    data = pd.DataFrame(rows, columns=["way", "pool_tokens", "mean", "low", "high", "seeds"]).astype(
        {"low": float, "high": float}
    )
    figure, (ax,) = new_figure(4.6)
    pools = data[~data["way"].isin([*ways, "as trained", "position"])].sort_values("pool_tokens")
    if len(pools):
        ax.plot(
            pools["pool_tokens"],
            pools["mean"],
            color="#000000",
            marker="o",
            linewidth=1.8,
            label="plain expert choice in pools of that size",
        )
        ax.vlines(pools["pool_tokens"], pools["low"], pools["high"], color="#000000", linewidth=1.5)
        ax.set_xscale("log", base=2)
        ax.set_xticks(
            pools["pool_tokens"],
            [f"{t:,.0f}" + ("\n1 sequence" if t == sequence else "") for t in pools["pool_tokens"]],
        )
        ax.minorticks_off()
    for way, (color, line) in ways.items():
        for row in data[data["way"] == way].itertuples():
            ax.axhline(row.mean, color=color, linestyle=line, linewidth=1.8, label=names[way])
            if not math.isnan(row.low):
                ax.axhspan(row.low, row.high, color=color, alpha=0.15, linewidth=0)
    ax.axhline(0, color="0.4", linewidth=1)
    ax.set_xlabel("tokens that compete (log)")
    ax.set_ylabel("loss minus that as trained\n(nats per token)")
    legend_below(figure, ax, 2)
    text = "; ".join(
        f"{names.get(r.way, f'pools of {r.pool_tokens:,.0f} tokens')} {short(r.mean)}{interval_text(r)}"
        for r in pd.concat([pools, data[data["way"].isin(ways)]]).itertuples()
    )
    return Plot(
        figure,
        f"Validation loss of the same weights minus that as trained, by how they are routed: {text or 'nothing was run'}.",
        data,
    )


def _means(frame: pd.DataFrame, arm: str, value: str, sign: int = 1) -> pd.DataFrame:
    """Mean and 95% interval of an arm by routing, and of sign x (causally minus as trained) over paired seeds."""
    one = frame[frame["arm"] == arm].pivot_table(index="seed", columns="routing", values=value, dropna=False)
    one = one.reindex(columns=[TRAINED, CAUSAL])
    rows, difference = [], sign * (one[CAUSAL] - one[TRAINED])
    for name, values in {TRAINED: one[TRAINED], CAUSAL: one[CAUSAL], "difference": difference}.items():
        effect = interval(values)
        rows.append((arm, name, effect.mean, effect.low, effect.high, effect.n))
    data = pd.DataFrame(rows, columns=["arm", "routing", "mean", "low", "high", "seeds"])
    return data.astype({"low": float, "high": float})


def _rows(ax: Axes, data: pd.DataFrame, arms: Sequence[str], label: str, marks: dict) -> None:
    y = [arms.index(arm) for arm in data["arm"]]
    # Two routings of an arm lie one above the other, so that equal ones are both seen.
    y = [at + {TRAINED: -0.12, CAUSAL: 0.12}.get(label, 0.0) for at in y]
    ax.hlines(y, data["low"], data["high"], color=marks["color"], linewidth=2)
    ax.plot(data["mean"], y, linestyle="", label=label, **marks)


def _name_rows(axes: Sequence[Axes], arms: Sequence[str], data: pd.DataFrame) -> None:
    measured = set(data.loc[data["seeds"] > 0, "arm"])
    for ax in axes:
        name_gaps(ax, [y for y, arm in enumerate(arms) if arm not in measured])
        ax.set_yticks(range(len(arms)), arms)
        ax.set_ylim(len(arms) - 0.5, -0.5)
        if measured:
            ax.locator_params(axis="x", nbins=12 // (1 + len(axes)))
        else:
            ax.set_xticks([])


def _from_zero(ax: Axes) -> str:
    low, high = ax.get_xlim()
    return "" if low <= 0 <= high else ";\nthe axis doesn't start at 0"


def _alt(data: pd.DataFrame, arms: Sequence[str], label: str) -> str:
    parts = []
    for arm in arms:
        rows = data[(data["arm"] == arm) & (data["seeds"] > 0)].set_index("routing")
        if len(rows):
            said = [f"{short(row['mean'])} {name}" for name, row in rows.iterrows() if name != "difference"]
            if "difference" in rows.index:
                row = next(rows.loc[["difference"]].itertuples())
                said.append(f"difference {row.mean:+.3f}{interval_text(row)}")
            parts.append(f"{arm} {', '.join(said)} ({seeds_text(rows['seeds'].max())})")
    found = "; ".join(parts) or "nothing"
    return f"{label}: {found}." + missing_text(arms, data.loc[data["seeds"] > 0, "arm"])
