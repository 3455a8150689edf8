"""Measurements of trained models, each computed once and stored beside the run's records.

`MEASURES` lists them, measure.py runs and stores them, and the other files compute them from a run's model."""

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, NamedTuple

from pydantic import Field

from ecmoe.files import ConfigError, check_known, check_sum
from ecmoe.paths import content_of, with_content


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
        where = {key: content_of(with_content(self.keys[key])) for key in row.where if self.keys.get(key)}
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
