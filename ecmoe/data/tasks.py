"""Classification tasks for fine-tuning: the paper's eleven, from GLUE and SuperGLUE, and `lines`, stored here.

An example is one or more texts, in reading order, and a label. The eleven tasks come from the Hub, or from a folder
with TASK/train.jsonl and TASK/validation.jsonl in the Hub's columns. `lines` is ours: is a line of Python's standard
library (PSF licence) code, 0, or docstring prose, 1? No module is in both training and validation."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from ecmoe import paths
from ecmoe.data.corpus import Rows, checked_rows, from_hub, json_rows
from ecmoe.files import ConfigError, check_known

_GLUE, _SUPERGLUE = "nyu-mll/glue", "aps/super_glue"  # data sets of the Hub


class Task(NamedTuple):
    """The source and columns of a task."""

    hub: str  # Hub data set with a config named like the task; "": the task is stored beside this file
    columns: tuple[str, ...]  # text columns in reading order; the question, if any, is last
    classes: int
    validation: str = "validation"


TASKS = {
    "boolq": Task(_SUPERGLUE, ("passage", "question"), 2),
    "cb": Task(_SUPERGLUE, ("premise", "hypothesis"), 3),
    "cola": Task(_GLUE, ("sentence",), 2),
    "mnli": Task(_GLUE, ("premise", "hypothesis"), 3, "validation_matched"),
    "mrpc": Task(_GLUE, ("sentence1", "sentence2"), 2),
    "qnli": Task(_GLUE, ("sentence", "question"), 2),
    "qqp": Task(_GLUE, ("question1", "question2"), 2),
    "rte": Task(_GLUE, ("sentence1", "sentence2"), 2),
    "sst2": Task(_GLUE, ("sentence",), 2),
    "wic": Task(_SUPERGLUE, ("sentence1", "sentence2", "word"), 2),
    "wnli": Task(_GLUE, ("sentence1", "sentence2"), 2),
    "lines": Task("", ("line",), 2),
}


class Examples(NamedTuple):
    """n examples. texts: a tuple for each, one text per column of the task. labels: (n,) int64."""

    texts: list[tuple[str, ...]]
    labels: np.ndarray


def load(name: str, folder: str | Path | None = None) -> tuple[Examples, Examples]:
    """Load the training and validation examples of one of `TASKS`, in the source's order.

    folder: local copies, PATH or PATH#HASH of their content; a task missing there is loaded from the Hub,
    unless a hash says what the content must be."""
    check_known("task", [name], TASKS)
    task, what, there = TASKS[name], f"task {name!r}", "a folder of local copies"
    if not task.hub:
        folder = Path(__file__).parent
    if folder:
        paths.check_content(str(folder))
        paths.remember_content(paths.with_content(str(folder)))
        local = paths.resolve(paths.plain(str(folder))) / name
        if local.is_dir():
            sides = (json_rows(what, local / f"{side}.jsonl", task.columns) for side in ("train", "validation"))
            return tuple(_examples(name, rows) for rows in sides)
        there = f"{local}/train.jsonl and validation.jsonl"
    sets = from_hub(what, f"the Hub must be reachable, or {there} must exist", task.hub, name)
    sides = (checked_rows(f"{what}: {side}", sets[side], task.columns) for side in ("train", task.validation))
    return tuple(_examples(name, rows) for rows in sides)


def _examples(name: str, rows: Rows) -> Examples:
    texts, labels = [], []
    for where, row in rows:
        label = row.get("label")
        if type(label) is not int or not 0 <= label < TASKS[name].classes:
            raise ConfigError(f"{where}: label {label!r} must be 0 to {TASKS[name].classes - 1}, a whole number")
        texts.append(tuple(row[column] for column in TASKS[name].columns))
        labels.append(label)
    if not labels:
        raise ConfigError(f"task {name!r}: has no training examples, or no validation examples")
    return Examples(texts, np.array(labels, np.int64))
