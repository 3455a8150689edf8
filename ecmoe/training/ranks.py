"""The processes of one run: which of them this is, and how they are started where nobody else has.

Rank variables count under torchrun only. What a SLURM job, an MPI launcher or a program long gone has left in the
environment says nothing of a run.
"""

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from ecmoe.config import ConfigError, RunConfig


def in_torchrun() -> bool:
    """Is this process a rank of torchrun?"""
    return "TORCHELASTIC_RUN_ID" in os.environ


def rank() -> int:
    """Of this process among those of its run; 0 leads: it alone writes and speaks."""
    return int(os.environ["RANK"]) if in_torchrun() else 0


def check_world(config: RunConfig) -> None:
    """Are there as many processes as the run wants, or can they be started here?

    Raises:
        ConfigError: torchrun started another number; or the run wants several machines.
    """
    there, start = (
        os.environ["WORLD_SIZE"] if in_torchrun() else None,
        f"--nproc-per-node={config.devices} -m ecmoe train CONFIG",
    )
    if there is None and config.num_nodes > 1:
        raise ConfigError(
            f"num_nodes={config.num_nodes}: start torchrun --nnodes={config.num_nodes} {start} on every node"
        )
    if there not in (None, str(config.ranks)):
        raise ConfigError(
            f"devices={config.devices} x num_nodes={config.num_nodes}, but {there} processes run: start torchrun {start}"
        )


def torchrun(ranks: int, module: str, *arguments: str) -> list[str]:
    """The command that starts so many processes of a module, all on this machine."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [*start, "-m", module, *arguments]


def by_torchrun(config: RunConfig, folder: Path, still_ours: Callable[[], None], keep_weights: bool = True) -> None:
    """Several ranks in a process group of their own: Lightning allows a notebook's kernel one device only.

    They hold no lock, so they mustn't outlive this call: their input is a pipe that ends with it, however it ends.

    Args:
        folder: of the run, with its config.yaml. still_ours: raises where the run's lock is lost.

    Raises:
        RuntimeError: they ended without a summary.
    """
    command = torchrun(config.devices, "ecmoe.training", str(folder), *([] if keep_weights else ["--no-weights"]))
    output = sys.stderr.fileno() if hasattr(sys.stderr, "fileno") else None
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=output) as ranks:
        while ranks.poll() is None:
            still_ours()
            try:
                ranks.wait(timeout=2)
            except subprocess.TimeoutExpired:
                continue
    if not (folder / "summary.json").exists():
        raise RuntimeError(f"training {config.name} on {config.devices} devices ended with code {ranks.returncode}")


def end_with_caller() -> None:
    """Where `by_torchrun` is gone, or has been interrupted, its ranks would go on beside the next call's."""

    def watch() -> None:
        os.read(0, 1)  # not sys.stdin, whose lock an exit waits for
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
