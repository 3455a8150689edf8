"""Capped expert choice (section 3.3): every expert takes k tokens, no token goes to more than b experts.

Letters: g pools of m tokens, e experts, S (g, e, m) scores, X (g, e, m) bool: who holds whom,
k = m c / e (Eq. 1), b the cap. `capped_top_k` is the entry; "feasible" is ours, "dykstra" is the paper's.

"feasible" is a transport problem, solved by prices. An expert's price is what its last token gains over that
token's b-th best other offer; all experts set theirs at once, again and again (a damped auction), with a jitter
on the scores that shrinks and keeps equal tokens from moving together. For the loads that they give, those
prices are optimal, and cheapest paths then carry the surplus of one expert to another (successive shortest
paths, Ahuja et al. 1993, section 9.7), many tokens at a time. What is left moves directly, which is always
possible. The number of rounds is fixed, so no step waits for a number from the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ecmoe.config import ConfigError

# Shares of the mean score of a plain top-k: where the jitter starts, and where it ends. The end is what the
# objective may lose.
JITTER_FIRST, JITTER_LAST = 0.3, 1e-3
PRICE_ROUNDS = 40
PATH_ROUNDS = 64  # at most; fewer where they would take more than PATH_WORK comparisons
PATH_WORK = 2**29
PATH_LENGTH = 6
CHUNK = 2**24  # numbers in memory at once


def capped_top_k(
    S: Tensor, k: int, b: int, *, solver: str = "feasible", valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Each expert's k tokens with no token in more than b experts.

    Args:
        S: (g, e, m) scores; gradients pass to the ones that are chosen.
        k: tokens of an expert. b: the most experts of a token.
        solver: "feasible": exactly k and at most b, the sum of the chosen scores within 1% of the largest;
            "dykstra": the paper's entropy-regularised programme cut off at 100 iterations (see `Dykstra`).
        valid: (g, m) bool, False for padding. A pool then has floor(k valid / m) tokens an expert, its first
            places; what follows is filler.

    Returns:
        (G, I), both (g, e, k): scores and places of the chosen tokens, best first.

    Raises:
        ConfigError: m b < e k, more places to fill than tokens may take.
    """
    g, e, m = S.shape
    if m * b < e * k:
        raise ConfigError(
            f"max_experts_per_token={b}: {e} experts take k={k} of n={m} tokens each, {e * k} places, but "
            f"n b = {m * b}: use at least {-(-e * k // m)}"
        )
    if valid is None:
        valid = torch.ones(g, m, dtype=torch.bool, device=S.device)
    target = valid.sum(1) * k // m  # (g,)
    with torch.no_grad():
        if solver == "dykstra":
            A = dykstra(S, target, b, valid)
            I = A.topk(k, dim=2).indices  # noqa: E741  the paper's I = TopK(A, k)
            filler = torch.arange(k, device=S.device) >= target[:, None, None]
            best = S.gather(2, I).masked_fill(filler, -2.0).argsort(2, descending=True)
            I = I.gather(2, best)  # noqa: E741
        else:
            X = _feasible(S, target, b, valid)
            I = S.masked_fill(~X, -2.0).topk(k, dim=2).indices  # noqa: E741
    return S.gather(2, I), I


def _feasible(S: Tensor, target: Tensor, b: int, valid: Tensor) -> Tensor:
    """(g, e, m) bool: `transport` in units of the mean score of a plain top-k."""
    e, m = S.shape[1:]
    best = S.masked_fill(~valid[:, None], 0.0).sort(dim=2, descending=True).values
    inside = torch.arange(m, device=S.device) < target[:, None, None]
    places = (e * target[:, None, None]).clamp_min(1)
    unit = (best * inside).sum((1, 2), keepdim=True) / places
    return transport(S, target, b, valid, unit)


def transport(
    S: Tensor,
    target: Tensor,
    b: int,
    valid: Tensor,
    unit: Tensor,
    tolerance: float = JITTER_LAST,
) -> Tensor:
    """(g, e, m) bool: exactly `target` tokens of each expert, at most b experts of each valid token.

    Args:
        S: (g, e, m) finite scores. target: (g,) tokens of an expert, at most b valid tokens / e.
        b: at most e - 1. valid: (g, m) bool.
        unit: (g, 1, 1) what counts as a large difference of scores.
        tolerance: share of the unit that a place may lose against the best sum of scores.
    """
    unit = unit.clamp_min(torch.finfo(S.dtype).tiny)
    Z = S.masked_fill(~valid[:, None], float("-inf"))
    J = unit * _jitter(valid, S.shape[1], S.dtype)
    q = _prices(Z, J, target, b, valid, tolerance)
    Z = Z + tolerance * J
    return _balance(_hold(Z - q, target, b), Z, target, b, tolerance * unit)


