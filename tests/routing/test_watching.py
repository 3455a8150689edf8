"""watched and altered: the one way to see routing and the one to change it, in any order."""

import pytest
import torch
from torch import nn

from ecmoe import MoE
from ecmoe.routing import Assignment, ExpertChoice, TokenChoice, altered, causal_routing, routers, watched

D, E = 4, 4


@pytest.fixture
def model():
    torch.manual_seed(0)
    net = nn.Sequential(MoE(ExpertChoice(D, E, 2.0), D, 8), MoE(TokenChoice(D, E, 2, 1.0), D, 8))
    net(torch.randn(2, 8, D))
    return net.eval()


X = torch.randn(2, 8, D, generator=torch.Generator().manual_seed(0))


def nobody(router, logits, **known) -> Assignment:
    e, n = router.num_experts, len(logits)
    return Assignment(torch.full((e, 1), n), logits.new_zeros(e, 1))


def test_watching_sees_each_layer_in_order_and_what_it_was_given(model):
    with watched(model) as seen:
        model(X)
    (logits, first), (_, second) = seen
    torch.testing.assert_close(logits, X.view(16, D) @ model[0].router.weight)
    assert first.load(16).tolist() == [8] * E and second.demand.sum() == 32
    model(X)
    assert len(seen) == 2


def test_watching_and_altering_nest_in_any_order(model):
    with altered(model, assign=nobody), watched(model) as inner:
        assert not model(X).any()
        with watched(model) as innermost, altered(model, capacity_factor=1.0):
            model(X)
    with watched(model) as outer, altered(model, assign=nobody):
        model(X)
    for seen in (inner, innermost, outer):
        assert all(chosen.load(16).sum() == 0 for _, chosen in seen)
    assert len(inner) == 4 and len(innermost) == len(outer) == 2
    with watched(model) as seen:
        model(X)
    assert seen[0][1].load(16).sum() == 32


def test_altered_gives_back_what_was_there_also_after_an_error(model):
    ec, tc = routers(model)
    with pytest.raises(KeyError), altered(model, capacity_factor=0.5, pool="sequence", assign=nobody):
        with altered(model, capacity_factor=1.0), causal_routing(model):
            assert ec.causal and tc.capacity_factor == 1.0
        assert (ec.capacity_factor, ec.pool, ec.causal) == (0.5, "sequence", False)
        raise KeyError
    assert (ec.capacity_factor, ec.pool, tc.capacity_factor) == (2.0, "batch", 1.0)
    assert "assign" not in vars(ec) and not hasattr(tc, "pool")


@pytest.mark.parametrize("ran_before", [False, True])
def test_watching_sees_what_a_compiled_model_routes(model, ran_before):
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    if ran_before:
        compiled(X)
    with watched(model) as seen:
        compiled(X)
    assert [tuple(chosen.load(16)) for _, chosen in seen] == [tuple(layer.load) for layer in model]


@pytest.mark.parametrize(
    "attributes, message",
    [
        ({"capcity_factor": 1.0}, "no router has 'capcity_factor': did you mean capacity_factor?"),
        ({"vocab": 3}, "no router has 'vocab': must be one of .*assign, .*capacity_factor, .*top_k"),
        ({"pool": "sequnce"}, "pool='sequnce': must be one of batch, rank"),
        ({"gate": "sofmax"}, "gate='sofmax': must be one of softmax"),
        ({"capacity_factor": -1.0}, "capacity_factor=-1.0: must be above 0"),
        ({"max_experts_per_token": 1}, "max_experts_per_token=1: capacity_factor=2 is the average"),
        ({"priority": "size"}, "priority='size': must be one of order, score"),
        ({"top_k": 5}, "top_k=5: must lie in 1..4"),
        ({"num_experts": 2}, "num_experts=2: the weights fix it"),
    ],
)
def test_altering_what_no_router_has_or_to_what_none_can_do_is_an_error_and_alters_nothing(model, attributes, message):
    before = [{**vars(router)} for router in routers(model)]
    with pytest.raises(ValueError, match=message), altered(model, **attributes):
        raise AssertionError("must not come here")
    assert [vars(router) for router in routers(model)] == before
    with altered(nn.Linear(2, 2), **attributes):  # a model without routers, such as a dense twin
        pass


def test_a_router_of_ones_own_may_have_other_values(model):
    """Its gate isn't ours: only what is altered is checked."""
    model[0].router.gate = "sigmoid"
    with causal_routing(model), altered(model, assign=nobody):
        assert not model(X).any()
