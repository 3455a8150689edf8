import errno
import os
import re
from pathlib import Path

import pytest

from ecmoe import paths
from ecmoe.files import ConfigError


def test_home_comes_first(tmp_path, monkeypatch):
    monkeypatch.setenv("ECMOE_HOME", str(tmp_path))
    assert paths.root() == tmp_path.resolve()
    assert paths.runs() == paths.root() / "runs"
    assert paths.cache() == paths.root() / ".cache"
    assert paths.results("gpu", "runs") == paths.root() / "reports" / "gpu" / "runs"
    assert paths.results("gpu", "measures") == paths.root() / "reports" / "gpu" / "measures"
    monkeypatch.setenv("HOME", str(tmp_path))
    for home in ("~/here", "here/../here"):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("ECMOE_HOME", home)
        assert paths.root() == tmp_path.resolve() / "here"
    monkeypatch.delenv("ECMOE_CONFIGS", raising=False)
    assert paths.configs() == Path(paths.__file__).resolve().parents[1] / "configs"
    monkeypatch.setenv("ECMOE_CONFIGS", str(tmp_path / "mine"))
    assert paths.configs() == tmp_path / "mine"


def test_checkout_is_found_from_any_folder(tmp_path, monkeypatch):
    package = tmp_path / "checkout" / "ecmoe" / "paths.py"
    monkeypatch.setattr(paths, "__file__", str(package))
    monkeypatch.delenv("ECMOE_HOME", raising=False)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert paths.root() == tmp_path / "elsewhere"  # an installed package: no checkout
    package.parent.mkdir(parents=True)
    (package.parents[1] / "pyproject.toml").touch()
    assert paths.root() == package.parents[1].resolve()


def test_resolve_prefers_the_working_folder(tmp_path, monkeypatch):
    home, here = tmp_path / "home", tmp_path / "here"
    for folder in (home, here):
        folder.mkdir()
        (folder / "a.txt").touch()
    (home / "b.txt").touch()
    monkeypatch.setenv("ECMOE_HOME", str(home))
    monkeypatch.chdir(here)
    assert paths.resolve("a.txt").resolve() == here / "a.txt"
    assert paths.resolve("b.txt").resolve() == home / "b.txt"
    assert paths.resolve(here / "c.txt") == here / "c.txt"


def test_content_is_that_of_the_files_and_of_their_names(tmp_path):
    for place in ("a", "b"):
        (tmp_path / place / "in").mkdir(parents=True)
        (tmp_path / place / "x.txt").write_text("text")
        (tmp_path / place / "in" / "y.jsonl").write_text("{}")
    a, b = (str(tmp_path / place) for place in ("a", "b"))
    assert re.fullmatch(re.escape(a) + "#[0-9a-f]{16}", paths.with_content(a))
    content = paths.content_of(paths.with_content(a))
    assert content == paths.content_of(paths.with_content(b)) != ""
    assert content != paths.content_of(paths.with_content(f"{a}/x.txt"))
    (tmp_path / "b" / "notes.md").write_text("no text of the corpus")
    assert paths.content_of(paths.with_content(b)) == content
    (tmp_path / "b" / "x.txt").rename(tmp_path / "b" / "z.txt")
    assert paths.content_of(paths.with_content(b)) != content


def test_content_is_read_again_when_a_file_changes_but_neither_size_nor_time(tmp_path):
    seen = set()
    for letter in "ab":
        (tmp_path / "x.txt").write_text(letter)
        os.utime(tmp_path / "x.txt", (0, 0))
        seen.add(paths.with_content(str(tmp_path / "x.txt")))
    assert len(seen) == 2


