"""A training step: which weights, routing, path and graph each row times."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

import ecmoe.bench.step as bench_step_module
from ecmoe.bench import layer as bench
from ecmoe.bench.step import ARMS, arms, bench_step, step_of, steps
from ecmoe.model.build import flops_per_token
from ecmoe.training.lit import LitModel

STEP = {
    "n": 32,
    "d_model": 8,
    "d_ff": 16,
    "num_experts": 4,
    "layers": 2,
    "heads": 2,
    "sequence_length": 8,
    "vocab_size": 257,
}
CPU = torch.device("cpu")


def test_arms_are_those_of_claim_c2():
    """Expert choice with places for two experts a token and for one, GShard's top-2 with as many, Switch's top-1 with one."""
    found = {
        name: (config.router, config.capacity_factor * (config.router == "expert_choice" or config.top_k), config.gate)
        for name, config in arms(STEP).items()
    }
    assert found == {
        "EC-CF2": ("expert_choice", 2, "softmax"), "EC-CF1": ("expert_choice", 1, "softmax"),
        "GShard top-2": ("token_choice", 2, "renormalized"), "Switch top-1": ("token_choice", 1, "softmax"),
    }  # fmt: skip
    assert bench_step_module.PAIR == ("EC-CF2", "GShard top-2")


def test_step_of_every_arm_is_timed(monkeypatch):
    monkeypatch.setattr(bench_step_module, "peak_flops", lambda: 1e9)
    table = bench_step(repeats=2, **STEP)
    assert set(table["arm"]) == set(ARMS) and {"plain", "grouped_mm"} <= set(table["path"])
    for row in table.itertuples():
        assert row.low_ms <= row.ms <= row.high_ms
        assert row.tokens_per_second == pytest.approx(32 / (row.ms / 1e3))
        assert row.mfu == pytest.approx(row.tokens_per_second * flops_per_token(arms(STEP)[row.arm]) / 1e9)
        assert len(row.samples_ms) == 2
    computed = {"parameters": "float32", "products": "float32", "optimizer": "AdamW, float32 moments"}
    assert bench_step_module.setting(STEP) == STEP | computed
    assert (STEP | {"repeats": 2}).items() <= table.attrs["setting"].items() and table.attrs["absent"] == []
    configs = [config.replace(seed=seed) for config in [arms(STEP)["EC-CF2"]] for seed in (0, 0, 1)]
    first, again, other = (bench_step_module._tokens(config, CPU) for config in configs)
    assert first.shape == (4, 9) and torch.equal(first, again) and not torch.equal(first, other)
    many = bench_step_module._tokens(configs[0].replace(batch_size=400), CPU)
    assert (many.min(), many.max()) == (0, 256)


def test_a_table_of_steps_has_the_medians_and_rates_of_each_arm(monkeypatch):
    module, asked, arms_of = bench_step_module, {}, arms(STEP)
    rows = [module.Row("EC-CF2", "own", "plain"), module.Row("Switch top-1", "even", "triton", "compiled")]

    def timed(calls, repeats):
        asked.update(calls=calls, repeats=repeats)
        samples = {row: [0.001, 0.004, 0.002] for row in calls}
        return bench.timing.Timed(samples, dict(zip(calls, ((2.0, 5.0), None), strict=False)), ["absent"])

    monkeypatch.setattr(module, "peak_flops", lambda: 1e9)
    monkeypatch.setattr(
        module, "steps", lambda configs, device, compiled: {row: (configs, device, compiled) for row in rows}
    )
    monkeypatch.setattr(module.timing, "timed", timed)
    bench_step(**STEP)
    assert asked == {"calls": {row: (arms_of, CPU, False) for row in rows}, "repeats": 15}
    table = bench_step(repeats=3, compiled=True, **STEP)
    assert asked == {"calls": {row: (arms_of, CPU, True) for row in rows}, "repeats": 3}
    rate = 32 / 0.002
    usual = {"ms": 2.0, "low_ms": 1.5, "high_ms": 3.0, "tokens_per_second": rate, "samples_ms": [1.0, 4.0, 2.0]}
    for found, row in zip(table.drop(columns="peak_mb").to_dict("records"), rows, strict=True):
        mfu = rate * flops_per_token(arms_of[row.arm]) / 1e9
        assert found == row._asdict() | {"mfu": pytest.approx(mfu)} | usual
    assert table["peak_mb"][0] == 5.0 and table.attrs["absent"] == ["absent"]
    assert (STEP | {"repeats": 3}).items() <= table.attrs["setting"].items()

    inside = []
    monkeypatch.setattr(module, "repeatable", lambda: contextlib.nullcontext(inside.append("as runs are")))
    monkeypatch.setattr(module, "_run_step", lambda *given: (*given, *inside))
    table = module.bench_study(arms_of, repeats=4)
    assert asked["calls"] == {(arm,): (config, CPU, None, "as runs are") for arm, config in arms_of.items()}
    assert asked["repeats"] == 4 == table.attrs["setting"]["repeats"] and table.attrs["absent"] == ["absent"]
    assert table["arm"].tolist() == list(ARMS) and set(table["ms"]) == {2.0}
    monkeypatch.setattr(module.timing, "this_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    module.bench_study(arms_of)
    assert asked["repeats"] == 15
    assert {call[2] for call in asked["calls"].values()} == {"pool"}  # of one memory


def test_a_step_that_fails_is_named(monkeypatch):
    monkeypatch.setattr(bench_step_module.Grouped, "forward", lambda *_, **__: 1 / 0)
    table = bench_step(repeats=2, **STEP)
    assert set(table["path"]) == {"plain"} and len(table.attrs["absent"]) == 4
    assert "GShard top-2, even, grouped_mm, eager (ZeroDivisionError: division by zero)" in table.attrs["absent"]


def test_steps_begin_with_the_same_weights_and_forced_choices_each_time(monkeypatch):
    monkeypatch.setattr(bench_step_module, "step_of", lambda lit, *_: [*lit.parameters(), *lit.buffers()])
    first, again = ([t for call in steps(arms(STEP), CPU, compiled=False).values() for t in call] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)) and first[0] is not again[0]


def test_all_steps_train_the_same_weights(monkeypatch):
    made = []
    adamw = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda *a, **k: made.append(adamw(*a, **k)) or made[-1])
    calls = steps(arms(STEP), CPU, compiled=False)
    (optimizer,) = made
    assert optimizer.defaults["fused"]  # as in training
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    before = [p.detach().clone() for p in weights]
    for call in calls.values():
        for state in optimizer.state.values():
            state["exp_avg"].zero_()
        call()
        moments = [optimizer.state[p]["exp_avg"] for p in weights]
        assert all(m.abs().sum() > 0 for m in moments) and len(moments) > 10  # a gradient for each
    assert all(torch.equal(a, b) for a, b in zip(before, weights, strict=True))  # the learning rate is 0


@pytest.mark.parametrize("compiled", [False, True])
def test_with_kernels_each_arm_has_its_paths_and_the_two_of_the_claim_a_graph(compiled, monkeypatch):
    monkeypatch.setattr(bench_step_module, "kernels_run", lambda device: True)
    monkeypatch.setattr(bench_step_module.graph, "capturable", lambda lit: True)
    blocks = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block, **how: blocks.append((block, how)))
    usual, captured = ("compiled", "compiled, CUDA graph") if compiled else ("eager", "CUDA graph")
    rows = [("EC-CF2", "own", "plain"), ("EC-CF2", "own", "triton"), ("EC-CF1", "own", "triton")]
    for arm, paths in (("GShard top-2", ("plain", "triton", "grouped_mm")), ("Switch top-1", ("triton", "grouped_mm"))):
        rows += [(arm, routing, path) for path in paths for routing in ("own", "even")]
    eager = [(*row, usual) for row in rows]
    graphs = [(*row, captured) for row in rows if row[0] in bench_step_module.PAIR and row[2] == "triton"]
    configs, twins = arms(STEP), {}

    def twin(lit, config, path):
        made = make(lit, config, path)
        twins[id(made)] = config, path, made
        return made

    make = bench_step_module._twin
    monkeypatch.setattr(bench_step_module, "_twin", twin)
    monkeypatch.setattr(bench_step_module, "step_of", lambda *given: given)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    made = steps(configs, CPU, compiled=compiled)
    assert [*map(tuple, made)] == eager + graphs and len(graphs) == 3
    for row, (lit, _, batch, even, *pool) in made.items():
        config, path, _ = twins[id(lit)]
        assert (config, path, even) == (configs[row.arm], row.path, row.routing == "even") and batch.shape == (4, 9)
        assert pool == ([None] if "graph" in row.mode else [])  # a CPU has none
    assert len(blocks) == (2 * len(twins) if compiled else 0) and all(how == {"dynamic": False} for _, how in blocks)
    assert {id(block) for block, _ in blocks} == {
        id(b) for *_, one in twins.values() for b in one.model.blocks if compiled
    }


def test_a_graph_of_the_losses_is_captured_once_and_trains_as_they_do(monkeypatch):
    config, tokens = arms(STEP)["GShard top-2"], torch.randint(257, (4, 9))
    asked, weights = [], []

    def captured(lit, batch, pool):
        asked.append((lit, batch, pool))
        return lambda batch: (lit.loss(batch), sum(layer.aux_loss for layer in lit.model.moe_layers))

    monkeypatch.setattr(bench_step_module.graph, "captured", captured)
    monkeypatch.setattr(bench_step_module, "check_room", lambda: asked.append("room"))
    for pool in (None, "pool"):
        torch.manual_seed(0)
        lit = LitModel(config)
        step = step_of(lit, torch.optim.SGD(lit.parameters(), lr=1.0), tokens, pool=pool)
        step()
        step()
        weights.append(list(lit.parameters()))
    assert asked == ["room", (lit, tokens, "pool")]
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


@pytest.mark.parametrize(
    ("kind", "changes", "capturable", "captured"),
    [("cuda", {}, True, True), ("cpu", {}, True, False), ("cuda", {"cuda_graph": False}, True, False), ("cuda", {"compile": True}, False, False)],
)  # fmt: skip
def test_a_studys_step_takes_the_path_of_its_run(kind, changes, capturable, captured, tiny_config, monkeypatch):
    given, compiled = [], []
    monkeypatch.setattr(LitModel, "to", lambda lit, device: lit)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block, **how: compiled.append(how))
    monkeypatch.setattr(bench_step_module, "_tokens", lambda config, device: (config.seed, device.type))
    monkeypatch.setattr(bench_step_module.graph, "capturable", lambda lit: capturable)
    monkeypatch.setattr(bench_step_module, "step_of", lambda *args, **keys: given.append((args, keys)))
    counts, make = [], LitModel
    monkeypatch.setattr(bench_step_module, "LitModel", lambda config, of: counts.append(of) or make(config, of))
    usual = {"seed": 3, "cuda_graph": True, "compile": False, "tokenizer": "bpe", "vocab_size": 300}
    config = tiny_config(**usual | changes)
    bench_step_module._run_step(config, torch.device(kind), "pool")
    (((lit, optimizer, tokens), keys),) = given
    assert keys == {"pool": "pool" if captured else None, "tracked": True} and tokens == (3, kind)
    assert lit.config == config and {group["lr"] for group in optimizer.param_groups} == {0.0}
    assert compiled == [{"dynamic": False}] * (config.layers * config.compile)
    assert torch.equal(counts[0], torch.ones(300))  # how a hash table balances costs no time


@pytest.mark.parametrize("tracked", [False, True])
def test_a_step_moves_statistics_once_whoever_does_it(tracked):
    lit = LitModel(arms(STEP)["EC-CF2"])
    optimizer = lit.configure_optimizers()["optimizer"] if tracked else torch.optim.SGD(lit.parameters(), lr=0.0)
    (layer,) = lit.model.moe_layers
    for steps_made in (1, 2):
        step_of(lit, optimizer, torch.randint(257, (4, 9)), **{"tracked": True} if tracked else {})()
        weight = 1 - layer.router.cutoff.beta**steps_made
        assert layer.router.cutoff.weight.item() == pytest.approx(weight)
        assert len(optimizer._optimizer_step_post_hooks) == tracked  # none is left to slow the steps of others


def test_a_step_goes_down_the_gradient_of_the_loss_with_its_balance():
    lit, tokens = (
        LitModel(arms(STEP | {"layers": 4})["GShard top-2"].replace(aux_loss_weight=3.0, gradient_clip=1e6)),
        torch.randint(257, (4, 9)),
    )
    before, total = [p.detach().clone() for p in lit.parameters()], sum(lit.losses(tokens))
    gradients = torch.autograd.grad(total, list(lit.parameters()))
    step_of(lit, torch.optim.SGD(lit.parameters(), lr=1.0), tokens)()
    for new, old, gradient in zip(lit.parameters(), before, gradients, strict=True):
        torch.testing.assert_close(new.detach(), old - gradient)


@pytest.mark.parametrize(
    ("is_cuda", "precision", "mixed"),
    [(True, "bf16-mixed", True), (True, "bf16-true", False), (False, "bf16-mixed", False)],
)
def test_products_are_bf16_on_a_gpu_unless_weights_are(is_cuda, precision, mixed, monkeypatch):
    """Stand-ins for a model of one layer, its batch and its optimiser."""
    entered, layer, weight = [], SimpleNamespace(aux_loss=torch.ones(())), torch.nn.Parameter(torch.ones(()))
    lit = SimpleNamespace(
        model=SimpleNamespace(blocks=[SimpleNamespace(moe=layer), SimpleNamespace(moe=None)]), routers=[],
        config=SimpleNamespace(precision=precision, gradient_clip=0.5), loss=lambda batch: weight * 1, parameters=lambda: [weight],
    )  # fmt: skip
    clipped = []
    monkeypatch.setattr(bench_step_module, "clip", lambda parameters, optimizer, most: clipped.append(most))
    monkeypatch.setattr(torch, "autocast", lambda *how: contextlib.nullcontext(entered.append(how)))
    batch = SimpleNamespace(is_cuda=is_cuda)
    step_of(lit, torch.optim.SGD([weight], lr=1.0), batch, tracked=True)()
    assert entered == [("cuda", torch.bfloat16)] * mixed and clipped == [0.5]
    assert weight.item() == 0 and weight.grad is None and layer.aux_loss is None  # which would tie it to this stream


def test_a_step_clips_as_training_does():
    lit = LitModel(arms(STEP)["EC-CF2"].replace(gradient_clip=1e-3))
    before = [p.detach().clone() for p in lit.parameters()]
    step_of(lit, torch.optim.SGD(lit.parameters(), lr=1.0), torch.randint(257, (4, 9)))()
    moved = [float((new.detach() - old).square().sum()) for new, old in zip(lit.parameters(), before, strict=True)]
    assert sum(moved) ** 0.5 == pytest.approx(1e-3, rel=0.02)
    assert all(p.grad is None for p in lit.parameters())  # the next begins anew


@pytest.mark.parametrize("path", ["plain", "triton", "grouped_mm"])
def test_a_twin_routes_as_its_arm_says_on_its_path(path):
    configs = arms(STEP)
    lit = LitModel(configs["EC-CF2"])
    for arm, keys in ARMS.items():
        tokens = keys["router"] == "token_choice"
        if path == "grouped_mm" and not tokens:
            continue
        twin = bench_step_module._twin(lit, configs[arm], path)
        layer = twin.model.blocks[1].moe
        router = layer.router
        assert all(getattr(router, key) == value for key, value in keys.items() if key != "router"), arm
        assert type(router) is (bench_step_module.Even if tokens else bench_step_module.ExpertChoice)
        assert type(layer) is bench_step_module.Grouped if path == "grouped_mm" else layer.kernels == path
        assert twin.routers == [router] and router.weight is lit.routers[0].weight and router is not lit.routers[0]
        assert not tokens or router.push.shape == (32, 4)
        assert router.kernels == ("auto" if path == "grouped_mm" else path)
    renormalized = bench_step_module._twin(lit, configs["EC-CF2"].replace(gate="renormalized"), "plain")
    assert renormalized.model.moe_layers[0].router.gate == "renormalized"


def test_arms_have_the_sizes_of_the_device_in_whole_sequences(monkeypatch):
    assert arms(STEP | {"n": 8})["EC-CF2"].batch_size == 1
    monkeypatch.setattr(bench_step_module.timing, "this_device", lambda: torch.device("cuda"))
    keys = (
        "d_model",
        "layers",
        "batch_size",
        "tokenizer",
        "sequence_length",
        "vocab_size",
        "num_experts",
        "d_ff",
        "heads",
    )
    computed = {"parameters": "float32", "products": "bfloat16", "optimizer": "AdamW, float32 moments"}
    assert bench_step_module.setting(STEP) == STEP | computed
    sizes = {tuple(getattr(one, key) for key in keys) for one in arms({}).values()}
    assert sizes == {(768, 12, 64, "bpe", 1024, 32_000, 64, 3072, 12)}


def test_even_routing_is_even_and_own_is_not():
    config = arms(STEP)["GShard top-2"]
    twin = bench_step_module._twin(LitModel(config), config, "plain")
    (layer,) = twin.model.moe_layers
    layer.router.weight.data[:, 0] = 0
    tokens, demands = torch.randint(257, (4, 9)), []
    for even in (False, True):
        step_of(twin, torch.optim.SGD(twin.parameters(), lr=0.0), tokens, even)()
        demands.append(layer.demand.tolist())
    assert demands[1] == [16] * 4 and demands[0] != demands[1]


@pytest.mark.parametrize(("free", "fits"), [(71, True), (70, True), (69, False)])
def test_a_graph_is_captured_where_its_memory_has_room_beside_the_steps(monkeypatch, free, fits):
    emptied = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append("first"))
    for name, value in (
        ("max_memory_allocated", 58e9),
        ("memory_allocated", 23e9),
        ("mem_get_info", (free * 1e9, 80e9)),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    with (
        contextlib.nullcontext()
        if fits
        else pytest.raises(torch.OutOfMemoryError, match="35 GB of a step.* 69 GB are free")
    ):
        bench_step_module.check_room()
    assert emptied == ["first"]
