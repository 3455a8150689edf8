"""What a trained model's routing does on held-out text: how many experts a token gets, and which tokens get many.

Letters: B sequences of T tokens, n = B T, e experts.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ecmoe.config import RunConfig
from ecmoe.data.batches import TextData
from ecmoe.model.metrics import MOST, SHARES
from ecmoe.model.transformer import Transformer
from ecmoe.routing import watched
from ecmoe.routing.capped import capped_top_k, dykstra

EXCERPT = 240  # tokens of text that a page shows
KINDS = ("word start", "word rest", "number", "punctuation", "white space", "other")


def held_out(config: RunConfig, batches: int = 1) -> tuple[TextData, Tensor]:
    """The data of a run, and (batches B, T + 1) tokens that it was not trained on."""
    data = TextData(config)
    data.setup()
    return data, torch.cat(data.val_batches()[:batches])


@torch.no_grad()
def experts_by_token(model: Transformer, config: RunConfig) -> dict[str, Any]:
    """How many experts tokens get, as trained, on a batch of held-out text: by kind and layer, of frequent ones, in an excerpt."""
    data, batch = held_out(config)
    ids = batch[:, :-1]
    device = next(model.parameters()).device
    with watched(model) as seen:
        model.hidden(ids.to(device))
    n = ids.numel()
    counts = torch.stack([assignment.experts_per_token(n).cpu() for _, assignment in seen])  # (layers, n)
    names = {i: data.tokenizer.decode([i]) for i in ids.unique().tolist()}
    texts = [names[i] for i in ids.flatten().tolist()]
    kinds = np.array([_kind(text, before) for text, before in zip(texts, ["", *texts], strict=False)])
    return {
        "kinds": [
            {"kind": kind, "layer": layer, "tokens": int(of_kind.sum())} | _shares(counts[layer][of_kind])
            for kind in KINDS
            if (of_kind := kinds == kind).any()
            for layer in range(len(seen))
        ],
        "words": _words(ids.flatten(), counts.float().mean(0), names, least=max(20, n // 2000)),
        "text": texts[: min(EXCERPT, ids.shape[1])],
        "counts": counts[:, : min(EXCERPT, ids.shape[1])].tolist(),
    }


@torch.no_grad()
def caps_on_trained_scores(model: Transformer, config: RunConfig) -> dict[str, Any]:
    """The two solvers of capped expert choice on the scores that a trained model gives held-out text, by layer, cap and solver.

    score_kept: the sum of the chosen scores over that of the uncapped top-k. over_cap: tokens in more experts than the cap.
    row_error, column_error: largest |row sum of A - k|, and largest excess of a column sum over the cap, of section 3.3's A
    ("feasible": of the choice itself). empty: slots that hold no token.
    """
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
                G, I = capped_top_k(S, k, b, solver=solver)  # noqa: E741
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


def _kind(text: str, before: str) -> str:
    """What a token is for a reader; `before` is the token before it, which says whether a word goes on."""
    bare = text.strip()
    if not bare:
        return "white space" if text else "other"
    if bare[0].isalpha():
        goes_on = text[0].isalpha() and before[-1:].isalpha()
        return "word rest" if goes_on else "word start"
    if bare[0].isdigit():
        return "number"
    return "punctuation" if bare[0].isascii() and bare[0].isprintable() else "other"


def _shares(counts: Tensor) -> dict[str, float]:
    bins = counts.clamp(max=MOST).bincount(minlength=len(SHARES))
    return dict(zip(SHARES, (bins / bins.sum()).tolist(), strict=True))


def _words(ids: Tensor, experts: Tensor, names: dict[int, str], least: int) -> list[dict[str, Any]]:
    """Tokens that occur at least `least` times, most experts first: text, occurrences, mean experts."""
    times = ids.bincount()
    mean = ids.bincount(weights=experts.double()) / times
    often = (times >= least).nonzero().flatten().tolist()
    rows = [{"token": names[i], "times": int(times[i]), "experts": float(mean[i])} for i in often]
    return sorted(rows, key=lambda row: -row["experts"])
