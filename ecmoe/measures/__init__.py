"""Measurements of trained models, each computed once and stored beside the run's records, so that pages need no weights.

`MEASURES` lists them, `measure` computes and stores one, and the files of this room compute them from a run's model."""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from filelock import FileLock
from pydantic import Field

from ecmoe import paths
from ecmoe.config import RunConfig
from ecmoe.files import ConfigError, Damaged, check_known, check_sum, plain, read_json, write_json
from ecmoe.provenance import code_digest

if TYPE_CHECKING:  # the plan reads `MEASURES` without pandas and torch
    from ecmoe.model.transformer import Trunk
    from ecmoe.training.result import Result

    Load = Callable[[], Trunk]


class Row(NamedTuple):
    """A kind of measurement: the function that computes it, and the keys (settings) that a page may pass to it."""

    compute: str  # "module:function"; function(model in evaluation mode, config, **keys) -> dict of JSON values
    keys: Mapping[str, Any] = {}  # keyword arguments of the function: name -> type of its value
    each: str | None = None  # a key whose value is a list, with a separate measurement for each element
    where: tuple[str, ...] = ()  # keys that are paths: the files' content is part of the name, the path isn't


_HERE = "ecmoe.measures"
_Count = Annotated[int, Field(strict=True, ge=1)]
_Above0 = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
_TUNED = {
    "task": str,
    "folder": str | None,
    "steps": _Count,
    "batch_size": _Count,
    "learning_rate": _Above0,
    "examples": _Count | None,
}
MEASURES = {
    "experts-by-token": Row(f"{_HERE}.inspection:experts_by_token"),
    "caps": Row(f"{_HERE}.inspection:caps_on_trained_scores"),
    "dependence": Row(f"{_HERE}.causality:dependence", {"kept": _Count}),
    "next-token": Row(f"{_HERE}.causality:next_token_information", {"batches": _Count, "classes": _Count}),
    "losses": Row(f"{_HERE}.causality:losses_by_routing", {"pools": list[_Count | str]}),
    "decoding": Row(f"{_HERE}.causality:decoding", {"tokens": _Count}),
    "fine-tuned": Row(f"{_HERE}.fine_tuning:fine_tuned", _TUNED, each="task", where=("folder",)),
    "accuracy-at": Row(f"{_HERE}.inspection:accuracy_at", {"places": _Above0}, each="places"),
}


class Measurement(NamedTuple):
    """A measurement with its settings. Its name identifies both, so that each is computed only once per run."""

    what: str  # a key of MEASURES
    keys: Mapping[str, Any]

    @property
    def name(self) -> str:
        """File name: `what`, the value of the key `each`, and a digest if there are other keys."""
        row = MEASURES[self.what]
        where = {key: paths.content_of(paths.with_content(self.keys[key])) for key in row.where if self.keys.get(key)}
        keys = {key: value for key, value in {**self.keys, **where}.items() if key not in row.where or value}
        words = [self.what]
        if row.each in keys:
            words.append(re.sub(r"[^a-z0-9]+", "-", str(keys[row.each]).lower()))
        if keys.keys() - {row.each}:
            words.append(check_sum(keys)[:8])
        return "-".join(words)


def measurements(what: str, keys: Mapping[str, Any]) -> Iterator[Measurement]:
    """Yield the measurements for an entry of `measures` in a page's YAML: one, or one per value of the key `each`."""
    check_known("measurement", [what], MEASURES)
    row = MEASURES[what]
    check_known(f"measurement {what!r} has no key", keys, row.keys)
    if row.each is None:
        yield Measurement(what, dict(keys))
        return
    values = keys.get(row.each)
    if not isinstance(values, list) or not values:
        raise ConfigError(f"measurement {what!r}: {row.each}={values!r} must be a list of values to measure")
    for value in values:
        yield Measurement(what, {**keys, row.each: value})


