"""What 08_step_time measures is kept, belongs to its machine, and is read by rules that can be checked by hand."""

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from ecmoe import paths
from ecmoe.bench import growth
from ecmoe.bench import layer as bench
from ecmoe.bench import profile as bench_profile
from ecmoe.bench import step as bench_step
from ecmoe.bench.growth import bench_growth, exponents
from ecmoe.bench.rows import SIZES
from ecmoe.config import ConfigError, RunConfig
from ecmoe.files import Damaged, write_json
from ecmoe.report import plots
from ecmoe.study import speed
from ecmoe.study.evidence import Evidence

TINY = {"n": 64, "d_model": 8, "d_ff": 16, "num_experts": 4}
STEP = {
    "n": 64,
    "sequence_length": 32,
    "d_model": 8,
    "d_ff": 16,
    "heads": 2,
    "num_experts": 4,
    "layers": 2,
    "vocab_size": 300,
}
AXES = {"n": [64, 128, 256], "num_experts": [2, 4, 8], "capacity_factor": [0.5, 1.0, 2.0], "d_model": [8, 16, 32]}


def tiny_jobs():
    return speed.jobs({"0.1B/64E": TINY}, STEP, TINY | {"capacity_factor": 1.0}, AXES, repeats=2)


@pytest.fixture
def own_home(tmp_path, monkeypatch):
    monkeypatch.setenv("ECMOE_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ECMOE_HOME", str(tmp_path_factory.mktemp("speed")))
        yield speed.measured(tiny_jobs(), scale="smoke")


def test_each_part_is_measured_and_shown(found):
    assert set(found) == {"layer-0-1b-64e", "step", "growth", "profile"}
    assert {part["setting"]["repeats"] for name, part in found.items() if name != "profile"} == {2}
    for part, sizes in {"layer-0-1b-64e": TINY, "step": STEP, "growth": TINY, "profile": STEP}.items():
        assert sizes.items() <= found[part]["setting"].items()
    layers = speed.layers(found, ["0.1B/64E"])
    assert {"floor", "EC-CF2"} <= set(layers["layer"]) and (layers["ms"] > 0).all()
    share = layers[layers["what"] == bench.BOTH].set_index("name")["share_of_floor"]
    table = speed.by_layer(layers).set_index("layer")
    assert table["its share"]["EC-CF2"] == share["EC-CF2"] and table["its share"]["floor"] == 1
    assert ("peak MB" in table) == torch.cuda.is_available()  # what nobody knows is no column
    assert table["routing, of floor"].notna().sum() == 3 and list(table.index) == list(dict.fromkeys(layers["name"]))
    sizes = [layers.assign(size=size) for size in "abc"]
    drawn = plots.share_of_floor(pd.concat(sizes))
    assert f"EC-CF2 {100 * share['EC-CF2']:.0f}%" in drawn.alt
    assert [text.get_text() for text in drawn.figure.legends[0].get_texts()] == [bench.FORWARD, bench.BOTH]
    said = [(ax.get_xlim(), bool(ax.get_xlabel())) for ax in drawn.figure.axes]
    assert said == [((0, 105), False), ((0, 105), True), ((0, 105), False)]  # once, in the middle
    gap = plots.share_of_floor(speed.layers(found | {speed.layer_file("small"): speed.NOTHING}, ["0.1B/64E", "small"]))
    assert [ax.get_title() for ax in gap.figure.axes] == ["0.1B/64E"] and "Not run: small." in gap.alt
    steps = speed.rows(found, "step")
    assert {row.routing for row in steps.itertuples() if row.arm == "EC-CF2"} == {"own"}
    assert {row.routing for row in steps.itertuples() if row.arm == "GShard top-2"} == {"own", "even"}
    assert "Switch top-1, even routing, grouped_mm" in plots.step_times(steps).alt
    grown = speed.rows(found, "growth")
    assert grown.groupby("axis")["value"].apply(list).to_dict() == {k: [float(v) for v in vs] for k, vs in AXES.items()}
    assert len(plots.growth(grown, exponents(grown)).figure.axes) == 4
    kinds = speed.rows(found, "profile")
    assert kinds["share"].sum() == pytest.approx(1) and "experts' products" in plots.profile(kinds).alt


