"""Capped expert choice on a GPU, in Triton: solves `transport`'s problem in 25 launches and never waits for the device.

Letters: g pools of m tokens, e experts, k tokens per expert, b the cap, S (g, e, m) scores, X (g, e, m) nonzero where
an expert holds a token; E is e rounded up to a power of two, T the tokens of a program.

    prices  A damped auction, as in `transport`: tokens take their b best of S - price, and an expert's next price is
            the gain of its k-th token over that token's b-th best other offer. Each round is one launch: it counts the
            gains above nine thresholds around the price, and the next round interpolates. The first rounds ignore the
            cap, to find the order of magnitude; most rounds use a sample of the tokens, the last ones use all.
    hold    Every token takes its b best experts at these prices. With places to spare (m b > e k) a free place also
            has a price, and stays free if no expert is worth more.
    settle  Experts with more than k tokens pass some, about one in a thousand, to experts with fewer: first tokens
            that lose little, then others, in token order, an exact number each time.

The result is feasible for any scores. No token ever has more than b < e experts. While fewer than e k places are held,
some token has a free place and takes another expert; while more are held, an expert with more than k tokens drops one.
At e k places, let u hold more than k tokens and v fewer: v lacks at least load_u - load_v of u's tokens, so
min(load_u - k, k - load_v) can move from u to v, and then u or v holds k. `settle` thus ends within b + 2 e sweeps over
the tokens. Counts are integers, whose sums don't depend on the order: the same scores give the same choice.

The sum of scores is below the largest by the cost of these moves, and of the jitter that separates equal tokens.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ecmoe.kernels.common import INTERPRETED, Operator, block, cdiv, device_of

# Rounds of prices: without the cap, for a sample of the tokens, for all tokens.
UNCAPPED, SAMPLED, FULL = 4, 14, 4
ROUNDS = UNCAPPED + SAMPLED + FULL
SAMPLE, SAMPLE_LEAST = 8192, 1024  # sampled tokens over all pools; minimum per pool
JITTER_FIRST, JITTER_LAST = 0.2, 5e-3  # as shares of the mean score
DAMPING = 0.7
CHEAP = tl.constexpr(0.05)  # share of the mean score that the tokens moved first may lose
# ELEMENTS, T E numbers per program, for all tokens and for a sample.
MOST_TOKENS = 512  # T at most: three counts of up to T are packed into 30 bits
TILE = {"ELEMENTS": 4096, "num_warps": 4}
SAMPLE_TILE = {"ELEMENTS": 2048, "num_warps": 4}
SETTLE = {"BLOCK": 1024, "num_warps": 4}
SWEEP = {"BLOCK": 4096, "num_warps": 8}
MOST_EXPERTS = 512


def available(scores: Tensor, b: int) -> bool:
    """Return whether `capped` supports these (g, e, m) scores and this cap."""
    on_device = scores.is_cuda or (INTERPRETED and scores.device.type == "cpu")
    return on_device and scores.dtype == torch.float32 and b < scores.shape[1] <= MOST_EXPERTS


def capped(scores: Tensor, k: int, b: int) -> Tensor:
    """Return (g, e, k) int64, the chosen tokens in rising order, for (g, e, m) float32 scores of any strides.

    Each expert gets k tokens, each token at most b < e experts; e k <= m b. No gradient: gather the scores for that.
    """
    return _capped_op(scores.detach(), k, b)


def _capped(scores: Tensor, k: int, b: int) -> Tensor:
    with device_of(scores):
        return places(hold(scores, k, b), k)


_capped_op = Operator(_capped, lambda scores, k, b: scores.new_empty(*scores.shape[:2], k, dtype=torch.int64))


def hold(scores: Tensor, k: int, b: int) -> Tensor:
    """Return X, (g, e, m) int8, 1 where an expert holds a token."""
    g, e, m = scores.shape
    X = torch.empty(g, e, m, dtype=torch.int8, device=scores.device)
    unit = scores[:, :, :: max(1, m // SAMPLE)].abs().mean((1, 2)).nan_to_num(1.0, 1.0, 1.0)
    unit = unit.clamp_min(torch.finfo(scores.dtype).tiny * 1e6)
    # Of each expert, and of a free place: price and scale before each round; number of gains above each threshold.
    state = scores.new_zeros(ROUNDS + 1, g, 2, e + 1)
    state[0, :, 1] = 4 * unit[:, None]
    counts = torch.zeros(ROUNDS, g, 9, e + 1, dtype=torch.int32, device=scores.device)
    loads = torch.zeros(g, e, dtype=torch.int32, device=scores.device)  # how many tokens each expert holds
    problem = (scores, *scores.stride(), e, m, unit, state)
    spare = {"b": b, "SPARE": m * b > e * k}

    few = min(m, max(SAMPLE // g // 8 * 8, SAMPLE_LEAST))
    before = 0.0  # tokens that an expert should get in the previous round
    everyone = cut(m, e, TILE)
    for r in range(ROUNDS):
        tokens = few if r < UNCAPPED + SAMPLED else m
        sizes = cut(few, e, SAMPLE_TILE) if tokens < m else everyone
        fallen = min(max(r - UNCAPPED, 0) / (SAMPLED - 4), 1.0)
        jitter = JITTER_FIRST * (JITTER_LAST / JITTER_FIRST) ** fallen
        alone = r <= UNCAPPED  # without the cap, prices don't depend on each other
        damping = 1.0 if alone else DAMPING
        _round_kernel[cdiv(tokens, sizes["T"]), g](
            *problem, jitter, counts, before, damping, r, UNCAPPED, tokens, m // tokens,
            B=block(b), CAPPED=r >= UNCAPPED, **spare, **sizes,
        )  # fmt: skip
        before = k * tokens / m
    grid, sizes = (cdiv(m, everyone["T"]), g), spare | everyone
    _hold_kernel[grid](*problem, JITTER_LAST, counts, before, DAMPING, ROUNDS, UNCAPPED, X, loads, **sizes)
    _settle_kernel[1, g](*problem, JITTER_LAST, ROUNDS, X, loads, k, **sizes | SETTLE)
    return X


def cut(tokens: int, e: int, tile: dict) -> dict:
    """Return the kernel arguments E, T (out of `tokens` of a pool) and number of warps."""
    E = block(e)
    T = block(tokens, 16, min(max(16, tile["ELEMENTS"] // E), MOST_TOKENS))
    return {"E": E, "T": T, "num_warps": tile["num_warps"]}


def places(X: Tensor, k: int) -> Tensor:
    """Return (g, e, k) int64, the positions of the k ones in each row of X, (g, e, m) int8, in rising order."""
    g, e, m = X.shape
    out = torch.empty(g, e, k, dtype=torch.int64, device=X.device)
    sizes = SWEEP | {"BLOCK": block(m, 16, SWEEP["BLOCK"])}
    _places_kernel[g * e, cdiv(m, sizes["BLOCK"])](X, out, m, k, **sizes)
    return out


@triton.jit
def _offers(scores, sg, se, sm, pool, token, expert, inside, unit, jitter):
    """Return (T, E) scores with a jitter that depends only on token and expert; -inf outside."""
    place = pool.to(tl.int64) * sg + expert[None, :].to(tl.int64) * se + token[:, None].to(tl.int64) * sm
    S = tl.load(scores + place, mask=inside, other=0.0)
    S = tl.where(tl.abs(S) < 1e30, S, 0.0)  # a NaN affects no other score
    x = token[:, None].to(tl.uint32) * 0x9E3779B1 + expert[None, :].to(tl.uint32) * 0x85EBCA77
    x = (x ^ (x >> 15)) * 0x2C1B3C6D
    x = (x ^ (x >> 12)) * 0x297A2D39
    uniform = ((x ^ (x >> 15)) >> 8).to(tl.int32).to(tl.float32) / 16777216.0
    return tl.where(inside, S + (6.0 * uniform - 3.0) * (unit * jitter), float("-inf"))


@triton.jit
def _threshold(row):
    """Return -16, -4, -1, -1/4, 0, 1/4, 1, 4, 16 for rows 0 to 8."""
    size = tl.exp2(2.0 * tl.abs(row - 4).to(tl.float32) - 4.0)
    return tl.where(row == 4, 0.0, tl.where(row < 4, -size, size))


@triton.jit
def _price(state, counts, pool, node, e, unit, target, damping, r, first):
    """Return prices and scales of some nodes in round r: 0 to e - 1 are experts, e is a free place, higher ones unused.

    The previous round counted the gains that reach each threshold times the scale; the gain of the target-th token lies
    between two thresholds. `first`: first round that counted for these nodes. The pool's first program stores them.
    """
    pools, n = tl.num_programs(1), e + 1
    before = tl.maximum(r - 1, 0)
    row = tl.arange(0, 16)
    inside = (row < 9)[:, None] & (node <= e)[None, :]
    offset = (before * pools + pool) * 9 * n + row[:, None] * n + node[None, :]
    count = tl.load(counts + offset, mask=inside, other=0).to(tl.float32)
    old = state + (before * pools + pool) * 2 * n + node
    price = tl.load(old, mask=node <= e, other=0.0)
    scale = tl.load(old + n, mask=node <= e, other=1.0)
    enough = tl.sum((inside & (count >= target)).to(tl.int32), 0)  # thresholds that its gain reaches
    low = tl.minimum(tl.maximum(enough - 1, 0), 7)
    most = tl.sum(tl.where(row[:, None] == low[None, :], count, 0.0), 0)
    least = tl.sum(tl.where(row[:, None] == low[None, :] + 1, count, 0.0), 0)
    share = tl.minimum(tl.maximum((most - target) / tl.maximum(most - least, 1.0), 0.0), 1.0)
    step = _threshold(low) + share * (_threshold(low + 1) - _threshold(low))
    step = tl.where(enough > 0, step, -16.0) * scale
    price += tl.where(r > first, damping * step, 0.0)
    scale = tl.where(r > first, tl.maximum(tl.abs(step), 1e-3 * unit), scale)
    new = state + (r * pools + pool) * 2 * n + node
    tl.store(new, price, mask=(node <= e) & (tl.program_id(0) == 0))
    tl.store(new + n, scale, mask=(node <= e) & (tl.program_id(0) == 0))
    return price, scale


@triton.jit
def _count(counts, gain, scale, node, e):
    """Add to counts, (9, e + 1), how many of the gains, (T, nodes), reach each threshold."""
    for row in tl.static_range(0, 9, 3):
        three = tl.zeros(gain.shape, tl.int32)
        for i in tl.static_range(3):
            threshold = _threshold(tl.full((1,), row + i, tl.int32)) * scale
            three += (gain >= threshold[None, :]).to(tl.int32) << (10 * i)
        three = tl.sum(three, 0)  # three sums in one: none reaches 2^10
        for i in tl.static_range(3):
            count = (three >> (10 * i)) & 1023
            tl.atomic_add(counts + (row + i) * (e + 1) + node, count, mask=(node <= e) & (count > 0), sem="relaxed")


@triton.jit(do_not_specialize=["r", "first"])
def _round_kernel(
    scores, sg, se, sm, e, m, units, state, jitter, counts, before, damping, r, first, tokens, stride,
    b: tl.constexpr, B: tl.constexpr, SPARE: tl.constexpr, CAPPED: tl.constexpr,
    E: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Run one round of prices for `tokens` tokens of each pool: 8 neighbours out of every 8 stride tokens."""
    pool, pools = tl.program_id(1), tl.num_programs(1)
    place, expert = tl.program_id(0) * T + tl.arange(0, T), tl.arange(0, E)
    inside = (place < tokens)[:, None] & (expert < e)[None, :]
    token = place // 8 * (8 * stride) + place % 8
    unit = tl.load(units + pool)
    free_node = tl.full((1,), 0, tl.int32) + e
    free, free_scale = _price(state, counts, pool, free_node, e, unit, before * e, damping, r, first)
    price, scale = _price(state, counts, pool, tl.where(expert < e, expert, E + 1), e, unit, before, damping, r, 0)
    gain = _offers(scores, sg, se, sm, pool, token, expert, inside, unit, jitter) - price[None, :]
    counts += (r * pools + pool) * 9 * (e + 1)
    if CAPPED:
        column = tl.arange(0, B)
        best = tl.full((T, B), float("-inf"), tl.float32)
        rest = gain
        for i in tl.static_range(b):
            last = tl.max(rest, 1)
            best = tl.where(column[None, :] == i, last[:, None], best)
            rest = tl.where(rest < last[:, None], rest, float("-inf"))
        other = tl.max(rest, 1)
        if SPARE:
            _count(
                counts, best - free[None, :], free_scale + tl.zeros((B,), tl.float32), e + tl.zeros((B,), tl.int32), e
            )
            last, other = tl.maximum(last, tl.max(free)), tl.maximum(other, tl.max(free))
        gain -= tl.where(gain >= last[:, None], other[:, None], last[:, None])
    _count(counts, tl.where(inside, gain, float("-inf")), scale, expert, e)


