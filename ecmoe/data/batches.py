"""TextData: batches of text that are the same for every arm of a comparison, and resume exactly within an epoch."""

import itertools
from collections.abc import Iterator, Sequence

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from ecmoe.config import RunConfig
from ecmoe.data import tokens
from ecmoe.data.clusters import TextClusters
from ecmoe.data.corpus import described
from ecmoe.files import ConfigError
from ecmoe.paths import plain

_PROVENANCE = ("digest", "source_sha256", "tokenizer", "vocab_size",
               *(f"{side}_{what}" for what in ("tokens", "bytes", "documents") for side in ("train", "val")))  # fmt: skip
Parts = Sequence[np.ndarray | Tensor]  # arrays of equal length: windows and optionally task ids; or images and classes
Batch = Tensor | tuple[Tensor, ...]


def batch_of(parts: Parts, which: np.ndarray | Tensor | slice) -> Batch:
    """Return the selected examples of each part as tensors, integers as int64; a single tensor if there is one part."""
    found = [torch.as_tensor(part[which]) for part in parts]
    found = [x if x.is_floating_point() else x.long() for x in found]
    return tuple(found) if len(found) > 1 else found[0]


class Batches(IterableDataset):
    """Endless batches of training examples, beginning at micro-step `start`.

    Micro-step s of a rank depends only on (seed, s, rank, world size): each epoch permutes the examples and assigns
    consecutive batches to the ranks in turn. Examples that don't fill a batch for every rank are dropped."""

    def __init__(self, parts: Parts, batch_size: int, seed: int, start: int = 0, rank: int = 0, world: int = 1):
        self.parts, self.batch_size, self.seed, self.start = parts, batch_size, seed, start
        self.rank, self.world = rank, world
        self.steps_per_epoch = len(parts[0]) // (batch_size * world)

    def __iter__(self) -> Iterator[Batch]:
        for step in itertools.count(self.start):
            epoch, i = divmod(step, self.steps_per_epoch)
            if step == self.start or i == 0:
                order = np.random.default_rng([self.seed, epoch]).permutation(len(self.parts[0]))
            first = (i * self.world + self.rank) * self.batch_size
            yield batch_of(self.parts, order[first : first + self.batch_size])


class RunData(L.LightningDataModule):
    """Base class of text and image data: loaders, ranks, and `start_step`, the micro-step at which a run resumes."""

    train: Parts  # `setup()` sets the examples
    val: Parts
    digest: str  # a hash that checkpoints store
    batches = Batches

    def __init__(self, config: RunConfig):
        super().__init__()
        self.config, self.start_step = config, 0

    def state_dict(self) -> dict[str, str]:
        return {"digest": self.digest}

    def load_state_dict(self, state: dict[str, str]) -> None:
        """Check a checkpoint's digest; raise a ConfigError if the checkpoint was written with different data."""
        if state["digest"] != self.digest:
            was = f"data={self.config.data!r} has changed since the checkpoint was written, from {state['digest']} to"
            raise ConfigError(f"{was} {self.digest}: restore it, or delete runs/{self.config.name} to start again")

    def val_batches(self) -> list[Batch]:
        """Return the validation batches of all ranks; batch i belongs to rank i mod the number of ranks."""
        size = self.config.batch_size
        return [batch_of(self.val, slice(i, i + size)) for i in range(0, len(self.val[0]), size)]

    def train_dataloader(self) -> DataLoader:
        batches = self.batches(self.train, self.config.batch_size, self.config.seed, self.start_step, *self._place)
        return DataLoader(batches, batch_size=None, pin_memory=torch.cuda.is_available())

    def val_dataloader(self) -> DataLoader:
        rank, world = self._place
        return DataLoader(self.val_batches()[rank::world], batch_size=None, pin_memory=torch.cuda.is_available())

    @property
    def _place(self) -> tuple[int, int]:
        """Rank and world size. Raise a ConfigError if a trainer of your own has more ranks than the config says."""
        config = self.config
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        if world > config.ranks:  # some ranks would get fewer batches, or none
            raise ConfigError(f"devices={config.devices} x num_nodes={config.num_nodes}, but the trainer has {world} ranks: "
                              "set devices and num_nodes of the config to the trainer's")  # fmt: skip
        return rank, world

    def _enough(self, train: int, val: int, what: str) -> int:
        """Return the number of validation examples: at least eval_batches batches, equally many on every rank. Raise a ConfigError
        if there are fewer, or too few training examples for a batch on every rank."""
        config = self.config
        ranks = config.ranks  # from the config, because a trainer may not be attached
        validated = -(-config.eval_batches // ranks) * ranks * config.batch_size
        for side, have, need, keys in (("training", train, config.batch_size * ranks, "batch_size, on every rank,"),
                                       ("validation", val, validated, "eval_batches x batch_size")):  # fmt: skip
            if have < need:
                raise ConfigError(f"data={plain(config.data)!r} has {have} {side} {what}, but {keys} need {need} (batch_size="
                                  f"{config.batch_size}, eval_batches={config.eval_batches}, max_bytes={config.max_bytes}): "
                                  "lower these or sequence_length, raise max_bytes, or take more data")  # fmt: skip
        return validated


class TextData(RunData):
    """The text of a config as batches of token windows. The text is downloaded and tokenised only on first use.

    `setup()` sets digest (hex, of the tokens), token_counts (V,) of the training split, bytes_per_token of the
    validation windows, tokenizer and provenance. It raises a ConfigError if the corpus is missing or too small."""

    def prepare_data(self) -> None:
        tokens.load(self.config)

    def setup(self, stage: str | None = None) -> None:
        if hasattr(self, "tokenizer"):
            return
        config, loaded = self.config, tokens.load(self.config)
        train, val = (loaded.windows(ids, config.sequence_length) for ids in (loaded.train, loaded.val))
        parts, have, length = val.shape
        self.train = [train.reshape(-1, length)]  # `Batches` shuffles the windows of all texts together
        count = self._enough(len(self.train[0]), parts * have, f"windows of sequence_length + 1 = {length} tokens")
        # Validate on evenly spaced windows of each text in a mix, interleaved so that every batch contains all texts.
        which = np.linspace(0, have - 1, -(-count // parts)).round().astype(np.int64)
        self.val = [val[:, which].swapaxes(0, 1).reshape(-1, length)[:count]]
        if "tasks" in config.needs:
            classes = TextClusters(self.train[0], config.num_tasks)
            self.train.append(np.concatenate([classes.before(part) for part in train]))
            self.val.append(np.stack([classes.before(part)[which] for part in val], axis=1).ravel()[:count])
        self.digest = loaded.meta["digest"]
        self.provenance = {key: loaded.meta[key] for key in _PROVENANCE} | described(config.data, loaded.meta["parts"])
        self.bytes_per_token = float(loaded.tokenizer.byte_lengths[self.val[0][:, 1:]].mean())
        self.token_counts = tokens.counts(loaded.train, config.vocab_size)
        self.tokenizer = loaded.tokenizer
