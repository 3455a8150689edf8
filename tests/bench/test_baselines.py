"""Token choice on its fastest ways computes what `MoE` with token choice computes."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from ecmoe import MoE
from ecmoe.bench import baselines as bench_baselines
from ecmoe.bench.baselines import Even, Grouped, peers
from ecmoe.routing import TokenChoice


def layer(top_k=2, gate="renormalized", n=24, dtype=torch.float64):
    torch.manual_seed(0)
    moe = MoE(TokenChoice(8, 4, top_k, gate=gate), 8, 16, kernels="plain").to(dtype)
    return moe, torch.randn(2, n // 2, 8, dtype=dtype, requires_grad=True)


def with_gradients(moe, x):
    out = moe(x)
    wanted = [x, moe.w1, moe.w2, moe.router.weight]
    return [out, moe.aux_loss, *torch.autograd.grad(out.sum() + (out**2).sum() + moe.aux_loss, wanted)]


@pytest.mark.parametrize("top_k, gate", [(1, "softmax"), (2, "renormalized"), (3, "softmax")])
def test_grouped_is_token_choice_with_nothing_dropped(top_k, gate):
    moe, x = layer(top_k, gate)
    for ours, theirs in zip(with_gradients(Grouped(moe), x), with_gradients(moe, x), strict=True):
        torch.testing.assert_close(ours, theirs)
    with torch.device("meta"):  # where what is made without `device=` has no numbers
        torch.testing.assert_close(Grouped(moe)(x), moe(x))


@pytest.mark.parametrize("compiled", [False, True])
def test_grouped_by_torchs_product_in_one_graph(compiled, monkeypatch):
    moe, x = layer(dtype=torch.bfloat16)
    asked, product = [], torch._grouped_mm
    grouped = Grouped(moe)
    if compiled:
        grouped = torch.compile(grouped, backend="aot_eager", fullgraph=True)
    else:
        monkeypatch.setattr(torch, "_grouped_mm", lambda *given, **keys: asked.append(keys) or product(*given, **keys))
    for ours, theirs in zip(with_gradients(grouped, x), with_gradients(moe, x), strict=True):
        assert (ours - theirs).float().norm() <= 2e-2 * theirs.float().norm()
    assert [keys["offs"].dtype for keys in asked] == ([] if compiled else 2 * [torch.int32])


def test_a_balance_loss_is_of_training_where_it_counts():
    moe, x = layer()
    grouped = Grouped(moe)
    grouped.eval()(x)
    assert grouped.aux_loss is None
    moe.router.aux_loss_weight = 0.0
    grouped.train()(x)
    assert grouped.aux_loss is None


def test_autocast_takes_the_products_down():
    moe, x = layer(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = Grouped(moe)(x)
    exact = moe(x)
    assert out.dtype == torch.float32 and 1e-4 < (out - exact).norm() / exact.norm() < 2e-2


def test_an_expert_without_tokens():
    moe, x = layer(top_k=1)
    with torch.no_grad():
        moe.router.weight[:, 2] = 0
        moe.router.weight[0, 2] = -100.0
    x = x.detach().abs().requires_grad_()
    for ours, theirs in zip(with_gradients(Grouped(moe), x), with_gradients(moe, x), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert moe.load[2] == 0


@pytest.mark.parametrize("n, e, k", [(64, 8, 2), (64, 8, 1), (60, 8, 2), (6, 8, 3)])
def test_even_choices_differ_and_fill_all_experts_alike(n, e, k):
    def chosen(device="cpu"):
        even = Even(8, e, k).to(device)
        even.prepare(n)
        return even.push > 0

    choice = chosen()  # (n, e)
    assert choice.shape == (n, e) and (choice.sum(1) == k).all()
    load = choice.sum(0)
    assert load.max() - load.min() <= (0 if n % e == 0 else k)
    assert not torch.equal(choice, chosen()) or n < 8
    assert chosen("meta").is_meta


def test_forced_choices_drop_nothing_and_free_ones_are_the_routers():
    torch.manual_seed(0)
    even = MoE(Even(8, 4, 3, 1.0, gate="renormalized"), 8, 16)
    free = MoE(TokenChoice(8, 4, 3, 1.0, gate="renormalized"), 8, 16)
    free.load_state_dict(even.state_dict())
    even.router.prepare(32)
    x = torch.randn(1, 32, 8, requires_grad=True)
    for ours, theirs in zip(with_gradients(even, x), with_gradients(free, x), strict=True):
        torch.testing.assert_close(ours, theirs)
    even.router.forced.fill_(1)
    logits = free.router.logits(x[0]).detach()
    even.router.weight.data *= 15 / (logits.max() - logits.min())  # more than an untrained router's differ by
    even(x)
    assert (even.router.read(x[0])[0].softmax(1) > 0).all()  # which have a gradient still
    assert even.demand.tolist() == even.load.tolist() == [24] * 4


def test_peers_are_used_where_they_are_and_named_where_they_fail(monkeypatch, tmp_path):
    moe, x = layer()
    monkeypatch.setitem(sys.modules, "scattermoe", ModuleType("scattermoe"))  # there, but not what it needs
    sys.modules["scattermoe"].__path__ = [str(tmp_path)]
    (tmp_path / "mlp.py").write_text("import cannot_be_had\n")
    kinds = {"ScatterMoE": bench_baselines.ScatterMoE, "Broken": lambda layer: 1 / 0, "There": Grouped}
    monkeypatch.setattr(bench_baselines, "PEERS", kinds)
    found, absent = peers(moe)
    assert list(found) == ["There"]
    missing = "ScatterMoE (ModuleNotFoundError: No module named 'cannot_be_had')"
    assert absent == [missing, "Broken (ZeroDivisionError: division by zero)"]


def test_liger_gets_experts_that_cost_the_same(monkeypatch):
    """A stand-in with Liger's interface: gated experts, of three matrices instead of two."""

    dtypes = set()

    def apply(x, w1, w2, index, gate):
        dtypes.add((index.dtype, gate.dtype == x.dtype))
        a, b = torch.einsum("nd,nkfd->nkf", x, w1[index]).chunk(2, dim=-1)
        return torch.einsum("nkf,nkdf,nk->nd", torch.nn.functional.silu(a) * b, w2[index], gate)

    names = ("liger_kernel", "liger_kernel.ops", "liger_kernel.ops.fused_moe")
    for name in names:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules[names[-1]].LigerFusedMoEFunction = SimpleNamespace(apply=apply)
    torch.manual_seed(0)
    moe = MoE(TokenChoice(64, 4, 2), 64, 288, kernels="plain")
    liger = bench_baselines.Liger(moe)
    assert liger.w1.shape == (4, 2 * 192, 64) and liger.w2.shape == (4, 64, 192)
    assert liger.w1.numel() + liger.w2.numel() == moe.w1.numel() + moe.w2.numel()
    others = (MoE(TokenChoice(8, 4, 2), 8, f, kernels="plain") for f in (8, 352))
    assert [bench_baselines.Liger(other).w2.shape[2] for other in others] == [
        64,
        256,
    ]  # the nearest 64, and at least one
    assert liger.w1.std().item() == pytest.approx(64**-0.5, rel=0.02)
    assert liger.w2.std().item() == pytest.approx(192**-0.5, rel=0.02)
    x = torch.randn(1, 24, 64)
    chosen = moe.router.assign(moe.router.logits(x[0])).dense(24)  # (n, e)
    a, b = torch.einsum("nd,efd->nef", x[0], liger.w1).chunk(2, dim=-1)
    every = torch.einsum("nef,edf->ned", torch.nn.functional.silu(a) * b, liger.w2)
    torch.testing.assert_close(liger(x)[0], (every * chosen[:, :, None]).sum(1))
    narrow = liger.to(torch.bfloat16)(x.bfloat16())  # whose router reads in float32
    assert narrow.dtype == torch.bfloat16 and dtypes == {(torch.int32, True)}


