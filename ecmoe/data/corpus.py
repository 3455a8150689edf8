"""Where text comes from: a corpus is a stream of documents with a name, a licence and an attribution.

The key `data` names it: `stdlib` (on every machine with Python), a local file or folder, or a data set of the Hub; or
several of them, a mix, whose parts this module takes one by one.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import platform
import re
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ecmoe import paths
from ecmoe.config import IMAGES, ConfigError, is_local, parts_of
from ecmoe.files import read_yaml

# A text file doesn't say where its documents end: it is cut at the first blank line after so many characters.
BLOCK = 1 << 14
NOT_STATED = "not stated"

# (unit, text): documents of one unit never lie on both sides of the split.
Documents = Iterable[tuple[str, str]]


@dataclass(frozen=True)
class Corpus:
    """Documents and what must be said of them.

    name: for a report. licence, attribution: "not stated" if the source doesn't say.
    train: (unit, text) pairs. validation: the source's own validation documents, or None: ours is split off.
    """

    name: str
    licence: str
    attribution: str
    train: Documents
    validation: Documents | None = None


@dataclass(frozen=True)
class Hub:
    """A data set of the Hub that `datasets` reads without running code of its author."""

    path: str
    config: str | None
    name: str
    licence: str
    attribution: str
    files: str | None = None


PRESETS = {
    "c4": Hub("allenai/c4", "en", "C4 (en)", "ODC-BY 1.0; Common Crawl's terms of use",
              "Raffel et al. 2020, as prepared by the Allen Institute for AI"),
    "wikitext-103": Hub("Salesforce/wikitext", "wikitext-103-raw-v1", "WikiText-103 (raw)", "CC BY-SA 3.0 and GFDL",
                        "Merity et al. 2016; text by the authors of English Wikipedia"),
    # The Hub's enwik8 is a script, which `datasets` no longer runs: read its source through the text loader.
    "enwik8": Hub("text", None, "enwik8", "GFDL 1.2; CC BY-SA 3.0",
                  "Mahoney, Large Text Compression Benchmark; text by the authors of English Wikipedia",
                  files="https://mattmahoney.net/dc/enwik8.zip"),
}  # fmt: skip
_TEXT, _JSON = (".txt", ".txt.xz", ".txt.gz"), (".jsonl", ".json", ".jsonl.xz", ".jsonl.gz")
_NO_TEXT = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "lib-dynload",
}


def source_key(data: str) -> str:
    """The value of `data`, and for `stdlib` whose: each version of Python has its own text."""
    return ",".join(f"stdlib-{platform.python_version()}" if part == "stdlib" else part for part in parts_of(data))


def source_files(data: str) -> dict[str, Path]:
    """The local files that `data` is made of, by their path relative to it; none for the Hub.

    Raises:
        ConfigError: there is no such file, folder or data set.
    """
    if len(parts := parts_of(data)) > 1:
        return {f"{i}:{name}": path for i, part in enumerate(parts) for name, path in source_files(part).items()}
    if data == "stdlib":
        return _stdlib_files()
    if data in PRESETS or re.fullmatch(r"hub:[\w.-]+(/[\w.-]+){0,2}", data):
        return {}
    path = paths.resolve(data)
    if path.is_file() and path.name.endswith(_TEXT + _JSON):
        return {path.name: path}
    if path.is_dir():
        files = {p.relative_to(path).as_posix(): p for p in path.rglob("*") if p.name.endswith(_TEXT + _JSON)}
        if files:
            return dict(sorted(files.items()))
    known = ["stdlib", *PRESETS, *IMAGES]
    if path.exists():
        remedy = f"it exists, but must be, or hold, files that end in {', '.join(_TEXT + _JSON)}"
    elif is_local(data):
        remedy = f"no such file or folder, neither in {Path.cwd()} nor in {paths.root()}"
    else:
        near = difflib.get_close_matches(data, known, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        remedy = f"{hint}must be one of {', '.join(known)}, hub:NAME or hub:OWNER/NAME/CONFIG, or a path"
    raise ConfigError(f"data={data!r}: {remedy}")


def stat_digest(files: dict[str, Path]) -> str:
    """Changes when a file is touched: the cheap question."""
    stats = [(name, path.stat().st_size, path.stat().st_mtime_ns) for name, path in files.items()]
    return hashlib.sha256(repr(stats).encode()).hexdigest()


def content_digest(files: dict[str, Path]) -> str:
    """Changes when a file's content does: the sure answer."""
    total = hashlib.sha256()
    for name, path in files.items():
        with path.open("rb") as file:
            total.update(f"{name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


def open_corpus(data: str, streaming: bool = False) -> Corpus:
    """The corpus that the key `data` names. `streaming`: don't download a Hub data set whole.

    Raises:
        ConfigError: there is no such corpus, or it can't be read.
    """
    files = source_files(data)
    if data == "stdlib":
        return Corpus(
            f"the standard library of Python {platform.python_version()} (without its tests)",
            "PSF License Agreement, version 2",
            "Python Software Foundation and contributors",
            ((name, path.read_text(encoding="utf-8", errors="replace")) for name, path in files.items()),
        )
    if files:
        said = {"name": Path(data).name, "licence": NOT_STATED, "attribution": NOT_STATED} | about(data)
        return Corpus(**said, train=_local(data, files))
    return _hub(data, streaming)


def about(data: str) -> dict[str, str]:
    """name, licence and attribution of local text, as far as `PATH.about.yaml` beside it states them.

    Raises:
        ConfigError: that file can't be read, or states something else.
    """
    if data in ("stdlib", *PRESETS, *IMAGES) or data.startswith("hub:"):
        return {}
    beside = Path(f"{os.path.abspath(paths.resolve(data))}.about.yaml")  # without a slash at the end
    if not beside.is_file():
        return {}
    keys, stated = ("name", "licence", "attribution"), read_yaml(beside, f"data={data!r}:")
    if not isinstance(stated, dict) or not set(stated) <= set(keys):
        raise ConfigError(f"data={data!r}: {beside} must hold no keys but {', '.join(keys)}; it holds {stated!r}")
    return {key: str(value) for key, value in stated.items()}


def described(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """What a report says of the parts of a corpus: name, licence and attribution of all, how each is split; of a mix, its parts.

    Args:
        parts: of each `data`, name, licence, attribution, split; what a file beside it states now wins.
    """
    parts = [part | about(part["data"]) | {"share": 1 / len(parts)} for part in parts]
    if len(parts) == 1:
        return {key: parts[0][key] for key in ("name", "licence", "attribution", "split")}
    said = {
        key: "; ".join(f"{part['name']}: {part[key]}" for part in parts) for key in ("licence", "attribution", "split")
    }
    return {"name": " + ".join(f"{part['share']:.0%} {part['name']}" for part in parts), **said, "parts": parts}


def _stdlib_files() -> dict[str, Path]:
    """The library's .py files. Its tests are most of its text and absent on some systems: left out."""
    root = Path(sysconfig.get_path("stdlib"))
    files = {}
    for folder, folders, names in os.walk(root):
        folders[:] = [f for f in folders if f not in _NO_TEXT]
        for name in names:
            if name.endswith(".py"):
                path = Path(folder, name)
                files[path.relative_to(root).as_posix()] = path
    if not files:
        raise ConfigError(f"data='stdlib': this Python keeps no source in {root}; give a path to a .txt file instead")
    return dict(sorted(files.items()))


def _local(data: str, files: dict[str, Path]) -> Iterator[tuple[str, str]]:
    """Text files in blocks of one unit a file; JSON files a row at a time, every text a unit of its own."""
    from datasets import load_dataset

    for name, path in files.items():
        kind = "text" if name.endswith(_TEXT) else "json"
        options = {"keep_linebreaks": True} if kind == "text" else {}
        try:
            rows = load_dataset(kind, data_files=str(path), split="train", streaming=True, **options)
            if kind == "text":
                chunks = ("".join(t["text"].to_pylist()) for t in rows.with_format("arrow").iter(1 << 20))
                yield from ((name, block) for block in blocks(chunks))
            else:
                yield from _rows(data, rows)
        except ConfigError:
            raise
        except Exception as error:  # whatever the reader meets in a broken file
            raise ConfigError(f"data={data!r}: {path} can't be read ({type(error).__name__}: {error}); it must be "
                              f"{'UTF-8 text' if kind == 'text' else 'JSON rows with a field text'}") from error  # fmt: skip


def blocks(chunks: Iterable[str], size: int = BLOCK) -> Iterator[str]:
    """A text in documents of at least `size` characters that end at a blank line; a text without any
    is cut at a line's end, or else anywhere, before 8 `size`. Joined they are the text.
    """
    rest = ""
    for chunk in chunks:
        rest += chunk
        start = 0
        while len(rest) - start > 8 * size:
            end = rest.find("\n\n", start + size, start + 8 * size)
            if end < 0:
                end = rest.find("\n", start + size, start + 8 * size) - 1
            end = end + 2 if end > 0 else start + size
            yield rest[start:end]
            start = end
        rest = rest[start:]
    while rest:  # shorter than 8 sizes: the same cuts
        end = rest.find("\n\n", size)
        end = end + 2 if end > 0 else len(rest)
        yield rest[:end]
        rest = rest[end:]


def _hub(data: str, streaming: bool) -> Corpus:
    hub = PRESETS.get(data)
    if hub is None:
        path, config = re.fullmatch(r"hub:([\w.-]+(?:/[\w.-]+)?)(?:/([\w.-]+))?", data).groups()
        hub = Hub(path, config, data.removeprefix("hub:"), "", "")
    sets = _load(data, hub, streaming)
    train = sets.get("train")
    if train is None:
        raise ConfigError(f"data={data!r}: has splits {', '.join(sets)}, but no train")
    info = train.info
    licence = hub.licence or str(info.license or NOT_STATED)
    attribution = hub.attribution or " ".join((info.citation or info.homepage or NOT_STATED).split())
    return Corpus(
        hub.name,
        licence,
        attribution,
        _hub_documents(data, hub, train),
        _hub_documents(data, hub, sets["validation"]) if "validation" in sets else None,
    )


def _load(data: str, hub: Hub, streaming: bool) -> dict[str, Any]:
    from datasets import load_dataset

    options: dict[str, Any] = {"streaming": streaming}
    if hub.files:
        options |= {"data_files": hub.files, "keep_linebreaks": True}
    try:
        return dict(load_dataset(hub.path, hub.config, **options))
    except Exception as error:  # no network, no such data set or config, a gated one: all say so themselves
        raise ConfigError(
            f"data={data!r}: `datasets` can't load {hub.path!r} ({type(error).__name__}: {error}); it must be a data "
            "set of the Hub (hub:OWNER/NAME or hub:OWNER/NAME/CONFIG), and the Hub must be reachable"
        ) from error


def _hub_documents(data: str, hub: Hub, rows: Any) -> Iterator[tuple[str, str]]:
    if hub.files:
        return ((data, block) for block in blocks(text for _, text in _rows(data, rows)))
    if hub.path == "Salesforce/wikitext":
        return ((article, article) for article in _articles(text for _, text in _rows(data, rows, empty=True)))
    return _rows(data, rows)


def _rows(data: str, rows: Any, empty: bool = False) -> Iterator[tuple[str, str]]:
    """A row is a document, and a unit: copies of it lie on the same side of the split."""
    for row in rows:
        text = row.get("text")
        if not isinstance(text, str):
            raise ConfigError(f"data={data!r}: a row has the fields {', '.join(row)}, but must have a string `text`")
        if text or empty:
            yield text, text


def _articles(lines: Iterable[str]) -> Iterator[str]:
    """WikiText has a line a row; an article begins at a heading of the first level, ` = Title = `."""
    article: list[str] = []
    for line in lines:
        if re.fullmatch(r" = [^=].* = \n?", line):
            if any(article):
                yield "\n".join(article)
            article = []
        article.append(line.rstrip("\n"))
    if any(article):
        yield "\n".join(article)
