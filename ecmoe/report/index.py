"""Write index.html of a scale: summary, number of claims per label, a line per claim, all pages, and a search over them.

The search is a short script, the only one in any page; the Content-Security-Policy allows it by its digest. The searched text
is part of index.html, so no network or server is needed.
"""

import base64
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
from bs4 import BeautifulSoup

from ecmoe import paths
from ecmoe.files import write_text
from ecmoe.report.markup import TEMPLATE, markup
from ecmoe.report.render import page_html
from ecmoe.report.scoreboard import markdown, scoreboard_html, studies_html
from ecmoe.study.parameters import check_scale
from ecmoe.study.verdict import judge_all

_LONGEST = 4000  # searchable characters per section


def index(scale: str, reports: str | Path | None = None) -> Path:
    """Write index.html, and scoreboard.md for GitHub, from the scale's results and the pages in `reports` (default: reports/<scale>)."""
    check_scale(scale)
    folder = Path(reports) if reports else paths.root() / "reports" / scale
    pages, verdicts = list(_pages(folder)), judge_all(scale)
    files = {page["name"]: page["file"] for page in pages}
    found = [[page["file"], page["title"], *part] for page in pages for part in page["sections"]]
    parts = {
        "What holds": scoreboard_html(scale, verdicts, files),
        "All pages": markup("listing", pages),
        "Search": markup("search", found),
        "What was run, and what is missing": studies_html(scale, files),
    }
    title = "# Expert choice routing: what the paper claims, and what holds here\n\n"
    title += f"At scale `{scale}`. EC is expert choice, CF its capacity factor: the experts that a token has on average. In GShard top-2 and "
    title += "Switch top-1 each token chooses its experts. Losses are in nats per token."
    script = (TEMPLATE / "search.js").read_text(encoding="utf-8")
    text = page_html(
        nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(title)]),
        parts=parts,
        script=script,
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        footer="Made from all pages and results; this page sends no request.",
    )
    write_text(folder / "scoreboard.md", markdown("scoreboard", verdicts, scale))
    write_text(folder / "index.html", text)
    return folder / "index.html"


def _pages(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield each page's name, file, title, description, whether it failed, and its sections for the search."""
    for path in sorted(folder.glob("[0-9]*.html")):
        failed = path.name.endswith(".failed.html")
        if failed and path.with_name(path.name.replace(".failed.html", ".html")).exists():
            continue
        soup = BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")
        about = soup.find("meta", {"name": "description"})
        yield {
            "name": path.stem.removesuffix(".failed"),
            "file": path.name,
            "title": soup.title.get_text() if soup.title else path.stem,
            "about": about["content"] if about else "",
            "failed": failed,
            "sections": _sections(soup),
        }


def _sections(soup: BeautifulSoup) -> list[tuple[str, str, str]]:
    """Return (id, heading, text) of each section; figures count with their alternative text, code is left out."""
    for element in soup.select("details.code, details.log, math, nav, style"):
        element.decompose()
    for svg in soup.select("svg"):
        svg.replace_with(svg.get("aria-label", ""))
    sections: list[tuple[str, str, list[str]]] = [("main", "", [])]
    for piece in soup.main.find_all(string=True) if soup.main else ():
        title = piece.find_parent(["h1", "h2", "h3"])
        if title is None:
            sections[-1][2].append(piece)
        elif title.get_text() != sections[-1][1]:
            sections.append((title.get("id", "main"), title.get_text(), []))
    return [(anchor, heading, " ".join(" ".join(words).split())[:_LONGEST]) for anchor, heading, words in sections]
