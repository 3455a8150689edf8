"""The steps of the transport solver, each against a loop; what it finds in the end is test_capped's and test_linear_assignment's."""

import math
from itertools import permutations, product

import pytest
import torch

from ecmoe.routing import capped, linear_assignment
from ecmoe.routing import transport as solver
from tests.routing.problems import generator

G, E, M = 2, 3, 7
FREE = E  # the node of free places
INF = float("inf")


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def near_ones(seed: int, *shape: int) -> torch.Tensor:
    """(*shape, M - 2) different tokens, in some order."""
    return drawn(seed, *shape, M).argsort(-1)[..., : M - 2]


def test_the_settings_are_those_of_the_runs_so_far():
    """Others are as feasible, but choose other tokens: the same config would be another run."""
    settings = {
        "JITTER_FIRST": 0.3, "PRICE_ROUNDS": 80, "SAMPLE": 4096, "FULL_ROUNDS": 30, "PATH_ROUNDS": 64,
        "PATH_LENGTH": 6, "NEAR": 512,
    }  # fmt: skip
    assert {name: getattr(solver, name) for name in settings} == settings
    assert (capped.TOLERANCE, linear_assignment.TOLERANCE) == (0.001, 0.0001)


@pytest.mark.parametrize("b", [1, 2])
def test_a_price_is_what_the_last_token_gains_over_its_best_other_offer(b):
    for seed, floor in product(range(4), (-INF, 0.0)):
        Y, q, valid = (
            drawn(seed, G, E, M),
            drawn(seed + 9, G, E, 1),
            torch.arange(M).expand(G, M) < torch.tensor([[M], [M - 2]]),
        )
        target = torch.tensor([2, 1])
        bound = torch.full((G, 1, 1), floor, dtype=Y.dtype)
        found = solver._worth(Y, q, target, b, valid, bound)
        for g, i in product(range(G), range(E)):
            gains = []
            for t in range(M - 2 * g):
                others = sorted((float(Y[g, j, t] - q[g, j]) for j in range(E) if j != i), reverse=True)
                gains.append(float(Y[g, i, t]) - max(others[b - 1], floor))
            gains.sort(reverse=True)
            assert found[g, i].item() == pytest.approx((gains[target[g] - 1] + gains[target[g]]) / 2)


@pytest.mark.parametrize("b", [1, 2])
def test_the_best_of_all_tokens_best_offers_are_held(b):
    R, target = drawn(0, G, E, M), torch.tensor([2, 1])
    expected = torch.zeros(G, E, M, dtype=torch.bool)
    for g in range(G):
        offers = [(float(R[g, i, t]), i, t) for t in range(M) for i in R[g, :, t].argsort(descending=True)[:b].tolist()]
        for _, i, t in sorted(offers, reverse=True)[: E * target[g]]:
            expected[g, i, t] = True
    assert torch.equal(solver._hold(R, target, b), expected)


def test_the_excess_is_beyond_the_target_and_none_of_free_places():
    X = drawn(0, G, E + 1, M) > 0
    found = solver._excess(X, torch.tensor([2, 5]))
    assert found.tolist() == [[*(int(X[g, i].sum()) - (2, 5)[g] for i in range(E)), 0] for g in range(G)]


def loss_of(X: torch.Tensor, Z: torch.Tensor, t: int, u: int, v: int) -> float:
    """Of moving token t from node u to v of a pool: infinite where it can't."""
    return float(Z[u, t] - Z[v, t]) if X[u, t] and (v == FREE or not X[v, t]) else INF


def test_an_edge_is_the_least_loss_and_how_many_cost_about_that():
    spare = torch.tensor([0.0, 0.7], dtype=torch.float64).view(G, 1, 1)
    for seed in range(5):
        X, Z = drawn(seed, G, E + 1, M) > 0, drawn(seed + 9, G, E + 1, M)
        near = near_ones(seed, G, E + 1)
        cost, count = solver._edges(X, Z, near, spare)
        for g, u, v in product(range(G), range(E + 1), range(E + 1)):
            losses = [loss_of(X[g], Z[g], t, u, v) for t in near[g, u].tolist()]
            assert cost[g, u, v].item() == pytest.approx(min(losses))
            assert count[g, u, v] == sum(loss <= min(losses) + spare[g].item() for loss in losses)


def test_those_that_lose_least_move():
    for seed, u, v in product(range(5), range(E + 1), range(E + 1)):
        X, Z, near, amount = drawn(seed, G, E + 1, M) > 0, drawn(seed + 9, G, E + 1, M), near_ones(seed, G), (2, 9)
        expected = X.clone()
        for g in range(G):
            can = [t for t in near[g].tolist() if loss_of(X[g], Z[g], t, u, v) < INF and u != v]
            for t in sorted(can, key=lambda t: loss_of(X[g], Z[g], t, u, v))[: amount[g]]:
                expected[g, u, t], expected[g, v, t] = False, True
        edge = torch.full((G,), u), torch.full((G,), v), torch.tensor(amount)
        with torch.device("meta"):  # where what is made without `device=` has no numbers
            solver._move(X, Z, near, *edge)
        assert torch.equal(X, expected)


