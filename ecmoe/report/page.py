"""What notebooks call to show figures with alternative text, tables and text, as HTML without scripts or requests."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from ecmoe.provenance import by_other_code
from ecmoe.report.answer import NOTHING, answer, at_size, below, difference, finding, judged, told
from ecmoe.report.markup import Format, markup, show_html, table_html
from ecmoe.report.plots.style import COUNT_COLORS, Plot, on_color
from ecmoe.study import repeats
from ecmoe.study.load import Study
from ecmoe.study.protocol import protocol
from ecmoe.study.units import between, counted
from ecmoe.study.verdict import token_word

__all__ = [
    "answer", "at_size", "below", "difference", "finding", "judged", "provenance", "show", "show_runs", "show_table", "show_text", "told",
]  # fmt: skip


def show(plot: Plot, caption: str) -> None:
    """Show a figure with alternative text and caption, its numbers folded below; without runs, "Not run" and the caption.
    A sentence about intervals, or else means, is added to the caption of a figure that has any over several seeds."""
    if plot.figure is None:
        show_html(markup("not_run_yet", caption))
        return
    rows = plot.data.reindex(columns=["seeds", "low"]).query("seeds > 0")
    seeds, of_interval = rows["seeds"], rows["seeds"][rows["low"].notna()]
    if len(of_interval):
        fewer = "; fewer have none" * (len(of_interval) < len(seeds))
        level, n = f"{100 * protocol().level:g}%", between(of_interval, "g")
        caption += f" Intervals: {level} over {n} seeds, each by itself{fewer}."
    elif (seeds > 1).any():
        caption += f" Means over {between(seeds, 'g')} seeds."
    show_html(markup("figure", plot.svg(), caption, table_html(plot.data)), f"{caption}\n{plot.alt}")


def show_table(frame: pd.DataFrame, caption: str = "", formats: Mapping[str, Format] = {}, fold: str = "") -> None:
    """Show a table, or "Not run" if all values beyond its first column are missing. If `difference` wrote intervals, the
    caption says what they are. Arguments: as in `markup.table_html`; fold: if given, the summary of the folded table."""
    values = frame.iloc[:, 1:]
    if not fold and values.shape[1] and (values.isna() | values.eq(NOTHING)).all(axis=None):
        show_html(markup("not_run_yet", caption))
        return
    if any(re.search(r" to \S+; \d+ seeds\)$", str(said)) for said in values.to_numpy().flat):  # by `difference`
        caption = f"{caption} Intervals: {100 * protocol().level:g}%, each by itself.".strip()
    shown = table_html(frame, caption, formats)
    show_html(markup("folded", fold, shown) if fold else shown)


def show_runs(table: pd.DataFrame, columns: Sequence[str], caption: str = "") -> None:
    """Show a folded table with a row per run, and the names of missing runs in its caption."""
    lacking = table["status"] == "not run"
    there, missing = table[~lacking], table[lacking].groupby("arm", sort=False)["seed"]
    if len(missing):
        named = (f"{arm} (seed {', '.join(map(str, seeds))})" for arm, seeds in missing)
        caption += f" Not run: {'; '.join(named)}."
    columns = ["arm", "seed", *["status"] * bool((there["status"] != "finished").any()), *columns]
    show_table(there.reindex(columns=columns), caption, fold=f"{len(there)} of {len(table)} runs, one by one")


def show_text(tokens: Sequence[str], counts: Sequence[int], caption: str) -> None:
    """Show text with each token coloured by its number of experts, as in `plots.expert_shares`; 0 is struck through."""

    def piece(text: str, count: int) -> tuple:
        color = COUNT_COLORS[min(count, len(COUNT_COLORS) - 1)]
        return text, color, on_color(color), not count, counted(count, "expert")

    pieces = [piece(text.replace("\n", "\u23ce\n"), count) for text, count in zip(tokens, counts, strict=True)]
    key = [piece(f"\u00a0{counted(count, 'expert')}\u00a0", count) for count in sorted(set(counts))]
    show_html(markup("text", pieces, key, caption))


def provenance(study: Study, differences: str = "") -> None:
    """Show the provenance of a study's runs and measurements, and differences from the paper; warn if code, device or data differ."""
    results = [r for by_arm in study.values() for r in by_arm]
    done = [r.summary for r in results if r.summary["status"] != "not run"]
    data = [s["data"] for s in done if s.get("data")]
    starts = [s["started"][:10] for s in done if s.get("started")]
    passes = [
        s["tokens"] / of["train_tokens"]
        for s in done
        if s.get("tokens") and (of := s.get("data") or {}).get("train_tokens")
    ]
    seconds, word = sum(s.get("seconds") or 0 for s in done), token_word(one.config for one in study.planned)
    made = done + (measured := study.as_measured())
    same = {key: _distinct(made, key) for key in ("code", "commit", "device", "precision")}
    same["versions"] = {", ".join(f"{k} {v}" for k, v in sorted((s.get("versions") or {}).items())) for s in made}
    same["code of measurements"] = {s["measures"] for s in measured if "measures" in s}
    shared = "runs that shared a device (seconds: of training steps, wall time divided by their number)"
    rows: dict[str, Iterable[Any]] = same | {
        "data": {_data_text(d) for d in data},
        "processes": _distinct(done, "world_size") - {"1"},
        shared: _distinct(done, "sharing", 1) - {"1"},
        "seeds": [", ".join(map(str, sorted({s["seed"] for s in done})))],
        "training time": [f"{seconds / 3600:.2f} hours" if seconds >= 360 else f"{seconds:.0f} seconds"],
        f"{word} trained on": [f"{sum(s.get('tokens') or 0 for s in done):,}"],
        "passes of the longest run over its text": [f"{max(passes):.2f}"] if passes else [],
        "trained": [between(starts) or "never"],
    }
    for status in ("diverged", "failed"):
        lost = [s for s in done if s["status"] == status]
        rows[status] = [": ".join(filter(None, (s["name"], s.get("error")))) for s in lost]
    rows["not run"] = [f"{len(results) - len(done)} of {len(results)} runs"] if len(done) < len(results) else []
    linked = repeats.linked(made, repeats.kept(study.scale)) or []
    equal = markup("equal", repeats.covered(linked, study.scale))
    rows[f"repeated runs, {equal}, which show that these versions of the code compute the same numbers"] = set(linked)
    if not done:
        rows = {"not run": [f"any of {len(results)} runs"]}
    shown = {name: sorted(map(str, values)) for name, values in rows.items() if values}
    # Commits may differ without changing any number: the digest of the code that determines the numbers counts.
    passed = ("commit", "code") if linked else ("commit",)
    mixed = [name for name in same if name not in passed and len(shown.get(name, ())) > 1]
    mixed += ["data"] * (len({d.get("digest") for d in data}) > 1)
    what = "runs and measurements" if any("measures" in s for s in measured) else "runs"
    warning = f"The {what} behind this page differ in {', '.join(mixed)}. " if mixed else ""
    # At other scales, code changes while the evidence grows, and repeats show whether it computes the same.
    if study.scale == "smoke" and any(map(by_other_code, done)):
        warning += "Other code than this has trained runs of this page: delete runs/ and reports/smoke/{runs,measures} to train them again."
    keys = ("arm", "name", "seconds", "tokens", "tokens_per_second", "sharing", "device", "commit")
    ended = [{**r.summary, "arm": arm} for arm, by_arm in study.items() for r in by_arm if r.ok]
    took = pd.DataFrame(ended, columns=keys)
    took = took.fillna({"sharing": 1}).rename(columns=lambda key: key.replace("tokens", word))
    costs = table_html(took if took["sharing"].ne(1).any() else took.drop(columns="sharing")) if done else ""
    show_html(markup("provenance", shown, differences, warning.strip(), word, costs))


def _distinct(summaries: list[dict[str, Any]], key: str, default: Any = "unknown") -> set[str]:
    return {str(s.get(key, default)) for s in summaries}


def _data_text(data: Mapping[str, Any]) -> str:
    of, size = {"name": "unknown", "licence": "unknown", "digest": "unknown", "tokenizer": "tokens"} | dict(data), None
    if of.get("train_tokens"):
        size = f"{of['train_tokens']:,} training tokens ({of['tokenizer']}, vocabulary {of.get('vocab_size')})"
    elif of.get("train_images"):
        shape = " x ".join(map(str, data["shape"]))
        size = f"{data['train_images']:,} training and {data['val_images']:,} validation images ({shape})"
    for key, silent in {"attribution": None, "licence": "not recorded, see README.md"}.items():
        if all(part.get(key) == "not stated" for part in of.get("parts") or [of]):  # of a mix
            of[key] = silent
    said = of["name"], of.get("attribution"), f"licence: {of['licence']}", size, f"digest {str(of['digest'])[:12]}"
    return "; ".join(filter(None, said))
