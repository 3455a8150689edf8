"""Expert Gate (Aljundi, Chakravarty and Tuytelaars, CVPR 2017): an expert and a gate per task, never overwritten.

The gates are autoencoders. Each is trained on the images of one task, and reconstructs them best, so the gate with the
lowest error predicts an image's task. Tasks arrive one after the other, without the images of earlier tasks.

Letters: n images of D pixels; K tasks so far; T_k the new task, T_a an earlier one, Er_a the mean error that the gate
of T_a makes on images of T_k."""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from ecmoe.config import RunConfig
from ecmoe.continual import ContinualConfig
from ecmoe.data.batches import Batches, batch_of
from ecmoe.model.build import build_model
from ecmoe.model.tracking import track
from ecmoe.training.optimizer import build_optimizer, clip, learning_rate_factor

LWF_TEMPERATURE = 2.0  # of the soft targets in learning without forgetting (LwF; Li and Hoiem 2016)


def new_gate(config: ContinualConfig) -> nn.Sequential:
    """Build an undercomplete autoencoder (section 3.1): images (n, D) in [0, 1] -> logits of their reconstructions (n, D)."""
    return nn.Sequential(nn.Linear(config.pixels, config.code), nn.ReLU(), nn.Linear(config.code, config.pixels))


def new_expert(config: ContinualConfig, classes: int) -> Any:
    """Build a network from images (n, C, H, W) to logits (n, classes), with `features` (n, d) before its `head`."""
    expert = build_model(config)
    expert.head = nn.Linear(config.d_model, classes, bias=False)
    return expert


class ExpertGate(nn.Module):
    """A network that grows by an expert and a gate for each task."""

    def __init__(self, config: ContinualConfig) -> None:
        super().__init__()
        self.config = config
        self.gates, self.experts = nn.ModuleList(), nn.ModuleList()
        self.classes: list[Tensor] = []  # by task, the class of each output of its expert
        # Where each expert started from: an earlier `task` and its relatedness (None: from scratch), and the method.
        self.origins: list[dict[str, Any]] = []

    def learn(self, x: Tensor, y: Tensor, held: Tensor) -> None:
        """Learn a task: train its gate, then its expert, which starts from the expert of the most related task. x:
        (n, C, H, W). y: (n,) classes. held: (n,) bool: images used for relatedness, and not to train the gate."""
        c = self.config
        gate, seen = new_gate(c).to(x.device), x[~held].flatten(1)
        fit(c.replace(steps=c.gate_steps, learning_rate=c.gate_learning_rate), gate,
            lambda batch: F.binary_cross_entropy_with_logits(gate(batch), batch), seen)  # fmt: skip
        self.gates.append(gate.requires_grad_(False))
        classes, local = y.unique(return_inverse=True)
        expert, origin = new_expert(c, len(classes)).to(x.device), {"task": None, "related": None, "how": "scratch"}
        if self.experts:
            related, a = self.relatedness(x[held])[:-1].max(0)  # of all earlier tasks
            how = "LwF" if related > c.threshold else "fine-tuning"
            origin = {"task": int(a), "related": float(related), "how": how}
            head, expert = expert.head, copy.deepcopy(self.experts[a]).requires_grad_(True)
            expert.head, old_head = head, expert.head
        if origin["how"] == "LwF":
            soft = (self.experts[a](x) / LWF_TEMPERATURE).softmax(1)  # from the original, which stays frozen
            fit(c, nn.ModuleList([expert, old_head]), partial(without_forgetting, expert, old_head), x, local, soft)
        else:
            fit(c, expert, lambda batch: F.cross_entropy(expert(batch[0]), batch[1]), x, local)
        self.experts.append(expert.requires_grad_(False))
        self.classes.append(classes)
        self.origins.append(origin)

    @torch.no_grad()
    def errors(self, x: Tensor) -> Tensor:
        """Return the squared distance of images (n, C, H, W) to their reconstruction by each gate: (n, K)."""
        x = x.flatten(1)
        return torch.stack([(gate(x).sigmoid() - x).square().sum(1) for gate in self.gates], dim=1)

    def relatedness(self, x: Tensor, k: int = -1) -> Tensor:
        """Return Rel(T_k, T_a) = 1 - (Er_a - Er_k) / Er_k (section 3.3) for every task a, (K,), from images of task k."""
        mean = self.errors(x).mean(0)
        return 1 - (mean - mean[k]) / mean[k]

    @torch.no_grad()
    def forward(self, x: Tensor, expert: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Classify images (n, C, H, W): return classes (n,) and experts (n,): `expert` if given, else the gates' choice."""
        if expert is None:
            # The argmax of softmax(-er / t), for any temperature t (section 3.2).
            expert = self.errors(x).argmin(1)
        said = torch.empty_like(expert)
        for k in expert.unique().tolist():  # run each expert only on its images
            chosen = expert == k
            said[chosen] = self.classes[k][self.experts[k](x[chosen]).argmax(1)]
        return said, expert

    def answers(self, images: Sequence[Tensor], classes: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Classify each task's images twice: with the experts that the gates choose, and with the task's own expert."""
        said = [self(x)[0] for x in images]
        return said, [self(x, torch.full((len(x),), k, device=x.device))[0] for k, x in enumerate(images)]


def without_forgetting(expert: Any, old_head: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    """Loss of learning without forgetting (Li and Hoiem 2016): the new task's, and distillation of the old expert.

    batch: images, classes, and the old expert's probabilities of its classes for these images, at LWF_TEMPERATURE."""
    x, y, soft = batch
    h = expert.features(x)
    return F.cross_entropy(expert.head(h), y) + F.cross_entropy(old_head(h) / LWF_TEMPERATURE, soft)


def fit(config: RunConfig, learnt: nn.Module, loss: Callable[[Any], Tensor], *examples: Tensor) -> None:
    """Train a module with the config's optimiser and schedule on batches of the tensors `examples`, passed to `loss`."""
    parameters = list(learnt.parameters())
    optimizer = build_optimizer(config, parameters, parameters[0].device)
    track(learnt, optimizer)
    schedule = LambdaLR(optimizer, lambda step: learning_rate_factor(config, step))
    order = Batches([torch.arange(len(examples[0]))], config.batch_size, config.seed)
    for which in islice(order, config.steps):
        optimizer.zero_grad()
        # Taken where the examples lie: from indices on the host, each tensor would copy them to a GPU, and wait.
        loss(batch_of(examples, which.to(examples[0].device, non_blocking=True))).backward()
        if config.gradient_clip:
            clip(parameters, optimizer, config.gradient_clip)
        optimizer.step()
        schedule.step()
