"""Classification tasks to fine-tune on: the paper's eleven, of GLUE and SuperGLUE, and one that every machine has.

An example is some texts, in the order in which a model reads them, and a label. The eleven come from the Hub, or from a
folder with TASK/train.jsonl and TASK/validation.jsonl in the Hub's columns. The task of our own, `lines`, is made of the
standard library: is a line code, or prose of a docstring?
"""

from __future__ import annotations

import ast
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ecmoe import paths
from ecmoe.data.corpus import Rows, checked_rows, from_hub, json_rows, part_files
from ecmoe.files import ConfigError, nearest
from ecmoe.paths import check_content, plain, remember_content, with_content

_GLUE, _SUPERGLUE = "nyu-mll/glue", "aps/super_glue"  # of the Hub


class Task(NamedTuple):
    """Where a task comes from."""

    hub: str  # a data set whose config is the task's name
    columns: tuple[str, ...]  # of text, in reading order; what is asked comes last
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
    """Training and validation examples of one of `TASKS`, or of "lines", in their source's order.

    folder: with local copies, perhaps with their content, PATH#SHA256; a task that isn't there comes from the Hub.
    """
    if name == OWN:
        return _lines()
    if name not in TASKS:
        raise ConfigError(f"task {name!r}: {nearest(name, [*TASKS, OWN])}")
    task, what, there = TASKS[name], f"task {name!r}", "a folder of local copies"
    if folder:
        check_content(str(folder))
        remember_content(with_content(str(folder)))
        local = paths.resolve(plain(str(folder))) / name
        if local.is_dir():
            sides = (json_rows(what, local / f"{side}.jsonl", task.columns) for side in ("train", "validation"))
            return tuple(_examples(name, rows) for rows in sides)
        there = f"{local}/train.jsonl and validation.jsonl"
    sets = from_hub(what, f"the Hub must be reachable, or {there} be there", task.hub, name)
    sides = (checked_rows(f"{what}: {side}", sets[side], task.columns) for side in ("train", task.validation))
    return tuple(_examples(name, rows) for rows in sides)


def classes(name: str) -> int:
    """How many labels a task has."""
    return 2 if name == OWN else TASKS[name].classes


def _examples(name: str, rows: Rows) -> Examples:
    texts, labels = [], []
    for where, row in rows:
        label = row.get("label")
        if type(label) is not int or not 0 <= label < classes(name):
            raise ConfigError(f"{where}: label {label!r} must be 0 to {classes(name) - 1}, a whole number")
        texts.append(tuple(row[column] for column in TASKS[name].columns))
        labels.append(label)
    if not labels:
        raise ConfigError(f"task {name!r}: has no examples to train on, or none to validate on")
    return Examples(texts, np.array(labels, np.int64))


@lru_cache
def _lines() -> tuple[Examples, Examples]:
    sources = (path.read_text(encoding="utf-8", errors="replace") for path in part_files("stdlib").values())
    modules = [_code_and_prose(source) for source in sources]
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
    prose, nodes, documented = set(), [tree], (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in nodes:  # no definition lies within an expression
        nodes += [child for child in ast.iter_child_nodes(node) if not isinstance(child, ast.expr)]
        if isinstance(node, documented) and ast.get_docstring(node, clean=False):
            prose |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    code, said = [], []
    for i, line in enumerate(map(str.strip, source.splitlines()), start=1):
        if len(line) >= SHORTEST and not line.startswith("#"):
            (said if i in prose else code).append(line)
    count = min(len(code), len(said))
    return code[:count], said[:count]
