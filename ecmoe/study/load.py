"""load: read a page's runs and measurements, as stored by the engine. Notebooks call it in their first cell."""

import os
import sys
from collections import UserDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
from tqdm import tqdm

from ecmoe.config import RunConfig
from ecmoe.measures import MEASURES, Measurement, as_measured, measure
from ecmoe.study import engine
from ecmoe.study import plan as planning
from ecmoe.study.parameters import page_parameters
from ecmoe.study.progress import progress_bar
from ecmoe.training.result import Result, not_run, read_record

CORE = 1e11  # FLOP/s of one CPU core in training, estimated high


@dataclass
class Study(UserDict[str, list[Result]]):
    """The runs of a page, as a mapping: arm -> one Result per seed. train: arms to train and measure if missing."""

    page: str
    scale: str
    parameters: dict[str, Any]
    planned: list[planning.Planned]
    train: Collection[str]
    data: dict[str, list[Result]] = field(repr=False)  # the mapping

    def found(self, what: str) -> list[tuple[str, int, Measurement, dict[str, Any] | None]]:
        """Return (arm, seed, measurement, result) for every measurement called `what` in the page's plan. A missing result is
        measured now if its arm is in `train`, else it is None."""
        return [
            (one.arms[0], one.seed, how, measure(result, how, scale=self.scale, train=one.arms[0] in self.train))
            for one, how, result in self._measurements()
            if how.what == what
        ]

    def as_measured(self) -> list[dict[str, Any]]:
        """Return, for every stored measurement, its run's summary with the device and the code that computed it."""
        found = (as_measured(result, how, scale=self.scale) for _, how, result in self._measurements())
        return [one for one in found if one]

    def _measurements(self) -> Iterator[tuple[planning.Planned, Measurement, Result]]:
        by_name = {result.summary["name"]: result for results in self.values() for result in results}
        return ((one, how, by_name[one.name]) for one in self.planned for how in one.measures)

    def measured(self, what: str) -> pd.DataFrame:
        """Return the results of `found` as one table: their rows, with `arm`, `seed` and the measurement's key, such as `task`.
        A run without the measurement is one row without values, so that figures can name the gap."""
        rows = []
        for arm, seed, how, found in self.found(what):
            each = {key: value for key, value in how.keys.items() if key == MEASURES[what].each}
            rows += [{"arm": arm, "seed": seed, **each, **row} for row in (found or {}).get("rows") or [found or {}]]
        return pd.DataFrame(rows, columns=None if rows else ["arm", "seed"])


def load(page: str, given: Mapping[str, Any], also: Collection[str] = ()) -> Study:
    """Load the runs of a page, in the order of its plan. Raise a ConfigError before any work if a parameter, arm or key is invalid.

    given: the notebook's globals(), which hold its parameters. `scale` selects the stored results; with `train_missing` missing
    runs are trained now (into runs/, never into reports/). also: arms to train without it."""
    parameters = page_parameters(page, given)
    scale = parameters["scale"]
    planned = planning.of_page(page, scale, parameters)
    results: dict[str, list[Result]] = {one.arms[0]: [] for one in planned}
    train = {*also, *(results if parameters["train_missing"] else ())}
    asked = [one for one in planned if one.arms[0] in train]
    waiting = [
        one for one in asked if not (planning.record(one, scale).exists() or (one.folder / "summary.json").exists())
    ]
    # Measuring a run also trains it if its weights aren't on this machine.
    trained = [one for one in asked if not (one.folder / "model.safetensors").exists()]
    if anew := [one.config for one in trained if engine.lacks(one, scale)]:
        warn_of_hours(anew)
    with progress_bar(sum(one.config.steps for one in waiting)) as bar:
        for one in planned:
            with watching(bar, one, waiting) if one in waiting else nullcontext([]) as callbacks:
                results[one.arms[0]].append(_result(one, scale, one in asked, callbacks))
    return Study(page, scale, parameters, planned, train, results)


def warn_of_hours(configs: Sequence[RunConfig]) -> None:
    """Warn before training runs that would take more than an hour on this machine's CPU, and name the alternatives."""
    import torch  # not needed to read stored results

    from ecmoe.model.build import flops_per_token

    # A run of tasks in sequence trains `steps` steps for each of them.
    tokens = [config.tokens_per_batch * config.steps * getattr(config, "tasks", 1) for config in configs]
    flops = sum(flops_per_token(config) * n for config, n in zip(configs, tokens, strict=True))
    hours = flops / (CORE * (os.cpu_count() or 1)) / 3600
    if hours > 1 and not torch.cuda.is_available():
        said = f"no GPU here: {len(configs)} runs will take more than {hours:,.0f} hours on this CPU. Interrupt, and"
        print(f"{said} use scale='smoke', train_missing=False, or a machine with a GPU.", file=sys.stderr, flush=True)


@contextmanager
def watching(bar: tqdm, one: planning.Planned, waiting: Sequence[planning.Planned]) -> Iterator[list[Any]]:
    """Yield Lightning callbacks that advance the progress bar while a run trains. waiting: all runs to train, in order."""
    from lightning.pytorch.callbacks import LambdaCallback  # not needed to read stored results

    def moved(trainer: Any, *_: Any) -> None:
        bar.update(trainer.global_step + before - bar.n)

    def measured(trainer: Any, *_: Any) -> None:
        if "val_loss" in trainer.callback_metrics:
            bar.set_postfix(loss=f"{float(trainer.callback_metrics['val_loss']):.3f}")

    before = bar.n
    bar.set_description(f"run {waiting.index(one) + 1} of {len(waiting)}, {one.arms[0]} s{one.seed}")
    yield [LambdaCallback(on_train_batch_end=moved, on_validation_end=measured)]
    bar.update(one.config.steps + before - bar.n)  # if the run stopped early, or never called back


def _result(one: planning.Planned, scale: str, train: bool, callbacks: list[Any]) -> Result:
    if kept := recorded(one, scale):
        return kept
    if not train and not (one.folder / "summary.json").exists():
        return not_run(one.config)
    try:
        from ecmoe.training.run import run_or_load  # imports torch and Lightning: not needed to read stored results

        return run_or_load(one.config, train=train, progress=False, callbacks=callbacks)
    except Exception as error:  # also stored in the run's folder; go on with the other runs
        print(f"[{one.arms[0]} s{one.seed}] failed: {error}", file=sys.stderr, flush=True)
        return Result(not_run(one.config).summary | {"status": "failed", "error": f"{type(error).__name__}: {error}"})


def recorded(one: planning.Planned, scale: str) -> Result | None:
    """Read the run's record; None if there is none. Raise Damaged if it was changed or holds another run."""
    path = planning.record(one, scale)
    return read_record(path) if path.exists() else None


def beside(study: Study, mine: Mapping[str, Any]) -> Study:
    """Return the study's arms and one more, "yours", with the first seed only; "yours" is trained now. mine: its RunConfig keys."""
    arms = planning.arms_of(study.parameters) | {"yours": mine}  # `vary` is applied already
    asked = {"arms": arms, "vary": {}, "seeds": study.parameters["seeds"][:1], "train_missing": False}
    return load(study.page, study.parameters | asked, {*study.train, "yours"})
