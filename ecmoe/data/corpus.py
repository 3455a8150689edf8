"""Where text comes from: a corpus is a stream of documents with a name, a licence and an attribution.

The key `data` names it: `stdlib` (on every machine with Python), a local file or folder, or a data set of the Hub; or
several of them, a mix, whose parts this module takes one by one.
"""

from __future__ import annotations

import difflib
import gzip
import importlib.util
import itertools
import json
import lzma
import os
import platform
import re
import sysconfig
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from ecmoe import paths
from ecmoe.files import ConfigError, content_sha256, read_yaml
from ecmoe.paths import (
    HUB_PREFIX,
    IMAGES,
    KNOWN_TEXTS,
    ROW_FILES,
    TEXT_FILES,
    content_of,
    is_local,
    local_files,
    parts_of,
)

# A text file doesn't say where its documents end: it is cut at the first blank line after so many characters.
BLOCK = 1 << 14
NOT_STATED = "not stated"

# (unit, text): documents of one unit never lie on both sides of the split.
Documents = Iterable[tuple[str, str]]
# (where, row): a dict that is read, and how an error calls its place.
Rows = Iterator[tuple[str, dict[str, Any]]]


@dataclass(frozen=True)
class Corpus:
    """Documents and what a report must say of them; validation: the source's own, or None: ours is split off."""

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
_NO_TEXT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib-dynload"}
_NAME = r"[A-Za-z0-9]\w*(?:[.-]\w+)*"  # of an owner or a data set of the Hub: no `..`, no hidden folder
_HUB = re.compile(f"{HUB_PREFIX}({_NAME}(?:/{_NAME})?)(?:/({_NAME}))?")


def source_key(data: str) -> str:
    """What the tokens of `data` depend on: names of the Hub's data sets, content of files, which the key may state."""
    stated, named = content_of(data), []
    for part in parts_of(data):
        files = _is_files(part)
        known = files and stated and part != "stdlib"  # then nothing need be here
        named.append("" if known else content_sha256(part_files(part)) if files else part)
    return ",".join(named) + stated


def source_files(data: str) -> dict[str, Path]:
    """The files that `data` is made of, by part and path in it; none for the Hub. A ConfigError where there is no such text."""
    return {f"{i}:{name}": path for i, part in enumerate(parts_of(data)) for name, path in part_files(part).items()}


