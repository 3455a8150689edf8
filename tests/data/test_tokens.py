import errno
import hashlib
import io
import json
import lzma
import os
import re
import shutil
import subprocess
import sys
import textwrap

import datasets
import filelock
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ecmoe import paths
from ecmoe.config import RunConfig
from ecmoe.data import tokens
from ecmoe.data.corpus import Corpus
from ecmoe.data.tokenizer import END
from ecmoe.data.tokens import SplitText, load, split
from ecmoe.files import ConfigError

PARAGRAPHS = [f"Paragraph {i}: the cat sat on mat number {i * i % 97}; grüße, Welt!\n\n" for i in range(6000)]


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("".join(PARAGRAPHS), encoding="utf-8")
    return path


@pytest.fixture
def make(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "cache", lambda: tmp_path / "cache")
    return lambda data, **keys: load(config(data, **keys))


def config(data, **keys) -> RunConfig:
    return RunConfig.from_dict({"data": str(data)} | keys)


@pytest.mark.parametrize("keys", [{}, {"tokenizer": "bpe", "vocab_size": 400}])
def test_tokens_are_the_text(book, make, keys):
    found = make(book, **keys)
    train, val = (found.tokenizer.decode(ids) for ids in (found.train, found.val))
    assert (train + val).replace(END, "") == "".join(PARAGRAPHS)  # a single book: its end is validation
    assert train.endswith("\n\n" + END) and val.endswith(END)
    meta = found.meta
    assert meta["train_tokens"] == len(found.train) and meta["val_tokens"] == len(found.val)
    assert meta["train_bytes"] == len(train.encode()) and meta["val_bytes"] == len(val.encode())
    assert meta["val_documents"] == val.count(END) and meta["train_documents"] == train.count(END)
    assert found.train.dtype == (np.uint16 if keys else np.uint8) and isinstance(found.train, np.memmap)
    whole = train + val  # with the end of each document
    said = {
        "name": "book.txt",
        "licence": "not stated",
        "attribution": "not stated",
        "split": "the last 5% of the text",
    }
    assert meta["parts"] == [said | {"bytes": len(whole.encode()), "documents": whole.count(END)}]
    assert len(meta["source_sha256"]) == 64


def test_257_tokens_are_more_than_a_byte_tells_apart(book, make):
    found = make(book, tokenizer="bpe", vocab_size=257, max_bytes=40_000)
    assert found.train.dtype == np.uint16  # 256 bytes and the end of a document


def test_bpe_learns_nothing_from_what_validates(monkeypatch, make):
    letters = np.random.default_rng(0).choice(list("abcdefgh"), (100, 400))
    sets = {
        "train": ["".join(row) for row in letters],
        "validation": ["zq" * 200] * 100,
    }  # no pair is as frequent as this one
    fake = datasets.DatasetDict({k: datasets.Dataset.from_dict({"text": v}) for k, v in sets.items()})
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: fake)
    found = make("hub:a/b", tokenizer="bpe", vocab_size=270)
    assert set("".join(found.tokenizer.decode([i]) for i in range(257, 270))) <= set("abcdefgh")
    assert found.tokenizer.decode(found.val) == f"{'zq' * 200}{END}" * 100


def test_bpe_learns_from_all_over_a_large_text(tmp_path, make, monkeypatch):
    monkeypatch.setattr(tokens, "BPE_BYTES", 100_000)
    (tmp_path / "book.txt").write_text("".join(f"{letter * 2}\n\n" * 25_000 for letter in "abcde"))
    found = make(tmp_path / "book.txt", tokenizer="bpe", vocab_size=262)
    learned = "".join(found.tokenizer.decode([i]) for i in range(257, 262))
    assert set("abcd") <= set(learned)  # of the first 100,000 bytes only a


def test_of_a_text_of_large_documents_one_is_learned_from():
    text = SplitText(io.BytesIO(), np.array([500, 300, 400]), np.array([False, True, False]), "")
    assert text.some(10) in ([0], [2]) and text.some(899).size == 1 and text.some(900).tolist() == [0, 2]


def test_a_vocabulary_is_learned_from_the_same_documents_for_ever():
    text = SplitText(io.BytesIO(), np.full(50, 10), np.arange(50) % 5 == 0, "")
    order = np.random.default_rng(0).permutation([i for i in range(50) if i % 5])
    np.testing.assert_array_equal(text.some(109), sorted(order[:10]))


