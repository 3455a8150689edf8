"""Sources of text: a corpus is a stream of documents with a name, a licence and an attribution.

The key `data` names `stdlib` (Python's standard library, available everywhere), a local file or folder, a data set of
the Hub, or a mix of several texts, each of which this module opens separately."""

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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from ecmoe import paths
from ecmoe.files import ConfigError, content_sha256, nearest, read_yaml

# A text file doesn't mark its documents, so it is cut at the first blank line after BLOCK characters (see `blocks`).
BLOCK = 1 << 14
NOT_STATED = "not stated"

# (unit, text): all documents of a unit are on the same side of the training/validation split.
Documents = Iterable[tuple[str, str]]
# (place, row): a row of a data set, preceded by its place for error messages.
Rows = Iterator[tuple[str, dict[str, Any]]]


class Corpus(NamedTuple):
    """Documents, and what reports say of them. validation: the source's own split; None: split some off `train`."""

    name: str
    licence: str
    attribution: str
    train: Documents
    validation: Documents | None = None


class Hub(NamedTuple):
    """A data set of the Hub that `datasets` can read without running its author's code."""

    path: str
    config: str | None
    name: str
    licence: str = ""  # "": as the Hub states it
    attribution: str = ""
    options: Mapping[str, Any] = {}


PRESETS = {
    "c4": Hub("allenai/c4", "en", "C4 (en)", "ODC-BY 1.0; Common Crawl's terms of use",
              "Raffel et al. 2020, as prepared by the Allen Institute for AI"),
    "wikitext-103": Hub("Salesforce/wikitext", "wikitext-103-raw-v1", "WikiText-103 (raw)", "CC BY-SA 3.0 and GFDL",
                        "Merity et al. 2016; text by the authors of English Wikipedia"),
    # The Hub's enwik8 is a script, which `datasets` no longer runs, so read the original file with the text loader.
    "enwik8": Hub("text", None, "enwik8", "GFDL 1.2; CC BY-SA 3.0",
                  "Mahoney, Large Text Compression Benchmark; text by the authors of English Wikipedia",
                  {"data_files": "https://mattmahoney.net/dc/enwik8.zip", "keep_linebreaks": True}),
}  # fmt: skip
# The standard library's tests are most of its text, and missing on some systems, so they are left out.
_NO_TEXT = ("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib-dynload")
_NAME = r"[A-Za-z0-9]\w*(?:[.-]\w+)*"  # an owner, data set or config of the Hub, but no `..` and no hidden folder
_HUB = re.compile(f"{paths.HUB_PREFIX}({_NAME}(?:/{_NAME})?)(?:/({_NAME}))?")


def source_key(data: str) -> str:
    """Return what the tokens of `data` depend on: names of Hub data sets, content hashes of files (perhaps stated)."""
    stated, named = paths.content_of(data), []
    for part in paths.parts_of(data):
        known = stated and paths.is_local(part)  # the stated hash is enough: the files may be missing
        named.append("" if known else content_sha256(files) if (files := part_files(part)) else part)
    return ",".join(named) + stated


def source_sha256(data: str) -> str | None:
    """Return a SHA-256 of the files of `data`, None if it has none (Hub); raise a ConfigError if a text is missing."""
    parts = enumerate(map(part_files, paths.parts_of(data)))
    files = {f"{i}:{name}": path for i, part in parts for name, path in part.items()}
    return content_sha256(files) if files else None


def part_files(part: str) -> dict[str, Path]:
    """Return the files of a text (not a mix), relative path -> path, empty for the Hub; a ConfigError if there are none."""
    if part == "stdlib":
        return paths.files_below(Path(sysconfig.get_path("stdlib")), (".py",), _NO_TEXT)
    if not paths.is_local(part) and (not part.startswith(paths.HUB_PREFIX) or _HUB.fullmatch(part)):
        return {}
    if files := paths.local_files(part):
        return files
    if os.path.lexists(path := paths.resolve(part)):
        kinds = ", ".join(paths.TEXT_FILES + paths.ROW_FILES)
        raise ConfigError(f"data={part!r}: {path} exists, but must be a file ending in {kinds}, or a folder of them")
    known = [*paths.KNOWN_TEXTS, *paths.IMAGES, "hub:NAME", "hub:OWNER/NAME/CONFIG", "a path"]
    where = " or ".join(dict.fromkeys(map(str, (Path.cwd(), paths.root()))))
    hint = f"{nearest(part, known)}; README.md says where the study's texts come from"
    raise ConfigError(f"data={part!r}: no such file or folder in {where}; {hint}")


