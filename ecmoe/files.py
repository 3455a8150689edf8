"""Files: written by rename, so that each is there whole or not at all; read with path and remedy in every error."""

import difflib
import errno
import hashlib
import json
import math
import mmap
import os
import re
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml


class ConfigError(ValueError):
    """What a user wrote, or a file that they can mend, can't be used. Names key or path, value and remedy."""


class Damaged(ConfigError):
    """A file of our own that isn't what was written. Names it, and what to do."""

    def __init__(self, path: Path, why: object) -> None:
        super().__init__(f"{path} is damaged ({why}): delete it, and the run is done again")


def nearest(name: object, known: Iterable[str], listed: str = "") -> str:
    """For an error: which of the names may have been meant; else all of them, or where they are `listed`."""
    name, known = str(name), list(known)
    near = [other for other in known if name == "".join(word[:1] for word in other.split("_"))]  # lr: learning_rate
    alike = {other.lower().replace("-", "_"): other for other in known}
    near += [alike[word] for word in difflib.get_close_matches(name.lower().replace("-", "_"), alike, n=1)]
    near += [other for other in known if len(name) > 2 and name.lower() in other]
    return f"did you mean {near[0]}?" if near else listed or f"must be one of {', '.join(known) or 'none'}"


def check_known(what: str, names: Iterable[object], known: Collection[object], listed: str = "") -> None:
    """Raise a ConfigError at the first name that isn't known: `what` it is, the name, and which may have been meant."""
    for name in names:
        if name not in known:
            raise ConfigError(f"{what} {name!r}: {nearest(name, map(str, known), listed)}")


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to. It becomes `path` where the block ends well, and is gone where it doesn't.

    The name holds the process's number, so that two writers never share it; the last to end wins.

    Raises:
        OSError: the disk is full; says which file and what to do.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with disk_may_be_full(path):
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())  # a rename may reach the disk before what it names
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def disk_may_be_full(path: Path) -> Iterator[None]:
    """Where it is, the error says that `path` was being written, and what to do."""
    try:
        yield
    except Exception as error:
        # Who writes tensors says it in words of their own, or not at all.
        in_words = "os error 28" in str(error) or "Writer" in str(error) and shutil.disk_usage(path.parent).free < 2**20
        if in_words or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            said = f"no space left to write {path}: free some, then call again; what was finished is kept"
            raise OSError(errno.ENOSPC, said) from error
        raise


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 by rename."""
    with written(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Mapping[str, Any], indent: int | None = 1, sealed: bool = False) -> None:
    """Write by rename; numpy's and torch's numbers become Python's, and what isn't finite becomes null.

    Args:
        sealed: with a check sum, `check`, by which `read_json` finds what has changed since.
    """
    said = dict(plain(value))
    if sealed:
        said["check"] = check_sum(said)
    write_text(path, json.dumps(said, indent=indent, allow_nan=False, ensure_ascii=False) + "\n")


def check_sum(value: Mapping[str, Any]) -> str:
    """16 hex digits of a value of JSON, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def read_json(path: Path, sealed: bool = False) -> dict[str, Any]:
    """What `write_json` wrote; `sealed`: as it did.

    Raises:
        Damaged: it is not what was written.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # no JSON, or cut within a letter
        raise Damaged(path, error) from error
    if not isinstance(value, dict):
        raise Damaged(path, f"it holds {type(value).__name__}, not a dict")
    if sealed and value.pop("check", None) != check_sum(value):
        raise Damaged(path, "its check sum is another: somebody or something has changed it")
    return value


def plain(value: Any) -> Any:
    """As JSON has it: numpy's numbers become Python's, and what isn't finite becomes null."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def sha256(path: Path) -> str:
    """64 hex digits of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(path: Path) -> None:
    """Add a file's SHA-256 at its end, 64 hex digits, which readers of archives pass over."""
    said = sha256(path)
    with path.open("ab") as file:
        file.write(said.encode())


def sealed(path: Path) -> bool:
    """Is it as it was when `seal` ended it?"""
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        memoryview(content) as view,
    ):
        return hashlib.sha256(view[:-64]).hexdigest().encode() == view[-64:]


def content_sha256(files: Mapping[str, Path]) -> str:
    """64 hex digits of the content of several files and of their names; wherever they lie, whenever they were written.

    Raises:
        ConfigError: a file can't be read.
    """
    total = hashlib.sha256()
    for name, path in files.items():
        try:
            total.update(f"{name}\0{sha256_once(path)}\n".encode(errors="surrogateescape"))
        except OSError as error:
            raise ConfigError(f"{path} can't be read: {error.strerror}") from error
    return total.hexdigest()


def sha256_once(path: Path) -> str:
    """`sha256`, read once a process as long as the file is as it was: nobody can set back its st_ctime."""
    stat = path.stat()
    return _sha256(path, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


@lru_cache(maxsize=1 << 17)
def _sha256(path: Path, *state: int) -> str:
    return sha256(path)


def read_yaml(path: str | Path, what: str) -> Any:
    """What a YAML file holds; `what` says in an error whose file it is.

    Raises:
        ConfigError: there is no such file, or it is no YAML in UTF-8; as in `parse_yaml`.
    """
    try:
        return parse_yaml(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # ValueError: not UTF-8
        raise ConfigError(f"{what} {str(path)!r} can't be read: {error}") from error


def parse_yaml(text: str) -> Any:
    """YAML, but nothing that says something else than it seems to.

    Raises:
        ConfigError: no YAML; a key that stands twice; `010`, which YAML takes for 8, and `1:30`, which it takes for 90.
    """
    try:
        return yaml.load(text, _StrictLoader)  # a SafeLoader
    except RecursionError:
        raise ConfigError("nested too deeply") from None
    except (ValueError, yaml.YAMLError) as error:  # ValueError: a date or number that can't be
        raise ConfigError(str(error)) from error


def assignments(pairs: Iterable[str] | None) -> dict[str, Any]:
    """`key=value`, such as after --set, as in YAML: 2 is a number, null is nothing, 1.0e-3 is a number. A ConfigError as in `parse_yaml`."""
    values = {}
    for pair in pairs or ():
        key, equals, text = pair.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set {pair!r} must be key=value, such as capacity_factor=1.0")
        try:
            values[key.strip()] = parse_yaml(text)
        except ConfigError as error:
            raise ConfigError(f"--set {pair!r}: {text!r} is no YAML value: {error}") from error
    return values


class _StrictLoader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        pairs = node.value if isinstance(node.value, list) else []
        keys = [key for key, _ in pairs if isinstance(key, yaml.ScalarNode)]
        first = {key.value: key for key in reversed(keys)}
        for key in keys:
            if first[key.value] is not key:
                raise yaml.MarkedYAMLError(None, None, f"key {key.value!r} stands twice: leave one", key.start_mark)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        value = super().construct_yaml_int(node)
        if ":" in node.value or re.match(r"[-+]?0[0-9_]", node.value):
            said = f"YAML takes {node.value} for {value}: write the number that you mean"
            raise yaml.MarkedYAMLError(None, None, said, node.start_mark)
        return value


_StrictLoader.add_constructor("tag:yaml.org,2002:int", _StrictLoader.construct_yaml_int)
