"""Show where the numbers of a page come from: commit, versions, devices, seeds, hours, data, and missing runs."""

from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from ecmoe.report.markup import markup, show_html, table_html
from ecmoe.study import repeats
from ecmoe.study.load import Study


def provenance(study: Study, differences: str = "") -> None:
    """Show the provenance of a study's runs and a page's differences from the paper; warn if code, device or data differ among runs."""
    results = [r for by_arm in study.values() for r in by_arm]
    done = [r.summary for r in results if r.summary["status"] != "not run"]
    data = [s["data"] for s in done if s.get("data")]
    starts = sorted(s["started"][:10] for s in done if s.get("started"))
    seconds = sum(s.get("seconds") or 0 for s in done)
    same = {key: _distinct(done, key) for key in ("code", "commit", "device", "precision")}
    same["versions"] = {", ".join(f"{k} {v}" for k, v in sorted((s.get("versions") or {}).items())) for s in done}
    rows: dict[str, Iterable[Any]] = same | {
        "data": {_data_text(d) for d in data},
        "processes": _distinct(done, "world_size") - {"1"},
        "runs that shared a device (seconds: wall time divided by their number)": _distinct(done, "sharing", 1) - {"1"},
        "seeds": [", ".join(map(str, sorted({s["seed"] for s in done})))],
        "training time": [f"{seconds / 3600:.2f} hours" if seconds >= 360 else f"{seconds:.0f} seconds"],
        "tokens trained on": [f"{sum(s.get('tokens') or 0 for s in done):,}"],
        "trained": [" to ".join(dict.fromkeys((starts[0], starts[-1]))) if starts else "never"],
    }
    for status in ("diverged", "failed"):
        lost = [s for s in done if s["status"] == status]
        rows[status] = [": ".join(filter(None, (s["name"], s.get("error")))) for s in lost]
    rows["not run"] = [f"{len(results) - len(done)} of {len(results)} runs"] if len(done) < len(results) else []
    linked = repeats.linked(done, repeats.kept(study.scale))
    rows[
        "repeated runs, equal to the last digit, which show that these versions of the code compute the same numbers"
    ] = set(linked or ())
    if not done:
        rows = {"not run": [f"any of {len(results)} runs"]}
    shown = {name: sorted(map(str, values)) for name, values in rows.items() if values}
    # Commits may differ without changing any number: the digest of the code that determines the numbers counts, if known.
    passed = ("commit", "code") if linked else ("commit",)
    mixed = [name for name in same if name not in passed and len(shown.get(name, ())) > 1]
    mixed += ["commit"] * ("unknown" in shown.get("code", ()) and len(shown.get("commit", ())) > 1)
    mixed += ["data"] * (len({d.get("digest") for d in data}) > 1)
    warning = f"The runs behind this page differ in {', '.join(mixed)}." if mixed else ""
    keys = ("name", "seconds", "tokens", "tokens_per_second", "sharing", "device", "commit")
    took = pd.DataFrame([{key: r.summary.get(key) for key in keys} for r in results if r.ok], columns=keys)
    took = took.fillna({"sharing": 1})
    costs = table_html(took if took["sharing"].ne(1).any() else took.drop(columns="sharing")) if done else ""
    show_html(markup("provenance", shown, differences, warning, costs))


def _distinct(summaries: list[dict[str, Any]], key: str, default: Any = "unknown") -> set[str]:
    return {str(s.get(key, default)) for s in summaries}


def _data_text(data: Mapping[str, Any]) -> str:
    size, tokens = "", data.get("train_tokens")
    if tokens:
        unit = data.get("tokenizer", "tokens")
        size = f"{tokens:,} training tokens ({unit}, vocabulary {data.get('vocab_size')})"
    elif data.get("train_images"):
        shape = " x ".join(map(str, data["shape"]))
        size = f"{data['train_images']:,} training and {data['val_images']:,} validation images ({shape})"
    parts = data.get("parts") or [data]  # of a mix
    silent = {key for key in ("attribution", "licence") if all(part.get(key) == "not stated" for part in parts)}
    licence = "not stated" if "licence" in silent else data.get("licence", "unknown")
    attribution = None if "attribution" in silent else data.get("attribution")
    digest = f"digest {str(data.get('digest', 'unknown'))[:12]}"
    return "; ".join(filter(None, (data.get("name", "unknown"), attribution, f"licence: {licence}", size, digest)))
