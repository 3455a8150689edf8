"""What a notebook shows: figures with alternative text, tables, verdicts, formulas, provenance.

Everything is HTML that needs no script and no network, with a plain text beside it. Text that comes
from data is escaped. What makes pages (`execute`, `render`, `index`) can be had from here too.
"""

from __future__ import annotations

import base64
import html
import importlib
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pandas as pd
from IPython.display import display
from markupsafe import Markup

from ecmoe.report.plots.parts import Plot
from ecmoe.report.plots.style import count_colors, is_dark
from ecmoe.report.scoreboard import (
    claim_table,
    find_claim,
    load_verdicts,
    record,
    scoreboard,
    studies,
    verdict_folder,
)
from ecmoe.study.stats import PLUMBING, Verdict, smallest_effect
from ecmoe.training.result import Result

# `execute`, `render` and `index` are found here too, by __getattr__.
__all__ = [
    "claim_table", "formula", "plumbing_only", "provenance", "scoreboard", "show",
    "show_scoreboard", "show_studies", "show_table", "show_text", "show_verdict", "verdict_folder",
]  # fmt: skip

Format = str | Callable[[Any], str]
_DPI = 150
# Badge colours: white on them has a contrast above 4.5.
_COLORS = {
    "reproduced": "#1a7f4b",
    "reproduced in direction": "#2f6fb0",
    "not reproduced": "#b3261e",
    "undecided": "#6a5f00",
    "not run": "#5f6368",
    PLUMBING: "#5f6368",
}


_ELSEWHERE = {"execute": "execution", "render": "render", "index": "render"}


def __getattr__(name: str) -> Any:
    if name in _ELSEWHERE:  # they bring nbconvert and papermill, which notebooks don't need
        return getattr(importlib.import_module(f"ecmoe.report.{_ELSEWHERE[name]}"), name)
    raise AttributeError(f"module 'ecmoe.report.page' has no attribute {name!r}")


def show(plot: Plot, caption: str, formats: Mapping[str, Format] | None = None) -> None:
    """Show a figure with its alternative text and caption, its numbers folded below."""
    buffer = io.BytesIO()
    plot.figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    data = base64.b64encode(buffer.getvalue()).decode()
    width, height = (round(96 * inches) for inches in plot.figure.get_size_inches())
    _display(
        f'<figure><img alt="{html.escape(plot.alt)}" width="{width}" height="{height}" '
        f'src="data:image/png;base64,{data}" style="max-width:100%;height:auto">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        '<details class="numbers"><summary>numbers of this figure</summary>'
        f"{table_html(plot.data, '', formats)}</details>",
        f"{caption}\n{plot.alt}",
    )


def show_table(frame: pd.DataFrame, caption: str = "", formats: Mapping[str, Format] | None = None) -> None:
    """Show a table: escaped, numbers to the right, the first column heading its row.

    Args:
        frame: its index is not shown. caption: above it.
        formats: column -> format such as ".1f" or "{:.0%}", or a function; else by size. What a
            function returns is escaped too, unless it is markupsafe's Markup.
    """
    _display(table_html(frame, caption, formats), f"{caption}\n{frame.to_string(index=False)}")


def table_html(frame: pd.DataFrame, caption: str = "", formats: Mapping[str, Format] | None = None) -> str:
    """`show_table`'s HTML. What is missing is a dash, never a 0."""
    formats = formats or {}
    unknown = [name for name in formats if name not in frame.columns]
    if unknown:
        raise ValueError(f"formats names {unknown}, but the columns are {list(frame.columns)}")
    numeric = [_is_numeric(frame[name]) for name in frame.columns]
    head = "".join(
        f'<th scope="col"{_right(number, heading=True)}>{html.escape(str(name).replace("_", " "))}</th>'
        for name, number in zip(frame.columns, numeric, strict=True)
    )
    columns = [[_cell(v, formats.get(name) or _by_size(frame[name])) for v in frame[name]] for name in frame.columns]
    body = []
    for i, cells in enumerate(zip(*columns, strict=True)):
        marked = [f"<td{_right(number)}>{cell}</td>" for cell, number in zip(cells, numeric, strict=True)]
        wide = ' class="long"' * (len(str(frame.iat[i, 0])) > 12)  # wraps, but not to a word a line
        marked[0] = f'<th scope="row"{wide}{_right(numeric[0])}>{cells[0]}</th>'
        body.append(f"<tr>{''.join(marked)}</tr>")
    heading = f"<caption><span>{html.escape(caption)}</span></caption>" if caption else ""
    rows = "".join(body) or f'<tr><td colspan="{max(1, len(frame.columns))}">nothing</td></tr>'
    table = f"<table>{heading}<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return f'<div class="scroll" tabindex="0">{table}</div>'


