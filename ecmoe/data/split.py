"""SplitText: the documents of a corpus, written to a temporary file and split into training and validation."""

import hashlib
import math
from array import array
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple, Self

import numpy as np
from tqdm import tqdm

from ecmoe.data.corpus import Corpus, Documents
from ecmoe.data.tokenizer import END

VALIDATION = 0.05  # share of the text held out if the source has no validation split of its own
BAR = {"leave": False, "disable": None}  # progress bars: only while reading or writing, and only on a terminal


class SplitText(NamedTuple):
    """Documents in a file, each ended by END. lengths: (documents,) bytes. is_val: (documents,) bool. rule: in words."""

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


def split(hashes: np.ndarray, lengths: np.ndarray, share: float = VALIDATION) -> tuple[np.ndarray, str]:
    """Return which documents are for validation, (documents,) bool, and the rule in words.

    Units (documents of the same hash) stay together: in the order of their hashes, they fill `share` of the bytes.
    If that fails, as for one book, the last documents are taken, so that only one of them adjoins the training text."""
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
    after = lengths[::-1].cumsum()[::-1]  # bytes from each document to the end
    first = min(np.searchsorted(-after, -share * lengths.sum()), len(lengths) - 1)
    return np.arange(len(lengths)) >= first, f"the last {share:.0%} of the text"
