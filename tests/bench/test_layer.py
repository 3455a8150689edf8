"""`ecmoe bench`: rows beside their floor, and an einsum row that computes the same thing."""

import contextlib
import json
import math
import subprocess
import sys
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

import ecmoe.bench.step as bench_step_module
from ecmoe.bench import layer as bench
from ecmoe.bench.clock import save
from ecmoe.bench.step import ARMS, arms, bench_step, step_of, steps
from ecmoe.cli import app
from ecmoe.model.build import flops_per_token
from ecmoe.study import speed
from ecmoe.training.lit import LitModel


@pytest.fixture
def captures(monkeypatch):
    """A stand-in for CUDA's graphs: what is captured from which memory, and what is replayed."""
    made = []

    class Graph:
        def replay(self):
            made.append(("replay", self))

    side, usual = SimpleNamespace(name="side"), SimpleNamespace(name="usual")
    for stream in (side, usual):
        stream.wait_stream = lambda other, stream=stream: made.append((stream.name, "waits for", other.name))
    for name, value in {"graph_pool_handle": "pool", "Stream": side, "current_stream": usual}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext(made.append(stream.name)))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, pool: made.append((pool, graph)) or contextlib.nullcontext())
    return made


def test_calls_are_captured_once_warm_from_one_memory_up_to_the_first_that_cannot_be(captures):
    called, absent, rows = [], [], [bench.Row("EC", what=what) for what in "abcd"]

    def call(what):
        called.append(what)
        if what == "c":
            raise RuntimeError("it waits")

    found = bench.graphs({row: lambda what=row.what: call(what) for row in rows}, absent)
    assert list(found) == [row._replace(mode="CUDA graph") for row in rows[:2]]
    assert called == 4 * ["a"] + 4 * ["b"] + ["c"]  # three to get warm
    assert absent == ["CUDA graphs from EC, c on (RuntimeError: it waits)"]
    (_, first), (_, second) = (made for made in captures if made[0] == "pool")
    warm = [("side", "waits for", "usual"), "side", ("usual", "waits for", "side")]
    assert captures == [*warm, ("pool", first), *warm, ("pool", second), *warm[:2]] and first is not second
    found[rows[0]._replace(mode="CUDA graph")]()
    assert captures[-1] == ("replay", first)


@pytest.fixture
def wired(monkeypatch):
    """Parts that say what they were given, and a clock that only notes what it should time; `graphs` among it."""
    asked = {}

    def timed(calls, repeats, then):
        asked.update(calls=calls, repeats=repeats, graphs=then(calls, ["no graph"]))
        return bench.timing.Timed({}, {}, ["absent"])

    def parts(*given):
        return {what: (what, *given) for what in (bench.FORWARD, bench.BOTH)}

    for name in ("forward_and_both", "floor"):
        monkeypatch.setattr(bench, name, parts)
    monkeypatch.setattr(bench, "graphs", lambda calls, absent: (calls, absent))
    monkeypatch.setattr(bench.timing, "timed", timed)
    monkeypatch.setattr(torch, "compile", lambda layer, dynamic: ("compiled", layer, dynamic))
    return asked


