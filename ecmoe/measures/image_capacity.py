"""Accuracy of a trained classifier at other capacities, without retraining (Riquelme et al. 2021, section 4).

For every router, capacity is c expert places per patch: each expert has places for c n / e patches. So c is expert
choice's capacity factor, and top_k times token choice's capacity factor.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import pandas as pd
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
    """Give every MoE layer `places` expert places per patch in the block; raise a ValueError if its router can't."""
    row, values = model.config.row, model.config.to_dict()
    if not row.capacity:
        able = ", ".join(name for name, other in ROUTERS.items() if other.capacity)
        raise ValueError(f"router={model.config.router!r} has no capacity that could be changed: take one of {able}")
    if model.config.router == "expert_choice" and values["gate"] == "scaled":
        raise ValueError("gate='scaled' is a multiple of e / c: another capacity would change the gates, too")
    with altered(model, capacity_factor=places / (values["top_k"] if "top_k" in row.keys else 1), rounding="exact"):
        yield model


@torch.no_grad()
def experts_per_patch(model: VisionTransformer, images: Tensor) -> tuple[Tensor, Tensor]:
    """Map images (B, C, H, W) to logits (B, classes) and the number of experts per patch, (MoE layers, B, T)."""
    with watched(model) as seen:
        logits = model(images)
    B, T = len(images), model.config.sequence_length
    return logits, torch.stack([chosen.experts_per_token(B * T).view(B, T) for _, chosen in seen])


@torch.no_grad()
def accuracy_at(model: VisionTransformer, config: RunConfig, *, places: float) -> dict[str, float]:
    """Evaluate on the validation images with `places` expert places per patch: accuracy and val_loss (nats per image).

    patches_left_out: share of (patch, layer) pairs that no expert took. images_left_out: share of images of which no
    expert took any patch in any layer.
    """
    data, device, rows = ImageData(config), next(model.parameters()).device, []
    data.setup()
    with at_capacity(model, places):
        for x, y in data.val_batches():
            y = y.to(device)
            logits, counts = experts_per_patch(model, x.to(device))
            left_out = counts == 0
            row = {"accuracy": logits.argmax(1) == y, "val_loss": F.cross_entropy(logits, y)}
            row |= {"patches_left_out": left_out, "images_left_out": left_out.all(2).all(0)}
            rows.append({name: float(value.double().mean()) for name, value in row.items()})
    return pd.DataFrame(rows).mean().to_dict()
