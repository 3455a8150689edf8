"""A probe: how many bits about a target some features hold, beyond a given baseline prediction.

Usable information (Xu et al. 2020, "A Theory of Usable Information under Computational Constraints") is the decrease
in held-out cross-entropy when multinomial logistic regression may read the features. It is a lower bound, since it
leaves out what the regression can't read. Because it is scored on held-out sequences, it is slightly below 0 for
features without information; it is not clipped.

Letters: n tokens, m features, C classes.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

RIDGES = (1000.0, 100.0, 10.0)  # L2 penalties on the weights, strongest first
TRAIN, SELECT = 0.6, 0.2  # shares of the sequences to train on and to select the ridge; the rest are scored


class Sample(NamedTuple):
    """Tokens of the training, selection or scoring sequences."""

    known: Tensor  # (n, C) baseline log-probabilities of the target
    features: Tensor  # (n, m)
    target: Tensor  # (n,) int64


def information(known: Tensor, features: Mapping[str, Tensor], target: Tensor) -> dict[str, float]:
    """Return the held-out bits per token that each set of features holds about the target, beyond `known`.

    known: (N, T, C) baseline log-probabilities of the target. features: name -> (N, T, m). target: (N, T) int64. Whole
    sequences are split by a fixed shuffle: 60% to train on, 20% to select the ridge, 20% to score. The probe without
    features has an intercept too, so that a global correction of `known` doesn't count as information."""
    nothing = target.new_zeros(*target.shape, 0)
    blind = _held_out(_parts(known, nothing, target))
    return {name: (blind - _held_out(_parts(known, x, target))) / math.log(2) for name, x in features.items()}


def _parts(*tensors: Tensor) -> list[Sample]:
    """Split known, features, target (N, T, ...) into the three samples; standardise features by the training sample."""
    N = len(tensors[0])
    sizes = [round(TRAIN * N), round(SELECT * N)]
    sizes.append(N - sum(sizes))
    if min(sizes) < 1:
        raise ValueError(f"{N} sequences are too few to train, select and score a probe: give at least 4")
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0)).to(tensors[0].device)
    known, features, target = (x[order].split(sizes) for x in tensors)
    mean = features[0].float().mean((0, 1))
    std = (features[0] - mean).square().mean((0, 1)).sqrt().clamp_min(1e-6)
    return [
        Sample(k.float().flatten(0, 1), ((x.float() - mean) / std).flatten(0, 1), y.flatten())
        for k, x, y in zip(known, features, target, strict=True)
    ]


def _held_out(parts: list[Sample]) -> float:
    """Train the probe on the first part, select the ridge on the second, and return nats per token on the third."""
    train, select, score = parts
    m, C = train.features.shape[1], train.known.shape[1]
    W = train.known.new_zeros(m + 1, C, requires_grad=True)  # the last row is the intercept
    best, nats = math.inf, math.inf
    for ridge in RIDGES if m else (0.0,):  # each fit starts from the previous one
        _fit(W, train, ridge)
        with torch.no_grad():
            selected, scored = float(_loss(W, select)), float(_loss(W, score))
        if selected >= best:
            break
        best, nats = selected, scored
    return nats


def _fit(W: Tensor, sample: Sample, ridge: float) -> None:
    """Minimise cross-entropy + ridge / (2 n) |W|^2 in place; the problem is convex, so the start doesn't matter."""
    optimizer = torch.optim.LBFGS([W], max_iter=20, history_size=8, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = _loss(W, sample) + ridge / (2 * len(sample.target)) * W[:-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)


def _loss(W: Tensor, sample: Sample) -> Tensor:
    return F.cross_entropy(sample.known + sample.features @ W[:-1] + W[-1], sample.target)
