"""What expert choice's top-k sees of other tokens, what it gains by that, and how it is served without.

All is measured on a copy of the model in float64, in which a decision that doesn't depend on a token can't be flipped by
rounding either.

Letters: B sequences of T tokens, n = B T, e experts, c capacity factor, L MoE layers, V vocabulary, C classes.
"""

import copy
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ecmoe.config import RunConfig
from ecmoe.data.batches import TextData
from ecmoe.measures.inspection import held_out
from ecmoe.measures.probe import information
from ecmoe.model.generate import generate
from ecmoe.model.transformer import Transformer
from ecmoe.routing import Assignment, Router, altered, causal_routing, watched
from ecmoe.routing.assignment import pack

SMOOTHING = 8.0  # tokens that the unigram counts for in the bigram; ours
GIVEN = ("token frequencies", "the current token", "the model, causally")
# Two routings of the same weights: the pool of training, and the running cut-offs.
ROUTINGS = {"as trained": nullcontext, "causally": causal_routing}


@torch.no_grad()
def decisions(model: Transformer, ids: Tensor) -> tuple[Tensor, Tensor]:
    """What the output layer reads, (B, T, d), and who took whom: (L, B, T, e) bool."""
    with watched(model) as seen:
        hidden = model.hidden(ids)
    B, T = ids.shape
    return hidden, torch.stack([a.dense(B * T).view(B, T, -1) != 0 for _, a in seen])


# Who sees whom --------------------------------------------------------------------------------------


def dependence(model: Transformer, config: RunConfig, *, kept: int = 4) -> dict[str, Any]:
    """Share of routing decisions that change with tokens that they must not depend on. No probe, no model of it.

    The second half of every sequence is replaced by other held-out text, and the decisions on the first half are
    compared; then all sequences but one, and that one's decisions are compared (`kept` times, another one each).
    A row per change and routing has the share of `decisions` (L x e a token) that changed, and of `tokens` of which any did.
    """
    model, _, windows = _opened(model, config, 2)
    return {"rows": changed_decisions(model, *windows[:, :-1].chunk(2), kept)}


