"""All claims at a glance: a tally, every effect on one scale, a line for each claim that unfolds to its parts."""

import math
from collections import Counter
from collections.abc import Mapping

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup
from matplotlib.axes import Axes

from ecmoe.report.answer import found, judged_html
from ecmoe.report.markup import COLORS, TEMPLATE, markup, table_html
from ecmoe.report.plots.draw import name_rows, number, panels
from ecmoe.report.plots.style import INK, Plot
from ecmoe.study import engine, plan
from ecmoe.study.answer import Answer
from ecmoe.study.estimate import Unit
from ecmoe.study.verdict import PLUMBING, ClaimVerdict, JudgedPart

Verdicts = Mapping[str, ClaimVerdict]
CAPTION = (
    "Every part that decides a claim, oriented so that values right of 0 agree with the paper; where the paper's figure is to be met, 0 is "
    "that figure. Bars are confidence intervals, jointly 95% for the parts of a claim."
)


def scoreboard_html(verdicts: Verdicts, answer: Answer, pages: Mapping[str, str]) -> Markup:
    """The claims of a scale: verdicts of `judge_all`, the answer in words, links to the pages that are there (name -> file)."""
    tally = Counter(verdict.label for verdict in verdicts.values())
    plot = effects(verdicts)
    shown = "" if plot.figure is None else markup("figure", plot.svg(), CAPTION, table_html(plot.data))
    claims = [(v, pages.get(v.about.page), judged_html(v)) for v in verdicts.values()]
    return markup("board", [(label, tally[label]) for label in COLORS if tally[label]], answer, claims, shown)


def effects(verdicts: Verdicts) -> Plot:
    """All deciding parts on the claim's side or not: a panel in nats, and one in percent: of a share, or of what a ratio is over 1."""
    rows = []
    for verdict in verdicts.values():
        for part in verdict.deciding if verdict.label != PLUMBING else ():
            if part.effect.n:  # else the line of its claim says so
                turned = _to_the_papers_side(part, part.effect.value, *(part.interval or (math.nan, math.nan)))
                unit = "difference in loss (nats per token)" if part.unit is Unit.NATS else "percent"
                rows.append((unit, f"{verdict.claim} {part.name}", *turned, part.label))
    frame = pd.DataFrame(rows, columns=["unit", "name", "mean", "low", "high", "label"])
    there = {unit: of.drop(columns="unit").reset_index(drop=True) for unit, of in frame.groupby("unit")}
    heights = [len(of) + 1.5 for of in there.values()]

    def draw(ax: Axes, rows: pd.DataFrame) -> tuple[pd.DataFrame, str]:
        colors = rows["label"].map(COLORS)
        ax.axvline(0, color=INK, linewidth=1)
        ax.hlines(rows.index, rows["low"], rows["high"], color=colors, linewidth=2)
        ax.scatter(rows["mean"], rows.index, c=colors, s=64, zorder=3)
        for label in [label for label in COLORS if label in set(frame["label"])]:
            ax.scatter([], [], c=COLORS[label], s=64, label=label)
        # Effects lie decades apart, so the axis is logarithmic away from 0. An interval of few seeds may be hundreds wide: the
        # marks decide how far it goes.
        sizes = rows["mean"].abs()
        reach = max(1.6 * sizes.max(), 1.1 * rows[["low", "high"]].abs().max(axis=1).median())
        ax.set_xscale("symlog", linthresh=10 ** np.floor(np.log10(max(sizes.median(), 1e-9))))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.set(xlim=(-reach, reach), xlabel="right of 0: agrees with the paper (logarithmic away from 0)")
        name_rows(ax, rows["name"], fontsize=9)
        return rows, "; ".join(f"{row.name} {number(row)}, {row.label}" for row in rows.itertuples())

    what, height = "effects, above 0 where they are on the paper's side", 1.0 + 0.21 * sum(heights)
    return panels(what, draw, there, height, rows=len(there), key="unit", legend=3, height_ratios=heights)


def _to_the_papers_side(part: JudgedPart, *values: float) -> tuple[float, float, float]:
    """Mean, low, high from no effect (of a value that is claimed: from that), the paper's side above 0."""
    from_here = part.figure if part.says == "near" and part.figure is not None else part.neutral
    mean, low, high = ((1.0 if part.unit is Unit.NATS else 100.0) * (x - from_here) for x in values)
    return (-mean, -high, -low) if part.says in ("below", "at or below") else (mean, low, high)


def markdown(name: str, verdicts: Verdicts, scale: str) -> str:
    """The claims as Markdown: "scoreboard", with their deciding parts, for GitHub, which shows no HTML; "claims", a line each."""
    environment = Environment(loader=FileSystemLoader(TEMPLATE), trim_blocks=True, keep_trailing_newline=True)
    environment.filters |= {"found": found, "cell": lambda text: text.replace("|", "\\|")}
    return environment.get_template(f"{name}.md.j2").render(verdicts=verdicts.values(), scale=scale)


def studies(scale: str) -> pd.DataFrame:
    """A row per page: how many runs of its plan, which pages share, are there and measured, and what is missing."""
    rows = []
    for page in plan.pages(scale):
        planned, missing = plan.sound(scale, [page])[0], {}  # its own page says what is wrong
        for one in planned:
            if engine.lacks(one, scale):
                missing.setdefault(one.arms[0], []).append(str(one.seed))
        there = len(planned) - sum(map(len, missing.values()))
        text = "; ".join(f"{arm} s{', s'.join(seeds)}" for arm, seeds in missing.items()) if there else "all of them"
        if planned:
            rows.append((page, f"{there} of {len(planned)}", text))
    return pd.DataFrame(rows, columns=["page", "runs", "missing (seeds)"])


def studies_html(scale: str, pages: Mapping[str, str]) -> Markup:
    """What every page of that scale rests on, what is missing, and the command that trains it. pages: as of `scoreboard_html`."""
    again = f"make reproduce{f' SCALE={scale}' * (scale != 'smoke')}"
    caption = f"Pages share runs; \u201c{again}\u201d trains what is missing, and nothing else."
    fold = lambda text: text if len(text) < 120 else markup("folded", f"{text.count(';') + 1} arms", text)  # noqa: E731
    link = lambda name: markup("page_link", name, pages.get(name))  # noqa: E731
    return table_html(studies(scale), caption, {"page": link, "missing (seeds)": fold})
