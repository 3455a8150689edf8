"""Labelled images of one size, for classification, and ImageData, their batches.

The key `data` names them: `digits` needs no download, `cifar10` comes from the Hub, `images:PATH` is a local folder.

Letters: n images of C channels, H x W pixels."""

import functools
import hashlib
import io
import lzma
import os
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ecmoe import paths
from ecmoe.config import RunConfig
from ecmoe.data.batches import Batch, Batches, RunData
from ecmoe.data.corpus import NOT_STATED, about, from_hub, source_sha256
from ecmoe.files import ConfigError

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
VALIDATION = ("validation", "val", "test")  # folder names of a validation split; the first that exists is used
HELD_OUT = 5  # without a split, every HELD_OUT-th image of a class is held out for validation
Stored = tuple[np.ndarray, np.ndarray]  # pixels (n, H, W, C) uint8, and labels (n,) int64
Source = tuple[Stored, Stored, tuple[str, ...], dict[str, str]]  # training, validation, names of classes, provenance


class Images(NamedTuple):
    """A data set split into training and validation images, always in the same order.

    train_x, val_x: (n, C, H, W) float32 in [0, 1]. train_y, val_y: (n,) int64, indices into `classes`.
    provenance: name, licence, attribution, digest (hex, of pixels and labels), train_images, val_images, shape."""

    train_x: Tensor
    train_y: Tensor
    val_x: Tensor
    val_y: Tensor
    classes: tuple[str, ...]
    provenance: dict[str, Any]


def load(data: str) -> Images:
    """Load the images that the key `data` names; the last data set loaded is cached in memory.

    images:PATH is a folder with a sub-folder of image files per class (optionally below train and test), or with
    NAME_{train,test}.jpgs.xz, concatenated JPEGs, and NAME_{train,test}.idx.xz, a line `offset length label` for each."""
    data, content = paths.plain(data), paths.with_content(data)
    folder = paths.resolve(data.removeprefix(paths.IMAGES_PREFIX))
    if data not in paths.IMAGES and not os.path.isdir(folder):  # Path.is_dir raises for a name that is too long
        raise ConfigError(f"data={data!r}: {folder} isn't a folder; it must hold a sub-folder of image files per class, "
                          "or NAME_train.jpgs.xz and its companion files")  # fmt: skip
    paths.check_content(content)
    paths.remember_content(content)
    return _load(data, content)


@functools.lru_cache(maxsize=1)  # consecutive runs of a study read the same images
def _load(data: str, content: str) -> Images:
    train, val, classes, said = {"digits": _digits, "cifar10": _cifar10}.get(data, _local)(data)
    digest, tensors = hashlib.sha256(), []
    for pixels, labels in (train, val):
        digest.update(np.ascontiguousarray(pixels).tobytes() + labels.tobytes())
        x = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        tensors += [x.div_(16 if data == "digits" else 255), torch.from_numpy(labels)]
    digest.update(repr(classes).encode())
    counts = {"train_images": len(train[1]), "val_images": len(val[1]), "shape": list(tensors[0].shape[1:])}
    return Images(*tensors, classes, {**said, "digest": digest.hexdigest()[:16], **counts})


