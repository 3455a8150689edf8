"""Executed notebooks as pages, by nbconvert with a template of our own.

A page is one file: no script, no request, formulas as MathML, code folded away. The list of pages is `index`'s.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import nbformat
from nbconvert.exporters import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from pygments.formatters import HtmlFormatter
from traitlets.config import Config

from ecmoe.files import write_text
from ecmoe.report.markup import math_html, text_of

_HERE = Path(__file__).parent
_LABELS = {
    "parameters": "parameters and their defaults",
    "injected-parameters": "parameters of this report",
    "try": "yours to change",
}
FOOTER = "Made from a notebook; this page sends no request and runs no script."


def render(
    ipynb: str | Path,
    out_html: str | Path,
    error: Mapping[str, Any] | None = None,
    source: str | Path | None = None,
) -> Path:
    """Render an executed notebook as a page, written by rename.

    Args:
        error: shown on top: {"where": text, "what": text, "cell": number or None}.
        source: the notebook as it lies in notebooks/; the page links to it and to the pages of its neighbours.
    """
    out_html = Path(out_html)
    notebook = nbformat.read(ipynb, as_version=4)
    links = {} if source is None else {"ways": ways(Path(source)), "source": _relative(Path(source), out_html.parent)}
    write_text(out_html, page_html(notebook, error, **links))
    return out_html


def page_html(
    notebook: Any,
    error: Mapping[str, Any] | None = None,
    ways: Sequence[Mapping[str, str]] = (),
    source: str = "",
    parts: Mapping[str, str] | None = None,
    **more: str,
) -> str:
    """An executed notebook as a page of HTML.

    Args:
        ways: to the pages before and after, each with `href`, `rel` and `text`. source: address of the notebook.
        parts: heading -> HTML that follows the cells. more: footer; script and script_digest (base64 of its SHA-256), of the
            one script that may run.
    """
    notebook.cells = [c for c in notebook.cells if "papermill-error-cell-tag" not in c.metadata.get("tags", [])]
    for number, cell in enumerate(notebook.cells, 1):
        cell.page = {"number": number}
    notebook.cells = _answer_first(notebook.cells)
    toc: list[dict[str, Any]] = []
    markdown = MarkdownWithMath(renderer=_Markdown(toc))
    title = description = ""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.page["html"] = markdown.render(cell.source)
            if not title and (heading := _heading(cell.source)):
                title = heading
                paragraph = re.search(r"<p>(.*?)</p>", cell.page["html"], re.DOTALL)
                description = text_of(paragraph[1]) if paragraph else ""
        elif cell.cell_type == "code":
            tags = cell.metadata.get("tags", [])
            cell.page["label"] = next((_LABELS[tag] for tag in tags if tag in _LABELS), "code")
            cell.page["failed"] = bool(error) and error["cell"] == cell.page["number"]
            cell.page["read"] = "read" in tags  # its code is what there is to read
            _join_streams(cell)
            toc += [{"id": id, "plain": id, "level": 2, "html": text} for id, text in _shown_headings(cell)]
            cell.page["quiet"] = not cell.outputs and not cell.page["read"]
    sections = [{"id": _anchor(name, toc), "heading": name, "html": html} for name, html in (parts or {}).items()]
    page = {
        "title": text_of(title) or "Report",
        "description": description,
        "toc": [heading for heading in toc if heading["level"] in (2, 3)],
        "css": _css(),
        "error": error,
        "ways": list(ways),
        "source": source,
        "parts": sections,
        "footer": FOOTER,
    } | more
    priority = ["text/html", "image/png", "text/plain"]
    exporter = HTMLExporter(
        config=Config({"NbConvertBase": {"display_data_priority": priority}}),
        template_name="template",
        extra_template_basedirs=[str(_HERE)],
    )
    return exporter.from_notebook_node(notebook, {"page": page})[0]


def _answer_first(cells: list[Any]) -> list[Any]:
    """The cell tagged `answer` right below the title, whatever had to be loaded for it."""
    return cells[:1] + sorted(cells[1:], key=lambda cell: "answer" not in cell.metadata.get("tags", []))


def ways(source: Path) -> list[dict[str, str]]:
    """To the pages of the notebooks before and after this one, by their number."""
    all_of_them = sorted(source.parent.glob("[0-9][0-9]_*.ipynb"))
    if source not in all_of_them:
        return []
    at, found = all_of_them.index(source), []
    for rel, other, form in (("prev", at - 1, "\u2190 {}"), ("next", at + 1, "{} \u2192")):
        if 0 <= other < len(all_of_them):
            name = all_of_them[other].stem
            found.append({"rel": rel, "href": f"{quote(name)}.html", "text": form.format(short_title(name))})
    return found


def short_title(name: str) -> str:
    """ "03_capacity_factor" -> "03 Capacity factor", as links have it."""
    number, _, words = name.partition("_")
    return f"{number} {words.replace('_', ' ').capitalize()}"


class _Markdown(IPythonRenderer):
    """Markdown with $formulas$ as MathML, and headings that the table of contents can link to."""

    def __init__(self, toc: list[dict[str, Any]]) -> None:
        super().__init__(escape=False, exclude_anchor_links=True)
        self.toc = toc

    def heading(self, text: str, level: int, **attrs: Any) -> str:
        return f'<h{level} id="{_anchor(text, self.toc, level)}">{text}</h{level}>\n'

    def table(self, text: str) -> str:
        return f'<div class="scroll" tabindex="0" role="region" aria-label="table"><table>{text}</table></div>\n'

    def block_math(self, body: str) -> str:
        return math_html(body.strip(), "block")

    def inline_math(self, body: str) -> str:
        return math_html(body.strip())

    def latex_environment(self, name: str, body: str) -> str:
        return math_html(f"\\begin{{{name}}}{body}\\end{{{name}}}", "block")


def _anchor(text: str, toc: list[dict[str, Any]], level: int = 2) -> str:
    """An id for a heading, which is added to the contents."""
    plain = re.sub(r"[^\w]+", "-", text_of(text).lower()).strip("-") or "section"
    taken = sum(entry["plain"] == plain for entry in toc)
    name = f"{plain}-{taken + 1}" if taken else plain
    toc.append({"id": name, "plain": plain, "level": level, "html": re.sub(r"</?a[^>]*>", "", text)})
    return name


def _shown_headings(cell: Any) -> list[tuple[str, str]]:
    """Id and text of the headings that a cell shows."""
    shown = "".join(output.get("data", {}).get("text/html", "") for output in cell.outputs)
    return re.findall(r'<h2 id="([^"]+)">(.*?)</h2>', shown)


def _join_streams(cell: Any) -> None:
    """One log per cell, however many pieces its lines came in, after what the cell shows."""
    outputs, logs = [], []
    for output in cell.outputs:
        if "application/vnd.jupyter.widget-view+json" in output.get("data", {}):
            continue  # a bar that has come to its end
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
    dark = f"@media screen and (prefers-color-scheme: dark) {{\n{code['github-dark']}\n}}"
    return "\n".join([code["default"], dark, (_HERE / "template" / "style.css").read_text(encoding="utf-8")])


def _heading(source: str) -> str:
    found = re.search(r"^#\s+(.+)$", source, re.MULTILINE)
    return found[1].strip() if found else ""


def _relative(path: Path, folder: Path) -> str:
    return quote(Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix())