@pytest.mark.parametrize("compiled", [False, True])
def test_each_row_of_the_layer_is_timed_by_its_own_call(compiled, wired, monkeypatch):
    row, first, x, gradient = bench.Row, torch.nn.Identity(), torch.ones(1, 16, 8, requires_grad=True), object()
    ec = [row("EC"), row("EC", path="triton"), row("EC", path="triton-bmm"), row("EC", "cap 2", "triton")]
    top = [row("top", "capacity 1 n/e", "triton"), row("top", "nothing dropped"), row("top", "grouped_mm")]
    layers = {one: torch.nn.Identity() for one in ec + top}
    for layer in layers.values():
        layer.aux_loss = torch.ones(())
    monkeypatch.setattr(bench, "layer_and_input", lambda **size: wired.update(size=size) or (first, x, gradient))
    monkeypatch.setattr(bench, "_expert_choice", lambda layer: {one: layers[one] for one in ec if layer is first})
    monkeypatch.setattr(bench, "_token_choice", lambda layer: ({one: layers[one] for one in top}, ["a peer"]))
    monkeypatch.setattr(bench, "_routing", lambda layer, x: (layer, x.requires_grad, x.shape))
    monkeypatch.setattr(bench, "_rows", lambda found, flops: wired.update(flops=flops) or [])
    monkeypatch.setattr(bench.timing, "this_device", lambda: torch.device("cuda"))  # whose sizes stand in
    sizes = {"n": 16, "d_model": 8, "num_experts": 4}
    table = bench.bench_layer(capacity_factor=1.0, repeats=3, compiled=compiled, **sizes)
    sizes["d_ff"] = 3072
    calls, whats = wired["calls"], (bench.FORWARD, bench.BOTH)
    expected = {
        one._replace(what=what): (what, layer, x, layer, gradient) for one, layer in layers.items() for what in whats
    }
    for one in (ec[0], ec[1], top[0], top[2]) if compiled else ():
        for what in whats:
            step = "compiled", layers[one], False
            expected[one._replace(mode="compiled", what=what)] = what, step, x, layers[one], gradient
    routing = {one._replace(what=bench.ROUTING): (layers[one], False, (16, 8)) for one in ec}
    for what in whats:
        _, layer, tokens, k = calls.pop(row("floor", what=what))
        assert layer is first and torch.equal(tokens, x[0]) and k == 4  # n c / e
    assert calls == expected | routing and wired["repeats"] == 3
    timed = expected | routing
    captured = {
        one: timed[one] for what in (*whats, bench.ROUTING) for one in [each._replace(what=what) for each in ec[:3]]
    }
    assert wired["graphs"] == (captured, ["no graph"]) and all(layer.aux_loss is None for layer in layers.values())
    assert wired["size"] == sizes | {"capacity_factor": 1.0} and wired["flops"] == 2 * 2 * 16 * 8 * 3072
    assert table.attrs["absent"] == ["a peer", "absent"]
    assert (wired["size"] | {"repeats": 3, "dtype": "float32"}).items() <= table.attrs["setting"].items()


@pytest.mark.parametrize("compiled", [False, True])
def test_the_path_of_a_run_has_the_plain_ones_weights_and_input(compiled, wired, monkeypatch):
    given, make = [], bench.layer_and_input
    monkeypatch.setattr(bench, "layer_and_input", lambda **size: given.append((size, *make(**size))) or given[-1][1:])
    sizes = [{"n": 16, "d_model": 8}, {"n": 32, "d_model": 4}]
    table = bench.bench_auto(sizes, num_experts=8, compiled=compiled, repeats=3)
    assert [size for size, *_ in given] == [s | {"d_ff": 4 * s["d_model"], "num_experts": 8} for s in sizes]
    _, plain, x, gradient = given[1]
    rows = [
        bench.Row("EC-CF2", "", path, mode)
        for path in ("plain", "auto")
        for mode in ("eager", "compiled")[: 1 + compiled]
    ]
    assert list(wired["calls"]) == [one._replace(what=what) for one in rows for what in (bench.FORWARD, bench.BOTH)]
    for one, (what, step, tokens, layer, of) in wired["calls"].items():
        assert what == one.what and tokens is x and of is gradient and layer.kernels == one.path
        assert step == (("compiled", layer, False) if one.mode == "compiled" else layer)
        assert layer.w1 is plain.w1 and layer.router.weight is plain.router.weight
        router = layer.router
        assert (router.d_model, router.num_experts, router.capacity_factor, router.pool) == (4, 8, 2.0, "batch")
    assert wired["graphs"] == ({r: c for r, c in wired["calls"].items() if r.mode == "eager"}, ["no graph"])
    assert wired["repeats"] == 3 and table.attrs["absent"] == 2 * ["absent"]
    assert {"num_experts": 8, "repeats": 3}.items() <= table.attrs["setting"].items()
    with pytest.raises(ValueError, match="n=33"):  # before any is timed
        bench.bench_auto([{"n": 16, "d_model": 8}, {"n": 33, "d_model": 8}], num_experts=8)
    assert len(given) == 2


