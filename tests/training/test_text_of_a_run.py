"""A run is of a text, whatever that is called and wherever it lies; another is never taken for it."""

import math
import shutil
from types import SimpleNamespace

import pytest
import torch

from ecmoe import run_or_load
from ecmoe.config import ConfigError
from ecmoe.data import tokens
from ecmoe.data.batches import TextData
from ecmoe.data.tokenizer import Bytes
from ecmoe.files import read_json, write_json
from ecmoe.training import continuation
from ecmoe.training import run as train
from ecmoe.training.continuation import continue_text
from ecmoe.training.result import write_run


def test_record_of_other_text_warns(tiny_config, tmp_path):
    config = tiny_config(seed=14)
    run_or_load(config, records=tmp_path, progress=False)
    path = tmp_path / f"{config.name}.json"
    record = read_json(path, sealed=True)
    record["summary"]["data"]["source_sha256"] = "0" * 64
    write_json(path, record, sealed=True)
    said = "data='stdlib' differs from the data that .* was trained on"
    with pytest.warns(UserWarning, match=said) as told:
        run_or_load(config, records=tmp_path)
    assert told[0].filename == __file__  # of who asked


def test_a_run_of_a_text_that_is_no_file_of_ones_own_warns_and_one_that_says_nothing_of_its_text_does_not(
    tiny_config, monkeypatch, recwarn
):
    config = tiny_config(seed=93, steps=2, eval_every=2)
    result = run_or_load(config, progress=False)
    monkeypatch.setattr(train, "source_sha256", lambda data: "of another Python")
    with pytest.warns(UserWarning, match="differs from the data"):
        assert run_or_load(config).ok
    said = {key: value for key, value in result.summary["data"].items() if key != "source_sha256"}
    write_run(result.path, result.summary | {"data": said})
    recwarn.clear()
    assert run_or_load(config).ok and not recwarn.list


@pytest.fixture
def texts(tmp_path):
    """Two texts, called alike."""
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "text.txt").write_text(f"The {name} of it, again and again, and not the end.\n" * 6000)
    return tmp_path


def test_another_text_of_the_same_name_is_not_taken_for_the_first(tiny_config, texts):
    a, b = (tiny_config(seed=31, data=str(texts / name / "text.txt")) for name in "ab")
    assert a.name != b.name
    trained = run_or_load(a, records=texts, progress=False)
    assert run_or_load(b, train=False).summary["status"] == "not run"
    shutil.copy(texts / "a" / "text.txt", texts / "b" / "text.txt")
    b = b.replace(data=str(texts / "b" / "text.txt"))
    assert a.name == b.name  # a copy elsewhere is the same run
    assert run_or_load(b).summary["val_loss"] == trained.summary["val_loss"]
    (texts / "b" / "text.txt").unlink()
    assert run_or_load(b, train=False).ok  # what isn't here is no other one
    (texts / "b" / "text.txt").write_text("The end.")
    with pytest.warns(UserWarning, match="differs from the data"):  # a record says what it was trained on
        assert run_or_load(b, records=texts).ok
    for call in ({}, {"train": False}):
        with pytest.raises(ConfigError, match="differs from the data .* restore the files, or leave out #"):
            run_or_load(b, **call)


def test_a_text_is_continued_in_the_vocabulary_of_the_run(tiny_config, texts):
    path = texts / "a" / "text.txt"
    config = tiny_config(seed=35, data=str(path), tokenizer="bpe", vocab_size=270, steps=2)
    result = run_or_load(config, progress=False)
    data = TextData(config)
    data.setup()
    bits = result.summary["val_loss"] / math.log(2)
    assert data.bytes_per_token > 1.5 and result.summary["bits_per_byte"] == pytest.approx(bits / data.bytes_per_token)
    assert continue_text(result.path, "The a", 2, temperature=0).startswith("The a")
    path.write_text(path.read_text().upper())
    assert continue_text(result.path, "The a", 2, temperature=0).startswith("The a")  # its tokens are kept
    shutil.rmtree(tokens.folder(config))
    with pytest.raises(ConfigError, match="not what is stated: restore the files"):
        continue_text(result.path, "The a", 2)


def test_bytes_continue_whatever_the_text_has_become(tiny_config, texts, monkeypatch):
    path = texts / "a" / "text.txt"
    result = run_or_load(tiny_config(seed=36, data=str(path), steps=2), progress=False)
    write_run(result.path, result.summary | {"data": result.summary["data"] | {"digest": "of another text"}})
    assert continue_text(result.path, "The a", 2, temperature=0).startswith("The a")
    assert len(continue_text(result.path, "T", 2, temperature=0).encode()) >= 3
    told = []

    def generate(model, ids, tokens, **sampling):
        told.append((bytes(ids[0].tolist()), tokens, sampling))
        return torch.tensor([[*ids[0], ord("!")]])

    monkeypatch.setattr("ecmoe.training.continuation.generate", generate)
    sampling = {"temperature": 0.5, "top_k": 3, "seed": 7}
    assert continue_text(result.path, "The a", 2, **sampling) == "The a!" and told == [(b"The a", 2, sampling)]


@pytest.mark.parametrize(
    ("keys", "prompt", "said"),
    [
        ({"router": "task_level"}, "a", "only a language model whose .* has data='stdlib' and router='task_level'"),
        ({"data": "digits"}, "a", "only a language model whose .* has data='digits' and router='expert_choice'"),
        ({"tokenizer": "bpe", "vocab_size": 300}, "a", "data='stdlib' differs from the text that NAME was"),
        ({}, "", "prompt='': must have at least one token, to be continued"),
        ({"router": "hash"}, "a", None),
    ],
)
def test_what_cannot_be_continued_is_named(tiny_config, monkeypatch, tmp_path, keys, prompt, said):
    config = tiny_config(**keys)
    loaded = SimpleNamespace(meta={"digest": "here"}, tokenizer=Bytes())
    for data in ({"digest": "there"}, None):
        fakes = {"read_run": SimpleNamespace(summary={"data": data}), "load_tokens": loaded,
                 "load_model": SimpleNamespace(config=config), "generate": torch.tensor([[97, 98]])}  # fmt: skip
        for name, fake in fakes.items():
            monkeypatch.setattr(continuation, name, lambda *given, fake=fake, **keys: fake)
        if said is None:
            assert continuation.continue_text(tmp_path, prompt, 1) == "ab"
            continue
        with pytest.raises(ValueError, match=said.replace("NAME", config.name)):
            continuation.continue_text(tmp_path, prompt, 1)


def test_a_run_goes_on_with_the_text_that_it_began_with(tiny_config, texts, monkeypatch):
    path = texts / "a" / "text.txt"
    config, text = tiny_config(seed=32, data=str(path), checkpoint_every=2), path.read_text()
    with monkeypatch.context() as broken:
        broken.setattr(train, "_whole_state", lambda module: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_or_load(config, progress=False)
    path.write_text(text.upper())
    assert tiny_config(seed=32, data=str(path), checkpoint_every=2).name != config.name
    shutil.rmtree(tokens.folder(config))
    with pytest.raises(ConfigError, match="not what is stated: restore the files"):
        run_or_load(config, progress=False)
    path.write_text(text)
    assert run_or_load(config, progress=False).ok
