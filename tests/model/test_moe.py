"""MoE against Eq. 3 and 4 as printed, a dense FFN, and the symmetries a mixture must have."""

import copy
import re
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ecmoe import MoE
from ecmoe.routing import Assignment, ExpertChoice, ExpertThreshold, Hash, TokenChoice
from ecmoe.routing.router import Router

D, FF, E, B, T = 8, 16, 4, 2, 12
N = B * T


def layer(router=lambda: ExpertChoice(D, E, 2.0), **keys) -> MoE:
    torch.manual_seed(0)
    return MoE(router(), D, FF, **keys).double()


def tokens(seed=1) -> torch.Tensor:
    return torch.randn(B, T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def equations_3_and_4(moe: MoE, x: torch.Tensor, assignment: Assignment) -> torch.Tensor:
    """P is one-hot (e, k, n); an empty slot's row is 0."""
    flat = x.reshape(-1, D)
    P = F.one_hot(assignment.token, len(flat) + 1)[..., :-1].to(x.dtype)
    X_in = torch.einsum("ekn,nd->ekd", P, flat)
    X_e = torch.einsum("ekf,efd->ekd", F.gelu(torch.einsum("ekd,edf->ekf", X_in, moe.w1), approximate="tanh"), moe.w2)
    return torch.einsum("ekn,ek,ekd->nd", P, assignment.gate, X_e).view_as(x)


ROUTERS = {
    "ec": lambda: ExpertChoice(D, E, 2.0),
    "ec renormalized by position": lambda: ExpertChoice(D, E, 2.0, pool="position", gate="renormalized"),
    "top-2 with capacity": lambda: TokenChoice(D, E, 2, 1.0, gate="renormalized"),
    "top-1 without": lambda: TokenChoice(D, E, 1),
    "hash": lambda: Hash(D, E, 50, 1.0),
}


@pytest.mark.parametrize("name", ROUTERS)
def test_output_and_gradients_are_those_of_the_one_hot_einsum(name):
    moe, x = layer(ROUTERS[name]), tokens().requires_grad_()
    ids = torch.randint(50, (B, T), generator=torch.Generator().manual_seed(2))
    parameters = [x, *(p for p in moe.parameters())]
    gradient = torch.randn_like(x)
    out = moe(x, token_ids=ids)
    chosen = moe.router.assign(moe.router.logits(x), batch_shape=(B, T), token_ids=ids.flatten())
    expected = equations_3_and_4(moe, x, chosen)
    torch.testing.assert_close(out, expected)
    for ours, theirs in zip(
        torch.autograd.grad(out, parameters, gradient, allow_unused=True),
        torch.autograd.grad(expected, parameters, gradient, allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_a_layer_keeps_what_its_backward_pass_needs_and_takes_what_is_fast_unless_told():
    assert (layer().recompute, layer().kernels) == (False, "auto")
    assert (layer(recompute=True).recompute, layer(kernels="plain").kernels) == (True, "plain")
    x = torch.zeros(1 << 30, 1, device="meta")  # of many tokens three slots each may be held, of few 2^28 numbers
    with torch.no_grad():
        assert [layer().room(x[:n]) for n in (7, 1 << 30)] == [2**28 // FF, 3 << 30]
    assert layer().room(x) == sys.maxsize  # for gradients all are


@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (3, 5), (7, 1)])
def test_odd_sizes(shape):
    moe = layer(lambda: TokenChoice(D, E, 2, 1.0))
    x = torch.randn(*shape, D, dtype=torch.float64)
    chosen = moe.router.assign(moe.router.logits(x), batch_shape=shape)
    torch.testing.assert_close(moe(x), equations_3_and_4(moe, x, chosen))


def test_one_expert_that_takes_all_is_a_dense_ffn():
    moe, x = layer(lambda: ExpertChoice(D, 1, 1.0)), tokens().requires_grad_()
    dense = F.gelu(x @ moe.w1[0], approximate="tanh") @ moe.w2[0]
    torch.testing.assert_close(moe(x), dense)
    for ours, theirs in zip(
        torch.autograd.grad(moe(x).sum(), [x, moe.w1, moe.w2]),
        torch.autograd.grad(dense.sum(), [x, moe.w1, moe.w2]),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("router", [lambda: ExpertChoice(D, E, float(E)), lambda: TokenChoice(D, E, E)])
def test_all_experts_on_all_tokens_is_the_dense_mixture(router):
    moe, x = layer(router), tokens()
    p = (x @ moe.router.weight).softmax(-1)
    ffns = torch.stack([F.gelu(x @ moe.w1[i], approximate="tanh") @ moe.w2[i] for i in range(E)], -1)
    torch.testing.assert_close(moe(x), (ffns * p.unsqueeze(-2)).sum(-1))


def test_identical_experts_scale_one_ffn_by_the_sum_of_gates():
    moe, x = layer(), tokens()
    with torch.no_grad():
        moe.w1.copy_(moe.w1[:1].expand_as(moe.w1))
        moe.w2.copy_(moe.w2[:1].expand_as(moe.w2))
    gates = moe.router.assign(moe.router.logits(x)).dense(N).sum(1).view(B, T, 1)
    torch.testing.assert_close(moe(x), gates * (F.gelu(x @ moe.w1[0], approximate="tanh") @ moe.w2[0]))


def test_permuting_tokens_permutes_the_output_and_permuting_experts_changes_nothing():
    moe, x = layer(), tokens()
    order = torch.randperm(N, generator=torch.Generator().manual_seed(3))
    shuffled = x.reshape(1, N, D)[:, order]
    torch.testing.assert_close(moe(shuffled), moe(x.reshape(1, N, D))[:, order])
    before, experts = moe(x), torch.randperm(E, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        for p, dim in ((moe.w1, 0), (moe.w2, 0), (moe.router.weight, 1)):
            p.copy_(p.index_select(dim, experts))
    torch.testing.assert_close(moe(x), before)


def test_padding_gets_nothing_and_takes_nothing():
    moe = layer(lambda: ExpertChoice(D, E, 1.0))
    x, mask = tokens(), torch.ones(B, T, dtype=torch.bool)
    mask[:, 8:] = False
    out = moe(x, mask=mask)
    assert (out[~mask] == 0).all() and moe.tokens == mask.sum() and moe.load.sum() == mask.sum()
    torch.testing.assert_close(out[mask], moe(x[mask][None])[0])


def test_a_token_that_nobody_takes_gets_zero():
    moe, x = layer(lambda: ExpertChoice(D, E, 0.5)), tokens()
    counts = moe.router.assign(moe.router.logits(x)).experts_per_token(N).view(B, T)
    assert (counts == 0).any()
    assert (moe(x)[counts == 0] == 0).all()


def test_statistics_count_what_was_dispatched():
    moe, x = layer(lambda: TokenChoice(D, E, 2, 0.5)), tokens()
    for seen in (tokens(5), x):  # of the last pass alone
        moe(seen)
    chosen = moe.router.assign(moe.router.logits(x))
    per_token = (chosen.dense(N) > 0).sum(1)
    statistics = {name: float(value) for name, value in moe.statistics().items()}
    for j in range(9):
        assert statistics[f"share_{j}"] == pytest.approx(float((per_token == j).double().mean()))
    demand = torch.bincount((x.reshape(N, D) @ moe.router.weight).topk(2, 1).indices.flatten(), minlength=E)
    assert statistics["max_load"] == pytest.approx(float(demand.max() / (2 * N / E)))
    assert statistics["over_capacity"] == pytest.approx(statistics["max_load"] - 1)
    assert statistics["dropped"] == pytest.approx(1 - float(per_token.sum()) / (2 * N))
    assert 0 < statistics["dropped"] < 1


def test_expert_choice_is_balanced_by_construction():
    moe = layer()
    moe(tokens())
    assert moe.load.tolist() == [N * 2 // E] * E
    assert float(moe.statistics()["max_load"]) == 1


@pytest.mark.parametrize("recompute", ["experts", "whole layer"])
@pytest.mark.parametrize("router", [lambda: ExpertChoice(D, E), lambda: TokenChoice(D, E, 2, 1.0)])
def test_checkpointing_changes_neither_output_nor_gradient_nor_statistics(router, recompute):
    x = tokens()
    results = []
    for again in (False, True):
        moe = layer(router, recompute=again and recompute == "experts")
        y = x.clone().requires_grad_()
        out = checkpoint(moe, y, use_reentrant=False) if again and recompute == "whole layer" else moe(y)
        loss = out.square().sum() + (0 if moe.aux_loss is None else moe.aux_loss)
        gradients = torch.autograd.grad(loss, [y, *moe.parameters()])
        results.append((out, *gradients, *(b.double() for b in moe.buffers())))
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "router", [lambda: ExpertChoice(D, E), lambda: TokenChoice(D, E, 2, 1.0), lambda: ExpertThreshold(D, E)]
)
def test_compiles_without_a_graph_break(router, padded):
    """So nothing in a training pass waits for the device: its sizes depend on no data."""
    torch._dynamo.reset()  # else a second capacity factor is taken for a variable
    moe, x = layer(router), tokens()
    mask = torch.arange(x.shape[1]) < torch.arange(2, 2 + x.shape[0])[:, None] if padded else None
    assert mask is None or not mask.all()
    torch.testing.assert_close(torch.compile(moe, fullgraph=True, backend="eager")(x, mask=mask), moe(x, mask=mask))


def test_aux_loss_is_set_in_training_and_not_in_evaluation():
    moe, x = layer(lambda: TokenChoice(D, E, 2)), tokens()
    moe(x)
    assert moe.aux_loss.requires_grad and moe.aux_loss > 0
    moe.eval()(x)
    assert moe.aux_loss is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_routing_is_float32_under_bfloat16(dtype):
    moe = layer().to(dtype)
    seen = []
    assign = moe.router.assign
    moe.router.assign = lambda logits, **keys: seen.append(logits) or assign(logits, **keys)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = moe(tokens().to(dtype))
    assert seen[0].dtype == torch.float32 and out.dtype == dtype
    x = tokens().to(dtype).reshape(N, D).float()
    assert torch.equal(seen[0], x @ moe.router.weight.float())


def test_in_bf16_a_gate_weighs_as_rounded_and_kernels_must_exist():
    moe, x = layer().bfloat16(), tokens().bfloat16().view(N, D)
    token, gate = moe.router.assign(moe.router.logits(x))
    out = moe.experts(x, token, gate)
    assert torch.equal(out, moe.experts(x, token, gate.bfloat16().float())) and torch.equal(out, moe(x))
    with pytest.raises(ValueError, match="kernels='cuda': must be one of auto, plain, triton, triton-bmm, cute"):
        moe.kernels = "cuda"


def test_a_layer_of_ones_own_starts_by_fan_in():
    moe = MoE(ExpertChoice(48, 8), 48, 80)
    assert moe.w1.std().item() == pytest.approx(48**-0.5, rel=0.05)
    assert moe.w2.std().item() == pytest.approx(80**-0.5, rel=0.05)
    assert moe.router.weight.std().item() == pytest.approx(48**-0.5, rel=0.15)


def test_a_router_of_another_width_is_refused():
    with pytest.raises(ValueError, match="needs sequences: batch_shape"):  # a list of tokens has no sequences
        layer(lambda: ExpertChoice(D, E, pool="sequence"))(tokens().flatten(0, 1))
    with pytest.raises(ValueError, match="^d_model=16: must equal the router's, 8$"):
        MoE(ExpertChoice(D, E), 16, FF)


def test_works_in_anyones_model_with_any_router():
    class FirstExpert(Router):
        def assign(self, logits, **keys):
            n = len(logits)
            token = torch.full((self.num_experts, n), n)
            token[0] = torch.arange(n)
            return Assignment(token, (token < n).to(logits.dtype))

    model = nn.Sequential(nn.Linear(D, D), MoE(FirstExpert(D, E), D, FF)).double()
    x = tokens()
    hidden = model[0](x)
    expected = F.gelu(hidden @ model[1].w1[0], approximate="tanh") @ model[1].w2[0]
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize(
    ("held", "slots", "at_once"), [(1, 0, 1), (200, 0, 2), (400, 0, 3), (1000, 0, 5), (1, 1, 3), (1, 2, 5)]
)
def test_evaluation_holds_a_few_experts_at_a_time(monkeypatch, held, slots, at_once):
    moe, x = (
        layer(lambda: ExpertChoice(D, 5, 2.0)),
        torch.randn(1, 20, D, dtype=torch.float64),
    )  # h has 5 x 8 x 16 numbers
    expected, some, seen = moe(x).detach(), moe._some_experts, []
    monkeypatch.setattr("ecmoe.model.moe.HELD", held)
    monkeypatch.setattr("ecmoe.model.moe.SLOTS", slots)
    monkeypatch.setattr(moe, "_some_experts", lambda x, w1, *rest: seen.append(len(w1)) or some(x, w1, *rest))
    with torch.no_grad():
        torch.testing.assert_close(moe(x), expected)
    assert sum(seen) == 5 and max(seen) == at_once
    moe(x)
    assert seen[-1] == 5  # the backward pass will need them all


@pytest.mark.parametrize("tasks", [torch.tensor([5, 3]), torch.arange(N).view(B, T)])
def test_a_router_is_told_what_is_known_of_each_token(monkeypatch, tasks):
    moe, told = layer(kernels="plain"), []
    assign = moe.router.assign
    monkeypatch.setattr(moe.router, "assign", lambda logits, **known: told.append(known) or assign(logits))
    ids, mask = torch.arange(N).view(B, T).flip(1), torch.arange(T) < torch.tensor([[5], [9]])
    moe(tokens(), ids, tasks, mask)
    (known,) = told
    assert known.pop("batch_shape") == (B, T)
    each = tasks if tasks.dim() == 2 else torch.stack([task.expand(T) for task in tasks])
    expected = {"token_ids": ids.flatten(), "task_ids": each.flatten(), "mask": mask.flatten()}
    assert known.keys() == expected.keys() and all(torch.equal(known[name], value) for name, value in expected.items())


def test_what_a_pass_has_counted_is_no_state_of_the_layer():
    moe = layer()
    assert {name for name in moe.state_dict() if not name.startswith("router.")} == {"w1", "w2"}
    assert {moe.load.dtype, moe.demand.dtype, moe.tokens.dtype, moe.experts_per_token.dtype} == {torch.long}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"token_ids": torch.arange(5)}, r"token_ids has shape \(5,\): must be \(2, 5\), as x is \(2, 5, "),
        ({"task_ids": torch.zeros(2, 1, dtype=torch.long)}, r"task_ids has shape \(2, 1\): must be \(2, 5\) or \(2,\)"),
        ({"mask": torch.ones(10, dtype=torch.bool)}, r"mask has shape \(10,\)"),
        ({"mask": torch.ones(2, dtype=torch.bool)}, r"mask has shape \(2,\)"),  # tasks alone may be of sequences
        ({"token_ids": torch.zeros(2, dtype=torch.long)}, r"token_ids has shape \(2,\)"),
    ],
)
def test_ids_and_masks_of_another_shape_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        layer()(torch.randn(2, 5, D), **given)


