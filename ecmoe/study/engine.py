"""Carry out the plan: train and measure a planned run, store the results, and report which runs are still missing.

`ecmoe run` calls this module, one process per call. Snakemake (see Snakefile) handles parallel runs, GPUs, retries and clusters.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from ecmoe import paths
from ecmoe.config import ConfigError
from ecmoe.files import nearest, read_json
from ecmoe.measures import lock, measure, trained_model
from ecmoe.study.plan import Planned, record

DONE = ("finished", "diverged")  # divergence is a result too: the run is not repeated
CHECKOUT = Path(__file__).resolve().parents[2]


def files(one: Planned, scale: str) -> list[Path]:
    """Return the paths of a planned run's record and of its measurements; a file exists once it has been computed."""
    kept = paths.results(scale, "measures") / one.name
    return [record(one, scale), *(kept / f"{how.name}.json" for how in one.measures)]


def lacks(one: Planned, scale: str) -> str:
    """Return in words what a planned run still needs, or "" if it is done. `ecmoe run` checks the contents of the files."""
    there, *measured = (path.exists() for path in files(one, scale))
    if not there:
        return "missing"
    lacking = [how.name for how, kept in zip(one.measures, measured, strict=True) if not kept]
    if not lacking or read_json(record(one, scale), sealed=True)["summary"]["status"] == "diverged":
        return ""  # a diverged run has no weights to measure
    return f"to measure: {', '.join(lacking)}"


def carry_out(one: Planned, scale: str, *, keep_weights: bool) -> str:
    """Train or load a run, take its measurements, and store both in reports/<scale>. Return its status, or "failed: reason" if
    training or any measurement failed (the others are still made).

    keep_weights: False: delete the weights in runs/NAME once all measurements have succeeded."""
    from ecmoe import run_or_load
    from ecmoe.training.result import write_record

    failed = []
    with lock(one.name):
        try:
            result = run_or_load(one.config, records=paths.results(scale, "runs"))
        except Exception as error:  # the error is also stored in the run's folder
            return f"failed: {type(error).__name__}: {error}"
        status = result.summary["status"]
        if status == "diverged":
            write_record(record(one, scale), result)
        with trained_model(result) as model:
            for how, kept in zip(one.measures, files(one, scale)[1:], strict=True):
                missing, began = not kept.exists(), time.monotonic()
                try:
                    measure(result, how, scale=scale, keep=True, model=model)
                except Exception as error:  # go on with the other measurements
                    # Those that a retry may mend come first: `in_turn` judges by the first.
                    at = len(failed) if isinstance(error, ConfigError) else 0
                    failed.insert(at, f"{how.name}: {type(error).__name__}: {error}")
                if missing and kept.exists():
                    print(f"[{one.name}] {how.name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        if not keep_weights and not failed:
            (one.folder / "model.safetensors").unlink(missing_ok=True)
    return f"failed: {'; '.join(failed)}" if failed else status


def find(planned: Sequence[Planned], names: Iterable[str], scale: str) -> list[Planned]:
    """Return planned runs by name or unique prefix. Raise a ConfigError if a name fits no run of the scale, or several."""
    found = []
    for name in names:
        like = [one for one in planned if one.name == name] or [one for one in planned if one.name.startswith(name)]
        if len(like) != 1:
            # A whole name, with its digest, belongs to another plan: a name like it would be another run.
            known = [] if re.search("-[0-9a-f]{12}$", name) else [one.name for one in planned]
            near = nearest(name, known, f"`ecmoe runs --scale {scale}` lists them")
            hint = f"{len(like)} names begin with it" if like else near
            raise ConfigError(f"no run {name!r} in the plan of scale {scale}: {hint}")
        found += like
    return found


def places() -> tuple[int, int]:
    """Return the number of usable GPUs and of runs that share one ($ECMOE_SLOTS), without importing torch, which is slow."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None and shutil.which("nvidia-smi"):
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
        chosen = ",".join(line for line in listed.stdout.splitlines() if line.startswith("GPU "))
    gpus = len([gpu for gpu in (chosen or "").split(",") if gpu.strip() not in ("", "-1")])
    slots = os.environ.get("ECMOE_SLOTS") or "4"
    if not (slots.isdecimal() and int(slots)):
        raise ConfigError(f"ECMOE_SLOTS={slots}: must be a whole number, 1 or more")
    return gpus, int(slots) if gpus else 1


def train(planned: Sequence[Planned], scale: str, *, jobs: int) -> int:
    """Train and measure these runs and return an exit code: `jobs` at a time with Snakemake, one by one if it isn't installed."""
    if not planned:
        return 0
    if importlib.util.find_spec("snakemake") and (CHECKOUT / "Snakefile").exists():
        command = [sys.executable, "-m", "snakemake", "--cores", "all", "--resources", f"place={jobs}"]
        command += ["--config", f"scale={scale}", f"runs={','.join(one.name for one in planned)}", "--", "trained"]
        # At Ctrl-C `subprocess.run` would kill Snakemake, which would leave its lock behind.
        with subprocess.Popen(command, cwd=CHECKOUT) as process:
            try:
                code = process.wait()
            except KeyboardInterrupt:
                process.wait()  # for the runs, which end after their current step, or at once at another Ctrl-C
                raise
        return code or int(any(lacks(one, scale) for one in planned))  # Snakemake succeeds even if runs are missing
    return in_turn(planned, scale, keep_weights=scale == "smoke")


def in_turn(planned: Iterable[Planned], scale: str, *, keep_weights: bool) -> int:
    """Carry out the runs one by one, print a line as each ends, and return an exit code: 0 if all runs are done; 2 if all
    failures are a ConfigError, which no retry mends; else 1."""
    failed = set()
    for one in planned:
        said = " ".join(carry_out(one, scale, keep_weights=keep_weights).split())
        print(f"{one.pages[0]} {one.arms[0]} s{one.seed}  {one.name}  {said}", flush=True)
        if said not in DONE:
            failed.add(2 if re.match(r"failed: (\S+: )?(ConfigError|Damaged): ", said) else 1)
    return min(failed, default=0)