def measure(
    result: "Result",
    how: Measurement,
    *,
    scale: str,
    train: bool = True,
    keep: bool = False,
    model: "Load | None" = None,
) -> dict[str, Any] | None:
    """Return the stored result of a measurement of a finished run, or compute and store it; None if there is none.

    scale: results in reports/<scale>/measures are read first. train: False: compute nothing. True: compute a missing
    result, training the run again if it has no weights. keep: store in reports/<scale>/measures, as the pipeline does, and
    read only there; False: in the run's folder. model: the function from `trained_model`, to share one model between
    several measurements."""
    if not result.ok:
        return None
    name, places = result.summary["name"], _places(result, how, scale, keep)
    if train:
        with lock(name):  # a second process waits, then finds the result
            if not any(path.exists() for path in places):
                from ecmoe.training.summary import circumstances  # imports torch

                made = circumstances() | {"measures": code_digest(("measures",))}
                with nullcontext(model) if model else trained_model(result) as read:
                    config = RunConfig.from_dict(result.summary["config"])
                    found = resolve_name(MEASURES[how.what].compute)(read(), config, **how.keys)
                kept = {"run": name, "what": how.what, "keys": how.keys, "found": found}
                write_json(places[-1], kept | made, sealed=True)
    stored = _stored(result, how, places)
    return None if stored is None else stored["found"]


def as_measured(result: "Result", how: Measurement, *, scale: str, keep: bool = False) -> dict[str, Any] | None:
    """Return a finished run's summary with the device, code, commit and versions of a stored measurement in place of its own, and
    `measures`, the digest of this subpackage; None if there is none. Arguments as in `measure`.

    Measurements that were stored before they recorded this count as made with the device and code of their run."""
    stored = _stored(result, how, _places(result, how, scale, keep)) if result.ok else None
    keys = ("device", "code", "commit", "versions", "measures")
    return None if stored is None else result.summary | {key: stored[key] for key in keys if key in stored}


def _places(result: "Result", how: Measurement, scale: str, keep: bool) -> list[Path]:
    """Return the paths at which a measurement may be stored, the first to read first, the last to write."""
    name = result.summary["name"]
    folders = [paths.results(scale, "measures") / name, paths.runs() / name / "measures"][: 1 if keep else 2]
    return [folder / f"{how.name}.json" for folder in folders]


def _stored(result: "Result", how: Measurement, places: list[Path]) -> dict[str, Any] | None:
    """Read the first file that exists. Raise Damaged if it was changed, or holds another measurement."""
    for path in filter(Path.exists, places):
        stored = read_json(path, sealed=True)
        said = stored.get("run"), stored.get("what"), _settings(how.what, stored.get("keys") or {})
        if said != (result.summary["name"], how.what, _settings(how.what, how.keys)):
            raise Damaged(path, f"it holds {said[1]!r} of {said[0]}, taken with {stored.get('keys')}")
        return stored
    return None


def _settings(what: str, keys: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a measurement's keys as JSON stores them, without paths, which may differ between machines."""
    return plain({key: value for key, value in keys.items() if key not in MEASURES[what].where})


def lock(run: str) -> FileLock:
    """Return the lock to acquire before measuring a run or deleting its weights, so that neither disturbs the other."""
    return FileLock(paths.runs() / f"{run}.measures.lock", is_singleton=True)  # reentrant within a process


@contextmanager
def trained_model(result: "Result") -> Iterator["Load"]:
    """Yield a function that returns a finished run's model on this machine's device, loaded once, on the first call.

    The weights may be many GB, and are freed at the end of the block. If they are missing, the run is trained again; if that
    fails, every call raises its error, without another attempt."""
    import torch

    from ecmoe.training.gpus import place, use_tf32
    from ecmoe.training.result import load_model
    from ecmoe.training.run import free_memory, run_or_load

    with ExitStack() as held:

        @cache
        def load() -> "Trunk | Exception":
            try:
                run = run_or_load(RunConfig.from_dict(result.summary["config"]), weights=True).path
            except Exception as error:  # for the next measurement, too, which would train in vain
                return error
            free_memory()  # left by training
            held.enter_context(place(say=False))
            use_tf32()
            return load_model(run).to("cuda" if torch.cuda.is_available() else "cpu")

        def model() -> "Trunk":
            free_memory()  # left by the previous measurement, such as a fine-tuned copy of the model
            if isinstance(loaded := load(), Exception):
                raise loaded
            return loaded

        try:
            yield model
        finally:
            load.cache_clear()
            free_memory()
