"""TextData: the same windows of text for every arm of a comparison, and an exact resume in mid-epoch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from ecmoe.config import RunConfig
from ecmoe.data import tokens
from ecmoe.data.clusters import TextClusters
from ecmoe.data.corpus import described, source_files
from ecmoe.files import ConfigError, content_sha256
from ecmoe.paths import plain

_PROVENANCE = ("digest", "source_sha256", "tokenizer", "vocab_size",
               *(f"{side}_{what}" for what in ("tokens", "bytes", "documents") for side in ("train", "val")))  # fmt: skip
Batch = torch.Tensor | tuple[torch.Tensor, torch.Tensor]  # windows, or windows and tasks


def window_order(seed: int, epoch: int, windows: int) -> np.ndarray:
    """(windows,) the order of an epoch: a permutation, another one in each epoch."""
    return np.random.default_rng([seed, epoch]).permutation(windows)


class Batches(IterableDataset):
    """Endless batches of training windows, (B, T+1) int64, from micro-step `start` on; with `tasks`, each with its (B,) tasks.
    Micro-step s of a rank depends on nothing but (seed, s, rank, world size): an epoch deals its permuted windows
    out to all ranks, a batch each; the windows left over at its end are dropped.
    """

    def __init__(self, windows: np.ndarray, batch_size: int, seed: int, start: int = 0, rank: int = 0, world: int = 1,
                 tasks: np.ndarray | None = None):  # fmt: skip
        self.windows, self.batch_size, self.seed, self.start = windows, batch_size, seed, start
        self.rank, self.world, self.tasks = rank, world, tasks
        self.steps_per_epoch = len(windows) // (batch_size * world)

    def __iter__(self) -> Iterator[Batch]:
        step, epoch, order = self.start, -1, None
        while True:
            if step // self.steps_per_epoch != epoch:
                epoch = step // self.steps_per_epoch
                order = window_order(self.seed, epoch, len(self.windows))
            first = (step % self.steps_per_epoch * self.world + self.rank) * self.batch_size
            yield self.take(order[first : first + self.batch_size], step)
            step += 1

    def take(self, which: np.ndarray, step: int) -> Any:
        """The batch of the windows `which`; micro-step `step` is for those who draw at random."""
        windows = torch.from_numpy(self.windows[which].astype(np.int64))
        return windows if self.tasks is None else (windows, torch.from_numpy(self.tasks[which]))


class RunData(L.LightningDataModule):
    """What the data of all runs share: `start_step`, micro-batches that a resumed run has already seen, and ranks.

    A kind of data gives `train_batches(start, rank, world)`, `val_batches()` and `digest`, which a checkpoint keeps."""

    digest: str

    def __init__(self, config: RunConfig):
        super().__init__()
        self.config, self.start_step = config, 0

    def state_dict(self) -> dict[str, str]:
        return {"digest": self.digest}

    def load_state_dict(self, state: dict[str, str]) -> None:
        """Go on from a checkpoint; a ConfigError where it is of other data."""
        if state["digest"] != self.digest:
            raise ConfigError(
                f"data={self.config.data!r} has changed since the checkpoint was written: its digest was {state['digest']} and is "
                f"{self.digest}; bring the data back, or delete runs/{self.config.name} to begin anew"
            )

    def train_dataloader(self) -> DataLoader:
        return self._loader(self.train_batches(self.start_step, self._rank, self._world))

    def val_dataloader(self) -> DataLoader:
        return self._loader(list(self.val_batches())[self._rank :: self._world])

    @staticmethod
    def _loader(batches: Any) -> DataLoader:
        return DataLoader(batches, batch_size=None, pin_memory=torch.cuda.is_available())

    @property
    def _world(self) -> int:
        return self.trainer.world_size if self.trainer else 1

    @property
    def _rank(self) -> int:
        return self.trainer.global_rank if self.trainer else 0

    @property
    def _ranks(self) -> int:
        """Those of the run, also where no trainer is attached: what it validates on depends on the config alone."""
        return self.config.devices * self.config.num_nodes

    def _enough(self, train: int, val: int, what: str) -> int:
        """How much validates: every rank equally often, together as much as was asked for; a ConfigError if there is less."""
        config, data = self.config, plain(self.config.data)
        validated = -(-config.eval_batches // self._ranks) * self._ranks * config.batch_size
        for side, have, need, keys in (("training", train, config.batch_size * self._ranks, "batch_size, on every rank,"),
                                       ("validation", val, validated, "eval_batches x batch_size")):  # fmt: skip
            if have < need:
                raise ConfigError(f"data={data!r} has {have} {side} {what}, but {keys} need {need} (batch_size={config.batch_size}, "
                                  f"eval_batches={config.eval_batches}, max_bytes={config.max_bytes}): lower these or "
                                  "sequence_length, raise max_bytes, or take more data")  # fmt: skip
        return validated


class TextData(RunData):
    """The text of a config as batches of token windows; `datasets` and the tokeniser run on first use only.

    After `setup()`: digest (hex, of the tokens), token_counts (V,) of the training split, bytes_per_token (of the
    validation windows), provenance.

    Raises:
        ConfigError: the corpus is missing, or too small for a batch.
    """

    def __init__(self, config: RunConfig, cache: Path | None = None):
        super().__init__(config)
        self.cache = cache
        self._tokens: tokens.Tokens | None = None

    def prepare_data(self) -> None:
        tokens.load(self.config, self.cache)

    def setup(self, stage: str | None = None) -> None:
        if self._tokens is not None:
            return
        config, loaded = self.config, tokens.load(self.config, self.cache)
        train, val = (loaded.windows(ids, config.sequence_length) for ids in (loaded.train, loaded.val))
        parts, have = val.shape[:2]
        self.train_windows = train.reshape(-1, train.shape[2])  # `Batches` shuffles all parts together
        count = self._enough(
            len(self.train_windows), parts * have, f"windows of sequence_length + 1 = {val.shape[2]} tokens"
        )
        # Spread over each part; one of each in turn, so that every batch validates on all of them.
        which = np.linspace(0, have - 1, -(-count // parts)).round().astype(np.int64)
        self.val_windows = val[:, which].swapaxes(0, 1).reshape(-1, val.shape[2])[:count]
        self.train_tasks = self.val_tasks = None
        if "tasks" in config.needs:
            classes = TextClusters(self.train_windows, config.num_tasks)
            self.train_tasks = np.concatenate([classes.before(part) for part in train])
            self.val_tasks = np.stack([classes.before(part)[which] for part in val], axis=1).ravel()[:count]
        self.digest: str = loaded.meta["digest"]
        self.provenance = {key: loaded.meta[key] for key in _PROVENANCE} | described(config.data, loaded.meta["parts"])
        self.bytes_per_token = float(loaded.tokenizer.byte_lengths[self.val_windows[:, 1:]].mean())
        self.token_counts = tokens.counts(loaded.train, config.vocab_size)
        self._tokens = loaded

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids; `\\0` ends a document."""
        self.setup()
        return self._tokens.tokenizer.decode(ids)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        return self.encode_all([text])[0]

    def encode_all(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text; many at once are faster."""
        self.setup()
        return [ids.tolist() for ids in self._tokens.tokenizer.encode(texts)]

    def train_batches(self, start: int, rank: int, world: int) -> Batches:
        size, seed = self.config.batch_size, self.config.seed
        return Batches(self.train_windows, size, seed, start, rank, world, self.train_tasks)

    def val_batches(self) -> Iterable[Batch]:
        size = self.config.batch_size
        windows = torch.from_numpy(self.val_windows.astype(np.int64)).split(size)
        if self.val_tasks is None:
            return windows
        return zip(windows, torch.from_numpy(self.val_tasks).split(size), strict=True)


def is_other_data(config: RunConfig, said: Mapping[str, Any] | None) -> bool:
    """Are the data here others than those of `said`, a run's provenance? No, where they aren't here, or it doesn't say.

    The source is compared, not its tokens: reading a result must not start long work. Of images, only `digits` is."""
    said = said or {}
    if config.data == "digits":
        from ecmoe.data.images import load

        return "digest" in said and said["digest"] != load("digits").provenance["digest"]
    try:
        files = source_files(config.data)
    except ConfigError:
        return False
    return bool(files and said.get("source_sha256")) and content_sha256(files) != said["source_sha256"]
