import gzip
import json
import lzma
import os
import random
import re
import sys

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ecmoe.data import corpus
from ecmoe.data.corpus import blocks, open_corpus, part_files
from ecmoe.files import ConfigError


def test_standard_library_is_over_ten_megabytes_without_its_tests():
    files = part_files("stdlib")
    assert sum(path.stat().st_size for path in files.values()) > 10e6
    assert list(files) == sorted(files) and "json/decoder.py" in files
    assert not any(set(name.split("/")) & {"test", "tests", "idle_test", "site-packages"} for name in files)
    library = open_corpus("stdlib")
    assert "PSF" in library.licence and "Python Software Foundation" in library.attribution
    assert sys.version.split()[0] in library.name
    text = dict(library.train)["json/decoder.py"]
    assert text == files["json/decoder.py"].read_text(encoding="utf-8")


def test_a_missing_text_is_looked_for_in_places_that_are_named_once(tmp_path, monkeypatch):
    here = tmp_path / "here"
    here.mkdir()
    for home, where in ((here, str(here)), (tmp_path, f"{here} or {tmp_path}")):
        monkeypatch.chdir(here)
        monkeypatch.setattr(corpus.paths, "root", lambda home=home: home)
        with pytest.raises(ConfigError) as told:
            part_files("nowhere.txt")
        assert f"no such file or folder in {where}; " in str(told.value) and "README.md" in str(told.value)


@given(st.lists(st.text(alphabet="ab\n", max_size=200), max_size=6), st.integers(1, 20))
def test_blocks_are_the_text(chunks, size):
    found = list(blocks(chunks, size))
    assert "".join(found) == "".join(chunks)
    assert all(found) and all(len(block) >= size for block in found[:-1])


def test_blocks_end_at_blank_lines_whatever_the_chunks():
    text = "".join(f"paragraph {i}\nof two lines\n\n" for i in range(200))
    for step in (1, 7, 1000, len(text)):
        found = list(blocks((text[i : i + step] for i in range(0, len(text), step)), size=64))
        assert all(block.endswith("\n\n") and len(block) < 64 + 40 for block in found), step


def test_of_the_library_nothing_is_read_that_is_no_part_of_it(tmp_path, monkeypatch):
    for place in (
        "",
        "test",
        "x/tests",
        "idle_test",
        "site-packages",
        "dist-packages",
        "__pycache__",
        "lib-dynload",
        "email",
    ):
        (tmp_path / place).mkdir(parents=True, exist_ok=True)
        (tmp_path / place / "a.py").touch()
    monkeypatch.setattr(corpus.sysconfig, "get_path", {"stdlib": tmp_path}.get)
    assert list(part_files("stdlib")) == ["a.py", "email/a.py"]
    (tmp_path / "email" / "a.py").write_bytes("# Grüße\n".encode("latin-1"))
    assert list(open_corpus("stdlib").train) == [("a.py", ""), ("email/a.py", "# Gr\ufffd\ufffde\n")]


def test_a_text_is_read_in_documents_of_16384_characters_or_a_little_more(tmp_path):
    (tmp_path / "a.txt").write_text("x\n\n" * 20_000)
    assert [len(text) for _, text in open_corpus(str(tmp_path / "a.txt")).train] == [16386] * 3 + [60_000 - 3 * 16386]


def test_xz_is_the_same_text(tmp_path):
    text = "Grüße,\n\nWelt. \u2028 \x85 kein Ende\n" * 3000
    (tmp_path / "plain.txt").write_text(text, encoding="utf-8")
    (tmp_path / "packed.TXT.XZ").write_bytes(lzma.compress(text.encode()))
    (tmp_path / "packed.txt.gz").write_bytes(gzip.compress(text.encode()))
    plain = [t for _, t in open_corpus(str(tmp_path / "plain.txt")).train]
    for name in ("packed.TXT.XZ", "packed.txt.gz"):
        assert [t for _, t in open_corpus(str(tmp_path / name)).train] == plain
    assert "".join(plain) == text and len(plain) > 1


def test_lines_end_alike_wherever_they_were_written(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"x\r\n\r\n" * 9000)
    assert [text for _, text in open_corpus(str(tmp_path / "a.txt")).train] == ["x\n\n" * 5462, "x\n\n" * 3538]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "A.TXT", "A.JSONL"])
