"""Slots on the machine's GPUs: each run holds one, and can count the runs that share its GPU.

Several small runs finish sooner side by side on one GPU than one after the other, because a small run waits for its
host more than for its GPU. A slot is a file lock in the cache folder, so independent processes can share the GPUs. A
run takes the first slot of any GPU before a second one, so that runs spread over the GPUs."""

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import AcquireReturnProxy, FileLock, Timeout

from ecmoe import paths
from ecmoe.files import ConfigError

# Most CPU threads of an operation while a run has a slot; fewer if $OMP_NUM_THREADS says so. By default, PyTorch starts
# one per core: on 64 cores, a batch of 500 augmented images took 84 ms with 64 threads, 12 ms with 4, 28 ms with one.
THREADS = 4


@dataclass
class Place:
    """The slot of a run. gpu: index of its GPU; None: the run holds no slot, as it is on the CPU or on several GPUs.
    others: lock files of the other slots on that GPU."""

    gpu: int | None = None
    others: Sequence[Path] = ()

    def sharing(self) -> int:
        """Return the number of runs on this device now, including this run, but at least $ECMOE_SHARING."""
        return max(number("ECMOE_SHARING", 1), 1 + sum(map(_taken, self.others)))


@contextmanager
def place(say: bool = True) -> Iterator[Place]:
    """Within the context, hold a slot, make its GPU the current device, and use few CPU threads. Wait if all slots are
    taken ($ECMOE_SLOTS per GPU, 4 by default). Without a GPU, the number of runs is unlimited."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not gpus:
        yield Place()
        return
    # Name lock files by UUID, since CUDA_VISIBLE_DEVICES may renumber GPUs.
    names = [str(torch.cuda.get_device_properties(gpu).uuid) for gpu in range(gpus)]
    slots, folder = number("ECMOE_SLOTS", 4), paths.cache() / "gpus"
    of_gpu = [[folder / f"{name}-{slot}.lock" for slot in range(slots)] for name in names]
    if (found := _find(of_gpu)) is None and say:
        print(f"waiting for a slot on {gpus} GPU{'s' * (gpus > 1)}, {slots} slots each ($ECMOE_SLOTS)", file=sys.stderr, flush=True)  # fmt: skip
    while found is None:
        time.sleep(1)
        found = _find(of_gpu)
    gpu, held = found
    if say and gpus > 1:
        print(f"GPU {gpu} of {gpus}: {names[gpu]}", file=sys.stderr, flush=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(min(threads, THREADS))
    try:
        with held, torch.cuda.device(gpu):
            yield Place(gpu, [path for path in of_gpu[gpu] if str(path) != held.lock.lock_file])
    finally:
        torch.set_num_threads(threads)


def _find(of_gpu: list[list[Path]]) -> tuple[int, AcquireReturnProxy] | None:
    """Lock a free slot, the first slot of any GPU before a second one; return its GPU and the lock, or None."""
    for slot in zip(*of_gpu, strict=True):
        for gpu, path in enumerate(slot):
            with suppress(Timeout):
                return gpu, FileLock(path).acquire(timeout=0)
    return None


def _taken(path: Path) -> bool:
    with suppress(Timeout), FileLock(path).acquire(timeout=0):
        return False
    return True


def use_tf32() -> None:
    """Let float32 products on a GPU use TF32, whatever this process did before."""
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")


def number(variable: str, default: int) -> int:
    """Return a positive integer from an environment variable; raise a ConfigError if it has another value."""
    text = os.environ.get(variable) or str(default)
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise ConfigError(f"{variable}={text}: must be a whole number, 1 or more")
    return int(text)
