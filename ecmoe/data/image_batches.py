"""ImageData: the images of a config in batches, the same for every arm of a comparison."""

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ecmoe.config import RunConfig
from ecmoe.data import images
from ecmoe.data.batches import Batch, Batches, RunData
from ecmoe.files import ConfigError


class ImageData(RunData):
    """Batches of images (B, C, H, W) float32 in [0, 1] and their classes (B,) int64.

    After `setup()`: digest (hex, of pixels and labels), provenance, classes."""

    def prepare_data(self) -> None:
        images.load(self.config.data)

    def setup(self, stage: str | None = None) -> None:
        config, loaded = self.config, images.load(self.config.data)
        check(config, loaded)
        count = self._enough(len(loaded.train_y), len(loaded.val_y), "images")
        which = np.linspace(0, len(loaded.val_y) - 1, count).round().astype(np.int64)
        # Some sources lie class by class: patches must compete with those of all classes, in evaluation too.
        which = np.random.default_rng(0).permutation(which)
        self.train, self.val = (loaded.train_x, loaded.train_y), (loaded.val_x[which], loaded.val_y[which])
        self.batches = AugmentedBatches if config.augment else Batches
        self.provenance, self.classes = loaded.provenance, loaded.classes
        self.digest = loaded.provenance["digest"]


class AugmentedBatches(Batches):
    """Batches of images and classes, the images `shifted` by draws of (seed, rank, step)."""

    def take(self, which: np.ndarray, step: int) -> Batch:
        x, y = super().take(which, step)
        return shifted(x, np.random.default_rng([self.seed, self.rank, step, 1])), y


def shifted(x: Tensor, draw: np.random.Generator) -> Tensor:
    """(B, C, H, W) -> the same images, each moved by up to an eighth of its side, black coming in, half of them mirrored."""
    B, _, H, W = x.shape
    most = max(1, H // 8)
    padded = F.pad(x, [most] * 4)
    down, right = draw.integers(0, 2 * most + 1, (2, B, 1))
    rows, columns = down + np.arange(H), right + np.arange(W)  # (B, H), (B, W)
    mirrored = draw.random(B) < 0.5
    columns[mirrored] = columns[mirrored, ::-1]
    image = torch.arange(B)[:, None, None]
    rows, columns = torch.from_numpy(rows)[:, :, None], torch.from_numpy(columns)[:, None, :]
    return padded.movedim(1, -1)[image, rows, columns].movedim(-1, 1).contiguous()


def check(config: RunConfig, loaded: images.Images) -> None:
    """Raise a ConfigError that names the right value where a key doesn't fit the images."""
    channels, height, width = loaded.train_x.shape[1:]
    size, side = f"{height} x {width} pixels", config.patch_size
    if height % side or width % side:
        shared = math.gcd(height, width)
        fitting = [p for p in range(1, shared + 1) if shared % p == 0]
        raise ConfigError(f"patch_size={side}: must divide the {size} of data={config.data!r}; may be one of {fitting}")
    patches = (height // side) * (width // side)
    for name, right, why in (
        ("sequence_length", patches, f"images of {size} have {patches} patches of patch_size={side}"),
        ("channels", channels, f"its pixels have {channels}"),
        ("classes", len(loaded.classes), f"it has {len(loaded.classes)}"),
    ):
        if getattr(config, name) != right:
            raise ConfigError(f"{name}={getattr(config, name)} with data={config.data!r}: {why}; set {name}: {right}")