def test_columns_stand_in_the_order_of_what_was_timed_before(found):
    for name in ("layer-0-1b-64e", "step", "growth", "profile"):
        kept = json.loads((Path(__file__).parents[2] / f"reports/gpu/bench/{name}.json").read_text())
        assert list(found[name]["rows"][0]) == list(kept["rows"][0]), name


def test_each_job_gets_sizes_path_and_repeats(monkeypatch):
    monkeypatch.setattr(speed, "job", lambda name, **keys: (name, keys))
    base, usual = TINY | {"capacity_factor": 1.0}, {"compiled": True, "repeats": 3}
    layer, step = TINY | {"repeats": 7}, STEP | {"compiled": False}  # of their own
    found = speed.jobs({"0.1B/64E": layer}, step, base, AXES, auto_sizes=[TINY], repeats=3, compiled=True)
    assert found == {
        "layer-0-1b-64e": ("layer", usual | layer),
        "auto": ("auto", usual | {"sizes": [TINY]}),
        "step": ("step", usual | step),
        "growth": ("growth", {"base": base, "axes": AXES, "repeats": 3}),
        "profile": ("profile", step),
    }
    assert "auto" not in speed.jobs({}, STEP, base, AXES, auto_sizes=[], repeats=3)
    assert list(found) == ["layer-0-1b-64e", "auto", "step", "growth", "profile"]  # as they are measured and printed
    assert speed.jobs({}, STEP, base, AXES, repeats=3)["profile"] == ("profile", STEP | {"compiled": False})


def test_what_a_bench_cannot_take_is_named_before_it_begins():
    for name, keys, said in (
        ("layer", {"repeats": "x"}, "bench layer: repeats='x' must be a int"),
        ("auto", {"sizes": [], "repeat": 3}, "bench auto has no parameter 'repeat'"),
        ("study", {"config": {}}, "bench study has no parameter 'config'"),
        (
            "growth",
            {"base": TINY, "axes": AXES, "repeat": 3},
            "bench growth has no parameter 'repeat'.*did you mean repeats",
        ),
    ):
        with pytest.raises(ConfigError, match=said):
            speed.job(name, **keys)()


def test_a_scale_but_smoke_is_timed_on_a_gpu_alone(monkeypatch):
    for gpu in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        assert [speed.may(scale) for scale in ("smoke", "gpu", "paper")] == [True, gpu, gpu]
    with pytest.raises(ConfigError, match="scale='gpuu'"):
        speed.may("gpuu")


def test_arms_of_a_study_are_those_of_its_first_seed_in_a_file_of_their_names(monkeypatch):
    made = [SimpleNamespace(arms=(arm, "alias"), seed=seed, config=f"{arm}{seed}") for seed in (7, 3) for arm in "ab"]
    monkeypatch.setattr(
        speed, "of_page", lambda page, scale: made if (page, scale) == ("01_convergence", "paper") else []
    )
    assert speed.study_arms("paper") == {"a": "a7", "b": "b7"}
    arms = {"a": RunConfig(seed=3), "b": RunConfig(router="dense", seed=3)}
    names = f"a {RunConfig().name},b {RunConfig(router='dense').name}"
    assert speed.study_file(arms) == f"study-{hashlib.sha256(names.encode()).hexdigest()[:8]}"


def test_verdicts_read_the_steps_that_the_bench_kept(found, own_home):
    write_json(paths.results("smoke", "bench") / "step.json", found["step"], sealed=True)
    for routing in ("even", "own"):
        ratio = Evidence("smoke", "08_step_time").step_ratio("GShard top-2", "EC-CF2", routing)
        assert ratio.n == 2 and ratio.value > 0 and ratio.of == "turn"
    assert Evidence("smoke", "08_step_time").step_ratio("no such arm", "EC-CF2", "own").n == 0


