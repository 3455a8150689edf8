"""Render executed notebooks as pages, by nbconvert and the template in template/: single files without scripts or
requests, with formulas as MathML and code folded."""

import os
import re
from collections.abc import Mapping
from itertools import cycle
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import escape
from nbconvert.exporters import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from pygments.formatters import HtmlFormatter
from traitlets.config import Config

from ecmoe.files import write_text
from ecmoe.paths import page_name
from ecmoe.report.markup import TEMPLATE, math_html, text_of

_LABELS = {
    "parameters": "parameters and their defaults",
    "injected-parameters": "parameters of this report",
    "try": "yours to change",
}
_NBCONVERT = {
    "HTMLExporter": {"template_name": TEMPLATE.name, "extra_template_basedirs": [str(TEMPLATE.parent)]},
    "NbConvertBase": {"display_data_priority": ["text/html", "image/png", "text/plain"]},
    "CoalesceStreamsPreprocessor": {"enabled": True},  # merges a cell's log messages into one log
}


def render(notebook: Any, out_html: Path, source: Path, error: Mapping[str, Any] | None = None) -> None:
    """Render an executed notebook as a page, with an atomic write. source: path of the notebook in notebooks/; the page links to it
    and to the pages of its neighbours. error: shown at the top: {"where": text, "what": text, "cell": number or None}."""
    there = os.path.relpath(source.resolve(), out_html.parent.resolve())
    write_text(out_html, page_html(notebook, error, ways=ways(source), source=quote(Path(there).as_posix())))


def page_html(
    notebook: Any, error: Mapping[str, Any] | None = None, parts: Mapping[str, str] | None = None, **more: Any
) -> str:
    """Return an executed notebook as an HTML page.

    error: as in `render`. parts: heading -> HTML that follows the cells. more: `ways`, links to neighbours; `source`, the
    notebook's address; `footer`; `script`, the only one that may run, and `script_digest`, its SHA-256 in base64."""
    notebook.cells = [c for c in notebook.cells if "papermill-error-cell-tag" not in c.metadata.get("tags", [])]
    for number, cell in enumerate(notebook.cells, 1):
        cell.page = {"number": number}
    # The cell tagged `answer` is shown right below the title, above the cells that load its data.
    notebook.cells[1:] = sorted(notebook.cells[1:], key=lambda cell: "answer" not in cell.metadata.get("tags", []))
    toc: list[dict[str, Any]] = []
    markdown = MarkdownWithMath(renderer=_Markdown(toc))
    title = description = ""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.page["html"] = markdown.render(cell.source)
            if not title and (heading := re.search(r"^#\s+(.+)$", cell.source, re.MULTILINE)):
                title = heading[1].strip()
                paragraph = re.search(r"<p>(.*?)</p>", cell.page["html"], re.DOTALL)
                description = text_of(paragraph[1]) if paragraph else ""
        elif cell.cell_type == "code":
            tags = cell.metadata.get("tags", [])
            cell.page["label"] = next((_LABELS[tag] for tag in tags if tag in _LABELS), "code")
            cell.page["failed"] = bool(error) and error["cell"] == cell.page["number"]
            cell.page["read"] = "read" in tags  # cells whose code is meant to be read: shown unfolded
            # Results before the log; finished progress bars are dropped.
            outputs = [o for o in cell.outputs if "application/vnd.jupyter.widget-view+json" not in o.get("data", {})]
            cell.outputs = sorted(outputs, key=lambda output: output.get("name") == "stderr")
            shown = "".join(output.get("data", {}).get("text/html", "") for output in cell.outputs)
            headings = re.findall(r'<h2 id="([^"]+)">(.*?)</h2>', shown)
            toc += [{"id": id, "plain": id, "level": 2, "html": text} for id, text in headings]
            cell.page["quiet"] = not cell.outputs and not cell.page["read"]
    sections = [{"id": _anchor(name, toc), "heading": name, "html": html} for name, html in (parts or {}).items()]
    styles = (HtmlFormatter(style=name, nobackground=True) for name in ("default", "github-dark"))
    light, dark = (style.get_style_defs(".highlight") for style in styles)
    style = (TEMPLATE / "style.css").read_text(encoding="utf-8")
    page = {
        "title": text_of(title) or "Report",
        "description": description,
        "toc": [heading for heading in toc if heading["level"] in (2, 3)],
        "css": f"{light}\n@media screen and (prefers-color-scheme: dark) {{\n{dark}\n}}\n{style}",
        "error": error,
        "parts": sections,
        "footer": "Made from a notebook; this page sends no request and runs no script.",
        **more,
    }
    return HTMLExporter(config=Config(_NBCONVERT)).from_notebook_node(notebook, {"page": page})[0]


def ways(source: Path) -> list[dict[str, str]]:
    """Return links to the pages of the previous and next notebook; the text for "03_capacity_factor" is "03 Capacity factor"."""
    names, found = sorted(path.stem for path in source.parent.glob("[0-9][0-9]_*.ipynb")), []
    for rel, step, form in (("prev", -1, "\u2190 {}"), ("next", 1, "{} \u2192")):
        at = names.index(source.stem) + step if source.stem in names else -1
        if 0 <= at < len(names):
            number, _, words = names[at].partition("_")
            text = form.format(f"{number} {words.replace('_', ' ').capitalize()}")
            found.append({"rel": rel, "href": f"{page_name(names[at])}.html", "text": text})
    return found


class _Markdown(IPythonRenderer):
    """Render Markdown with $formulas$ as MathML, and give headings ids for the table of contents."""

    def __init__(self, toc: list[dict[str, Any]]) -> None:
        super().__init__(escape=False, exclude_anchor_links=True)
        self.toc = toc

    def heading(self, text: str, level: int, **attrs: Any) -> str:
        return f'<h{level} id="{_anchor(text, self.toc, level)}">{text}</h{level}>\n'

    def table(self, text: str) -> str:
        heads = cycle(re.findall(r"<th\b[^>]*>(.*?)</th>", text))
        text = re.sub(r"<td\b", lambda td: f'{td[0]} data-of="{escape(text_of(next(heads)))}"', text)
        return f'<div class="scroll" tabindex="0" role="region" aria-label="table"><table>{text}</table></div>\n'

    def block_math(self, body: str) -> str:
        return math_html(body.strip(), "block")

    def inline_math(self, body: str) -> str:
        return math_html(body.strip())

    def latex_environment(self, name: str, body: str) -> str:
        return math_html(f"\\begin{{{name}}}{body}\\end{{{name}}}", "block")


def _anchor(text: str, toc: list[dict[str, Any]], level: int = 2) -> str:
    """Return a unique id for a heading, and add the heading to the table of contents."""
    plain = re.sub(r"[^\w]+", "-", text_of(text).lower()).strip("-") or "section"
    taken = sum(entry["plain"] == plain for entry in toc)
    name = f"{plain}-{taken + 1}" if taken else plain
    toc.append({"id": name, "plain": plain, "level": level, "html": re.sub(r"</?a[^>]*>", "", text)})
    return name
