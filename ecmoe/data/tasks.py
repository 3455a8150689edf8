"""Classification tasks to fine-tune on: the paper's eleven, of GLUE and SuperGLUE, and one that every machine has.

An example is some texts, in the order in which a model reads them, and a label. The eleven come from the Hub, or from a
folder with TASK/train.jsonl and TASK/validation.jsonl in the Hub's columns. The task of our own, `lines`, is made of the
standard library: is a line code, or prose of a docstring?
"""

from __future__ import annotations

import ast
import difflib
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ecmoe import paths
from ecmoe.config import ConfigError
from ecmoe.data.corpus import source_files

_GLUE, _SUPERGLUE = "nyu-mll/glue", "aps/super_glue"  # of the Hub


class Task(NamedTuple):
    """Where a task comes from.

    hub: a data set of the Hub; its config is the task's name. columns: of text, in reading order; what is asked comes last.
    classes: labels are 0 ... classes - 1. validation: the name of that split.
    """

    hub: str
    columns: tuple[str, ...]
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
}
OWN = "lines"
OWN_VALIDATION = 0.2  # share of the modules
OF_MODULE, SHORTEST = 20, 20  # lines of each kind at most; characters at least


class Examples(NamedTuple):
    """texts: of each example, as many as the task has columns. labels: (n,) int64."""

    texts: list[tuple[str, ...]]
    labels: np.ndarray

    def first(self, count: int | None) -> Examples:
        """So many of them; None: all."""
        return Examples(self.texts[:count], self.labels[:count])


def load(name: str, folder: str | Path | None = None) -> tuple[Examples, Examples]:
    """Training and validation examples of a task, in their source's order.

    Args:
        name: one of `TASKS`, or "lines". folder: with local copies; a task that isn't there comes from the Hub.

    Raises:
        ConfigError: no such task; its files can't be read, lack a column, or hold another label.
    """
    if name == OWN:
        return _lines()
    if name not in TASKS:
        known = [*TASKS, OWN]
        near = difflib.get_close_matches(name, known, n=1)
        raise ConfigError(
            f"task {name!r}: {f'did you mean {near[0]}?' if near else 'must be one of ' + ', '.join(known)}"
        )
    task = TASKS[name]
    sets, splits = _read(name, task, folder)
    return tuple(_examples(name, task, sets[split], split) for split in splits)


def classes(name: str) -> int:
    """How many labels a task has."""
    return 2 if name == OWN else TASKS[name].classes


def _read(name: str, task: Task, folder: str | Path | None) -> tuple[Any, tuple[str, str]]:
    from datasets import load_dataset

    local = paths.resolve(folder) / name if folder else None
    try:
        if local is not None and local.is_dir():
            splits = ("train", "validation")
            return load_dataset("json", data_files={split: str(local / f"{split}.jsonl") for split in splits}), splits
        return load_dataset(task.hub, name), ("train", task.validation)
    except Exception as error:  # no network, no file, broken lines: `datasets` says so itself
        there = f"{local}/train.jsonl and validation.jsonl" if local else "a folder of local copies"
        raise ConfigError(
            f"task {name!r}: `datasets` can't load it ({type(error).__name__}: {error}); the Hub must be reachable, "
            f"or {there} be there"
        ) from error


def _examples(name: str, task: Task, rows: Any, split: str) -> Examples:
    missing = [column for column in (*task.columns, "label") if column not in rows.column_names]
    if missing:
        raise ConfigError(
            f"task {name!r}: its {split} examples have no column {missing[0]!r}; they have {', '.join(rows.column_names)}"
        )
    labels = list(rows["label"])
    wrong = [label for label in labels if not (isinstance(label, int) and 0 <= label < task.classes)]
    if wrong:
        raise ConfigError(
            f"task {name!r}: label {wrong[0]!r} among its {split} examples; must be 0 to {task.classes - 1}, a whole number"
        )
    texts = list(zip(*(rows[column] for column in task.columns), strict=True))
    return Examples(texts, np.array(labels, np.int64))


@lru_cache
def _lines() -> tuple[Examples, Examples]:
    modules = [
        _code_and_prose(path.read_text(encoding="utf-8", errors="replace")) for path in source_files("stdlib").values()
    ]
    dice, held = np.random.default_rng(0), round(OWN_VALIDATION * len(modules))
    order = dice.permutation(len(modules))
    parts = []
    for part in (order[held:], order[:held]):
        lines = [(line, label) for i in part for label, kind in enumerate(modules[i]) for line in kind[:OF_MODULE]]
        lines = [lines[i] for i in dice.permutation(len(lines))]
        parts.append(Examples([(line,) for line, _ in lines], np.array([label for _, label in lines], np.int64)))
    return tuple(parts)


def _code_and_prose(source: str) -> tuple[list[str], list[str]]:
    """A module's lines without their indents, comments left out; as many of each kind."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):  # the library has files that are wrong on purpose
        return [], []
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = [node.body[0] for node in ast.walk(tree) if isinstance(node, documented) and ast.get_docstring(node)]
    prose = {i for text in texts for i in range(text.lineno, text.end_lineno + 1)}
    code, said = [], []
    for i, line in enumerate(map(str.strip, source.splitlines()), start=1):
        if len(line) >= SHORTEST and not line.startswith("#"):
            (said if i in prose else code).append(line)
    count = min(len(code), len(said))
    return code[:count], said[:count]
