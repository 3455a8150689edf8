"""load: what a page shows, read from where the engine kept it. What notebooks call in their first cell."""

import os
import sys
from collections import UserDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from ecmoe import paths
from ecmoe.config import RunConfig
from ecmoe.measures import MEASURES, Measurement
from ecmoe.model.build import flops_per_token
from ecmoe.study import engine
from ecmoe.study import plan as planning
from ecmoe.study.parameters import page_parameters
from ecmoe.training.result import Result, not_run

CORE = 1e11  # FLOP/s that a core of a CPU does at most in training, or few do more
_CHECKED: set[str] = set()  # pages whose parameters were asked for here: later, a notebook has names of its own


@dataclass
class Study(UserDict[str, list[Result]]):
    """The runs of a page, as a mapping: name of an arm -> a Result for each seed.

    scale, parameters (all of the page's, by name) and what was measured stand beside them. train: arms that are trained, and
    measured, where something is missing.
    """

    page: str
    scale: str
    parameters: dict[str, Any]
    planned: list[planning.Planned]
    train: Collection[str]
    data: dict[str, list[Result]] = field(repr=False)  # the mapping

    def found(self, what: str) -> list[tuple[str, int, Measurement, dict[str, Any] | None]]:
        """Arm, seed, measurement, and what it found, for every measurement of that name that the page asks for.

        What is missing is None, unless it may be measured now.
        """
        from ecmoe.measures.measure import measure

        by_name = {result.summary["name"]: result for results in self.values() for result in results}
        found = []
        for one in self.planned:
            for how in [how for how in one.measures if how.what == what]:
                taken = measure(by_name[one.name], how, scale=self.scale, train=one.arms[0] in self.train)
                found.append((one.arms[0], one.seed, how, taken))
        return found

    def measured(self, what: str) -> pd.DataFrame:
        """The same as one table: the `rows` of each, or its numbers, with `arm`, `seed` and what it was taken for.

        A run without the measurement is one row without values, so that figures can name the gap.
        """
        each, rows = MEASURES[what].each, []
        for arm, seed, how, found in self.found(what):
            taken = {"arm": arm, "seed": seed} | ({each: how.keys[each]} if each else {})
            rows += [{**taken, **row} for row in ((found or {}).get("rows") or [found or {}])]
        return pd.DataFrame(rows, columns=None if rows else ["arm", "seed"])


def load(page: str, given: Mapping[str, Any]) -> Study:
    """The runs of a page, in the order of its plan.

    Args:
        page: such as "03_capacity_factor". given: the notebook's globals(): its parameters, of which `scale` says whose
            files are read, and `train_missing` whether what isn't there is trained now (into runs/, never into reports/).

    Raises:
        ConfigError: a parameter, arm or key that can't be; before any work.
    """
    parameters = page_parameters(page, given, unknown=page not in _CHECKED)
    _CHECKED.add(page)
    return _load(page, parameters)


def _load(page: str, parameters: dict[str, Any], also: Collection[str] = ()) -> Study:
    """The runs that these parameters ask for. also: arms that are trained even where what is missing isn't."""
    scale = parameters["scale"]
    planned = planning.of_page(page, scale, parameters)
    results: dict[str, list[Result]] = {arm: [] for arm in planning.arms_of(parameters, scale)}
    train = {*also, *(results if parameters["train_missing"] else ())}
    waiting = [one for one in planned if one.arms[0] in train and not any(map(Path.exists, _places(one, scale)))]
    # To measure a run whose weights aren't here trains it, too.
    trained = [one for one in planned if not (paths.runs() / one.name / "model.safetensors").exists()]
    if anew := [one.config for one in trained if one.arms[0] in train and engine.lacks(one, scale)]:
        warn_of_hours(anew)
    with tqdm(total=sum(one.config.steps for one in waiting), unit="step", disable=not waiting) as bar:
        for one in planned:
            with watching(bar, one, waiting) if one in waiting else nullcontext([]) as callbacks:
                results[one.arms[0]].append(_result(one, scale, one.arms[0] in train, callbacks))
    return Study(page, scale, parameters, planned, train, results)


def warn_of_hours(configs: Sequence[RunConfig]) -> None:
    """Say it before runs begin that a CPU takes hours for, and what to do."""
    import torch  # not needed to read what is there

    flops = sum(flops_per_token(config) * config.steps * config.tokens_per_batch for config in configs)
    hours = flops / (CORE * (os.cpu_count() or 1)) / 3600
    if hours > 1 and not torch.cuda.is_available():
        said = f"no GPU here: {len(configs)} runs will take more than {hours:,.0f} hours on this CPU. Stop it, and take"
        print(f"{said} scale='smoke', train_missing=False, or a machine with a GPU.", file=sys.stderr, flush=True)


@contextmanager
def watching(bar: tqdm, one: planning.Planned, waiting: Sequence[planning.Planned]) -> Iterator[list[Any]]:
    """Callbacks of a run that is trained now, next of those that wait: they move the bar, in a notebook a widget, with its steps."""
    from lightning.pytorch.callbacks import LambdaCallback  # not needed to read what is there

    def moved(trainer: Any, *_: Any) -> None:
        bar.update(trainer.global_step + before - bar.n)

    def measured(trainer: Any, *_: Any) -> None:
        if "val_loss" in trainer.callback_metrics:
            bar.set_postfix(loss=f"{float(trainer.callback_metrics['val_loss']):.3f}")

    before = bar.n
    bar.set_description(f"run {waiting.index(one) + 1} of {len(waiting)}, {one.arms[0]} s{one.seed}")
    yield [LambdaCallback(on_train_batch_end=moved, on_validation_end=measured)]
    bar.update(one.config.steps + before - bar.n)  # of one that ended early, or called nobody back


def _places(one: planning.Planned, scale: str) -> tuple[Path, Path]:
    """Where a run that is done can be: its record, its summary."""
    return planning.record(one, scale), paths.runs() / one.name / "summary.json"


def _result(one: planning.Planned, scale: str, train: bool, callbacks: list[Any]) -> Result:
    if kept := planning.recorded(one, scale):
        return kept
    if not train and not _places(one, scale)[1].exists():
        return not_run(one.config)
    try:
        from ecmoe.training.run import run_or_load  # torch and Lightning: not needed to read what is there

        return run_or_load(one.config, train=train, progress=False, callbacks=callbacks)
    except Exception as error:  # its run folder keeps it too; the others are still wanted
        print(f"[{one.arms[0]} s{one.seed}] failed: {error}", file=sys.stderr, flush=True)
        return Result(not_run(one.config).summary | {"status": "failed", "error": f"{type(error).__name__}: {error}"})


def beside(study: Study, mine: Mapping[str, Any]) -> Study:
    """The study's first seed and one more arm, "yours", which is trained now: to try what a changed line does. mine: its keys of RunConfig."""
    # Varied already, where a page varies a key.
    arms = planning.arms_of(study.parameters, study.scale) | {"yours": dict(mine)}
    asked = {"arms": arms, "vary": {}, "seeds": study.parameters["seeds"][:1], "train_missing": False}
    return _load(study.page, study.parameters | asked, {*study.train, "yours"})
