"""Learn tasks in sequence, and measure after each what is still known.

Expert Gate beside one network of the same total size, dense or with an expert choice layer, and beside that network
trained on all tasks at once. Evaluation is class-incremental: nobody says which task an image is from.

Letters: K tasks; n images (C, H, W); T tokens of an image, its patches, of width d; e experts of an expert choice layer.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ecmoe.config import ConfigError
from ecmoe.continual.expert_gate import ExpertGate, Gate, fit
from ecmoe.continual.patchnet import PatchNet, as_large, count, dense_ffn
from ecmoe.continual.settings import Settings
from ecmoe.data import images
from ecmoe.model.moe import MoE
from ecmoe.routers import bucket_size
from ecmoe.routing import ExpertChoice

Accuracies = Sequence[Sequence[float | None]]  # a row after each task, with one of each task


class Task(NamedTuple):
    """Images of a group of classes: x (n, C, H, W) float32, y (n,) int64; `held` (n,) bool, see `Settings.held_out`."""

    classes: Tensor
    x: Tensor
    y: Tensor
    held: Tensor
    val_x: Tensor
    val_y: Tensor


def split(data: images.Images, settings: Settings, device: torch.device | str = "cpu") -> list[Task]:
    """The tasks: neighbouring classes together, none in two tasks."""
    K, classes, of_data = settings.tasks, len(data.classes), f"data={settings.data!r}"
    if classes % K:
        fits = [k for k in range(2, classes + 1) if classes % k == 0]
        raise ConfigError(f"tasks={K} doesn't divide the {classes} classes of {of_data}: may be one of {fits}")
    tasks = []
    for group in torch.arange(classes).view(K, -1):
        train, val = torch.isin(data.train_y, group), torch.isin(data.val_y, group)
        x, y = data.train_x[train], data.train_y[train]
        held = torch.arange(len(x)) % settings.held_out == 0
        if (seen := int((~held).sum())) < settings.batch_size:
            raise ConfigError(f"batch_size={settings.batch_size}: is more than the {seen} training images of a task "
                              f"of {of_data}; lower it, or tasks={K}")  # fmt: skip
        parts = (group, x, y, held, data.val_x[val], data.val_y[val])
        tasks.append(Task(*(part.to(device) for part in parts)))
    return tasks


def run(settings: Settings) -> dict[str, Any]:
    """Learn all tasks, and measure after each. The same settings give the same numbers on a CPU.

    Returns:
        accuracy: K rows, after each task, of K accuracies, one a task; None for a task that hasn't come yet, and in all
        rows but the last of joint training. accuracy_task_known: the same, told the task of an image. Of Expert Gate:
        confusion (row: task, column: expert; shares of images), gate_right (its diagonal's mean), relatedness, origins.
    """
    s, data = settings, images.load(settings.data)
    tasks = split(data, s, "cuda" if torch.cuda.is_available() else "cpu")
    K, shape = len(tasks), tuple(data.train_x.shape[1:])
    with torch.random.fork_rng():
        torch.manual_seed(s.seed)
        gated, lessons, steps = s.approach == "expert_gate", tasks, s.steps
        model = new_gate(shape, s) if gated else new_network(shape, K, len(data.classes), s).to(tasks[0].x.device)
        if s.approach.startswith("joint"):
            lessons, steps = [Task(*map(torch.cat, zip(*tasks, strict=True)))], K * s.steps
        rows, known = [[None] * K] * (K - len(lessons)), [[None] * K] * (K - len(lessons))
        for lesson in lessons:
            if gated:
                model.learn(lesson.x, lesson.y, lesson.held)
            else:
                model.train()
                fit(model.parameters(), lambda ids, t=lesson: F.cross_entropy(model(t.x[ids]), t.y[ids]), len(lesson.x), steps,
                    s.batch_size, s.learning_rate, routed=model)  # fmt: skip
                model.eval()
            came = tasks[: len(rows) + 1]
            said, told = (_asked_by_gates if gated else _asked)(model, came, s)
            rows.append(_accuracies(said, tasks))
            known.append(_accuracies(told, tasks))
    found = {"accuracy": rows, "accuracy_task_known": known, "parameters": count(model)}
    found["tokens"] = K * s.steps * s.batch_size * (model.experts[0] if gated else model).tokens
    found["task_names"] = [", ".join(data.classes[c] for c in task.classes) for task in tasks]
    if gated:
        shares = torch.stack([model(task.val_x)[1].bincount(minlength=K) / len(task.val_x) for task in tasks])
        found |= {
            "confusion": shares.tolist(), "gate_right": float(shares.diagonal().mean()),
            "relatedness": [model.relatedness(task.x[task.held], k).tolist() for k, task in enumerate(tasks)],
            "origins": [origin._asdict() for origin in model.origins],
        }  # fmt: skip
    return found


def new_gate(shape: Sequence[int], settings: Settings) -> ExpertGate:
    """An Expert Gate that knows no task yet, for images of shape (C, H, W)."""
    pixels, d, f = math.prod(shape), settings.d_model, settings.d_ff
    if settings.code >= pixels:
        raise ConfigError(
            f"code={settings.code}: a gate of images with {pixels} pixels needs fewer hidden units, or it copies them"
        )
    return ExpertGate(lambda classes: _net(shape, classes, settings, lambda: dense_ffn(d, f)), pixels, settings)


def new_network(shape: Sequence[int], tasks: int, classes: int, settings: Settings) -> PatchNet:
    """One network for all classes, as large as Expert Gate after all tasks, gates included."""
    expert = new_gate(shape, settings).new_expert(classes // tasks)
    size = tasks * (count(expert) + count(Gate(math.prod(shape), settings.code)))
    d, e, c = settings.d_model, settings.num_experts, settings.capacity_factor
    if not settings.approach.endswith("expert_choice"):
        return as_large(lambda f: _net(shape, classes, settings, lambda: dense_ffn(d, f)), size)
    bucket_size(settings.batch_size * expert.tokens, e, c)  # an error that names the keys, before any training
    return as_large(lambda f: _net(shape, classes, settings, lambda: MoE(ExpertChoice(d, e, c), d, f)), size)


def _net(shape: Sequence[int], classes: int, settings: Settings, make_ffn: Callable[[], nn.Module]) -> PatchNet:
    return PatchNet(shape, classes, settings.patch, settings.d_model, settings.layers, make_ffn)


Asked = tuple[
    list[Tensor], list[Tensor]
]  # of each task's validation images: classes said, classes said when told the task


def _asked_by_gates(model: ExpertGate, tasks: list[Task], settings: Settings) -> Asked:
    told = [model(task.val_x, torch.full_like(task.val_y, k))[0] for k, task in enumerate(tasks)]
    return [model(task.val_x)[0] for task in tasks], told


@torch.no_grad()
def _asked(model: PatchNet, tasks: list[Task], settings: Settings) -> Asked:
    """Experts choose within a batch, so images of all tasks come mixed in batches as in training; the last is filled up, masked."""
    x = torch.cat([task.val_x for task in tasks])
    task_of = torch.cat([torch.full_like(task.val_y, k) for k, task in enumerate(tasks)])
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).to(x.device)
    logits = x.new_zeros(len(x), model.head.out_features)
    for ids in order.split(settings.batch_size):
        filled = F.pad(ids, (0, settings.batch_size - len(ids)), value=int(ids[0]))
        mask = torch.arange(len(filled), device=x.device) < len(ids)
        logits[ids] = model(x[filled], mask)[: len(ids)]
    of_task = [logits[task_of == k] for k in range(len(tasks))]
    told = [task.classes[said[:, task.classes].argmax(1)] for said, task in zip(of_task, tasks, strict=True)]
    return [said.argmax(1) for said in of_task], told


def _accuracies(said: list[Tensor], tasks: list[Task]) -> list[float | None]:
    right = [float((y == task.val_y).float().mean()) for y, task in zip(said, tasks, strict=False)]
    return right + [None] * (len(tasks) - len(right))


def final_accuracy(accuracy: Accuracies) -> float:
    """Mean over tasks, after the last."""
    return sum(accuracy[-1]) / len(accuracy)


def forgetting(accuracy: Accuracies) -> float:
    """Mean over all tasks but the last: accuracy right after it was learned, minus accuracy at the end; NaN for joint training."""
    lost = [row[k] - end for k, (row, end) in enumerate(zip(accuracy, accuracy[-1], strict=True)) if row[k] is not None]
    return sum(lost[:-1]) / (len(lost) - 1) if len(lost) > 1 else math.nan