def test_a_mark_of_utf_8_is_no_text(tmp_path, name):
    (tmp_path / name).write_text(
        "\ufeff" + ('{"text": "one"}' if name.lower() == "a.jsonl" else "one"), encoding="utf-8"
    )
    assert [text for _, text in open_corpus(str(tmp_path / name)).train] == ["one"]


def test_rows_of_json_are_documents(tmp_path):
    rows = [{"text": f"row {i}: ü", "label": i} for i in range(5)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "b.json").write_text(" " + json.dumps(rows, indent=1))
    expected = [row["text"] for row in rows]
    for name in ("a.jsonl", "b.json"):
        assert [t for _, t in open_corpus(str(tmp_path / name)).train] == expected
    folder = open_corpus(str(tmp_path))
    assert [t for _, t in folder.train] == expected * 2


def test_rows_without_text_are_no_documents(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": ""}\n{"text": " "}\n{"text": "two"}\n')
    assert list(open_corpus(str(tmp_path / "a.jsonl")).train) == [("one", "one"), (" ", " "), ("two", "two")]


def test_folder_of_texts_has_a_unit_a_file(tmp_path):
    for name in ("z.txt", "sub/a.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"text of {name}")
    assert list(open_corpus(str(tmp_path)).train) == [
        ("sub/a.txt", "text of sub/a.txt"),
        ("z.txt", "text of z.txt"),
    ]


def test_licence_of_local_text(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("text")
    assert open_corpus(str(path)).licence == open_corpus(str(path)).attribution == "not stated"
    (tmp_path / "book.txt.about.yaml").write_text("licence: CC0\nattribution: A. Author")
    found = open_corpus(str(path))
    assert (found.name, found.licence, found.attribution) == ("book.txt", "CC0", "A. Author")
    (tmp_path / "book.txt.about.yaml").write_text("name: 1984\nlicence: 4.0")  # which YAML takes for numbers
    assert open_corpus(str(path))[:3] == ("1984", "4.0", "not stated")
    (tmp_path / "book.txt.about.yaml").write_text("{licence: CC0, year: 1984}")
    said = f"data='{path}': {path}.about.yaml must have only the keys name, licence, attribution; it has "
    with pytest.raises(ConfigError, match=f"^{re.escape(said + repr({'licence': 'CC0', 'year': 1984}))}$"):
        open_corpus(str(path))
    for stated in (b"license: CC0", b"licence: [", "name: Grüße".encode("latin-1"), b""):
        (tmp_path / "book.txt.about.yaml").write_bytes(stated)
        with pytest.raises(ConfigError, match=r"data='.*book\.txt'.*book\.txt\.about\.yaml"):
            open_corpus(str(path))


@pytest.mark.parametrize("name", ["book.txt", "book.txt.gz", "rows.jsonl.gz", "folder"])
def test_licence_of_local_text_however_its_path_is_written(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    (tmp_path / f"{name}.about.yaml").write_text("licence: CC0")
    for data in (name, f"./{name}", f"{name}/", str(tmp_path / name)):
        assert corpus.about(data) == {"name": name, "licence": "CC0", "attribution": "not stated"}
    monkeypatch.chdir(tmp_path / name)
    assert corpus.about(".")["licence"] == "CC0" and corpus.about("/")["licence"] == "not stated"


def test_known_corpora_have_no_file_beside_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for data in ("stdlib", "c4"):
        (tmp_path / f"{data}.about.yaml").write_text("licence: CC0")
        made = {"name": data, "licence": "its own", "attribution": "its own", "split": "ours"}
        assert corpus.described(data, [made]) == made


@pytest.mark.parametrize("data", ["c4", "wikitext-103", "enwik8"])
def test_a_known_text_is_no_folder_of_that_name(tmp_path, monkeypatch, data):
    monkeypatch.chdir(tmp_path)
    (tmp_path / data).mkdir()
    (tmp_path / data / "a.txt").write_text("local")
    FakeHub(monkeypatch, train=["from the Hub"])
    assert part_files(data) == {} and corpus.source_sha256(data) is None and corpus.source_key(data) == data
    assert [text for _, text in open_corpus(data).train] == ["from the Hub"]


@pytest.mark.parametrize("data, remedy", [
    ("stdlb", "did you mean stdlib"), ("nowhere.txt", "no such file"), ("nowhere.txt.gz", "no such file"),
    ("a/b", "no such file"),
    ("hub:a/b/c/d", "hub:OWNER/NAME/CONFIG"), ("{folder}", "must be a file ending in .txt, "),
    ("{folder}/x.pdf", "must be a file ending in .txt, "),
])  # fmt: skip
def test_unknown_source(data, remedy, tmp_path):
    (tmp_path / "x.pdf").touch()
    data = data.format(folder=tmp_path)
    with pytest.raises(ConfigError) as error:
        open_corpus(data)
    assert remedy in str(error.value) and repr(data) in str(error.value) and "data=" in str(error.value)


def test_broken_files(tmp_path):
    (tmp_path / "latin.txt").write_bytes("Grüße".encode("latin-1"))
    (tmp_path / "cut.txt.xz").write_bytes(lzma.compress(bytes(range(97, 123)) * 5000)[:-20])
    (tmp_path / "other.jsonl").write_text('{"body": "x"}\n')
    (tmp_path / "latin.jsonl").write_bytes('{"text": "Grüße"}'.encode("latin-1"))
    (tmp_path / "no.txt.gz").write_text("no archive")
    (tmp_path / "no.txt.xz").write_text("no archive")
    packed = gzip.compress(random.Random(0).randbytes(9000).hex().encode())
    (tmp_path / "other.txt.gz").write_bytes(packed[:20] + b"\xff" * 99 + packed[119:])
    (tmp_path / "deep.json").write_text("[" * 100_000)
    text, json_line = "it must be UTF-8 text", "it must be a JSON object a line, with text"
    for name, told in (
        ("latin.txt", rf"can't be read \(UnicodeDecodeError: .*\); {text}"),
        ("cut.txt.xz", rf"can't be read \(EOFError: .*\); {text}"),
        ("no.txt.gz", rf"can't be read \(BadGzipFile: .*\); {text}"),
        ("no.txt.xz", rf"can't be read \(LZMAError: .*\); {text}"),
        ("other.txt.gz", rf"can't be read \(error: .*\); {text}"),
        ("deep.json", rf"can't be read \(RecursionError: .*\); {json_line}"),
        ("latin.jsonl", rf"can't be read \(UnicodeDecodeError: .*\); {json_line}"),
        ("other.jsonl", ".*body.*"),
    ):
        with pytest.raises(ConfigError, match=rf"^data='{tmp_path}/{name}': {tmp_path}/{name}.? {told}$"):
            list(open_corpus(str(tmp_path / name)).train)


@pytest.mark.parametrize(
    "name", ["book[1].txt", "book*.txt", "book?.txt", "b{o,x}ok.txt", "a,b.txt", "x#1.txt", "{a}.jsonl"]
)
def test_a_path_is_no_pattern(tmp_path, name):
    right = '{"text": "right"}\n' if name.endswith("l") else "right"
    for other in ("book1.txt", "bookX.txt", "book.txt", "box.txt", "a.jsonl"):
        (tmp_path / other).write_text('{"text": "wrong"}\n' if other.endswith("l") else "wrong")
    (tmp_path / name).write_text(right)
    assert [text for _, text in open_corpus(str(tmp_path / name)).train] == ["right"]
    texts = [text for _, text in open_corpus(str(tmp_path)).train]
    assert texts.count("right") == 1 and texts.count("wrong") == 5
    (tmp_path / "in[1]").mkdir()
    (tmp_path / name).rename(tmp_path / "in[1]" / name)
    assert [text for _, text in open_corpus(str(tmp_path / "in[1]")).train] == ["right"]
    with pytest.raises(ConfigError, match="no such file"):
        open_corpus(str(tmp_path / name))


def test_rows_need_not_be_alike(tmp_path):
    rows = [
        {"text": f"{i} " + "word " * 1000, "id": i if i < 2500 else f"s{i}"} | ({"new": {}} if i == 2900 else {})
        for i in range(3000)
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))  # more than the 10 MB of a block
    assert [text for _, text in open_corpus(str(tmp_path / "a.jsonl")).train] == [row["text"] for row in rows]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"text": "x\\ud83d"}', "line 3: 'text' has half a character"),
        ('{"text": null}', "line 3 has the fields text, but must have a string 'text'; it holds None"),
        ('{"text": 5}', "line 3 .*it holds 5"),
        ("[1]", "line 3 has a list, but must have a string 'text'"),
        ('{"text": "x"', "line 3 isn't JSON"),
        ("[" * 100_000, "line 3 isn't JSON"),
    ],
)
def test_a_bad_row_is_named(tmp_path, line, said):
    (tmp_path / "a.jsonl").write_text(f'{{"text": "one"}}\n\n{line}\n')
    with pytest.raises(ConfigError, match=rf"^data='[^ ]*a.jsonl': [^ ]*a.jsonl, {said}"):
        list(open_corpus(str(tmp_path / "a.jsonl")).train)


