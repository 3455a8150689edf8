"""The layer beside its floor: rows are what they say, and an einsum row computes the same thing."""

import contextlib
import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ecmoe.bench import layer as bench
from ecmoe.bench.clock import save
from ecmoe.routing import router


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
    layers = torch.nn.Module
    monkeypatch.setattr(
        torch, "compile", lambda it, dynamic: ("compiled", it, dynamic) if isinstance(it, layers) else it
    )
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
    monkeypatch.setattr(bench, "_layers", lambda layer: (layers if layer is first else {}, ["a peer"]))
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
    floor = {row("floor", what=what): calls.pop(row("floor", what=what)) for what in whats}
    for _, layer, tokens, k in floor.values():
        assert layer is first and torch.equal(tokens, x[0]) and k == 4  # n c / e
    assert calls == expected | routing and wired["repeats"] == 3
    timed = expected | routing
    captured = {
        one: timed[one] for what in (*whats, bench.ROUTING) for one in [each._replace(what=what) for each in ec[:3]]
    }
    assert wired["graphs"] == (floor | captured, ["no graph"]) and all(
        layer.aux_loss is None for layer in layers.values()
    )
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
    once = [bench.Row("EC-CF2", "", "auto", "compiled")]  # compiled, it is the plain path on a CPU
    timed = [one for one in rows if one not in once]
    assert list(wired["calls"]) == [one._replace(what=what) for one in timed for what in (bench.FORWARD, bench.BOTH)]
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


def test_how_it_is_timed_where_nothing_is_asked_for(wired):
    sizes = {"n": 16, "d_model": 8}
    modes, tables = [], []
    for time_it in (lambda: bench.bench_layer(**sizes, d_ff=8, num_experts=4), lambda: bench.bench_auto([sizes])):
        tables.append(time_it().attrs["setting"])
        modes += [{row.mode for row in wired["calls"]}, wired["repeats"]]
    assert modes == [{"eager"}, 15, {"eager"}, 9]
    assert tables[0]["capacity_factor"] == 2.0 and tables[1]["num_experts"] == 32


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


