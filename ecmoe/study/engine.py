"""The engine room: one run of the plan trained, measured and kept; and what of the plan is there.

`ecmoe run` calls it in a process of its own. Many at once, their GPUs, retries and clusters are Snakemake's (Snakefile).
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from ecmoe import paths
from ecmoe.config import ConfigError
from ecmoe.files import nearest, read_json
from ecmoe.study.plan import Planned, record

DONE = ("finished", "diverged")  # a run that diverged is a finding: nothing is left to do
CHECKOUT = Path(__file__).resolve().parents[2]


def files(one: Planned, scale: str) -> list[Path]:
    """Where a planned run and its measurements are kept, once they are there."""
    kept = paths.measures(scale) / one.name
    return [record(one, scale), *(kept / f"{how.name}.json" for how in one.measures)]


def lacks(one: Planned, scale: str) -> str:
    """What is left to do of a planned run, in words; "" where it is done. By names of files alone: `ecmoe run` reads them."""
    there, *measured = (path.exists() for path in files(one, scale))
    if not there:
        return "missing"
    lacking = [how.name for how, kept in zip(one.measures, measured, strict=True) if not kept]
    if not lacking or read_json(record(one, scale), sealed=True)["summary"]["status"] == "diverged":
        return ""  # one that diverged has no weights that could be measured
    return f"to measure: {', '.join(lacking)}"


def carry_out(one: Planned, scale: str, *, keep_weights: bool = True) -> str:
    """Train the run or load it, take its measurements while its weights are there, and keep both.

    Args:
        keep_weights: leave them in runs/NAME; else they go once all is measured.

    Returns:
        the status that the run ends with; or "failed: why", after all else was done.
    """
    from ecmoe.measures.measure import lock, measure, trained_model
    from ecmoe.training.result import write_record
    from ecmoe.training.run import run_or_load

    failed = []
    with lock(one.name):
        try:
            result = run_or_load(one.config, records=paths.records(scale))
        except Exception as error:  # its folder keeps it, too
            return f"failed: {type(error).__name__}: {error}"
        status = result.summary["status"]
        if status == "diverged":
            write_record(record(one, scale), result)
        with trained_model(result) as model:
            for how, kept in zip(one.measures, files(one, scale)[1:], strict=True):
                missing, began = not kept.exists(), time.monotonic()
                try:
                    measure(result, how, scale=scale, keep=True, model=model)
                except Exception as error:  # the others are still wanted
                    failed.append(f"{how.name}: {type(error).__name__}: {error}")
                if missing and kept.exists():
                    print(f"[{one.name}] {how.name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        if not keep_weights and not failed:
            (paths.runs() / one.name / "model.safetensors").unlink(missing_ok=True)
    return f"failed: {'; '.join(failed)}" if failed else status


def find(planned: Sequence[Planned], names: Iterable[str]) -> list[Planned]:
    """Runs of the plan by name, or by how their name begins. A ConfigError, where no run, or more than one, is called so."""
    found, names_of = [], [one.name for one in planned]
    for name in names:
        like = [one for one in planned if one.name == name] or [one for one in planned if one.name.startswith(name)]
        if len(like) != 1:
            hint = f"{len(like)} runs begin so" if like else nearest(name, names_of, "`ecmoe runs` lists them")
            raise ConfigError(f"no run {name!r} in the plan: {hint}")
        found += like
    return found


def places() -> tuple[int, int]:
    """GPUs of this machine that may be used, and how many runs share one ($ECMOE_SLOTS); no torch is imported."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None and shutil.which("nvidia-smi"):
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
        chosen = ",".join(line for line in listed.stdout.splitlines() if line.startswith("GPU "))
    gpus = len([gpu for gpu in (chosen or "").split(",") if gpu.strip() not in ("", "-1")])
    slots = os.environ.get("ECMOE_SLOTS") or "4"
    if not (slots.isdecimal() and int(slots)):
        raise ConfigError(f"ECMOE_SLOTS={slots}: must be a whole number, 1 or more")
    return gpus, int(slots) if gpus else 1


def train(planned: Sequence[Planned], scale: str, *, jobs: int = 1) -> int:
    """Carry out all of it: by Snakemake, so many jobs side by side, or one after the other where there is none. Returns an exit code."""
    if not planned:
        return 0
    if importlib.util.find_spec("snakemake") and (CHECKOUT / "Snakefile").exists():
        command = [sys.executable, "-m", "snakemake", "--cores", "all", "--resources", f"place={jobs}"]
        command += ["--config", f"scale={scale}", f"runs={','.join(one.name for one in planned)}"]
        command += ["--", "trained"]
        # At Ctrl-C `subprocess.run` would kill it, and its lock would stay.
        with subprocess.Popen(command, cwd=CHECKOUT) as process:
            code = process.wait()
        return code or int(any(lacks(one, scale) for one in planned))  # a page with gaps is no failure
    return in_turn(planned, scale, keep_weights=scale == "smoke")


def in_turn(planned: Iterable[Planned], scale: str, *, keep_weights: bool) -> int:
    """One after the other, a line on each as it ends; returns an exit code.

    0: each is done. 1: one failed, and may go well another time. 2: what failed can't be, by its config.
    """
    failed = set()
    for one in planned:
        said = " ".join(carry_out(one, scale, keep_weights=keep_weights).split())
        print(f"{one.pages[0]} {one.arms[0]} s{one.seed}  {one.name}  {said}", flush=True)
        if said not in DONE:
            failed.add(2 if said.startswith("failed: ConfigError") else 1)
    return min(failed, default=0)