def test_units_that_fill_just_half_of_the_share_are_too_few():
    for size, whole in ((10, False), (11, True)):  # of 20 bytes, 5% of 400
        is_val, rule = split(np.array([1, 2], np.uint64), np.array([size, 400 - size]))
        assert is_val.tolist() == [whole, not whole] and ("whole files" in rule) == whole


def test_a_share_is_full_where_less_than_a_fiftieth_of_it_is_left():
    for size, full in ((490, False), (491, True)):  # of 500 bytes, 5% of 10,000
        is_val, _ = split(np.array([1, 2, 3], np.uint64), np.array([size, 5, 9995 - size]))
        assert is_val.tolist() == [True, not full, False]


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 1000)), min_size=2, max_size=60))
@example([(0, 10)] * 100)  # a book of many paragraphs
@example([(0, 1000), (1, 20)])  # and a leaflet
def test_split_keeps_units_whole_and_is_small(documents):
    hashes = np.array([u * 0x9E3779B97F4A7C15 % 2**64 for u, _ in documents], np.uint64)
    lengths = np.array([n for _, n in documents])
    is_val, rule = split(hashes, lengths)
    assert is_val.any() and not is_val.all()
    assert (split(hashes, lengths)[0] == is_val).all()
    share = lengths[is_val].sum() / lengths.sum()
    if "last" in rule:  # large units only
        first = is_val.argmax()
        assert is_val[first:].all() and not is_val[:first].any()
        most = 0.05 * lengths.sum()  # as many as fit, at least one
        assert lengths[first - 1 :].sum() > most and (lengths[first:].sum() <= most or first == len(lengths) - 1)
    else:
        assert 0.025 < share <= 0.05 and not set(hashes[is_val]) & set(hashes[~is_val])


def test_tokens_are_counted_over_all_chunks():
    assert tokens.counts(np.array([3, 0, 3, 1, 3, 0, 1], np.uint16), 5, chunk=3).tolist() == [2, 2, 0, 3, 0]


def test_split_does_not_depend_on_the_order():
    rng = np.random.default_rng(0)
    hashes, lengths = rng.integers(0, 2**63, 500).astype(np.uint64), rng.integers(1, 50, 500)
    order = rng.permutation(500)
    is_val, _ = split(hashes, lengths)
    assert (split(hashes[order], lengths[order])[0] == is_val[order]).all()
    assert 0.045 < lengths[is_val].sum() / lengths.sum() <= 0.05


def test_standard_library_is_split_by_file(make):
    found = make("stdlib", max_bytes=2_000_000)
    sides = [set(found.tokenizer.decode(ids).split(END)) - {""} for ids in (found.train, found.val)]
    assert sides[0] and sides[1] and not sides[0] & sides[1]
    assert 0.03 < found.meta["val_bytes"] / (found.meta["train_bytes"] + found.meta["val_bytes"]) <= 0.05


@pytest.mark.parametrize("limit", [90_000, 90_001])
def test_max_bytes_ends_between_characters(make, tmp_path, limit):
    (tmp_path / "x.txt").write_text("üüü\n\n" * 20_000, encoding="utf-8")
    found = make(tmp_path / "x.txt", max_bytes=limit)
    text = "".join(found.tokenizer.decode(ids) for ids in (found.train, found.val)).replace(END, "")
    assert limit - 1 <= len(text.encode()) <= limit and set(text) == {"ü", "\n"}


@pytest.mark.parametrize("limit, sizes", [(12, [11]), (14, [11]), (15, [11, 6]), (0, [11, 11])])
def test_no_document_is_cut_to_less_than_a_character_may_take(limit, sizes):
    corpus = Corpus("", "", "", [("a", "x" * 10), ("b", "y" * 10)])
    assert SplitText.read(corpus, io.BytesIO(), limit).lengths.tolist() == sizes


def test_of_a_sources_own_validation_a_part_is_read_however_small():
    corpus = Corpus("", "", "", [("a", "x" * 99)], [("b", "y" * 99)] * 2)
    assert SplitText.read(corpus, io.BytesIO(), 30).lengths.tolist() == [31, 3]  # 5% of 30 bytes, rounded up