def test_each_part_is_measured_once(own_home):
    counts = []
    table = pd.DataFrame([{"ms": 1.0}])
    jobs = {"a": lambda: counts.append("a") or table, "b": lambda: counts.append("b") or table}
    assert speed.measured(jobs, scale="smoke")["a"]["rows"] == [{"ms": 1.0}]
    speed.measured(jobs, scale="smoke")
    sampled = {"a": {"rows": [{"ms": 2.0, "samples_ms": [1.0, 3.0]}]}}
    assert speed.rows(sampled, "a").to_dict("records") == [{"ms": 2.0}]
    assert counts == ["a", "b"] and not paths.results("smoke", "bench").exists()  # where the engine alone writes
    assert sorted(path.name for path in (paths.runs() / "bench/smoke").iterdir()) == ["a.json", "b.json"]
    write_json(paths.results("smoke", "bench") / "a.json", {"rows": [{"ms": 2.0}]}, sealed=True)
    found = speed.measured(jobs, scale="smoke")
    assert found["a"] == {"rows": [{"ms": 2.0}], "setting": {}, "absent": []} and found["b"]["rows"] == [{"ms": 1.0}]
    assert speed.measured(jobs, scale="gpu", measure=False)["a"] == speed.NOTHING
    file = paths.runs() / "bench/smoke/b.json"
    file.unlink()
    speed.measured(jobs, scale="smoke")
    assert counts == ["a", "b", "b"]  # only what is missing
    file.write_text(file.read_text().replace('"ms": 1.0', '"ms": 1.5'))
    with pytest.raises(Damaged, match=r"b\.json is damaged"):
        speed.measured(jobs, scale="smoke")


@pytest.mark.parametrize("scale", ["smoke", "gpu"])
def test_the_plan_of_a_scale_can_be_measured(scale, own_home, monkeypatch):
    plan = speed.plan(scale)
    assert set(speed.jobs(**plan)) >= {"step", "growth", "profile", speed.study_file(speed.study_arms(scale))}
    assert paths.results(scale, "bench") == paths.root() / "reports" / scale / "bench"
    assert speed.files(scale) == [paths.results(scale, "bench") / f"{name}.json" for name in speed.jobs(**plan)]
    monkeypatch.setattr("ecmoe.bench.clock.in_turns", lambda *_: pytest.fail("measured"))
    monkeypatch.setattr("ecmoe.bench.growth.layer_and_input", lambda **_: pytest.fail("sizes are fine"))
    with pytest.raises(BaseException, match="sizes are fine"):  # all are checked before any is measured
        bench_growth(plan["growth_from"], plan["growth_axes"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure on")
@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("layer_sizes", {"a": 3}, "layer_sizes: a=3: Input should be a valid dictionary"),
        ("growth_axes", {"n": 3}, "growth_axes: n=3: Input should be a valid list"),
        ("repeats", 1, "repeats: 1: Input should be greater than or equal to 2"),
        ("scaling", {"layers": ["smal"]}, "scaling: layers names 'smal': did you mean small"),
    ],
)
def test_what_the_page_cannot_hold_is_named_before_anything_is_timed(key, value, said, monkeypatch):
    values = speed.merge_parameters(speed.parameter_files(speed.SPEED, "smoke")) | {key: value}
    monkeypatch.setattr(speed, "merge_parameters", lambda files: values)
    with pytest.raises(ConfigError, match=f"page '08_step_time': {said}"):
        speed.scaling("smoke")
    if key != "scaling":  # given to the notebook
        with pytest.raises(ConfigError, match=f"page '08_step_time': {said}"):
            speed.jobs(**values)