def test_a_bad_row_of_a_list_is_named(tmp_path):
    (tmp_path / "a.json").write_text('\n [{"text": "one"},\n\n {"body": 1, "label": 2}]'.lstrip("\n"))
    with pytest.raises(ConfigError, match="a.json, row 2 has the fields body, label, but must have a string 'text'"):
        list(open_corpus(str(tmp_path / "a.json")).train)


def test_what_a_folder_may_hold_beside_texts(tmp_path):
    (tmp_path / "d.txt").mkdir()
    for empty in ("empty.jsonl", "empty.json", "empty.txt", ".hidden.txt", "x.pdf"):
        (tmp_path / empty).touch()
    (tmp_path / "a.txt").write_text("text")
    assert list(open_corpus(str(tmp_path)).train) == [("a.txt", "text")]
    (tmp_path / "link.txt").symlink_to("nowhere")
    with pytest.raises(ConfigError, match="link.txt is a link to nothing"):
        open_corpus(str(tmp_path))
    (tmp_path / "link.txt").unlink()
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(ConfigError, match="pipe.txt is a link to nothing, or no regular file"):
        open_corpus(str(tmp_path))


@pytest.mark.parametrize("name", ["pipe.txt", "link.txt", "d.txt"])
def test_no_text_but_called_so(tmp_path, name):
    (tmp_path / "d.txt").mkdir()
    (tmp_path / "link.txt").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe.txt")
    told = f"data='{tmp_path}/{name}': {tmp_path}/{name} exists, but must be a file ending in .txt, .txt.xz, .txt.gz, .jsonl, .json, "
    with pytest.raises(ConfigError, match=f"^{re.escape(told)}.jsonl.xz, .jsonl.gz, or a folder of them$"):
        open_corpus(str(tmp_path / name))