@pytest.fixture(scope="module")
def measured():
    return bench.bench_layer(n=64, d_model=8, d_ff=16, num_experts=4, repeats=2)


def test_every_row_stands_beside_the_floor_of_its_run(measured):
    floor = measured[(measured["layer"] == "floor") & (measured["variant"] == "")].set_index("what")["ms"]
    assert set(floor.index) == {"forward", "forward + backward"}
    for row in measured.itertuples():
        assert row.ms > 0 and row.low_ms <= row.ms <= row.high_ms
        if row.what == "routing":
            assert row.of_forward_floor == pytest.approx(row.ms / floor["forward"])
            assert math.isnan(row.share_of_floor) and math.isnan(row.tflops)
        else:
            assert row.share_of_floor == pytest.approx(floor[row.what] / row.ms)
            products = {"forward": 2, "forward + backward": 6}[row.what]  # of 4 experts with 32 tokens each
            assert row.tflops == pytest.approx(products * 2 * 4 * 32 * 8 * 16 / (row.ms / 1e3) / 1e12)
            assert math.isnan(row.of_forward_floor)
    variants = measured.groupby("layer")["variant"].agg(set)
    assert variants["EC-CF2"] == {"", "cap 2", "cap 3"}
    assert variants["top-2"] == {"capacity 2 n/e", "nothing dropped", "grouped_mm"}
    assert set(measured["path"]) == {"plain"} and set(measured["mode"]) == {"eager"}
    sizes = {"n": 64, "d_model": 8, "d_ff": 16, "num_experts": 4, "capacity_factor": 2.0, "repeats": 2}
    dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    assert (sizes | {"dtype": dtype}).items() <= measured.attrs["setting"].items()


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize(
    ("c", "k", "caps"), [(2.0, 2, [2, 3]), (3.0, 3, [3]), (0.5, 1, [2, 3]), (1.75, 2, [2, 3]), (6.0, 4, [])]
)
def test_layers_are_what_their_rows_say_on_the_same_weights(kernels, c, k, caps, monkeypatch):
    monkeypatch.setattr(bench, "kernels_run", lambda device: kernels)
    monkeypatch.setattr(bench, "peers", lambda layer: ({"another": layer}, ["absent"]))
    first, _, _ = bench.layer_and_input(n=16, d_model=8, d_ff=16, num_experts=4, capacity_factor=c)
    ours, (others, absent) = bench._expert_choice(first), bench._token_choice(first)
    found = {
        tuple(row)[:3]: (layer.router.capacity_factor, layer.router.max_experts_per_token, layer.kernels)
        for row, layer in ours.items()
    }
    paths, name = ["plain", *["triton", "triton-bmm"] * kernels], f"EC-CF{c:g}"
    path = "triton" if kernels else "plain"
    capped = {(name, f"cap {b}", path): (c, b, path) for b in caps}
    assert found == {(name, "", path): (c, None, path) for path in paths} | capped
    top = {tuple(row)[:3]: layer for row, layer in others.items()}
    share = {f"capacity {c:g} n/e": c / k, "nothing dropped": None}
    expected = {(f"top-{k}", variant, path): factor for variant, factor in share.items() for path in paths[:2]}
    expected |= dict.fromkeys([(f"top-{k}", name, "plain") for name in ("grouped_mm", "another")])
    assert {key: layer.router.capacity_factor for key, layer in top.items()} == expected and absent == ["absent"]
    assert {(layer.router.top_k, layer.router.gate) for layer in top.values()} == {(k, "renormalized")}
    for layer in (*ours.values(), *top.values()):
        assert layer.w1 is first.w1 and layer.w2 is first.w2 and layer.router.weight is first.router.weight


