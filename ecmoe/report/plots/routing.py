"""Figures of routing: which experts process which tokens or images, and how many experts a token gets."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from ecmoe.model.metrics import SHARES
from ecmoe.report.plots.draw import heat, name_rows, panels
from ecmoe.report.plots.style import COUNT_COLORS, LINE, PAPER, Plot, on_color
from ecmoe.study.units import counted


def expert_shares(table: pd.DataFrame, paper: Mapping[str, float] | None = None) -> Plot:
    """Plot the share of tokens by the number of experts that processed them (C7): a stacked bar per arm.

    table: a row per arm and seed with share_0 ... share_8. paper: label -> share of the paper's bar: {"3 or 4: 23%": .23}."""
    names = [*map(str, range(8)), "8+"]
    of_arm = table.groupby("arm", sort=False)[SHARES]
    data, seeds = (100 * of_arm.mean()).set_axis(names, axis=1), of_arm.count()[SHARES[0]]
    there, what = data.dropna(how="all"), "share of tokens by the number of experts that processed them"

    def draw(ax: Axes, data: pd.DataFrame) -> tuple[pd.DataFrame, str]:
        data.fillna(0.0).plot.barh(stacked=True, ax=ax, color=COUNT_COLORS, edgecolor=PAPER, width=0.8, legend=False)
        for bars, color in zip(list(ax.containers), COUNT_COLORS, strict=True):
            texts = [f"{width:.0f}%" if width >= 4.3 else "" for width in bars.datavalues]
            ax.bar_label(bars, texts, label_type="center", fontsize=9, color=on_color(color))
        left, rows = 0.0, [*data.index, *["the paper (100M/64E)"] * bool(paper)]
        for text, share in (paper or {}).items():
            bar = ax.barh(len(data), 100 * share, left=left, color=LINE, edgecolor=PAPER)
            ax.bar_label(bar, [text], label_type="center", fontsize=9)
            left += 100 * share
        name_rows(ax, rows, {*there.index, *rows[len(data) :]})
        ax.set(xlim=(0, 100), xlabel="share of tokens (%), by the number of experts")
        ax.grid(False)
        said = "; ".join(
            f"{label}: {row['0']:.1f}% none, {row['1'] + row['2']:.1f}% one or two, {row['3'] + row['4']:.1f}% three or four, "
            f"{row[names[5:]].sum():.1f}% more" for label, row in there.iterrows()
        )  # fmt: skip
        return data.assign(seeds=seeds).reset_index(), said + (f". The paper: {', '.join(paper)}" if paper else "")

    return panels(what, draw, {"": data}, 1.5 + 0.5 * (len(data) + bool(paper)), data.index, there.index, legend=9)


def routing_matrix(weights: Mapping[str, object], tokens: Sequence[str]) -> Plot:
    """Plot combine weights, a panel per router (Fig. 1). weights: title -> (n, e), 0 where not routed. tokens: n labels."""

    def draw(ax: Axes, w: pd.DataFrame) -> tuple[pd.DataFrame, str]:
        taken = w > 0
        heat(ax, w.where(taken), ".2f", 0.0, max(1.0, float(w.max(axis=None))))
        ax.set_xticklabels([f"{name}\n{counted(n, 'token')}" for name, n in taken.sum().items()], fontsize=9)
        none = ", ".join(w.index[~taken.any(axis=1)])
        left = f"no expert takes {none}" if none else "every token is taken"
        return w.assign(token=w.index), f"experts hold {', '.join(map(str, taken.sum()))} tokens; {left}"

    given = {title: pd.DataFrame(np.asarray(w, float), tokens).add_prefix("expert ") for title, w in weights.items()}
    what, height = "combine weights, tokens by experts", 1.6 + 0.42 * len(tokens)
    return panels(what, draw, given, height, key="router", sharey=True)


def gate_choices(confusion: pd.DataFrame | None, related: pd.DataFrame | None, tasks: Sequence[str]) -> Plot:
    """Plot which expert the gates send each task's images to, and how related the tasks are.

    confusion: (K, K) share of a row's images sent to a column's expert. related: (K, K) relatedness of a row's task to a column's.
    None: not run. tasks: K names."""
    what = "which expert the gates send a task's images to"
    if confusion is None or related is None:
        return panels(what, None, {}, 0)
    own = pd.Series(confusion.to_numpy(float).diagonal(), tasks)
    earlier = np.where(np.tri(len(related), k=-1, dtype=bool), related.to_numpy(float), -np.inf)
    i, j = np.unravel_index(earlier.argmax(), earlier.shape)
    fewest = f"fewest of {own.idxmin()} ({100 * own.min():.1f}%)"
    found = f"on average {100 * own.mean():.1f}% of a task's images go to its own expert, {fewest}"
    closest = f"1 to itself; to an earlier task at most {earlier[i, j]:.2f} ({tasks[i]} to {tasks[j]})"

    def draw(ax: Axes, given: tuple) -> tuple[pd.DataFrame, str]:
        matrix, said, columns, form, *limits = given
        named = pd.DataFrame(matrix.to_numpy(float), list(tasks), [str(c + 1) for c in range(len(tasks))])
        heat(ax, named, form, *limits)
        ax.set_xlabel(columns)
        return named.rename_axis("task").reset_index(), said

    each = {
        "images sent to each expert (%)": (100 * confusion, found, "expert", ".1f", 0.0, 100.0),
        "relatedness": (related, closest, "gate of task", ".2f", None, None),  # all near 1
    }
    return panels(what, draw, each, 1.5 + 0.42 * max(4, len(tasks)), ylabel="images of task")