def show_text(tokens: Sequence[str], counts: Sequence[int], caption: str, unit: str = "expert") -> None:
    """Show text with each token on the colour of its count, as in `plots.expert_shares`; 0 is struck through.

    Args:
        tokens: the text in pieces; escaped. counts: a whole number for each. unit: what is counted.
    """
    if len(tokens) != len(counts):
        raise ValueError(f"{len(tokens)} tokens but {len(counts)} counts: there must be one for each")
    colors = count_colors()

    def mark(text: str, count: int) -> str:
        color = colors[min(count, len(colors) - 1)]
        style = f"background:{color};color:{'#fff' if is_dark(color) else '#000'}"
        style += ";text-decoration:line-through" * (not count)
        return f'<span style="{style}" title="{times(count)}">{html.escape(text)}</span>'

    def times(count: int) -> str:
        return f"{count} {unit}{'' if count == 1 else 's'}"

    pairs = list(zip(tokens, counts, strict=True))
    pieces = [mark(text.replace("\n", "\u23ce\n"), count) for text, count in pairs]
    key = " ".join(mark(f"\u00a0{times(count)}\u00a0", count) for count in sorted(set(counts)))
    _display(
        f'<figure class="text"><p>{key}</p><pre>{"".join(pieces)}</pre>'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>",
        f"{caption}\n" + " ".join(f"{text!r}:{count}" for text, count in pairs),
    )


def show_verdict(
    verdict: Verdict,
    claim_id: str,
    *,
    scale: str,
    here: str = "",
    differences: str = "",
    notebook: str = "",
) -> None:
    """Show a verdict with its effect and rule, and record it for the scoreboard.

    Args:
        verdict: of `stats.verdict`. claim_id: "C1" ... "C10", "L1", "L2".
        scale: at "smoke" the label is "plumbing only", and no effect is shown.
        here: what was found, in a few words, before the effect.
        differences: from the paper, as far as they matter for this claim.
        notebook: default: the one being executed ($ECMOE_NOTEBOOK), else the claim's own.
    """
    claim = find_claim(claim_id)
    if scale == "smoke":
        verdict = verdict._replace(label=PLUMBING)
    kept = record(verdict, claim_id, scale, here, differences, notebook)
    rows = [("the claim", f"{claim.text} ({claim.where})"), ("the paper", claim.paper)]
    if verdict.label != PLUMBING:
        parts = [(f"here: {name}", part, str(part)) for name, part in verdict.parts]
        for name, part, found in parts or [("here", verdict, str(verdict.effect))]:
            found = f"{here}; {found}" if here and not parts else found
            least = smallest_effect(part.effect)
            if math.isfinite(least):
                found += f"; would show: {least:.3g}{' x, or its inverse,' if part.effect.ratio else ''} or more"
            rows.append((name, found))
        rows.append(
            ("would show", "the smallest true effect that as many values, as noisy, show with 80% power (t test)")
        )
    rule = "rule" if verdict.label != PLUMBING else "rule, where there is a verdict"
    rows += [(rule, verdict.rule), ("refuted by", claim.refuted_by)]
    rows += [("proxy", claim.proxy)] if claim.proxy else []
    rows += [("differs from the paper", differences)] if differences else []
    items = "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in rows)
    _display(
        '<section class="verdict" style="padding:.2rem 1rem;'
        f'border-left:.4rem solid {_COLORS[verdict.label]}">'
        f"<p>{badge(verdict.label)} <strong>{claim_id}</strong></p><dl>{items}</dl></section>",
        f"{claim_id}: {kept['label']}\n" + "\n".join(f"{k}: {v}" for k, v in rows),
    )