def test_the_path_is_the_cheapest_to_the_emptiest_and_as_wide_as_its_narrowest_edge():
    """Against all paths. Costs are above 0, as a cycle would never end else."""
    nodes, moved = 5, 0
    for seed in range(20):
        cost = drawn(seed, G, nodes, nodes).abs() + 0.1
        cost = cost.masked_fill(drawn(seed + 50, G, nodes, nodes) > 0.9, INF)
        count = torch.randint(1, 9, (G, nodes, nodes), generator=generator(seed))
        excess = torch.randint(-6, 7, (G, nodes), generator=generator(seed + 9))
        excess[:, -1] = 0
        tolerance = torch.full((G, 1, 1), 1e-9, dtype=torch.float64)
        with torch.device("meta"):  # where what is made without `device=` has no numbers
            path, amount = solver._path(cost, count, excess, tolerance)
        for g in range(G):
            full = [i for i in range(nodes) if excess[g, i] > 0]
            best = {i: (0.0, (i,)) for i in full}
            for length in range(2, nodes + 1):
                for way in permutations(range(nodes), length):
                    price = sum(float(cost[g, a, b]) for a, b in zip(way, way[1:], strict=False))
                    if way[0] in full and price < best.get(way[-1], (INF,))[0]:
                        best[way[-1]] = price, way
            least = min([int(excess[g, i]) for i in best if excess[g, i] < 0], default=0)
            found = [(int(u[g]), int(v[g])) for u, v in reversed(path) if u[g] != v[g]]
            if not least:
                assert amount[g] == 0
                continue
            _, way = min(best[i] for i in best if excess[g, i] == least and i == found[-1][1])
            edges = list(zip(way, way[1:], strict=False))
            assert found == edges
            assert amount[g] == min([-least, int(excess[g, way[0]]), *(int(count[g, a, b]) for a, b in edges)])
            moved += 1
    assert moved > 10


@pytest.mark.parametrize("e, fixed", [(2, False), (5, False), (5, True)])
def test_what_paths_leave_moves_directly(e, fixed, monkeypatch):
    """One expert holds all; e - 1 moves are needed."""
    monkeypatch.setattr(solver, "PATH_ROUNDS", 0)
    X, Z, valid = (
        torch.zeros(G, e, 4 * e, dtype=torch.bool),
        drawn(0, G, e, 4 * e),
        torch.ones(G, 4 * e, dtype=torch.bool),
    )
    X[0, 1], X[1, 0] = True, True
    unit = torch.full((G, 1, 1), 1e-3, dtype=torch.float64)
    found = solver._balance(X, Z, torch.zeros(G, e, 1), torch.full((G,), 4), 1, unit, valid, fixed)
    assert found.sum(2).tolist() == G * [e * [4]] and found.sum(1).tolist() == G * [4 * e * [1]]


def test_of_all_tokens_those_that_lose_least_move_directly(monkeypatch):
    monkeypatch.setattr(solver, "PATH_ROUNDS", 0)
    X = torch.tensor([[[True] * 4, [False] * 4]])
    Z = torch.tensor([[[0.0] * 4, [-9.0, -9.0, 0.0, 0.0]]])
    found = solver._balance(
        X,
        Z,
        torch.zeros(1, 2, 1),
        torch.tensor([2]),
        1,
        torch.full((1, 1, 1), 1e-3),
        torch.ones(1, 4, dtype=torch.bool),
        fixed=False,
    )
    assert found[0, 1].tolist() == [False, False, True, True]


