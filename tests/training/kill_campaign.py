"""Kill runs at random moments, start them again, and see that nothing is lost. `python tests/training/kill_campaign.py [--full]`

Each kind of run is trained once undisturbed; then, each time anew, killed (SIGKILL) once or twice at a random moment and
called again until it is done. It must end with the same weights and curve to the last bit. A finished run that is trained
again for its weights must stay finished whenever that is killed.

The parent only imports: children are forked from it, so that a kill costs no start of Python.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

os.environ["ECMOE_HOME"] = tempfile.mkdtemp(prefix="kills")
os.environ["OMP_NUM_THREADS"] = "1"

import torch

from ecmoe import RunConfig, paths, run_or_load
from ecmoe.files import sha256
from ecmoe.training.result import read_run

torch.set_num_threads(1)
TINY = {
    "layers": 2, "d_model": 16, "d_ff": 16, "heads": 2, "num_experts": 4, "batch_size": 4, "sequence_length": 16,
    "eval_batches": 1, "max_bytes": 200_000, "steps": 24, "eval_every": 7, "checkpoint_every": 5,
}  # fmt: skip
KINDS = {
    "float32": {"router": "token_choice", "balance": "importance_load", "capacity_factor": 1.0},
    "64-true": {"precision": "64-true"},
    "retraining": {"seed": 1},
    "fsdp2": {"strategy": "fsdp2", "devices": 2, "steps": 12},
    "ep": {"strategy": "ep", "devices": 2, "steps": 12},
}
FULL = {"float32": 60, "64-true": 10, "retraining": 10, "fsdp2": 10, "ep": 10}
SHORT = {"float32": 2, "64-true": 0, "retraining": 1, "fsdp2": 0, "ep": 0}


def start(config: RunConfig, **keys) -> int:
    """The number of a child that trains."""
    child = os.fork()
    if child == 0:
        try:
            os.setpgid(0, 0)  # with the ranks that it starts
            code = 0 if run_or_load(config, progress=False, **keys).ok else 1
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            code = 1
        os._exit(code)
    return child


def ended(child: int, within: float) -> int | None:
    """The exit code; None: not yet."""
    until = time.monotonic() + within
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            return None
        time.sleep(0.002)


def state(folder: Path) -> tuple:
    """What must not differ: the weights, and the curve but for its clock."""
    curve = read_run(folder).curve.drop(columns=["seconds", "tokens_per_second"])
    return sha256(folder / "model.safetensors"), curve.to_csv()


def campaign(kind: str, kills: int) -> list[str]:
    """What went wrong, a line each."""
    config, wrong = RunConfig(**TINY | KINDS[kind]), []
    folder = paths.runs() / config.name
    began = time.monotonic()
    if ended(start(config), 300) != 0:
        return [f"{kind}: fails undisturbed"]
    lasts, whole = time.monotonic() - began, state(folder)
    keys = {"weights": True} if kind == "retraining" else {}
    for number in range(kills):
        moments = [random.uniform(0, lasts) for _ in range(random.choice([1, 2]))]
        if kind == "retraining":
            (folder / "model.safetensors").unlink()
        else:
            shutil.rmtree(folder)
        for moment in moments:
            child = start(config, **keys)
            if ended(child, moment) is None:
                os.killpg(child, signal.SIGKILL) if config.ranks == 1 else os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
            if kind == "retraining" and not read_run(folder).ok:
                wrong.append(f"{kind} {number}: finished no more, killed after {moments}")
        if ended(start(config, **keys), 300) != 0:
            wrong.append(f"{kind} {number}: doesn't end well, killed after {moments}")
        elif state(folder) != whole:
            wrong.append(f"{kind} {number}: ends otherwise, killed after {moments}")
        left = [path.name for path in folder.iterdir() if path.name.endswith(".tmp")]
        if left:
            wrong.append(f"{kind} {number}: leaves {left}")
    return wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    random.seed(given.seed)
    wrong = []
    for kind, kills in (FULL if given.full else SHORT).items():
        if kills:
            began = time.monotonic()
            found = campaign(kind, kills)
            print(f"{kind}: {kills} kills, {len(found)} wrong, {time.monotonic() - began:.0f} s", flush=True)
            wrong += found
    shutil.rmtree(os.environ["ECMOE_HOME"], ignore_errors=True)
    print("\n".join(wrong) or "nothing lost")
    sys.exit(bool(wrong))