def test_scattermoe_gets_the_same_experts(monkeypatch):
    """A stand-in with ScatterMoE's interface, as its kernels need a GPU."""

    class Experts(torch.nn.Module):
        def __init__(self, e, i, o):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.empty(e, o, i))

    class MLP(torch.nn.Module):
        def __init__(self, input_size, hidden_size, num_experts, top_k, activation):
            super().__init__()
            assert (input_size, hidden_size, num_experts, top_k) == (8, 16, 4, 3)
            assert torch.empty(0).is_meta  # weights that are replaced take no memory
            self.experts = Experts(num_experts, input_size, hidden_size)
            self.output_experts = Experts(num_experts, hidden_size, input_size)
            self.activation = activation

        def forward(self, x, expert_p, expert_idxs):
            assert expert_p.dtype == x.dtype
            h = self.activation(torch.einsum("nd,nkfd->nkf", x, self.experts.weight[expert_idxs]))
            return torch.einsum("nkf,nkdf,nk->nd", h, self.output_experts.weight[expert_idxs], expert_p)

    modules = {"scattermoe": ModuleType("scattermoe"), "scattermoe.mlp": ModuleType("scattermoe.mlp")}
    modules["scattermoe.mlp"].MLP = MLP
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    moe, x = layer(top_k=3)
    found = with_gradients(scatter := bench_baselines.ScatterMoE(moe), x)
    found[3:5] = (w.transpose(1, 2) for w in found[3:5])
    for ours, theirs in zip(found, with_gradients(moe, x), strict=True):
        torch.testing.assert_close(ours, theirs)
    narrow, x = layer(top_k=3, dtype=torch.bfloat16)
    assert bench_baselines.ScatterMoE(narrow)(x).dtype == torch.bfloat16
    assert scatter.w1.is_contiguous() and scatter.w2.is_contiguous()
    assert bench_baselines.PEERS == {"ScatterMoE": bench_baselines.ScatterMoE, "Liger": bench_baselines.Liger}
