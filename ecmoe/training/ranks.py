"""The ranks (processes) of one run: the rank of this process, and how to start the ranks outside torchrun.

Rank variables in the environment are read under torchrun only. Those that a SLURM job, an MPI launcher or an earlier
program left there say nothing about the run.
"""

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from ecmoe.config import ConfigError, RunConfig


def in_torchrun() -> bool:
    """Return whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def rank() -> int:
    """Return this process's rank within its run. Only rank 0 writes files and prints progress."""
    return int(os.environ["RANK"]) if in_torchrun() else 0


def check_world(config: RunConfig) -> None:
    """Raise a ConfigError if torchrun started more or fewer processes than the config says, or if the run needs several
    nodes, which only torchrun can start."""
    there = os.environ["WORLD_SIZE"] if in_torchrun() else None
    start = f"--nproc-per-node={config.devices} -m ecmoe train CONFIG"
    if there is None and config.num_nodes > 1:
        nodes = config.num_nodes
        raise ConfigError(f"num_nodes={nodes}: start torchrun --nnodes={nodes} {start} on every node")
    if there not in (None, str(config.ranks)):
        ranks = f"devices={config.devices} x num_nodes={config.num_nodes}"
        raise ConfigError(f"{ranks}, but {there} processes run: start torchrun {start}")


def torchrun(ranks: int, module: str, *arguments: str) -> list[str]:
    """Return the command that starts `ranks` processes of a module on this machine."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [*start, "-m", module, *arguments]


def by_torchrun(config: RunConfig, folder: Path, still_ours: Callable[[], None], keep_weights: bool = True) -> None:
    """Train with several ranks in subprocesses: in a notebook's kernel, Lightning allows one device only.

    The ranks hold no lock, so they must not outlive this call: their stdin is a pipe, closed however the call ends.

    Args:
        folder: the run's, with its config.yaml. still_ours: raises if the run's lock is lost.

    Raises:
        RuntimeError: the ranks ended without writing a summary.
    """
    command = torchrun(config.devices, "ecmoe.training", str(folder), *([] if keep_weights else ["--no-weights"]))
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


def end_with_caller() -> None:
    """Exit when the `by_torchrun` call that started this rank ends, as the next call will start ranks of its own."""

    def watch() -> None:
        os.read(0, 1)  # sys.stdin would take a lock that exit waits for
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
