"""Expert Gate (Aljundi, Chakravarty and Tuytelaars, CVPR 2017): one expert and one gate a task, none ever overwritten.

Who chooses: autoencoders. Each is trained on the images of one task and reconstructs those best, so the gate with the
lowest error says which task an image is from. Tasks arrive one after the other; earlier images are gone by then.

Letters: n images of D pixels; K tasks so far; T_k the new task, T_a an earlier one, Er_a the mean error that the gate
of T_a makes on images of T_k.
"""

import copy
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ecmoe.continual.settings import Settings
from ecmoe.model.tracking import track

LWF_TEMPERATURE = 2.0  # of learning without forgetting's soft targets (Li and Hoiem 2016)


class Gate(nn.Module):
    """Undercomplete one-layer autoencoder of D pixels in [0, 1]: ReLU code of fewer units, sigmoid output (section 3.1)."""

    def __init__(self, pixels: int, code: int) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(pixels, code), nn.Linear(code, pixels)

    def forward(self, x: Tensor) -> Tensor:
        """(n, D) -> (n, D) the reconstruction, before the sigmoid."""
        return self.decoder(F.relu(self.encoder(x)))

    def error(self, x: Tensor) -> Tensor:
        """(n, D) -> (n,) squared distance between image and reconstruction."""
        return (self(x).sigmoid() - x).square().sum(1)


def probabilities(errors: Tensor, temperature: float) -> Tensor:
    """(n, K) errors -> (n, K) how far each expert is to be trusted: softmax of -er / t (section 3.2; the paper: t = 2)."""
    return (-errors / temperature).softmax(dim=1)


def relatedness(er_a: Tensor, er_k: Tensor) -> Tensor:
    """Rel(T_k, T_a) = 1 - (Er_a - Er_k) / Er_k (section 3.3): 1 for the task itself, less the worse T_a's gate does."""
    return 1 - (er_a - er_k) / er_k


class Origin(NamedTuple):
    """Where an expert started: `how` is "scratch", "fine-tuning" or "LwF"; `task` and `related` None for the first."""

    task: int | None
    related: float | None
    how: str


class ExpertGate(nn.Module):
    """A network that grows by an expert and a gate a task.

    Args:
        new_expert: number of classes -> a network with `features(images) -> (n, d)` and a linear `head`.
        pixels: D. settings: of gates and of training.
    """

    def __init__(self, new_expert: Callable[[int], nn.Module], pixels: int, settings: Settings) -> None:
        super().__init__()
        self.new_expert, self.pixels, self.settings = new_expert, pixels, settings
        self.gates, self.experts = nn.ModuleList(), nn.ModuleList()
        self.classes: list[Tensor] = []  # (classes of a task,) each: what an expert's outputs mean
        self.origins: list[Origin] = []

    def learn(self, x: Tensor, y: Tensor, held: Tensor) -> None:
        """Learn a task: its gate, then an expert that starts from the most related one.

        Args:
            x: (n, C, H, W). y: (n,) classes. held: (n,) bool: images that don't train the gate, but measure relatedness.
        """
        s = self.settings
        gate, seen = Gate(self.pixels, s.code).to(x.device), x[~held].flatten(1)
        fit(gate.parameters(), lambda ids: F.binary_cross_entropy_with_logits(gate(seen[ids]), seen[ids]),
            len(seen), s.gate_steps, s.batch_size, s.gate_learning_rate)  # fmt: skip
        self.gates.append(gate.requires_grad_(False))
        classes, local = y.unique(return_inverse=True)
        related = self.relatedness(x[held])[:-1]  # to each earlier task
        expert, origin, old_head = self.new_expert(len(classes)).to(x.device), Origin(None, None, "scratch"), None
        if len(related):
            a = int(related.argmax())
            origin = Origin(a, float(related[a]), "LwF" if related[a] > s.threshold else "fine-tuning")
            head, expert = expert.head, copy.deepcopy(self.experts[a]).requires_grad_(True)
            expert.head, old_head = head, expert.head
        if origin.how == "LwF":
            loss = without_forgetting(expert, old_head, self.experts[a], x, local)
            learnt = [*expert.parameters(), *old_head.parameters()]
        else:
            loss, learnt = lambda ids: F.cross_entropy(expert(x[ids]), local[ids]), expert.parameters()
        fit(learnt, loss, len(x), s.steps, s.batch_size, s.learning_rate)
        self.experts.append(expert.requires_grad_(False))
        self.classes.append(classes)
        self.origins.append(origin)

    @torch.no_grad()
    def errors(self, x: Tensor) -> Tensor:
        """(n, C, H, W) -> (n, K) reconstruction error of each gate."""
        return torch.stack([gate.error(x.flatten(1)) for gate in self.gates], dim=1)

    def relatedness(self, x: Tensor, k: int = -1) -> Tensor:
        """(K,) relatedness of task k, from which the images (n, C, H, W) are, to each task."""
        mean = self.errors(x).mean(0)
        return relatedness(mean, mean[k])

    @torch.no_grad()
    def forward(self, x: Tensor, expert: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(n, C, H, W), perhaps (n,) which expert looks at an image, else the gates decide -> (n,) classes, (n,) their experts."""
        if expert is None:
            expert = probabilities(self.errors(x), self.settings.temperature).argmax(1)  # = lowest error
        said = torch.empty_like(expert)
        for k in expert.unique().tolist():  # an expert sees its own images alone
            chosen = expert == k
            said[chosen] = self.classes[k][self.experts[k](x[chosen]).argmax(1)]
        return said, expert


def without_forgetting(
    expert: Any, old_head: nn.Module, teacher: nn.Module, x: Tensor, y: Tensor
) -> Callable[[Tensor], Tensor]:
    """Loss of learning without forgetting: the new task's, and the old expert's answers to the new images (Li and Hoiem 2016)."""
    with torch.no_grad():
        soft = (teacher(x) / LWF_TEMPERATURE).softmax(1)

    def loss(ids: Tensor) -> Tensor:
        h = expert.features(x[ids])
        return F.cross_entropy(expert.head(h), y[ids]) + F.cross_entropy(old_head(h) / LWF_TEMPERATURE, soft[ids])

    return loss


def fit(parameters: Iterable[nn.Parameter], loss: Callable[[Tensor], Tensor], n: int, steps: int, batch_size: int,
        learning_rate: float, routed: nn.Module | None = None) -> None:  # fmt: skip
    """Take `steps` steps of Adam on batches from shuffled passes over n images; a pass's incomplete last batch is left out.
    routed: a module whose routers have running statistics to move."""
    parameters = list(parameters)
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    if routed is not None:
        track(routed, optimizer)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(order) < batch_size:
            order = torch.randperm(n)
        ids, order = order[:batch_size], order[batch_size:]
        optimizer.zero_grad()
        loss(ids.to(parameters[0].device)).backward()
        optimizer.step()