def test_a_router_that_takes_the_layer_at_once_writes_its_statistics(monkeypatch):
    told, x, everyone = [], tokens(), torch.ones(B, T, dtype=torch.bool)
    monkeypatch.setattr(ExpertChoice, "at_once", lambda _, *given, **keys: told.append((given, keys)) or given[0] + 1)
    moe = layer()
    moe.aux_loss = torch.ones(())  # of the pass before
    assert torch.equal(moe(x), x + 1) and moe.aux_loss is None
    (((_, weights, room), keys),) = told
    w1, w2 = weights()
    assert w1 is moe.w1 and w2 is moe.w2 and room == moe.room(x)
    buffers = moe.load, moe.demand, moe.tokens, moe.experts_per_token
    assert all(ours is theirs for ours, theirs in zip(keys.pop("statistics"), buffers, strict=True)) and not keys
    layer()(x, mask=everyone), layer(recompute=True)(x)
    assert len(told) == 1  # in steps


def test_a_subclass_that_computes_experts_otherwise_is_heard(monkeypatch):
    class Silent(MoE):
        def experts(self, x, token, gate):
            return torch.zeros_like(x)

    monkeypatch.setattr(ExpertChoice, "at_once", lambda *given, **keys: pytest.fail("computed the experts itself"))
    assert not Silent(ExpertChoice(D, E, 2.0), D, FF).double()(tokens()).any()
    for name in ("experts", "compute"):
        moe = layer()
        setattr(moe, name, lambda x, *_: torch.ones_like(x))
        assert (moe(tokens()) == 1).all()