def open_corpus(data: str, streaming: bool = False) -> Corpus:
    """Open the corpus that `data` (not a mix) names. streaming: read a Hub data set without downloading all of it."""
    files = part_files(data)
    if data == "stdlib":
        return Corpus(
            f"the standard library of Python {platform.python_version()} (without its tests)",
            "PSF License Agreement, version 2",
            "Python Software Foundation and contributors",
            ((name, path.read_text(encoding="utf-8", errors="replace")) for name, path in files.items()),
        )
    return Corpus(**about(data), train=_local(data, files)) if files else _hub(data, streaming)


def about(data: str) -> dict[str, str]:
    """Return name, licence and attribution of local files, as stated in `PATH.about.yaml` if that exists."""
    path = os.path.abspath(paths.resolve(data))  # removes a trailing slash
    said = {"name": os.path.basename(path), "licence": NOT_STATED, "attribution": NOT_STATED}
    beside = Path(f"{path}.about.yaml")
    if not beside.is_file():
        return said
    stated = read_yaml(beside, f"data={data!r}:")
    if not isinstance(stated, dict) or not set(stated) <= set(said):
        raise ConfigError(f"data={data!r}: {beside} must have only the keys {', '.join(said)}; it has {stated!r}")
    return said | {key: str(value) for key, value in stated.items()}


