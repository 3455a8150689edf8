"""What a notebook shows: figures with alternative text, tables, text, formulas. The answer on top is `answer`'s.

Everything is HTML that needs no script and no network, with a plain text beside it.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

import pandas as pd

from ecmoe.report.answer import answer, difference, finding, judged
from ecmoe.report.markup import Format, folded, math_html, show_html, table_html
from ecmoe.report.plots.parts import Plot
from ecmoe.report.plots.style import count_colors, on_color
from ecmoe.report.provenance import provenance

__all__ = [
    "answer", "difference", "finding", "formula", "judged", "provenance", "show", "show_runs", "show_table", "show_text",
]  # fmt: skip


def show(plot: Plot, caption: str, formats: Mapping[str, Format] | None = None) -> None:
    """Show a figure with its alternative text and caption, its numbers folded below; where nothing was run, that."""
    if plot.figure is None:
        show_html(f'<p class="not-run">Not run: {html.escape(caption)}</p>', f"Not run: {caption}\n{plot.alt}")
        return
    show_html(
        f'<figure><div class="plot" tabindex="0" role="region" aria-label="figure">{plot.svg()}</div>'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        + folded("numbers of this figure", table_html(plot.data, "", formats)),
        f"{caption}\n{plot.alt}",
    )


def show_table(
    frame: pd.DataFrame, caption: str = "", formats: Mapping[str, Format] | None = None, fold: str = ""
) -> None:
    """Show a table.

    Args:
        frame, caption, formats: as in `markup.table_html`. fold: what the reader opens to see it; "": it is open.
    """
    markup = table_html(frame, caption, formats)
    show_html(folded(fold, markup) if fold else markup, f"{caption}\n{frame.to_string(index=False)}")


def show_runs(table: pd.DataFrame, columns: Sequence[str], caption: str = "") -> None:
    """Show a table of runs, folded: a row for each that is there, a sentence for those that aren't."""
    there = table[table["status"] != "not run"]
    missing = table.loc[table["status"] == "not run"].groupby("arm", sort=False)["seed"]
    named = "; ".join(f"{arm} (seed {', '.join(map(str, seeds))})" for arm, seeds in missing)
    if named:
        caption += f" Not run: {named}."
    columns = ["arm", "seed", *columns]
    if (there["status"] != "finished").any():
        columns.insert(2, "status")
    show_table(there.reindex(columns=columns), caption, fold=f"{len(there)} of {len(table)} runs, one by one")


def show_text(tokens: Sequence[str], counts: Sequence[int], caption: str, unit: str = "expert") -> None:
    """Show text with each token on the colour of its count, as in `plots.expert_shares`; 0 is struck through.

    Args:
        tokens: the text in pieces; escaped. counts: a whole number for each. unit: what is counted.
    """
    if len(tokens) != len(counts):
        raise ValueError(f"{len(tokens)} tokens but {len(counts)} counts: there must be one for each")
    colors = count_colors()

    def mark(text: str, count: int) -> str:
        color = colors[min(count, len(colors) - 1)]
        style = f"background:{color};color:{on_color(color)}"
        style += ";text-decoration:line-through" * (not count)
        return f'<span style="{style}" title="{times(count)}">{html.escape(text)}</span>'

    def times(count: int) -> str:
        return f"{count} {unit}{'' if count == 1 else 's'}"

    pairs = list(zip(tokens, counts, strict=True))
    pieces = [mark(text.replace("\n", "\u23ce\n"), count) for text, count in pairs]
    key = " ".join(mark(f"\u00a0{times(count)}\u00a0", count) for count in sorted(set(counts)))
    show_html(
        f'<figure class="text"><p>{key}</p><pre>{"".join(pieces)}</pre>'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>",
        f"{caption}\n" + " ".join(f"{text!r}:{count}" for text, count in pairs),
    )


def formula(latex: str, alt: str = "") -> None:
    """Show a formula as MathML, which browsers draw by themselves; `alt` says it in words."""
    show_html(math_html(latex, "block", alt), alt or latex)