def test_kernels_of_a_package_that_is_missing_are_refused_at_once(monkeypatch):
    monkeypatch.setattr("ecmoe.routing.router.CUTE", False)
    monkeypatch.setattr("ecmoe.routing.router.TRITON", True)
    moe = layer()
    with pytest.raises(RuntimeError, match="kernels='cute' needs quack-kernels"):
        moe.kernels = "cute"
    assert moe.kernels == "auto"


def test_a_copy_leaves_the_last_loss_behind():
    moe = layer(lambda: TokenChoice(D, E, 2))
    moe(tokens())
    copied = copy.deepcopy(moe)
    assert copied.aux_loss is None and moe.aux_loss.requires_grad
    assert torch.equal(copied.eval()(tokens()), moe.eval()(tokens()))


def test_an_empty_batch_has_a_loss_in_training_alone():
    moe = MoE(TokenChoice(8, 4, 1), 8, 16)
    moe(torch.randn(6, 8))  # of which nothing stays
    out = moe(torch.zeros(0, 8))
    assert not any(count.any() for count in (moe.load, moe.demand, moe.tokens, moe.experts_per_token))
    assert moe.aux_loss == 0 and moe.aux_loss.requires_grad
    assert not any(g.any() for g in torch.autograd.grad(out.sum(), list(moe.parameters())))  # a gradient for each
    moe.eval()(torch.zeros(0, 8))
    assert moe.aux_loss is None


