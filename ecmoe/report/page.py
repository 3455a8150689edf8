"""Functions that notebooks call to show figures with alternative text, tables and text, as HTML without scripts or requests.

`answer` and its neighbours, for the top of a page, are in report/answer.py.
"""

from collections.abc import Mapping, Sequence

import pandas as pd

from ecmoe.report.answer import NOTHING, answer, at_size, difference, finding, judged
from ecmoe.report.markup import Format, markup, show_html, table_html
from ecmoe.report.plots.style import COUNT_COLORS, Plot, on_color
from ecmoe.report.provenance import provenance
from ecmoe.study.estimate import counted

__all__ = [
    "answer", "at_size", "difference", "finding", "judged", "provenance", "show", "show_runs", "show_table", "show_text",
]  # fmt: skip


def show(plot: Plot, caption: str) -> None:
    """Show a figure with alternative text and caption, its numbers folded below; without runs, "Not run" and the caption.

    A sentence about the intervals is added to the caption if the figure has any.
    """
    if plot.figure is None:
        show_html(markup("not_run_yet", caption))
    else:
        seeds = plot.data.get("seeds", pd.Series(dtype=int))
        if (many := seeds[seeds > 1]).any():
            n = " to ".join(f"{n:g}" for n in dict.fromkeys((many.min(), many.max())))
            caption += f" Intervals: 95% over {n} seeds, each by itself."
        show_html(markup("figure", plot.svg(), caption, table_html(plot.data)), f"{caption}\n{plot.alt}")


def show_table(
    frame: pd.DataFrame, caption: str = "", formats: Mapping[str, Format] | None = None, fold: str = ""
) -> None:
    """Show a table, or "Not run" if all values beyond its first column are missing.

    Arguments as in `markup.table_html`; fold: a summary under which the table is folded; "": the table is shown open.
    """
    values = frame.iloc[:, 1:]
    if not fold and values.shape[1] and (values.isna() | values.eq(NOTHING)).all(axis=None):
        show_html(markup("not_run_yet", caption))
        return
    shown = table_html(frame, caption, formats)
    show_html(markup("folded", fold, shown) if fold else shown)


def show_runs(table: pd.DataFrame, columns: Sequence[str], caption: str = "") -> None:
    """Show a folded table with a row per run, and the names of missing runs in its caption."""
    there = table[table["status"] != "not run"]
    missing = table.loc[table["status"] == "not run"].groupby("arm", sort=False)["seed"]
    named = "; ".join(f"{arm} (seed {', '.join(map(str, seeds))})" for arm, seeds in missing)
    if named:
        caption += f" Not run: {named}."
    columns = ["arm", "seed", *["status"] * bool((there["status"] != "finished").any()), *columns]
    show_table(there.reindex(columns=columns), caption, fold=f"{len(there)} of {len(table)} runs, one by one")


def show_text(tokens: Sequence[str], counts: Sequence[int], caption: str) -> None:
    """Show text with each token coloured by its number of experts, as in `plots.expert_shares`; 0 is struck through."""

    def piece(text: str, count: int) -> tuple:
        color = COUNT_COLORS[min(count, len(COUNT_COLORS) - 1)]
        return text, color, on_color(color), not count, counted(count, "expert")

    pieces = [piece(text.replace("\n", "\u23ce\n"), count) for text, count in zip(tokens, counts, strict=True)]
    key = [piece(f"\u00a0{counted(count, 'expert')}\u00a0", count) for count in sorted(set(counts))]
    show_html(markup("text", pieces, key, caption))