def show_scoreboard(scale: str) -> None:
    """Show every claim's verdict at that scale, linked to the report that gave it."""
    folder = verdict_folder(scale)
    given = load_verdicts(folder)

    def link(claim_id: str) -> str:
        if claim_id not in given:  # there may be no such page
            return claim_id
        return Markup('<a href="{}.html">{}</a>').format(given[claim_id]["notebook"], claim_id)

    def lines(text: str) -> Markup:
        return Markup("").join(Markup('<div class="part">{}</div>').format(line) for line in text.splitlines())

    show_table(scoreboard(folder), formats={"id": link, "here": lines, "verdict": badge})


def show_studies(scale: str) -> None:
    """Show what every page of that scale rests on, and which runs are missing."""
    rows, total = studies(scale)
    page = Markup('<a href="{0}.html">{0}</a>')
    again = f"make reproduce{f' SCALE={scale}' * (scale != 'smoke')}"
    caption = f"{total} “{again}” trains what is missing, and nothing else."
    show_table(rows, caption, {"page": page.format, "hours": ".2f"})


def badge(label: str) -> Markup:
    """A verdict's label on its colour."""
    return Markup(
        f'<span class="badge" style="background:{_COLORS.get(label, "#5f6368")};color:#fff;'
        f'padding:.15em .6em;border-radius:.8em;font-weight:600">{html.escape(label)}</span>'
    )


def plumbing_only(scale: str) -> None:
    """At scale "smoke": say that the page shows that everything runs, and nothing else."""
    if scale == "smoke":
        text = (
            "A tiny model and a few steps: this page shows that every part works together. "
            "Its numbers say nothing about the paper's claims, and no verdict is given."
        )
        _display(f'<p class="banner">{badge(PLUMBING)} {text}</p>', f"Plumbing only. {text}")


def formula(latex: str, alt: str = "") -> None:
    """Show a formula as MathML, which browsers draw by themselves; `alt` says it in words."""
    _display(math_html(latex, "block", alt), alt or latex)


def math_html(latex: str, mode: str = "inline", alt: str = "") -> str:
    """LaTeX as MathML; `mode`: "inline" or "block"."""
    from latex2mathml.converter import convert

    mathml = convert(latex, display=mode)
    return mathml.replace("<math ", f'<math alttext="{html.escape(alt or latex)}" ', 1)


def provenance(results: Iterable[Result], *, scale: str = "") -> None:
    """Show where numbers come from: commit, versions, devices, seeds, hours, data, what is missing.

    Warns if the runs behind a page differ in commit, versions, device, precision or data.
    """
    results = list(results)
    done = [r.summary for r in results if r.summary["status"] != "not run"]
    versions = sorted({f"{k} {v}" for s in done for k, v in (s.get("versions") or {}).items()})
    rows = [
        (name, _distinct(done, key))
        for name, key in (("commit", "commit"), ("device", "device"), ("precision", "precision"))
    ]
    processes = _distinct(done, "world_size")
    if processes != {"1"}:
        rows.append(("processes (the pool is each one's batch)", processes))
    sharing = {s.get("sharing", 1) for s in done}
    if sharing - {1}:
        rows.append(
            (
                "runs side by side on a device",
                {f"{n}: seconds are the run's own over {n}" if n > 1 else "1" for n in sharing},
            )
        )
    rows.append(("versions", [", ".join(versions)]))
    rows.append(("seeds", [", ".join(map(str, sorted({s["seed"] for s in done})))]))
    rows.append(("training time", [_hours(sum(s.get("seconds") or 0 for s in done))]))
    rows.append(("tokens trained on", [f"{sum(s.get('tokens') or 0 for s in done):,}"]))
    starts = sorted(s["started"] for s in done if s.get("started"))
    rows.append(("trained", [f"{starts[0][:10]} to {starts[-1][:10]}" if starts else "never"]))
    data = [s["data"] for s in done if s.get("data")]
    rows.append(("data", {_data_text(d) for d in data}))
    for status in ("not run", "diverged", "failed"):
        there = [r.summary["name"] + _because(r.summary) for r in results if r.summary["status"] == status]
        if there:
            rows.append((f"{status} ({len(there)} of {len(results)})", there))
    mixed = [name for name, values in rows[:3] if len(values) > 1]
    mixed += ["versions"] * (len({str(s.get("versions")) for s in done}) > 1)
    mixed += ["data"] * (len({d.get("digest") for d in data}) > 1)
    warning = f"The runs behind this page differ in {', '.join(mixed)}." if mixed else ""
    body = "".join(
        f'<tr><th scope="row">{html.escape(name)}</th>'
        f"<td>{'<br>'.join(html.escape(str(v)) for v in sorted(values)) or '–'}</td></tr>"
        for name, values in rows
    )
    note = f'<p class="warning" role="note"><strong>Mind:</strong> {html.escape(warning)}</p>' if warning else ""
    each = f'<details class="numbers"><summary>seconds and tokens of each run</summary>{table_html(_costs(results))}</details>'
    _display(
        f'{note}<div class="scroll"><table class="provenance"><tbody>{body}</tbody></table></div>{each}',
        "\n".join([warning, *(f"{name}: {'; '.join(map(str, sorted(values)))}" for name, values in rows)]),
    )