def test_a_layer_without_width_and_an_input_of_integers_are_named():
    with pytest.raises(ValueError, match="d_ff=0: must be at least 1"):
        MoE(ExpertChoice(4, 2), 4, 0)
    with pytest.raises(ValueError, match=r"router=<class '.*ExpertChoice'>: must be a router, such as ExpertChoice\("):
        MoE(ExpertChoice, 4, 8)
    for shape in ((2, 8, 3), (4,), (1, 2, 3, 4)):
        with pytest.raises(
            ValueError, match=re.escape(f"x has shape {shape}: must be (B, T, 4) or (n, 4), the router's")
        ):
            MoE(ExpertChoice(4, 2), 4, 8)(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"x is of torch.int64: must be floating-point numbers"):
        MoE(ExpertChoice(4, 2), 4, 8)(torch.zeros(1, 8, 4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"mask is of torch.int64: must be bool, False for padding"):
        MoE(ExpertChoice(4, 2), 4, 8)(torch.zeros(1, 8, 4), mask=torch.ones(1, 8, dtype=torch.long))
    with pytest.raises(ValueError, match=r"token_ids is of torch.float32: must hold whole numbers"):
        MoE(Hash(4, 2, 9), 4, 8)(torch.zeros(1, 8, 4), token_ids=torch.zeros(1, 8))
