"""Corpus to batches: text from files or the Hub, its tokens, images, and the tasks of fine-tuning.

`open_data` is what training calls. Text goes from corpus.py (documents) over split.py (what validates), tokenizer.py and
tokens.py (made once, kept) to batches.py; images.py has images and their batches; tasks.py has examples to fine-tune on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ecmoe.config import RunConfig

if TYPE_CHECKING:
    from ecmoe.data.batches import RunData

__all__ = ["open_data"]


def open_data(config: RunConfig) -> RunData:
    """The text or the images of a config, in batches.

    Returns:
        a LightningDataModule. After `prepare_data()` and `setup()`: batches of token windows (B, T+1) int64, with tasks (B,)
        beside them for task-level routing; or of images (B, C, H, W) float32 in [0, 1] with classes (B,).

    Raises:
        ConfigError: in `prepare_data` or `setup`: the data aren't here, can't be read, or are too few for a batch.
    """
    if config.images:
        from ecmoe.data.images import ImageData

        return ImageData(config)
    from ecmoe.data.batches import TextData

    return TextData(config)
