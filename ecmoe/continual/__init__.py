"""Continual learning of tasks in sequence: Expert Gate, with an expert per task, against one network for all tasks.

learning.py trains and evaluates, expert_gate.py implements Expert Gate, and the config of its runs is here."""

import dataclasses
from typing import Any, ClassVar

from ecmoe.config import ConfigError, RunConfig, key


@dataclasses.dataclass(frozen=True)
class ContinualConfig(RunConfig):
    """A RunConfig with keys for tasks in sequence. It trains on one device in float32, with TF32 products on a GPU, `steps`
    steps for each task. Nothing is compiled or captured, whatever the keys say."""

    trained_by: ClassVar[str] = "ecmoe.continual.learning:train_run"

    approach: str = key("sequence", "expert_gate: a dense network and a gate per task; sequence: one network of the same total "
                        "size, task after task; joint: that network, all tasks at once, in as many steps",
                        choices=("expert_gate", "sequence", "joint"))  # fmt: skip
    tasks: int = key(5, "K, number of tasks: groups of equally many classes, in the order of the data", low=2)
    code: int = key(32, "hidden units of a gate (an autoencoder); fewer than the values in an image", low=1)
    gate_steps: int = key(300, "training steps per gate", low=1)
    gate_learning_rate: float = key(1e-2, "peak learning rate of the gates", above=0, high=1e30)
    threshold: float = key(0.85, "relatedness above which an expert learns by LwF, else by fine-tuning (paper: 0.85)")
    held_out: int = key(10, "one in this many training images is held out to measure relatedness", low=2)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.images:
            raise ConfigError(f"data={self.data!r}: tasks are of images: digits, cifar10, images:PATH")
        if self.classes % self.tasks:
            raise ConfigError(f"tasks={self.tasks}: must divide classes={self.classes}")
        if self.code >= self.pixels:
            raise ConfigError(f"code={self.code}: a gate of images with {self.pixels} pixels needs fewer hidden units, "
                              "or it copies them")  # fmt: skip
        if self.approach == "expert_gate" and self.router != "dense":
            raise ConfigError(f"router={self.router!r}, approach='expert_gate': experts are dense; set router: dense")
        if self.ranks > 1:
            raise ConfigError(f"devices={self.devices}, num_nodes={self.num_nodes}: must both be 1 when learning tasks")

    @property
    def pixels(self) -> int:
        """D, the number of values in an image: height x width x channels."""
        return self.sequence_length * self.patch_size**2 * self.channels

    def identity(self) -> dict[str, Any]:
        """Return `RunConfig.identity` without the keys that a run of this kind doesn't use."""
        unread = ("accumulate", "augment", "eval_batches", "precision")
        return {key: value for key, value in super().identity().items() if key not in unread}

    def slug(self) -> str:
        """Return the approach, followed by `RunConfig.slug`."""
        return f"{self.approach.replace('_', '-')}-{super().slug()}"