def part_files(part: str) -> dict[str, Path]:
    """Those of a text that is no mix, or of a folder of images, by their path in it."""
    if part == "stdlib":
        return _stdlib_files()
    if not _is_files(part):
        return {}
    files = local_files(part)
    if files:
        return files
    path, known = paths.resolve(part), ["stdlib", *PRESETS, *IMAGES]
    if os.path.lexists(path):
        remedy = f"{path} exists, but must be, or hold, files that end in {', '.join(TEXT_FILES + ROW_FILES)}"
    elif is_local(part):
        remedy = f"no such file or folder, neither in {Path.cwd()} nor in {paths.root()}"
    else:
        near = difflib.get_close_matches(part, known, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        remedy = f"{hint}must be one of {', '.join(known)}, hub:NAME or hub:OWNER/NAME/CONFIG, or a path"
    raise ConfigError(f"data={part!r}: {remedy}")


def _is_files(part: str) -> bool:
    """No data set of the Hub?"""
    return part == "stdlib" or part not in (*KNOWN_TEXTS, *IMAGES) and not _HUB.fullmatch(part)


def open_corpus(data: str, streaming: bool = False) -> Corpus:
    """The corpus that `data`, which is no mix, names. `streaming`: don't download a Hub data set whole."""
    files = part_files(data)
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
    """name, licence and attribution of local text, as far as `PATH.about.yaml` beside it states them."""
    if data == "stdlib" or not _is_files(data):
        return {}
    beside = Path(f"{os.path.abspath(paths.resolve(data))}.about.yaml")  # without a slash at the end
    if not beside.is_file():
        return {}
    keys, stated = ("name", "licence", "attribution"), read_yaml(beside, f"data={data!r}:")
    if not isinstance(stated, dict) or not set(stated) <= set(keys):
        raise ConfigError(f"data={data!r}: {beside} must hold no keys but {', '.join(keys)}; it holds {stated!r}")
    return {key: str(value) for key, value in stated.items()}


def described(data: str, parts: list[dict[str, Any]]) -> dict[str, Any]:
    """What a report says of a corpus, of whose parts tokens know name, licence, attribution, split; a file beside one now wins."""
    parts = [
        part | ({"name": Path(one).name} if _is_files(one) and one != "stdlib" else {}) | about(one)
        | {"data": one, "share": 1 / len(parts)} for one, part in zip(parts_of(data), parts, strict=True)
    ]  # fmt: skip
    if len(parts) == 1:
        return {key: parts[0][key] for key in ("name", "licence", "attribution", "split")}
    said = {"name": " + ".join(f"{part['share']:.0%} {part['name']}" for part in parts)}
    for key in ("licence", "attribution", "split"):
        said[key] = "; ".join(f"{part['name']}: {part[key]}" for part in parts)
    return said | {"parts": parts}


def _stdlib_files() -> dict[str, Path]:
    """The library's .py files. Its tests are most of its text and absent on some systems: left out."""
    root = Path(sysconfig.get_path("stdlib"))
    files = {}
    for folder, folders, names in os.walk(root):
        folders[:] = [f for f in folders if f not in _NO_TEXT]
        for path in (Path(folder, name) for name in names if name.endswith(".py")):
            files[path.relative_to(root).as_posix()] = path
    if not files:
        raise ConfigError(f"data='stdlib': this Python keeps no source in {root}; give a path to a .txt file instead")
    return dict(sorted(files.items()))


def _local(data: str, files: dict[str, Path]) -> Iterator[tuple[str, str]]:
    """Text files in blocks of one unit a file; JSON files a row at a time, every text a unit of its own."""
    for name, path in files.items():
        if name.lower().endswith(TEXT_FILES):
            with _opened(f"data={data!r}", path, "UTF-8 text") as file:
                yield from ((name, block) for block in blocks(iter(lambda file=file: file.read(1 << 20), "")))
        else:
            rows = json_rows(f"data={data!r}", path, ["text"])
            yield from ((row["text"], row["text"]) for _, row in rows if row["text"])


@contextmanager
def _opened(what: str, path: Path, right: str) -> Iterator[TextIO]:
    """A text file, perhaps compressed; whatever the reader meets in a broken one becomes a ConfigError."""
    reader = {".xz": lzma.open, ".gz": gzip.open}.get(path.suffix.lower(), open)
    try:
        with reader(path, "rt", encoding="utf-8-sig") as file:
            yield file
    except ConfigError:
        raise
    except (OSError, EOFError, ValueError, RecursionError, lzma.LZMAError, zlib.error) as error:
        raise ConfigError(
            f"{what}: {path} can't be read ({type(error).__name__}: {error}); it must be {right}"
        ) from error


def json_rows(what: str, path: Path, texts: Sequence[str]) -> Rows:
    """The rows of a file that holds a JSON object a line, or a list of them; `texts` must be strings. Errors name file and row."""
    with _opened(what, path, f"a JSON object a line, with {' and '.join(texts)}") as file:
        first = file.readline()
        if first.lstrip().startswith("["):
            yield from checked_rows(f"{what}: {path}, row", json.loads(first + file.read()), texts)
        else:
            yield from checked_rows(f"{what}: {path}, line", itertools.chain([first], file), texts)


def checked_rows(where: str, rows: Iterable[Any], texts: Sequence[str]) -> Rows:
    """The rows, dicts or lines of JSON, each with its place; their `texts` are strings that can be written."""
    for number, row in enumerate(rows, start=1):
        place = f"{where} {number}"
        if isinstance(row, str):
            if row.isspace() or not row:
                continue
            try:
                row = json.loads(row)
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"{place} is no JSON: {error}") from error
        for name in texts:
            text = row.get(name) if isinstance(row, dict) else None
            if not isinstance(text, str):
                has = f"the fields {', '.join(row)}" if isinstance(row, dict) else f"a {type(row).__name__}"
                raise ConfigError(f"{place} has {has}, but must have a string {name!r}; it holds {text!r}")
            if not text.isascii() and re.search("[\ud800-\udfff]", text):
                raise ConfigError(f"{place}: {name!r} holds half a character, which no text can be (a lone surrogate)")
        yield place, row