@pytest.mark.parametrize("sample", [8, 10])
def test_prices_go_half_the_way_of_each_round_which_asks_a_sample_first(sample, monkeypatch):
    """Two pools of 20 places, of which the second has 5 tokens; 20 are more than twice 8."""
    asked, rounds = [], (4, 3) if sample == 8 else (0, 7)  # of the sample, of all
    m, target = 20, torch.tensor([6, 4])
    valid = torch.arange(m).expand(G, m) < torch.tensor([[m], [5]])
    Z = drawn(0, G, E, m).masked_fill(~valid[:, None], -INF)

    def worth(Y, q, target, b, valid, floor):
        asked.append((Y, target.tolist(), b, valid.sum(1).tolist(), floor.flatten().tolist()))
        return torch.full_like(q, float(len(asked) == sum(rounds)))

    for name, value in {"SAMPLE": sample, "PRICE_ROUNDS": 7, "FULL_ROUNDS": 3, "_worth": worth}.items():
        monkeypatch.setattr(solver, name, value)
    q = solver._prices(Z, torch.full_like(Z, 2.0), target, 2, valid, 0.01)
    assert torch.equal(q, torch.full_like(q, 0.5))  # 0 but for the last, which says 1
    floor = [0.0, -INF]  # 40 places for 18, and 10 for 12
    few = [([6 * 8 // 20, 4], 2, [8, 5], floor)] * rounds[0]
    assert [tuple(rest) for _, *rest in asked] == few + [([6, 4], 2, [m, 5], floor)] * rounds[1]
    for step, (Y, *_) in enumerate(asked):
        offers = Y - 2 * 0.3 * (0.01 / 0.3) ** (step / 6)  # what jitter is left
        for g in range(G):
            known = {tuple(column) for column in Z[g].T.round(decimals=9).tolist()}
            columns = [tuple(column) for column in offers[g].T.round(decimals=9).tolist()]
            assert set(columns) <= known and len(columns) == (sample if step < rounds[0] else m)
            assert len({column for column in columns if column[0] > -INF}) == ([8, m][step >= rounds[0]], 5)[g]


def test_the_jitter_is_of_an_experts_own_and_leaves_padding_out():
    """The logit of float32 multiples of the golden ratio's, modulo 1: each expert's step is another multiple."""
    valid = torch.tensor([[True, False, True, True], [True] * 4])
    found = solver._jitter(valid, 3, torch.float64)
    for g, places in enumerate(([0, 0, 1, 2], [0, 1, 2, 3])):
        for i, (t, place) in product(range(3), enumerate(places)):
            u = (place + 1) * ((i + 1) * 0.6180339887498949 % 1) % 1
            assert found[g, i, t].item() == pytest.approx(math.log(u / (1 - u)), rel=1e-4)


@pytest.mark.parametrize("b", [1, 2])
def test_looked_at_are_the_tokens_that_lose_least_by_leaving(b, monkeypatch):
    """For the best expert that doesn't hold them yet; of a free place, which is worth 0, those that gain most."""

    class Asked(Exception):
        pass

    def edges(X, Z, near, spare):
        raise Asked(X, near)

    monkeypatch.setattr(solver, "NEAR", 2)
    monkeypatch.setattr(solver, "_edges", edges)
    for seed in range(4):
        Z, q, target = drawn(seed, G, E, M) + 5, drawn(seed + 9, G, E, 1), torch.tensor([1, 2])
        held = solver._hold(Z - q, target, b)
        unit, valid = torch.full((G, 1, 1), 1e-3, dtype=Z.dtype), torch.ones(G, M, dtype=torch.bool)
        with pytest.raises(Asked) as asked:
            solver._balance(held.clone(), Z, q, target, b, unit, valid, fixed=False)
        X, near = asked.value.args
        assert torch.equal(X[:, :E], held) and torch.equal(X[:, FREE], held.sum(1) < b)
        for g, i in product(range(G), range(E + 1)):
            lost = {}
            for t in X[g, i].nonzero()[:, 0].tolist():
                others = max(float((Z - q)[g, j, t]) for j in range(E) if not held[g, j, t])
                lost[t] = (0.0 if i == FREE else float((Z - q)[g, i, t])) - others
            least = sorted(lost, key=lost.get)[:2]
            assert near[g, i].tolist()[: len(least)] == least


def test_a_pool_of_padding_alone_has_prices(monkeypatch):
    """Beside one with tokens, where a sample is asked first."""
    for name, value in {"SAMPLE": 8, "PRICE_ROUNDS": 5, "FULL_ROUNDS": 2}.items():
        monkeypatch.setattr(solver, name, value)
    valid = torch.tensor([[True], [False]]).expand(G, 20)
    Z = drawn(0, G, E, 20).masked_fill(~valid[:, None], -INF)
    q = solver._prices(Z, torch.zeros_like(Z), torch.tensor([6, 0]), 1, valid, 0.01)
    assert q.shape == (G, E, 1) and q.isfinite().all()


@pytest.mark.parametrize("fixed", [False, True])
def test_paths_are_looked_for_until_all_are_even_up_to_16_times_as_long_or_a_fixed_time(fixed, monkeypatch):
    monkeypatch.setattr(solver, "PATH_ROUNDS", 2)
    asked, unit, valid = [], torch.full((1, 1, 1), 1e-3), torch.ones(1, 4, dtype=torch.bool)

    def path(cost, count, excess, tolerance):
        asked.append(excess.tolist())
        nowhere = torch.zeros(1, dtype=torch.long)
        return [(nowhere, nowhere)], nowhere

    monkeypatch.setattr(solver, "_path", path)
    for loads, rounds in (((2, 2), 2 if fixed else 0), ((3, 1), 2 if fixed else 32)):
        X = torch.zeros(1, 2, 4, dtype=torch.bool)
        X[0, 0, : loads[0]], X[0, 1, loads[0] :] = True, True
        solver._balance(X, torch.zeros(1, 2, 4), torch.zeros(1, 2, 1), torch.tensor([2]), 1, unit, valid, fixed)
        assert len(asked) == rounds
        asked.clear()
