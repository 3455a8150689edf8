"""HTML building blocks of pages, made by the macros of template/parts.html.j2, which escape their arguments; no scripts."""

import html
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader
from latex2mathml.converter import convert
from markupsafe import Markup, escape

from ecmoe.study.units import between, counted

TEMPLATE = Path(__file__).parent / "template"
Format = str | Callable[[Any], str]
_WRITTEN = {"gflops": "GFLOPs", "gpu": "GPU", "mfu": "MFU", "mb": "MB"}  # spelling of words in column headings
# Colours of verdicts: white text on them has a contrast above 4.5, and they are visible on white and on black.
COLORS = {
    "reproduced": "#1a7f4b",
    "reproduced in direction": "#2f6fb0",
    "no effect": "#7a5195",
    "contradicted": "#c0392b",
    "undecided": "#866a00",
    "finding": "#2f6fb0",
    "not run": "#5f6368",
    "plumbing only": "#5f6368",
}
_TEMPLATES = Environment(loader=FileSystemLoader(TEMPLATE), autoescape=True)
_TEMPLATES.globals |= {"colors": COLORS, "between": between, "counted": counted}


def markup(name: str, *args: Any) -> Markup:
    """Call a macro of parts.html.j2. Arguments are escaped, unless they are Markup."""
    return getattr(_TEMPLATES.get_template("parts.html.j2").module, name)(*args)


def table_html(frame: pd.DataFrame, caption: str = "", formats: Mapping[str, Format] = {}) -> Markup:
    """Return a DataFrame, without its index, as an escaped HTML table; the first column is the row header, missing values are dashes.

    formats: column -> a format such as ".1f" or "{:.0%}", or a function whose result is escaped unless it is Markup. Other
    columns are formatted by the size of their numbers. A ValueError for an unknown column."""
    unknown = [name for name in formats if name not in frame.columns]
    if unknown:
        raise ValueError(f"formats names {unknown}, but the columns are {list(frame.columns)}")
    heads, cells = [], []
    for name, column in frame.items():
        words = (_WRITTEN.get(word, word) for word in str(name).replace("_", " ").split(" "))
        heads.append((" ".join(words), _is_numeric(column)))
        cells.append([_cell(value, formats.get(name) or _by_size(column)) for value in column])
    return markup("table", heads, list(zip(*cells, strict=True)), caption)


def math_html(latex: str, mode: str = "inline") -> str:
    """Convert LaTeX to MathML, which browsers render without a script. mode: "inline" or "block"."""
    return convert(latex, display=mode).replace("<math ", f'<math alttext="{html.escape(latex)}" ', 1)


def text_of(markup: str) -> str:
    """Return the text of markup on one line, without tags and backticks."""
    return " ".join(html.unescape(re.sub(r"<[^>]+>", "", markup)).replace("`", "").split())


def _is_numeric(column: pd.Series) -> bool:
    return pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column)


def _by_size(column: pd.Series) -> Format:
    """Choose a format: thousands separators for whole numbers, else fewer decimals the larger the numbers are."""
    if not _is_numeric(column):
        return escape  # which leaves Markup as it is
    finite = column.dropna().abs()
    if (finite == finite.round()).all():
        return ",.0f"
    if finite.max() >= 1000:
        return ",.0f" if finite[finite > 0].min() >= 1 else ",g"  # keeps small values from being shown as 0
    return ".1f" if finite.max() >= 100 else ".3f" if finite.max() >= 0.01 else ".3g"


def _cell(value: Any, how: Format) -> str | None:
    if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bool):
        return "yes" if value else "no"
    if callable(how):
        return how(value)
    return how.format(value) if "{" in how else format(value, how)


def show_html(shown: str, text: str = "") -> None:
    """Show HTML in a notebook. Front ends without HTML show `text`, by default the HTML without its tags."""
    from IPython.display import display

    display({"text/html": str(shown), "text/plain": text or text_of(str(shown).replace("<", " <"))}, raw=True)