def test_the_floor_is_six_products_and_the_layer_has_all_its_gradients(monkeypatch):
    layer, x, gradient = bench.layer_and_input(n=16, d_model=8, d_ff=12, num_experts=4)
    again, same, _ = bench.layer_and_input(n=16, d_model=8, d_ff=12, num_experts=4, kernels="triton", pool="rank")
    assert torch.equal(x, same) and torch.equal(layer.w1, again.w1) and not torch.equal(x, gradient)
    assert [(one.kernels, one.router.pool) for one in (layer, again)] == [("plain", "batch"), ("triton", "rank")]
    calls, made, bmm = bench.floor(layer, x[0], 6), [], torch.bmm
    named, names = [], {}

    def product(a, b):
        assert not a.requires_grad and not b.requires_grad  # nothing is kept
        made.append((*a.shape, b.shape[2]))
        named.append(tuple(names.setdefault(t.data_ptr(), len(names)) for t in (a, b)))
        return bmm(a, b)

    forward = [(4, 6, 8, 12), (4, 6, 12, 8)]  # e, rows, depth, columns
    with monkeypatch.context() as patch:
        patch.setattr(torch, "bmm", product)
        calls[bench.FORWARD]()
        assert made == forward
        calls[bench.BOTH]()
    x_in, w1, a, w2, dy, dh = range(6)  # as they come
    assert named[2:] == [(x_in, w1), (a, w2), (dy, w2), (a, dy), (dh, w1), (x_in, dh)]
    assert made[2:] == [*forward, (4, 6, 8, 12), (4, 12, 6, 8), (4, 6, 12, 8), (4, 8, 6, 12)]
    calls = bench.forward_and_both(layer, x, layer, gradient)
    out = layer(x)
    assert torch.equal(calls[bench.FORWARD](), out) and not calls[bench.FORWARD]().requires_grad
    theirs = torch.autograd.grad((out * gradient).sum(), [x, layer.w1, layer.w2, layer.router.weight])
    found = dict(zip(("x", *dict(layer.named_parameters())), calls[bench.BOTH](), strict=True))
    for name, expected in zip(("x", "w1", "w2", "router.weight"), theirs, strict=True):
        torch.testing.assert_close(found[name], expected)


def test_kernels_are_timed_on_a_gpu_with_triton_alone(monkeypatch):
    found = []
    for there in (True, False):
        monkeypatch.setattr(bench, "TRITON", there)
        found += [bench.kernels_run(torch.device(kind)) for kind in ("cuda", "cpu")]
    assert found == [True, False, False, False]


def test_no_cap_is_all_experts():
    first, *_ = bench.layer_and_input(n=12, d_model=8, d_ff=12, num_experts=3)
    assert [row.variant for row in bench._expert_choice(first)] == ["", "cap 2"]


def test_routing_goes_from_scores_to_the_assignment_without_gradients(monkeypatch):
    layer, x, _ = bench.layer_and_input(n=16, d_model=8, d_ff=12, num_experts=4)
    call = bench._routing(layer, x[0])
    monkeypatch.setattr(layer.router, "logits", lambda x: pytest.fail("scored again"))
    found = call()
    assert found.token.shape == (4, 8) and not found.gate.requires_grad