def _digits(data: str) -> Source:
    """Load scikit-learn's UCI digits, 8 x 8 pixels of 17 greys; most validation images are by writers not in training."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels, labels = digits.images.astype(np.uint8)[..., None], digits.target.astype(np.int64)
    said = {
        "name": "Optical Recognition of Handwritten Digits (scikit-learn's copy; first 1,437 train, last 360 validate)",
        "licence": "CC BY 4.0",
        "attribution": "Alpaydin and Kaynak 1998, UCI Machine Learning Repository",
    }
    train, val = ((pixels[side], labels[side]) for side in (slice(1437), slice(1437, None)))
    return train, val, tuple("0123456789"), said


def _cifar10(data: str) -> Source:
    """Load CIFAR-10 from the Hub: 50,000 images for training, and the test set of 10,000 for validation."""
    right = f"the Hub must be reachable, or give a local copy as data: {paths.IMAGES_PREFIX}PATH, or take data: digits"
    sets = from_hub(f"data={data!r}", right, "uoft-cs/cifar10")
    said = {"name": "CIFAR-10", "licence": NOT_STATED,
            "attribution": "Krizhevsky 2009, Learning Multiple Layers of Features from Tiny Images"}  # fmt: skip
    train, val = (_stack(data, (("", row["img"], row["label"]) for row in sets[side])) for side in ("train", "test"))
    return train, val, tuple(sets["train"].features["label"].names), said


def _local(data: str) -> Source:
    files = paths.local_files(data)
    packed = [path for name, path in files.items() if "/" not in name and name.endswith("_train.jpgs.xz")]
    if packed:
        name = packed[0].name.removesuffix("_train.jpgs.xz")
        train, val = (_stack(data, _jpegs(data, packed[0].with_name(f"{name}_{side}"))) for side in ("train", "test"))
        numbers = range(max(train[1].max(), val[1].max()) + 1)
        classes = CIFAR10 if name == "cifar10" and len(numbers) <= len(CIFAR10) else tuple(map(str, numbers))
    else:
        train, val, classes = _folder(data, files)
    said = about(data.removeprefix(paths.IMAGES_PREFIX)) | {"source_sha256": source_sha256(data)}
    return train, val, classes, said


def _jpegs(data: str, stem: Path) -> Iterable[tuple[str, Any, int]]:
    try:
        images = lzma.open(f"{stem}.jpgs.xz").read()
        places = [tuple(map(int, line.split())) for line in lzma.open(f"{stem}.idx.xz", "rt")]
        if not all(0 <= label < 1 << 16 for _, _, label in places):
            raise ValueError("labels must be 0 to 65,535")
        yield from ((f"{stem}.jpgs.xz, image {i}", io.BytesIO(images[at : at + n]), label)
                    for i, (at, n, label) in enumerate(places))  # fmt: skip
    except (OSError, EOFError, ValueError, lzma.LZMAError) as error:
        raise ConfigError(f"data={data!r}: {stem}.jpgs.xz with {stem.name}.idx.xz can't be read ({error}); they must hold "
                          "concatenated JPEGs, and a line `offset length label` for each")  from error  # fmt: skip


def _folder(data: str, files: dict[str, Path]) -> tuple[Stored, Stored, tuple[str, ...]]:
    """Load CLASS/IMAGE, below train and one of `VALIDATION`; else hold out one in `HELD_OUT` images of each class."""
    top = {name.partition("/")[0] for name in files}
    own = [side for side in VALIDATION if {"train", side} <= top][:1]
    images = []
    for side in ("train/", *(f"{side}/" for side in own)) if "train" in top else ("",):
        below = [(path, name.removeprefix(side).split("/")) for name, path in files.items() if name.startswith(side)]
        images.append([(str(path), path, label) for path, (label, *rest) in below if rest])
    classes = sorted({label for rows in images for *_, label in rows})
    if not classes or not all(images):
        raise ConfigError(f"data={data!r}: has no images in class folders; it must hold a sub-folder of image files per class, "
                          f"either directly or below train and one of {', '.join(VALIDATION)}")  # fmt: skip
    splits = [_stack(data, ((where, path, classes.index(label)) for where, path, label in rows)) for rows in images]
    if not own:  # hold out the same share of every class
        ((pixels, labels),) = splits
        held = pd.Series(labels).groupby(labels).cumcount().to_numpy() % HELD_OUT == HELD_OUT - 1
        splits = [(pixels[which], labels[which]) for which in (~held, held)]
    return *splits, tuple(classes)


def _stack(data: str, rows: Iterable[tuple[str, Any, int]]) -> Stored:
    """Stack images as RGB; all must have one size. rows: (name for errors, file or Pillow image, label) of each."""
    pixels, labels = [], []
    for where, file, label in rows:
        try:
            pixels.append(_rgb(file))
        except Exception as error:  # Pillow's decoders raise many kinds of errors for a damaged file
            told = f"{type(error).__name__}: {error}"
            raise ConfigError(f"data={data!r}: {where} can't be read ({told}): repair or remove it") from error
        (h, w, _), (height, width, _) = pixels[0].shape, pixels[-1].shape
        if (h, w) != (height, width):
            raise ConfigError(f"data={data!r}: has images of {h} x {w} and {height} x {width} pixels, height x width ({where}), "
                              "but all must have the same size: resize them")  # fmt: skip
        labels.append(label)
    if not pixels:
        raise ConfigError(f"data={data!r}: contains no images")
    return np.stack(pixels), np.array(labels, np.int64)


def _rgb(file: Any) -> np.ndarray:
    """Return a file or Pillow image as (H, W, 3) uint8; 16-bit greys are scaled, because Pillow clips them at 255."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        image = file if isinstance(file, Image.Image) else Image.open(file)
    if image.mode.startswith("I"):
        grey = np.asarray(image)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError("its greys have more than 16 bits")
        return np.repeat((grey / 257).round().astype(np.uint8)[..., None], 3, axis=2)
    if image.mode == "F":
        raise ValueError("its greys are floats, so their white level is unknown")
    return np.asarray(image.convert("RGB"))


