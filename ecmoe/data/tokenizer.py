"""Text to token ids and back: bytes, or byte-level BPE trained on the corpus."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ecmoe.config import ConfigError

END, END_ID = "\0", 0  # end of every document: a single byte and token


class Bytes:
    """Use UTF-8 bytes as tokens. byte_lengths: (V,) number of bytes of text per token."""

    vocab_size = 256
    byte_lengths = np.ones(256, np.int64)

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(int(i) for i in ids).decode(errors="replace")


class BPE:
    """Byte-level BPE with GPT-2's pre-tokenisation, from the `tokenizers` library."""

    def __init__(self, path: Path):
        from tokenizers import Tokenizer as Fast

        self._fast = Fast.from_file(str(path))
        self.vocab_size = self._fast.get_vocab_size()
        # In the byte-level alphabet, each character of a token represents one byte.
        self.byte_lengths = np.array([len(self._fast.id_to_token(i)) for i in range(self.vocab_size)])

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        return [np.array(e.ids, np.uint32) for e in self._fast.encode_batch_fast(texts)]

    def decode(self, ids: Iterable[int]) -> str:
        return self._fast.decode([int(i) for i in ids], skip_special_tokens=False)


Tokenizer = Bytes | BPE  # decode(encode([text])[0]) is the text


def train_bpe(texts: Iterable[str], vocab_size: int, path: Path) -> None:
    """Train BPE and write it to `path` as JSON; raise a ConfigError if the text is too small for vocab_size tokens."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers, trainers

    fast = Fast(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    how = {"special_tokens": [END], "initial_alphabet": alphabet, "show_progress": False}
    fast.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab_size, **how))
    if (found := fast.get_vocab_size()) != vocab_size:
        remedy = "set at most that many (at least 257), raise max_bytes, or take a larger corpus"
        raise ConfigError(f"vocab_size={vocab_size}: the corpus gives only {found} tokens; {remedy}")
    fast.save(str(path))
