"""Read and write files: atomic writes (a file is complete or absent), and errors that name the path and the remedy."""

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
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import yaml


class ConfigError(ValueError):
    """A user's setting or input file can't be used. The message names the key or path, the value, and the remedy."""


class Damaged(ConfigError):
    """A file written by ecmoe lacks what it must hold, or was changed. Raise it with the path and the reason; the message adds
    the remedy."""

    def __str__(self) -> str:
        path, why = self.args
        return f"{path} is damaged ({why}): delete it, then compute it again"


class Stored(dict[str, Any]):
    """A mapping in a stored JSON file, at any depth: a dict, but a missing key raises Damaged, with file and key."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self.path = path

    def __missing__(self, key: str) -> Any:
        raise Damaged(self.path, f"it has no {key}")


def nearest(name: object, known: Iterable[str], listed: str = "") -> str:
    """Return a hint for an error message: the known name closest to `name`, else `listed`, else all known names."""
    name, known = str(name), list(known)
    near = [other for other in known if name == "".join(word[:1] for word in other.split("_"))]  # lr -> learning_rate
    alike = {other.lower().replace("-", "_"): other for other in known}
    near += [alike[word] for word in difflib.get_close_matches(name.lower().replace("-", "_"), alike, n=1)]
    near += [other for other in known if len(name) > 2 and name.lower() in other]
    return f"did you mean {near[0]}?" if near else listed or f"must be one of {', '.join(known) or 'none'}"


def check_known(what: str, names: Iterable[object], known: Collection[object], listed: str = "") -> None:
    """Raise a ConfigError for the first of `names` that isn't in `known`: "<what> <name>: <hint>" (see `nearest`)."""
    for name in names:
        if name not in known:
            raise ConfigError(f"{what} {name!r}: {nearest(name, map(str, known), listed)}")


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """Yield a temporary path, renamed to `path` if the block succeeds, else deleted. Of concurrent writers the last to finish wins.
    The OSError of a full disk names the file and the remedy."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # two processes never share it
    try:
        with disk_may_be_full(path):
            temporary.touch()
            mode = temporary.stat().st_mode  # the user's default, which not all writers keep
            yield temporary
            temporary.chmod(mode)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())  # otherwise the rename may reach the disk before the content
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def disk_may_be_full(path: Path) -> Iterator[None]:
    """Turn errors caused by a full disk, a quota or a size limit into an OSError that names the file, `path`, and the remedy."""
    try:
        yield
    except Exception as error:
        # The writers of tensors report the number only in the text of their error, or not at all.
        stated = re.search(r"os error (\d+)", str(error))
        number = int(stated[1]) if stated else getattr(error, "errno", None)
        if "Writer" in str(error) and shutil.disk_usage(path.parent).free < 2**20:
            number = errno.ENOSPC
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            remedy = "raise the limit (ulimit -f)" if number == errno.EFBIG else "free some space"
            said = f"{os.strerror(number)}, for {path}: {remedy}, then call again; what was finished is kept"
            raise OSError(number, said) from error
        raise


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with written(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Mapping[str, Any], indent: int | None = 1, sealed: bool = False) -> None:
    """Write a JSON file atomically, values converted by `plain`. sealed: with a checksum, by which `read_json` detects changes."""
    said = plain(value)
    write_text(path, _json_text(said | {"check": check_sum(said)} if sealed else said, indent))


def _json_text(value: Mapping[str, Any], indent: int | None) -> str:
    return json.dumps(value, indent=indent, allow_nan=False, ensure_ascii=False) + "\n"


def check_sum(value: Mapping[str, Any]) -> str:
    """Return a checksum of a JSON value: 16 hex digits, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def read_json(path: Path, sealed: bool = False) -> Stored:
    """Read what `write_json` wrote. Raise Damaged if it is no JSON object, or, with `sealed`, any byte of it was changed."""
    try:
        text = path.read_text(encoding="utf-8")
        value = json.loads(text, object_hook=partial(Stored, path))
        if not isinstance(value, Stored):
            raise ValueError(f"it holds {type(value).__name__}, not a dict")
        if sealed:
            value.pop("check", None)
            whole = value | {"check": check_sum(value)}
            # The checksum is of values, and other digits may be the same float, so compare the text.
            if text not in (_json_text(whole, indent=1), _json_text(whole, indent=None)):
                raise ValueError("its check sum doesn't match: it was changed after it was written")
    except (ValueError, RecursionError) as error:  # also invalid JSON or UTF-8
        raise Damaged(path, error) from error
    return value


