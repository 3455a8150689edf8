"""The answer at the top of a page and, further down, how it was judged: what `study.verdict` computes, as HTML."""

from collections.abc import Sequence
from functools import partial

import pandas as pd
from markupsafe import Markup

from ecmoe.report.markup import markup, show_html, table_html
from ecmoe.study.estimate import Estimate, of_values
from ecmoe.study.load import Study
from ecmoe.study.protocol import protocol
from ecmoe.study.units import Unit, amount, span
from ecmoe.study.verdict import NOT_RUN, PLUMBING, ClaimVerdict, JudgedPart, RestsOn, capital, judge, not_recorded

NOTHING = "(not run)"


def answer(scale: str, *claims: str) -> None:
    """Show the verdict on each claim ("C1", "L2"): label, sentence, and the runs behind it; at scale smoke a note that there is none."""
    for claim in claims[:1] if scale == "smoke" else claims:
        show_html(markup("verdict", judge(claim, scale)))


def finding(said: str, rests_on: Study | str) -> None:
    """Show the finding of a page that judges no claim of the paper: `said`, one sentence with its number.

    rests_on: what it is based on, in words; or a study, whose finished runs are summarised, with the command that trains missing
    ones. For a study at scale smoke the finding is labelled "plumbing only"."""
    label, more = "finding", Markup()
    if isinstance(rests_on, Study):
        study, configs = rests_on, {one.name: one.config for one in rests_on.planned}
        done = [result.summary for results in study.values() for result in results if result.ok]
        rests_on = RestsOn.of(done, [configs[run["name"]] for run in done])
        if study.scale == "smoke":
            label = PLUMBING
        elif not done:
            label, said = NOT_RUN, f"Nothing of this page was run at scale {study.scale}."
        if len(done) < len(configs) and study.scale != "smoke":
            more = markup("not_run", f"ecmoe runs {study.page} --scale {study.scale} --train")
    if label == "finding":
        more = markup("rests_on", rests_on) + more
    show_html(markup("answer", label, said, "", more))


def judged(scale: str, *claims: str) -> None:
    """Show how each claim was judged: its parts with their rules and minimum detectable effects, and what would refute it."""
    show_html(markup("judged_claims", [(claim, judged_html(judge(claim, scale))) for claim in claims]))


def told(scale: str, claim: str, *parts: str) -> str:
    """Return the sentences of these parts of a claim, for a caption; "" at scale smoke, whose numbers are meaningless."""
    said = {part.name: part.sentence for part in judge(claim, scale).parts}
    return " ".join(f"{capital(said[name])}." for name in parts if scale != "smoke")


def at_size(scale: str, page: str, *claims: str) -> pd.DataFrame:
    """Return claims judged on another page's arms beside the original verdicts, a row per part with runs there; empty at smoke."""
    rows = []
    for claim in claims:
        own = {part.name: (found(part), part.label) for part in judge(claim, scale).parts}
        there = [part for part in judge(claim, scale, page=page).parts if part.label not in (NOT_RUN, PLUMBING)]
        rows += [(claim, part.name, found(part), part.label, *own[part.name]) for part in there]
    return pd.DataFrame(rows, columns=["claim", "part", "here", "verdict here", "in the study", "its verdict"])


def judged_html(verdict: ClaimVerdict) -> Markup:
    """Return a table of the claim's deciding parts, a folded one of the other parts, then the claim and the common rules."""
    beside, rules = [part for part in verdict.parts if not part.decides], protocol()
    amended = [one for one in rules.amendments if verdict.about.id in one.claims]
    tables = [parts_html(parts, verdict.label) for parts in (verdict.deciding, beside)]
    return markup("judged", *tables, len(beside), verdict.about, rules, amended)


def parts_html(parts: Sequence[JudgedPart], label: str) -> Markup:
    """Return a table with a row per part: its label, estimate, seeds, rule, and minimum detectable effect."""
    rows = []
    for part in parts:
        missing = ", ".join(f"{arm} (seed {seed})" for arm, seed in part.missing)
        seeds = part.effect.sample + f"; missing: {missing}" * bool(missing)
        seeds += f"; {not_recorded(part.of, part.unrecorded)}" * bool(part.unrecorded)
        if not part.effect.n and not part.unrecorded:
            seeds = None
        smallest = amount(part.effect.smallest(part.level, protocol().power), part.unit, compares=True)
        smallest += ", up or down" * (part.unit is Unit.RATIO)
        rows.append((part.name, part.label, found(part), seeds, part.rule, smallest if part.interval else None))
    columns = ["part", "verdict", "found", "seeds", "reproduced if", "minimum detectable effect"]
    frame = pd.DataFrame(rows, columns=columns)
    if label == PLUMBING:  # numbers at scale smoke are meaningless
        return table_html(frame[["part", "reproduced if"]])
    return table_html(frame, "", {"verdict": partial(markup, "badge")})


def found(part: JudgedPart) -> str:
    """Return a part's estimate and interval in its unit; differences have a sign."""
    if not part.effect.n:
        return "\u2013"
    size = amount(part.effect.value, part.unit, compares=part.compares)
    if part.unit is not Unit.RATIO and part.compares and part.effect.value > 0:
        size = f"+{size}"
    return f"{size} ({span(*part.interval, part.unit)})" if part.interval else size


def difference(frame: pd.DataFrame, value: str, a: str, b: str, *, unit: str = "nats per token") -> str:
    """Return a minus b over their common seeds, such as "+0.004 nats (0.002 to 0.006; 3 seeds)"; "(not run)" without any.
    Fewer seeds than a verdict needs have no interval.

    frame: a row per arm and seed. value: the column, shares as fractions of 1. unit: a value of `Unit`."""
    found = _minus(frame, value, a, b, unit)
    if not found.n:
        return NOTHING
    interval = found.interval(least=protocol().least_seeds)
    between = f"{span(*interval, found.unit)}; " if interval else ""
    sign = "+" * (found.value > 0)
    return f"{sign}{amount(found.value, found.unit, compares=True)} ({between}{found.sample})"


def below(frame: pd.DataFrame, value: str, a: str, b: str) -> bool:
    """Return whether a is surely below b: whether the interval of `difference` is below 0 as a whole."""
    interval = _minus(frame, value, a, b).interval(least=protocol().least_seeds)
    return interval is not None and interval[1] < 0


def _minus(frame: pd.DataFrame, value: str, a: str, b: str, unit: str = Unit.NATS) -> Estimate:
    of = {name: frame[frame["arm"] == name].set_index("seed")[value] for name in (a, b)}
    return of_values(of[a] - of[b], Unit(unit))
