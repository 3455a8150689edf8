"""Finished runs, and where they are kept.

A run folder holds `config.yaml`, `curve.csv`, `model.safetensors` and `summary.json`, which is
written last and by rename: it says "done". A record is the small, committed form of a run: one
JSON file with summary and curve.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from ecmoe import paths
from ecmoe.config import SCHEMA, RunConfig
from ecmoe.files import Damaged, read_json, sha256, write_json
from ecmoe.model import metrics

if TYPE_CHECKING:
    from ecmoe.model.transformer import Trunk

FILES = ("config.yaml", "curve.csv", "model.safetensors")  # of a run folder, beside its summary
STATUSES = ("finished", "diverged", "failed", "stopped", "not run")
CURVE_POINTS = 300  # of a record; a curve is thinned to this many


@dataclass(frozen=True)
class Result:
    """One run: what it measured (`summary`), when (`curve`), and where its weights are (`path`)."""

    summary: dict[str, Any]
    curve: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=metrics.curve(), dtype=float))
    path: Path | None = None

    @property
    def ok(self) -> bool:
        """Did the run finish?"""
        return self.summary.get("status") == "finished"

    def __repr__(self) -> str:
        loss = self.summary.get("val_loss")
        found = "" if loss is None else f", val_loss {loss:.4f}"
        return f"<{self.summary['name']}: {self.summary['status']}{found}>"

    def load_model(self) -> Trunk:
        """The trained model, in evaluation mode.

        Raises:
            FileNotFoundError: its weights aren't here; a committed record has none.
            Damaged: they aren't what was written.
        """
        return load_model(self.path or paths.runs() / self.summary["name"])


def load_model(path: str | Path) -> Trunk:
    """The trained model of a run folder, in evaluation mode, its cut-offs included. It takes texts of any length: the routers
    round k down.

    Args:
        path: the folder, runs/NAME.

    Raises:
        as `Result.load_model`.
    """
    import torch
    from safetensors.torch import load_file

    from ecmoe.model.build import build_model
    from ecmoe.routing import routers

    path = Path(path)
    check_weights(path)  # before it is missed that there is no summary
    summary = read_run(path).summary
    weights = load_file(check_weights(path, summary))
    config = RunConfig.from_dict(summary["config"])
    counts = torch.ones(config.vocab_size) if "token counts" in config.needs else None  # the table is in the file
    model = build_model(config, counts)
    model.load_state_dict(weights)
    for router in routers(model):
        router.rounding = "down"  # of those that have a bucket to fill
    return model.eval()


def find_run(run: str | Path) -> Path:
    """The folder of a run: its path, its name, or how the name of one run alone begins.

    Raises:
        FileNotFoundError: there is none, or there are several.
    """
    if str(run) and Path(run).is_dir():
        return Path(run)
    names = sorted(path.name for path in paths.runs().glob("*") if path.is_dir() and path.name.startswith(str(run)))
    names = [name for name in names if name == str(run)] or names
    if len(names) != 1:
        what = f"begins the names of {len(names)} runs: {', '.join(names[:5])}" if names and run else "names no run"
        raise FileNotFoundError(f"{str(run)!r} {what}; name a folder of {paths.runs()}, or enough of its beginning")
    return paths.runs() / names[0]


def not_run(config: Any) -> Result:
    """The Result of a run that is missing: a gap, never a 0. `config`: as in `once`."""
    return Result(
        {"config": config.to_dict(), "name": config.name, "seed": config.seed, "schema": SCHEMA}
        | {"status": "not run", "error": None}
    )


# Storage


def write_run(folder: Path, summary: Mapping[str, Any]) -> None:
    """Write `summary.json`, last of all and by rename: what it names is there whole. It holds the others' SHA-256."""
    folder = Path(folder)
    files = {name: sha256(folder / name) for name in FILES if (folder / name).exists()}
    write_json(folder / "summary.json", {**summary, "files": files}, sealed=True)


