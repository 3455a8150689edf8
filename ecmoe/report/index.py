"""index.html of a scale: the answer, a tally, a line for each claim, all pages, and a search over them.

The search is a few lines of script in this page alone, allowed by their own digest; its words lie in the page, so it needs no
network and no server.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
from bs4 import BeautifulSoup, Tag

from ecmoe import paths
from ecmoe.files import write_text
from ecmoe.report.render import page_html
from ecmoe.report.scoreboard import answer_html, scoreboard_html, scoreboard_markdown, studies_html
from ecmoe.study.answer import answer
from ecmoe.study.verdict import judge_all

_SCRIPT = Path(__file__).parent / "template" / "search.js"
_LONGEST = 4000  # characters of a section that can be found


def index(scale: str, reports: str | Path | None = None) -> Path:
    """Write `index.html`, and `scoreboard.md` for GitHub, from the pages and results that are there.

    Args:
        scale: smoke, gpu or paper. reports: the folder; default: reports/<scale>.
    """
    folder = Path(reports) if reports else paths.root() / "reports" / scale
    pages, verdicts = list(_pages(folder)), judge_all(scale)
    parts = {
        "What holds": answer_html(answer(scale, verdicts))
        + scoreboard_html(verdicts, {page["name"] for page in pages}),
        "All pages": _listing(pages),
        "Search": _search(pages),
        "What was run, and what is missing": studies_html(scale),
    }
    title = f"# Expert choice routing: what the paper claims, and what holds here\n\nAt scale `{scale}`."
    script = _SCRIPT.read_text(encoding="utf-8")
    text = page_html(
        nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(title)]),
        parts=parts,
        script=script,
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        footer="Made from all pages and results; this page sends no request.",
    )
    write_text(folder / "scoreboard.md", scoreboard_markdown(verdicts, scale))
    write_text(folder / "index.html", text)
    return folder / "index.html"


def _pages(folder: Path) -> Iterator[dict[str, Any]]:
    """Each page: its name, title, description, whether it failed, and its sections for the search."""
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
            "sections": list(_sections(soup)),
        }


def _sections(soup: BeautifulSoup) -> Iterator[tuple[str, str, str]]:
    """Id, heading and text of each section; of figures what their alternative text says, of code nothing."""
    main = soup.find("main")
    if not isinstance(main, Tag):
        return
    for element in main.select("details.code, details.log, math, nav, style"):
        element.decompose()
    for svg in main.find_all("svg"):
        svg.replace_with(svg.get("aria-label", ""))
    anchor, heading, words = "main", "", []
    for element in main.find_all(
        ["h1", "h2", "h3", "p", "li", "figcaption", "caption", "td", "th", "dt", "dd", "figure"]
    ):
        if element.name in ("h1", "h2", "h3"):
            if words:
                yield anchor, heading, " ".join(" ".join(words).split())[:_LONGEST]
            anchor, heading, words = element.get("id", "main"), element.get_text(), []
        elif not element.find_parent(["p", "li", "td", "th", "dd", "figure"]):
            words.append(element.get_text(" "))
    yield anchor, heading, " ".join(" ".join(words).split())[:_LONGEST]


def _listing(pages: list[dict[str, Any]]) -> str:
    entries = []
    for page in pages:
        mark = ' <strong class="mark">failed</strong>' if page["failed"] else ""
        link = f'<a href="{html.escape(page["file"])}">{html.escape(page["title"])}</a>'
        entries.append(f"<li>{link}{mark}<small>{html.escape(page['about'])}</small></li>")
    return f'<nav class="pages" aria-label="Reports"><ul>{"".join(entries) or "<li>none yet</li>"}</ul></nav>'


def _search(pages: list[dict[str, Any]]) -> str:
    words = [
        [page["file"], page["title"], anchor, heading, text]
        for page in pages
        for anchor, heading, text in page["sections"]
    ]
    data = json.dumps(words, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    return (
        '<form class="search" role="search"><label for="words">Words on any page</label>'
        '<input id="words" type="search" autocomplete="off" placeholder="capacity factor"></form>'
        "<noscript><p>The search needs a script, which this browser doesn't run.</p></noscript>"
        '<ul class="hits" aria-live="polite"></ul>'
        f'<script type="application/json" id="search-index">{data}</script>'
    )
