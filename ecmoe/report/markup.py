"""Pieces of pages as HTML: tables, formulas, badges. Text that comes from data is escaped; nothing needs a script."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd
from markupsafe import Markup

Format = str | Callable[[Any], str]
# Of verdicts: white on them has a contrast above 4.5, and as marks they are seen on white and on black.
COLORS = {
    "reproduced": "#1a7f4b",
    "reproduced in direction": "#2f6fb0",
    "no effect": "#7a5195",
    "contradicted": "#c0392b",
    "undecided": "#866a00",
    "not run": "#5f6368",
    "plumbing only": "#5f6368",
}


def badge(label: str) -> Markup:
    """A verdict's label on its colour."""
    style = f"background:{COLORS.get(label, '#5f6368')};color:#fff;padding:.1em .7em;border-radius:1em;font-weight:600"
    return Markup('<span class="badge" style="{}">{}</span>').format(style, label)


def table_html(frame: pd.DataFrame, caption: str = "", formats: Mapping[str, Format] | None = None) -> str:
    """A table: escaped, numbers to the right, the first column heading its row; what is missing is a dash, never a 0.

    Args:
        frame: its index is not shown. caption: above it.
        formats: column -> format such as ".1f" or "{:.0%}", or a function; else by size. What a
            function returns is escaped too, unless it is markupsafe's Markup.
    """
    formats = formats or {}
    unknown = [name for name in formats if name not in frame.columns]
    if unknown:
        raise ValueError(f"formats names {unknown}, but the columns are {list(frame.columns)}")
    numeric = [_is_numeric(frame[name]) for name in frame.columns]
    head = "".join(
        f'<th scope="col"{_right(number, heading=True)}>{html.escape(str(name).replace("_", " "))}</th>'
        for name, number in zip(frame.columns, numeric, strict=True)
    )
    columns = [[_cell(v, formats.get(name) or _by_size(frame[name])) for v in frame[name]] for name in frame.columns]
    body = []
    for i, cells in enumerate(zip(*columns, strict=True)):
        marked = [f"<td{_right(number)}>{cell}</td>" for cell, number in zip(cells, numeric, strict=True)]
        wide = ' class="long"' * (len(str(frame.iat[i, 0])) > 12)  # wraps, but not to a word a line
        marked[0] = f'<th scope="row"{wide}{_right(numeric[0])}>{cells[0]}</th>'
        body.append(f"<tr>{''.join(marked)}</tr>")
    heading = f"<caption><span>{html.escape(caption)}</span></caption>" if caption else ""
    rows = "".join(body) or f'<tr><td colspan="{max(1, len(frame.columns))}">nothing</td></tr>'
    table = f"<table>{heading}<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{html.escape(caption or "table")}">{table}</div>'
    )


def folded(summary: str, inside: str) -> str:
    """What a reader opens to see."""
    return f'<details class="numbers"><summary>{html.escape(summary)}</summary>{inside}</details>'


def math_html(latex: str, mode: str = "inline", alt: str = "") -> str:
    """LaTeX as MathML, which browsers draw by themselves; `mode`: "inline" or "block"; `alt` says it in words."""
    from latex2mathml.converter import convert

    mathml = convert(latex, display=mode)
    return mathml.replace("<math ", f'<math alttext="{html.escape(alt or latex)}" ', 1)


def text_of(markup: str) -> str:
    """Markup without its tags, on one line."""
    return " ".join(html.unescape(re.sub(r"<[^>]+>", "", markup)).replace("`", "").split())


def _right(number: bool, heading: bool = False) -> str:
    whole = "" if heading else ";white-space:nowrap"  # a number in two lines is read as two
    return f' style="text-align:right{whole}"' if number else ""


def _is_numeric(column: pd.Series) -> bool:
    return pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column)


def _by_size(column: pd.Series) -> Format:
    """Whole numbers with commas; else three decimals below 100, and no false digits above."""
    if not _is_numeric(column):
        return str
    finite = column.dropna().abs()
    if (finite == finite.round()).all():
        return ",.0f"
    if finite.max() >= 1000:
        return ",.0f" if finite[finite > 0].min() >= 1 else ",g"  # what is there is no 0
    return ".1f" if finite.max() >= 100 else ".3f" if finite.max() >= 0.01 else ".2e"


def _cell(value: Any, how: Format) -> str:
    if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
        return '<span title="not measured">\u2013</span>'
    if isinstance(value, bool):
        return "yes" if value else "no"
    if callable(how):
        shown = how(value)
        return shown if isinstance(shown, Markup) else html.escape(str(shown))
    return html.escape(how.format(value) if "{" in how else format(value, how))


def show_html(markup: str, text: str) -> None:
    """Show HTML in a notebook, and a plain text where there is none."""
    from IPython.display import display

    display({"text/html": markup, "text/plain": text}, raw=True)
