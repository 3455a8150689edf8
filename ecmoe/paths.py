"""The project's folders, and the files that the key `data` names, independent of a notebook's working folder.

`data` may end in a hash of its files' content, `data/book.txt#1a2b3c4d5e6f7a8b`. RunConfig appends it if the files
exist, so that a different text is a different run. If YAML states the hash, runs are found without the text."""

import contextlib
import hashlib
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import NoReturn

from ecmoe.files import ConfigError, content_sha256, write_text

# Special values and prefixes of `data`; any other value is a path.
IMAGES, IMAGES_PREFIX = ("digits", "cifar10"), "images:"
KNOWN_TEXTS, HUB_PREFIX = ("stdlib", "c4", "wikitext-103", "enwik8"), "hub:"
MIX_PREFIX = "mix:"  # several texts, in equal shares
TEXT_FILES, ROW_FILES = (".txt", ".txt.xz", ".txt.gz"), (".jsonl", ".json", ".jsonl.xz", ".jsonl.gz")
IMAGE_FILES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".jpgs.xz", ".idx.xz")
_CONTENT = re.compile(r"#[0-9a-f]{16}$")


def root() -> Path:
    """Return the project's root: $ECMOE_HOME, else the checkout that contains this package, else the working folder."""
    if home := os.environ.get("ECMOE_HOME"):
        return Path(os.path.expanduser(home)).resolve()
    checkout = Path(__file__).resolve().parents[1]
    return checkout if (checkout / "pyproject.toml").is_file() else Path.cwd()


def configs() -> Path:
    """Return the folder of YAML configs: $ECMOE_CONFIGS, else `configs` in the checkout that contains this package."""
    return Path(os.environ.get("ECMOE_CONFIGS") or Path(__file__).resolve().parents[1] / "configs")


def runs() -> Path:
    """Return the folder that contains a folder per run."""
    return root() / "runs"


def cache() -> Path:
    """Return the folder of files that can be recomputed, such as tokenised corpora."""
    return root() / ".cache"


def results(scale: str, kind: str) -> Path:
    """Return the folder of a scale's results of one kind: runs (their records), measures, bench (timings), or repeats."""
    return root() / "reports" / scale / kind


def page_name(notebook: str) -> str:
    """Return the name of a notebook's page, without characters that a shell, a pattern or a URL could misread."""
    return re.sub(r"[^\w.-]", lambda odd: f"-{ord(odd[0]):x}-", notebook)


def resolve(name: str | Path) -> Path:
    """Return the path of a file or folder: `name` relative to the working folder if that exists, else to the root."""
    path = Path(os.path.expanduser(name))  # unlike Path.expanduser, doesn't raise for the ~ of an unknown user
    # os.path, as Path's methods raise for a name that is too long; an absolute path stays as it is
    return path if os.path.exists(path) else root() / path


def parts_of(data: str) -> list[str]:
    """Return the texts of a mix, `mix:A,B`, else `data` alone; without the content hash."""
    data = plain(data)
    return data.removeprefix(MIX_PREFIX).split(",") if data.startswith(MIX_PREFIX) else [data]


def is_local(data: str) -> bool:
    """Return whether `data` is a path, existing or not, rather than a known name or a data set of the Hub."""
    return data not in (*KNOWN_TEXTS, *IMAGES) and not data.startswith(HUB_PREFIX)


def content_of(data: str) -> str:
    """Return the content hash at the end of `data`, `#` and 16 hex digits, or "" if it has none."""
    return (_CONTENT.search(data) or [""])[0]


def plain(data: str) -> str:
    """Return `data` without its content hash."""
    return data.removesuffix(content_of(data))


def with_content(data: str) -> str:
    """Append the content hash of local files to `data`: `#` and 16 hex digits of a SHA-256. A hash in `data` is kept. If files are
    missing, the hash stored when they were last read is appended, if any. Raise a ConfigError if one can't be read."""
    local = [part for part in parts_of(data) if is_local(part)]
    if content_of(data) or not local:
        return data
    files = [local_files(part) for part in local]
    if all(files):
        named = {f"{i}:{name}": path for i, part in enumerate(files) for name, path in part.items()}
        return f"{data}#{content_sha256(named)[:16]}"
    remembered = _remembered(data)
    return data + remembered.read_text(encoding="utf-8") if remembered.is_file() else data


def check_content(data: str) -> None:
    """Raise a ConfigError if the files that `data` names don't match its content hash."""
    stated, found = content_of(data), content_of(with_content(plain(data)))
    if stated and stated != found:
        raise ConfigError(f"data={data!r}: the content of the files is {found or 'unknown'}, not what is stated: restore the files, "
                          f"or leave out {stated}")  # fmt: skip


def remember_content(data: str) -> None:
    """Store the content hash of `data`, so that its runs and tokens are still found after the text is deleted."""
    content, place = content_of(data), _remembered(data)
    if content and not (place.is_file() and place.read_text(encoding="utf-8") == content):
        with contextlib.suppress(OSError):  # the cache may be read-only
            write_text(place, content)


def _remembered(data: str) -> Path:
    places = [str(_path(part)) for part in parts_of(data)]
    return cache() / "sources" / hashlib.sha256(repr(places).encode()).hexdigest()[:16]


def local_files(data: str) -> dict[str, Path]:
    """Return the files of a local text or folder of images, relative path -> path; empty if there are none."""
    path, kinds = _path(data), IMAGE_FILES if data.startswith(IMAGES_PREFIX) else TEXT_FILES + ROW_FILES
    if not os.path.isdir(path):
        return {path.name: path} if os.path.isfile(path) and path.name.lower().endswith(kinds) else {}
    return files_below(path, kinds)


def files_below(path: Path, kinds: tuple[str, ...], without: Collection[str] = ()) -> dict[str, Path]:
    """Return the files below a folder that end in one of `kinds`, relative path -> path, following symbolic links.
    Hidden files, hidden folders and folders named in `without` are skipped."""
    found = {}
    for folder, folders, names in os.walk(path, onerror=_unreadable, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in without]
        for link in (Path(folder, name) for name in folders if Path(folder, name).is_symlink()):
            if link.resolve() in {above.resolve() for above in link.parents}:
                raise ConfigError(f"{link} is a link to a folder that holds it: remove it")
        for file in (Path(folder, name) for name in names if name.lower().endswith(kinds) and not name.startswith(".")):
            if not file.is_file():  # reading a pipe may never end
                raise ConfigError(f"{file} is a link to nothing, or no regular file: remove it")
            found[file.relative_to(path).as_posix()] = file
    return dict(sorted(found.items()))


def _unreadable(error: OSError) -> NoReturn:
    raise ConfigError(f"{error.filename} can't be read: {error.strerror}") from error


def _path(data: str) -> Path:
    return resolve(data.removeprefix(IMAGES_PREFIX)).absolute()
