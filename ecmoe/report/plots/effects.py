"""Differences with their intervals, side by side: what is ahead of what, and how sure that is."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from ecmoe.report.plots.parts import LABELS, Plot, interval_text, missing_text, name_gaps, sentence, short
from ecmoe.report.plots.style import legend_below, looks, marks, new_figure
from ecmoe.study.stats import Effect

# Below 0, above 0, and an interval that holds 0 or isn't there.
_COLORS = {"below": "#0072B2", "above": "#D55E00", "open": "#6F6F6F"}
_MARKERS = {"below": "<", "above": ">", "open": "o"}


def differences(effects: Mapping[str, Effect], label: str, below: str = "") -> Plot:
    """A row per difference: its mean, its 95% interval over paired seeds, and the line of no difference.

    Args:
        effects: what is compared -> the effect. label: of the axis, with its unit. below: what being left of 0 means.
    """
    figure, (ax,) = new_figure(1.5 + 0.42 * max(len(effects), 2))
    rows, parts = [], []
    for y, (name, effect) in enumerate(effects.items()):
        rows.append((name, effect.mean, effect.low, effect.high, effect.n))
        if not effect.n:
            continue
        side = _side(effect)
        style = {"color": _COLORS[side], "linewidth": 2}
        if effect.low is not None:
            ax.plot([effect.low, effect.high], [y, y], **style)
        ax.plot([effect.mean], [y], marker=_MARKERS[side], markersize=8, linestyle="", **style)
        parts.append(f"{name}: {effect}" + ("" if side == "open" else f", {side} 0"))
    ax.axvline(0, color="0.2", linewidth=1)
    name_gaps(ax, [y for y, effect in enumerate(effects.values()) if not effect.n])
    ax.set_yticks(range(len(effects)), list(effects))
    ax.set_ylim(max(len(effects), 1) - 0.5, -0.5)
    ax.set_xlabel(label + (f"\nleft of 0: {below}" if below else ""))
    data = pd.DataFrame(rows, columns=["comparison", "mean", "low", "high", "seeds"])
    data = data.astype({"low": float, "high": float})
    measured = [row[0] for row in rows if row[-1]]
    alt = f"{label}. {'; '.join(parts) or 'nothing'}.{missing_text(list(effects), measured)}"
    return Plot(figure, alt, data)


def ratios_along(lines: Mapping[str, pd.DataFrame], label: str, claimed: float) -> Plot:
    """A ratio on the way down to a loss, a line per comparison with its 95% interval over paired seeds.

    Args:
        lines: what is compared -> `stats.steps_ratio_along`. label: of the ratio. claimed: the paper's figure.
    """
    figure, (ax,) = new_figure(4.6)
    shown, parts = looks(lines), []
    for name, rows in lines.items():
        look = shown[name]
        if not len(rows):
            ax.plot([], [], linestyle="", label=f"{name} (not run)")
            continue
        ax.plot(rows["target"], rows["mean"], linestyle=look.line, linewidth=1.8, label=name, **marks(look))
        ax.fill_between(rows["target"], rows["low"], rows["high"], color=look.color, alpha=0.15, linewidth=0)
        last = rows.iloc[-1]
        parts.append(
            f"{name} {short(rows['mean'].iloc[0])} at {short(rows['target'].iloc[0])}, {short(last['mean'])}{interval_text(last)} at {short(last['target'])}"
        )
    if parts:
        ax.axhline(1, color="0.2", linewidth=1)
        ax.axhline(claimed, color="0.2", linewidth=1.2, linestyle="--", label=f"the paper: below {claimed:g}")
        ax.invert_xaxis()
        ax.set_ylim(0, None)
    ax.set_xlabel(f"{LABELS['val_loss']}, falling to the right")
    ax.set_ylabel(label)
    legend_below(figure, ax, 2)
    data = pd.concat(
        [rows.assign(comparison=name) for name, rows in lines.items()] or [pd.DataFrame(columns=["comparison"])],
        ignore_index=True,
    )
    missing = missing_text(list(lines), [name for name, rows in lines.items() if len(rows)])
    return Plot(figure, f"{sentence(label)} by loss: {'; '.join(parts) or 'nothing'}.{missing}", data)


def _side(effect: Effect) -> str:
    if effect.low is None or effect.low <= 0 <= effect.high:
        return "open"
    return "below" if effect.high < 0 else "above"
