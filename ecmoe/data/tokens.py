"""The tokens of a corpus: made once, kept as memory-mapped files, checked against damage."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ecmoe import paths
from ecmoe.data.corpus import Corpus, open_corpus, source_files, source_key
from ecmoe.data.tokenizer import BPE, END, END_ID, Bytes, Tokenizer, train_bpe
from ecmoe.files import ConfigError, content_sha256, sha256, sha256_once, write_json
from ecmoe.paths import check_content, parts_of, remember_content, with_content

# Part of every cache's name: raise it when the same source would give other tokens.
SCHEMA = 2
VALIDATION = 0.05  # share of the text, where the source has no validation split of its own
BPE_BYTES = 50_000_000  # BPE learns its merges from at most so much text


@dataclass(frozen=True)
class Tokens:
    """A tokenised corpus.

    train, val: (tokens,) memory-mapped ids; of a mix, one part after the other, each as long as the others.
    meta: as in meta.json; `parts` says of each part where it is from.
    """

    train: np.ndarray
    val: np.ndarray
    tokenizer: Tokenizer
    meta: dict[str, Any]

    def windows(self, ids: np.ndarray, length: int) -> np.ndarray:
        """(parts, windows, T+1) consecutive, non-overlapping windows of T = `length`; none reaches into the next part."""
        ids = ids.reshape(len(self.meta["parts"]), -1)
        count = ids.shape[1] // (length + 1)
        return ids[:, : count * (length + 1)].reshape(len(ids), count, length + 1)


def folder(config: Any, cache: Path | None = None) -> Path:
    """Where the tokens of this config are kept: it depends on the content of the text and on the keys that are read here.

    Raises:
        ConfigError: there is no such text, and its content isn't known.
    """
    digest = hashlib.sha256(json.dumps(_keys(config), sort_keys=True).encode()).hexdigest()[:12]
    names = "-".join(Path(part).name for part in parts_of(config.data))
    slug = re.sub(r"[^\w.-]+", "-", names).strip("-")[:40]
    return (cache or paths.cache()) / "tokens" / f"{slug}-{config.tokenizer}{config.vocab_size}-{digest}"


def load(config: Any, cache: Path | None = None, progress: bool = True) -> Tokens:
    """The corpus of `config` in tokens; made on first use, while other processes wait.

    Made again when one of its files is damaged. What was made of a text is found by the text's content.

    Raises:
        ConfigError: no such text and no cache; or a damaged cache without its text.
    """
    from filelock import FileLock

    place = folder(config, cache)
    if _trouble(place):
        if _meta(place) is None:
            source_files(config.data)  # a typing error leaves nothing behind
        place.mkdir(parents=True, exist_ok=True)
        with FileLock(place.parent / f"{place.name}.lock"):
            trouble = _trouble(place)  # another process may have made it meanwhile
            if trouble:
                _make(config, place, trouble, progress)
    remember_content(config.data)
    return _open(place)


def _keys(config: Any) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "data": source_key(with_content(config.data)),
        "max_bytes": config.max_bytes,
        "tokenizer": config.tokenizer,
        "vocab_size": config.vocab_size,
    }


def _open(place: Path) -> Tokens:
    meta = _meta(place)
    train, val = (np.memmap(place / f"{split}.bin", np.dtype(meta["dtype"]), "r") for split in ("train", "val"))
    return Tokens(train, val, BPE(place / "tokenizer.json") if meta["tokenizer"] == "bpe" else Bytes(), meta)


def _meta(place: Path) -> dict[str, Any] | None:
    """meta.json; None if there is none, {} if it is damaged."""
    try:
        meta = json.loads((place / "meta.json").read_text(encoding="utf-8"))
        return meta if meta.pop("check") == _check(meta) else {}
    except FileNotFoundError:
        return None
    except (ValueError, AttributeError, KeyError):
        return {}


def _check(meta: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _trouble(place: Path) -> str | None:
    """What is wrong with the cache, in words; None if nothing is."""
    meta = _meta(place)
    if meta is None:
        return "not tokenised yet"
    if not meta:
        return "meta.json is damaged"
    for name, said in meta["files"].items():
        path = place / name
        if not path.is_file() or path.stat().st_size != said["bytes"]:
            return f"{name} is missing or cut"
        if sha256_once(path) != said["sha256"]:
            return f"{name} is damaged (its SHA-256 differs)"
    return None


def _make(config: Any, place: Path, trouble: str, progress: bool) -> None:
    try:
        source = source_files(config.data)
        check_content(config.data)
        streaming = config.streaming or config.max_bytes > 0  # a part: not the whole download
        corpora = [open_corpus(part, streaming) for part in parts_of(config.data)]
    except ConfigError as error:
        if trouble == "not tokenised yet":
            raise
        raise ConfigError(
            f"data={config.data!r}: the cache {place} can't be used: {trouble}; it can't be made again: {error}"
        ) from error
    (place / "meta.json").unlink(missing_ok=True)
    work = place / "work"
    shutil.rmtree(work, ignore_errors=True)  # of a process that was killed
    work.mkdir()
    try:
        meta = _tokenise(config, corpora, work, _bar(config.data, progress))
        check_content(config.data)  # nobody wrote while it was read
        meta |= {"source_sha256": content_sha256(source) if source else None}
        files_meta = {p.name: {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in sorted(work.iterdir())}
        for name in files_meta:
            os.replace(work / name, place / name)
        meta |= _keys(config) | {"digest": _check(files_meta)[:16], "files": files_meta}
        write_json(place / "meta.json", meta | {"check": _check(meta)})  # last: what it describes is then complete
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _bar(data: str, progress: bool) -> Callable[[str, int | None], Any]:
    from tqdm import tqdm

    disable = None if progress else True  # None: quiet unless a person watches
    return lambda what, total: tqdm(
        desc=f"{what} {Path(data).name}",
        total=total,
        unit="B",
        unit_scale=True,
        disable=disable,
        leave=False,
    )


def _tokenise(config: Any, corpora: list[Corpus], work: Path, bar: Callable[[str, int | None], Any]) -> dict[str, Any]:
    """Read each part once into a spool file and split it, train BPE on the training sides, encode, cut to the shortest."""
    limit = -(-config.max_bytes // len(corpora))
    with contextlib.ExitStack() as files:
        with bar("reading", config.max_bytes or None) as shown:
            spools = [
                _spooled(config, corpus, files.enter_context((work / f"spool.{i}").open("w+b")), limit, shown.update)
                for i, corpus in enumerate(corpora)
            ]
        if config.tokenizer == "bpe":
            share = min(BPE_BYTES // len(spools), *(int(spool.lengths[~spool.is_val].sum()) for spool in spools))
            chosen = [spool.some(share) for spool in spools]
            size = sum(int(spool.lengths[which].sum()) for spool, which in zip(spools, chosen, strict=True))
            with bar("learning BPE from", size) as shown:
                texts = (text.removesuffix(END) for spool, which in zip(spools, chosen, strict=True)
                         for text in spool.read(which, shown.update))  # fmt: skip
                train_bpe(texts, config.vocab_size, work / "tokenizer.json")
            tokenizer: Tokenizer = BPE(work / "tokenizer.json")
        else:
            tokenizer = Bytes()
        dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
        parts = [
            {"name": corpus.name, "licence": corpus.licence, "attribution": corpus.attribution, "split": spool.rule,
             "bytes": int(spool.lengths.sum()), "documents": len(spool.lengths)}
            for corpus, spool in zip(corpora, spools, strict=True)
        ]  # fmt: skip
        meta: dict[str, Any] = {"dtype": dtype.name, "parts": parts}
        with bar("tokenising", sum(part["bytes"] for part in parts)) as shown:
            for side, chosen in (("train", False), ("val", True)):
                paths = [work / f"spool.{side}.{i}" for i in range(len(spools))]
                for path, spool in zip(paths, spools, strict=True):
                    with path.open("wb") as out:
                        _encode(spool.read(np.flatnonzero(spool.is_val == chosen), shown.update), tokenizer, dtype, out)
                shortest = min(path.stat().st_size for path in paths)
                with (work / f"{side}.bin").open("wb") as whole:
                    for path in paths:
                        os.truncate(path, shortest)
                        with path.open("rb") as part:
                            shutil.copyfileobj(part, whole)
                found = counts(np.memmap(work / f"{side}.bin", dtype, "r"), tokenizer.vocab_size)
                meta |= {f"{side}_tokens": int(found.sum()), f"{side}_bytes": int(found @ tokenizer.byte_lengths),
                         f"{side}_documents": int(found[END_ID])}  # fmt: skip
    for path in work.glob("spool.*"):
        path.unlink()
    return meta


def counts(ids: np.ndarray, vocab_size: int, chunk: int = 1 << 22) -> np.ndarray:
    """(tokens,) ids -> (V,) int64 how often each occurs."""
    found = np.zeros(vocab_size, np.int64)
    for start in range(0, len(ids), chunk):
        found += np.bincount(ids[start : start + chunk], minlength=vocab_size)
    return found


@dataclass(frozen=True)
class _Spool:
    """Documents one after the other in a file. lengths: (documents,) bytes. is_val: (documents,) bool; rule: in words."""

    file: Any
    lengths: np.ndarray
    is_val: np.ndarray
    rule: str

    def read(self, chosen: np.ndarray, shown: Callable[[int], Any]) -> Iterator[str]:
        """The texts of the documents whose numbers are `chosen`."""
        starts = np.cumsum(self.lengths) - self.lengths
        for i in chosen:
            self.file.seek(int(starts[i]))
            yield self.file.read(int(self.lengths[i])).decode()
            shown(int(self.lengths[i]))

    def some(self, size: int) -> np.ndarray:
        """Training documents from all over the text, at most `size` bytes of them; at least one."""
        train = np.flatnonzero(~self.is_val)
        train = train[np.random.default_rng(0).permutation(len(train))]
        count = np.searchsorted(self.lengths[train].cumsum(), size, side="right")
        return np.sort(train[: max(count, 1)])


def _spooled(config: Any, corpus: Corpus, file: Any, limit: int, shown: Callable[[int], Any]) -> _Spool:
    """Read at most `limit` bytes (0: all) of a corpus, and decide what validates."""
    lengths, hashes = _spool(corpus.train, file, limit, shown)
    if corpus.validation is None:
        is_val, rule = split(hashes, lengths)
    else:
        more, _ = _spool(corpus.validation, file, -(-limit // 20), shown)  # as large a share as ours
        is_val, rule = np.arange(len(lengths) + len(more)) >= len(lengths), "the source's own"
        lengths = np.concatenate([lengths, more])
    if is_val.all() or not is_val.any():
        raise ConfigError(f"data={config.data!r}: {len(lengths)} documents of {lengths.sum()} bytes of {corpus.name} are too few "
                          "to split into training and validation; take a larger corpus or raise max_bytes")  # fmt: skip
    return _Spool(file, lengths, is_val, rule)


def _spool(
    documents: Iterable[tuple[str, str]], file: Any, max_bytes: int, shown: Callable[[int], Any]
) -> tuple[np.ndarray, np.ndarray]:
    """Append the documents, at most `max_bytes` (0: all) of them; their lengths in bytes and their units' hashes."""
    lengths, hashes, left = array("Q"), array("Q"), max_bytes or float("inf")
    for unit, text in documents:
        data = text.replace(END, "").encode(errors="replace")
        if len(data) >= left:  # cut the last one, between characters
            data = data[: int(left)].decode(errors="ignore").encode()
        if data:
            file.write(data + END.encode())
            lengths.append(len(data) + 1)
            hashes.append(
                int.from_bytes(hashlib.blake2b(unit.encode(errors="replace"), digest_size=8).digest(), "little")
            )
            shown(len(data))
        left -= len(data)
        if left <= 4:  # less than a character
            break
    return np.array(lengths, np.int64), np.array(hashes, np.uint64)


