"""Results of runs: how they are stored, verified and loaded.

A run folder holds `config.yaml`, `curve.csv`, `model.safetensors` and `summary.json`, which is written last, in one
atomic step, and marks the run as done. A record, which is committed, is one JSON file with summary and curve."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import yaml

from ecmoe import paths
from ecmoe.config import SCHEMA, RunConfig
from ecmoe.files import Damaged, read_json, sha256, write_json, write_text
from ecmoe.model import metrics

if TYPE_CHECKING:
    from ecmoe.model.transformer import Trunk

FILES = ("config.yaml", "curve.csv", "model.safetensors")  # files of a run folder besides the summary
STATUSES = ("finished", "diverged", "failed", "stopped", "not run")
CURVE_POINTS = 300  # largest number of points in a record; longer curves are thinned


@dataclass(frozen=True)
class Result:
    """One run: its final values (`summary`), one row per validation (`curve`), and its folder, if any (`path`)."""

    summary: dict[str, Any]
    curve: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=metrics.curve(), dtype=float))
    path: Path | None = None

    @property
    def ok(self) -> bool:
        """Whether the run finished."""
        return self.summary.get("status") == "finished"

    def __repr__(self) -> str:
        loss = self.summary.get("val_loss")
        found = "" if loss is None else f", val_loss {loss:.4f}"
        return f"<{self.summary['name']}: {self.summary['status']}{found}>"

    def load_model(self) -> Trunk:
        """Load the trained model, in evaluation mode. Raises a FileNotFoundError if the weights aren't on this machine
        (a committed record has none), and Damaged if a file differs from what was written."""
        return load_model(self.path or paths.runs() / self.summary["name"])


def load_model(path: str | Path) -> Trunk:
    """Load a trained model, with its cut-offs, in evaluation mode and in the dtype of its file. It accepts texts of any
    length, as its routers round k down. path: the run's folder, runs/NAME. Raises: as `Result.load_model`."""
    import torch
    from safetensors.torch import load_file

    from ecmoe.model.build import build_model
    from ecmoe.routing import routers

    weights, summary = checked_weights(Path(path))
    config = RunConfig.from_dict(summary["config"]).replace(kernels="auto")  # this machine may lack those of training
    counts = torch.ones(config.vocab_size) if "token counts" in config.needs else None  # the file has the real table
    model = build_model(config, counts)
    model.load_state_dict(load_file(weights), assign=True)  # a copy would be rounded to float32
    for router in routers(model):
        router.rounding = "down"  # read only by routers that compute k = n c / e
    return model.eval()


def find_run(run: str | Path) -> Path:
    """Return the folder of a run, given its path, its name, or a prefix that no other run's name has; runs without
    weights count only if there is no other. Raise a FileNotFoundError if no run matches, or several do."""
    if str(run) and Path(run).is_dir():
        return Path(run)
    found = sorted(path for path in paths.runs().glob("*") if path.is_dir() and path.name.startswith(str(run)))
    whole = [path for path in found if path.name == str(run)]
    found = whole or [path for path in found if place_of(path, "model.safetensors").exists()] or found
    if len(found) != 1:
        names = ", ".join(path.name for path in found[:5])
        what = f"matches {len(found)} runs: {names}" if found and run else "matches no run"
        raise FileNotFoundError(f"{str(run)!r} {what}; give a folder of {paths.runs()}, or the beginning of its name")
    return found[0]


def not_run(config: Any) -> Result:
    """Return the Result of a missing run, which figures show as a gap, never as 0. `config`: as in `once`."""
    known = {"config": config.to_dict(), "name": config.name, "seed": config.seed, "schema": SCHEMA}
    return Result(known | {"status": "not run", "error": None})


def write_config(folder: Path, config: RunConfig) -> None:
    """Write `config.yaml`, with the keys in their order."""
    write_text(folder / "config.yaml", yaml.safe_dump(config.to_dict(), sort_keys=False))


def write_run(folder: Path, summary: Mapping[str, Any]) -> None:
    """Write `summary.json`, with the SHA-256 of the run's other files. Call it last: these files must be complete."""
    files = {name: sha256(folder / name) for name in FILES if (folder / name).exists()}
    write_json(folder / "summary.json", {**summary, "files": files}, sealed=True)


