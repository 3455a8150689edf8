"""Probe: how many bits about a target some features hold, beyond what is known without them.

Usable information (Xu et al. 2020, "A Theory of Usable Information under Computational Constraints"): the fall in
held-out cross-entropy when multinomial logistic regression may read the features. What it can't read isn't counted,
so it is a lower bound of what they hold; and as it is scored on sequences that it wasn't trained on, it comes out
slightly below 0 where there is nothing to read. It is not clipped.

Letters: n tokens, m features, C classes.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

RIDGES = (1000.0, 100.0, 10.0)  # precisions of the weights' prior, strongest first
TRAIN, SELECT = 0.6, 0.2  # shares of the sequences; the rest is scored


class Sample(NamedTuple):
    """Some tokens."""

    known: Tensor  # (n, C) log-probabilities of the target before the features are read
    features: Tensor  # (n, m)
    target: Tensor  # (n,) int64


def information(known: Tensor, features: Mapping[str, Tensor], target: Tensor) -> dict[str, float]:
    """Bits per token that each set of features holds about the target, beyond what is known; held out.

    Args:
        known: (N, T, C) log-probabilities of N sequences' targets. features: name -> (N, T, m). target: (N, T) int64.

    Whole sequences are dealt out by a fixed shuffle: 60% to train on, 20% to choose the ridge by, 20% to score. The
    probe without features has an intercept too, so that correcting `known` as a whole counts as nothing.
    """
    nothing = target.new_zeros(*target.shape, 0)
    blind = _held_out(_parts(known, nothing, target))
    return {name: (blind - _held_out(_parts(known, x, target))) / math.log(2) for name, x in features.items()}


def _parts(*tensors: Tensor) -> list[Sample]:
    """(N, T, ...) known, features, target -> the three samples, features standardised by the first."""
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
    """Nats per token on the last part of the probe trained on the first, at the ridge that is best on the second."""
    train, select, score = parts
    m, C = train.features.shape[1], train.known.shape[1]
    W = train.known.new_zeros(m + 1, C, requires_grad=True)  # the last row is the intercept
    best, nats = math.inf, math.inf
    for ridge in RIDGES if m else (0.0,):  # each goes on from the one before
        _fit(W, train, ridge)
        with torch.no_grad():
            selected, scored = float(_loss(W, select)), float(_loss(W, score))
        if selected >= best:
            break
        best, nats = selected, scored
    return nats


def _fit(W: Tensor, sample: Sample, ridge: float) -> None:
    """Minimise cross-entropy + ridge/2 |W|^2, in place: it is convex, so where it starts doesn't matter."""
    optimizer = torch.optim.LBFGS([W], max_iter=20, history_size=8, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = _loss(W, sample) + ridge / (2 * len(sample.target)) * W[:-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)


def _loss(W: Tensor, sample: Sample) -> Tensor:
    return F.cross_entropy(sample.known + sample.features @ W[:-1] + W[-1], sample.target)