def _jitter(valid: Tensor, e: int, dtype: torch.dtype) -> Tensor:
    """(g, e, m) logistic numbers that depend on nothing but the place: the same choice every time."""
    place = valid.cumsum(1) - 1  # of the valid tokens alone: padding changes nothing
    expert = torch.arange(e, device=valid.device)
    rate = (expert[:, None] + 1) * 0.6180339887498949 % 1  # each expert's own, so that no two agree
    u = (place[:, None].double() + 1) * rate % 1
    return torch.logit(u.clamp(1e-3, 1 - 1e-3)).to(dtype)


def _prices(
    Z: Tensor, J: Tensor, target: Tensor, b: int, valid: Tensor, tolerance: float
) -> Tensor:
    """(g, e, 1) prices at which each expert is wanted by about `target` tokens, each taking its b best."""
    g, e, m = Z.shape
    # With a place to spare a token takes nothing below the price; without, it must take b whatever they cost.
    floor = torch.where(valid.sum(1) * b > e * target, 0.0, float("-inf"))[:, None, None].to(Z)
    last = target.clamp(1, m - 1)[:, None, None].expand(g, e, 1)
    most = int(m * b // e) + 1
    q = Z.new_zeros(g, e, 1)
    for step in range(PRICE_ROUNDS):
        share = step / (PRICE_ROUNDS - 1)
        Y = Z + J * (JITTER_FIRST * (tolerance / JITTER_FIRST) ** share)
        R = Y - q
        offers = R.topk(b + 1, dim=1).values
        # What the token would get instead: its b-th best offer of the others.
        other = torch.where(R >= offers[:, b - 1 : b], offers[:, b:], offers[:, b - 1 : b])
        gain = torch.where(valid[:, None], Y - other.clamp_min(floor), float("-inf"))
        ranked = gain.topk(min(most, m), dim=2).values
        new = (ranked.gather(2, last - 1) + ranked.gather(2, last)) / 2
        q = q + 0.5 * (new - q).nan_to_num(0.0, 0.0, 0.0)
    return q


def _hold(R: Tensor, target: Tensor, b: int) -> Tensor:
    """(g, e, m) bool: the e k best of all tokens' b best offers; no token over b, experts not yet even."""
    g, e, m = R.shape
    offers = R.topk(b, dim=1)
    order = offers.values.flatten(1).argsort(1, descending=True)
    taken = torch.arange(b * m, device=R.device) < (e * target)[:, None]
    taken = torch.zeros_like(taken).scatter(1, order, taken).view(g, b, m)
    return torch.zeros(g, e, m, dtype=torch.bool, device=R.device).scatter(1, offers.indices, taken)


def _balance(X: Tensor, Z: Tensor, target: Tensor, b: int, tolerance: Tensor) -> Tensor:
    """Carry tokens from experts with too many to experts with too few, along the cheapest paths.

    The last node, e, stands for a token's free places: a path through it drops one token and takes up another.
    """
    g, e, m = X.shape
    at = torch.arange(g, device=X.device)
    node = torch.arange(e + 1, device=X.device)
    X = torch.cat([X, X.sum(1, keepdim=True) < b], dim=1)  # (g, e + 1, m)
    Z = torch.cat([Z, torch.zeros_like(Z[:, :1]).where(Z[:, :1] > float("-inf"), Z[:, :1])], dim=1)
    X[:, e] &= Z[:, e] == 0

    for _ in range(min(PATH_WORK // (g * e * e * m), PATH_ROUNDS)):
        cost, count = _edges(X, Z, tolerance)
        excess = _excess(X, target)
        distance = torch.where(excess > 0, 0.0, float("inf")).to(Z.dtype)
        steps = []
        for _ in range(PATH_LENGTH):  # Bellman and Ford
            near, via = (distance[:, :, None] + cost).min(1)
            shorter = near < distance - 1e-3 * tolerance[:, 0]
            steps.append(torch.where(shorter, via, node))
            distance = torch.where(shorter, near, distance)
        v = torch.where(excess < 0, distance, float("inf")).argmin(1)
        amount = (-excess[at, v]).clamp_min(0)
        path = []
        for step in reversed(steps):
            u = step[at, v]
            path.append((u, v))
            amount = torch.where(u == v, amount, torch.minimum(amount, count[at, u, v]))
            v = u
        amount = torch.minimum(amount, excess[at, v].clamp_min(0))
        for u, v in path:
            _move(X, Z, u, v, amount, b)

    # An expert with more tokens than another holds as many more that the other doesn't: these can move.
    for _ in range(e - 1):
        excess = _excess(X, target)[:, :e]
        u, v = excess.argmax(1), excess.argmin(1)
        _move(X, Z, u, v, torch.minimum(excess[at, u], -excess[at, v]), b)
    return X[:, :e]


def _excess(X: Tensor, target: Tensor) -> Tensor:
    """(g, e + 1) tokens of each expert beyond its target; 0 for the free places."""
    excess = X.sum(2) - target[:, None]
    excess[:, -1] = 0
    return excess


def _edges(X: Tensor, Z: Tensor, tolerance: Tensor) -> tuple[Tensor, Tensor]:
    """Both (g, e + 1, e + 1): the least loss of moving a token from u to v, and how many cost about that."""
    give = Z.masked_fill(~X, float("inf"))
    full = X.clone()
    full[:, -1] = False  # a place can always become free
    take = Z.masked_fill(full, float("-inf"))
    g, nodes, m = X.shape
    rows = max(1, CHUNK // (g * nodes * m))
    cost, count = [], []
    for part in give.split(rows, dim=1):
        loss = part[:, :, None] - take[:, None]  # (g, rows, e + 1, m)
        least = loss.amin(3)
        cost.append(least)
        count.append((loss <= (least + tolerance)[..., None]).sum(3))
    return torch.cat(cost, 1), torch.cat(count, 1)


def _move(X: Tensor, Z: Tensor, u: Tensor, v: Tensor, amount: Tensor, b: int) -> None:
    """In each pool move the `amount` tokens that lose least from u to v (g,); fewer where there are fewer."""
    g, nodes, m = X.shape
    at, free = torch.arange(g, device=X.device), nodes - 1
    can = X[at, u] & (~X[at, v] | (v == free)[:, None])
    loss = (Z[at, u] - Z[at, v]).masked_fill(~can, float("inf"))
    amount = torch.minimum(amount, can.sum(1)) * (u != v)
    first = torch.arange(m, device=X.device) < amount[:, None]
    moved = torch.zeros_like(can).scatter(1, loss.argsort(1), first)
    X[at, u] = X[at, u] & ~moved
    X[at, v] = X[at, v] | moved
    X[:, free] = (X[:, :free].sum(1) < b) & (Z[:, free] == 0)


def dykstra(
    S: Tensor,
    target: Tensor,
    b: int,
    valid: Tensor,
    regularization: float = 0.001,
    iterations: int = 100,
) -> Tensor:
    """log A, (g, e, m), of section 3.3: max <S, A> + lambda H(A), rows sum to k, columns to at most b, 0 <= A <= 1.

    Dykstra's alternating projections in the Kullback-Leibler sense and the log domain, from exp(S / lambda).
    A row or column is scaled to its sum; the cap of 1 and the inequality carry Dykstra's correction, which an
    affine set doesn't need. The paper doesn't print its projections.
    """
    log_k = target.to(S.dtype).log()[:, None, None]
    padding = ~valid[:, None]
    log_b = torch.tensor(float(b), dtype=S.dtype, device=S.device).log()
    A = (S / regularization).masked_fill(padding, float("-inf"))
    column = A.new_zeros(A.shape[0], 1, A.shape[2])
    box = torch.zeros_like(A)
    for _ in range(iterations):
        A = A - (A.logsumexp(2, keepdim=True) - log_k)  # rows: exactly k
        before = A + column  # columns: at most b
        total = before.logsumexp(1, keepdim=True)
        column = (total - log_b).clamp_min(0).masked_fill(padding, 0.0)
        A = before - column
        before = A + box  # every entry: at most 1
        box = before.clamp_min(0)
        A = before - box
    return A


class CapReport(NamedTuple):
    """How far from its constraints a capped choice is; scalar tensors, the worst or the sum over pools.

    row_error, column_error: largest |row sum of A - k|, and largest excess of a column sum over b.
    over_cap: tokens in more than b experts. empty: slots that hold no token.
    """

    row_error: Tensor
    column_error: Tensor
    over_cap: Tensor
    empty: Tensor


def cap_report(S: Tensor, k: int, b: int, *, solver: str = "dykstra") -> CapReport:
    """Measure a solver on (g, e, m) scores; A of "feasible" is its own choice, of zeros and ones."""
    g, e, m = S.shape
    _, I = capped_top_k(S, k, b, solver=solver)  # noqa: E741
    X = torch.zeros_like(S).scatter(2, I, 1.0)
    A = X
    if solver == "dykstra":
        valid = torch.ones(g, m, dtype=torch.bool, device=S.device)
        A = dykstra(S, torch.full((g,), k, device=S.device), b, valid).exp()
    return CapReport(
        (A.sum(2) - k).abs().max(),
        (A.sum(1) - b).clamp_min(0).max(),
        (X.sum(1) > b).sum(),
        g * e * k - X.sum().long(),
    )
