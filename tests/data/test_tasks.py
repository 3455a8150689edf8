"""Tasks: what an example is, where it comes from, and what is wrong with one that isn't."""

import json

import numpy as np
import pytest

from ecmoe.data import tasks
from ecmoe.files import ConfigError
from ecmoe.paths import with_content


def write(folder, name, rows):
    (folder / name).mkdir(exist_ok=True)
    for split in ("train", "validation"):
        (folder / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_papers_tasks_are_eleven():
    papers = {name: task for name, task in tasks.TASKS.items() if task.hub}
    assert len(papers) == 11 and {*tasks.TASKS} - {*papers} == {"lines"}
    assert all(task.classes == 2 + (name in ("cb", "mnli")) for name, task in tasks.TASKS.items())


def test_columns_are_those_of_the_hub():
    """What is asked comes last. https://huggingface.co/datasets/nyu-mll/glue and aps/super_glue."""
    columns = {"boolq": "passage question", "cola": "sentence", "qnli": "sentence question", "qqp": "question1 question2",
               "sst2": "sentence", "wic": "sentence1 sentence2 word", "lines": "line"}  # fmt: skip
    columns |= dict.fromkeys(("cb", "mnli"), "premise hypothesis")
    columns |= dict.fromkeys(("mrpc", "rte", "wnli"), "sentence1 sentence2")
    assert {name: " ".join(task.columns) for name, task in tasks.TASKS.items()} == columns
    hubs = {name: "aps/super_glue" if name in ("boolq", "cb", "wic") else "nyu-mll/glue" for name in columns} | {
        "lines": ""
    }
    assert {name: task.hub for name, task in tasks.TASKS.items()} == hubs
    assert {name: task.validation for name, task in tasks.TASKS.items() if task.validation != "validation"} == {
        "mnli": "validation_matched"
    }


def test_a_local_copy_is_read_in_the_order_in_which_a_model_reads(tmp_path):
    write(
        tmp_path,
        "boolq",
        [
            {"question": "is it", "passage": "It is.", "label": 1, "idx": 0},
            {"question": "was it", "passage": "No.", "label": 0, "idx": 1},
        ],
    )
    (tmp_path / "boolq" / "validation.jsonl").write_text('{"question": "why", "passage": "So.", "label": 1}')
    train, validation = tasks.load("boolq", tmp_path)
    assert train.texts == [("It is.", "is it"), ("No.", "was it")] and validation.texts == [("So.", "why")]
    assert train.labels.tolist() == [1, 0] and train.labels.dtype == np.int64 and train.texts[0] == ("It is.", "is it")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"premise": "a", "label": 1}, "the fields premise, label, but must have a string 'hypothesis'"),
        ({"premise": "a", "hypothesis": None, "label": 1}, "must have a string 'hypothesis'; it holds None"),
        ({"premise": "\ud83d", "hypothesis": "b", "label": 1}, "'premise' has half a character"),
        *(
            ({"premise": "a", "hypothesis": "b", "label": label}, f"label {label!r} must be 0 to 2, a whole number")
            for label in (-1, "not", None, 0.7, 3, True)
        ),
    ],
)
def test_an_example_that_cannot_be_is_named_with_its_file_and_line(tmp_path, row, said):
    write(tmp_path, "cb", [{"premise": "a", "hypothesis": "b", "label": 0}, row])
    with pytest.raises(ConfigError, match="task 'cb': .*cb/train.jsonl, line 2.*" + said):
        tasks.load("cb", tmp_path)


def test_a_hypothesis_is_read_after_its_premise(tmp_path):
    write(tmp_path, "cb", [{"hypothesis": "b", "premise": "a", "label": 2}])
    assert tasks.load("cb", tmp_path)[1].texts == [("a", "b")]