def test_all_columns_of_a_row_by_hand():
    floor, ec, cap = bench.Row("floor"), bench.Row("EC-CF2", path="triton"), bench.Row("EC-CF2", "cap 2", "triton")
    seconds = {
        floor._replace(what=bench.FORWARD): [0.001, 0.004, 0.002], floor._replace(what=bench.BOTH): [0.005, 0.006, 0.009],
        ec._replace(what=bench.FORWARD): [0.009, 0.003, 0.004], ec._replace(what=bench.BOTH): [0.01, 0.011, 0.015],
        ec._replace(what=bench.ROUTING): [0.001, 0.0005, 0.0008],
        ec._replace(variant="capacity", what=bench.BOTH): [0.012, 0.012, 0.012], cap._replace(what=bench.BOTH): [0.02, 0.022, 0.03],
    }  # fmt: skip
    memory = {row: (2.0, 5.0 + i) for i, row in enumerate(seconds)}
    rows = bench._rows(bench.timing.Timed(seconds, memory, []), flops=6e9)
    names = ["ms", "low_ms", "high_ms", "share_of_floor", "of_forward_floor", "over_uncapped", "tflops", "peak_mb"]
    expected = [
        [2.0, 1.5, 3.0, 1.0, None, None, 3.0, 3.0], [6.0, 5.5, 7.5, 1.0, None, None, 3.0, 4.0],
        [4.0, 3.5, 6.5, 0.5, None, None, 1.5, 5.0], [11.0, 10.5, 13.0, 6 / 11, None, None, 18 / 11, 6.0],
        [0.8, 0.65, 0.9, None, 0.4, None, None, 7.0], [12.0, 12.0, 12.0, 0.5, None, None, 1.5, 8.0],
        [22.0, 21.0, 26.0, 6 / 22, None, 1.0, 18 / 22, 9.0],
    ]  # fmt: skip
    for row, found, numbers in zip(seconds, rows, expected, strict=True):
        assert found == row._asdict() | {n: x and pytest.approx(x) for n, x in zip(names, numbers, strict=True)}


def test_what_a_cap_adds_is_against_the_same_path(measured):
    ms = measured[measured["variant"] == ""].set_index(["layer", "what"])["ms"]
    added = measured.dropna(subset=["over_uncapped"])
    assert set(added["variant"]) == {"cap 2", "cap 3"} and len(added) == 6
    for row in added.itertuples():
        assert row.over_uncapped == pytest.approx(row.ms / ms["EC-CF2", row.what] - 1)


def test_compiled_rows(monkeypatch):
    compiled, called = [], set()
    as_they_are = lambda layer, **how: compiled.append(how) or (lambda *x: called.add(layer) or layer(*x))  # noqa: E731
    monkeypatch.setattr(torch, "compile", as_they_are)
    table = bench.bench_layer(n=16, d_model=8, d_ff=16, num_experts=4, repeats=2, compiled=True)
    rows = table[table["mode"] == "compiled"]
    assert set(rows["variant"]) == {"", "capacity 2 n/e", "grouped_mm"}
    assert compiled == 3 * [{"dynamic": False}] and len(called) == 3
    bench.bench_auto([{"n": 16, "d_model": 4}], num_experts=4, compiled=True, repeats=2)
    assert len(compiled) == len(called) == 5


def test_what_fails_is_named_and_the_rest_is_measured(monkeypatch):
    def fail(self, x):
        raise RuntimeError("no kernel for this\nmore lines")

    monkeypatch.setattr(bench.Grouped, "forward", fail)
    table = bench.bench_layer(n=16, d_model=8, d_ff=16, num_experts=4, repeats=2)
    assert "grouped_mm" not in set(table["variant"]) and "EC-CF2" in set(table["layer"])
    assert "top-2, grouped_mm, plain, eager, forward (RuntimeError: no kernel for this)" in table.attrs["absent"]


def test_what_a_run_gets_stands_beside_the_plain_path(monkeypatch):
    sizes = [{"n": 16, "d_model": 4}, {"n": 32, "d_model": 8}]
    table = bench.bench_auto(sizes, num_experts=4, repeats=2)
    assert {"n": 131_072, "d_model": 256} in bench.AUTO and {"n": 512, "d_model": 4096} in bench.AUTO
    modes = {"eager", "CUDA graph"} if torch.cuda.is_available() else {"eager"}
    assert set(table["mode"]) == modes and len(table) == 4 * len(modes)
    assert table.groupby("what").size().to_dict() == dict.fromkeys((bench.FORWARD, bench.BOTH), 2 * len(modes))
    assert table["ratio"].tolist() == pytest.approx((table["auto_ms"] / table["plain_ms"]).tolist())
    assert list(table[["n", "d_model"]].drop_duplicates().itertuples(index=False, name=None)) == [(16, 4), (32, 8)]
    seconds = {"plain": [0.009, 0.004, 0.001], "auto": [0.001, 0.002, 0.003]}
    taken = lambda calls, *_: SimpleNamespace(times={row: seconds[row.path] for row in calls}, absent=[])  # noqa: E731
    monkeypatch.setattr(bench.timing, "timed", taken)
    table = bench.bench_auto(sizes[:1], num_experts=4, repeats=3)
    assert set(table["plain_ms"]) == {4.0} and set(table["auto_ms"]) == {2.0}  # medians


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["--passes"],
        ["layer", "--set", "step=1"],
        ["step", "--set", "dtype=bf16"],
        ["profile", "--set", "repeats=3"],
        ["auto", "--set", "n=4"],
        ["auto", "--set", "sizes=4"],
        ["layer", "--set", "capacity_factor=much"],
        ["layer", "--set", "n=many"],
        ["layer", "--set", "d_ff=0"],
        ["step", "--set", "repeats=1"],
    ],
)
def test_no_option_is_silently_ignored(command):
    refused = CliRunner().invoke(app, ["bench", *command])
    assert refused.exit_code == 2 and isinstance(refused.exception, SystemExit)
    if "--set" in command:
        assert command[-1].partition("=")[0] in refused.stderr and refused.stderr.count("\n") == 1