def plain(value: Any) -> Any:
    """Convert a value for JSON: numpy and torch scalars to Python's, non-finite numbers to None, other types to str."""
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
    """Return the SHA-256 of a file's content, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(path: Path) -> None:
    """Append a file's SHA-256, 64 hex digits, to the file itself; readers of archives ignore the extra bytes."""
    said = sha256(path)
    with path.open("ab") as file:
        file.write(said.encode())


def sealed(path: Path) -> bool:
    """Return whether the file still matches the SHA-256 that `seal` appended."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return hashlib.sha256(memoryview(content)[:-64]).hexdigest().encode() == content[-64:]


def content_sha256(files: Mapping[str, Path]) -> str:
    """Return one SHA-256, 64 hex digits, of the names (keys) and contents of files; raise a ConfigError if one can't be read."""
    total = hashlib.sha256()
    for name, path in files.items():
        try:
            total.update(f"{name}\0{sha256_once(path)}\n".encode(errors="surrogateescape"))
        except OSError as error:
            raise ConfigError(f"{path} can't be read: {error.strerror}") from error
    return total.hexdigest()


def sha256_once(path: Path) -> str:
    """Return `sha256(path)`, cached in this process until the file changes (st_ctime can't be set back)."""
    stat = path.stat()
    return _sha256(path, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


@lru_cache(maxsize=1 << 17)
def _sha256(path: Path, *state: int) -> str:
    return sha256(path)


def read_yaml(path: str | Path, what: str) -> Any:
    """Read a YAML file. Raise a ConfigError that begins with `what`, its purpose, if it can't be read or `parse_yaml` refuses it."""
    try:
        return parse_yaml(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # ValueError: not UTF-8
        raise ConfigError(f"{what} {str(path)!r} can't be read: {error}") from error


def parse_yaml(text: str) -> Any:
    """Parse YAML. Raise a ConfigError if it is invalid, has a key twice, or a number that YAML misreads: `010` as 8, `1:30` as 90."""
    try:
        return yaml.load(text, _StrictLoader)  # a SafeLoader
    except RecursionError:
        raise ConfigError("nested too deeply") from None
    except yaml.YAMLError as error:
        raise ConfigError(str(error)) from error
    except Exception as error:  # of any type, for an impossible date or number, or a tag that doesn't fit: `!!bool x`
        raise ConfigError(f"a value doesn't fit its type ({error!r}): correct it, or put it in quotes") from error


def assignments(pairs: Iterable[str] | None) -> dict[str, Any]:
    """Parse `key=value` pairs (--set), the values as YAML; raise a ConfigError where `parse_yaml` would."""
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
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        seen: set[str] = set()
        for key in [key for key, _ in pairs if isinstance(key, yaml.ScalarNode)]:
            if key.value in seen:
                raise yaml.MarkedYAMLError(None, None, f"key {key.value!r} occurs twice: remove one", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> float:
        whole = node.tag.endswith("int")
        value = (super().construct_yaml_int if whole else super().construct_yaml_float)(node)
        if ":" in node.value or whole and re.match(r"[-+]?0[0-9_]", node.value):
            said = f"YAML takes {node.value} for {value}: write the number that you mean"
            raise yaml.MarkedYAMLError(None, None, said, node.start_mark)
        return value


for _kind in ("int", "float"):
    _StrictLoader.add_constructor(f"tag:yaml.org,2002:{_kind}", _StrictLoader.construct_number)