@pytest.mark.parametrize(("kernels", "cute"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize(
    ("c", "k", "caps"), [(2.0, 2, [2, 3]), (3.0, 3, [3]), (0.5, 1, [2, 3]), (1.75, 2, [2, 3]), (4.0, 4, [])]
)
def test_layers_are_what_their_rows_say_on_the_same_weights(kernels, cute, c, k, caps, monkeypatch):
    for module in ("bench.layer", "routing.router"):
        monkeypatch.setattr(f"ecmoe.{module}.CUTE", cute)
    monkeypatch.setattr(bench, "kernels_run", lambda device: kernels)
    monkeypatch.setattr(bench, "peers", lambda layer: ({"another": layer}, ["absent"]))
    first, _, _ = bench.layer_and_input(n=16, d_model=8, d_ff=16, num_experts=4, capacity_factor=c)
    layers, absent = bench._layers(first)
    ours, others = ({row: of for row, of in layers.items() if row.layer[:2] == name} for name in ("EC", "to"))
    found = {
        tuple(row)[:3]: (layer.router.capacity_factor, layer.router.max_experts_per_token, layer.kernels)
        for row, layer in ours.items()
    }
    paths, name = ["plain", *["triton", "triton-bmm"] * kernels, *["cute"] * cute], f"EC-CF{c:g}"
    path = "triton" if kernels else "plain"
    capped = {(name, f"cap {b}", path): (c, b, path) for b in caps}
    assert list(found.items()) == list(({(name, "", path): (c, None, path) for path in paths} | capped).items())
    top = {tuple(row)[:3]: layer for row, layer in others.items()}
    share = {f"capacity {c:g} n/e": c / k, "nothing dropped": None}
    expected = {(f"top-{k}", variant, path): factor for variant, factor in share.items() for path in paths[:2]}
    expected |= dict.fromkeys([(f"top-{k}", name, "plain") for name in ("grouped_mm", "another")])
    assert {key: layer.router.capacity_factor for key, layer in top.items()} == expected
    assert absent == ["absent", *["cute (quack-kernels is not installed)"] * (kernels and not cute)]
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


def test_all_layers_lie_on_the_gpu_in_its_dtype(monkeypatch):
    """Tensors without numbers, which may lie on a GPU that isn't there."""
    monkeypatch.setattr(bench.timing, "this_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(bench, "kernels_run", lambda device: False)
    monkeypatch.setattr(bench, "peers", lambda layer: ({}, []))
    monkeypatch.setattr(torch.utils, "swap_tensors", lambda old, new: setattr(old, "data", new))
    with FakeTensorMode():
        first, x, gradient = bench.layer_and_input(n=16, d_model=8, d_ff=12, num_experts=4)
        layers = [first, *bench._layers(first)[0].values()]
    assert {(t.device.type, t.dtype) for layer in layers for t in [x, gradient, *layer.parameters()]} == {
        ("cuda", torch.bfloat16)
    }
    assert {t.device.type for layer in layers for t in layer.buffers()} == {"cuda"} and x.requires_grad


def test_kernels_are_timed_on_a_gpu_with_triton_alone(monkeypatch):
    found = []
    for there in (True, False):
        monkeypatch.setattr(bench, "TRITON", there)
        found += [bench.kernels_run(torch.device(kind)) for kind in ("cuda", "cpu")]
    assert found == [True, False, False, False]


def test_no_cap_is_all_experts():
    first, *_ = bench.layer_and_input(n=12, d_model=8, d_ff=12, num_experts=3)
    assert [row.variant for row in bench._layers(first)[0] if row.layer == "EC-CF2"] == ["", "cap 2"]


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
        floor._replace(mode=bench.GRAPH, what=bench.BOTH): [0.003] * 3, ec._replace(mode=bench.GRAPH, what=bench.BOTH): [0.004] * 3,
        floor._replace(mode=bench.GRAPH, what=bench.FORWARD): [0.001] * 3, ec._replace(mode=bench.GRAPH, what=bench.ROUTING): [0.0002] * 3,
    }  # fmt: skip
    memory = {row: (2.0, 5.0 + i) for i, row in enumerate(seconds)}
    rows = bench._rows(bench.timing.Timed(seconds, memory, []), flops=6e9)
    names = ["ms", "low_ms", "high_ms", "share_of_floor", "of_forward_floor", "over_uncapped", "tflops", "peak_mb"]
    expected = [
        [2.0, 1.5, 3.0, 1.0, None, None, 3.0, 3.0], [6.0, 5.5, 7.5, 1.0, None, None, 3.0, 4.0],
        [4.0, 3.5, 6.5, 0.5, None, None, 1.5, 5.0], [11.0, 10.5, 13.0, 6 / 11, None, None, 18 / 11, 6.0],
        [0.8, 0.65, 0.9, None, 0.4, None, None, 7.0], [12.0, 12.0, 12.0, 0.5, None, None, 1.5, 8.0],
        [22.0, 21.0, 26.0, 6 / 22, None, 1.0, 18 / 22, 9.0],
        [3.0, 3.0, 3.0, 1.0, None, None, 6.0, 10.0], [4.0, 4.0, 4.0, 0.75, None, None, 4.5, 11.0],
        [1.0, 1.0, 1.0, 1.0, None, None, 6.0, 12.0], [0.2, 0.2, 0.2, None, 0.2, None, None, 13.0],
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
    table = bench.bench_auto([{"n": 16, "d_model": 4}], num_experts=4, compiled=True, repeats=2)
    assert (
        sum(isinstance(step, torch.nn.Module) for step in called) == 4
    )  # one of two: on a CPU both are the plain path
    rows = table[table["mode"] == "compiled"]
    assert rows["auto_ms"].tolist() == rows["plain_ms"].tolist() and set(rows["path"]) == {"plain"} and len(rows) == 2


@pytest.mark.parametrize("few", [True, False])
def test_where_a_compiled_run_takes_the_kernels_both_paths_are_timed(few, monkeypatch):
    """As on a GPU, where `FEW` decides whether the kernels are worth their launches in a compiled layer."""
    timed = []

    def note(calls, *_):
        timed.extend(calls)
        return SimpleNamespace(times={row: [0.002 if row.path == "plain" else 0.001] * 2 for row in calls}, absent=[])

    monkeypatch.setattr(router, "fast", lambda kernels, x: kernels == "auto")
    monkeypatch.setattr(router, "FEW", 16 * 4 + few)
    monkeypatch.setattr(bench, "kernels_run", lambda device: True)
    monkeypatch.setattr(bench.timing, "timed", note)
    table = bench.bench_auto([{"n": 16, "d_model": 4}], num_experts=4, compiled=True, repeats=2)
    found = table[["mode", "path", "auto_ms", "ratio"]].drop_duplicates().to_numpy().tolist()
    of_compiled = ["compiled", "plain", 2.0, 1.0] if few else ["compiled", "triton", 1.0, 0.5]
    assert found == [["eager", "triton", 1.0, 0.5], of_compiled]
    assert sum(row.mode == "compiled" and row.path == "auto" for row in timed) == 2 * (not few)


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
    every = [(512 * 4**i, 256 * 2**j) for j in range(5) for i in range(5)]
    assert [(size["n"], size["d_model"]) for size in bench.AUTO] == every
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
    failed = lambda calls, *_: SimpleNamespace(  # noqa: E731
        times={row: seconds[row.path] for row in calls if row.path == "plain" or row.what == bench.BOTH}, absent=[]
    )
    monkeypatch.setattr(bench.timing, "timed", failed)
    (row,) = bench.bench_auto(sizes[:1], num_experts=4, repeats=3).to_dict("records")
    assert (row["what"], row["ratio"]) == (bench.BOTH, 0.5)  # what failed on one path is compared with nothing


def test_absent_peers_are_named(measured):
    missing = {"ScatterMoE": "scattermoe", "Liger": "liger_kernel"}
    said = {f"{peer} (ModuleNotFoundError: No module named {module!r})" for peer, module in missing.items()}
    assert set(measured.attrs["absent"]) <= said


def test_saved_as_json(measured, tmp_path):
    save(measured, tmp_path / "bench" / "layer.json")
    kept = json.loads((tmp_path / "bench" / "layer.json").read_text())
    assert kept["setting"]["n"] == 64 and len(kept["rows"]) == len(measured)