class ImageData(RunData):
    """Batches of images (B, C, H, W) float32 in [0, 1] and their classes (B,) int64.

    `setup()` sets digest (hex, of pixels and labels), provenance and classes."""

    def prepare_data(self) -> None:
        load(self.config.data)

    def setup(self, stage: str | None = None) -> None:
        config, loaded = self.config, load(self.config.data)
        check(config, loaded)
        count = self._enough(len(loaded.train_y), len(loaded.val_y), "images")
        which = np.linspace(0, len(loaded.val_y) - 1, count).round().astype(np.int64)
        # Shuffle, as some sources are ordered by class: in evaluation too, patches must compete with those of all classes.
        which = np.random.default_rng(0).permutation(which)
        self.train, self.val = (loaded.train_x, loaded.train_y), (loaded.val_x[which], loaded.val_y[which])
        self.batches = AugmentedBatches if config.augment else Batches
        self.provenance, self.classes = loaded.provenance, loaded.classes
        self.digest = loaded.provenance["digest"]


class AugmentedBatches(Batches):
    """Batches of images and classes, with images augmented by `shifted`, seeded with (seed, rank, step)."""

    def __iter__(self) -> Iterator[Batch]:
        for step, (x, y) in enumerate(super().__iter__(), self.start):
            yield shifted(x, np.random.default_rng([self.seed, self.rank, step, 1])), y


def shifted(x: Tensor, draw: np.random.Generator) -> Tensor:
    """Shift each image of (B, C, H, W) by up to max(1, H // 8) pixels, filled with black; mirror half of the images."""
    B, _, H, W = x.shape
    most = max(1, H // 8)
    down, right = draw.integers(0, 2 * most + 1, (2, B))
    mirrored = draw.random(B) < 0.5
    padded = zip(F.pad(x, [most] * 4), down, right, strict=True)
    moved = [image[:, i : i + H, j : j + W] for image, i, j in padded]
    return torch.stack([image.flip(2) if mirror else image for image, mirror in zip(moved, mirrored, strict=True)])


def check(config: RunConfig, loaded: Images) -> None:
    """Raise a ConfigError that names the right value if patch_size, sequence_length, channels or classes don't fit."""
    channels, height, width = loaded.train_x.shape[1:]
    size, side = f"{height} x {width} pixels", config.patch_size
    if height % side or width % side:
        raise ConfigError(f"patch_size={side}: must divide the {size} of data={config.data!r}")
    patches = (height // side) * (width // side)
    for name, right, why in (
        ("sequence_length", patches, f"images of {size} have {patches} patches of patch_size={side}"),
        ("channels", channels, "its images are read as RGB" if channels == 3 else f"its pixels have {channels}"),
        ("classes", len(loaded.classes), f"it has {len(loaded.classes)}"),
    ):
        if (value := getattr(config, name)) != right:
            raise ConfigError(f"{name}={value} with data={config.data!r}: {why}; set {name}: {right}")