def test_what_was_timed_is_what_page_08_asks_for(monkeypatch):
    """A size that was changed after it was timed would head numbers that are another's."""
    monkeypatch.setenv("ECMOE_HOME", str(Path(__file__).parents[2]))
    asked = speed.plan("gpu")
    kept = {name: speed.kept(name, paths.results("gpu", "bench")) for name in speed.jobs(**asked)}
    grown = {
        axis: [row["value"] for row in kept["growth"]["rows"] if row["axis"] == axis] for axis in asked["growth_axes"]
    }
    assert grown == asked["growth_axes"]
    pairs = dict.fromkeys((row["n"], row["d_model"]) for row in kept["auto"]["rows"])
    assert list(pairs) == [(size["n"], size["d_model"]) for size in asked["auto_sizes"]]
    of_file = {speed.layer_file(name): sizes for name, sizes in asked["layer_sizes"].items()}
    of_file |= {"growth": asked["growth_from"], "step": SIZES["cuda"] | asked["step_sizes"], "auto": {}}
    for name, sizes in of_file.items():
        said = sizes | {"repeats": asked["repeats"]}
        assert {key: kept[name]["setting"][key] for key in said} == said, name
    for name in ("layer-small", "step", "auto", "profile"):
        assert asked["compiled"] and "compiled" in str(kept[name]), name


def test_scaling_has_its_own_base_on_top_of_the_scales(monkeypatch):
    page = {"layer_sizes": {"a": {"n": 1}, "b": {"n": 2}}, "base": {"steps": 5, "layers": 3}}
    monkeypatch.setattr(speed, "merge_parameters", lambda files: page)
    page["scaling"] = {"base": {"layers": 7}, "layers": ["b"], "pools": ["batch"]}
    asked = {"devices": [1], "pools": ["batch"], "base": {"steps": 5, "layers": 7}, "layers": {"b": {"n": 2}}}
    assert speed.scaling("smoke") == asked
    page["scaling"] = {"devices": [2, 4]}
    assert speed.scaling("smoke") == {"devices": [2, 4], "base": page["base"], "layers": {}}


def test_a_table_of_layers_has_each_number_in_its_column():
    columns = ["ms", "share_of_floor", "over_uncapped", "of_forward_floor", "peak_mb"]

    def timed(first, layer, variant="", mode=bench.EAGER):
        row = {"layer": layer, "variant": variant, "path": "plain", "mode": mode}
        whats = enumerate((bench.BOTH, bench.FORWARD, bench.ROUTING))
        return [row | {"what": what} | {c: first + 10 * i + k for k, c in enumerate(columns)} for i, what in whats]

    files = {"layer-a-1": {"rows": timed(100, "EC") + timed(900, "EC"), "absent": ["x", "y"]}, "layer-b": speed.NOTHING}
    files["layer-c"] = {"rows": timed(200, "floor") + timed(300, "EC", "CAP2", bench.GRAPH), "absent": ["z", "x"]}
    layers = speed.layers(files, ["A 1", "b", "C"])
    assert layers["size"].tolist() == ["A 1"] * 6 + ["b"] + ["C"] * 6 and layers["name"].isna().sum() == 1
    assert layers["name"].dropna().unique().tolist() == [
        "EC",
        "floor",
        str(bench.Row("EC", "CAP2", "plain", bench.GRAPH)),
    ]
    assert speed.by_layer(layers).to_dict("records") == [
        {"size": size, "layer": name, "forward, ms": x + 10, "share of floor": x + 11, "with backward, ms": x, "its share": x + 1,
         "a cap adds": x + 2, "routing, of floor": x + 23, "peak MB": x + 4}
        for size, name, x in (("A 1", "EC", 100), ("C", "floor", 200), ("C", layers["name"].iloc[-1], 300))
    ]  # fmt: skip
    assert speed.absent(files) == ["x", "y", "z"]


