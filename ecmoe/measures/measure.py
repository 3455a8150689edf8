"""measure: compute once and store what needs a run's weights, so that pages can be redrawn without the weights."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache
from pkgutil import resolve_name
from typing import Any

from filelock import FileLock

from ecmoe import paths
from ecmoe.config import RunConfig
from ecmoe.files import Damaged, plain, read_json, write_json
from ecmoe.measures import MEASURES, Measurement
from ecmoe.training.result import Result

Load = Callable[[], Any]  # returns a Trunk; importing that class would import torch


def measure(
    result: Result, how: Measurement, *, scale: str, train: bool = True, keep: bool = False, model: Load | None = None
) -> dict[str, Any] | None:
    """Return the stored result of a measurement of a finished run, or compute and store it; None if there is none.

    Args:
        result: the run. how: the measurement. scale: results in reports/<scale>/measures are read first.
        train: False: compute nothing. True: compute a missing result, training the run again if it has no weights.
        keep: store in reports/<scale>/measures, as the pipeline does, and read only there; False: in the run's folder.
        model: the function from `trained_model`, to share one model between several measurements.
    """
    if not result.ok:
        return None
    name = result.summary["name"]
    folders = [paths.measures(scale) / name, paths.runs() / name / "measures"][: 1 if keep else 2]
    places = [folder / f"{how.name}.json" for folder in folders]
    if train:
        with lock(name):  # a second process waits, then finds the result
            if not any(path.exists() for path in places):
                with nullcontext(model) if model else trained_model(result) as read:
                    config = RunConfig.from_dict(result.summary["config"])
                    found = resolve_name(MEASURES[how.what].compute)(read(), config, **how.keys)
                kept = {"run": name, "what": how.what, "keys": how.keys, "found": found}
                write_json(places[-1], kept, sealed=True)
    for path in places:
        if path.exists():
            kept = read_json(path, sealed=True)
            said = kept.get("run"), kept.get("what"), _settings(how.what, kept.get("keys") or {})
            if said != (name, how.what, _settings(how.what, how.keys)):
                raise Damaged(
                    path, f"it holds {kept.get('what')!r} of {kept.get('run')}, taken with {kept.get('keys')}"
                )
            return kept["found"]
    return None


def _settings(what: str, keys: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a measurement's keys as JSON stores them, without paths, which may differ between machines."""
    return plain({key: value for key, value in keys.items() if key not in MEASURES[what].where})


def lock(run: str) -> FileLock:
    """Return the lock to acquire before measuring a run or deleting its weights, so that neither disturbs the other."""
    return FileLock(paths.runs() / f"{run}.measures.lock", is_singleton=True)  # reentrant within a process


@contextmanager
def trained_model(result: Result) -> Iterator[Load]:
    """Yield a function that returns a finished run's model on this machine's device, loaded once, on the first call.

    The weights may be many GB, and are freed at the end of the block. If they are missing, the run is trained again.
    """
    import torch

    from ecmoe.training.gpus import place
    from ecmoe.training.result import load_model
    from ecmoe.training.run import free_memory, run_or_load

    with ExitStack() as held:

        @cache
        def load() -> Any:
            run = run_or_load(RunConfig.from_dict(result.summary["config"]), weights=True).path
            free_memory()  # left by training
            held.enter_context(place(say=False))
            return load_model(run).to("cuda" if torch.cuda.is_available() else "cpu")

        def model() -> Any:
            free_memory()  # left by the previous measurement, such as a fine-tuned copy of the model
            return load()

        try:
            yield model
        finally:
            load.cache_clear()
            free_memory()
