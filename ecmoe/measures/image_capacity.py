"""How a trained classifier bears less capacity, without retraining (Riquelme et al. 2021, section 4).

Capacity is in expert places per patch, c, for every router: experts hold c n / e patches each. That is expert choice's
capacity factor, and top_k times token choice's.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F

from ecmoe.config import RunConfig
from ecmoe.data.image_batches import ImageData
from ecmoe.measures.measure import Compute, measure
from ecmoe.model.vision import VisionTransformer
from ecmoe.routing import ExpertChoice, ExpertThreshold
from ecmoe.study.stats import paired_difference
from ecmoe.training.result import Result


def keys_at(keys: Mapping[str, Any], places: float) -> dict[str, Any]:
    """The keys of an arm with `places` expert places per patch."""
    asked = keys.get("top_k", RunConfig().top_k) if keys.get("router") == "token_choice" else 1
    return {**keys, "capacity_factor": places / asked}


@contextmanager
def at_capacity(model: VisionTransformer, places: float) -> Iterator[VisionTransformer]:
    """Within it every MoE layer has `places` expert places per patch.

    Raises:
        ValueError: of a router that has no capacity in evaluation, or whose gates depend on it.
    """
    routers = [layer.router for layer in model.moe_layers]
    for router in routers:
        if not hasattr(router, "capacity_factor") or isinstance(router, ExpertThreshold):
            raise ValueError(
                f"{type(router).__name__} has no capacity that could be changed: take ExpertChoice or TokenChoice"
            )
        if getattr(router, "gate", None) == "scaled" and isinstance(router, ExpertChoice):
            raise ValueError("gate='scaled' is a multiple of e / c: another capacity would change the gates, too")
    before = [router.capacity_factor for router in routers]
    try:
        for router in routers:
            router.capacity_factor = places / getattr(router, "top_k", 1)
        yield model
    finally:
        for router, factor in zip(routers, before, strict=True):
            router.capacity_factor = factor


@torch.no_grad()
def experts_per_patch(model: VisionTransformer, images: Tensor) -> tuple[Tensor, Tensor]:
    """(B, C, H, W) -> logits (B, classes), and how many experts took each patch: (MoE layers, B, T)."""
    seen: dict[Any, Tensor] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda layer, args: seen.update({layer: args[0]})) for layer in model.moe_layers
    ]
    try:
        logits = model(images)
    finally:
        for hook in hooks:
            hook.remove()
    counts = []
    for layer, x in seen.items():  # the same scores make the same choice
        B, T, _ = x.shape
        chosen = layer.router.assign(layer.router.logits(x), batch_shape=(B, T))
        counts.append(chosen.experts_per_token(B * T).view(B, T))
    return logits, torch.stack(counts)


def accuracy_at(places: float) -> Compute:
    """A measurement of the validation images: accuracy, val_loss (nats per image), and shares left out.

    patches_left_out: (patch, layer) pairs that no expert took. images_left_out: images of which no expert took any
    patch in any layer.
    """

    def compute(model: VisionTransformer, config: RunConfig) -> dict[str, float]:
        data, device = _validation(model, config)
        sums = dict.fromkeys(("accuracy", "val_loss", "patches_left_out", "images_left_out"), 0.0)
        batches = list(data.val_batches())
        with at_capacity(model, places):
            for x, y in batches:
                y = y.to(device)
                logits, counts = experts_per_patch(model, x.to(device))
                sums["accuracy"] += float((logits.argmax(1) == y).double().mean())
                sums["val_loss"] += float(F.cross_entropy(logits, y))
                sums["patches_left_out"] += float((counts == 0).double().mean())
                sums["images_left_out"] += float((counts == 0).all(2).all(0).double().mean())
        return {name: value / len(batches) for name, value in sums.items()}

    return compute


def patches_at(places: float, count: int = 8) -> Compute:
    """A measurement of `count` images spread evenly over the first validation batch, first to last: pixels (base64 of
    uint8), shape (count, H, W, C), truth, guess, and experts (count, rows, columns) per patch in the first MoE layer.
    """

    def compute(model: VisionTransformer, config: RunConfig) -> dict[str, Any]:
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

    return compute


def sweep(
    runs: Mapping[str, Sequence[Result]], capacities: Sequence[float], *, scale: str = "smoke", train: bool = True
) -> pd.DataFrame:
    """`accuracy_at` of every run at every capacity: arm, seed, capacity, and what was measured, NaN where it wasn't.

    Args:
        runs: arm -> its results, one a seed. scale, train: as of `measure`.
    """
    names = ("accuracy", "val_loss", "patches_left_out", "images_left_out")
    rows = []
    for arm, results in runs.items():
        for result in results:
            for c in capacities:
                found = measure(result, f"accuracy-at-{_text(c)}", accuracy_at(c), scale=scale, train=train)
                values = found or dict.fromkeys(names, math.nan)
                rows.append({"arm": arm, "seed": result.summary["seed"], "capacity": c, **values})
    return pd.DataFrame(rows, columns=["arm", "seed", "capacity", *names])


def gallery(
    runs: Mapping[str, Sequence[Result]], places: float, *, scale: str = "smoke", train: bool = True
) -> dict[str, dict[str, Any]]:
    """arm -> `patches_at` of its first seed, for the arms that have one."""
    found = {
        arm: measure(results[0], f"patches-at-{_text(places)}", patches_at(places), scale=scale, train=train)
        for arm, results in runs.items()
    }
    return {arm: value for arm, value in found.items() if value}


def as_trained(runs: Mapping[tuple[str, float], Sequence[Result]]) -> pd.DataFrame:
    """(arm, capacity) -> results, as `sweep` has it: every run evaluated with the capacity that it was trained with."""
    rows = [
        {"arm": arm, "seed": result.summary["seed"], "capacity": c, "accuracy": result.summary.get("accuracy")}
        for (arm, c), results in runs.items()
        for result in results
    ]
    return pd.DataFrame(rows).astype({"accuracy": float})


def differences(panels: Mapping[str, pd.DataFrame], pairs: Sequence[tuple[str, str]]) -> pd.DataFrame:
    """How far the first arm of each pair is ahead, in points of accuracy over paired seeds: a column per capacity.

    Args:
        panels: name -> of `sweep` or `as_trained`.

    Returns:
        rows of panel, pair, and texts such as "+9.7 (+8.1 to +11.3)", the 95% interval; one seed has none.
    """
    rows = []
    for panel, frame in panels.items():
        measured = frame.dropna(subset="accuracy")
        for a, b in pairs:
            row = {"models": panel, "difference": f"{a} \u2212 {b}"}
            for c in sorted(frame["capacity"].unique()):
                at = measured[measured["capacity"] == c].set_index("seed")
                by_seed = [(100 * at.loc[at["arm"] == arm, "accuracy"]).to_dict() for arm in (a, b)]
                effect = paired_difference(*by_seed, "points")
                between = "" if effect.low is None else f" ({effect.low:+.1f} to {effect.high:+.1f})"
                row[f"c = {c:g}"] = f"{effect.mean:+.1f}{between}" if effect.n else None
            rows.append(row)
    return pd.DataFrame(rows)


def _validation(model: VisionTransformer, config: RunConfig) -> tuple[ImageData, torch.device]:
    data = ImageData(config)
    data.setup()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).eval()
    return data, device


def _text(places: float) -> str:
    """0.1 -> "0-1": a file's name."""
    return f"{places:g}".replace(".", "-")
