"""How expert choice's top-k depends on other tokens, what it gains from that, and how causal routing compares.

Everything is measured on a copy of the model in float64, so that rounding doesn't flip decisions.

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

SMOOTHING = 8.0  # pseudo-count, in tokens, of the unigram in the smoothed bigram; ours
GIVEN = ("token frequencies", "the current token", "the model, causally")
# Two routings of the same weights: top-k over the pool, as in training, and causal routing by running cut-offs.
ROUTINGS = {"as trained": nullcontext, "causally": causal_routing}


@torch.no_grad()
def decisions(model: Transformer, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the input of the output layer, (B, T, d), and which experts took each token, (L, B, T, e) bool."""
    with watched(model) as seen:
        hidden = model.hidden(ids)
    B, T = ids.shape
    return hidden, torch.stack([a.dense(B * T).view(B, T, -1) != 0 for _, a in seen])


def dependence(model: Transformer, config: RunConfig, *, kept: int = 4) -> dict[str, Any]:
    """Measure directly which share of routing decisions changes with tokens that they must not depend on.

    First, replace the second half of every sequence by other held-out text, and compare decisions on the first half.
    Second, replace all sequences but one, and compare decisions on that one; repeat for `kept` different sequences.
    `rows` has, by change and routing, the share of `decisions` (L x e per token), and of `tokens`, that changed."""
    model, _, windows = _opened(model, config, 2)
    return {"rows": changed_decisions(model, *windows[:, :-1].chunk(2), kept)}


def changed_decisions(model: Transformer, ids: Tensor, other: Tensor, kept: int) -> list[dict[str, Any]]:
    """Return the rows of `dependence` for any text `ids` and its replacement `other`, both (B, T) tokens."""
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


def next_token_information(
    model: Transformer, config: RunConfig, *, batches: int = 16, classes: int = 32
) -> dict[str, Any]:
    """Measure how many bits about the next token a token's routing holds, as trained and causally, beyond a baseline.

    The probe (probe.py) reads `routing_features`. Bits beyond the first baseline, the unigram, may only reflect the current
    token, or what the model knows causally. So there are two more baselines: the bigram of the training text, and the model's
    prediction under causal routing. Bits beyond these that only routing as trained holds come from later tokens.

    batches: of held-out text. classes: C, one for each of the C - 1 most frequent tokens, and one for all others.

    Returns rows: `bits` by baseline (`given`) and `routing`. entropy: bits per next token by baseline, without a probe.
    classes, covered: C, and the share of the training text in the first C - 1 classes. tokens: number probed."""
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
        with torch.no_grad():  # `hidden` is from the last of ROUTINGS, causally; a batch's logits take 8 GB in float64
            predicted += [by_class(model.logits(part), class_of) for part in hidden[:, :-1].split(8)]
    # Leave out the last token: its next token isn't in the pool.
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
    """(L, B, T, e) decisions -> (B, T - 1, 2 L e): a token's decisions, and remaining capacity per remaining token."""
    L, B, T, e = taken.shape
    own = taken.permute(1, 2, 0, 3).reshape(B, T, L * e).float()
    tokens_left = torch.arange(T - 1, 0, -1, device=taken.device)[:, None]  # T - 1 - t after token t
    places_left = T * c / e - own.cumsum(dim=1)
    return torch.cat([own[:, :-1], (places_left[:, :-1] / tokens_left).clamp(0, 1)], dim=2)


def frequent_classes(counts: np.ndarray, classes: int) -> tuple[Tensor, float]:
    """Return each token's class (V,), its frequency rank but at most C - 1, and the share of text below C - 1."""
    C = min(classes, len(counts))
    rank = np.argsort(-counts, kind="stable").argsort()
    return torch.from_numpy(rank.clip(max=C - 1)), float(counts[rank < C - 1].sum() / counts.sum())


