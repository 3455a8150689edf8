"""A place on a GPU for a run, and how many share it.

Several runs side by side on one GPU are done sooner than one after the other: a small run waits for its host more than
for its GPU. A run takes a place on the GPU with the fewest, a lock in the cache folder, so that runs of any processes on
the machine find their places, and count each other, without knowing of each other.
"""

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from ecmoe import paths
from ecmoe.files import ConfigError


@dataclass
class Place:
    """Where a run is. gpu: its number; None: on the CPU, or on several GPUs, for which nobody else asks.

    others: the locks of the other places on it.
    """

    gpu: int | None = None
    others: Sequence[Path] = ()

    def sharing(self) -> int:
        """Runs on this device now, this one among them; at least as many as who started it says ($ECMOE_SHARING)."""
        return max(number("ECMOE_SHARING", 1), 1 + sum(map(_taken, self.others)))


@contextmanager
def place(say: bool = True) -> Iterator[Place]:
    """Hold a place, waiting for one if all are taken ($ECMOE_SLOTS runs a GPU, else 4); within it, "cuda" is its GPU. There is no
    end of them on a CPU."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not gpus:
        yield Place()
        return
    # CUDA_VISIBLE_DEVICES may renumber them.
    names = [str(torch.cuda.get_device_properties(gpu).uuid) for gpu in range(gpus)]
    slots, folder = number("ECMOE_SLOTS", 4), paths.cache() / "gpus"
    folder.mkdir(parents=True, exist_ok=True)
    of_gpu = [[folder / f"{name}-{slot}.lock" for slot in range(slots)] for name in names]
    found = _find(of_gpu)
    if found is None and say:
        print(f"waiting for a place on {gpus} GPU{'s' * (gpus > 1)} of {slots} runs each ($ECMOE_SLOTS)", file=sys.stderr, flush=True)  # fmt: skip
    while found is None:
        time.sleep(1)
        found = _find(of_gpu)
    gpu, mine, lock = found
    if say and gpus > 1:
        print(f"GPU {gpu} of {gpus}: {names[gpu]}", file=sys.stderr, flush=True)
    try:
        with torch.cuda.device(gpu):
            yield Place(gpu, [path for path in of_gpu[gpu] if path != mine])
    finally:
        lock.release()


def _find(of_gpu: list[list[Path]]) -> tuple[int, Path, FileLock] | None:
    """A GPU, and the lock of its place, held now: the first place of every GPU before the second of any."""
    for slot in zip(*of_gpu, strict=True):
        for gpu, path in enumerate(slot):
            lock = FileLock(path)
            with contextlib.suppress(Timeout):
                lock.acquire(timeout=0)
                return gpu, path, lock
    return None


def _taken(path: Path) -> bool:
    try:
        FileLock(path).acquire(timeout=0).lock.release()
    except Timeout:
        return True
    return False


def number(variable: str, default: int) -> int:
    """A positive number from the environment.

    Raises:
        ConfigError: it is none.
    """
    text = os.environ.get(variable) or str(default)
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise ConfigError(f"{variable}={text}: must be a whole number, 1 or more")
    return int(text)
