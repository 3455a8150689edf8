"""A mix: as much of each text by tokens, one tokenizer, and batches of all of them."""

import numpy as np
import pytest
import torch

from ecmoe.config import ConfigError, RunConfig
from ecmoe.data import tokens
from ecmoe.data.batches import TextData
from ecmoe.data.corpus import described, source_key, source_sha256
from ecmoe.data.tokenizer import END
from ecmoe.files import content_sha256

T = 16
LETTERS = "ABC"
FILES = ("m.txt", "z.txt", "c.txt")  # a mix has its own order


@pytest.fixture
def mix(tmp_path):
    """Texts that hold one letter, the second the shortest, the last the longest: every token tells whose it is."""
    paths = [tmp_path / name for name in FILES]
    for path, letter, times in zip(paths, LETTERS, (2, 1, 4), strict=True):
        path.write_text(f"{letter * 30}\n\n" * 3000 * times)
    (tmp_path / "m.txt.about.yaml").write_text("{name: All A, licence: CC0}")
    return "mix:" + ",".join(map(str, paths))


def config(data, **keys) -> RunConfig:
    return RunConfig.from_dict({"data": data, "sequence_length": T, "batch_size": 6, "eval_batches": 5} | keys)


def opened(config) -> TextData:
    data = TextData(config)
    data.prepare_data()
    data.setup()
    return data


def shares(windows) -> list[int]:
    """How many windows are of each letter; a window of two would be in none."""
    text = [set(bytes(row).decode()) & set(LETTERS) for row in np.asarray(windows, np.uint8)]
    return [text.count({letter}) for letter in LETTERS]


