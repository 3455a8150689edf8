"""Hash routing: the table, its balance, and capacity in order of arrival."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ecmoe.routing import Hash, causal_routing
from ecmoe.routing.hash import balanced_table
from tests.routing.problems import alone, check, problems, two_hundred

D, V = 3, 10


@two_hundred
@given(problems(), st.sampled_from([None, 0.5, 1, 1.25]))
def test_200_problems(problem, factor):
    n, e = problem.logits.shape
    router = Hash(D, e, V, factor)
    chosen = router.assign(problem.logits, token_ids=problem.ids, mask=problem.mask)
    check(chosen, problem)
    valid = problem.ids[problem.valid]
    capacity = n if factor is None else -int(-factor * len(valid) // e)
    expected, held = torch.zeros(len(valid), e), [0] * e
    for place, word in enumerate(valid.tolist()):  # section 4.6: token id mod e
        expected[place, word % e] = held[word % e] < capacity
        held[word % e] += 1
    assert alone(chosen, problem).tolist() == expected.tolist()
    assert chosen.demand.tolist() == held
    with causal_routing(router):  # nothing is dropped
        free = router.assign(problem.logits, token_ids=problem.ids, mask=problem.mask)
    assert (free.experts_per_token(n) == problem.valid).all()


def test_nothing_is_learned_and_the_input_does_not_matter():
    router = Hash(D, 4, V)
    assert list(router.parameters()) == []
    logits = router.logits(torch.randn(2, 5, D))
    assert logits.shape == (10, 4) and logits.dtype == torch.float32
    ids = torch.arange(10)
    a, b = (router.assign(x, token_ids=ids).dense(10) for x in (logits, torch.randn(10, 4)))
    assert torch.equal(a, b)


def test_balanced_by_hand():
    # Largest first, each to the lightest: 9 -> 0, 7 -> 1, 5 -> 1 (12), 4 -> 0 (13), 1 -> 1 (13).
    assert balanced_table(torch.tensor([1, 7, 4, 9, 5]), 2).tolist() == [1, 1, 0, 0, 1]
    assert balanced_table(torch.tensor([5, 5, 5, 5]), 3).tolist() == [0, 1, 2, 0]  # of equals the first id first


@two_hundred
@given(st.lists(st.integers(0, 1000), min_size=V, max_size=V), st.integers(1, 5))
def test_balanced_loads_differ_by_no_more_than_a_word(counts, e):
    router = Hash(D, e, V, token_counts=torch.tensor(counts))
    load = torch.zeros(e, dtype=torch.long).index_add(0, router.table, torch.tensor(counts))
    assert load.max() - load.min() <= max(counts)
    # Longest first is within 2 - 1/e of the mean or largest count, whichever is more (Graham 1969).
    assert load.max() <= 2 * max(sum(counts) / e, max(counts))


def test_errors_name_what_is_missing():
    with pytest.raises(ValueError, match="token_ids"):
        Hash(D, 4, V).assign(torch.zeros(2, 4))
    for entries in (3, V + 1):
        with pytest.raises(ValueError, match=f"{entries} entries.*vocab_size=10"):
            Hash(D, 4, V, token_counts=torch.ones(entries))
    for wrong in (-1, V):  # a negative one would take another id's expert
        with pytest.raises(ValueError, match=f"token_ids has {wrong}: must lie in 0..9"):
            Hash(D, 4, V).assign(torch.zeros(2, 4), token_ids=torch.tensor([3, wrong]))
