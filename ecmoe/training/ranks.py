"""The ranks (processes) of one run: the rank of this process, and how to start the ranks outside torchrun.

Rank variables in the environment are read under torchrun only: those of a SLURM job or an earlier program mislead."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from ecmoe.config import ConfigError, RunConfig
from ecmoe.training.result import Result, read_run, write_config


def in_torchrun() -> bool:
    """Return whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def rank() -> int:
    """Return this process's rank within its run. Only rank 0 writes files and prints progress."""
    return int(os.environ["RANK"]) if in_torchrun() else 0


def check_world(config: RunConfig) -> None:
    """Raise a ConfigError if torchrun started too many or too few processes, or didn't start a run on several nodes."""
    devices, nodes = config.devices, config.num_nodes
    start = f"--nproc-per-node={devices} -m ecmoe train CONFIG"
    if in_torchrun():
        if (there := os.environ["WORLD_SIZE"]) != str(config.ranks):
            said = f"devices={devices} x num_nodes={nodes}, but {there} processes run"
            raise ConfigError(f"{said}: start torchrun {start}")
    elif nodes > 1:
        raise ConfigError(f"num_nodes={nodes}: start torchrun --nnodes={nodes} {start} on every node")


def by_torchrun(config: RunConfig, folder: Path, still_ours: Callable[[], None], keep_weights: bool = True) -> Result:
    """Train with several ranks in subprocesses: in a notebook's kernel, Lightning allows one device only.

    The ranks hold no lock, so they must not outlive this call: their stdin is a pipe, closed however the call ends.
    still_ours: raises if the run's lock is lost. Raises a RuntimeError if the ranks end without writing a summary."""
    write_config(folder, config)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={config.devices}"]
    command += ["-m", "ecmoe.training", str(folder)] + ([] if keep_weights else ["--no-weights"])
    output = None
    with contextlib.suppress(AttributeError, OSError):  # a notebook's, or a test's, may have no file
        output = sys.stderr.fileno()
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=output) as ranks:
        while ranks.poll() is None:
            still_ours()
            with contextlib.suppress(subprocess.TimeoutExpired):
                ranks.wait(timeout=2)
    if not (folder / "summary.json").exists():
        raise RuntimeError(f"training {config.name} on {config.devices} devices ended with code {ranks.returncode}")
    return read_run(folder)
