"""SplitText: the documents of a corpus, read once into a file, and which of them validate."""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from tqdm import tqdm

from ecmoe.data.corpus import Corpus, Documents
from ecmoe.data.tokenizer import END

VALIDATION = 0.05  # share of the text, where the source has no validation split of its own


class SplitText(NamedTuple):
    """Documents in a file, each ended by END. lengths: (documents,) bytes. is_val: (documents,) bool; rule: why these, in words."""

    file: BinaryIO
    lengths: np.ndarray
    is_val: np.ndarray
    rule: str

    @classmethod
    def read(cls, corpus: Corpus, file: BinaryIO, limit: int) -> SplitText:
        """Read a corpus, at most `limit` bytes of it (0: all), into `file`."""
        lengths, hashes = _write(corpus.train, file, limit)
        if corpus.validation is None:
            return cls(file, lengths, *split(hashes, lengths))
        more, _ = _write(corpus.validation, file, math.ceil(limit * VALIDATION))  # as large a share as ours
        is_val = np.arange(len(lengths) + len(more)) >= len(lengths)
        return cls(file, np.concatenate([lengths, more]), is_val, "the source's own")

    def some(self, size: int) -> np.ndarray:
        """Numbers of documents that train, from all over the text: at most `size` bytes, but at least one document."""
        shuffled = np.random.default_rng(0).permutation(np.flatnonzero(~self.is_val))
        count = np.searchsorted(self.lengths[shuffled].cumsum(), size, side="right")
        return np.sort(shuffled[: max(count, 1)])

    def documents(self, numbers: np.ndarray, what: str) -> Iterator[str]:
        """The documents of these numbers; `what` is said of it to those who wait."""
        starts = np.cumsum(self.lengths) - self.lengths
        with _bar(self.file, "read", what, int(self.lengths[numbers].sum())) as file:
            for i in numbers:
                file.seek(int(starts[i]))
                yield file.read(int(self.lengths[i])).decode()


def _bar(file: BinaryIO, method: str, what: str, total: int | None) -> Any:
    """The file; how many bytes it has read or written is shown where a person watches."""
    return tqdm.wrapattr(file, method, total, desc=what, leave=False, disable=None)


def _write(documents: Documents, file: BinaryIO, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Append the documents, at most `limit` bytes (0: all) of them; their lengths in bytes and their units' hashes."""
    lengths, hashes, left = array("Q"), bytearray(), limit or float("inf")
    with _bar(file, "write", "reading text", limit or None) as out:
        for unit, text in documents:
            data = text.replace(END, "").encode(errors="replace")
            if len(data) >= left:  # cut the last one, between characters
                data = data[: int(left)].decode(errors="ignore").encode()
            if data:
                out.write(data + END.encode())
                lengths.append(len(data) + 1)
                hashes += hashlib.blake2b(unit.encode(errors="replace"), digest_size=8).digest()
            left -= len(data)
            if left <= 4:  # less than a character
                break
    return np.array(lengths, np.int64), np.frombuffer(hashes, "<u8")


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