def split(hashes: np.ndarray, lengths: np.ndarray, share: float = VALIDATION) -> tuple[np.ndarray, str]:
    """(documents,) bool, which are validation, and the rule in words. A unit (same hash) is never split.

    Units in the order of their hash fill `share` of the bytes; a corpus whose every unit is larger (a single book)
    gives its last documents: the text next to a validation document is then seen in training at one place alone.
    """
    units, unit_of = np.unique(hashes, return_inverse=True)  # sorted by hash
    sizes = np.bincount(unit_of, weights=lengths, minlength=len(units))
    chosen, left = np.zeros(len(units), bool), share * lengths.sum()
    for i in np.flatnonzero(sizes <= left):
        if sizes[i] <= left:
            chosen[i] = True
            left -= sizes[i]
        if left < 0.02 * share * lengths.sum():
            break
    if sizes[chosen].sum() > share * lengths.sum() / 2:
        return chosen[unit_of], f"{share:.0%} of the text, whole files or documents"
    after = lengths[::-1].cumsum()[::-1]  # bytes from here to the end
    first = min(np.searchsorted(-after, -share * lengths.sum()), len(lengths) - 1)
    return np.arange(len(lengths)) >= first, f"the last {share:.0%} of the text"


def _encode(texts: Iterable[str], tokenizer: Tokenizer, dtype: np.dtype, out: Any) -> None:
    """Write the tokens of `texts`, batch by batch over all cores."""
    for batch in _batches(texts):
        for ids in tokenizer.encode(batch):
            out.write(ids.astype(dtype).tobytes())


def _batches(texts: Iterable[str], characters: int = 1 << 22) -> Iterator[list[str]]:
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
