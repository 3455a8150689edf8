"""Settings: the schema of a run of this study, as RunConfig is of the others."""

import dataclasses
from typing import Any

from ecmoe.config import Schema, bare_data, key
from ecmoe.paths import IMAGES_PREFIX, with_content

APPROACHES = {
    "expert_gate": "Expert Gate",
    "shared": "one dense network",
    "expert_choice": "one EC network",
    "joint": "joint, dense",
    "joint_expert_choice": "joint, EC",
}


@dataclasses.dataclass(frozen=True)
class Settings(Schema):
    """Everything that decides what a run computes."""

    approach: str = key("expert_gate", "who learns, and how", choices=tuple(APPROACHES))
    data: str = key("digits", "digits, cifar10 or images:PATH, see `ecmoe.data.images`")
    tasks: int = key(5, "K, tasks: groups of as many classes each, in the data's order", low=2)
    seed: int = key(0, "initial values and order of the batches", low=0)
    patch: int = key(4, "side of a patch in pixels", low=1)
    layers: int = key(1, "blocks: mixing of tokens, then an FFN or an expert choice layer", low=1, high=100)
    d_model: int = key(32, "d, width of a token", low=1, high=65_536)
    d_ff: int = key(
        32, "hidden width of Expert Gate's experts; the other networks get what makes them as large", low=1, high=65_536
    )
    num_experts: int = key(5, "e, experts of an expert choice layer", low=1, high=4096)
    capacity_factor: float = key(2.0, "c of expert choice", above=0)
    steps: int = key(100, "steps for each task; joint training: as many in all", low=1)
    batch_size: int = key(50, "images of a batch", low=1)
    learning_rate: float = key(3e-3, "Adam", above=0, high=1e30)
    code: int = key(32, "hidden units of a gate, fewer than an image has pixels", low=1)
    gate_steps: int = key(300, "steps of a gate", low=1)
    gate_learning_rate: float = key(1e-2, "Adam, for gates", above=0, high=1e30)
    temperature: float = key(2.0, "t of the gates' softmax (the paper: 2)", above=0)
    threshold: float = key(0.85, "relatedness above which an expert learns without forgetting (the paper: 0.85)")
    held_out: int = key(10, "one training image in so many doesn't train the gate, but measures relatedness", low=2)

    def __post_init__(self) -> None:
        self.check_keys()
        object.__setattr__(self, "data", with_content(self.data))  # so that other images are another run

    def identity(self) -> dict[str, Any]:
        """All keys; `data` by what it holds."""
        return self.to_dict() | {"data": bare_data(self.data).removeprefix(IMAGES_PREFIX)}

    def slug(self) -> str:
        """Approach and seed."""
        return f"{self.approach.replace('_', '-')}-s{self.seed}"
