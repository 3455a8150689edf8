"""The tokens of a corpus, split into training and validation: computed once, cached in memory-mapped files, verified."""

import hashlib
import itertools
import math
import re
import shutil
from array import array
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO, NamedTuple, Self

import numpy as np
from tqdm import tqdm

from ecmoe import paths
from ecmoe.data.corpus import Corpus, Documents, open_corpus, source_key, source_sha256
from ecmoe.data.tokenizer import BPE, END, END_ID, Bytes, Tokenizer, train_bpe
from ecmoe.files import ConfigError, Damaged, check_sum, disk_may_be_full, read_json, sha256, sha256_once, write_json

# Version of the cache format, part of every cache's name. Increase it if the same source would give different tokens.
SCHEMA = 2
BPE_BYTES = 50_000_000  # BPE learns its merges from at most this much text
VALIDATION = 0.05  # share of the text held out if the source has no validation split of its own
BAR = {"leave": False, "disable": None}  # progress bars: only while reading or writing, and only on a terminal
NEW = "not tokenised yet"


class Tokens(NamedTuple):
    """A tokenised corpus: (tokens,) memory-mapped ids, the texts of a mix in turn, equally long. meta: meta.json."""

    train: np.ndarray
    val: np.ndarray
    tokenizer: Tokenizer
    meta: dict[str, Any]

    def windows(self, ids: np.ndarray, length: int) -> np.ndarray:
        """Cut each part into consecutive, non-overlapping windows: (parts, windows, T+1), where T = `length`."""
        ids = ids.reshape(len(self.meta["parts"]), -1)
        count = ids.shape[1] // (length + 1)
        return ids[:, : count * (length + 1)].reshape(len(ids), count, length + 1)


def folder(config: Any) -> Path:
    """Return the cache folder of a config's tokens; it depends on the text's content and on the keys in `_keys`."""
    names = "-".join(Path(part).name for part in paths.parts_of(config.data))
    slug = re.sub(r"[^\w.-]+", "-", names).strip("-")[:40]
    digest = check_sum(_keys(config))[:12]
    return paths.cache() / "tokens" / f"{slug}-{config.tokenizer}{config.vocab_size}-{digest}"


def _keys(config: Any) -> dict[str, Any]:
    read = {key: getattr(config, key) for key in ("max_bytes", "tokenizer", "vocab_size")}
    return {"schema": SCHEMA, "data": source_key(paths.with_content(config.data)), **read}


def load(config: Any) -> Tokens:
    """Load the tokens of `config`'s corpus. The first process to need them, or to find them damaged, computes them, while others
    wait. Raise a ConfigError if there is no intact cache and the text is missing."""
    from filelock import FileLock

    place = folder(config)
    if _trouble(place):
        with FileLock(f"{place}.lock"):
            if trouble := _trouble(place):  # otherwise another process has computed the tokens meanwhile
                _make(config, place, trouble)
    paths.remember_content(config.data)
    meta = read_json(place / "meta.json")
    train, val = (np.memmap(place / f"{side}.bin", np.dtype(meta["dtype"]), "r") for side in ("train", "val"))
    return Tokens(train, val, BPE(place / "tokenizer.json") if meta["tokenizer"] == "bpe" else Bytes(), meta)


def _trouble(place: Path) -> str | None:
    """Return what is wrong with the cache, in words, or None if it is complete and intact."""
    try:
        files = read_json(place / "meta.json", sealed=True)["files"]
    except FileNotFoundError:
        return NEW
    except Damaged:
        return "meta.json is damaged"
    whole = {name: (place / name).is_file() and sha256_once(place / name) == files[name]["sha256"] for name in files}
    return next((f"{name} is missing or damaged" for name in files if not whole[name]), None)