def test_as_much_of_each_and_no_window_of_two(mix):
    data = opened(config(mix))
    whole = tokens.load(data.config)
    for ids in (whole.train, whole.val):
        parts = np.split(ids, 3)  # in equal parts, each of one letter
        assert [set(bytes(part).decode()) & set(LETTERS) for part in parts] == [{x} for x in LETTERS]
    shortest = 3000 * 32
    assert len(whole.train) + len(whole.val) == pytest.approx(3 * shortest, rel=0.1)
    assert shares(data.train[0]) == [len(data.train[0]) // 3] * 3
    assert len(data.train[0]) > 0.95 * len(whole.train) / (T + 1)


def test_every_batch_sees_all_parts(mix):
    data = opened(config(mix))
    for batch in data.val_batches():
        assert shares(batch) == [2, 2, 2]
    assert (
        np.sum([shares(batch) for batch in opened(config(mix, eval_batches=100)).val_batches()], axis=0).tolist()
        == [200] * 3
    )
    (uneven,) = opened(config(mix, batch_size=7, eval_batches=1)).val_batches()
    assert shares(uneven) == [3, 2, 2]
    steps = [shares(batch) for _, batch in zip(range(200), data.train_dataloader(), strict=False)]
    assert (
        sum(min(step) > 0 for step in steps) > 100
    )  # of 200: six windows drawn from three parts miss one 28% of the time
    assert np.sum(steps, axis=0) == pytest.approx(np.full(3, 400), rel=0.15)


def test_counts_bytes_and_provenance_are_those_of_what_is_used(mix):
    data = opened(config(mix))
    said = data.provenance
    assert data.token_counts.sum() == said["train_tokens"] == said["train_bytes"]
    assert said["train_documents"] == (tokens.load(data.config).train == 0).sum()
    each = [data.token_counts[ord(letter)] for letter in LETTERS]
    assert min(each) > 0.98 * max(each)
    assert said["name"] == "33% All A + 33% z.txt + 33% c.txt"
    assert said["licence"] == "All A: CC0; z.txt: not stated; c.txt: not stated"
    assert said["attribution"] == "All A: not stated; z.txt: not stated; c.txt: not stated"
    assert [part["share"] for part in said["parts"]] == [1 / 3] * 3
    assert [part["data"] for part in said["parts"]] == mix.removeprefix("mix:").split(",")
    two = described(mix.rpartition(",")[0], said["parts"][:2])
    assert two["name"] == "50% All A + 50% z.txt" and two["split"].startswith("All A: ") and len(two["parts"]) == 2


def test_one_tokenizer_learns_from_all_alike(mix):
    """Of the same number of bytes, runs of each letter are as frequent: each gets as many merges, but for ties."""
    data = opened(config(mix, tokenizer="bpe", vocab_size=270))
    words = [data.tokenizer.decode([i]) for i in range(257, 270)]
    longest = [max(len(word) for word in words if set(word) <= {letter}) for letter in LETTERS]
    assert longest == [longest[0]] * 3 or max(longest) <= 2 * min(longest)
    assert [set(data.tokenizer.decode(row)) & set(LETTERS) for row in np.split(tokens.load(data.config).val, 3)] == [
        {letter} for letter in LETTERS
    ]
    assert data.bytes_per_token > 2


@pytest.mark.parametrize(("size", "most"), [(240_000, 80_000), (10**9, 3000 * 32 * 0.96)])  # a third, or the shortest
def test_the_tokenizer_reads_as_much_of_each(mix, monkeypatch, tmp_path, size, most):
    monkeypatch.setenv("ECMOE_HOME", str(tmp_path))
    read, train = [], tokens.train_bpe
    monkeypatch.setattr(tokens, "BPE_BYTES", size)
    monkeypatch.setattr(tokens, "train_bpe", lambda texts, *a: train(read.extend(texts) or read, *a))
    tokens.load(config(mix, tokenizer="bpe", vocab_size=265))
    each = [sum(len(text) for text in read if letter in text) for letter in LETTERS]
    assert min(each) > 60_000 and max(each) <= most and max(each) - min(each) < 17_000  # but for a document
    assert not any(END in text for text in read)


def test_max_bytes_are_shared_out(mix):
    whole = tokens.load(config(mix, max_bytes=240_000))
    assert len(whole.train) + len(whole.val) == pytest.approx(240_000, rel=0.01)
    assert [set(bytes(part).decode()) & set(LETTERS) for part in np.split(whole.train, 3)] == [{x} for x in LETTERS]
    with pytest.raises(ConfigError, match="too few to split"):
        tokens.load(config(mix, max_bytes=2))  # less than a byte each, which is not all


def test_classes_are_those_of_the_text_before(mix):
    data = opened(config(mix, router="task_level", num_tasks=3))
    of = np.split(data.train[1], 3)
    inside = [np.unique(part[1:]) for part in of]  # the first of a part has nothing before it
    assert [len(kinds) for kinds in inside] == [1, 1, 1] and len(np.unique(inside)) == 3
    assert [part[0] for part in of] == [0, 0, 0]
    for windows, tasks in data.val_batches():
        for letter, kind in zip(LETTERS, inside, strict=True):
            mine = torch.tensor([ord(letter) in row for row in windows.tolist()])
            assert set(tasks[mine].tolist()) <= {0, int(kind[0])}


def test_order_of_parts_and_content_make_another_mix(mix, tmp_path):
    first = opened(config(mix)).digest
    a, b, c = mix.removeprefix("mix:").split(",")
    assert opened(config(f"mix:{b},{a},{c}")).digest != first
    (tmp_path / "z.txt").write_text("B" * 30_000 + "\n\nb" * 20_000)
    assert opened(config(mix)).digest != first
    assert config(mix).name != config(f"mix:{a},{b}").name


def test_parts_whose_files_have_the_same_names_are_told_apart(tmp_path):
    found, data = set(), "mix:" + ",".join(str(tmp_path / place / "a.txt") for place in LETTERS[:2])
    for texts in ("xx", "xy", "yx"):
        for place, text in zip(LETTERS, texts, strict=False):
            (tmp_path / place).mkdir(exist_ok=True)
            (tmp_path / place / "a.txt").write_text(text)
        found.add((source_sha256(data), source_key(data)))
    assert len({sha256 for sha256, _ in found}) == len({key for _, key in found}) == 3


def test_the_source_of_a_mix_is_its_files_by_the_number_of_their_text(tmp_path):
    for name in "ba":
        (tmp_path / f"{name}.txt").write_text(f"text of {name}")
    files = {f"{i}:{name}.txt": tmp_path / f"{name}.txt" for i, name in ((1, "b"), (2, "a"))}
    data = f"mix:c4,{files['1:b.txt']},{files['2:a.txt']}"
    assert source_sha256(data) == content_sha256(files) and source_sha256("mix:c4,enwik8") is None
    parts = [content_sha256({f"{name}.txt": tmp_path / f"{name}.txt"}) for name in "ba"]
    assert source_key(data) == ",".join(["c4", *parts])


def test_what_is_stated_of_files_tells_no_data_sets_of_the_hub_apart():
    stated = [source_key(f"mix:{hub},gone.txt#0123456789abcdef") for hub in ("c4", "wikitext-103")]
    assert stated == ["c4,#0123456789abcdef", "wikitext-103,#0123456789abcdef"]  # nothing need be here


def test_a_part_that_is_nowhere_is_named(mix):
    with pytest.raises(ConfigError, match="data='/nowhere/x.txt'.*no such file"):
        opened(config(f"{mix},/nowhere/x.txt"))