def test_what_is_stated_stays_and_what_is_known_needs_no_content(tmp_path):
    stated = f"{tmp_path}/x.txt#0123456789abcdef"
    (tmp_path / "x.txt").write_text("text")
    for data in (
        stated,
        "stdlib",
        "c4",
        "wikitext-103",
        "enwik8",
        "hub:a/b",
        "digits",
        "cifar10",
        "mix:stdlib,c4",
        "nowhere.txt",
        "images:nowhere",
    ):
        assert paths.with_content(data) == data
    assert paths.KNOWN_TEXTS + paths.IMAGES == ("stdlib", "c4", "wikitext-103", "enwik8", "digits", "cifar10")
    assert paths.plain(stated) == f"{tmp_path}/x.txt" and paths.plain("x#1.txt") == "x#1.txt"
    with pytest.raises(ConfigError, match=f"data='{stated}'.*not what is stated.*leave out #0123456789abcdef"):
        paths.check_content(stated)
    for fine in (paths.plain(stated), paths.with_content(paths.plain(stated)), "stdlib", "nowhere.txt"):
        paths.check_content(fine)


def test_a_mix_has_the_content_of_its_local_parts(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name)
    mix = f"mix:{tmp_path}/a.txt,stdlib,{tmp_path}/b.txt"
    assert paths.parts_of(paths.with_content(mix)) == [f"{tmp_path}/a.txt", "stdlib", f"{tmp_path}/b.txt"]
    assert paths.parts_of("a,b.txt") == ["a,b.txt"]  # one file
    before = paths.content_of(paths.with_content(mix))
    (tmp_path / "b.txt").write_text("c")
    assert paths.content_of(paths.with_content(mix)) not in (before, "")
    (tmp_path / "b.txt").unlink()
    assert paths.with_content(mix) == mix  # of a text that isn't here nothing is known


def test_a_mix_tells_files_of_one_name_apart(tmp_path):
    for place in "ab":
        (tmp_path / place).mkdir()
        (tmp_path / place / "x.txt").write_text(place)
    there = [paths.content_of(paths.with_content(f"mix:{tmp_path}/{a},{tmp_path}/{b}")) for a, b in ("ab", "ba", "aa")]
    assert len(set(there)) == 3 and "" not in there
    assert not paths.is_local("hub:a") and not paths.is_local("digits") and paths.is_local("images:a")


def test_a_text_that_is_gone_is_known_by_what_it_held(tmp_path, monkeypatch):
    monkeypatch.setenv("ECMOE_HOME", str(tmp_path / "home"))
    (tmp_path / "x.txt").write_text("text")
    data = str(tmp_path / "x.txt")
    known = paths.with_content(data)
    paths.remember_content(known)
    (kept,) = (paths.cache() / "sources").iterdir()
    os.utime(kept, (0, 0))
    for again in (known, "stdlib", "nowhere.txt"):  # nothing is new
        paths.remember_content(again)
    assert list((paths.cache() / "sources").iterdir()) == [kept] and kept.stat().st_mtime == 0
    (tmp_path / "x.txt").unlink()
    assert paths.with_content(data) == known
    (tmp_path / "x.txt").write_text("another")
    assert paths.with_content(data) != known

    def full(path, text):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(paths, "write_text", full)
    paths.remember_content("y.txt#0123456789abcdef")  # a cache that can't be written is no error


def test_a_name_that_is_too_long_for_a_file_is_that_of_none():
    for name in ("a" * 300 + ".txt", f"images:{'a' * 300}"):
        assert paths.with_content(name) == name and not paths.local_files(name)


def test_an_unknown_home_is_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not paths.resolve("~nosuch/x").exists()
    assert paths.resolve("~").is_dir()


