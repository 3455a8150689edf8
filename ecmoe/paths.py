"""Where things lie, and what the key `data` names: nothing depends on the working folder of a notebook, or on a file's name.

`data` may end in the content of its files, `data/book.txt#1a2b3c4d5e6f7a8b`. RunConfig adds it where the files are here, so that
another text is another run; stated in YAML, the runs are found where the text isn't.
"""

import contextlib
import hashlib
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import NoReturn

from ecmoe.files import ConfigError, content_sha256, write_text

# What `data` names: images, texts, and all else is a path.
IMAGES, IMAGES_PREFIX = ("digits", "cifar10"), "images:"
KNOWN_TEXTS, HUB_PREFIX = ("stdlib", "c4", "wikitext-103", "enwik8"), "hub:"
MIX_PREFIX = "mix:"  # several texts, in equal shares
TEXT_FILES, ROW_FILES = (".txt", ".txt.xz", ".txt.gz"), (".jsonl", ".json", ".jsonl.xz", ".jsonl.gz")
IMAGE_FILES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".jpgs.xz", ".idx.xz")
_CONTENT = re.compile(r"#[0-9a-f]{16}$")


def root() -> Path:
    """$ECMOE_HOME, else the checkout that holds this package, else the working folder."""
    home = os.environ.get("ECMOE_HOME")
    if home:
        return Path(os.path.expanduser(home)).resolve()
    checkout = Path(__file__).resolve().parents[1]
    return checkout if (checkout / "pyproject.toml").is_file() else Path.cwd()


def configs() -> Path:
    """Scales, arms, pages and the protocol: $ECMOE_CONFIGS, else of the checkout that holds this package."""
    return Path(os.environ.get("ECMOE_CONFIGS") or Path(__file__).resolve().parents[1] / "configs")


def runs() -> Path:
    """Folders of runs."""
    return root() / "runs"


def cache() -> Path:
    """What can be made again: tokenised corpora."""
    return root() / ".cache"


def records(scale: str) -> Path:
    """Small records of the runs at `scale`."""
    return root() / "reports" / scale / "runs"


def measures(scale: str) -> Path:
    """What was measured on the runs at `scale`."""
    return root() / "reports" / scale / "measures"


def resolve(name: str | Path) -> Path:
    """The file or folder `name` means: relative to the working folder, else to the root."""
    path = Path(os.path.expanduser(name))  # which, unlike Path's, leaves alone the ~ of a user that isn't known
    return path if path.exists() else root() / path  # which is an absolute path itself


def parts_of(data: str) -> list[str]:
    """The texts of a mix, `mix:A,B`; else `data` alone. Without their content."""
    data = _CONTENT.sub("", data)
    return data.removeprefix(MIX_PREFIX).split(",") if data.startswith(MIX_PREFIX) else [data]


def is_local(data: str) -> bool:
    """Does it name a file or a folder, here or not, rather than what is known or the Hub's?"""
    return data not in (*KNOWN_TEXTS, *IMAGES) and not data.startswith(HUB_PREFIX)


def content_of(data: str) -> str:
    """`#` and 16 hex digits, what the key `data` says of its files' content; "" if nothing."""
    found = _CONTENT.search(data)
    return found[0] if found else ""


def plain(data: str) -> str:
    """`data` without its files' content."""
    return data.removesuffix(content_of(data))


def with_content(data: str) -> str:
    """`data` and, of local files, their content: `#` and 16 hex digits of a SHA-256.

    Where it is stated, it stays. Where the files aren't here, it is what they held when last read, if that is known.

    Raises:
        ConfigError: a file can't be read.
    """
    local = [part for part in parts_of(data) if is_local(part)]
    if content_of(data) or not local:
        return data
    files = [local_files(part) for part in local]
    if all(files):
        named = {f"{i}:{name}": path for i, part in enumerate(files) for name, path in part.items()}
        return f"{data}#{content_sha256(named)[:16]}"
    remembered = _remembered(data)
    return data + remembered.read_text() if remembered.is_file() else data


def check_content(data: str) -> None:
    """Raise a ConfigError where the files that `data` names hold something else than it states."""
    stated, found = content_of(data), content_of(with_content(plain(data)))
    if stated and stated != found:
        raise ConfigError(f"data={data!r}: the files hold {found or 'nothing'} by now, not what is stated: bring that back, or leave "
                          f"out {stated}")  # fmt: skip


def remember_content(data: str) -> None:
    """Keep what `with_content` adds for a text that was read, for when it is gone and its runs and tokens are not."""
    if content_of(data) and not (_remembered(data).is_file() and _remembered(data).read_text() == content_of(data)):
        with contextlib.suppress(OSError):  # a cache that can't be written
            write_text(_remembered(data), content_of(data))


def _remembered(data: str) -> Path:
    places = [str(_path(part)) for part in parts_of(data)]
    return cache() / "sources" / hashlib.sha256(repr(places).encode()).hexdigest()[:16]


def local_files(data: str) -> dict[str, Path]:
    """The files of a local text or a folder of images, by their path relative to it; none where there are none."""
    path, kinds = _path(data), IMAGE_FILES if data.startswith(IMAGES_PREFIX) else TEXT_FILES + ROW_FILES
    if not path.is_dir():
        return {path.name: path} if path.is_file() and path.name.lower().endswith(kinds) else {}
    return files_below(path, kinds)


def files_below(path: Path, kinds: tuple[str, ...], without: Collection[str] = ()) -> dict[str, Path]:
    """Files of a folder that end so, by their path relative to it; none that are hidden, or in folders that are or are called so.
    Links are followed."""
    found = {}
    for folder, folders, names in os.walk(path, onerror=_unreadable, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in without]
        for link in (Path(folder, name) for name in folders if Path(folder, name).is_symlink()):
            if link.resolve() in {above.resolve() for above in link.parents}:
                raise ConfigError(f"{link} is a link to a folder that holds it: remove it")
        for file in (Path(folder, name) for name in names if name.lower().endswith(kinds) and not name.startswith(".")):
            if not file.exists():
                raise ConfigError(f"{file} is a link to nothing: mend or remove it")
            if not file.is_file():
                raise ConfigError(f"{file} is no regular file, so reading it may never end: remove it")
            found[file.relative_to(path).as_posix()] = file
    return dict(sorted(found.items()))


def _unreadable(error: OSError) -> NoReturn:
    raise ConfigError(f"{error.filename} can't be read: {error.strerror}") from error


def _path(data: str) -> Path:
    return resolve(data.removeprefix(IMAGES_PREFIX)).absolute()