def _costs(results: Sequence[Result]) -> pd.DataFrame:
    """A row per finished run: what it took, and where."""
    keys = ("name", "seconds", "tokens", "tokens_per_second", "sharing", "device", "commit")
    rows = [{key: result.summary.get(key) for key in keys} for result in results if result.ok]
    frame = pd.DataFrame(rows, columns=keys)
    if (frame["sharing"].fillna(1) == 1).all():
        return frame.drop(columns="sharing")
    return frame.fillna({"sharing": 1})


def _display(markup: str, text: str) -> None:
    display({"text/html": markup, "text/plain": text}, raw=True)


def _right(number: bool, heading: bool = False) -> str:
    whole = "" if heading else ";white-space:nowrap"  # a number in two lines is read as two
    return f' style="text-align:right{whole}"' if number else ""


def _is_numeric(column: pd.Series) -> bool:
    return pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column)


def _by_size(column: pd.Series) -> Format:
    """Whole numbers with commas; else three decimals below 100, and no false digits above."""
    if not _is_numeric(column):
        return str
    finite = column.dropna().abs()
    if (finite == finite.round()).all():
        return ",.0f"
    if finite.max() >= 1000:
        return ",.0f" if finite[finite > 0].min() >= 1 else ",g"  # what is there is no 0
    return ".1f" if finite.max() >= 100 else ".3f" if finite.max() >= 0.01 else ".2e"


def _cell(value: Any, how: Format) -> str:
    if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
        return '<span title="not measured">–</span>'
    if isinstance(value, bool):
        return "yes" if value else "no"
    if callable(how):
        shown = how(value)
        return shown if isinstance(shown, Markup) else html.escape(str(shown))
    return html.escape(how.format(value) if "{" in how else format(value, how))


def _distinct(summaries: list[dict[str, Any]], key: str) -> set[str]:
    return {str(s.get(key, "unknown")) for s in summaries}


def _because(summary: Mapping[str, Any]) -> str:
    return f": {summary['error']}" if summary.get("error") else ""


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.2f} hours" if seconds >= 360 else f"{seconds:.0f} seconds"


def _data_text(data: Mapping[str, Any]) -> str:
    tokens, unit = data.get("train_tokens"), data.get("tokenizer", "tokens")
    size = f"{tokens:,} training tokens ({unit}, vocabulary {data.get('vocab_size')})" if tokens else ""
    if data.get("train_images"):
        shape = " x ".join(map(str, data["shape"]))
        size = f"{data['train_images']:,} training and {data['val_images']:,} validation images ({shape})"
    licence = f"licence: {data.get('licence', 'unknown')}"
    digest = f"digest {str(data.get('digest', 'unknown'))[:12]}"
    parts = [data.get("name", "unknown"), data.get("attribution", ""), licence, size, digest]
    return "; ".join(str(part) for part in parts if part)