def by_class(logits: Tensor, class_of: Tensor) -> Tensor:
    """Map logits (..., V) to log-probabilities of classes (..., C)."""
    p = logits.softmax(dim=-1)
    sums = p.new_zeros(*p.shape[:-1], int(class_of.max()) + 1).index_add(-1, class_of, p)
    return sums.clamp_min(1e-30).log().float()


def class_tables(data: Any, class_of: Tensor) -> tuple[Tensor, Tensor]:
    """Return the training text's log p(class), (C,), and log p(class | last token), (V, C), smoothed by p(class)."""
    V, C = len(class_of), int(class_of.max()) + 1
    counts = np.zeros(V * C, np.int64)
    for windows in np.array_split(data.train[0], max(1, len(data.train[0]) // 4096)):
        pairs = windows[:, :-1].astype(np.int64) * C + class_of.numpy()[windows[:, 1:]]
        counts += np.bincount(pairs.ravel(), minlength=V * C)
    pairs = torch.from_numpy(counts).view(V, C).double()
    unigram = (pairs.sum(0) + 0.5) / (pairs.sum() + 0.5 * C)
    bigram = (pairs + SMOOTHING * unigram) / (pairs.sum(1, keepdim=True) + SMOOTHING)
    return unigram.log().float(), bigram.log().float()


def losses_by_routing(
    model: Transformer, config: RunConfig, *, pools: Sequence[str | int] = ("sequence", "batch")
) -> dict[str, Any]:
    """Compute the validation loss (nats per token) as trained, causally, with each pool, and with global top-k routing.
    pools: which tokens compete, as in RunConfig, or a number of tokens that divides a sequence (a small serving batch)."""
    model, _, windows = _opened(model, config, config.eval_batches)
    ways: list[tuple[str, int | None, AbstractContextManager]] = [
        ("as trained", config.pool_tokens if "pool" in config.row.keys else None, nullcontext()),
        ("causally", None, causal_routing(model)),
    ]
    if "pool" in config.row.keys:  # routers by threshold have no pool and no top-k
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
    """Return the mean loss in nats per token of windows (N, T + 1), routed in batches of `batch_size` sequences."""
    parts = [model(batch[:, :-1], targets=batch[:, 1:]) for batch in windows.split(batch_size)]
    return float(torch.stack(parts).mean())


def best_pairs(router: Router, logits: Tensor, *, batch_shape: tuple[int, int], **_: Any) -> Assignment:
    """Route by global top-k (proposed in section 6): each sequence takes the T c best of its T e (token, expert) pairs.
    The caps on an expert's load that section 6 adds are left out, because they would exclude some of the best pairs."""
    (B, T), (n, e) = batch_shape, logits.shape
    S = logits.softmax(dim=1)
    pair = S.view(B, T * e).topk(round(T * router.capacity_factor), dim=1).indices
    token = (pair // e + T * torch.arange(B, device=S.device)[:, None]).flatten()
    expert = (pair % e).flatten()
    return router._weigh(pack(token, expert, S[token, expert], n=n, e=e, slots=None), n)


def decoding(model: Transformer, config: RunConfig, *, tokens: int = 64) -> dict[str, Any]:
    """Continue half a held-out sequence by `tokens` tokens, with causal routing, a key-value cache and batch size 1."""
    model, data, windows = _opened(model, config)
    T = config.sequence_length // 2
    text = generate(model, windows[:1, :T], tokens, temperature=0.8, top_k=40)[0].tolist()
    return {"prompt": data.tokenizer.decode(text[:T]), "continuation": data.tokenizer.decode(text[T:])}


def _opened(model: Transformer, config: RunConfig, batches: int = 1) -> tuple[Transformer, TextData, Tensor]:
    """Return a float64 copy of the model, its data, and held-out windows (batches B, T + 1), on a GPU if available."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, (data, windows) = copy.deepcopy(model).double().eval().to(device), held_out(config, batches)
    for layer in model.moe_layers:  # the kernels are for the dtypes of training
        layer.kernels = "plain"
    return model, data, windows.to(device)
