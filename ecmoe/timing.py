"""How long a call takes: the one clock of every benchmark here.

On a GPU a call is timed by events on the device, with the queue kept full: before each call the device is made to
wait a while, so that the host runs ahead and its launches cost nothing. That is how a training step meets a layer:
the host is ahead of the device there too. A call that itself waits for the device (a number read from it) empties
the queue, and pays for that, as it does in training. On a CPU the clock is the host's.

Calls are taken in turns, so that a slow moment, or a warm chip, hits all of them alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch

from ecmoe.train import commit, device_name

Key = TypeVar("Key", bound=Hashable)
Call = Callable[[], object]

AHEAD = 20_000_000  # cycles that the device waits before a call: 10 ms, in which the host fills the queue
WARM_UP = {"cuda": 3, "cpu": 1}  # calls before the first that counts: allocator, compilation, clocks


def seconds(call: Call, device: torch.device) -> float:
    """Of one call."""
    if device.type != "cuda":
        began = time.perf_counter()
        call()
        return time.perf_counter() - began
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(AHEAD)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def warm_up(call: Call, device: torch.device) -> None:
    """Call it until it is as fast as it gets."""
    for _ in range(WARM_UP[device.type]):
        call()


def in_turns(calls: Mapping[Key, Call], repeats: int, device: torch.device) -> dict[Key, list[float]]:
    """Seconds of every repeat of each call; the calls are warm already."""
    times: dict[Key, list[float]] = {key: [] for key in calls}
    for _ in range(repeats):
        for key, call in calls.items():
            times[key].append(seconds(call, device))
    return times


def peak_mb(call: Call, device: torch.device) -> tuple[float, float] | None:
    """Memory before a warm call, and the most at any moment of it, in MB; None on a CPU, which doesn't tell."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return before / 1e6, torch.cuda.max_memory_allocated() / 1e6


def spread(samples: list[float]) -> dict[str, float]:
    """Median and quartiles of seconds, in milliseconds: ms, low_ms, high_ms."""
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return {"ms": 1e3 * median, "low_ms": 1e3 * low, "high_ms": 1e3 * high}


def this_device() -> torch.device:
    """A GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def machine() -> dict[str, Any]:
    """What a time belongs to."""
    return {"device": device_name(), "torch": torch.__version__, "threads": torch.get_num_threads(), "commit": commit()}


def compiling() -> AbstractContextManager:
    """Let many layers that share their code be compiled side by side, each for its own sizes and numbers."""
    torch._dynamo.reset()
    return torch._dynamo.config.patch(specialize_float=True, recompile_limit=256, accumulated_recompile_limit=1024)
