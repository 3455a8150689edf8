"""Transport: give every expert equally many tokens, and a token at most b experts, at the largest sum of scores.

Letters: g pools of m tokens, e experts, S (g, e, m) scores, X (g, e, m) bool: True where an expert holds a token.

The solver uses prices: a token's offer from an expert is score minus price. An expert's price is the gain of the last
token it takes over that token's b-th best other offer. All experts update prices at once, round after round (a damped
auction), with a shrinking jitter on the scores that keeps equal tokens from moving together. The final prices are
optimal for the loads they give. Cheapest paths then move tokens from experts with too many to others (successive
shortest paths, Ahuja et al. 1993, section 9.7), many at a time. The rest moves directly, which is always possible.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

JITTER_FIRST = 0.3  # first size of the jitter, as a share of the unit; the last one is the tolerance
PRICE_ROUNDS = 80
SAMPLE, FULL_ROUNDS = 4096, 30  # sampled tokens in the first rounds; last rounds, with all tokens
PATH_ROUNDS = 64  # 16 times as many, at most, if each round checks whether more are needed
PATH_LENGTH = 6
NEAR = 512  # tokens of an expert that may move along a path: those that lose least
CHUNK = 2**25  # numbers in memory at once


@torch.compiler.disable  # type: ignore[untyped-decorator]  # compiling would take minutes to unroll the rounds
def transport(S: Tensor, target: Tensor, b: int, valid: Tensor, unit: Tensor, tolerance: float, fixed: bool) -> Tensor:
    """Return (g, e, m) bool: exactly `target` tokens per expert, at most b experts per valid token.

    Args:
        S: (g, e, m) finite scores. target: (g,) tokens per expert, at most b x valid tokens / e.
        b: cap, at most e - 1. valid: (g, m) bool, False for padding.
        unit: (g, 1, 1) size of a large difference of scores.
        tolerance: loss per place allowed against the largest sum of scores, as a share of the unit.
        fixed: make a fixed number of rounds, so that the host doesn't wait for the device to see which is the last.
    """
    unit = unit.clamp_min(torch.finfo(S.dtype).tiny)
    Z = S.masked_fill(~valid[:, None], float("-inf"))
    J = unit * _jitter(valid, S.shape[1], S.dtype)
    q = _prices(Z, J, target, b, valid, tolerance)
    Z = Z + tolerance * J
    return _balance(_hold(Z - q, target, b), Z, q, target, b, tolerance * unit, valid, fixed)


def _jitter(valid: Tensor, e: int, dtype: torch.dtype) -> Tensor:
    """Return (g, e, m) logistic numbers that depend only on the position, so that the choice is reproducible."""
    place = valid.cumsum(1) - 1  # among valid tokens: padding changes nothing
    expert = torch.arange(e, device=valid.device)
    rate = (expert[:, None] + 1) * 0.6180339887498949 % 1  # differs between experts
    u = (place[:, None].double() + 1) * rate % 1
    return torch.logit(u.clamp(1e-3, 1 - 1e-3)).to(dtype)


def _prices(Z: Tensor, J: Tensor, target: Tensor, b: int, valid: Tensor, tolerance: float) -> Tensor:
    """Return (g, e, 1) prices at which about `target` tokens want each expert, if each wants its b best offers."""
    e, m = Z.shape[1:]
    tokens = valid.sum(1)
    # With places to spare, a free place is an offer worth 0; otherwise a token must take b experts at any price.
    floor = torch.where(tokens * b > e * target, 0.0, float("-inf"))[:, None, None].to(Z)
    rounds = [(Z, J, target, valid)] * PRICE_ROUNDS
    if m > 2 * SAMPLE:  # the first rounds use an evenly spread sample
        place = (valid.cumsum(1).double() * 0.6180339887498949 % 1).masked_fill(~valid, 2.0)
        few = place.argsort(1)[:, :SAMPLE]
        some, columns = valid.gather(1, few), few[:, None].expand(-1, e, -1)
        sample = Z.gather(2, columns), J.gather(2, columns), target * some.sum(1) // tokens.clamp_min(1), some
        rounds[:-FULL_ROUNDS] = [sample] * (PRICE_ROUNDS - FULL_ROUNDS)
    q = torch.zeros_like(Z[:, :, :1])
    for step, (Z, J, target, valid) in enumerate(rounds):
        jitter = JITTER_FIRST * (tolerance / JITTER_FIRST) ** (step / (PRICE_ROUNDS - 1))
        new = _worth(Z + jitter * J, q, target, b, valid, floor)
        q = q + 0.5 * (new - q).nan_to_num(0.0, 0.0, 0.0)
    return q


def _worth(Y: Tensor, q: Tensor, target: Tensor, b: int, valid: Tensor, floor: Tensor) -> Tensor:
    """Return (g, e, 1) prices at which `target` tokens would want an expert if the other prices stayed."""
    g, e, m = Y.shape
    R = Y - q
    offers = R.topk(b + 1, dim=1).values
    # What the token would get instead: its b-th best offer among the other experts.
    other = torch.where(R >= offers[:, b - 1 : b], offers[:, b:], offers[:, b - 1 : b])
    gain = torch.where(valid[:, None], Y - other.clamp_min(floor), float("-inf"))
    ranked = gain.topk(min(m * b // e + 1, m), dim=2).values
    last = target.clamp(1, m - 1)[:, None, None].expand(g, e, 1)
    return (ranked.gather(2, last - 1) + ranked.gather(2, last)) / 2


def _hold(R: Tensor, target: Tensor, b: int) -> Tensor:
    """Return (g, e, m) bool: the e x target best of all tokens' b best offers; experts are not balanced yet."""
    g, e, m = R.shape
    offers = R.topk(b, dim=1)
    order = offers.values.flatten(1).argsort(1, descending=True)
    taken = torch.arange(b * m, device=R.device) < (e * target)[:, None]
    taken = torch.zeros_like(taken).scatter(1, order, taken).view(g, b, m)
    return torch.zeros(g, e, m, dtype=torch.bool, device=R.device).scatter(1, offers.indices, taken)


