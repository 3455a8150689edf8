"""All claims at a glance: a tally, every effect on one scale, a line for each claim that unfolds to its parts."""

from __future__ import annotations

import html
import math
from collections import Counter
from collections.abc import Collection, Mapping

import pandas as pd
from markupsafe import Markup

from ecmoe.report.answer import found, judged_html, rests_html
from ecmoe.report.markup import COLORS, badge, folded, table_html
from ecmoe.report.plots.effects import all_effects
from ecmoe.report.plots.parts import Plot
from ecmoe.study import engine, plan
from ecmoe.study.answer import Answer
from ecmoe.study.estimate import Unit
from ecmoe.study.verdict import PLUMBING, ClaimVerdict, JudgedPart
from ecmoe.training.result import read_record

Verdicts = Mapping[str, ClaimVerdict]


def answer_html(answer: Answer) -> str:
    """The answer in three sentences, and its cost."""
    said = "".join(f'<p class="said">{html.escape(sentence)}</p>' for sentence in answer.sentences)
    return f'<section class="answer">{said}<p class="rests">{html.escape(answer.cost.replace("`", ""))}</p></section>'


def scoreboard_html(verdicts: Verdicts, pages: Collection[str]) -> str:
    """The claims of a scale.

    Args:
        verdicts: of `verdict.judge_all`. pages: names of those that are there, to link to.
    """
    tally = Counter(verdict.label for verdict in verdicts.values())
    chips = "".join(f"<li>{badge(label)} {tally[label]}</li>" for label in COLORS if tally[label])
    plot, shown = effects(verdicts), ""
    if plot.figure is not None:
        numbers = folded("numbers of this figure", table_html(plot.data))
        caption = "Every part that decides a claim, turned so that right of 0 is what the paper says; bars: intervals, colours: verdicts."
        shown = (
            f'<figure><div class="plot" tabindex="0" role="region" aria-label="figure">{plot.svg()}</div>'
            f"<figcaption>{caption}</figcaption></figure>{numbers}"
        )
    lines = "".join(_line(verdict, pages) for verdict in verdicts.values())
    return f'<ul class="tally" aria-label="Verdicts">{chips}</ul><ul class="claims">{lines}</ul>{shown}'


def effects(verdicts: Verdicts) -> Plot:
    """All deciding parts, in nats and in percent: of a share, or of what a ratio is over 1; above 0 on the claim's side."""
    rows: dict[str, list[tuple]] = {"difference in loss (nats per token)": [], "percent": []}
    for verdict in verdicts.values():
        for part in verdict.deciding if verdict.label != PLUMBING else ():
            if part.estimate is None:  # the line of its claim says so
                continue
            says = next(of.says for of in verdict.about.parts if of.name == part.name)
            low, high = (math.nan if x is None else x for x in (part.low, part.high))
            name = f"{verdict.claim} {part.name}"
            unit = "difference in loss (nats per token)" if part.unit is Unit.NATS else "percent"
            rows[unit].append((name, *_turned(part, says, part.estimate, low, high), part.label))
    columns = ["name", "mean", "low", "high", "label"]
    return all_effects({unit: pd.DataFrame(of, columns=columns) for unit, of in rows.items()}, COLORS)


def _turned(part: JudgedPart, says: str, value: float, low: float, high: float) -> tuple[float, float, float]:
    """From no effect (of a value that is claimed: from that), the paper's side above 0."""
    scale = 1.0 if part.unit is Unit.NATS else 100.0
    from_here = part.figure if says == "near" and part.figure is not None else part.neutral
    moved = [scale * (x - from_here) for x in (value, low, high)]
    if says in ("below", "at or below"):
        moved = [-moved[0], -moved[2], -moved[1]]
    return moved[0], moved[1], moved[2]