@pytest.mark.parametrize(
    "data", ["hub:..", "hub:a/..", "hub:../x", "hub:.hidden", "hub:a/b/../c", "~nosuch/x", "~nosuch/x.txt"]
)
def test_no_name_of_the_hub_and_no_path(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"data='{data}': "):
        open_corpus(data)


def test_the_hub_is_never_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("txt", "owner/set"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "a.txt").write_text("local")
    for data in ("hub:txt", "hub:owner/set", "hub:text", "hub:json"):  # the last two are readers of `datasets`
        told = f"data='{data}': `datasets` takes '{data[4:]}' for files in {tmp_path}, not for a data set of the Hub"
        with pytest.raises(ConfigError, match=re.escape(told)):
            open_corpus(data)


class FakeHub:
    """Stands in for datasets.load_dataset: what was asked for, and rows to answer with."""

    def __init__(self, monkeypatch, **splits):
        self.asked, self.splits, self.said = [], splits, ("mit", "@misc{x,\n  title={X}}", "x.org")
        monkeypatch.setattr(datasets, "load_dataset", self)

    def __call__(self, *names, **options):
        self.asked.append((names, options))
        sets = {}
        for name, texts in self.splits.items():
            found = datasets.Dataset.from_dict({"text": texts})
            found.info.license, found.info.citation, found.info.homepage = self.said
            sets[name] = found.to_iterable_dataset() if options["streaming"] else found
        return datasets.IterableDatasetDict(sets) if options["streaming"] else datasets.DatasetDict(sets)


@pytest.mark.parametrize("streaming", [False, True])
def test_c4(monkeypatch, streaming):
    hub = FakeHub(monkeypatch, test=["four"], validation=["three"], train=["one", "", "two"])
    found = open_corpus("c4", streaming)
    assert list(found.train) == [("one", "one"), ("two", "two")]  # copies of a text are a unit
    assert [t for _, t in found.validation] == ["three"]
    assert hub.asked == [(("allenai/c4", "en"), {"streaming": streaming})]
    assert found.name == "C4 (en)" and "ODC-BY" in found.licence and "Raffel" in found.attribution


@pytest.mark.parametrize(("data", "config"), [("wikitext-103", "wikitext-103-raw-v1"),
                                              ("hub:Salesforce/wikitext/wikitext-2-v1", "wikitext-2-v1")])  # fmt: skip