def test_a_gpu_page_without_a_gpu_has_gaps(own_home):
    found = speed.measured(tiny_jobs(), scale="gpu")
    layers = speed.layers(found, ["0.1B/64E"])
    assert layers["layer"].isna().all() and "Not run: 0.1B/64E." in plots.share_of_floor(layers).alt
    assert "not run" in plots.step_times(speed.rows(found, "step")).alt
    grown = speed.rows(found, "growth").reindex(columns=["axis", "value", "ms", "floor_ms"])
    assert "not run" in plots.growth(grown, exponents(grown)).alt
    assert "not run" in plots.profile(speed.rows(found, "profile")).alt
    assert speed.absent(found) == [] and not len(speed.by_layer(layers))


def test_a_step_of_each_arm_of_a_study_is_timed_once(own_home, tiny_config, monkeypatch):
    arms = {
        "EC": tiny_config(),
        "Dense": tiny_config(router="dense"),
        "Hash": tiny_config(router="hash", hash_table="balanced", compile=True),
    }
    monkeypatch.setattr("torch.nn.Module.compile", lambda block, **_: None)  # takes long
    steps = speed.study_steps(arms, scale="smoke")
    assert list(steps.index) == list(arms) and (steps["low_ms"] <= steps["ms"]).all() and (steps["ms"] > 0).all()
    rate = arms["EC"].tokens_per_batch / (steps["ms"] / 1e3)
    assert steps["tokens_per_second"].tolist() == pytest.approx(rate.tolist()) and "CPU" in steps.attrs["device"]
    monkeypatch.setattr("ecmoe.bench.step.bench_study", lambda configs: pytest.fail("measured again"))
    seeds = {arm: config.replace(seed=5) for arm, config in arms.items()}
    assert speed.study_steps(seeds, scale="smoke").equals(steps)  # another seed takes as long
    with pytest.raises(BaseException, match="measured again"):
        speed.study_steps(arms | {"EC": tiny_config(capacity_factor=1.0)}, scale="smoke")
    changed = arms | {"EC": tiny_config(capacity_factor=1.0)}
    assert speed.study_steps(changed, scale="smoke", measure=False)["ms"].isna().all()
    absent = speed.study_steps(arms, scale="gpu", measure=False)
    assert (
        absent["ms"].isna().all()
        and list(absent.index) == list(arms)
        and absent.attrs["device"].startswith("no device yet")
    )


def test_exponents_are_those_of_a_power_law():
    rows = [{"axis": "n", "value": v, "ms": 3 * v**1.5, "floor_ms": 0.1 * v} for v in (1, 2, 8)]
    (found,) = exponents(pd.DataFrame(rows)).to_dict("records")
    assert [found[key] for key in ("exponent", "low", "high")] == pytest.approx([1.5] * 3)
    assert (found["of_floor"], found["at_1"]) == pytest.approx((1.0, 3.0))
    two = [
        {"axis": axis, "value": v, "ms": v**p, "floor_ms": 1.0}
        for axis, p in (("n", 2), ("d_model", 1))
        for v in (1, 2)
    ]
    found = exponents(pd.DataFrame(two))  # in the order of the axes; two points tell no interval
    assert found["axis"].tolist() == ["n", "d_model"] and found["exponent"].tolist() == pytest.approx([2, 1])
    assert found[["low", "high"]].isna().all(axis=None)
    noisy = pd.DataFrame(rows).assign(ms=[3.0, 9.0, 60.0])
    (found,) = exponents(noisy).to_dict("records")
    x, y = np.log([1, 2, 8]), np.log([3.0, 9.0, 60.0])
    slope, at_0 = np.polyfit(x, y, 1)
    error = (((y - at_0 - slope * x) ** 2).sum() / 1 / ((x - x.mean()) ** 2).sum()) ** 0.5  # of 3 points and 2 numbers
    low, high = slope - 12.7062 * error, slope + 12.7062 * error  # Student's t for 95% and 1 degree of freedom
    expected = {"exponent": slope, "low": low, "high": high, "of_floor": 1.0, "at_1": np.exp(at_0)}
    assert found.pop("axis") == "n" and found == pytest.approx(expected, rel=1e-5)


