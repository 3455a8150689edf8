"""Assignment and pack against plain loops."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ecmoe import MoE
from ecmoe.routing import Assignment, ExpertChoice
from ecmoe.routing.assignment import pack
from tests.routing.problems import generator, pairs, two_hundred

# Two experts with three slots, four tokens; 4 marks an empty slot.
HAND = Assignment(
    torch.tensor([[0, 2, 4], [2, 3, 0]]),
    torch.tensor([[0.5, 0.25, 0.0], [0.75, 1.0, 0.0]]),
)


def test_by_hand():
    assert HAND.dense(4).tolist() == [[0.5, 0.0], [0, 0], [0.25, 0.75], [0, 1.0]]
    # Expert 1 holds token 0, though with gate 0.
    assert HAND.experts_per_token(4).tolist() == [2, 0, 2, 1]
    assert HAND.load(4).tolist() == [2, 3]
    assert HAND != HAND.renormalized(4) and HAND in {HAND}  # each is its own: tensors are no one truth value
    assert HAND.renormalized(4).dense(4).tolist() == [[1.0, 0.0], [0, 0], [0.25, 0.75], [0, 1.0]]
    asked = Assignment(*HAND, torch.tensor([3, 5]), torch.tensor(0.5)).renormalized(4)
    assert asked.demand.tolist() == [3, 5] and asked.aux_loss == 0.5


def test_gradients_reach_the_gates():
    gate = HAND.gate.clone().requires_grad_()
    Assignment(HAND.token, gate).dense(4).mul(torch.arange(8.0).view(4, 2)).sum().backward()
    assert gate.grad.tolist() == [[0, 4, 0], [5, 7, 1]]  # 2 token + expert; the empty slot has none


def test_a_token_that_an_expert_has_twice_weighs_the_sum_as_in_the_layer():
    twice, once = (
        Assignment(torch.tensor([[0, 0]]), torch.tensor([[0.5, 0.25]])),
        (torch.tensor([[0]]), torch.ones(1, 1)),
    )
    assert twice.dense(1).tolist() == [[0.75]]
    layer, x = MoE(ExpertChoice(4, 1, 1.0), 4, 8), torch.randn(1, 4)
    torch.testing.assert_close(layer.experts(x, *twice), 0.75 * layer.experts(x, *once))


def loop_pack(token, expert, gate, n, e, slots):
    """First come, first served."""
    held, demand = [[] for _ in range(e)], [0] * e
    for t, i, g in zip(token.tolist(), expert.tolist(), gate.tolist(), strict=True):
        if i < e:
            demand[i] += 1
            if slots is None or len(held[i]) < slots:
                held[i].append((t, g))
    return held, demand


@two_hundred
@given(
    st.integers(0, 9999),
    st.integers(1, 20),
    st.integers(1, 5),
    st.sampled_from([None, 0, 1, 3]),
    st.booleans(),
)
def test_pack_serves_in_order(seed, n, e, slots, as_limit):
    draw = generator(seed)
    token = torch.randperm(n, generator=draw).repeat(2)
    expert = torch.randint(e + 1, (2 * n,), generator=draw)  # e: no request
    gate = torch.rand(2 * n, generator=draw)
    limited = as_limit and slots is not None  # slots is the bound, the limit is what counts
    assignment = pack(
        token,
        expert,
        gate,
        n=n,
        e=e,
        slots=5 if limited else slots,
        limit=torch.tensor(slots) if limited else None,
    )
    held, wanted = loop_pack(token, expert, gate, n, e, slots)
    assert assignment.demand.tolist() == wanted
    if slots is None:  # as many as the fullest needs
        assert assignment.token.shape == assignment.gate.shape == (e, max(*wanted, 1))
    for i in range(e):
        kept = assignment.token[i] < n
        ours = list(zip(assignment.token[i][kept].tolist(), assignment.gate[i][kept].tolist(), strict=True))
        assert ours == held[i]
        assert (assignment.gate[i][~kept] == 0).all()


def test_pack_of_nothing_has_a_slot():
    assignment = pack(torch.tensor([0]), torch.tensor([2]), torch.ones(1), n=1, e=2, slots=None)
    assert assignment.token.tolist() == [[1], [1]] and assignment.demand.tolist() == [0, 0]
    assert pairs(assignment, 1) == {}


def test_a_limit_above_the_slots_adds_none():
    ids, nobody = torch.arange(4), torch.zeros(4, dtype=torch.long)
    assert pack(ids, nobody, torch.ones(4), n=4, e=2, slots=2, limit=torch.tensor(3)).token.tolist() == [[0, 1], [4, 4]]


def test_renormalized_gates_are_the_quotients_and_so_are_their_gradients():
    draw = torch.Generator().manual_seed(0)
    token = torch.stack([torch.randperm(7, generator=draw)[:4] for _ in range(3)])
    token[2, 3] = 7  # an empty slot
    gate = torch.rand(3, 4, generator=draw, dtype=torch.float64).masked_fill(token == 7, 0.0).requires_grad_()
    sums = torch.stack([gate[token == t].sum() for t in range(8)]).clamp_min(1e-300)
    expected, ours = gate / sums[token], Assignment(token, gate).renormalized(7).gate
    weight = torch.rand(3, 4, generator=draw, dtype=torch.float64).masked_fill(token == 7, 0.0)
    torch.testing.assert_close(ours, expected)
    for a, b in zip(*(torch.autograd.grad((x * weight).sum(), gate) for x in (ours, expected)), strict=True):
        torch.testing.assert_close(a.masked_fill(token == 7, 0), b.masked_fill(token == 7, 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_renormalized_gates_sum_to_one_and_nobodys_token_stays_zero(dtype):
    token = torch.tensor([[0, 1, 4], [1, 2, 4]])
    gate = torch.tensor([[0.1, 0.2, 0.0], [1e-30, 1e-30, 0.0]], dtype=dtype)
    total = Assignment(token, gate).renormalized(4).dense(4).sum(1)
    assert total.tolist() == [1, 1, 1, 0] and total.dtype == dtype


def test_as_many_tokens_as_experts_are_asked_for():
    for t, e, g in ((4, 3, 4), (4, 4, 3), (3, 4, 4)):
        with pytest.raises(ValueError, match=f"{t} tokens, {e} experts, {g} gates"):
            pack(torch.arange(t), torch.zeros(e, dtype=torch.long), torch.ones(g), n=4, e=2, slots=2)


def test_an_assignment_is_itself_and_no_other():
    """Not compared number by number, which would be neither true nor false."""
    one, other = (Assignment(torch.zeros(2, 3), torch.zeros(2, 3)) for _ in range(2))
    assert one == one and one != other and len({one, other}) == 2
