"""measure: what needs a run's weights is computed once and kept, so that pages are redrawn without them."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from ecmoe import paths
from ecmoe.files import Damaged, read_json, write_json
from ecmoe.measures import MEASURES, Measurement
from ecmoe.training.result import Result

if TYPE_CHECKING:
    from ecmoe.model.transformer import Trunk


def measure(
    result: Result,
    how: Measurement,
    *,
    scale: str = "smoke",
    train: bool = True,
    keep: bool = False,
    model: Callable[[], "Trunk"] | None = None,
) -> dict[str, Any] | None:
    """What a measurement finds of a finished run's model: kept from an earlier call, or computed now; None where there is none.

    Args:
        scale: whose pages ask: what reports/<scale>/measures has is read first.
        train: False: nothing is computed. Else a run whose weights aren't here, as of a record, is trained again.
        keep: in reports/<scale>/measures, as the engine does; else in the run's own folder.
        model: `trained_model` of the run, where it serves several measurements.
    """
    if not result.ok:
        return None
    name = result.summary["name"]
    folders = [paths.measures(scale) / name, paths.runs() / name / "measures"][: 1 if keep else 2]
    places = [folder / f"{how.name}.json" for folder in folders]
    if train:
        with lock(name):  # whoever comes second finds it done
            if not any(path.exists() for path in places):
                with nullcontext(model) if model else trained_model(result) as read:
                    found = _computed(result, how, read)
                kept = {"run": name, "what": how.what, "keys": how.keys, "found": found}
                write_json(places[-1], kept, sealed=True)
    for path in places:
        if path.exists():
            kept = read_json(path, sealed=True)
            if (kept.get("run"), kept.get("what")) != (name, how.what):
                raise Damaged(path, f"it holds {kept.get('what')!r} of {kept.get('run')}")
            return kept["found"]
    return None


def lock(run: str) -> FileLock:
    """Held by whoever needs a run's weights to stay: to measure it, or to take them away."""
    return FileLock(paths.runs() / f"{run}.measures.lock", is_singleton=True)  # a process may hold it twice


@contextmanager
def trained_model(result: Result) -> Iterator[Callable[[], "Trunk"]]:
    """A finished run's model, on this machine's device: read when it is first asked for, and once for all who ask.

    Its weights may be many GB. Where they aren't here, the run is trained again.
    """
    import torch

    from ecmoe.config import RunConfig
    from ecmoe.training.gpus import place
    from ecmoe.training.result import load_model
    from ecmoe.training.run import free_memory, run_or_load

    with ExitStack() as held:

        @cache
        def model() -> "Trunk":
            run = run_or_load(RunConfig.from_dict(result.summary["config"]), weights=True).path
            free_memory()  # of its training
            held.enter_context(place(say=False))
            return load_model(run).to("cuda" if torch.cuda.is_available() else "cpu")

        try:
            yield model
        finally:
            model.cache_clear()
            free_memory()


def _computed(result: Result, how: Measurement, model: Callable[[], "Trunk"]) -> Mapping[str, Any]:
    from ecmoe.config import RunConfig
    from ecmoe.training.run import free_memory

    module, _, function = MEASURES[how.what].compute.partition(":")
    try:
        return getattr(import_module(module), function)(
            model(), RunConfig.from_dict(result.summary["config"]), **how.keys
        )
    finally:
        free_memory()  # a copy that was fine-tuned, say: the next one needs its room
