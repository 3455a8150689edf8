"""`MoE` on the kernels against `MoE` without."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from ecmoe import MoE, RunConfig, kernels
from ecmoe.config import CHOICES as MAY_BE
from ecmoe.kernels import choice, common
from ecmoe.kernels import layer as kernel_layer
from ecmoe.routers import ROUTERS as ROUTERS_BY_NAME
from ecmoe.routing import Assignment, ExpertChoice, Hash, TokenChoice, build_router, router, watched
from tests.kernels.oracle import DEVICE, WHOLE, distance, problem, spoil_new_memory

D, FF, E, B, T = 16, 32, 4, 2, 12


def layer(kernels, router=lambda: ExpertChoice(D, E, 2.0), dtype=torch.float32, **keys) -> MoE:
    torch.manual_seed(0)
    return MoE(router(), D, FF, kernels=kernels, **keys).to(DEVICE, dtype)


def tokens(dtype=torch.float32) -> torch.Tensor:
    return torch.randn(B, T, D, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)


ROUTERS = {
    "ec": lambda: ExpertChoice(D, E, 2.0),
    "ec renormalized": lambda: ExpertChoice(D, E, 1.0, gate="renormalized"),
    "ec scaled": lambda: ExpertChoice(D, E, 3.0, gate="scaled"),
    "ec renormalized by sequence": lambda: ExpertChoice(D, E, 1.0, pool="sequence", gate="renormalized"),
    "ec capped": lambda: ExpertChoice(D, E, 2.0, max_experts_per_token=2),
    "top-2 with capacity": lambda: TokenChoice(D, E, 2, 1.0, gate="renormalized"),
    "hash": lambda: Hash(D, E, 50, 1.0),
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ROUTERS)
def test_layer_is_the_plain_one_with_every_router(name, masked, monkeypatch):
    monkeypatch.setattr(choice, "NUMBERS", 16 * E)  # programs of 16 of the 24 tokens
    plain, fast = layer("plain", ROUTERS[name]), layer("triton", ROUTERS[name])
    ids = torch.randint(50, (B, T), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    mask = None
    if masked:
        mask = torch.ones(B, T, dtype=torch.bool, device=DEVICE)
        mask[:, 8:] = False
    results = []
    for moe in (plain, fast):
        if name.startswith("ec"):
            moe.router.cutoff.add(torch.ones(3, E, device=DEVICE))  # of an earlier micro-batch
        x = tokens().requires_grad_()
        out = moe(x, token_ids=ids, mask=mask)
        loss = out.square().sum() + (0 if moe.aux_loss is None else moe.aux_loss)
        results.append((out, *torch.autograd.grad(loss, [x, *moe.parameters()]), *moe.buffers()))
        if name.startswith("ec"):
            results[-1] += (moe.router.cutoff.pending, moe.router.cutoff.count)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "given", "autocast"),
    [(torch.float32, torch.float32, False), (torch.float32, torch.float32, True),
     (torch.bfloat16, torch.bfloat16, False), (torch.float32, torch.bfloat16, False)],
)  # fmt: skip
def test_a_layer_at_once_is_the_one_in_steps(dtype, given, autocast):
    results, steps = [], []
    for seen in (False, True):
        moe = layer("triton", lambda: ExpertChoice(D, E, 2.0, gate="renormalized"), dtype)
        # A token may score next to nothing for all that hold it; and nothing lies as kernels read it.
        moe.router.weight.data = (8 * moe.router.weight.data.T).contiguous().T
        x = torch.cat(2 * [tokens(given)], dim=2)[..., :D].requires_grad_()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast), watched(moe) if seen else nullcontext():
            out = moe(x)
        steps.append(out.grad_fn.next_functions[0][0].name())
        results.append((out, *torch.autograd.grad(out.square().sum(), [x, *moe.parameters()])))
    assert "_Layer" in steps[0] and "_Layer" not in steps[1]
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype and distance(a, b) < (1e-3 if autocast or given == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("seen", [False, True])
def test_bmm_by_name_fuses_nothing(seen, monkeypatch):
    called = []
    for name in ("product", "product_backward"):
        real = getattr(kernel_layer, name)
        monkeypatch.setattr(kernel_layer, name, lambda *a, n=name, r=real, **k: called.append(n) or r(*a, **k))
    for kind in ("triton-bmm", "triton"):
        moe = layer(kind)
        with watched(moe) if seen else nullcontext():
            moe(tokens()).sum().backward()
        fits = kernels.INTERPRETED  # on a GPU, 16 bits alone
        assert called == (["product", "product_backward"] if kind == "triton" and fits else [])


@pytest.mark.parametrize("who", ["hook", "hook before", "assign"])
def test_who_looks_at_a_choice_or_makes_another_has_the_layer_in_steps(who):
    moe, seen = layer("triton"), []
    if who == "assign":
        assign = moe.router.assign
        moe.router.assign = lambda *args, **keys: seen.append(who) or assign(*args, **keys)
    else:
        add = moe.router.register_forward_hook if who == "hook" else moe.router.register_forward_pre_hook
        add(lambda *_: seen.append(who))
    with torch.no_grad():
        moe(tokens())
    assert seen == [who]


def test_a_layer_counts_eight_experts_or_more_of_a_token_in_one():
    shares = [layer(kernels, lambda: ExpertChoice(D, 12, 11.0)) for kernels in ("plain", "triton")]
    outs = [(moe(tokens()), moe(tokens()))[1] for moe in shares]  # of the last batch alone
    assert "_Layer" in outs[1].grad_fn.next_functions[0][0].name()  # whose kernel counts
    assert shares[0].statistics() == shares[1].statistics() and shares[1].statistics()["share_8"] > 0.8


def test_where_every_expert_takes_every_token_nothing_is_selected():
    plain, fast = (layer(kernels, lambda: ExpertChoice(D, E, float(E)))(tokens()) for kernels in ("plain", "triton"))
    torch.testing.assert_close(plain, fast, rtol=1e-4, atol=1e-5)
    assert "_Layer" not in fast.grad_fn.next_functions[0][0].name()


@pytest.mark.parametrize("alone", range(4))
def test_each_input_may_be_trained_alone(alone):
    grads = []
    for moe in (layer("plain"), layer("triton")):
        moe.requires_grad_(False)
        given = x, *_ = tokens(), moe.router.weight, moe.w1, moe.w2
        given[alone].requires_grad_()
        grads += torch.autograd.grad(moe(x).square().sum(), given[alone])
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def test_evaluation_holds_a_few_experts_at_a_time(monkeypatch):
    moe, x, seen = layer("triton"), tokens(), []
    expected, experts = moe(x).detach(), kernels.experts
    monkeypatch.setattr("ecmoe.model.moe.HELD", 2 * (B * T * 2 // E) * FF)  # two experts' h
    monkeypatch.setattr("ecmoe.model.moe.SLOTS", 0)
    monkeypatch.setattr(
        kernels, "experts", lambda x, w1, *rest, **keys: seen.append(len(w1)) or experts(x, w1, *rest, **keys)
    )
    with torch.no_grad():
        torch.testing.assert_close(moe(x), expected)
    assert seen == [2, 2]


def test_bf16_is_no_further_from_float32_than_the_plain_path():
    reference = layer("plain", dtype=torch.bfloat16)
    wide = copy.deepcopy(reference).float()
    x = tokens(torch.bfloat16)
    token, gate = (t.detach() for t in reference.router.assign(reference.router.logits(x)))
    gradient = torch.randn_like(x.flatten(0, 1))

    def run(moe, dtype):
        flat = x.flatten(0, 1).to(dtype).requires_grad_()
        g = gate.clone().requires_grad_()
        out = moe.experts(flat, token, g)
        return out, *torch.autograd.grad(out, [flat, moe.w1, moe.w2, g], gradient.to(dtype))

    expected = run(wide, torch.float32)
    plain = [distance(a, b) for a, b in zip(run(reference, torch.bfloat16), expected, strict=True)]
    for kind in ("triton", "triton-bmm"):
        reference.kernels = kind
        fast = [distance(a, b) for a, b in zip(run(reference, torch.bfloat16), expected, strict=True)]
        assert all(ours < 1e-2 for ours in fast)
        if not kernels.INTERPRETED:  # which rounds otherwise
            assert all(ours < 1.05 * theirs for ours, theirs in zip(fast, plain, strict=True))


@pytest.mark.parametrize("gate", ["scaled", "renormalized"])
@pytest.mark.parametrize("watching", [False, True])
def test_nothing_is_read_that_nobody_has_written(gate, watching, monkeypatch):
    """At once or in steps: memory that is new, and what lies around it, changes no number."""
    moe = layer("triton", lambda: ExpertChoice(D, E, 2.0, gate=gate))
    x, results = tokens(), []
    for garbage in (False, True):
        if garbage:
            spoil_new_memory(monkeypatch)
        wanted = [x.clone().requires_grad_(), *moe.parameters()]
        with watched(moe) if watching else nullcontext():
            out = moe(wanted[0])
        results.append((out, *torch.autograd.grad(out.square().sum(), wanted), *(b.clone() for b in moe.buffers())))
        for counted in (moe.router.cutoff.pending, moe.router.cutoff.count):
            counted.zero_()
    for name, (a, b) in enumerate(zip(*results, strict=True)):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("again", ["experts", "whole layer"])
def test_checkpointing_changes_neither_output_nor_gradient(again):
    results = []
    for recompute in (False, True):
        moe, x = layer("triton", recompute=recompute and again == "experts"), tokens().requires_grad_()
        out = checkpoint(moe, x, use_reentrant=False) if recompute and again == "whole layer" else moe(x)
        results.append((out, *torch.autograd.grad(out.square().sum(), [x, *moe.parameters()])))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("who", ["plain", "triton"])
def test_recomputing_keeps_nothing_of_the_experts_width(who):
    def widths(recompute: bool) -> set[int]:
        found = set()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: found.update(t.shape) or t, lambda t: t):
            moe = layer(who, lambda: ExpertChoice(D, E, 2.0), recompute=recompute)
            moe(tokens().requires_grad_())
        return found

    assert FF in widths(False) and FF not in widths(True)


def test_where_no_expert_takes_a_token_the_layer_adds_nothing():
    x = tokens()[:1, :3].requires_grad_()  # three tokens, one expert each at most: less than one an expert
    moe = layer("triton", lambda: ExpertChoice(D, E, 1.0, 1, rounding="down"))
    out = moe(x)
    assert not out.any() and not torch.autograd.grad(out.sum(), moe.w1)[0].any()


def test_autocast_takes_the_products_down_and_the_routing_not():
    x = tokens()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out, expected = layer("triton")(x), layer("plain")(x)
    assert out.dtype == expected.dtype == torch.float32
    assert 0 < distance(out, expected) < 1e-2


@pytest.mark.parametrize("few", [True, False])
def test_the_compiler_sees_plain_pytorch_for_few_tokens_and_kernels_for_many(few, monkeypatch):
    torch._dynamo.reset()
    seen = []
    monkeypatch.setattr(router, "fast", lambda kernels, x: kernels != "plain")  # as on a GPU
    monkeypatch.setattr(router, "FEW", 2**24 if few else 1)

    def looked_at(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        raise RuntimeError("seen")

    with pytest.raises(Exception, match="seen"):
        torch.compile(layer("auto"), backend=looked_at, fullgraph=True)(tokens())
    assert any("bmm" in name for name in seen) == few != any("ecmoe" in name for name in seen)


def test_what_cannot_be_is_said(monkeypatch):
    with pytest.raises(ValueError, match="kernels='fast': must be one of auto, plain, triton"):
        layer("fast")
    monkeypatch.setattr("ecmoe.routing.router.CUTE", True)
    assert all(layer(name).router.kernels == name for name in MAY_BE["kernels"])
    monkeypatch.setattr(common, "INTERPRETED", False)
    with pytest.raises(RuntimeError, match="CUDA device, and these are on cpu.*kernels='plain'"):
        kernels.experts(*problem(*WHOLE, torch.float32)[:5] if DEVICE == "cpu" else [torch.zeros(1)] * 5)
    monkeypatch.setattr("ecmoe.routing.router.TRITON", False)
    with pytest.raises(RuntimeError, match="kernels='triton' needs triton: `pip install triton`"):
        layer("triton")


def test_the_layer_compiles_whole():
    torch._dynamo.reset()  # else a second capacity factor is taken for a variable
    moe, x = layer("triton", recompute=True), tokens().requires_grad_()
    plain = moe(x)
    compiled = torch.compile(moe, fullgraph=True, backend="aot_eager" if DEVICE == "cpu" else "inductor")
    gradient = torch.randn_like(plain)
    wanted = [x, *moe.parameters()]
    for a, b in zip(
        (plain, *torch.autograd.grad(plain, wanted, gradient)),
        (out := compiled(x), *torch.autograd.grad(out, wanted, gradient)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


EC, TOP = {"router": "expert_choice", "capacity_factor": 2.0}, {"router": "token_choice", "capacity_factor": 1.0}
CHOICES = [  # every line of every router that a compiled step may pass
    EC | {"gate": "renormalized", "pool": "sequence"},
    EC | {"gate": "scaled", "pool": 8, "max_experts_per_token": 2},
    EC | {"pool": "position", "max_experts_per_token": 2, "cap_solver": "dykstra"},
    TOP | {"top_k": 2, "gate": "renormalized", "balance": "switch", "z_loss_weight": 0.1},
    TOP | {"top_k": 1, "gate": "softmax", "balance": "bias"},
    TOP | {"top_k": 2, "gate": "scaled", "balance": "importance_load", "priority": "score"},
    TOP | {"top_k": 2, "balance": "first_choice", "capacity_factor": None},
    *(
        {"router": name}
        for name, row in ROUTERS_BY_NAME.items()
        if row.layer and name not in ("expert_choice", "token_choice")
    ),
]


@pytest.mark.parametrize("keys", CHOICES, ids=lambda keys: " ".join(map(str, keys.values())))
def test_the_layer_compiles_with_every_router(keys, monkeypatch):
    config = RunConfig(
        **keys, d_model=D, d_ff=FF, num_experts=E, sequence_length=8, batch_size=2, vocab_size=256, num_tasks=2
    )
    torch._dynamo.reset()
    static = build_router(config).static
    moe = layer("triton" if static else "plain", lambda: build_router(config))
    x = torch.randn(2, 8, D, device=DEVICE, requires_grad=True)
    ids, tasks = torch.arange(16, device=DEVICE).view(2, 8), torch.arange(2, device=DEVICE)
    monkeypatch.setattr(Assignment, "__iter__", None)  # which torch 2.11 can't compile
    if not static:  # in parts, for its sizes are read from the device
        assert torch.compile(moe, backend="eager")(x, ids, tasks).shape == x.shape
        return
    # Tracing is all of it: a graph that was caught whole need not run.
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="caught whole"):
        torch.compile(moe, backend=_caught, fullgraph=True)(x, ids, tasks)


def _caught(graph, inputs):
    raise RuntimeError("caught whole")


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_the_layer_runs_in_a_cuda_graph():
    moe, x = layer("triton"), tokens().requires_grad_()
    expected = moe(x).detach()  # a graph alive would tie x to the stream outside
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            torch.autograd.grad(moe(x).sum(), [x, *moe.parameters()])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = moe(x)
        gradients = torch.autograd.grad(out.sum(), [x, *moe.parameters()])
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected) and all(g.isfinite().all() for g in gradients)
