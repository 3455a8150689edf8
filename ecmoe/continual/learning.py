"""Learn tasks in sequence, and evaluate on all tasks so far after each of them.

Three approaches are compared: Expert Gate; one network of the same total size, dense or with expert choice, trained
task after task; and that network trained on all tasks jointly. In evaluation, an image's task is not given.

Letters: K tasks; n images (C, H, W)."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ecmoe.config import ConfigError
from ecmoe.continual import ContinualConfig
from ecmoe.continual.expert_gate import ExpertGate, fit, new_expert, new_gate
from ecmoe.data import images
from ecmoe.model.build import count_parameters
from ecmoe.routing import altered
from ecmoe.training.gpus import Place, use_tf32
from ecmoe.training.lit import LitClassifier
from ecmoe.training.once import StillOurs
from ecmoe.training.result import Result, not_run, read_run, write_run
from ecmoe.training.summary import circumstances, now
from ecmoe.training.trainer import repeatable


def train_run(
    config: ContinualConfig,
    folder: Path,
    still_ours: StillOurs = lambda: None,
    progress: bool = True,
    callbacks: Any = (),
    loggers: Any = (),
    where: Place | None = None,
) -> Result:
    """Train as `ecmoe.training.run.train_run`, but without curve, weights, callbacks, or resuming after a kill."""
    where, made, data = where or Place(), circumstances(), images.load(config.data)
    use_tf32()
    sharing, clock = where.sharing(), time.perf_counter()
    with repeatable():
        found = run(config)
    sharing, seconds = max(sharing, where.sharing()), time.perf_counter() - clock
    for suffix in ("", "_task_known"):
        final, lost = final_and_forgetting(found[f"accuracy{suffix}"])
        found |= {f"final_accuracy{suffix}": final, f"forgetting{suffix}": lost}
    if progress:
        print(f"[{config.slug()}] accuracy {found['final_accuracy']:.3f}, {seconds:.0f} s", file=sys.stderr, flush=True)
    said = {"status": "finished", "seconds": seconds / sharing, "sharing": sharing}
    said |= {"precision": "32-true", "world_size": 1, "data": data.provenance} | made | {"finished": now()}
    still_ours()
    write_run(folder, not_run(config).summary | found | said)
    return read_run(folder)  # the same result that a later call will load


def run(config: ContinualConfig) -> dict[str, Any]:
    """Learn all tasks, and evaluate after each. On a CPU, the same config gives the same numbers.

    Returns accuracy: (K, K) accuracy on each task (column) after learning each task (row); None for tasks not learned yet,
    and for joint training in all rows but the last. accuracy_task_known: the same, with each image's task given. For
    Expert Gate: confusion (row: task, column: expert; shares of images), gate_right, relatedness, origins."""
    data, cuda = images.load(config.data), torch.cuda.is_available()
    tasks = split(data, config, "cuda" if cuda else "cpu")
    K, lessons = len(tasks), tasks
    with torch.random.fork_rng([torch.cuda.current_device()] if cuda else []):  # other GPUs aren't used
        torch.manual_seed(config.seed)
        if config.approach == "joint":
            lessons, config = [Task(*map(torch.cat, zip(*tasks, strict=True)))], config.replace(steps=K * config.steps)
        model = (ExpertGate if config.approach == "expert_gate" else OneNetwork)(config).to(tasks[0].x.device)
        rows, known = ([[None] * K] * (K - len(lessons)) for _ in range(2))
        for lesson in lessons:
            model.learn(lesson.x, lesson.y, lesson.held)
            came = tasks[: len(rows) + 1]
            answers = model.answers([task.val_x for task in came], [task.classes for task in came])
            for kept, said in zip((rows, known), answers, strict=True):
                right = [float((y == task.val_y).float().mean()) for y, task in zip(said, came, strict=True)]
                kept.append(right + [None] * (K - len(came)))
    found = {"accuracy": rows, "accuracy_task_known": known, "parameters": count(model)}
    found["tokens"] = len(lessons) * config.tokens_per_batch * config.steps
    found["task_names"] = [", ".join(data.classes[c] for c in task.classes) for task in tasks]
    if isinstance(model, ExpertGate):
        experts = (model(task.val_x)[1] for task in tasks)
        shares = [(of_task.bincount(minlength=K) / len(of_task)).tolist() for of_task in experts]
        found |= {
            "confusion": shares, "gate_right": sum(shares[k][k] for k in range(K)) / K,
            "relatedness": [model.relatedness(task.x[task.held], k).tolist() for k, task in enumerate(tasks)],
            "origins": model.origins,
        }  # fmt: skip
    return found


class Task(NamedTuple):
    """Images of a group of classes: x (n, C, H, W) float32, y (n,) int64; `held` (n,) bool, see `ContinualConfig.held_out`."""

    classes: Tensor
    x: Tensor
    y: Tensor
    held: Tensor
    val_x: Tensor
    val_y: Tensor


def split(data: images.Images, config: ContinualConfig, device: torch.device | str) -> list[Task]:
    """Divide the images into tasks of consecutive classes; raise a ConfigError if a task is smaller than a batch."""
    images.check(config, data)
    tasks = []
    for group in torch.arange(config.classes).view(config.tasks, -1):
        train, val = torch.isin(data.train_y, group), torch.isin(data.val_y, group)
        x, y = data.train_x[train], data.train_y[train]
        held = torch.arange(len(x)) % config.held_out == 0
        if (seen := int((~held).sum())) < config.batch_size:
            raise ConfigError(f"batch_size={config.batch_size}: is more than the {seen} training images of a task of "
                              f"data={config.data!r}; lower it, or tasks={config.tasks}")  # fmt: skip
        parts = (group, x, y, held, data.val_x[val], data.val_y[val])
        tasks.append(Task(*(part.to(device) for part in parts)))
    return tasks


class OneNetwork(LitClassifier):
    """One network for all classes, with as many parameters as Expert Gate has after all tasks, including its gates."""

    def __init__(self, config: ContinualConfig) -> None:
        expert = new_expert(config.replace(router="dense"), config.classes // config.tasks)
        plain = config.replace(compile=False)  # else the compiler is imported, for seconds and in vain
        super().__init__(as_large(plain, config.tasks * (count(expert) + count(new_gate(config)))))

    def learn(self, x: Tensor, y: Tensor, held: Tensor) -> None:
        """Train on a task: x (n, C, H, W), y (n,) classes; `held`, an argument of Expert Gate, is ignored."""
        self.train()
        fit(self.config, self.model, lambda batch: sum(self.losses(batch)), x, y)
        self.eval()

    @torch.no_grad()
    def answers(self, images: Sequence[Tensor], classes: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Predict each task's images twice: among all classes, and among the task's classes only.

        Experts choose within a batch, so images of all tasks are shuffled into batches of the training batch size."""
        x = torch.cat(list(images))
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).to(x.device)
        with altered(self, rounding="down"):
            logits = torch.cat([self.model(x[ids]) for ids in order.split(self.config.batch_size)])[order.argsort()]
        of_task = logits.split([len(x) for x in images])
        told = [own[said[:, own].argmax(1)] for said, own in zip(of_task, classes, strict=True)]
        return [said.argmax(1) for said in of_task], told


def as_large(config: ContinualConfig, parameters: int) -> ContinualConfig:
    """Return the config with the d_ff that comes closest to `parameters` parameters, which are linear in d_ff."""
    one, two = (count_parameters(config.replace(d_ff=f)).total for f in (1, 2))
    return config.replace(d_ff=max(1, round(1 + (parameters - one) / (two - one))))


def count(model: nn.Module) -> int:
    """Count parameters, including frozen ones."""
    return sum(p.numel() for p in model.parameters())


def final_and_forgetting(accuracy: Sequence[Sequence[float | None]]) -> tuple[float, float]:
    """Return the mean accuracy over all tasks after the last is learned; and the mean, over all tasks but the last, of the
    accuracy right after learning minus that at the end (NaN for joint training). accuracy: as `run` returns it."""
    matrix = np.array(accuracy, float)  # None is NaN
    return sum(accuracy[-1]) / len(accuracy), float((matrix.diagonal() - matrix[-1])[:-1].mean())
