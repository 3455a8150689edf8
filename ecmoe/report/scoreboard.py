"""Every claim's verdict in one place, and what of every page's plan is there."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pandas as pd

from ecmoe import paths
from ecmoe.files import write_json
from ecmoe.study import engine, plan
from ecmoe.study.claims import CLAIMS, Claim
from ecmoe.study.stats import PLUMBING, Verdict
from ecmoe.training.result import read_record

COLUMNS = ["id", "claim", "paper", "here", "verdict"]


def find_claim(claim_id: str) -> Claim:
    """The claim of that id; an unknown one is an error that lists them."""
    if claim_id not in CLAIMS:
        raise ValueError(f"claim_id={claim_id!r}: must be one of {', '.join(CLAIMS)}")
    return CLAIMS[claim_id]


def verdict_folder(scale: str) -> Path:
    """Where verdicts are kept: $ECMOE_VERDICTS, or reports/<scale>/verdicts."""
    folder = os.environ.get("ECMOE_VERDICTS")
    return Path(folder) if folder else paths.root() / "reports" / scale / "verdicts"


def record(
    verdict: Verdict,
    claim_id: str,
    scale: str,
    here: str = "",
    differences: str = "",
    notebook: str = "",
) -> dict[str, Any]:
    """Keep a verdict for the scoreboard, in `<notebook>.json`; returns what was kept."""
    claim = find_claim(claim_id)
    notebook = notebook or os.environ.get("ECMOE_NOTEBOOK") or claim.notebook
    effect = verdict.effect
    plumbing = verdict.label == PLUMBING
    known = effect.n > 0 and not plumbing
    kept = {
        "claim": claim_id,
        "label": verdict.label,
        "effect": effect.mean if known and math.isfinite(effect.mean) else None,
        "unit": effect.unit,
        "interval": [effect.low, effect.high] if known and effect.low is not None else None,
        "n": effect.n,
        "of": effect.of,
        "rule": verdict.rule,
        "rules_out": verdict.rules_out if known else None,
        "paper": claim.paper,
        "here": "" if plumbing or verdict.label == "not run" else "\n".join(_lines(verdict, here)),
        "differences": differences,
        "notebook": notebook,
        "scale": scale,
    }
    path = verdict_folder(scale) / f"{notebook}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    verdicts = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    verdicts[claim_id] = kept
    write_json(path, dict(sorted(verdicts.items())))
    return kept


def load_verdicts(folder: str | Path) -> dict[str, dict[str, Any]]:
    """claim id -> what a notebook recorded. Where two speak, the claim's own is heard."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(Path(folder).glob("*.json")):
        for claim_id, kept in json.loads(path.read_text(encoding="utf-8")).items():
            own = claim_id in CLAIMS and CLAIMS[claim_id].notebook == kept["notebook"]
            if claim_id not in found or own:
                found[claim_id] = kept
    return found


def scoreboard(folder: str | Path) -> pd.DataFrame:
    """A row per claim of the paper: id, claim, paper, here, verdict; `here` has a line for each part of the claim.

    Args:
        folder: of verdict files. A claim without one is "not run".
    """
    verdicts = load_verdicts(folder)
    rows = []
    for claim in CLAIMS.values():
        kept = verdicts.get(claim.id, {"label": "not run", "here": ""})
        proxy = f" ({claim.proxy})" if claim.proxy else ""
        rows.append((claim.id, claim.text + proxy, claim.paper, kept["here"], kept["label"]))
    return pd.DataFrame(rows, columns=COLUMNS)


def studies(scale: str) -> tuple[pd.DataFrame, str]:
    """A row per page: runs of its plan, finished, missing by arm; and the total over distinct runs, in words."""
    rows, distinct = [], {}
    for page in plan.pages(scale):
        planned = plan.plan(scale, [page])
        if not planned:
            continue
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
        rows.append(
            {
                "page": page,
                "runs": len(planned),
                "finished": len(done),
                "hours": sum(run["seconds"] or 0 for run in done.values()) / 3600,
                "missing (seeds)": text if done else "all of them",
            }
        )
    hours = sum(run["seconds"] or 0 for run in distinct.values()) / 3600
    tokens = sum(run["tokens"] or 0 for run in distinct.values())
    devices = ", ".join(sorted({run["device"] for run in distinct.values() if run["device"]})) or "no device"
    total = (
        f"{len(distinct)} distinct runs in all, shared between pages: {tokens / 1e6:,.0f} million tokens, "
        f"{hours:.2f} hours of training on {devices}."
    )
    return pd.DataFrame(rows, columns=["page", "runs", "finished", "hours", "missing (seeds)"]), total


def claim_table(verdicts: pd.DataFrame | str | Path) -> str:
    """The scoreboard as a Markdown table, for the README."""
    frame = verdicts if isinstance(verdicts, pd.DataFrame) else scoreboard(verdicts)
    lines = ["| | claim | paper | here (95% interval; seeds) | verdict |", "|---|---|---|---|---|"]
    for row in frame.itertuples():
        verdict = row.verdict if row.verdict in ("not run", PLUMBING) else f"**{row.verdict}**"
        cells = (row.id, row.claim, row.paper, row.here, verdict)
        lines.append("| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", "<br>") for cell in cells) + " |")
    return "\n".join(lines)


def _lines(verdict: Verdict, here: str) -> list[str]:
    """What was found: in words, if there are any; the effect, or each part's; and whether it misses the paper's figure."""
    found = [f"{name}: {part}" for name, part in verdict.parts] or [str(verdict.effect)]
    missed = [] if verdict.rules_out is None else [f"rules out the paper's {verdict.rules_out:g}"]
    return [here] * bool(here) + [line.replace("(95% ", "(") for line in found] + missed