def test_growth_times_the_layer_that_a_run_gets_at_each_size(monkeypatch):
    asked = []

    def layer_and_input(**size):
        asked.append(size)
        return "layer", [f"x of {size['n']}"], "gradient"

    def timed(calls, repeats):
        asked.append((calls, repeats))
        missing = len(asked) == 2  # of the first, the floor
        times = {("layer",): [0.001, 0.004, 0.002], ("floor",): [0.003, 0.001, 0.0005]}
        return SimpleNamespace(times={("layer",): [1.0]} if missing else times, absent=["no memory"] * missing)

    monkeypatch.setattr(growth, "layer_and_input", layer_and_input)
    monkeypatch.setattr(growth, "forward_and_both", lambda *given: {bench.FORWARD: "forward", bench.BOTH: given})
    monkeypatch.setattr(growth, "floor", lambda *given: {bench.FORWARD: "forward", bench.BOTH: given})
    monkeypatch.setattr(growth.timing, "timed", timed)
    base = {"n": 64, "d_model": 8, "d_ff": 24, "num_experts": 4, "capacity_factor": 2.0}
    axes = {"d_model": [16], "capacity_factor": [0.5], "n": [32], "num_experts": [8]}
    table = bench_growth(base, axes, repeats=3)
    bench_growth(base, {"num_experts": [2]})
    assert asked.pop()[1] == 9 and asked.pop() == base | {"num_experts": 2, "kernels": "auto"}
    sizes = [base | {"d_model": 16, "d_ff": 48}, base | {"capacity_factor": 0.5}, base | {"n": 32}]
    sizes.append(base | {"num_experts": 8})
    assert asked[::2] == [size | {"kernels": "auto"} for size in sizes]
    assert asked[1::2] == [
        ({("layer",): ("layer", [x], "layer", "gradient"), ("floor",): ("layer", x, k)}, 3)
        for x, k in (("x of 64", 32), ("x of 64", 8), ("x of 32", 16), ("x of 64", 16))  # k = n c / e
    ]
    row = {"ms": 2.0, "low_ms": 1.5, "high_ms": 3.0, "floor_ms": 1.0}
    assert table.to_dict("records") == [
        {"axis": "capacity_factor", "value": 0.5} | row, {"axis": "n", "value": 32.0} | row,
        {"axis": "num_experts", "value": 8.0} | row,
    ]  # fmt: skip
    assert table.attrs["absent"] == ["no memory"] and (base | {"repeats": 3}).items() <= table.attrs["setting"].items()


def test_growth_names_what_it_cannot_take():
    with pytest.raises(ConfigError, match="n=33"):
        bench_growth(TINY | {"capacity_factor": 2.0}, {"n": [64, 33]})
    with pytest.raises(ValueError, match="layers"):
        bench_growth(TINY | {"capacity_factor": 2.0}, {"layers": [1]})


# The profile


