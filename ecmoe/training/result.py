"""Finished runs, and where they are kept.

A run folder holds `config.yaml`, `curve.csv`, `model.safetensors` and `summary.json`, which is
written last and by rename: it says "done". A record is the small, committed form of a run: one
JSON file with summary and curve.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from ecmoe import paths
from ecmoe.config import SCHEMA, RunConfig
from ecmoe.files import read_json, write_json

CURVE_POINTS = 300  # of a record; a curve is thinned to this many
SHARES = [f"share_{j}" for j in range(9)]  # of tokens taken by exactly j experts; 8: 8 or more
COLUMNS = [
    "step", "tokens", "seconds", "train_loss", "learning_rate", "aux_loss", "tokens_per_second",
    "val_loss", "val_loss_causal", "accuracy", "dropped", "over_capacity", "max_load", *SHARES,
]  # fmt: skip


@dataclass(frozen=True)
class Result:
    """One run: what it measured (`summary`), when (`curve`), and where its weights are (`path`)."""

    summary: dict[str, Any]
    curve: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=COLUMNS, dtype=float))
    path: Path | None = None

    @property
    def ok(self) -> bool:
        """Did the run finish?"""
        return self.summary.get("status") == "finished"

    def load_model(self) -> Any:
        """The trained model, in evaluation mode.

        Raises:
            FileNotFoundError: its weights aren't here; a committed record has none.
        """
        from ecmoe.training.run import load_model

        folder = self.path or paths.runs() / self.summary["name"]
        if not (folder / "model.safetensors").exists():
            raise FileNotFoundError(
                f"no weights of {self.summary['name']} in {folder}: a record holds none; "
                "train the run to have them: run_or_load(config, weights=True), without records"
            )
        return load_model(folder)


def not_run(config: RunConfig) -> Result:
    """The Result of a run that is missing: a gap, never a 0."""
    return Result(
        {"config": config.to_dict(), "name": config.name, "seed": config.seed, "schema": SCHEMA}
        | {"status": "not run", "error": None}
    )


# Storage


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """Write `summary.json` by rename: it is there whole, or not at all."""
    write_json(Path(folder) / "summary.json", summary)


def read_run(folder: str | Path) -> Result:
    """The Result of a run folder.

    Raises:
        FileNotFoundError: the run isn't done (no summary.json).
    """
    folder = Path(folder)
    summary = read_json(folder / "summary.json")
    curve = folder / "curve.csv"
    if curve.exists() and curve.stat().st_size:
        return Result(summary, pd.read_csv(curve).reindex(columns=COLUMNS).astype(float), folder)
    return Result(summary, path=folder)


def write_record(path: Path, result: Result) -> None:
    """Write the committed form of a run, its curve thinned to CURVE_POINTS, both ends kept."""
    curve, rows = result.curve.reindex(columns=COLUMNS), len(result.curve)
    if rows > CURVE_POINTS:
        curve = curve.iloc[[round(i * (rows - 1) / (CURVE_POINTS - 1)) for i in range(CURVE_POINTS)]]
    columns = {name: [_rounded(x) for x in curve[name]] for name in COLUMNS}
    write_json(Path(path), {"summary": result.summary, "curve": columns}, indent=None)


def read_record(path: str | Path) -> Result:
    """The Result of a committed record."""
    record = read_json(Path(path))
    try:
        return Result(record["summary"], pd.DataFrame(record["curve"]).reindex(columns=COLUMNS).astype(float))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no record of a run ({error!r}): it must hold `summary` and `curve`") from error


def load_records(folder: str | Path) -> list[Result]:
    """All committed results of a folder, by name; none if there is no such folder."""
    return [read_record(path) for path in sorted(Path(folder).glob("*.json"))]


def _rounded(x: float) -> float | None:
    """Seven digits are more than a loss has, and keep a record small."""
    return None if pd.isna(x) or math.isinf(x) else float(f"{x:.7g}")