def read_run(folder: str | Path, verified: Sequence[str] = ("config.yaml", "curve.csv")) -> Result:
    """Return the Result of a run folder. Raises a FileNotFoundError if the run isn't done (no summary.json), and Damaged
    if the summary or a file in `verified` differs from what was written. (Weights are verified when they are loaded.)"""
    folder = Path(folder)
    summary = read_summary(folder)
    for name in verified:
        said, path = summary.get("files", {}).get(name), place_of(folder, name)
        if said is not None and (not path.exists() or sha256(path) != said):
            raise Damaged(path, "its SHA-256 differs" if path.exists() else "it is missing")
    curve = pd.read_csv(path) if (path := place_of(folder, "curve.csv")).exists() else pd.DataFrame()
    return Result(summary, curve.reindex(columns=metrics.curve()).astype(float), folder)


def read_summary(folder: Path) -> dict[str, Any]:
    """Return only the summary of a run folder. Raises: as `read_run`."""
    path = place_of(folder, "summary.json")
    return _checked(read_json(path, sealed=True), path)


def place_of(folder: Path, name: str) -> Path:
    """Return the path of a run folder's file: in `again` if the finished run there hasn't replaced this file yet."""
    again = folder / "again"
    ready = (again / "summary.json").exists() and read_summary(again)["status"] == "finished"
    return again / name if ready and (again / name).exists() else folder / name


def checked_weights(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Return the path of a finished run's weights, and its summary, both verified. Raises: as `Result.load_model`."""
    path = place_of(folder, "model.safetensors")
    if not path.exists():
        remedy = "to get them: run_or_load(config, weights=True), without records"
        unknown = "not finished" if folder.exists() else "there is no such folder"
        known = read_summary(folder) if place_of(folder, "summary.json").exists() else {"status": unknown}
        status = f"{known['status']}: {known['error']}" if known.get("error") else known["status"]
        raise FileNotFoundError(
            f"no weights in {folder} (status: {status}): only finished runs have them, and records have none; {remedy}"
        )
    return path, read_run(folder, verified=FILES).summary


def _checked(summary: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return a valid summary, else raise `Damaged`. A checksum alone would accept what another version has written."""
    for key in ("config", "name", "seed", "schema", "status"):
        if key not in summary:
            raise Damaged(path, f"it has no {key}")
    if summary["schema"] != SCHEMA:
        raise Damaged(path, f"it has schema {summary['schema']}, but this version has {SCHEMA}")
    if summary["status"] not in STATUSES:
        raise Damaged(path, f"its status is {summary['status']!r}")
    if not re.fullmatch(r"[A-Za-z0-9._+-]+", str(summary["name"])):  # it becomes a file name
        raise Damaged(path, f"its name is {summary['name']!r}")
    return summary


def write_record(path: Path, result: Result) -> None:
    """Write a run's record. Its curve is thinned to CURVE_POINTS, with both ends, and rounded to seven digits."""
    curve, rows = result.curve.reindex(columns=metrics.curve()), len(result.curve)
    if rows > CURVE_POINTS:
        curve = curve.iloc[[round(i * (rows - 1) / (CURVE_POINTS - 1)) for i in range(CURVE_POINTS)]]
    columns = {name: [float(f"{x:.7g}") for x in curve[name]] for name in metrics.curve()}
    write_json(Path(path), {"summary": result.summary, "curve": columns}, indent=None, sealed=True)


def read_record(path: str | Path) -> Result:
    """Return the Result of a committed record, a file that is named after its run. Raises Damaged if the file differs from
    what was written, isn't a record, or holds another run than its name says."""
    path = Path(path)
    record = read_json(path, sealed=True)
    summary, curve = record["summary"], record["curve"]
    try:
        curve = pd.DataFrame(curve).reindex(columns=metrics.curve()).astype(float)
    except (TypeError, ValueError, OverflowError) as error:
        raise Damaged(path, f"its curve is no table of numbers: {error}") from error
    if not isinstance(summary, dict):
        raise Damaged(path, "its summary is no mapping")
    if _checked(summary, path)["name"] != path.stem:
        raise Damaged(path, f"it holds the run {summary['name']}")
    return Result(summary, curve)