def _line(verdict: ClaimVerdict, pages: Collection[str]) -> str:
    about = verdict.about
    page = f'<p><a href="{about.page}.html">Page {html.escape(about.page)}</a></p>' if about.page in pages else ""
    said = "" if verdict.label == PLUMBING else f"<p>{html.escape(verdict.sentence)}</p>{rests_html(verdict)}"
    return (
        f'<li id="{verdict.claim}"><details><summary><b>{verdict.claim}</b><span>{html.escape(about.short)}</span>{badge(verdict.label)}</summary>'
        f"{said}{page}{judged_html(verdict)}</details></li>"
    )


def claim_table(verdicts: Verdicts, link: str) -> str:
    """A line for each claim as Markdown, for the README.

    Args:
        link: to where a claim is judged, with {claim} in lower case.
    """
    lines = ["| | the paper | here |", "|---|---|---|"]
    for verdict in verdicts.values():
        name = f"[{verdict.claim}]({link.format(claim=verdict.claim.lower())})"
        lines.append(_row(name, verdict.about.short, verdict.label))
    return "\n".join(lines)


def scoreboard_markdown(verdicts: Verdicts, scale: str) -> str:
    """The claims with their deciding parts as Markdown, which GitHub shows where it shows no HTML."""
    lines = [f"# What the paper claims, and what holds here at scale {scale}", ""]
    lines.append("Generated by `ecmoe index`; the pages beside it say more, in a browser.")
    for verdict in verdicts.values():
        lines += ["", f"## {verdict.claim}", "", f"**{verdict.label}.** {verdict.about.text}.", ""]
        if verdict.rests_on.runs:
            lines += [f"{verdict.sentence} Rests on {verdict.rests_on}.", ""]
        else:
            lines += [f"To run it: `{verdict.command}`", ""]
        lines += ["| part | found | seeds | reproduced if | verdict |", "|---|---|---|---|---|"]
        lines += [_row(part.name, found(part), str(part.seeds), part.rule, part.label) for part in verdict.deciding]
    return "\n".join(lines) + "\n"


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def studies(scale: str) -> tuple[pd.DataFrame, str]:
    """A row per page: runs of its plan, finished, missing by arm; and the total over distinct runs, in words."""
    rows, distinct = [], {}
    _, wrong = plan.sound(scale)
    for page in plan.pages(scale):
        if page in wrong:  # its own page says what
            continue
        planned = plan.plan(scale, [page])
        done, missing = {}, {}
        for one in planned:
            state = engine.state(one, scale)
            summary = read_record(plan.record(one, scale)).summary if state.record else {"status": "not run"}
            if summary["status"] == "finished":
                done[one.name] = summary
            why = "" if not state.record else f" ({'to be measured' if state.lacking else summary['status']})"
            if why != " (finished)":
                missing.setdefault(one.arms[0] + why, []).append(str(one.seed))
        distinct |= done
        text = "; ".join(f"{arm} s{', s'.join(seeds)}" for arm, seeds in missing.items())
        if planned:
            hours = sum(run["seconds"] or 0 for run in done.values()) / 3600
            rows.append((page, len(planned), len(done), hours, text if done else "all of them"))
    hours = sum(run["seconds"] or 0 for run in distinct.values()) / 3600
    tokens = sum(run["tokens"] or 0 for run in distinct.values())
    devices = ", ".join(sorted({run["device"] for run in distinct.values() if run["device"]})) or "no device"
    total = f"{len(distinct)} distinct runs, shared between pages: {tokens / 1e6:,.0f} million tokens, {hours:.2f} hours of training on {devices}."
    return pd.DataFrame(rows, columns=["page", "runs", "finished", "hours", "missing (seeds)"]), total


def studies_html(scale: str) -> str:
    """What every page of that scale rests on, what is missing, and the command that trains it."""
    rows, total = studies(scale)
    link = Markup('<a href="{0}.html">{0}</a>')
    again = f"make reproduce{f' SCALE={scale}' * (scale != 'smoke')}"
    caption = f"{total} \u201c{again}\u201d trains what is missing, and nothing else."
    return table_html(rows, caption, {"page": link.format, "hours": ".2f"})