def test_documents_of_one_unit_lie_on_one_side():
    units = [f"caf\udce9{i // 5}.txt" for i in range(500)]  # a file's name need be no UTF-8
    corpus = Corpus("", "", "", [(unit, f"text {i}") for i, unit in enumerate(units)])
    is_val = SplitText.read(corpus, io.BytesIO(), 0).is_val.reshape(100, 5)
    assert (is_val.all(1) == is_val.any(1)).all() and is_val.any() and tokens.BPE_BYTES == 50_000_000


def test_what_ends_a_document_is_in_none():
    text = SplitText.read(Corpus("", "", "", [("a", f"o{END}n{END}e"), ("b", END), ("c", "two")]), io.BytesIO(), 0)
    assert text.lengths.tolist() == [4, 4] and list(text.documents(np.arange(2), "")) == [f"one{END}", f"two{END}"]


def test_validation_of_the_source_is_used(monkeypatch, make):
    sets = {"train": ["train text"] * 30, "validation": ["validation text"]}
    fake = datasets.DatasetDict({k: datasets.Dataset.from_dict({"text": v}) for k, v in sets.items()})
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: fake)
    found = make("hub:a/b")
    assert found.tokenizer.decode(found.val) == f"validation text{END}"
    assert found.tokenizer.decode(found.train) == f"train text{END}" * 30
    assert found.meta["parts"][0]["split"] == "the source's own" and found.meta["source_sha256"] is None
    monkeypatch.setattr(datasets, "load_dataset", None)
    assert make("hub:a/b").meta == found.meta  # made once


def test_a_part_of_a_source_validates_on_as_large_a_share_as_ours(monkeypatch, make):
    sets = {side: [f"{side} {i:03}" for i in range(900)] for side in ("train", "validation")}
    fake = datasets.DatasetDict({k: datasets.Dataset.from_dict({"text": v}) for k, v in sets.items()})
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: fake)
    meta = make("hub:a/b", max_bytes=4000).meta
    sizes = [meta[f"{side}_bytes"] - meta[f"{side}_documents"] for side in ("train", "val")]  # without the end of each
    assert sizes == [pytest.approx(4000, abs=14), pytest.approx(200, abs=14)]


def test_a_part_of_a_hub_data_set_is_streamed(monkeypatch, make):
    asked = []

    def fake(*names, streaming):
        asked.append(streaming)
        return datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": [f"text {i}" for i in range(90)]}))

    monkeypatch.setattr(datasets, "load_dataset", fake)
    for keys in ({}, {"max_bytes": 500}, {"max_bytes": 400, "streaming": True}):
        make("c4", **keys)
    make("hub:a/b", streaming=True)
    assert asked == [False, True, True, True]


def test_made_once_and_again_when_the_text_changes(book, make, monkeypatch):
    first = make(book).meta
    book.touch()
    with monkeypatch.context() as patch:
        patch.setattr(tokens, "_make", lambda *a: pytest.fail("tokenised again"))
        assert make(book).meta["digest"] == first["digest"]
        copy = book.rename(book.with_name("copy.txt"))
        assert make(copy.rename(book)).meta["digest"] == first["digest"]
    book.write_text("".join(PARAGRAPHS[1:]), encoding="utf-8")
    assert make(book).meta["digest"] != first["digest"]


def test_text_of_the_same_size_and_time_is_another(tmp_path, make):
    path = tmp_path / "b.txt"
    for letter in "ab":
        path.write_text(f"{letter * 4}\n\n" * 30_000)
        os.utime(path, (0, 0))
        assert bytes(make(path).train[:4]).decode() == letter * 4


def test_text_that_changes_under_a_config_is_not_taken_for_its_own(book, make, monkeypatch):
    stated = config(book).data
    book.write_text("".join(PARAGRAPHS[1:]), encoding="utf-8")
    with (
        monkeypatch.context() as patch,
        pytest.raises(ConfigError, match=f"data='{stated}'.*not what is stated: restore the files, or leave out #"),
    ):
        patch.setattr(tokens, "_tokenise", lambda *a: pytest.fail("read"))
        make(stated)
    assert config(book).data != stated and make(book).meta["parts"]


