"""Tasks: what an example is, where it comes from, and what is wrong with one that isn't."""

import json

import numpy as np
import pytest

from ecmoe.config import ConfigError
from ecmoe.data import tasks


def write(folder, name, rows):
    (folder / name).mkdir(exist_ok=True)
    for split in ("train", "validation"):
        (folder / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_papers_tasks_are_eleven():
    assert len(tasks.TASKS) == 11 and all(
        task.classes == 2 + (name in ("cb", "mnli")) for name, task in tasks.TASKS.items()
    )


def test_a_local_copy_is_read_in_the_order_in_which_a_model_reads(tmp_path):
    write(
        tmp_path,
        "boolq",
        [
            {"question": "is it", "passage": "It is.", "label": 1, "idx": 0},
            {"question": "was it", "passage": "No.", "label": 0, "idx": 1},
        ],
    )
    train, validation = tasks.load("boolq", tmp_path)
    assert train.texts == [("It is.", "is it"), ("No.", "was it")] == validation.texts
    assert train.labels.tolist() == [1, 0] and train.first(1).texts == [("It is.", "is it")]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (
            [{"premise": "a", "label": 1}],
            "task 'cb': its train examples have no column 'hypothesis'; they have premise, label",
        ),
        (
            [{"premise": "a", "hypothesis": "b", "label": -1}],
            "task 'cb': label -1 among its train examples; must be 0 to 2, a whole number",
        ),
        *(
            ([{"premise": "a", "hypothesis": "b", "label": label}], f"task 'cb': label {label!r} among its train")
            for label in ("not", None, 0.7, 3)
        ),
    ],
)
def test_examples_that_cannot_be(tmp_path, rows, said):
    write(tmp_path, "cb", rows)
    with pytest.raises(ConfigError, match=said):
        tasks.load("cb", tmp_path)


def test_a_task_that_is_nowhere_says_where_it_could_be(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: (_ for _ in ()).throw(ConnectionError("no network")))
    with pytest.raises(ConfigError, match="task 'rte': .*no network.*rte/train.jsonl and validation.jsonl be there"):
        tasks.load("rte", tmp_path)
    with pytest.raises(ConfigError, match="task 'sst': did you mean sst2"):
        tasks.load("sst")


def test_lines_of_the_library_are_told_apart_and_no_module_is_on_both_sides():
    code, prose = tasks._code_and_prose(
        '''"""A module of some length, in prose."""\nimport something_long_enough\n# a comment that is no code at all\nshort = 1\n'''
    )
    assert code == ["import something_long_enough"] and prose == ['"""A module of some length, in prose."""']
    assert tasks._code_and_prose("def (") == ([], [])
    train, validation = tasks.load("lines")
    assert (
        len(train.labels) > 3 * len(validation.labels) > 1000 and train.labels.mean() == validation.labels.mean() == 0.5
    )
    again, _ = tasks.load("lines")
    assert again.texts == train.texts and np.array_equal(again.labels, train.labels)
