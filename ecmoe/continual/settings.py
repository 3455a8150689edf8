"""Settings: the schema of a run of this study, as RunConfig is of the others."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ecmoe.config import ConfigError, key
from ecmoe.paths import IMAGES_PREFIX, content_of, parts_of, with_content

# Part of every digest: raise it when the meaning of a setting or of a result changes.
SCHEMA = 1
APPROACHES = {
    "expert_gate": "Expert Gate",
    "shared": "one dense network",
    "expert_choice": "one EC network",
    "joint": "joint, dense",
    "joint_expert_choice": "joint, EC",
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that decides what a run computes.

    Raises:
        ConfigError: on construction, with key, value and what would be right.
    """

    approach: str = key("expert_gate", "who learns, and how", choices=tuple(APPROACHES))
    data: str = key("digits", "digits, cifar10 or images:PATH, see `ecmoe.data.images`")
    tasks: int = key(5, "K, tasks: groups of as many classes each, in the data's order", low=2)
    seed: int = key(0, "initial values and order of the batches", low=0)
    patch: int = key(4, "side of a patch in pixels", low=1)
    layers: int = key(1, "blocks: mixing of tokens, then an FFN or an expert choice layer", low=1)
    d_model: int = key(32, "d, width of a token", low=1)
    d_ff: int = key(
        32, "hidden width of the FFN of Expert Gate's experts; the other networks get what makes them as large", low=1
    )
    num_experts: int = key(5, "e, experts of an expert choice layer", low=1)
    capacity_factor: float = key(2.0, "c of expert choice", low=0)
    steps: int = key(100, "steps for each task; joint training: as many in all", low=1)
    batch_size: int = key(50, "images of a batch", low=1)
    learning_rate: float = key(3e-3, "Adam", low=0)
    code: int = key(32, "hidden units of a gate, fewer than an image has pixels", low=1)
    gate_steps: int = key(300, "steps of a gate", low=1)
    gate_learning_rate: float = key(1e-2, "Adam, for gates", low=0)
    temperature: float = key(2.0, "t of the gates' softmax (the paper: 2)", low=0)
    threshold: float = key(0.85, "relatedness above which an expert learns without forgetting (the paper: 0.85)")
    held_out: int = key(10, "one training image in so many doesn't train the gate, but measures relatedness", low=2)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _checked(field, getattr(self, field.name)))
        object.__setattr__(self, "data", with_content(self.data))  # so that other images are another run

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Settings:
        """Settings from flat keys; an unknown one is an error that names its nearest neighbour."""
        names = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in names:
                near = difflib.get_close_matches(str(name), names, n=1)
                hint = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(names)}"
                raise ConfigError(f"unknown key {name!r} with value {values[name]!r}: {hint}")
        return cls(**values)

    def replace(self, **changes: Any) -> Settings:
        """The same settings but for `changes`; checked like any other."""
        return dataclasses.replace(self, **changes)

    @property
    def name(self) -> str:
        """approach-seed-digest: the name of the record. The same settings are the same run."""
        values = dataclasses.asdict(self)
        if self.data.startswith(IMAGES_PREFIX):  # a copy elsewhere holds the same images
            values["data"] = Path(*parts_of(self.data)).name + content_of(self.data)
        text = json.dumps({"schema": SCHEMA} | values, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        return f"{self.approach.replace('_', '-')}-s{self.seed}-{digest}"


_TYPES = typing.get_type_hints(Settings)


def _checked(field: dataclasses.Field, value: Any) -> Any:
    kind, meta = _TYPES[field.name], field.metadata
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise ConfigError(f"{field.name}={value!r} is of type {type(value).__name__}, but must be {kind.__name__}")
    if meta["choices"] and value not in meta["choices"]:
        raise ConfigError(f"{field.name}={value!r}: must be one of {', '.join(meta['choices'])}")
    if kind is float and not math.isfinite(value):
        raise ConfigError(f"{field.name}={value!r}: must be a finite number")
    if meta["low"] is not None and value < meta["low"]:
        raise ConfigError(f"{field.name}={value!r}: must be at least {meta['low']:g}")
    if meta["high"] is not None and value > meta["high"]:
        raise ConfigError(f"{field.name}={value!r}: must be at most {meta['high']:g}")
    if field.name in ("capacity_factor", "learning_rate", "gate_learning_rate", "temperature") and value == 0:
        raise ConfigError(f"{field.name}={value!r}: must be above 0")
    return value