def changed_decisions(model: Transformer, ids: Tensor, other: Tensor, kept: int = 4) -> list[dict[str, Any]]:
    """`dependence` on texts of your own: ids, other (B, T)."""
    B, T = ids.shape
    later = torch.cat([ids[:, : T // 2], other[:, T // 2 :]], dim=1)
    rows = []
    for routing, routed in ROUTINGS.items():
        with routed(model):
            _, plain = decisions(model, ids)
            alone = []
            for i in torch.linspace(0, B - 1, min(kept, B)).round().long().tolist():
                others = other.clone()
                others[i] = ids[i]
                alone.append((plain != decisions(model, others)[1])[:, i])
            changed = {  # (L, sequences, positions, e) bool
                "later tokens replaced": (plain != decisions(model, later)[1])[:, :, : T // 2],
                "other sequences replaced": torch.stack(alone, dim=1),
            }
        for change, flips in changed.items():
            tokens = flips.any(dim=-1).any(dim=0).double().mean()
            rows.append({"change": change, "routing": routing, "decisions": flips.double().mean(), "tokens": tokens})
    return rows


# What routing tells of the next token ---------------------------------------------------------------


def next_token_information(
    model: Transformer, config: RunConfig, *, batches: int = 16, classes: int = 32
) -> dict[str, Any]:
    """Bits about the next token in the routing of a token, as trained and causally, by what is known besides.

    The probe (`ecmoe.measures.probe`) reads a token's own decisions, and for each expert and layer the share of the sequence's
    remaining tokens that it still has places for. What it holds beyond the unigram may be the current token, or what the model
    causally knows of the next one. So it is asked again beyond the bigram of the training text, and beyond the model's own
    prediction when routed causally: what only the decisions as trained still hold there comes from tokens not yet seen.

    Args:
        batches: of held-out text. classes: C, the most frequent tokens, each a class, and one class for all others.

    Returns:
        rows: one per `given` and `routing`, with `bits`. entropy: bits per token of the next one by `given`, before
        any probe. classes, covered: C, and the share of next tokens with a class of their own. tokens: probed.
    """
    model, data, windows = _opened(model, config.replace(eval_batches=batches), batches)
    class_of, covered = frequent_classes(data.token_counts, classes)
    class_of = class_of.to(windows.device)
    features: dict[str, list[Tensor]] = {routing: [] for routing in ROUTINGS}
    predicted = []
    for batch in windows.split(config.batch_size):
        for routing, routed in ROUTINGS.items():
            with routed(model):
                hidden, taken = decisions(model, batch[:, :-1])
            features[routing].append(routing_features(taken, config.capacity_factor))
        with torch.no_grad():  # causal: the last of ROUTINGS; the logits of a whole batch take 8 GB in float64
            predicted += [by_class(model.logits(part), class_of) for part in hidden[:, :-1].split(8)]
    # The last token's next one takes no part in the pool.
    current, target = windows[:, :-2], class_of[windows[:, 1:-1]]
    unigram, bigram = (table.to(windows.device) for table in class_tables(data, class_of.cpu()))
    known = (unigram.expand(*target.shape, -1), bigram[current], torch.cat(predicted))
    read = {routing: torch.cat(parts) for routing, parts in features.items()}
    rows, entropy = [], {}
    for given, log_p in zip(GIVEN, known, strict=True):
        entropy[given] = F.nll_loss(log_p.flatten(0, 1), target.flatten()) / math.log(2)
        for routing, bits in information(log_p, read, target).items():
            rows.append({"given": given, "routing": routing, "bits": bits})
    return {"rows": rows, "entropy": entropy, "classes": bigram.shape[1], "covered": covered, "tokens": target.numel()}


def routing_features(taken: Tensor, c: float) -> Tensor:
    """(L, B, T, e) decisions -> (B, T - 1, 2 L e): each token's own, and the share of tokens left that places are left for."""
    L, B, T, e = taken.shape
    own = taken.permute(1, 2, 0, 3).reshape(B, T, L * e).float()
    tokens_left = torch.arange(T - 1, 0, -1, device=taken.device)[:, None]  # after token t: T - 1 - t
    places_left = T * c / e - own.cumsum(dim=1)
    return torch.cat([own[:, :-1], (places_left[:, :-1] / tokens_left).clamp(0, 1)], dim=2)


def frequent_classes(counts: np.ndarray, classes: int) -> tuple[Tensor, float]:
    """(V,) class of each token: its rank by frequency, the last class for all others; and the share of text not in that."""
    C = min(classes, len(counts))
    rank = np.argsort(-counts, kind="stable").argsort()
    return torch.from_numpy(rank.clip(max=C - 1)), float(counts[rank < C - 1].sum() / counts.sum())


def by_class(logits: Tensor, class_of: Tensor) -> Tensor:
    """(..., V) logits -> (..., C) log-probabilities of classes."""
    p = logits.softmax(dim=-1)
    sums = p.new_zeros(*p.shape[:-1], int(class_of.max()) + 1).index_add(-1, class_of, p)
    return sums.clamp_min(1e-30).log().float()


def class_tables(data: Any, class_of: Tensor) -> tuple[Tensor, Tensor]:
    """log p(class) (C,) and log p(class | token before) (V, C), of the training text; the latter smoothed by the former."""
    V, C = len(class_of), int(class_of.max()) + 1
    counts = np.zeros(V * C, np.int64)
    for windows in np.array_split(data.train[0], max(1, len(data.train[0]) // 4096)):
        pairs = windows[:, :-1].astype(np.int64) * C + class_of.numpy()[windows[:, 1:]]
        counts += np.bincount(pairs.ravel(), minlength=V * C)
    pairs = torch.from_numpy(counts).view(V, C).double()
    unigram = (pairs.sum(0) + 0.5) / (pairs.sum() + 0.5 * C)
    bigram = (pairs + SMOOTHING * unigram) / (pairs.sum(1, keepdim=True) + SMOOTHING)
    return unigram.log().float(), bigram.log().float()


# Every way to route a trained model -----------------------------------------------------------------


def losses_by_routing(
    model: Transformer, config: RunConfig, *, pools: Sequence[str | int] = ("sequence", "batch")
) -> dict[str, Any]:
    """Validation loss (nats per token) of the same weights and text: as trained, causally, in each pool, and by global top-k.

    pools: which tokens compete: as in RunConfig, and any number of tokens that divides a sequence: a serving batch that small.
    """
    model, _, windows = _opened(model, config, config.eval_batches)
    ways: list[tuple[str, int | None, AbstractContextManager]] = [
        ("as trained", config.pool_tokens if "pool" in config.row.keys else None, nullcontext()),
        ("causally", None, causal_routing(model)),
    ]
    if "pool" in config.row.keys:  # a threshold has no pool, and takes no top-k
        for pool in pools:
            tokens = pool if isinstance(pool, int) else config.replace(pool=pool).pool_tokens
            ways.append((str(pool), tokens, altered(model, pool=pool, rounding="exact")))
        ways.append(("global top-k", config.sequence_length, altered(model, assign=best_pairs)))
    rows = []
    for way, competitors, routed in ways:
        with routed:
            rows.append({"way": way, "pool_tokens": competitors, "loss": loss(model, windows, config.batch_size)})
    return {"rows": rows}


@torch.no_grad()
def loss(model: Transformer, windows: Tensor, batch_size: int) -> float:
    """(N, T + 1) tokens, routed in batches of batch_size sequences -> nats per token."""
    parts = [model(batch[:, :-1], targets=batch[:, 1:]) for batch in windows.split(batch_size)]
    return float(torch.stack(parts).mean())


def best_pairs(router: Router, logits: Tensor, *, batch_shape: tuple[int, int], **_: Any) -> Assignment:
    """How a router assigns if each sequence takes the T c best of its T e pairs of token and expert (section 6's proposal).

    The caps that section 6 adds are left out: they bound an expert's load, and take from the best pairs.
    """
    (B, T), (n, e) = batch_shape, logits.shape
    S = logits.softmax(dim=1)
    pair = S.view(B, T * e).topk(round(T * router.capacity_factor), dim=1).indices
    token = (pair // e + T * torch.arange(B, device=S.device)[:, None]).flatten()
    expert = (pair % e).flatten()
    return router._weigh(pack(token, expert, S[token, expert], n=n, e=e, slots=None), n)


# Generation -----------------------------------------------------------------------------------------


def decoding(model: Transformer, config: RunConfig, *, tokens: int = 64) -> dict[str, Any]:
    """Generation by a batch of one, routed causally, with the key-value cache: half a held-out sequence, and how it goes on."""
    model, data, windows = _opened(model, config)
    T = config.sequence_length // 2
    text = generate(model, windows[:1, :T], tokens, temperature=0.8, top_k=40)[0].tolist()
    return {"prompt": data.tokenizer.decode(text[:T]), "continuation": data.tokenizer.decode(text[T:])}


def _opened(model: Transformer, config: RunConfig, batches: int = 1) -> tuple[Transformer, TextData, Tensor]:
    """A copy in float64, on the GPU if there is one, the data of its run, and held-out windows, (batches B, T + 1), where it is."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, (data, windows) = copy.deepcopy(model).double().eval().to(device), held_out(config, batches)
    for layer in model.moe_layers:  # the fast path is for the dtypes of training
        layer.kernels = "plain"
    return model, data, windows.to(device)
