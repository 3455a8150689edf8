"""Write index.html of a scale: summary, number of claims per label, a line per claim, all pages, and a search over them.
The search is a short script, the only one in any page, over texts that are part of index.html."""

import base64
import hashlib
import math
import re
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pandas as pd
from bs4 import BeautifulSoup
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup
from matplotlib.axes import Axes

from ecmoe import paths
from ecmoe.files import write_text
from ecmoe.report.answer import found, judged_html
from ecmoe.report.markup import COLORS, TEMPLATE, markup, table_html
from ecmoe.report.plots.draw import name_rows, number, panels
from ecmoe.report.plots.style import INK, PAPER, Plot
from ecmoe.report.render import page_html
from ecmoe.study import engine, plan
from ecmoe.study.answer import answer, cost, reproduce
from ecmoe.study.parameters import check_scale
from ecmoe.study.protocol import protocol
from ecmoe.study.units import Unit, figure
from ecmoe.study.verdict import IN_DIRECTION, PLUMBING, ClaimVerdict, JudgedPart, judge_all

Verdicts = Mapping[str, ClaimVerdict]
_MARKS = {"reproduced": "o", "reproduced in direction": "^", "no effect": "s", "contradicted": "X", "undecided": "D"}
_LONGEST = 4000  # searchable characters per section


