"""The scoreboard of all claims: number of claims per label, a figure of all effects, and a line per claim that unfolds to its parts."""

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
from ecmoe.study.answer import answer, cost
from ecmoe.study.estimate import Unit
from ecmoe.study.verdict import PLUMBING, ClaimVerdict, JudgedPart

Verdicts = Mapping[str, ClaimVerdict]
CAPTION = (
    "Every part that decides a claim, oriented so that values right of 0 agree with the paper; where the paper's figure is to be met, 0 is "
    "that figure. Bars are confidence intervals, jointly 95% for the parts of a claim."
)


def scoreboard_html(scale: str, verdicts: Verdicts, pages: Mapping[str, str]) -> Markup:
    """Return the claims of a scale, and their summary. verdicts: from `judge_all`. pages: name -> file, of existing pages."""
    tally = Counter(verdict.label for verdict in verdicts.values())
    plot = effects(verdicts)
    shown = "" if plot.figure is None else markup("figure", plot.svg(), CAPTION, table_html(plot.data))
    claims = [(v, pages.get(v.about.page), judged_html(v)) for v in verdicts.values()]
    counts = [(label, tally[label]) for label in COLORS if tally[label]]
    return markup("board", counts, answer(verdicts), cost(scale), claims, shown)


def effects(verdicts: Verdicts) -> Plot:
    """Plot all deciding parts, positive on the paper's side: a panel in nats, and one in percent for shares and ratios minus 1."""
    rows = []
    for verdict in verdicts.values():
        for part in verdict.deciding if verdict.label != PLUMBING else ():
            if part.effect.n:  # parts that weren't run are named in their claim's line
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
        # Effects differ by orders of magnitude, so the axis is logarithmic away from 0. Intervals of few seeds may be very wide:
        # the estimates and the median interval set the limits.
        sizes = rows["mean"].abs()
        reach = max(1.6 * sizes.max(), 1.1 * rows[["low", "high"]].abs().max(axis=1).median())
        ax.set_xscale("symlog", linthresh=10 ** np.floor(np.log10(max(sizes.median(), 1e-9))))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.set(xlim=(-reach, reach), xlabel="right of 0: agrees with the paper (logarithmic away from 0)")
        name_rows(ax, rows["name"], set(rows["name"]), fontsize=9)
        return rows, "; ".join(f"{row.name} {number(row)}, {row.label}" for row in rows.itertuples())

    what, height = "effects, above 0 where they are on the paper's side", 1.0 + 0.21 * sum(heights)
    return panels(what, draw, there, height, rows=len(there), key="unit", legend=3, height_ratios=heights)


def _to_the_papers_side(part: JudgedPart, *values: float) -> tuple[float, float, float]:
    """Return mean, low, high relative to no effect (or to the figure that "near" claims), positive on the paper's side."""
    from_here = part.figure if part.says == "near" and part.figure is not None else part.neutral
    mean, low, high = ((1.0 if part.unit is Unit.NATS else 100.0) * (x - from_here) for x in values)
    return (-mean, -high, -low) if part.says in ("below", "at or below") else (mean, low, high)


def markdown(name: str, verdicts: Verdicts, scale: str) -> str:
    """Return the claims as Markdown. name: "scoreboard" (with deciding parts, for GitHub) or "claims" (a table row each)."""
    environment = Environment(loader=FileSystemLoader(TEMPLATE), trim_blocks=True, keep_trailing_newline=True)
    environment.filters |= {"found": found, "cell": lambda text: text.replace("|", "\\|")}
    return environment.get_template(f"{name}.md.j2").render(verdicts=verdicts.values(), scale=scale)


def studies(scale: str) -> pd.DataFrame:
    """Return a row per page: how many runs of its plan are done (pages share runs), and which are missing."""
    rows = []
    for page in plan.pages(scale):
        planned, missing = plan.sound(scale, [page])[0], {}  # an invalid page reports its own error
        for one in planned:
            if engine.lacks(one, scale):
                missing.setdefault(one.arms[0], []).append(str(one.seed))
        there = len(planned) - sum(map(len, missing.values()))
        text = "; ".join(f"{arm} s{', s'.join(seeds)}" for arm, seeds in missing.items()) if there else "all of them"
        if planned:
            rows.append((page, f"{there} of {len(planned)}", text))
    return pd.DataFrame(rows, columns=["page", "runs", "missing (seeds)"])


def studies_html(scale: str, pages: Mapping[str, str]) -> Markup:
    """Return a table of every page's runs, the missing ones, and the command to train them. pages: as in `scoreboard_html`."""
    again = f"make reproduce{f' SCALE={scale}' * (scale != 'smoke')}"
    caption = f"Pages share runs; \u201c{again}\u201d trains what is missing, and nothing else."
    fold = lambda text: text if len(text) < 120 else markup("folded", f"{text.count(';') + 1} arms", text)  # noqa: E731
    link = lambda name: markup("page_link", name, pages.get(name))  # noqa: E731
    return table_html(studies(scale), caption, {"page": link, "missing (seeds)": fold})