def test_absent_peers_are_named(measured):
    assert set(measured.attrs["absent"]) <= {"ScatterMoE (not installed)", "Liger (not installed)"}


def options(keys):
    return [word for key, value in keys.items() for word in ("--set", f"{key}={value}")]


def test_the_command_prints_a_table_and_keeps_it(tmp_path):
    path = tmp_path / "bench.json"
    sizes = options({"n": 64, "d_model": 8, "d_ff": 16, "num_experts": 4, "repeats": 2})
    shown = CliRunner().invoke(app, ["bench", "layer", *sizes, "--json", str(path)])
    assert shown.exit_code == 0, shown.output
    kept = json.loads(path.read_text(), parse_constant=pytest.fail)  # NaN is not JSON
    assert kept["setting"]["d_ff"] == 16
    setting, names, *rows = shown.stdout.splitlines()[: 2 + len(kept["rows"])]
    assert "n=64 d_model=8 d_ff=16 num_experts=4" in setting and all(f"{key}=" in setting for key in kept["setting"])
    assert names.split() == [key for key in kept["rows"][0] if any(row[key] is not None for row in kept["rows"])]
    assert [row.split()[0] for row in rows] == [row["layer"] for row in kept["rows"]]


def test_a_fraction_of_a_token_is_named_before_anything_is_timed():
    shown = CliRunner().invoke(app, ["bench", "layer", *options({"n": 33, "num_experts": 4})])
    assert shown.exit_code == 2 and "n=33" in shown.stderr


def test_saved_as_json(measured, tmp_path):
    save(measured, tmp_path / "bench" / "layer.json")
    kept = json.loads((tmp_path / "bench" / "layer.json").read_text())
    assert kept["setting"]["n"] == 64 and len(kept["rows"]) == len(measured)


# The training step

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
    assert bench_step_module.setting(arms(STEP), CPU) == STEP | computed
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
    assert {call[2] for call in asked["calls"].values()} == {"pool"}  # of one memory


def test_a_step_that_fails_is_named(monkeypatch):
    monkeypatch.setattr(bench_step_module.Grouped, "forward", lambda *_, **__: 1 / 0)
    table = bench_step(repeats=2, **STEP)
    assert set(table["path"]) == {"plain"} and len(table.attrs["absent"]) == 4
    assert "GShard top-2, even, grouped_mm, eager (ZeroDivisionError: division by zero)" in table.attrs["absent"]


def test_all_steps_train_the_same_weights(monkeypatch):
    made = []
    adamw = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda *a, **k: made.append(adamw(*a, **k)) or made[-1])
    calls = steps(arms(STEP), CPU)
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


def test_arms_have_the_sizes_of_the_device_in_whole_sequences(monkeypatch):
    assert arms(STEP | {"n": 8})["EC-CF2"].batch_size == 1
    monkeypatch.setattr(bench_step_module.timing, "this_device", lambda: torch.device("cuda"))
    sizes = {(one.d_model, one.layers, one.batch_size, one.tokenizer) for one in arms({}).values()}
    assert sizes == {(768, 12, 64, "bpe")}


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


