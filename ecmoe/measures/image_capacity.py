"""How a trained classifier bears less capacity, without retraining (Riquelme et al. 2021, section 4).

Capacity is in expert places per patch, c, for every router: experts hold c n / e patches each. That is expert choice's
capacity factor, and top_k times token choice's.
"""

import base64
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ecmoe.config import RunConfig
from ecmoe.data.images import ImageData
from ecmoe.model.vision import VisionTransformer
from ecmoe.routers import ROUTERS
from ecmoe.routing import altered, watched


@contextmanager
def at_capacity(model: VisionTransformer, places: float) -> Iterator[VisionTransformer]:
    """Within it every MoE layer has `places` expert places per patch."""
    row, values = model.config.row, model.config.to_dict()
    if not row.capacity:
        able = ", ".join(name for name, other in ROUTERS.items() if other.capacity)
        raise ValueError(f"router={model.config.router!r} has no capacity that could be changed: take one of {able}")
    if model.config.router == "expert_choice" and values["gate"] == "scaled":
        raise ValueError("gate='scaled' is a multiple of e / c: another capacity would change the gates, too")
    with altered(model, capacity_factor=places / row.asked(values), rounding="exact"):
        yield model


@torch.no_grad()
def experts_per_patch(model: VisionTransformer, images: Tensor) -> tuple[Tensor, Tensor]:
    """(B, C, H, W) -> logits (B, classes), and how many experts took each patch: (MoE layers, B, T)."""
    with watched(model) as seen:
        logits = model(images)
    B, T = len(images), model.config.sequence_length
    return logits, torch.stack([chosen.experts_per_token(B * T).view(B, T) for _, chosen in seen])


@torch.no_grad()
def accuracy_at(model: VisionTransformer, config: RunConfig, *, places: float) -> dict[str, float]:
    """The validation images with `places` expert places per patch: accuracy, val_loss (nats per image), shares left out.

    patches_left_out: (patch, layer) pairs that no expert took. images_left_out: images of which no expert took any
    patch in any layer.
    """
    data, device = _validation(model, config)
    batches = []
    with at_capacity(model, places):
        for x, y in data.val_batches():
            y = y.to(device)
            logits, counts = experts_per_patch(model, x.to(device))
            right, left_out = (logits.argmax(1) == y).double(), counts == 0
            found = right, F.cross_entropy(logits, y), left_out.double(), left_out.all(2).all(0).double()
            batches.append([float(value.mean()) for value in found])
    names = ("accuracy", "val_loss", "patches_left_out", "images_left_out")
    return {name: sum(values) / len(batches) for name, values in zip(names, zip(*batches, strict=True), strict=True)}


@torch.no_grad()
def patches_at(model: VisionTransformer, config: RunConfig, *, places: float, count: int = 8) -> dict[str, Any]:
    """`count` images spread evenly over the first validation batch, first to last: pixels (base64 of uint8), shape
    (count, H, W, C), truth, guess, and experts (count, rows, columns) per patch in the first MoE layer.
    """
    data, device = _validation(model, config)
    x, y = next(iter(data.val_batches()))
    with at_capacity(model, places):
        logits, counts = experts_per_patch(model, x.to(device))
    which = np.linspace(0, len(x) - 1, count).round().astype(int)
    pixels = (255 * x[which]).round().to(torch.uint8).movedim(1, -1).contiguous()
    columns = x.shape[-1] // config.patch_size
    return {
        "pixels": base64.b64encode(pixels.numpy().tobytes()).decode(),
        "shape": list(pixels.shape),
        "truth": [data.classes[i] for i in y[which].tolist()],
        "guess": [data.classes[i] for i in logits.argmax(1).cpu()[which].tolist()],
        "experts": counts[0].cpu()[which].view(count, -1, columns).tolist(),
    }


def _validation(model: VisionTransformer, config: RunConfig) -> tuple[ImageData, torch.device]:
    data = ImageData(config)
    data.setup()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).eval()
    return data, device
