"""How long a call takes: the one clock of every benchmark here.

A call takes what it takes among its like, one after the other, as in training: the device's time or the host's,
whichever is longer. On a GPU events on the device tell it, over some 50 ms of calls in a row, after as many that don't
count as it takes for the chip to settle at what this call draws of its power (on an H200 the six products of 0.1B/64E
take 4.9 ms one at a time, and 5.7 ms in a row). On a CPU the clock is the host's.

Calls are taken in turns, each time in another order, so that a slow moment hits all of them alike.
"""

from __future__ import annotations

import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pandas as pd
import torch

from ecmoe.bench.rows import named
from ecmoe.files import write_json
from ecmoe.provenance import commit, device_name

Key = TypeVar("Key", bound=tuple[str, ...])
Call = Callable[[], object]

SETTLE, BURST, MOST = 0.2, 0.05, 256  # seconds of work before the calls that count, and of these; how many at most
SLOW = 5  # seconds after which a reader wants to know how it goes
WARM_UP = {"cuda": 3, "cpu": 1}  # calls before the first that counts: allocator, compilation, clocks


class Burst(NamedTuple):
    """How a call is timed: so many in a row, after others that don't count."""

    count: int = 1
    settle: int = 0

    @classmethod
    def of(cls, call: Call, device: torch.device) -> Burst:
        """What suits a call, which is warm already."""
        if device.type != "cuda":
            return cls()
        one = seconds(call, device, cls(3))
        return cls(min(max(round(BURST / one), 1), MOST), math.ceil(SETTLE / one))


def seconds(call: Call, device: torch.device, burst: Burst = Burst()) -> float:  # noqa: B008
    """Of one call."""
    if device.type != "cuda":
        began = time.perf_counter()
        call()
        return time.perf_counter() - began
    for _ in range(burst.settle):
        call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(burst.count):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / burst.count


def warm_up(call: Call, device: torch.device) -> None:
    """Call it until it is as fast as it gets."""
    for _ in range(WARM_UP[device.type]):
        call()


def warmed(
    calls: Mapping[Key, Call], absent: list[str], device: torch.device
) -> tuple[dict[Key, Call], dict[Key, tuple[float, float] | None]]:
    """The calls that work, warm, and the `peak_mb` of each; what doesn't work is named in `absent`, with the reason."""
    works, memory = {}, {}
    for key, call in calls.items():
        began = time.perf_counter()
        try:
            warm_up(call, device)
            memory[key] = peak_mb(call, device)
            works[key] = call
        except Exception as error:  # no memory; a compiler or another package that fails
            absent.append(f"{named(key)} ({reason(error)})")
        if time.perf_counter() - began > SLOW:
            _say(f"{named(key)}: {time.perf_counter() - began:.0f} s to get warm")
    return works, memory


def reason(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:160]


def in_turns(calls: Mapping[Key, Call], repeats: int, device: torch.device) -> dict[Key, list[float]]:
    """Seconds of every repeat of each call; the calls are warm already."""
    bursts = {key: Burst.of(call, device) for key, call in calls.items()}
    times: dict[Key, list[float]] = {key: [] for key in calls}
    order, dice, began = list(calls), random.Random(0), time.perf_counter()
    for turn in range(1, repeats + 1):
        dice.shuffle(order)
        for key in order:
            times[key].append(seconds(calls[key], device, bursts[key]))
        if time.perf_counter() - began > SLOW:
            _say(f"turn {turn} of {repeats}, {time.perf_counter() - began:.0f} s")
    return times


def _say(progress: str) -> None:
    print(f"[bench] {progress}", file=sys.stderr, flush=True)


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


def check_repeats(repeats: int) -> None:
    """Raise a ValueError where they are too few."""
    if repeats < 2:
        raise ValueError(f"repeats={repeats}: must be at least 2, for a median with quartiles")


def this_device() -> torch.device:
    """A GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def products_in(device: torch.device) -> torch.dtype:
    """What layers are timed in."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def machine() -> dict[str, Any]:
    """What a time belongs to; and the clock, on a GPU."""
    settled = {"settled_s": SETTLE} if torch.cuda.is_available() else {}
    threads = torch.get_num_threads()
    return {"device": device_name(), "torch": torch.__version__, "threads": threads, "commit": commit()} | settled


def compiling() -> AbstractContextManager:
    """Let many layers that share their code be compiled side by side, each for its own sizes and numbers."""
    torch._dynamo.reset()
    return torch._dynamo.config.patch(specialize_float=True, recompile_limit=256, accumulated_recompile_limit=1024)


def shown(rows: pd.DataFrame | list[dict]) -> str:
    """A table as text, without empty columns."""
    table = pd.DataFrame(rows).dropna(axis=1, how="all")
    return table.to_string(index=False, float_format="{:.4g}".format, na_rep="")


def save(table: pd.DataFrame, path: Path) -> None:
    """Write what was measured, and where, as JSON."""
    write_json(path, {**table.attrs, "rows": table.to_dict("records")})