def read_run(folder: str | Path) -> Result:
    """The Result of a run folder.

    Raises:
        FileNotFoundError: the run isn't done (no summary.json).
        Damaged: a file isn't what was written. (Weights are looked at when they are read.)
    """
    folder = Path(folder)
    summary = read_summary(folder)
    for name in ("config.yaml", "curve.csv"):
        verify(folder, name, summary)
    curve = pd.read_csv(path) if (path := place_of(folder, "curve.csv")).exists() else pd.DataFrame()
    return Result(summary, curve.reindex(columns=metrics.curve()).astype(float), folder)


def read_summary(folder: Path) -> dict[str, Any]:
    """The summary of a run folder alone. Raises: as `read_run`."""
    path = place_of(folder, "summary.json")
    return _checked(read_json(path, sealed=True), path)


def place_of(folder: Path, name: str) -> Path:
    """Where a file of a run folder is: in `again` as long as a run that was made again is on its way into place, file by file."""
    again = folder / "again"
    ready = (again / "summary.json").exists() and read_summary(again)["status"] == "finished"
    return again / name if ready and (again / name).exists() else folder / name


def check_weights(folder: Path, summary: Mapping[str, Any] | None = None) -> Path:
    """The file of a finished run's weights; with its summary, as it was written. Raises: as `Result.load_model`."""
    path = place_of(folder, "model.safetensors")
    if not path.exists():
        raise FileNotFoundError(
            f"no weights in {folder}: they are there once a run has finished, and a record holds none; to have them: "
            "run_or_load(config, weights=True), without records"
        )
    if summary is not None:
        verify(folder, path.name, summary)
    return path


def verify(folder: Path, name: str, summary: Mapping[str, Any]) -> None:
    """Raise `Damaged` where a file of a run folder isn't what its summary says."""
    said, path = summary.get("files", {}).get(name), place_of(folder, name)
    if said is not None and (not path.exists() or sha256(path) != said):
        raise Damaged(path, "its SHA-256 is another" if path.exists() else "it is gone")


def _checked(summary: dict[str, Any], path: Path) -> dict[str, Any]:
    """A summary that says what one says; a check sum alone would let through what another version has written."""
    for key in ("config", "name", "seed", "schema", "status"):
        if key not in summary:
            raise Damaged(path, f"it says nothing of {key}")
    if summary["schema"] != SCHEMA:
        raise Damaged(path, f"it has schema {summary['schema']}, where this version has {SCHEMA}")
    if summary["status"] not in STATUSES:
        raise Damaged(path, f"its status is {summary['status']!r}")
    if not re.fullmatch(r"[A-Za-z0-9._+-]+", str(summary["name"])):  # it names files
        raise Damaged(path, f"its name is {summary['name']!r}")
    return summary


def write_record(path: Path, result: Result) -> None:
    """Write the committed form of a run, its curve thinned to CURVE_POINTS, both ends kept, and to seven digits."""
    curve, rows = result.curve.reindex(columns=metrics.curve()), len(result.curve)
    if rows > CURVE_POINTS:
        curve = curve.iloc[[round(i * (rows - 1) / (CURVE_POINTS - 1)) for i in range(CURVE_POINTS)]]
    columns = {name: [float(f"{x:.7g}") for x in curve[name]] for name in metrics.curve()}
    write_json(Path(path), {"summary": result.summary, "curve": columns}, indent=None, sealed=True)


def read_record(path: str | Path) -> Result:
    """The Result of a committed record.

    Raises:
        Damaged: it isn't what was written.
    """
    path = Path(path)
    record = read_json(path, sealed=True)
    try:
        curve = pd.DataFrame(record["curve"]).reindex(columns=metrics.curve()).astype(float)
        return Result(_checked(record["summary"], path), curve)
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, Damaged):
            raise
        raise Damaged(path, f"no record of a run: {error!r}; it must hold `summary` and `curve`") from error


def load_records(folder: str | Path) -> list[Result]:
    """All committed results of a folder, by name; none if there is no such folder. Raises: as `read_record`."""
    return [read_record(path) for path in sorted(Path(folder).glob("*.json"))]