def test_kernels_time_is_told_by_operator_and_what_overlaps_counts_once():
    def event(cat, name, ts, dur, external):
        return {"cat": cat, "name": name, "ts": ts, "dur": dur, "args": {"External id": external}}

    events = [
        event("cpu_op", "aten::bmm", 0, 5, 1),
        event("cpu_op", "aten::mm", 5, 5, 2),
        event("gpu_memset", "Memset (Device)", 4300, 100, 3),
        event("kernel", "nobody's", 4400, 100, 3) | {"args": {}},
        event("kernel", "last", 3900, 200, 3),  # while the long one runs, as the short one before it
        event("kernel", "short", 3100, 100, 3),
        event("kernel", "long", 3000, 1000, 3),
        event("kernel", "nvjet_x", 100, 1000, 1),
        event("kernel", "nvjet_x", 1600, 400, 2),
        event("gpu_memcpy", "Memcpy DtoD", 1900, 300, 3),
        {"ph": "M", "name": "process_name"},
        {"cat": "cpu_op", "name": "cudaLaunchKernel", "args": {}},
        event("gpu_user_annotation", "Optimizer.step", 0, 9000, 4),
    ]
    spent = bench_profile.kernel_time(events)
    by_hand = {"aten::bmm nvjet_x": 1.0, "idle": 0.5 + 0.8 + 0.2, "aten::mm nvjet_x": 0.4, "Memcpy DtoD": 0.2}
    by_hand |= {"nobody's": 0.1, "long": 1.0, "short": 0.0, "last": 0.1, "Memset (Device)": 0.1}
    assert spent == pytest.approx(by_hand) and bench_profile.kernel_time([]) == {}
    most = bench_profile.by_kind({"aten::mm b": 1.0, "aten::mm d": 0.5, "aten::mm c": 3.0, "aten::mm a": 2.0})["most"]
    assert most.tolist() == ["aten::mm c; aten::mm a; aten::mm b"]  # that took most
    (long,) = bench_profile.by_kind({"aten::mm " + 90 * "x": 1.0})["most"]
    assert long == "aten::mm " + 51 * "x"  # 60 letters
    table = bench_profile.by_kind(spent)
    kinds = dict(zip(table["kind"], table["ms"], strict=True))
    assert list(kinds) == ["idle", "norms and other passes", "experts' products", "other products", "copies and casts"]
    assert list(kinds.values()) == pytest.approx([1.5, 1.2, 1.0, 0.4, 0.3])
    assert table["share"].sum() == pytest.approx(1)


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_the_fastest_path_is_profiled_on_its_device(kind, monkeypatch):
    """A stand-in for torch.profiler: what it would say on each device of three steps."""
    slow, fast = bench_step.Row("EC-CF2", "own", "plain"), bench_step.Row("EC-CF2", "own", "triton", "compiled")
    asked, made = [], []

    class Profile:
        def __init__(self, activities):
            asked.append([activity.name for activity in activities])

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def key_averages(self):
            return [
                SimpleNamespace(key="aten::bmm", self_cpu_time_total=6000.0),
                SimpleNamespace(key="other", self_cpu_time_total=3000.0),
            ]

        def export_chrome_trace(self, name):
            events = [
                {"cat": "kernel", "name": "bmm", "ts": 0, "dur": 6000},
                {"cat": "kernel", "name": "x", "ts": 6000, "dur": 3000},
            ]
            write_json(Path(name), {"traceEvents": events})

    def steps(configs, device, **keys):
        asked.append((list(configs), device.type, keys))
        graph = fast._replace(mode="compiled, CUDA graph")
        return {row: lambda row=row: made.append(row) for row in (slow, fast, graph)}

    times = {slow: [0.5, 0.2, 0.9], fast: [0.6, 0.3, 0.4]}

    def timed(calls, repeats):
        asked.append(repeats)
        return SimpleNamespace(times={row: times[row] for row in calls}, absent=["y"])

    monkeypatch.setattr(bench_profile.timing, "timed", timed)
    monkeypatch.setattr(bench_profile.timing, "this_device", lambda: torch.device(kind))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: made.append("wait"))
    for name, value in {
        "arms": lambda sizes: {"EC-CF2": sizes, "other": 0},
        "profile": Profile,
        "steps": steps,
    }.items():
        monkeypatch.setattr(bench_profile, name, value)
    monkeypatch.setattr(bench_profile, "setting", lambda sizes: {"of": sizes})
    table = bench_profile.bench_profile(n=4, **{"compiled": True} if kind == "cuda" else {})
    assert asked == [
        (["EC-CF2"], kind, {"compiled": kind == "cuda"}),
        3,
        ["CPU"] + ["CUDA"] * (kind == "cuda"),
    ]
    assert made == [fast] * 3 + ["wait"] * (kind == "cuda")  # by its median
    kinds = [("experts' products", 2.0, pytest.approx(2 / 3)), ("norms and other passes", 1.0, pytest.approx(1 / 3))]
    rows = [(row["kind"], row["ms"], row["share"]) for row in table.to_dict("records") if row["kind"] != "idle"]
    assert rows == kinds and table.attrs["step_ms"] == 400.0 and table.attrs["absent"] == ["y"]
    assert {"of": {"n": 4}, "arm": "EC-CF2", "path": "EC-CF2, triton, compiled", "steps": 3}.items() <= table.attrs[
        "setting"
    ].items()