def described(data: str, parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Describe a corpus for reports: `parts` as stored with its tokens, updated by `about`, and combined for a mix."""
    parts = [
        part | (about(one) if paths.is_local(one) else {}) | {"data": one, "share": 1 / len(parts)}
        for one, part in zip(paths.parts_of(data), parts, strict=True)
    ]
    if len(parts) == 1:
        return {key: parts[0][key] for key in ("name", "licence", "attribution", "split")}
    said = {"name": " + ".join(f"{part['share']:.0%} {part['name']}" for part in parts)}
    for key in ("licence", "attribution", "split"):
        said[key] = "; ".join(f"{part['name']}: {part[key]}" for part in parts)
    return said | {"parts": parts}


def _local(data: str, files: dict[str, Path]) -> Iterator[tuple[str, str]]:
    """Yield (unit, text) of local files: text files in blocks, a unit per file; JSON files by row, a unit per text."""
    for name, path in files.items():
        if name.lower().endswith(paths.TEXT_FILES):
            with _opened(f"data={data!r}", path, "UTF-8 text") as file:
                yield from ((name, block) for block in blocks(iter(lambda file=file: file.read(1 << 20), "")))
        else:
            rows = json_rows(f"data={data!r}", path, ["text"])
            yield from ((row["text"], row["text"]) for _, row in rows if row["text"])


@contextmanager
def _opened(what: str, path: Path, right: str) -> Iterator[TextIO]:
    """Open a text file, perhaps compressed; turn errors in reading it into a ConfigError that ends in `right`."""
    reader = {".xz": lzma.open, ".gz": gzip.open}.get(path.suffix.lower(), open)
    try:
        with reader(path, "rt", encoding="utf-8-sig") as file:
            yield file
    except ConfigError:
        raise
    except (OSError, EOFError, ValueError, RecursionError, lzma.LZMAError, zlib.error) as error:
        told = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{what}: {path} can't be read ({told}); it must be {right}") from error


def json_rows(what: str, path: Path, texts: Sequence[str]) -> Rows:
    """Yield `checked_rows` of a file that holds JSON Lines or a list of JSON objects. Errors name the file and row."""
    with _opened(what, path, f"a JSON object a line, with {' and '.join(texts)}") as file:
        first = file.readline()
        whole = first.lstrip().startswith("[")
        rows = json.loads(first + file.read()) if whole else itertools.chain([first], file)
        yield from checked_rows(f"{what}: {path}, {'row' if whole else 'line'}", rows, texts)


def checked_rows(where: str, rows: Iterable[Any], texts: Sequence[str]) -> Rows:
    """Yield (place, row) of dicts or JSON lines; raise a ConfigError unless their fields `texts` are UTF-8 strings."""
    for number, row in enumerate(rows, start=1):
        place = f"{where} {number}"
        if isinstance(row, str):
            if not row.strip():
                continue
            try:
                row = json.loads(row)
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"{place} isn't JSON: {error}") from error
        for name in texts:
            text = row.get(name) if isinstance(row, dict) else None
            if not isinstance(text, str):
                has = f"the fields {', '.join(row)}" if isinstance(row, dict) else f"a {type(row).__name__}"
                raise ConfigError(f"{place} has {has}, but must have a string {name!r}; it holds {text!r}")
            if not text.isascii() and re.search("[\ud800-\udfff]", text):
                raise ConfigError(f"{place}: {name!r} has half a character (a lone surrogate): remove it")
        yield place, row


def blocks(chunks: Iterable[str], size: int = BLOCK) -> Iterator[str]:
    """Cut a text into documents of `size` to 8 `size` characters, at a blank line, a line end, or else after `size`."""
    rest = ""
    for chunk in itertools.chain(chunks, [None]):
        rest, start = rest + (chunk or ""), 0
        while len(rest) - start > (0 if chunk is None else 8 * size):
            reach = start + size, start + 8 * size
            end = rest.find("\n\n", *reach) + 2
            if end < 2:
                end = len(rest) if chunk is None else rest.find("\n", *reach) + 1 or start + size
            yield rest[start:end]
            start = end
        rest = rest[start:]


def _hub(data: str, streaming: bool) -> Corpus:
    hub = PRESETS.get(data) or Hub(*_HUB.fullmatch(data).groups(), data.removeprefix(paths.HUB_PREFIX))
    what = f"data={data!r}"
    reader = hub.path.isidentifier() and importlib.util.find_spec(f"datasets.packaged_modules.{hub.path}")
    if os.path.exists(hub.path) or reader and not hub.options:  # `datasets` would read local files instead
        raise ConfigError(f"{what}: `datasets` takes {hub.path!r} for files in {Path.cwd()}, not for a data set of the Hub; for "
                          "local text give its path, such as ./text; else start in another folder")  # fmt: skip
    right = "it must be a data set of the Hub (hub:OWNER/NAME or hub:OWNER/NAME/CONFIG), and the Hub must be reachable"
    sets = dict(from_hub(what, right, hub.path, hub.config, streaming=streaming, **hub.options))
    if "train" not in sets:
        raise ConfigError(f"{what}: has splits {', '.join(sets)}, but must have train")
    info = sets["train"].info
    licence = hub.licence or str(info.license or NOT_STATED)
    attribution = hub.attribution or " ".join((info.citation or info.homepage or NOT_STATED).split())
    sides = {side: _hub_documents(data, hub, sets[side]) for side in ("train", "validation") if side in sets}
    return Corpus(hub.name, licence, attribution, **sides)


def from_hub(what: str, right: str, path: str, *config: str | None, **options: Any) -> Any:
    """Call `datasets.load_dataset`; turn its errors (no network, no such data set) into a ConfigError: `what`, `right`."""
    from datasets import load_dataset

    try:
        return load_dataset(path, *config, **options)
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{what}: `datasets` can't load {path!r} ({told}); {right}") from error


def _hub_documents(data: str, hub: Hub, rows: Any) -> Documents:
    """Yield (unit, text): a row is a document and its own unit, so that copies are on the same side of the split."""
    texts = (row["text"] for _, row in checked_rows(f"data={data!r}: row", rows, ["text"]))
    if hub.options:
        return ((data, block) for block in blocks(texts))
    documents = _articles(texts) if hub.path == "Salesforce/wikitext" else filter(None, texts)
    return ((text, text) for text in documents)


def _articles(lines: Iterable[str]) -> Iterator[str]:
    """Join WikiText's rows, one per line, into articles, which begin at a first-level heading, ` = Title = `."""
    article: list[str] = []
    for line in itertools.chain(lines, [None]):
        if line is None or re.fullmatch(r" = [^=].* = \n?", line):
            if any(article):
                yield "\n".join(article)
            article = []
        article.append((line or "").rstrip("\n"))