def test_a_linked_folder_is_part_of_the_text_but_one_that_holds_itself_is_named(tmp_path):
    (tmp_path / "else").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "else" / "b.txt").write_text("b")
    for name in ("a.txt", "Z.TXT", "0.jsonl", "read.me", ".txt"):
        (tmp_path / "text" / name).write_text("a")
    (tmp_path / "text" / "linked").symlink_to(tmp_path / "else")
    (tmp_path / "text" / ".hidden").mkdir()
    (tmp_path / "text" / ".hidden" / "c.txt").write_text("c")
    found = paths.local_files(str(tmp_path / "text"))
    assert list(found) == ["0.jsonl", "Z.TXT", "a.txt", "linked/b.txt"]
    assert list(found.values()) == [tmp_path / "text" / name for name in found]
    assert not paths.local_files(f"images:{tmp_path / 'text'}")
    before = paths.with_content(str(tmp_path / "text"))
    (tmp_path / "else" / "b.txt").write_text("c")
    assert paths.with_content(str(tmp_path / "text")) != before
    (tmp_path / "else" / "round").symlink_to(tmp_path / "text")
    with pytest.raises(ConfigError, match="text/linked/round is a link to a folder that holds it"):
        paths.local_files(str(tmp_path / "text"))
    (tmp_path / "else" / "round").unlink()
    (tmp_path / "text" / "self").symlink_to(tmp_path / "text")
    (tmp_path / "alias").symlink_to(tmp_path / "text")
    with pytest.raises(
        ConfigError, match="alias/self is a link to a folder that holds it"
    ):  # by whatever name it is read
        paths.local_files(str(tmp_path / "alias"))


def test_what_is_no_file_is_named_and_what_is_not_asked_for_left_out(tmp_path):
    for name in ("a.txt", "b.md", "out/c.txt", "in/out/d.txt", "in/e.txt", ".f.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("a")
    assert list(paths.files_below(tmp_path, (".txt",), without=("out",))) == ["a.txt", "in/e.txt"]
    assert list(paths.files_below(tmp_path, (".md", ".rst"))) == ["b.md"]
    wrong = tmp_path / "in/l.txt"
    for make in (lambda: wrong.symlink_to("nowhere"), lambda: os.mkfifo(wrong)):
        make()
        with pytest.raises(ConfigError, match="in/l.txt is a link to nothing, or no regular file: remove it"):
            paths.files_below(tmp_path, (".txt",))
        wrong.unlink()


def test_files_are_told_by_their_kind(tmp_path):
    texts = ["a.TXT", "a.json", "a.jsonl", "a.jsonl.gz", "a.jsonl.xz", "a.txt.gz", "a.txt.xz"]
    images = [
        "a.bmp",
        "a.gif",
        "a.idx.xz",
        "a.jpeg",
        "a.jpg",
        "a.jpgs.xz",
        "a.pgm",
        "a.png",
        "a.ppm",
        "a.tif",
        "a.tiff",
        "a.webp",
    ]
    for name in (*texts, *images, "a.md", "a.xz", "txt"):
        (tmp_path / name).touch()
    for prefix, kinds in (("", texts), ("images:", images)):
        assert list(paths.local_files(f"{prefix}{tmp_path}")) == kinds
        found = {
            name: paths.local_files(f"{prefix}{tmp_path}/{name}") for name in (*texts, *images, "a.md", "nothing.txt")
        }
        assert {name: files for name, files in found.items() if files} == {
            name: {name: tmp_path / name} for name in kinds
        }


def test_a_folder_that_cannot_be_read_is_named_not_left_out(tmp_path, monkeypatch):
    (tmp_path / "text" / "b").mkdir(parents=True)
    (tmp_path / "text" / "a.txt").write_text("a")

    def scandir(path):
        if os.path.basename(path) == "b":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return listed(path)

    listed = os.scandir
    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(ConfigError, match="text/b can't be read: Permission denied"):
        paths.local_files(str(tmp_path / "text"))


def test_pages_have_names_that_nothing_reads_otherwise_and_none_the_same():
    assert [paths.page_name(name) for name in ("01_a-b.c", "38_\u00fc")] == ["01_a-b.c", "38_\u00fc"]
    odd = ["a b", "a-b", "a;b", "a\nb", "$(a)", "{a}", "<a>", " ", "a'b", 'a"b', "*", "~", "a/b"]
    names = [paths.page_name(name) for name in odd]
    assert all(re.fullmatch(r"[\w.-]+", name) for name in names) and len(set(names)) == len(odd)