def _balance(
    X: Tensor, Z: Tensor, q: Tensor, target: Tensor, b: int, tolerance: Tensor, valid: Tensor, fixed: bool
) -> Tensor:
    """Move tokens from experts with too many to experts with too few, along the cheapest paths.

    The last node, e, stands for the tokens' free places: a path through it drops one token and adds another.
    """
    g, e, m = X.shape
    at = torch.arange(g, device=X.device)[:, None]
    taken = X.sum(1)  # (g, m)
    # What a token loses at these prices by leaving a node for the best offer that it hasn't taken.
    R = Z - q
    other = R.topk(b + 1, dim=1).values.gather(1, taken[:, None])
    leave = torch.cat([R, torch.zeros_like(other)], dim=1) - other
    Z = torch.cat([Z, torch.where(valid, 0.0, float("-inf")).to(Z)[:, None]], dim=1)
    X = torch.cat([X, (valid & (taken < b))[:, None]], dim=1)  # (g, e + 1, m)
    excess = _excess(X, target)
    # Loss allowed per moved token: together they may lose as much as all places at the tolerance.
    surplus = excess.clamp_min(0).sum(1).clamp_min(1)
    spare = tolerance * (e * target / surplus)[:, None, None].to(Z.dtype)
    looked_at = max(1, min(m, NEAR, CHUNK // (g * (e + 1) ** 2)))
    for _ in range(PATH_ROUNDS * (1 if fixed else 16)):
        if not fixed and not excess.any():
            break
        near = leave.masked_fill(~X, float("inf")).topk(looked_at, dim=2, largest=False).indices
        path, amount = _path(*_edges(X, Z, near, spare), excess, tolerance)
        for u, v in path:
            _move(X, Z, near[at, u[:, None]][:, 0], u, v, amount)
        X[:, e] = valid & (X[:, :e].sum(1) < b)
        excess = _excess(X, target)

    # If u has more tokens than v, at least the difference are tokens that v doesn't hold: these can move.
    tokens = torch.arange(m, device=X.device).expand(g, m)
    for _ in range(e - 1):
        if not fixed and not excess.any():
            break
        amount = torch.minimum(excess.amax(1), -excess.amin(1))
        _move(X, Z, tokens, excess[:, :e].argmax(1), excess[:, :e].argmin(1), amount)
        excess = _excess(X, target)
    return X[:, :e]


def _excess(X: Tensor, target: Tensor) -> Tensor:
    """Return (g, e + 1), by how many tokens the nodes exceed the target; 0 for the node of free places."""
    return F.pad(X[:, :-1].sum(2) - target[:, None], (0, 1))


def _edges(X: Tensor, Z: Tensor, near: Tensor, spare: Tensor) -> tuple[Tensor, Tensor]:
    """Return (g, u, v), the least loss of moving a token of near (g, u, l) from node u to v; and how many lose about that."""
    nodes = X.shape[1]
    token = near[:, :, None].expand(-1, -1, nodes, -1)  # (g, u, v, l)
    give = Z.gather(2, near).masked_fill(~X.gather(2, near), float("inf"))[:, :, None]
    held, take = (every[:, None].expand(-1, nodes, -1, -1).gather(3, token) for every in (X, Z))
    held &= torch.arange(nodes, device=X.device)[:, None] != nodes - 1  # any token may move to the node of free places
    loss = (give - take).masked_fill(held, float("inf"))
    least = loss.amin(3)
    return least, (loss <= (least + spare)[..., None]).sum(3)


def _path(cost: Tensor, count: Tensor, excess: Tensor, tolerance: Tensor) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Return each pool's cheapest path to its emptiest expert: edges (u, v) (g,), last first; and how many may move."""
    g, nodes = excess.shape
    at = torch.arange(g, device=cost.device)
    node = torch.arange(nodes, device=cost.device)
    distance = torch.where(excess > 0, 0.0, float("inf")).to(cost.dtype)
    steps = []
    for _ in range(PATH_LENGTH):  # Bellman and Ford
        best, via = (distance[:, :, None] + cost).min(1)
        shorter = best < distance - 1e-3 * tolerance[:, 0]
        steps.append(torch.where(shorter, via, node))
        distance = torch.where(shorter, best, distance)
    v = torch.where(distance < float("inf"), excess, 0).argmin(1)
    amount = (-excess[at, v]).clamp_min(0)
    path = []
    for step in reversed(steps):
        u = step[at, v]
        path.append((u, v))
        amount = torch.where(u == v, amount, torch.minimum(amount, count[at, u, v]))
        v = u
    return path, torch.minimum(amount, excess[at, v].clamp_min(0))


def _move(X: Tensor, Z: Tensor, near: Tensor, u: Tensor, v: Tensor, amount: Tensor) -> None:
    """In each pool move, from u to v (g,), the `amount` tokens of near (g, l) that lose least, or as many as can move."""
    at = torch.arange(len(X), device=X.device)[:, None]
    u, v = u[:, None], v[:, None]
    can = X[at, u, near] & (~X[at, v, near] | (v == X.shape[1] - 1))
    loss = (Z[at, u, near] - Z[at, v, near]).masked_fill(~can, float("inf"))
    first = torch.arange(near.shape[1], device=X.device) < amount[:, None]
    moved = torch.zeros_like(can).scatter(1, loss.argsort(1), first) & can & (u != v)
    X[at, u, near] = X[at, u, near] & ~moved
    X[at, v, near] = X[at, v, near] | moved
