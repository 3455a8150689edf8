"""A run of continual learning: made once and kept, as every run is (`ecmoe.training.once`)."""

import sys
import time
from pathlib import Path
from typing import Any

from ecmoe.continual.learning import final_accuracy, forgetting, run
from ecmoe.continual.settings import APPROACHES, Settings
from ecmoe.data import images
from ecmoe.training.gpus import place
from ecmoe.training.once import StillOurs, once
from ecmoe.training.result import Result, not_run, read_run, write_run
from ecmoe.training.summary import circumstances, now
from ecmoe.training.trainer import repeatable


def run_or_load(
    settings: Settings, *, records: Path | None = None, train: bool = True, progress: bool = True
) -> Result:
    """As `ecmoe.run_or_load`, but a Result without curve or weights; of a run that was interrupted nothing is left."""

    def make(folder: Path, still_ours: StillOurs) -> Result:
        with place(progress):
            summary = summarize(settings, progress)
        still_ours()
        write_run(folder, summary)
        return read_run(folder)  # as a later call will see it

    return once(settings, make, records=records, train=train, progress=progress)


def summarize(settings: Settings, progress: bool = True) -> dict[str, Any]:
    """Run, and say what was measured and how."""
    made, clock = circumstances(), time.perf_counter()
    with repeatable():
        measured = run(settings)
    seconds = time.perf_counter() - clock
    if progress:
        print(f"[{APPROACHES[settings.approach]} s{settings.seed}] accuracy {final_accuracy(measured['accuracy']):.3f}, {seconds:.0f} s",
              file=sys.stderr, flush=True)  # fmt: skip
    for suffix in ("", "_task_known"):
        matrix = measured[f"accuracy{suffix}"]
        measured |= {f"final_accuracy{suffix}": final_accuracy(matrix), f"forgetting{suffix}": forgetting(matrix)}
    said = {"status": "finished", "seconds": seconds, "precision": "32-true", "world_size": 1}
    said |= {"data": images.load(settings.data).provenance} | made | {"finished": now()}
    return not_run(settings).summary | measured | said
