"""What all routers share: who computes, what they are called, and whom they refuse."""

from types import SimpleNamespace

import pytest
import torch

from ecmoe.config import CHOICES
from ecmoe.routing import Dense, ExpertChoice, Hash, KMeans, LinearAssignment, Router, TaskLevel, TokenChoice, router


def test_auto_is_triton_on_a_gpu_alone(monkeypatch):
    cpu, cuda = SimpleNamespace(is_cuda=False), SimpleNamespace(is_cuda=True)
    assert [router.fast(kind, cpu) for kind in CHOICES["kernels"]] == [False, False, True, True, True]
    assert [router.fast(kind, cuda) for kind in CHOICES["kernels"]] == [True, False, True, True, True]
    monkeypatch.setattr(router, "TRITON", False)
    assert not router.fast("auto", cuda)


@pytest.mark.parametrize("missing", ["TRITON", "CUTE"])
def test_a_package_that_kernels_lack_is_named(monkeypatch, missing):
    for name in ("TRITON", "CUTE"):
        monkeypatch.setattr(router, name, name != missing)
    lacking = [kind for kind in CHOICES["kernels"] if router.lacking(kind)]
    assert lacking == {"TRITON": ["triton", "triton-bmm", "cute"], "CUTE": ["cute"]}[missing]
    assert f"needs {'triton' if missing == 'TRITON' else 'quack-kernels'}: `pip install" in router.lacking("cute")


@pytest.mark.parametrize("kind, expected", [("auto", [True, False, True, True]), ("triton", [True] * 4)])
def test_few_tokens_are_compiled_plainly_unless_sums_need_a_fixed_order(kind, expected, monkeypatch):
    cuda, one = SimpleNamespace(is_cuda=True), ExpertChoice(3, 4)
    one.kernels = kind
    monkeypatch.setattr(router, "FEW", 8 * 3)
    eager = one.fast(cuda, 7)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    few, enough = one.fast(cuda, 7), one.fast(cuda, 8)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert [eager, few, enough, one.fast(cuda, 7)] == expected
    one.kernels = "plain"
    assert not one.fast(cuda, 8)


def test_what_is_true_of_a_router_unless_it_says_otherwise():
    assert router.FEW == 2**24  # from here on the kernels are faster, as measured
    assert not Router.static and not Router.across and Dense.static and not TaskLevel.static
    assert [Hash(8, 4, 10, factor).static for factor in (None, 1.0)] == [False, True]
    assert TaskLevel(8, 4, 2).kind == "learned" and LinearAssignment(8, 4).weight.shape == (8, 4)


def test_a_router_must_say_how_it_assigns_and_has_an_expert_at_least():
    assert Router(3, 1).num_experts == 1 and not Router(3, 1).moves
    for experts in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match=f"num_experts={experts}(: must be at least 1| is of type .*must be int)"):
            Router(3, experts)
    with pytest.raises(NotImplementedError, match="Router must implement assign"):
        Router(3, 1).assign(torch.zeros(2, 1))


def test_a_router_is_shown_with_its_numbers_and_words_alone():
    shown = {
        TokenChoice(
            8, 4, 2, 1.25
        ): "TokenChoice(d_model=8, num_experts=4, top_k=2, capacity_factor=1.25, gate=softmax, ",
        Hash(8, 4, 10, token_counts=torch.ones(10)): "Hash(d_model=8, num_experts=4)",  # a table is neither, nor None
        KMeans(8, 4): "KMeans(d_model=8, num_experts=4, beta=0.99, seed=0)",
    }
    assert all(repr(one).startswith(said) for one, said in shown.items())
