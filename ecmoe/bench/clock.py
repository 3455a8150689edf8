"""Time calls: the clock and the loop that all benchmarks share.

A call is timed while it is repeated back to back, as in training, so its time is the device's or the host's, whichever
is longer. On a GPU, CUDA events time about 50 ms of calls, after 0.2 s of untimed ones in which clock rate and power
settle (on an H200, the six matrix products of 0.1B/64E take 4.9 ms alone, but 5.7 ms back to back). On a CPU, the
host's clock times single calls. Each turn times all calls once, in random order: a slow moment affects all alike.
"""

import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch

from ecmoe.bench.rows import named
from ecmoe.files import ConfigError, write_json
from ecmoe.provenance import commit, device_name

Call = Callable[[], object]
Calls = Mapping[Any, Call]  # key, a tuple of strings -> what to time

SETTLE, BURST, MOST = 0.2, 0.05, 256  # seconds of untimed calls, seconds of timed calls, maximum number of timed calls
SLOW = 5  # seconds after which progress is printed
WARM_UP = {"cuda": 3, "cpu": 1}  # untimed calls for memory allocation, compilation and clock rates


class Timed(NamedTuple):
    """Seconds of each repeat of a call; MB of GPU memory before it and at its peak, None on a CPU; failed calls and why."""

    times: dict[Any, list[float]]
    memory: dict[Any, tuple[float, float] | None]
    absent: list[str]


def timed(calls: Calls, repeats: int, then: Callable[[Calls, list[str]], Calls] = lambda *_: {}) -> Timed:
    """Warm up all calls, then time them in turns; calls that fail are left out and listed in `absent`. then: on a GPU,
    called with (the calls that work, absent), returns more calls, which are timed after all others."""
    if not isinstance(repeats, int) or repeats < 2:
        raise ConfigError(f"repeats={repeats}: must be a whole number of at least 2, for a median with quartiles")
    device, absent, works, memory = this_device(), [], {}, {}
    torch._dynamo.reset()
    # Let torch.compile specialise code shared by many layers to each layer's sizes and numbers.
    limits = {"recompile_limit": 256, "accumulated_recompile_limit": 1024}
    with in_this_thread(), torch._dynamo.config.patch(specialize_float=True, **limits):
        for key, call in calls.items():
            began = time.perf_counter()
            try:
                warm_up(call, device)
                memory[key] = peak_mb(call, device)
                works[key] = call
            except Exception as error:  # such as out of memory, or a failure of the compiler or another package
                absent.append(f"{named(key)} ({reason(error)})")
            _say(f"{named(key)}: {{:.0f}} s to get warm", began)
        times = in_turns(works, repeats, device)
        if device.type == "cuda":
            times |= in_turns(then(works, absent), repeats, device)
    return Timed(times, memory, absent)


def in_this_thread() -> AbstractContextManager:
    """Return a context in which backward passes run in this thread, as in training (`trainer.repeatable`)."""
    return torch.autograd.set_multithreading_enabled(False)


def in_turns(
    calls: Calls, repeats: int, device: torch.device, agreed: Callable[[dict], dict] = lambda bursts: bursts
) -> dict[Any, list[float]]:
    """Return the seconds of each repeat of each call; the calls are warm. agreed: maps the bursts of this process to
    those that all processes use, if their calls wait for each other."""
    bursts = agreed({key: burst(call, device) for key, call in calls.items()})
    times: dict[Any, list[float]] = {key: [] for key in calls}
    order, dice, began = list(calls), random.Random(0), time.perf_counter()
    for turn in range(1, repeats + 1):
        dice.shuffle(order)
        for key in order:
            times[key].append(seconds(calls[key], device, *bursts[key]))
        _say(f"turn {turn} of {repeats}, {{:.0f}} s", began)
    return times


def burst(call: Call, device: torch.device) -> tuple[int, int]:
    """Return how many calls to time, and how many untimed calls to make before them; the call is warm."""
    if device.type != "cuda":
        return 1, 0
    one = seconds(call, device, 3, 0)
    return min(max(round(BURST / one), 1), MOST), math.ceil(SETTLE / one)


def seconds(call: Call, device: torch.device, count: int, settle: int) -> float:
    """Return the seconds per call over `count` calls (one on a CPU), after `settle` untimed calls."""
    if device.type != "cuda":
        began = time.perf_counter()
        call()
        return time.perf_counter() - began
    for _ in range(settle):
        call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(count):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / count


def warm_up(call: Call, device: torch.device) -> None:
    """Make untimed calls until speed is steady."""
    for _ in range(WARM_UP[device.type]):
        call()


def peak_mb(call: Call, device: torch.device) -> tuple[float, float] | None:
    """Return GPU memory in MB, before a warm call and its peak during the call; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return before / 1e6, torch.cuda.max_memory_allocated() / 1e6


def reason(error: Exception) -> str:
    """Return an error's type and message in one line of at most 160 characters."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:160]


def _say(progress: str, began: float) -> None:
    if (took := time.perf_counter() - began) > SLOW:
        print(f"[bench] {progress.format(took)}", file=sys.stderr, flush=True)


def spread(samples: list[float]) -> dict[str, float]:
    """Return the median and quartiles of seconds, in milliseconds: ms, low_ms, high_ms."""
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return {"ms": 1e3 * median, "low_ms": 1e3 * low, "high_ms": 1e3 * high}


def this_device() -> torch.device:
    """Return the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def tabled(rows: list[dict], absent: list[str], setting: Mapping[str, Any], **more: Any) -> pd.DataFrame:
    """Return a table of rows, with the setting, the machine, what is absent, and `more` in `attrs`."""
    table = pd.DataFrame(rows, columns=None if rows else ["ms"])
    machine = dict(device=device_name(), torch=torch.__version__, threads=torch.get_num_threads(), commit=commit())
    settled = {"settled_s": SETTLE} if torch.cuda.is_available() else {}
    table.attrs |= {"setting": {**setting, **machine, **settled}, "absent": absent, **more}
    return table


def save(table: pd.DataFrame, path: Path) -> None:
    """Write a table's rows and `attrs` as JSON."""
    write_json(path, {**table.attrs, "rows": table.to_dict("records")}, sealed=True)
