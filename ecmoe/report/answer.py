"""The answer on top of a page: verdict, one sentence, what it rests on; and, further down, how it was judged.

What it says comes from `ecmoe.study.verdict` alone, which reads protocol and records: a notebook adds nothing to it.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

import pandas as pd

from ecmoe.report.markup import badge, folded, show_html, table_html
from ecmoe.study.estimate import Unit, amount, counted, of_values, span
from ecmoe.study.protocol import protocol
from ecmoe.study.verdict import NOT_RUN, PLUMBING, ClaimVerdict, JudgedPart, judge


def answer(scale: str, *claims: str) -> None:
    """Show the verdict on each claim: its label, one sentence with the number, and what it rests on.

    Args:
        scale: whose records are judged; at smoke none are. claims: "C1" ... "C10", "L1", "L2".
    """
    for claim in claims[:1] if scale == "smoke" else claims:
        verdict = judge(claim, scale)
        show_html(answer_html(verdict), f"{claim}: {verdict.label}. {verdict.sentence}")


def finding(said: str, rests_on: str = "", label: str = "") -> None:
    """Show what a page found that judges no claim of the paper: one sentence with its number.

    Args:
        said: the sentence. rests_on: seeds, tokens, size. label: on a badge, where there is something to decide.
    """
    chip = f"<p>{badge(label)}</p>" if label else ""
    rests = f'<p class="rests">Rests on {html.escape(rests_on)}.</p>' if rests_on else ""
    show_html(f'<section class="answer">{chip}<p class="said">{html.escape(said)}</p>{rests}</section>', said)


def judged(scale: str, *claims: str) -> None:
    """Show how each claim was judged: its parts, the rule of each, what it could have seen, what would refute it."""
    verdicts = [judge(claim, scale) for claim in claims]
    each = "".join(f'<h3 id="judged-{v.claim}">{v.claim}</h3>{judged_html(v)}' for v in verdicts)
    text = "\n".join(f"{v.claim}, {part.name}: {part.label}. {part.sentence}" for v in verdicts for part in v.parts)
    show_html(f'<h2 id="judged">How it was judged</h2>{each}', text)


def answer_html(verdict: ClaimVerdict) -> str:
    """A claim's label, sentence, and what it rests on."""
    claim = "" if verdict.label == PLUMBING else f" <strong>{html.escape(verdict.claim)}</strong>"
    return (
        f'<section class="answer"><p>{badge(verdict.label)}{claim}</p>'
        f'<p class="said">{html.escape(verdict.sentence)}</p>{rests_html(verdict)}</section>'
    )


def rests_html(verdict: ClaimVerdict) -> str:
    """What a verdict rests on; how to run what is missing; and a warning where its runs differ in what they mustn't."""
    if verdict.label == PLUMBING:
        return ""
    lines = []
    if verdict.rests_on.runs:
        lines.append(f'<p class="rests">Rests on {html.escape(str(verdict.rests_on))}.</p>')
    if verdict.label == NOT_RUN or any(part.label == NOT_RUN for part in verdict.deciding):
        lines.append(f'<p class="not-run">To run what is missing: <code>{html.escape(verdict.command)}</code></p>')
    if verdict.rests_on.mixed:
        what = " and ".join({"code": "code", "card": "kind of device"}[name] for name in verdict.rests_on.mixed)
        lines.append(f'<p class="warning"><strong>Mind:</strong> runs that are compared differ in {what}.</p>')
    if repeats := verdict.rests_on.repeats:
        said = "Its runs come from several versions of the code. Repeats, equal to the last digit, show that these compute the same"
        lines.append(f'<p class="rests">{said}: {html.escape(", ".join(repeats))}.</p>')
    return "".join(lines)


def judged_html(verdict: ClaimVerdict) -> str:
    """The parts of a claim in a table, those that decide nothing folded; below, the claim and the rules for all."""
    about, level = verdict.about, 100 * protocol().level
    beside = [part for part in verdict.parts if not part.decides]
    names = {
        "the claim": f"{about.text} (section {about.where})",
        "the paper": about.paper,
        "refuted by": about.refuted_by,
        "proxy": about.proxy,
        "differs from the paper": about.differences,
        "rules": f"Fixed in configs/protocol.yaml before the runs. The parts that decide are held to {level:g}% together (Holm); fewer than "
        f"{protocol().least_seeds} seeds give no verdict; the weakest part is the claim's. Could have seen: the smallest true effect that as "
        f"many seeds, as noisy, show with {100 * protocol().power:g}% power.",
        "amendments": "; ".join(
            f"{one['date']}: {one['what']} ({one['why']})" for one in protocol().amendments if about.id in one["claims"]
        )
        or "none",
    }
    listed = "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in names.items() if v)
    more = (
        folded(f"{len(beside)} comparisons beside it, which decide nothing", parts_html(beside, verdict.label))
        if beside
        else ""
    )
    return f"{parts_html(verdict.deciding, verdict.label)}{more}<dl>{listed}</dl>"


def parts_html(parts: Sequence[JudgedPart], label: str) -> str:
    """A row for each part: what was found, and by which rule it has its label."""
    rows = [
        {
            "part": part.name,
            "verdict": part.label,
            "found": found(part),
            "seeds": _seeds(part),
            "reproduced if": part.rule,
            "could have seen": _seen(part),
        }
        for part in parts
    ]
    frame = pd.DataFrame(rows)
    if label == PLUMBING:  # numbers of smoke say nothing
        frame = frame[["part", "reproduced if"]]
    return table_html(frame, "", {} if label == PLUMBING else {"verdict": badge})


def found(part: JudgedPart) -> str:
    """A part's estimate and interval in its unit; a difference has its sign."""
    if part.estimate is None:
        return "\u2013"
    size = amount(part.estimate, part.unit, compares=part.compares)
    if part.unit is not Unit.RATIO and part.compares and part.estimate > 0:
        size = f"+{size}"
    return size if part.low is None else f"{size} ({span(part.low, part.high, part.unit)})"


def _seeds(part: JudgedPart) -> str:
    if not part.seeds:
        return "\u2013"
    return counted(part.seeds, part.effect.of) + (f"; without {', '.join(part.missing)}" if part.missing else "")


def _seen(part: JudgedPart) -> str:
    if part.smallest is None or not math.isfinite(part.smallest):
        return "\u2013"
    return amount(part.smallest, part.unit, compares=True)


def difference(
    frame: pd.DataFrame, value: str, a: str, b: str, *, by: str = "arm", unit: str = "nats per token"
) -> str:
    """How much more a has than b, over the seeds that both have: "+0.004 nats (0.002 to 0.006; 3 seeds)"; or "not run".

    Args:
        frame: a row per arm and seed. value: the column; shares are of 1. by: the column of a and b. unit: of `Unit`.
    """
    of = {name: frame[frame[by] == name].set_index("seed")[value] for name in (a, b)}
    unit = Unit(unit)
    found = of_values((of[a] - of[b]).dropna(), unit)
    if not found.n:
        return "(not run)"
    inner = found.interval()
    between = f"{span(*inner, unit)}; " if inner else ""
    sign = "+" if found.value > 0 else "\u2212" if found.value < 0 else ""
    return f"{sign}{amount(abs(found.value), unit, compares=True)} ({between}{counted(found.n, found.of)})"