@pytest.mark.parametrize(
    "name, kind",
    [
        ("_product_kernel", "experts' products"),
        ("aten::_grouped_mm cutlass_gemm_grouped", "experts' products"),
        ("aten::mm nvjet_tst_128x256", "other products"),
        ("_flash_queries_kernel", "attention"),
        ("aten::_scaled_dot_product_flash_attention flash_fwd_kernel", "attention"),
        ("_losses_kernel", "loss"),
        ("_scaled_kernel", "loss"),
        ("_squares_kernel", "optimiser"),
        ("aten::_fused_adamw_ void at::native::multi_tensor_apply_kernel<FusedAdam>", "optimiser"),
        ("aten::linalg_vector_norm void at::native::reduce_kernel<NormTwoOps>", "optimiser"),
        ("_logits_dw_kernel", "routing"),
        ("_sum_kernel", "routing"),
        ("aten::linear my_kernel", "other products"),
        ("Memcpy DtoD", "copies and casts"),
        ("_take_kernel", "routing"),
        ("_gather_dot_kernel", "gather and combine"),
        ("_combine_kernel", "gather and combine"),
        ("_activate_kernel", "activation"),
        ("triton_poi_fused_gelu_mul_3", "activation"),
        ("triton_per_fused__to_copy_add_rms_norm_1", "norms and other passes"),
        ("aten::copy_ void at::native::elementwise_kernel<direct_copy>", "copies and casts"),
        ("Memset (Device)", "copies and casts"),
        ("something else", "norms and other passes"),
    ],
)
def test_kinds_of_work(name, kind):
    assert bench_profile.kind_of(name) == kind


OPERATORS = {  # names in which nothing but one word tells the kind of work
    "experts' products": ["aten::bmm x"],
    "attention": ["aten::_efficient_attention_forward fmha_cutlassF_f32_aligned", "aten::scaled_dot_product_attention x"],
    "loss": ["aten::_log_softmax x", "aten::logsumexp x", "aten::nll_loss_forward x"],
    "other products": ["nvjet_sm90_tst_192x192", "sm80_xmma_fprop", "ampere_s16816gemm_bf16", "void cutlass::Kernel2", "cublasLt::splitK",
                       "aten::mm x", "aten::addmm x", "aten::matmul x"],
    "optimiser": ["aten::_fused_adamw_ x", "void at::native::multi_tensor_apply_kernel", "aten::_foreach_mul_ x", "clip_grad_norm_",
                  "aten::norm void lpnorm_cuda_kernel"],
    "routing": ["ecmoe::logits x", "ecmoe::select x", "aten::topk x", "aten::sort x", "aten::searchsorted x", "void cub::DeviceRadixHistogram"],
    "gather and combine": ["aten::gather x", "aten::scatter_ x", "aten::index_add_ x"],
    "copies and casts": ["void at::native::direct_copy_kernel_cuda", "aten::copy_ x", "aten::_to_copy x", "aten::to x", "aten::cat x",
                         "aten::fill_ x", "aten::zero_ x"],
    "norms and other passes": ["aten::mul x", "aten::mms x"],
}  # fmt: skip


@pytest.mark.parametrize(("kind", "names"), OPERATORS.items(), ids=OPERATORS)
def test_operators_of_pytorch_have_their_kind(kind, names):
    assert {name: bench_profile.kind_of(name) for name in names} == dict.fromkeys(names, kind)