def test_folder_is_known_by_what_its_files_hold(tmp_path, make):
    for place in ("here", "there"):
        for name in ("a.txt", "deep/b.txt"):
            (tmp_path / place / "texts" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / place / "texts" / name).write_text(f"{name}\n\n" * 20_000)
    here, there = (config(tmp_path / place / "texts", router="dense") for place in ("here", "there"))
    assert here.name == there.name and make(here.data).meta == make(there.data).meta
    (tmp_path / "there" / "texts" / "deep" / "b.txt").write_text("another\n\n" * 20_000)
    assert config(tmp_path / "there" / "texts", router="dense").name != here.name
    (tmp_path / "here" / "texts" / ".hidden.txt").touch()
    (tmp_path / "here" / "texts" / "notes.pdf").touch()
    assert config(tmp_path / "here" / "texts", router="dense").name == here.name


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "meta.json", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "lose"])
def test_damage_is_found_and_repaired(book, make, name, damage, tmp_path):
    keys = {"tokenizer": "bpe", "vocab_size": 300, "max_bytes": 20_000}
    place = tokens.folder(config(book, **keys))
    before = make(book, **keys)
    digest, ids, path = before.meta["digest"], before.train.copy(), place / name
    content = bytearray(path.read_bytes())
    if damage == "lose":
        path.unlink()
    else:
        content[len(content) // 2] ^= 0x55
        path.write_bytes(content[:-3] if damage == "cut" else content)
    after = make(book, **keys)
    assert after.meta["digest"] == digest and (after.train == ids).all()
    for file, said in after.meta["files"].items():
        assert hashlib.sha256((place / file).read_bytes()).hexdigest() == said["sha256"]


def test_cache_alone_is_enough(book, make, tmp_path, monkeypatch):
    before = make(book).meta["digest"]
    book.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(filelock, "FileLock", lambda path: pytest.fail("locked"))  # where nobody may write, it is read
        assert make(book).meta["digest"] == before
    place = tokens.folder(config(book))
    (place / "val.bin").write_bytes(b"short")
    told = f"data='{config(book).data}': the cache {place} can't be used: val.bin is missing or damaged; it can't be rebuilt: "
    with pytest.raises(ConfigError, match=f"^{re.escape(told)}.*no such file"):
        make(book)
    shutil.rmtree(place)
    with pytest.raises(ConfigError, match="no such file") as error:
        make(book)
    assert "rebuilt" not in str(error.value)
    assert not place.exists()


def test_compressed_source_gives_the_same_tokens(book, make, tmp_path):
    packed = tmp_path / "other.txt.xz"
    packed.write_bytes(lzma.compress(book.read_bytes()))
    assert make(packed).meta["digest"] == make(book).meta["digest"]


def test_too_small_to_split(make, tmp_path):
    (tmp_path / "tiny.txt").write_text("one line")
    with pytest.raises(ConfigError, match="data=.*1 documents of 9 bytes of tiny.txt are too few to split"):
        make(tmp_path / "tiny.txt")
    assert {path.suffix for path in (tmp_path / "cache").rglob("*") if path.is_file()} <= {".lock"}
    for content in ("", "\0" * 40_000):  # a NUL ends a document, so those of the text are removed
        (tmp_path / "none.txt").write_text(content)
        with pytest.raises(ConfigError, match="^data=.*: 0 documents of 0 bytes of none.txt are too few"):
            make(tmp_path / "none.txt")


@pytest.mark.parametrize("empty", ["train", "validation"])
def test_a_source_of_one_side_is_too_small(make, monkeypatch, empty):
    sets = {side: [] if side == empty else ["ten bytes."] * 30 for side in ("train", "validation")}
    columns = datasets.Features({"text": datasets.Value("string")})
    fake = {side: datasets.Dataset.from_dict({"text": texts}, features=columns) for side, texts in sets.items()}
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: fake)
    with pytest.raises(ConfigError, match="^data='hub:a/b': 30 documents of 330 bytes of a/b are too few to split"):
        make("hub:a/b")


def test_a_full_disk_says_where_and_leaves_nothing(book, make, monkeypatch, tmp_path):
    def full(*a):
        raise OSError(errno.ENOSPC, "No space left on device")

    with (
        monkeypatch.context() as patch,
        pytest.raises(OSError, match="No space left on device, for .*book.txt-bytes256.*free some"),
    ):
        patch.setattr(SplitText, "read", full)
        make(book)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".lock"]
    assert make(book).meta


