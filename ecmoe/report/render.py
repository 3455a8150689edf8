"""Executed notebooks as pages, by nbconvert with a template of our own, and the index of them.

A page is one file: no script, no request, formulas as MathML, code folded away.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat
from nbconvert.exporters import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from pygments.formatters import HtmlFormatter
from traitlets.config import Config

from ecmoe import paths
from ecmoe.files import write_text
from ecmoe.report.page import math_html

_HERE = Path(__file__).parent
_SCOREBOARD = "12_scoreboard"


def render(
    ipynb: str | Path,
    out_html: str | Path,
    error: Mapping[str, Any] | None = None,
    footer: str = "",
) -> Path:
    """Render an executed notebook as a page, written by rename.

    Args:
        error: shown on top: {"where": text, "what": text, "cell": number or None}.
    """
    notebook = nbformat.read(ipynb, as_version=4)
    write_text(Path(out_html), page_html(notebook, error, footer))
    return Path(out_html)


def page_html(notebook: Any, error: Mapping[str, Any] | None = None, footer: str = "") -> str:
    """An executed notebook as a page of HTML."""
    notebook.cells = [c for c in notebook.cells if "papermill-error-cell-tag" not in c.metadata.get("tags", [])]
    toc: list[dict[str, Any]] = []
    markdown = MarkdownWithMath(renderer=_Markdown(toc))
    title = description = ""
    for number, cell in enumerate(notebook.cells, 1):
        cell.page = {"number": number, "opens": False}
        if cell.cell_type == "markdown":
            cell.page["html"] = markdown.render(cell.source)
            if not title and (heading := re.search(r"^#\s+(.+)$", cell.source, re.MULTILINE)):
                title, cell.page["opens"] = heading[1].strip(), True
                paragraph = re.search(r"<p>(.*?)</p>", cell.page["html"], re.DOTALL)
                description = _text(paragraph[1]) if paragraph else ""
        elif cell.cell_type == "code":
            tags = cell.metadata.get("tags", [])
            names = {
                "parameters": "parameters and their defaults",
                "injected-parameters": "parameters of this report",
            }
            cell.page["label"] = next((names[tag] for tag in tags if tag in names), "code")
            cell.page["failed"] = bool(error) and error["cell"] == number
            _join_streams(cell)
    page = {
        "title": _text(title) or "Report",
        "description": description,
        "toc": [heading for heading in toc if heading["level"] in (2, 3)],
        "css": _css(),
        "error": error,
        "footer": footer or "Made from a notebook; this page sends no request and runs no script.",
    }
    priority = ["text/html", "image/png", "text/plain"]
    exporter = HTMLExporter(
        config=Config({"NbConvertBase": {"display_data_priority": priority}}),
        template_name="template",
        extra_template_basedirs=[str(_HERE)],
    )
    return exporter.from_notebook_node(notebook, {"page": page})[0]


class _Markdown(IPythonRenderer):
    """Markdown with $formulas$ as MathML, and headings that the table of contents can link to."""

    def __init__(self, toc: list[dict[str, Any]]) -> None:
        super().__init__(escape=False, exclude_anchor_links=True)
        self.toc = toc

    def heading(self, text: str, level: int, **attrs: Any) -> str:
        plain = re.sub(r"[^\w]+", "-", _text(text).lower()).strip("-") or "section"
        taken = sum(entry["plain"] == plain for entry in self.toc)
        name = f"{plain}-{taken + 1}" if taken else plain
        self.toc.append({"id": name, "plain": plain, "level": level, "html": re.sub(r"</?a[^>]*>", "", text)})
        return f'<h{level} id="{name}">{text}</h{level}>\n'

    def block_math(self, body: str) -> str:
        return math_html(body.strip(), "block")

    def inline_math(self, body: str) -> str:
        return math_html(body.strip())

    def latex_environment(self, name: str, body: str) -> str:
        return math_html(f"\\begin{{{name}}}{body}\\end{{{name}}}", "block")


def _join_streams(cell: Any) -> None:
    """One log per cell, however many pieces its lines came in, after what the cell shows."""
    outputs, logs = [], []
    for output in cell.outputs:
        is_log = output.output_type == "stream" and output.name == "stderr"
        (logs if is_log else outputs).append(output)
    if logs:
        logs[0].text = "".join(output.text for output in logs)
    cell.outputs = outputs + logs[:1]


def _css() -> str:
    code = {
        style: HtmlFormatter(style=style, nobackground=True).get_style_defs(".highlight")
        for style in ("default", "github-dark")
    }
    dark = f"@media (prefers-color-scheme: dark) {{\n{code['github-dark']}\n}}"
    return "\n".join([code["default"], dark, (_HERE / "template" / "style.css").read_text(encoding="utf-8")])


def _text(markup: str) -> str:
    """Markup without its tags, on one line."""
    return " ".join(html.unescape(re.sub(r"<[^>]+>", "", markup)).replace("`", "").split())


# The index


def index(scale: str, reports: str | Path | None = None) -> Path:
    """Write `index.html`: the scoreboard's page, and below it a list of all pages that are there.

    Args:
        scale: smoke, gpu or paper. reports: the folder; default: reports/<scale>.
    """
    folder = Path(reports) if reports else paths.root() / "reports" / scale
    entries = []
    scoreboard = folder / f"{_SCOREBOARD}.html"
    for path in sorted(set(folder.glob("[0-9]*.html")) - {scoreboard}):  # which the index itself is
        text = path.read_text(encoding="utf-8")
        failed = path.name.endswith(".failed.html")
        if failed and path.with_name(path.name.replace(".failed.html", ".html")).exists():
            continue
        title = _first(text, r"<title>([^<]*)</title>")
        about = _first(text, r'<meta content="([^"]*)" name="description"')
        mark = ' <strong class="mark">failed</strong>' if failed else ""
        link = f'<a href="{html.escape(path.name)}">{title or html.escape(path.stem)}</a>'
        entries.append(f"<li>{link}{mark}<small>{about}</small></li>")
    listing = (
        '<nav class="pages" aria-label="Reports">'
        f'<h2 id="reports">Reports at scale {html.escape(scale)}</h2>'
        f"<ul>{''.join(entries) or '<li>none yet</li>'}</ul></nav>"
    )
    if scoreboard.exists():
        text = scoreboard.read_text(encoding="utf-8")
    else:
        cell = nbformat.v4.new_markdown_cell(f"# Reports at scale {scale}\n\nThe scoreboard is not made yet.")
        text = page_html(nbformat.v4.new_notebook(cells=[cell]))
    text = text.replace('href="index.html"', 'href="#reports"', 1).replace("<!-- pages -->", listing, 1)
    write_text(folder / "index.html", text)
    return folder / "index.html"


def _first(text: str, pattern: str) -> str:
    found = re.search(pattern, text)
    return found[1].strip() if found else ""
