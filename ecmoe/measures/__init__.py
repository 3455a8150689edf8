"""What is measured on trained models, once, and kept beside their records.

MEASURES lists what there is, a row each; measure.py takes and keeps; each other file is one question that needs a run's weights."""

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ecmoe.files import ConfigError, check_known, check_sum
from ecmoe.paths import content_of, with_content


class Row(NamedTuple):
    """A measurement: who computes it, and how it may be set."""

    compute: str  # "module:function" of ecmoe; function(model in evaluation mode, config, **keys) -> what JSON can hold
    keys: tuple[str, ...] = ()  # that the function takes
    each: str | None = None  # of a list under this key every value is a measurement of its own
    where: tuple[str, ...] = ()  # keys that say where files lie: only what these hold changes what is measured


_HERE = "ecmoe.measures"
_TUNED = ("task", "folder", "steps", "batch_size", "learning_rate", "examples")
MEASURES = {
    "experts-by-token": Row(f"{_HERE}.inspection:experts_by_token"),
    "caps": Row(f"{_HERE}.inspection:caps_on_trained_scores"),
    "dependence": Row(f"{_HERE}.causality:dependence", ("kept",)),
    "next-token": Row(f"{_HERE}.causality:next_token_information", ("batches", "classes")),
    "losses": Row(f"{_HERE}.causality:losses_by_routing", ("pools",)),
    "decoding": Row(f"{_HERE}.causality:decoding", ("tokens",)),
    "fine-tuned": Row(f"{_HERE}.fine_tuning:fine_tuned", _TUNED, each="task", where=("folder",)),
    "accuracy-at": Row(f"{_HERE}.image_capacity:accuracy_at", ("places",), each="places"),
}


class Measurement(NamedTuple):
    """One measurement with its settings. The same settings have the same name, and so are taken once."""

    what: str  # of MEASURES
    keys: Mapping[str, Any]

    @property
    def name(self) -> str:
        """`what`, the value of its `each`, and a digest of the keys, where it has any: the name of a file."""
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
    """What a page's YAML asks for under `measures`: one measurement, or one for each value of the row's `each`."""
    check_known("measurement", [what], MEASURES)
    row = MEASURES[what]
    check_known(f"measurement {what!r} has no key", keys, row.keys)
    if row.each is None:
        yield Measurement(what, dict(keys))
        return
    values = keys.get(row.each)
    if not isinstance(values, list) or not values:
        raise ConfigError(f"measurement {what!r}: {row.each}={values!r} must be a list of what it is taken for")
    for value in values:
        yield Measurement(what, {**keys, row.each: value})
