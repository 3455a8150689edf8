"""A GPU for a run, and how many share it.

Several runs side by side on one GPU are done sooner than one after the other: a small run waits for its host more than
for its GPU. Where several GPUs are visible, a run takes the one with the fewest; each holds a slot, a lock in the cache
folder, so that runs of any processes on the machine find their places without knowing of each other.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from filelock import FileLock, Timeout

from ecmoe import paths
from ecmoe.files import ConfigError


@contextmanager
def slot(say: bool = True) -> Iterator[int]:
    """Hold a place on a GPU, waiting for one if all are taken ($ECMOE_SLOTS runs a GPU, else 4); yields the GPU's number.

    0, and nothing to hold, where there is one GPU or none: who starts the runs knows how many.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus < 2:
        yield 0
        return
    names = [
        str(torch.cuda.get_device_properties(gpu).uuid) for gpu in range(gpus)
    ]  # CUDA_VISIBLE_DEVICES may renumber
    found = _free(names)
    if found is None and say:
        print(f"waiting for a place on one of {gpus} GPUs ($ECMOE_SLOTS: runs a GPU)", file=sys.stderr, flush=True)
    while found is None:
        time.sleep(1)
        found = _free(names)
    gpu, lock = found
    if say:
        print(f"GPU {gpu} of {gpus}: {names[gpu]}", file=sys.stderr, flush=True)
    try:
        yield gpu
    finally:
        lock.release()


def _free(names: list[str]) -> tuple[int, FileLock] | None:
    """A GPU and the lock of its place, held now: the first place of every GPU before the second of any."""
    folder = paths.cache() / "gpus"
    folder.mkdir(parents=True, exist_ok=True)
    for place in range(number("ECMOE_SLOTS", 4)):
        for gpu, name in enumerate(names):
            lock = FileLock(folder / f"{name}-{place}.lock")
            with contextlib.suppress(Timeout):
                lock.acquire(timeout=0)
                return gpu, lock
    return None


def sharing() -> int:
    """Runs that train side by side on this device, said by who started them ($ECMOE_SHARING)."""
    return number("ECMOE_SHARING", 1)


def number(variable: str, default: int) -> int:
    """A positive number from the environment.

    Raises:
        ConfigError: it is none.
    """
    text = os.environ.get(variable) or str(default)
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise ConfigError(f"{variable}={text}: must be a whole number, 1 or more")
    return int(text)
