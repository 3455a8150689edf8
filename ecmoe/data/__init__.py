"""Data: from a corpus to batches of tokens, images, and the classification tasks for fine-tuning.

Training calls `open_data`. Text passes through corpus.py (documents), split.py (training and validation), tokenizer.py,
tokens.py (cached token ids) and batches.py. images.py loads and batches images; tasks.py loads fine-tuning examples."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ecmoe.config import RunConfig

if TYPE_CHECKING:
    from ecmoe.data.batches import RunData

__all__ = ["open_data"]


def open_data(config: RunConfig) -> RunData:
    """Return a LightningDataModule of the config's text or images.

    Returns:
        after `prepare_data()` and `setup()` it yields batches of token windows (B, T+1) int64, with task ids (B,) for
        task-level routing; or of images (B, C, H, W) float32 in [0, 1] and classes (B,).

    Raises:
        ConfigError: in `prepare_data` or `setup`, if the data are missing, unreadable, or too few for a batch.
    """
    if config.images:
        from ecmoe.data.images import ImageData

        return ImageData(config)
    from ecmoe.data.batches import TextData

    return TextData(config)
