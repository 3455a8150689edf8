"""Pieces of pages as HTML, drawn by the macros of template/parts.html.j2, which escape what comes in; nothing needs a script."""

import html
import math
import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader
from latex2mathml.converter import convert
from markupsafe import Markup

TEMPLATE = Path(__file__).parent / "template"
Format = str | Callable[[Any], str]
_WRITTEN = {"gflops": "GFLOPs", "gpu": "GPU", "mfu": "MFU", "mb": "MB"}  # words in names of columns
# Of verdicts: white on them has a contrast above 4.5, and as marks they are seen on white and on black.
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


@cache
def _macros() -> Any:
    environment = Environment(loader=FileSystemLoader(TEMPLATE), autoescape=True)
    environment.globals["colors"] = COLORS
    return environment.get_template("parts.html.j2").module


def markup(name: str, *args: Any, **kwargs: Any) -> Markup:
    """What a macro of parts.html.j2 makes of its arguments; all of them are escaped but Markup."""
    return getattr(_macros(), name)(*args, **kwargs)


def table_html(frame: pd.DataFrame, caption: str = "", formats: Mapping[str, Format] | None = None) -> Markup:
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
    written = lambda name: " ".join(_WRITTEN.get(word, word) for word in str(name).replace("_", " ").split(" "))  # noqa: E731
    heads = [(written(name), _is_numeric(frame[name])) for name in frame.columns]
    cells = [[_cell(v, formats.get(name) or _by_size(frame[name])) for v in frame[name]] for name in frame.columns]
    return markup("table", heads, list(zip(*cells, strict=True)), caption)


def math_html(latex: str, mode: str = "inline") -> str:
    """LaTeX as MathML, which browsers draw by themselves; `mode`: "inline" or "block"."""
    return convert(latex, display=mode).replace("<math ", f'<math alttext="{html.escape(latex)}" ', 1)


def text_of(markup: str) -> str:
    """Markup without its tags, on one line."""
    return " ".join(html.unescape(re.sub(r"<[^>]+>", "", markup)).replace("`", "").split())


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


def _cell(value: Any, how: Format) -> str | None:
    if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bool):
        return "yes" if value else "no"
    if callable(how):
        return how(value)
    return how.format(value) if "{" in how else format(value, how)


def show_html(shown: str, text: str = "") -> None:
    """Show HTML in a notebook; where there is none a text, or what stands between the tags."""
    from IPython.display import display

    display({"text/html": str(shown), "text/plain": text or text_of(str(shown).replace("<", " <"))}, raw=True)