def test_wikitext_rows_are_lines_of_articles(monkeypatch, data, config):
    lines = [
        " Text of none . \n",
        "",
        " = A = \n",
        "",
        " Text of a . \n",
        " = = Part = = \n",
        " More . \n",
        "",
        " = B = b = \n",
        " Text . \n",
        " = = = Deep = = = \n",
        " = C = ",
        " Text of c . ",
    ]
    hub = FakeHub(monkeypatch, train=lines, validation=lines)
    found = [t for _, t in open_corpus(data).train]
    assert found == [
        " Text of none . \n",
        " = A = \n\n Text of a . \n = = Part = = \n More . \n",
        " = B = b = \n Text . \n = = = Deep = = = ",
        " = C = \n Text of c . ",
    ]
    assert hub.asked[0][0] == ("Salesforce/wikitext", config)


def test_enwik8_is_read_without_its_script(monkeypatch):
    hub = FakeHub(monkeypatch, train=["<page>\n", "\n", "x\n"])
    found = open_corpus("enwik8")
    ((unit, text),) = found.train
    assert (unit, text) == ("enwik8", "<page>\n\nx\n") and found.validation is None  # one unit: never split at random
    assert hub.asked[0][0][0] == "text" and hub.asked[0][1]["data_files"].endswith("enwik8.zip")
    assert hub.asked[0][1]["keep_linebreaks"]


@pytest.mark.parametrize("data, names", [
    ("hub:imdb", ("imdb", None)), ("hub:owner/set", ("owner/set", None)), ("hub:owner/set/en", ("owner/set", "en")),
])  # fmt: skip
def test_any_data_set_of_the_hub(monkeypatch, data, names):
    hub = FakeHub(monkeypatch, train=["one"])
    found = open_corpus(data)
    assert hub.asked[0][0] == names
    assert found[:3] == (data.removeprefix("hub:"), "mit", "@misc{x, title={X}}")
    for hub.said, attribution in ((("", "", "x.org"), "x.org"), (("", "", ""), "not stated")):
        assert open_corpus(data)[1:3] == ("not stated", attribution)


def test_hub_errors_name_the_key(monkeypatch):
    def fails(*names, **options):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", fails)
    told = re.escape("data='hub:a/b': `datasets` can't load 'a/b' (ConnectionError: no route to host); it must be")
    with pytest.raises(ConfigError, match=f"^{told}.*reachable"):
        open_corpus("hub:a/b")
    FakeHub(monkeypatch, test=["one"], dev=["two"])
    with pytest.raises(ConfigError, match="^data='hub:a/b': has splits test, dev, but must have train$"):
        open_corpus("hub:a/b")
    FakeHub(monkeypatch, train=["one", None])
    with pytest.raises(ConfigError, match="data='hub:a/b': row 2 has the fields text, but must have a string 'text'"):
        list(open_corpus("hub:a/b").train)


def test_a_known_text_has_the_name_licence_and_authors_of_its_source():
    """https://huggingface.co/datasets/allenai/c4, Salesforce/wikitext, and https://mattmahoney.net/dc/textdata.html."""
    names = {"c4": "C4 (en)", "wikitext-103": "WikiText-103 (raw)", "enwik8": "enwik8"}
    licences = {
        "c4": "ODC-BY 1.0; Common Crawl's terms of use",
        "wikitext-103": "CC BY-SA 3.0 and GFDL",
        "enwik8": "GFDL 1.2; CC BY-SA 3.0",
    }
    authors = {"c4": "Raffel et al. 2020", "wikitext-103": "Merity et al. 2016", "enwik8": "Mahoney"}
    assert {data: hub.name for data, hub in corpus.PRESETS.items()} == names
    assert {data: hub.licence for data, hub in corpus.PRESETS.items()} == licences
    assert all(corpus.PRESETS[data].attribution.startswith(who) for data, who in authors.items())
    assert corpus.PRESETS["enwik8"].options["data_files"] == "https://mattmahoney.net/dc/enwik8.zip"


def test_without_blank_lines_blocks_end_at_lines_and_without_lines_anywhere():
    lines = "".join(f"line {i} of a long text\n" for i in range(400))
    found = list(blocks([lines], size=64))
    assert len(found) > 20 and all(block.endswith("\n") for block in found)
    assert [len(block) for block in blocks(["x" * 1000], size=64)] == [64] * 8 + [488]  # the rest is one
    assert [len(block) for block in blocks(["x" * 1000 + "\n\nx"], size=64)] == [64] * 8 + [490, 1]