def index(scale: str, reports: str | Path | None = None) -> Path:
    """Write index.html, and scoreboard.md for GitHub, from the scale's results and the pages in `reports` (default: reports/<scale>)."""
    check_scale(scale)
    folder = Path(reports) if reports else paths.root() / "reports" / scale
    pages, verdicts = list(_pages(folder)), judge_all(scale)
    files = {page["name"]: page["file"] for page in pages}
    texts = [[page["file"], page["title"], *part] for page in pages for part in page["sections"]]
    parts = {
        "What holds": scoreboard_html(scale, verdicts, files),
        "All pages": markup("listing", pages),
        "Search": markup("search", texts),
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


def scoreboard_html(scale: str, verdicts: Verdicts, pages: Mapping[str, str]) -> Markup:
    """Return the claims of a scale, and their summary. verdicts: from `judge_all`. pages: name -> file, of existing pages."""
    tally = Counter(verdict.label for verdict in verdicts.values())
    plot = effects(verdicts)
    shown = "" if plot.figure is None else markup("figure", plot.svg(), caption(), table_html(plot.data))
    claims = [(v, pages.get(v.about.page), judged_html(v)) for v in verdicts.values()]
    counts = [(label, tally[label]) for label in COLORS if tally[label]]
    return markup("board", counts, answer(verdicts), cost(scale), claims, shown)


def caption() -> str:
    """Return the caption of `effects`."""
    return (
        "Every part that decides a claim, oriented so that values right of 0 agree with the paper; where the paper's "
        "figure is to be met, 0 is that figure, right of 0 is more, and near 0 agrees. "
        "An open mark shows why a part left of 0 still holds in direction. "
        f"Bars are confidence intervals, jointly {100 * protocol().level:g}% for the parts of a claim."
    )


def effects(verdicts: Verdicts) -> Plot:
    """Plot all deciding parts, positive on the paper's side: a panel in nats, and one in percent for shares and ratios minus 1."""
    rows = []
    for verdict in verdicts.values():
        for part in verdict.deciding if verdict.label != PLUMBING else ():
            by = [one for one in verdict.parts if one.name == part.or_direction and part.label == IN_DIRECTION]
            for one in [part, *by] if part.effect.n else ():  # parts that weren't run are named in their claim's line
                turned = _to_the_papers_side(one, one.effect.value, *(one.interval or (math.nan, math.nan)))
                unit = "difference in loss (nats per token)" if part.unit is Unit.NATS else "percent"
                rows.append((unit, f"{verdict.about.id} {one.name}{_zero(one)}", *turned, one.label, one is not part))
    frame = pd.DataFrame(rows, columns=["unit", "name", "mean", "low", "high", "label", "beside"])
    there = {unit: of.drop(columns="unit").reset_index(drop=True) for unit, of in frame.groupby("unit")}
    heights = [(~of["beside"]).sum() + 1.5 for of in there.values()]

    def draw(ax: Axes, rows: pd.DataFrame) -> tuple[pd.DataFrame, str]:
        beside = rows.pop("beside")
        labels, y = rows["label"].mask(beside).ffill(), (~beside).cumsum() - 1  # a row of the figure has one verdict
        colors = labels.map(COLORS)
        ax.axvline(0, color=INK, linewidth=1)
        ax.hlines(y, rows["low"], rows["high"], color=colors, linewidth=2)
        for mean, at, label, color, hollow in zip(rows["mean"], y, labels, colors, beside, strict=True):
            ax.scatter(mean, at, s=64, marker=_MARKS[label], c=PAPER if hollow else color, edgecolors=color, zorder=3)
        for label in [label for label in COLORS if label in set(frame["label"])]:
            ax.scatter([], [], s=64, marker=_MARKS[label], c=COLORS[label], label=label)
        if frame["beside"].any():
            look = {"marker": _MARKS[IN_DIRECTION], "edgecolors": COLORS[IN_DIRECTION]}
            ax.scatter([], [], s=64, c=PAPER, **look, label="open: why in direction")
        # Effects differ by orders of magnitude, so the axis is logarithmic away from 0. Intervals of few seeds may be very wide:
        # the estimates and the median interval set the limits.
        sizes = rows["mean"].abs()
        reach = max(1.6 * sizes.max(), 1.1 * rows[["low", "high"]].abs().max(axis=1).median())
        ax.set_xscale("symlog", linthresh=10 ** np.floor(np.log10(max(sizes.median(), 1e-9))))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.set(xlim=(-reach, reach), xlabel="right of 0: agrees with the paper (logarithmic away from 0)")
        names = [textwrap.fill(name, 42) for name in rows["name"][~beside]]
        name_rows(ax, names, names, fontsize=9, linespacing=1)
        return rows, "; ".join(f"{row.name} {number(row)}, {row.label}" for row in rows.itertuples())

    what, height = "effects, above 0 where they are on the paper's side", 1.0 + 0.3 * sum(heights)
    return panels(what, draw, there, height, rows=len(there), key="unit", legend=3, height_ratios=heights)


def _to_the_papers_side(part: JudgedPart, *values: float) -> tuple[float, float, float]:
    """Return mean, low, high from the part's origin, positive on the paper's side."""
    factor = part.sign * (1.0 if part.unit is Unit.NATS else 100.0)
    mean, low, high = (factor * (x - part.origin) for x in values)
    return (mean, low, high) if part.sign > 0 else (mean, high, low)


def _zero(part: JudgedPart) -> str:
    """Return what 0 stands for in a part's row, where it isn't equality: " (0: the paper's 23%)", " (above 50%)"."""
    if part.says == "near":
        return f" (0: the paper's {figure(part.origin, part.unit)})"
    return f" ({part.says} {figure(part.origin, part.unit)})" * (part.origin != part.unit.outer(0.0))


def markdown(name: str, verdicts: Verdicts, scale: str) -> str:
    """Return the claims as Markdown. name: "scoreboard" (with deciding parts, for GitHub) or "claims" (a table row each)."""
    environment = Environment(loader=FileSystemLoader(TEMPLATE), trim_blocks=True, keep_trailing_newline=True)
    environment.filters |= {"found": found, "cell": lambda text: text.replace("|", "\\|")}
    return environment.get_template(f"{name}.md.j2").render(verdicts=verdicts.values(), scale=scale)


def studies_html(scale: str, pages: Mapping[str, str]) -> Markup:
    """Return a table of all pages: how many of a page's runs are done, and which are missing."""
    rows = []
    for page in plan.pages(scale):
        planned, missing = plan.sound(scale, [page])[0], {}  # an invalid page reports its own error
        for one in planned:
            if engine.lacks(one, scale):
                missing.setdefault(one.arms[0], []).append(str(one.seed))
        there = len(planned) - sum(map(len, missing.values()))
        text = "; ".join(f"{arm} (seed {', '.join(seeds)})" for arm, seeds in missing.items())
        if not there:
            text = "all of them"
        elif len(text) >= 120:
            text = markup("folded", f"{len(missing)} arms", text)
        if planned:
            rows.append((markup("page_link", page, pages.get(page)), f"{there} of {len(planned)}", text))
    caption = f"Pages share runs; \u201c{reproduce(scale)}\u201d trains what is missing, and nothing else."
    # As objects: columns of strings would turn Markup into text.
    return table_html(pd.DataFrame(rows, columns=["page", "runs", "missing"], dtype=object), caption)


def _pages(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield each page's name, file, title, answers (label, first sentence), whether it failed, and its sections for the search."""
    for path in sorted(folder.glob("[0-9]*.html")):
        name, failed = path.stem.removesuffix(".failed"), path.stem.endswith(".failed")
        if failed and (folder / f"{name}.html").exists():
            continue
        soup = BeautifulSoup(path.read_text(encoding="utf-8", errors="replace"), "html.parser")
        answers = [
            (Markup(one.p.decode_contents()), re.split(r"(?<=\.) (?=[A-Z])", one.find(class_="said").text)[0])
            for one in soup.select("section.answer")
        ]
        yield {
            "name": name,
            "file": path.name,
            "title": soup.title.get_text() if soup.title else path.stem,
            "answers": answers,
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
