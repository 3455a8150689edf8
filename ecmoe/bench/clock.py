"""How long a call takes: the one clock, and the one loop, of every benchmark here.

A call takes what it takes among its like, one after the other, as in training: the device's time or the host's,
whichever is longer. On a GPU events on the device tell it, over some 50 ms of calls in a row, after as many that don't
count as it takes for the chip to settle at what this call draws of its power (on an H200 the six products of 0.1B/64E
take 4.9 ms one at a time, and 5.7 ms in a row). On a CPU the clock is the host's.

Calls are taken in turns, each time in another order, so that a slow moment hits all of them alike.
"""

import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pandas as pd
import torch

from ecmoe.bench.rows import named
from ecmoe.files import ConfigError, write_json
from ecmoe.provenance import commit, device_name

Key = TypeVar("Key", bound=tuple[str, ...])
Call = Callable[[], object]

SETTLE, BURST, MOST = 0.2, 0.05, 256  # seconds of work before the calls that count, and of these; how many at most
SLOW = 5  # seconds after which a reader wants to know how it goes
WARM_UP = {"cuda": 3, "cpu": 1}  # calls before the first that counts: allocator, compilation, clocks


class Timed(NamedTuple):
    """Seconds of every repeat of each call; (memory before a warm call, the most at any moment of it) in MB, None on a CPU;
    and what could not be timed, with the reason."""

    times: dict[Any, list[float]]
    memory: dict[Any, tuple[float, float] | None]
    absent: list[str]


def timed(
    calls: Mapping[Key, Call], repeats: int, then: Callable[[Mapping[Key, Call], list[str]], Mapping[Key, Call]] = lambda *_: {}
) -> Timed:  # fmt: skip
    """Time the calls in turns, once each is warm; what doesn't work is named, and the rest is timed.

    then: (the calls that work, absent) -> calls that are timed after all others, on a GPU alone.
    """
    if not isinstance(repeats, int) or repeats < 2:
        raise ConfigError(f"repeats={repeats}: must be a whole number of at least 2, for a median with quartiles")
    device, absent, works, memory = this_device(), [], {}, {}
    torch._dynamo.reset()
    # Let many layers that share their code be compiled side by side, each for its own sizes and numbers.
    limits = {"recompile_limit": 256, "accumulated_recompile_limit": 1024}
    with torch._dynamo.config.patch(specialize_float=True, **limits):
        for key, call in calls.items():
            began = time.perf_counter()
            try:
                warm_up(call, device)
                memory[key] = peak_mb(call, device)
                works[key] = call
            except Exception as error:  # no memory; a compiler or another package that fails
                absent.append(f"{named(key)} ({reason(error)})")
            _say(f"{named(key)}: {{:.0f}} s to get warm", began)
        times = in_turns(works, repeats, device)
        if device.type == "cuda":
            times |= in_turns(then(works, absent), repeats, device)
    return Timed(times, memory, absent)


def in_turns(
    calls: Mapping[Key, Call],
    repeats: int,
    device: torch.device,
    agreed: Callable[[dict], dict] = lambda bursts: bursts,
) -> dict[Key, list[float]]:
    """Seconds of every repeat of each call; the calls are warm already. agreed: what processes that wait for each other make
    of how many calls each of them would time."""
    bursts = agreed({key: burst(call, device) for key, call in calls.items()})
    times: dict[Key, list[float]] = {key: [] for key in calls}
    order, dice, began = list(calls), random.Random(0), time.perf_counter()
    for turn in range(1, repeats + 1):
        dice.shuffle(order)
        for key in order:
            times[key].append(seconds(calls[key], device, *bursts[key]))
        _say(f"turn {turn} of {repeats}, {{:.0f}} s", began)
    return times


def burst(call: Call, device: torch.device) -> tuple[int, int]:
    """How a call, which is warm already, is timed: so many in a row, after so many that don't count."""
    if device.type != "cuda":
        return 1, 0
    one = seconds(call, device, 3)
    return min(max(round(BURST / one), 1), MOST), math.ceil(SETTLE / one)


def seconds(call: Call, device: torch.device, count: int = 1, settle: int = 0) -> float:
    """Of one call."""
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
    """Call it until it is as fast as it gets."""
    for _ in range(WARM_UP[device.type]):
        call()


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


def reason(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:160]


def _say(progress: str, began: float) -> None:
    if (took := time.perf_counter() - began) > SLOW:
        print(f"[bench] {progress.format(took)}", file=sys.stderr, flush=True)


def spread(samples: list[float]) -> dict[str, float]:
    """Median and quartiles of seconds, in milliseconds: ms, low_ms, high_ms."""
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return {"ms": 1e3 * median, "low_ms": 1e3 * low, "high_ms": 1e3 * high}


def this_device() -> torch.device:
    """A GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def tabled(rows: list[dict], absent: list[str], setting: Mapping[str, Any], **more: Any) -> pd.DataFrame:
    """What was timed, with `setting`, and what a time belongs to, in `attrs`."""
    table = pd.DataFrame(rows, columns=None if rows else ["ms"])
    machine = dict(device=device_name(), torch=torch.__version__, threads=torch.get_num_threads(), commit=commit())
    settled = {"settled_s": SETTLE} if torch.cuda.is_available() else {}
    table.attrs |= {"setting": {**setting, **machine, **settled}, "absent": absent, **more}
    return table


def save(table: pd.DataFrame, path: Path) -> None:
    """Write what was measured, and where, as JSON."""
    write_json(path, {**table.attrs, "rows": table.to_dict("records")})