def test_texts_stay_what_they_are(tmp_path):
    write(
        tmp_path,
        "sst2",
        [{"sentence": "2020-01-01", "label": 0, "idx": 3}, {"sentence": "1.0", "label": 1, "idx": "x"}],
    )
    assert tasks.load("sst2", tmp_path)[0].texts == [("2020-01-01",), ("1.0",)]
    (tmp_path / "sst2" / "train.jsonl").write_text("")
    with pytest.raises(ConfigError, match="task 'sst2': has no training examples"):
        tasks.load("sst2", tmp_path)


def test_files_hold_what_is_stated(tmp_path):
    write(tmp_path, "sst2", [{"sentence": "a", "label": 0}])
    stated = with_content(str(tmp_path))
    assert tasks.load("sst2", stated)[0].texts == [("a",)]
    write(tmp_path, "sst2", [{"sentence": "b", "label": 0}])
    assert with_content(str(tmp_path)) != stated
    with pytest.raises(ConfigError, match=", not what is stated"):
        tasks.load("sst2", stated)


def test_a_folder_is_looked_for_as_data_are_and_remembered(tmp_path, monkeypatch):
    (tmp_path / "copies").mkdir()
    write(tmp_path / "copies", "sst2", [{"sentence": "a", "label": 0}])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("ECMOE_HOME", str(tmp_path))
    assert tasks.load("sst2", "copies")[1].texts == [("a",)]
    stated = with_content("copies")
    (tmp_path / "copies").rename(tmp_path / "gone")
    assert with_content("copies") == stated != "copies"


def test_a_task_that_is_nowhere_says_where_it_could_be(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: (_ for _ in ()).throw(ConnectionError("no network")))
    with pytest.raises(ConfigError, match="task 'rte': .*no network.*rte/train.jsonl and validation.jsonl must exist"):
        tasks.load("rte", tmp_path)
    with pytest.raises(ConfigError, match="the Hub must be reachable, or a folder of local copies must exist"):
        tasks.load("rte")
    with pytest.raises(ConfigError, match="task 'sst': did you mean sst2"):
        tasks.load("sst")


def test_the_hub_has_its_own_names(monkeypatch):
    asked = []
    row = {"premise": "a", "hypothesis": "b", "label": 2}
    sets = {"train": [row] * 3, "validation_matched": [row] * 2}
    monkeypatch.setattr("datasets.load_dataset", lambda *names: asked.append(names) or sets)
    train, validation = tasks.load("mnli")
    assert asked == [("nyu-mll/glue", "mnli")] and (len(train.labels), len(validation.labels)) == (3, 2)


def test_a_task_that_is_in_no_folder_comes_from_the_hub(tmp_path, monkeypatch):
    asked, write_one = [], lambda text, label: {"question": text, "passage": f"{text} it is", "label": label}
    write(tmp_path, "sst2", [{"sentence": "a", "label": 0}])
    sets = {"test": [], "validation": [write_one("c", 1)], "train": [write_one("b", 1), write_one("a", 0)]}
    monkeypatch.setattr("datasets.load_dataset", lambda *names: asked.append(names) or sets)
    train, validation = tasks.load("boolq", tmp_path)
    assert asked == [("aps/super_glue", "boolq")] and validation.texts == [("c it is", "c")]
    assert train.texts == [("b it is", "b"), ("a it is", "a")] and train.labels.tolist() == [1, 0]
    sets["validation"].append(write_one("d", 2))
    with pytest.raises(ConfigError, match="^task 'boolq': validation 2: label 2 must be 0 to 1"):
        tasks.load("boolq", tmp_path)


def test_our_own_task_has_code_and_prose_in_halves():
    train, validation = tasks.load("lines")
    assert (len(train.labels), len(validation.labels)) == (1000, 500)
    assert abs(train.labels.mean() - 0.5) < 0.05 and abs(validation.labels.mean() - 0.5) < 0.05
    starts = ("import ", "from ", "def ", "class ", "if ", "return ")
    code = [label for (text,), label in zip(*train, strict=True) if text.startswith(starts)]
    assert len(code) > 100 and np.mean(code) < 0.2
    assert tasks.load("lines", "nowhere")[0].texts == train.texts