def _make(config: Any, place: Path, trouble: str) -> None:
    try:
        source = source_sha256(config.data)
        paths.check_content(config.data)
        streaming = config.streaming or config.max_bytes > 0  # part of a text doesn't need the whole download
        corpora = [open_corpus(part, streaming) for part in paths.parts_of(config.data)]
    except ConfigError as error:
        if trouble == NEW:
            raise
        told = f"the cache {place} can't be used: {trouble}; it can't be rebuilt: {error}"
        raise ConfigError(f"data={config.data!r}: {told}") from error
    if place.exists():
        shutil.rmtree(place)  # left by a process that was killed, or damaged; who has it open keeps it
    place.mkdir(parents=True)
    try:
        with disk_may_be_full(place):
            meta = _tokenise(config, corpora, place)
        paths.check_content(config.data)  # the text must not have changed while it was read
        made = sorted(place.iterdir())
        files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in made}
        meta |= _keys(config) | {"source_sha256": source, "digest": check_sum(files), "files": files}
        write_json(place / "meta.json", meta, sealed=True)  # last, because it marks the cache as complete
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise


def _tokenise(config: Any, corpora: list[Corpus], place: Path) -> dict[str, Any]:
    """Read and split each corpus, train BPE on training text, encode, cut all to the shortest; return the metadata."""
    limit = -(-config.max_bytes // len(corpora))
    with ExitStack() as files:
        texts = [SplitText.read(corpus, files.enter_context(TemporaryFile(dir=place)), limit) for corpus in corpora]
        for corpus, text in zip(corpora, texts, strict=True):
            if text.is_val.all() or not text.is_val.any():
                raise ConfigError(f"data={config.data!r}: {len(text.lengths)} documents of {text.lengths.sum()} bytes of {corpus.name} "
                                  "are too few to split into training and validation; take a larger corpus or raise max_bytes")  # fmt: skip
        tokenizer: Tokenizer = Bytes()
        if config.tokenizer == "bpe":  # learned from equally many bytes of each text, none of them validation text
            share = min(BPE_BYTES // len(texts), *(int(text.lengths[~text.is_val].sum()) for text in texts))
            some = (text.documents(text.some(share), "learning BPE") for text in texts)
            documents = (document.removesuffix(END) for document in itertools.chain.from_iterable(some))
            train_bpe(documents, config.vocab_size, place / "tokenizer.json")
            tokenizer = BPE(place / "tokenizer.json")
        dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
        meta: dict[str, Any] = {"dtype": dtype.name, "parts": [
            {"name": corpus.name, "licence": corpus.licence, "attribution": corpus.attribution, "split": text.rule,
             "bytes": int(text.lengths.sum()), "documents": len(text.lengths)}
            for corpus, text in zip(corpora, texts, strict=True)
        ]}  # fmt: skip
        for side in ("train", "val"):
            encoded = []
            for text in texts:
                documents = text.documents(np.flatnonzero(text.is_val == (side == "val")), f"tokenising {side}")
                encoded.append(_encode(documents, tokenizer, dtype, place))
            with (place / f"{side}.bin").open("wb") as out:
                for ids in encoded:
                    out.write(ids[: min(map(len, encoded))])
            found = counts(np.memmap(place / f"{side}.bin", dtype, "r"), tokenizer.vocab_size)
            meta |= {f"{side}_tokens": int(found.sum()), f"{side}_bytes": int(found @ tokenizer.byte_lengths),
                     f"{side}_documents": int(found[END_ID])}  # fmt: skip
    return meta


def _encode(documents: Iterator[str], tokenizer: Tokenizer, dtype: np.dtype, place: Path) -> np.ndarray:
    """Return the tokens of `documents`, encoded 256 documents at a time on all cores, in a temporary file."""
    with TemporaryFile(dir=place) as file:
        while some := list(itertools.islice(documents, 256)):
            for ids in tokenizer.encode(some):
                file.write(ids.astype(dtype))
        return np.memmap(file, dtype, "r")


class SplitText(NamedTuple):
    """Documents in a file, each ended by END. lengths: (documents,) bytes. is_val: (documents,) bool. rule: words."""

    file: BinaryIO
    lengths: np.ndarray
    is_val: np.ndarray
    rule: str

    @classmethod
    def read(cls, corpus: Corpus, file: BinaryIO, limit: int) -> Self:
        """Write a corpus, at most `limit` bytes of it (0: all), to `file`, and split it."""
        lengths, hashes = _write(corpus.train, file, limit)
        if corpus.validation is None:
            return cls(file, lengths, *split(hashes, lengths))
        more, _ = _write(corpus.validation, file, math.ceil(limit * VALIDATION))  # the same share as without a split
        is_val = np.arange(len(lengths) + len(more)) >= len(lengths)
        return cls(file, np.concatenate([lengths, more]), is_val, "the source's own")

    def some(self, size: int) -> np.ndarray:
        """Return indices of random training documents, sorted: at most `size` bytes, but at least one document."""
        shuffled = np.random.default_rng(0).permutation(np.flatnonzero(~self.is_val))
        count = np.searchsorted(self.lengths[shuffled].cumsum(), size, side="right")
        return np.sort(shuffled[: max(count, 1)])

    def documents(self, numbers: np.ndarray, what: str) -> Iterator[str]:
        """Yield the documents with these indices; `what` labels the progress bar."""
        starts = np.cumsum(self.lengths) - self.lengths
        with tqdm.wrapattr(self.file, "read", int(self.lengths[numbers].sum()), desc=what, **BAR) as file:
            for i in numbers:
                file.seek(int(starts[i]))
                yield file.read(int(self.lengths[i])).decode()


def _write(documents: Documents, file: BinaryIO, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Append at most `limit` bytes (0: all) of documents to `file`; return their lengths in bytes and unit hashes."""
    lengths, hashes, left = array("Q"), bytearray(), limit or float("inf")
    with tqdm.wrapattr(file, "write", limit or None, desc="reading text", **BAR) as out:
        for unit, text in documents:
            data = text.replace(END, "").encode(errors="replace")
            if len(data) >= left:  # cut the last document, but not within a character
                data = data[: int(left)].decode(errors="ignore").encode()
            if data:
                out.write(data + END.encode())
                lengths.append(len(data) + 1)
                hashes += hashlib.blake2b(unit.encode(errors="replace"), digest_size=8).digest()
            left -= len(data)
            if left <= 4:  # a character has up to 4 bytes
                break
    return np.array(lengths, np.int64), np.frombuffer(hashes, "<u8")


def split(hashes: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, str]:
    """Return which documents are for validation, (documents,) bool, and the rule in words.

    Units (documents of the same hash) stay together: in the order of their hashes, they fill 5% of the bytes.
    If that fails, as for one book, the last documents are taken, so that only one of them adjoins the training text."""
    units, unit_of = np.unique(hashes, return_inverse=True)  # sorted by hash
    sizes = np.bincount(unit_of, weights=lengths, minlength=len(units))
    share = VALIDATION * lengths.sum()
    chosen, left = np.zeros(len(units), bool), share
    for i in np.flatnonzero(sizes <= left):
        if sizes[i] <= left:
            chosen[i] = True
            left -= sizes[i]
        if left < 0.02 * VALIDATION * lengths.sum():
            break
    if sizes[chosen].sum() > share / 2:
        return chosen[unit_of], f"{VALIDATION:.0%} of the text, whole files or documents"
    after = lengths[::-1].cumsum()[::-1]  # bytes from each document to the end
    first = min(np.searchsorted(-after, -share), len(lengths) - 1)
    return np.arange(len(lengths)) >= first, f"the last {VALIDATION:.0%} of the text"


def counts(ids: np.ndarray, vocab_size: int, chunk: int = 1 << 22) -> np.ndarray:
    """Return how often each token occurs in `ids` (tokens,): (V,) int64."""
    found = np.zeros(vocab_size, np.int64)
    for start in range(0, len(ids), chunk):
        found += np.bincount(ids[start : start + chunk], minlength=vocab_size)
    return found
