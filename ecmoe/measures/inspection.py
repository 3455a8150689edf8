"""Inspect a trained model's routing on held-out data: experts per token, what a cap would change, accuracy at other capacities.

For every router, capacity is c expert places per token or patch: each expert has places for c n / e of them. So c is expert
choice's capacity factor, and top_k times token choice's capacity factor. Letters: B sequences or images of T tokens or
patches, n = B T, e experts.
"""

from contextlib import AbstractContextManager
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F

from ecmoe.config import RunConfig
from ecmoe.data.batches import TextData
from ecmoe.data.images import ImageData
from ecmoe.model.transformer import Transformer
from ecmoe.model.vision import VisionTransformer
from ecmoe.routers import ROUTERS
from ecmoe.routing import altered, watched
from ecmoe.routing.capped import capped_top_k, dykstra

EXCERPT = 240  # tokens of text that a page shows


def held_out(config: RunConfig, batches: int = 1) -> tuple[TextData, Tensor]:
    """Return the data of a run, and the first `batches` batches of its validation tokens, (batches B, T + 1)."""
    data = TextData(config)
    data.setup()
    return data, torch.cat(data.val_batches()[:batches])


@torch.no_grad()
def experts_by_token(model: Transformer, config: RunConfig) -> dict[str, Any]:
    """Count the experts per token, routed as in training, on a batch of held-out text.

    Returns text, counts: the tokens of an excerpt, and the number of experts of each, a row per layer. words: frequent
    tokens, those with most experts first: token, times (occurrences), experts (mean over occurrences and layers). A token
    that isn't valid UTF-8 by itself is named by its id, such as <195>."""
    data, batch = held_out(config)
    ids = batch[:, :-1]
    with watched(model) as seen:
        model.hidden(ids.to(next(model.parameters()).device))
    n, shown = ids.numel(), min(EXCERPT, ids.shape[1])
    counts = torch.stack([assignment.experts_per_token(n).cpu() for _, assignment in seen])  # (layers, n)
    names = {i: data.tokenizer.decode([i]) for i in ids.unique().tolist()}
    names |= {i: f"<{i}>" for i, text in names.items() if "\ufffd" in text}
    frame = pd.DataFrame({"token": [names[i] for i in ids.flatten().tolist()], "experts": counts.double().mean(0)})
    words = frame.groupby("token", sort=False)["experts"].agg(times="count", experts="mean").reset_index()
    words = words[words["times"] >= max(20, n // 2000)].sort_values("experts", ascending=False)
    excerpt = {"text": frame["token"][:shown].tolist(), "counts": counts[:, :shown].tolist()}
    return excerpt | {"words": words.to_dict("records")}


@torch.no_grad()
def caps_on_trained_scores(model: Transformer, config: RunConfig) -> dict[str, Any]:
    """Apply both solvers of capped expert choice to a trained model's scores on held-out text, by layer, cap, solver.

    score_kept: sum of the chosen scores, divided by that of the uncapped top-k. over_cap: tokens with more experts than
    the cap. row_error, column_error: largest |row sum of A - k|, and largest excess of a column sum of A over the cap,
    where A is that of section 3.3 (for "feasible", the 0/1 choice itself). empty: slots without a token."""
    _, batch = held_out(config)
    with watched(model) as seen:
        model(batch[:, :-1].to(next(model.parameters()).device))
    rows = []
    for layer, (logits, _) in enumerate(seen):
        S = logits.softmax(1).T[None]  # (1, e, n)
        k = int(S.shape[2] * config.capacity_factor / config.num_experts)
        plain = S.topk(k, dim=2).values.sum()
        for b in (2, 3):
            for solver in ("feasible", "dykstra"):
                G, I = capped_top_k(S, k, b, solver=solver)
                A = X = torch.zeros_like(S).scatter(2, I, 1.0)
                if solver == "dykstra":
                    every = torch.ones_like(S[:, 0], dtype=torch.bool)
                    A = dykstra(S, torch.full((1,), k, device=S.device), b, every).exp()
                found = {
                    "score_kept": G.sum() / plain, "row_error": (A.sum(2) - k).abs().max(),
                    "column_error": (A.sum(1) - b).clamp_min(0).max(), "over_cap": (X.sum(1) > b).sum(),
                    "empty": I.numel() - X.sum(),
                }  # fmt: skip
                where = {"layer": layer, "cap": b, "solver": solver}
                rows.append(where | {name: float(value) for name, value in found.items()})
    return {"rows": rows, "tokens": batch[:, :-1].numel()}


def at_capacity(model: VisionTransformer, places: float) -> AbstractContextManager:
    """Give every MoE layer `places` expert places per patch in the block; raise a ValueError if its router can't."""
    row, values = model.config.row, model.config.to_dict()
    if not row.capacity:
        able = ", ".join(name for name, other in ROUTERS.items() if other.capacity)
        raise ValueError(f"router={model.config.router!r} has no capacity that could be changed: take one of {able}")
    if model.config.router == "expert_choice" and values["gate"] == "scaled":
        raise ValueError("gate='scaled' is a multiple of e / c: another capacity would change the gates, too")
    return altered(model, capacity_factor=places / (values["top_k"] if "top_k" in row.keys else 1), rounding="exact")


@torch.no_grad()
def experts_per_patch(model: VisionTransformer, images: Tensor) -> tuple[Tensor, Tensor]:
    """Map images (B, C, H, W) to logits (B, classes) and the number of experts per patch, (MoE layers, B, T)."""
    with watched(model) as seen:
        logits = model(images)
    B, T = len(images), model.config.sequence_length
    return logits, torch.stack([chosen.experts_per_token(B * T).view(B, T) for _, chosen in seen])


@torch.no_grad()
def accuracy_at(model: VisionTransformer, config: RunConfig, *, places: float) -> dict[str, float]:
    """Evaluate on the validation images with `places` expert places per patch, without retraining (Riquelme et al. 2021,
    section 4): accuracy and val_loss (nats per image). patches_left_out: share of (patch, layer) pairs that no expert took.
    images_left_out: share of images of which no expert took any patch in any layer."""
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