@triton.jit(do_not_specialize=["r", "first"])
def _hold_kernel(
    scores, sg, se, sm, e, m, units, state, jitter, counts, before, damping, r, first, X, loads,
    b: tl.constexpr, SPARE: tl.constexpr, E: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Give every token its b best experts at the last prices, and count the tokens of each expert."""
    pool = tl.program_id(1)
    token, expert = tl.program_id(0) * T + tl.arange(0, T), tl.arange(0, E)
    inside = (token < m)[:, None] & (expert < e)[None, :]
    unit = tl.load(units + pool)
    free_node = tl.full((1,), 0, tl.int32) + e
    free, _ = _price(state, counts, pool, free_node, e, unit, before * e, damping, r, first)
    price, _ = _price(state, counts, pool, tl.where(expert < e, expert, E + 1), e, unit, before, damping, r, 0)
    R = _offers(scores, sg, se, sm, pool, token, expert, inside, unit, jitter) - price[None, :]
    can = inside
    if SPARE:
        can = inside & (R > free[None, :])
    held = tl.zeros((T, E), tl.int1)
    for _ in tl.static_range(b):
        best = tl.argmax(tl.where(can & ~held, R, float("-inf")), 1)
        held = held | (can & (best[:, None] == expert[None, :]))
    tl.store(_at(X, pool, e, m, token, expert), held.to(tl.int8), mask=inside)
    load = tl.sum(held.to(tl.int32), 0)
    tl.atomic_add(loads + pool * e + expert, load, mask=(expert < e) & (load > 0), sem="relaxed")


@triton.jit
def _at(X, pool, e, m, token, expert):
    return X + (pool.to(tl.int64) * e + expert[None, :]) * m + token[:, None]


@triton.jit(do_not_specialize=["r"])
def _settle_kernel(
    scores, sg, se, sm, e, m, units, state, jitter, r, X, loads, k,
    b: tl.constexpr, SPARE: tl.constexpr, E: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Run `settle` (see above), one program per pool."""
    pool, pools = tl.program_id(1), tl.num_programs(1)
    expert, offset = tl.arange(0, E), tl.arange(0, BLOCK)
    excess = tl.load(loads + pool * e + expert, mask=expert < e, other=k) - k
    total, unit = tl.sum(excess), tl.load(units + pool)
    if SPARE:
        while total < 0:  # each token with a free place takes its best other expert
            price = tl.load(state + (r * pools + pool) * 2 * (e + 1) + expert, mask=expert < e, other=0.0)
            price = tl.where(tl.abs(price) < 1e35, price, 0.0)  # finite offers make sure that the loop ends
            start = 0
            while (start < m) & (total < 0):
                token = start + tl.arange(0, T)
                inside = (token < m)[:, None] & (expert < e)[None, :]
                held = tl.load(_at(X, pool, e, m, token, expert), mask=inside, other=0) != 0
                can = ((token < m) & (tl.sum(held.to(tl.int32), 1) < b)).to(tl.int32)
                can = (can > 0) & (tl.cumsum(can) <= -total)
                R = _offers(scores, sg, se, sm, pool, token, expert, inside, unit, jitter)
                best = tl.argmax(tl.where(inside & ~held, R - price[None, :], float("-inf")), 1)
                takes = can[:, None] & (best[:, None] == expert[None, :])
                tl.store(_at(X, pool, e, m, token, expert), takes.to(tl.int8), mask=takes)
                taken = tl.sum(takes.to(tl.int32), 0)
                excess, total = excess + taken, total + tl.sum(taken)
                start += T
            tl.debug_barrier()
    X += pool.to(tl.int64) * e * m
    most, least = tl.max(excess), tl.min(excess)
    while (most > 0) & ((total > 0) | (least < 0)):
        # Drop tokens of the fullest expert while more than e k places are held; then move them to the emptiest.
        u, v = tl.argmax(excess, 0), tl.argmin(excess, 0)
        drop = total > 0
        amount = tl.where(drop, tl.minimum(most, total), tl.minimum(most, -least))
        source, target = X + u.to(tl.int64) * m, X + v.to(tl.int64) * m
        at, price = scores + pool.to(tl.int64) * sg, state + (r * pools + pool) * 2 * (e + 1)
        rise = tl.load(price + v) - tl.load(price + u)
        left, start, cheap = amount, 0, ~drop  # first, tokens that lose next to nothing
        while (left > 0) & ((start < m) | cheap):
            cheap &= start < m
            start = tl.where(start < m, start, 0)
            token = start + offset
            can = tl.load(source + token, mask=token < m, other=0) != 0
            can &= drop | (tl.load(target + token, mask=token < m, other=0) == 0)
            gain = tl.load(at + v.to(tl.int64) * se + token.to(tl.int64) * sm, mask=can, other=0)
            gain -= tl.load(at + u.to(tl.int64) * se + token.to(tl.int64) * sm, mask=can, other=0)
            can = (can & (~cheap | (gain - rise + unit * CHEAP > 0))).to(tl.int32)
            moves = (can > 0) & (tl.cumsum(can) <= left)
            tl.store(source + token, tl.zeros((BLOCK,), tl.int8), mask=moves)
            tl.store(target + token, tl.full((BLOCK,), 1, tl.int8), mask=moves & ~drop)
            left -= tl.sum(moves.to(tl.int32))
            start += BLOCK
        change = (expert == u).to(tl.int32)
        excess -= amount * change
        excess += tl.where(drop, 0, amount * (expert == v).to(tl.int32))
        total -= tl.where(drop, amount, 0)
        most, least = tl.max(excess), tl.min(excess)
        tl.debug_barrier()


@triton.jit
def _places_kernel(X, out, m, k, BLOCK: tl.constexpr):
    """Write the positions of the ones in this program's block, after those of earlier blocks."""
    row, offset = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    X, out = X + row * m, out + row * k
    mine = tl.program_id(1) * BLOCK
    before = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, mine, BLOCK):
        before += tl.load(X + start + offset).to(tl.int32)
    place = mine + offset
    one = tl.load(X + place, mask=place < m, other=0).to(tl.int32)
    target = tl.sum(before) + tl.cumsum(one) - one
    tl.store(out + target, place.to(tl.int64), mask=(one > 0) & (target < k))