def blocks(chunks: Iterable[str], size: int = BLOCK) -> Iterator[str]:
    """A text in documents of `size` to 8 `size` characters that end at a blank line, else a line's end, else anywhere."""
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
        before, blank, after = rest[size:].partition("\n\n")
        yield rest[:size] + before + blank
        rest = after


def _hub(data: str, streaming: bool) -> Corpus:
    hub = PRESETS.get(data)
    if hub is None:
        path, config = _HUB.fullmatch(data).groups()
        hub = Hub(path, config, data.removeprefix(HUB_PREFIX), "", "")
    sets = _load(data, hub, streaming)
    train = sets.get("train")
    if train is None:
        raise ConfigError(f"data={data!r}: has splits {', '.join(sets)}, but no train")
    info = train.info
    licence = hub.licence or str(info.license or NOT_STATED)
    attribution = hub.attribution or " ".join((info.citation or info.homepage or NOT_STATED).split())
    validation = _hub_documents(data, hub, sets["validation"]) if "validation" in sets else None
    return Corpus(hub.name, licence, attribution, _hub_documents(data, hub, train), validation)


def _load(data: str, hub: Hub, streaming: bool) -> dict[str, Any]:
    reader = hub.path.isidentifier() and importlib.util.find_spec(f"datasets.packaged_modules.{hub.path}")
    if os.path.exists(hub.path) or reader and not hub.files:  # `datasets` would read what lies here
        raise ConfigError(f"data={data!r}: {hub.path!r} means files in {Path.cwd()} to `datasets`, no data set of the Hub; for "
                          "local text give its path, such as ./text; else start from another folder")  # fmt: skip
    options = {"data_files": hub.files, "keep_linebreaks": True} if hub.files else {}
    right = "it must be a data set of the Hub (hub:OWNER/NAME or hub:OWNER/NAME/CONFIG), and the Hub must be reachable"
    return dict(from_hub(f"data={data!r}", right, hub.path, hub.config, streaming=streaming, **options))


def from_hub(what: str, right: str, path: str, *config: str | None, **options: Any) -> Any:
    """`datasets.load_dataset`; its errors (no network, no such data set, a gated one) say whose data these are and what is right."""
    from datasets import load_dataset

    try:
        return load_dataset(path, *config, **options)
    except Exception as error:
        raise ConfigError(
            f"{what}: `datasets` can't load {path!r} ({type(error).__name__}: {error}); {right}"
        ) from error


def _hub_documents(data: str, hub: Hub, rows: Any) -> Documents:
    """A row is a document, and a unit: copies of it lie on the same side of the split."""
    texts = (row["text"] for _, row in checked_rows(f"data={data!r}: row", rows, ["text"]))
    if hub.files:
        return ((data, block) for block in blocks(texts))
    documents = _articles(texts) if hub.path == "Salesforce/wikitext" else filter(None, texts)
    return ((text, text) for text in documents)


def _articles(lines: Iterable[str]) -> Iterator[str]:
    """WikiText has a line a row; an article begins at a heading of the first level, ` = Title = `."""
    article: list[str] = []
    for line in itertools.chain(lines, [None]):
        if line is None or re.fullmatch(r" = [^=].* = \n?", line):
            if any(article):
                yield "\n".join(article)
            article = []
        article.append((line or "").rstrip("\n"))