def test_the_command_times_a_step(tmp_path):
    asked = [*options(STEP | {"repeats": 2}), "--json", str(tmp_path / "step.json")]
    shown = CliRunner().invoke(app, ["bench", "step", *asked])
    assert shown.exit_code == 0, shown.output
    kept = json.loads((tmp_path / "step.json").read_text(), parse_constant=pytest.fail)
    assert {row["arm"] for row in kept["rows"]} == set(ARMS) and "GShard top-2" in shown.stdout
    refused = CliRunner().invoke(app, ["bench", "step", *options({"n": 100, "sequence_length": 16})])
    assert refused.exit_code == 2 and "sequence_length=16" in refused.stderr
    shown = CliRunner().invoke(app, ["bench", "profile", *options(STEP)])
    assert shown.exit_code == 0 and "experts' products" in shown.stdout


def test_the_command_measures_everything_part_by_part(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "jobs", lambda **_: {"layer-a": fake, "step": lambda: 1 / 0, "growth": fake})
    command = ["bench", "all", "--scale", "smoke", "--out", str(tmp_path)]
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == 1 and "step: ZeroDivisionError" in shown.stderr and "growth:" in shown.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["growth.json", "layer-a.json"]
    shown = CliRunner().invoke(app, [*command, "--only", "layer,growth"])
    assert shown.exit_code == 0 and shown.stdout.count("is there already") == 2
    refused = CliRunner().invoke(app, [*command, "--only", "stepp"])
    assert refused.exit_code == 2 and "layer-a, step, growth" in refused.stderr


@pytest.mark.parametrize("command", ["all", "scaling"])
@pytest.mark.parametrize(
    ("scale", "said"), [("gpu", "gpu: its times are a GPU's"), ("gpuu", "must be one of gpu, paper")]
)
def test_no_time_of_a_cpu_is_kept_among_those_of_a_gpu(command, scale, said, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(speed, "plan", lambda scale: pytest.fail("went on"))
    monkeypatch.setattr(speed, "scaling", lambda scale: pytest.fail("went on"))
    refused = CliRunner().invoke(app, ["bench", command, "--scale", scale])
    assert refused.exit_code == 2 and said in refused.stderr and refused.stderr.count("\n") == 1


@pytest.mark.parametrize("failing", [None, "step"])
def test_on_a_gpu_each_part_is_a_process(tmp_path, monkeypatch, failing):
    ran = []

    def process(command):
        ran.append(command)
        return SimpleNamespace(returncode=3 * (command[-1] == failing))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(subprocess, "run", process)
    monkeypatch.setattr(speed, "jobs", lambda **_: {"layer-a": fake, "step": fake, "growth": fake})
    monkeypatch.setattr(speed, "plan", lambda scale: {})
    asked = ["bench", "all", "--scale", "paper", "--out", str(tmp_path), *["--force"] * bool(failing)]
    assert CliRunner().invoke(app, [*asked, "--only", "layer,step"]).exit_code == int(bool(failing))
    same = [sys.executable, "-m", "ecmoe", "bench", "all", "--scale", "paper", "--out", str(tmp_path)]
    same += ["--force"] * bool(failing)
    assert ran == [[*same, "--only", name] for name in ("layer-a", "step")]
    assert CliRunner().invoke(app, [*asked, "--only", "step"]).exit_code == 0
    assert len(ran) == 2 and (tmp_path / "step.json").exists()  # one alone is measured here


def fake():
    table = pd.DataFrame([{"ms": 1.0}])
    table.attrs["setting"] = {}
    return table


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


def test_measuring_needs_no_jupyter():
    """The machine that measures has torch, and neither notebooks nor what makes pages."""
    code = "import sys, ecmoe.cli, ecmoe.study.speed, ecmoe.study.engine, ecmoe.study.plan; print([m for m in ('IPython', 'papermill', 'nbformat', 'jupyter_client', 'datasets') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