def test_two_processes_tokenise_once(book, tmp_path):
    script = textwrap.dedent(f"""
        import time
        from ecmoe.data import tokens
        from ecmoe.config import RunConfig
        real = tokens._tokenise
        def counted(*a):
            print("made"); time.sleep(1)
            return real(*a)
        tokens._tokenise = counted
        print(tokens.load(RunConfig(data={str(book)!r})).meta["digest"])
    """)
    home = os.environ | {"ECMOE_HOME": str(tmp_path)}
    run = [sys.executable, "-c", script]
    started = [subprocess.Popen(run, stdout=subprocess.PIPE, text=True, env=home) for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0].split() for process in started]
    assert sorted(map(len, outputs)) == [1, 2]  # one made it, both have it
    assert outputs[0][-1] == outputs[1][-1]


def test_names_tell_configs_apart(book, tmp_path):
    variants = [
        {},
        {"max_bytes": 5000},
        {"tokenizer": "bpe", "vocab_size": 300},
        {"tokenizer": "bpe", "vocab_size": 301},
    ]
    folders = {tokens.folder(config(book, **keys)) for keys in variants}
    assert len(folders) == len(variants)
    assert tokens.folder(config(book, steps=5, seed=3)) == tokens.folder(config(book))
    for odd, slug in (
        ("mix:hub:a/b.c,/x/Grüße & (mehr).txt", "b.c-Grüße-mehr-.txt"),
        (f"/y/({'x' * 50}).txt", "x" * 40),
    ):
        assert tokens.folder(config(f"{odd}#0123456789abcdef")).name.startswith(f"{slug}-bytes256-")
    mix = RunConfig(
        data=f"mix:{book},c4", tokenizer="bpe", vocab_size=301, max_bytes=5000
    )  # its tokens are found for ever
    stated = {"schema": 2, "data": ",c4#" + mix.data.partition("#")[2]}
    stated |= {"max_bytes": 5000, "tokenizer": "bpe", "vocab_size": 301}
    digest = hashlib.sha256(json.dumps(stated, sort_keys=True).encode()).hexdigest()[:12]
    assert tokens.folder(mix) == paths.cache() / "tokens" / f"book.txt-c4-bpe301-{digest}"


def test_every_byte_of_meta_is_checked(book, make, tmp_path):
    make(book)
    path = tokens.folder(config(book)) / "meta.json"
    path.write_text(path.read_text().replace("not stated", "public domain"))
    assert tokens._trouble(path.parent) == "meta.json is damaged"
    assert make(book).meta["parts"][0]["licence"] == "not stated"


def test_what_a_killed_process_left_is_made_again(book, make):
    place = tokens.folder(config(book))
    (place / "work").mkdir(parents=True)
    (place / "train.bin").write_bytes(b"half of")
    first = make(book)
    assert {path.name for path in place.iterdir()} == {"meta.json", "train.bin", "val.bin"}
    (place / "meta.json").unlink()
    opened = (place / "train.bin").stat().st_ino
    assert (make(book).train == first.train).all()
    assert (place / "train.bin").stat().st_ino != opened  # who has the old file open can still read it


def test_a_text_that_changes_while_it_is_read_is_not_kept(book, make, monkeypatch, tmp_path):
    real = tokens._tokenise

    def changed(*given):
        found = real(*given)
        book.write_text(book.read_text() + "more\n\n")
        return found

    monkeypatch.setattr(tokens, "_tokenise", changed)
    with pytest.raises(ConfigError, match="not what is stated"):
        make(book)
    assert not list(tmp_path.rglob("meta.json"))


def test_who_waits_sees_what_is_done_and_how_much_of_it(book, make, monkeypatch):
    shown, wrap = [], tokens.tqdm.wrapattr
    monkeypatch.setattr(
        tokens.tqdm, "wrapattr", lambda *given, **how: shown.append((*given[1:], how)) or wrap(*given, **how)
    )
    meta = make(book, tokenizer="bpe", vocab_size=300).meta
    sizes = [meta[f"{side}_bytes"] for side in ("train", "val")]
    read = [("learning BPE", sizes[0]), ("tokenising train", sizes[0]), ("tokenising val", sizes[1])]
    how = {"leave": False, "disable": None}
    assert shown == [
        ("write", None, {"desc": "reading text"} | how),
        *(("read", size, {"desc": what} | how) for what, size in read),
    ]
    shown.clear()
    make(book, max_bytes=20_000)
    assert shown[0][1] == 20_000
