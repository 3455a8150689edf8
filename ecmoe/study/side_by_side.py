"""Side by side: several processes work through one list, spread over the GPUs.

A run waits for its host more than for its GPU: several at once are done sooner than one after the other. A process
serves item after item, since imports and compiled kernels are dear. One that fails or dies loses the item in its hands,
no other, and a fresh one takes its place; unless it found no memory beside the others on its GPU: then they are one
fewer, and the item comes again.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

Item = TypeVar("Item")
OUT_OF_MEMORY = "out of memory"  # as CUDA, torch and Triton put it
_SPAWN = get_context("spawn")  # a fork would inherit threads' locks, and CUDA can't be forked


def side_by_side(
    work: Callable[[Item], str], items: Iterable[Item], jobs: int, deadline: float = math.inf
) -> Iterator[tuple[Item, str]]:
    """Each item with what `work` says of it, as they end; they begin in the order given.

    Args:
        work: a function of a module, as each process imports it; the module mustn't touch a GPU when it is imported.
        jobs: processes at most. deadline: by time.monotonic(); no item begins after it.

    An item whose work raises, or whose process dies, ends as "failed: why"; for want of memory, only where it had its GPU
    to itself. Who stops listening ends what is at work.
    """
    waiting = deque(items)
    workers = [_Worker(work, place) for place in _places(min(jobs, len(waiting)))]
    try:
        while True:
            for worker in workers:
                if worker.item is None and waiting and time.monotonic() < deadline:
                    worker.begin(waiting.popleft())
            busy = {worker.pipe: worker for worker in workers if worker.item is not None}
            if not busy:
                return
            for pipe in wait(list(busy)):
                worker = busy[pipe]
                item, said = worker.end()
                beside = [other for other in workers if other is not worker and other.gpu == worker.gpu]
                if beside and OUT_OF_MEMORY in said:
                    print(
                        f"no memory beside {len(beside)} more: comes again, beside fewer", file=sys.stderr, flush=True
                    )
                    workers.remove(worker)
                    waiting.append(item)
                else:
                    yield item, said
    finally:
        for worker in workers:
            worker.stop(patience=10 if worker.item is None else 0)


# Threads that compute, and processes that compile: each takes all cores, and so would every one of us.
THREADS = ("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS")


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()  # asks the driver, and heeds CUDA_VISIBLE_DEVICES; takes no memory on a GPU


def _places(jobs: int) -> list[dict[str, str]]:
    """Each process's part of the environment: a GPU, in turn, and how many processes are on it; its share of the cores."""
    count = _gpus()
    devices = max(count, 1)  # the CPU is one, too
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
    cores = str(max((os.cpu_count() or 1) // max(jobs, 1), 1))
    threads = {name: os.environ.get(name, cores) for name in THREADS}
    places = [{"ECMOE_SHARING": str(len(range(i % devices, jobs, devices)))} | threads for i in range(jobs)]
    for i, place in enumerate(places if count else ()):
        place["CUDA_VISIBLE_DEVICES"] = gpus[i % count].strip()
    return places


class _Worker:
    """A process at its place. It starts with its first item, and anew with the next one after a failure."""

    def __init__(self, work: Callable[[Any], str], place: dict[str, str]) -> None:
        self.work, self.place = work, place
        self.process, self.pipe, self.item = None, None, None

    @property
    def gpu(self) -> str | None:
        return self.place.get("CUDA_VISIBLE_DEVICES")

    def begin(self, item: Any) -> None:
        if self.process is None:
            self.pipe, theirs = _SPAWN.Pipe()
            self.process = _SPAWN.Process(target=_serve, args=(theirs, self.work, self.place))
            self.process.start()
            theirs.close()  # the process alone holds it: when either side is gone, the other sees it
        self.item = item
        with contextlib.suppress(OSError):  # it is dead: so `end` will find
            self.pipe.send(item)

    def end(self) -> tuple[Any, str]:
        item, self.item = self.item, None
        try:
            said, sound = self.pipe.recv()
        except (EOFError, OSError):
            return item, f"failed: its process ended with code {self.stop()}"
        if not sound:
            self.stop()
        return item, said

    def stop(self, patience: float = 10) -> int | None:
        """The process's exit code; it is killed if it doesn't end by itself within `patience` seconds."""
        if self.process is None:
            return None
        self.pipe.close()
        self.process.join(patience)
        self.process.kill()
        self.process.join()
        code, self.process = self.process.exitcode, None
        return code


def _serve(pipe: Connection, work: Callable[[Any], str], place: dict[str, str]) -> None:
    """A process's life: an item, what came of it, the next, until nobody asks any more."""
    os.environ.update(place)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sound = True  # what an error leaves on the GPU, or breaks there, ends with its process
    with contextlib.suppress(EOFError, OSError, KeyboardInterrupt):
        while sound:
            item = pipe.recv()
            try:
                said = work(item)
            except Exception as error:
                said, sound = f"failed: {type(error).__name__}: {error}", False
            pipe.send((said, sound))


def _end_with_parent() -> None:
    """Where the parent is killed, what is at work would go on unseen, beside whatever is started next."""
    parent_process().join()
    os._exit(1)
