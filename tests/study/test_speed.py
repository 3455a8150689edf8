"""What 08_step_time measures is kept, belongs to its machine, and is read by rules that can be checked by hand."""

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from ecmoe import paths
from ecmoe.bench import layer as bench
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
    whole = {"rows": [{"ms": 2.0}], "setting": {"device": "H200"}, "absent": []}
    write_json(paths.results("smoke", "bench") / "a.json", whole, sealed=True)
    found = speed.measured(jobs, scale="smoke")
    assert found["a"] == whole and found["b"]["rows"] == [{"ms": 1.0}]
    assert speed.measured(jobs, scale="gpu", measure=False)["a"] == speed.NOTHING
    file = paths.runs() / "bench/smoke/b.json"
    file.unlink()
    speed.measured(jobs, scale="smoke")
    assert counts == ["a", "b", "b"]  # only what is missing
    file.write_text(file.read_text().replace('"ms": 1.0', '"ms": 1.5'))
    with pytest.raises(Damaged, match=r"b\.json is damaged"):
        speed.measured(jobs, scale="smoke")


@pytest.mark.parametrize("name", sorted(speed.COLUMNS))
def test_a_column_that_a_page_reads_is_missed_by_its_name(name, own_home):
    """As in a file of another version; the committed files have them all."""
    whole = json.loads((Path(__file__).parents[2] / f"reports/gpu/bench/{name}.json").read_text())
    for column in speed.COLUMNS[name]:
        rows = [{key: x for key, x in row.items() if key != column} for row in whole["rows"]]
        write_json(paths.results("gpu", "bench") / f"{name}.json", {"rows": rows}, sealed=True)
        with pytest.raises(Damaged, match=rf"bench/{name}\.json is damaged \(it has no {column}\)"):
            speed.kept(name, "gpu")
    write_json(paths.results("gpu", "bench") / f"{name}.json", {"rows": whole["rows"]}, sealed=True)
    with pytest.raises(Damaged, match=rf"bench/{name}\.json is damaged \(it has no setting\)"):
        speed.taken({name: speed.kept(name, "gpu")}, name)


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
    kept = {name: speed.kept(name, "gpu") for name in speed.jobs(**asked)}
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
    assert speed.absent(files) == ["x for layer-a-1, layer-c", "y for layer-a-1", "z for layer-c"]
    files = {
        "a": {"absent": ["Liger (not installed)", "Liger (not installed)"]},  # such as at two points of a growth
        "b": {"absent": ["Liger (ModuleNotFoundError: No module named 'liger')"]},
    }
    assert speed.absent(files) == ["Liger (not installed) for a, b"]
    files["a"]["rows"] = [{"layer": "EC", "path": path} for path in ("plain", "cute")]
    files["b"]["rows"] = [{"layer": "EC", "path": "plain"}]
    files["c"] = files["b"] | {"absent": ["cute (no package)"]}
    assert speed.absent(files | {"d": speed.NOTHING}) == [
        "Liger (not installed) for a, b", "cute (no package) for c", "cute (not timed) for b",
    ]  # fmt: skip


def test_of_each_router_the_fastest_row_with_backward_counts_but_for_graphs_that_only_one_has():
    row = {
        "layer": "EC",
        "variant": "",
        "path": "plain",
        "mode": bench.EAGER,
        "what": bench.BOTH,
        "share_of_floor": 0.5,
    }
    other = {"layer": "top-2", "variant": "grouped"}
    timed = [
        row | {"layer": "floor", "share_of_floor": 1.0},
        row,
        row | {"what": bench.FORWARD, "share_of_floor": 0.99},
        row | {"mode": bench.COMPILED, "share_of_floor": 0.625},
        row | {"mode": bench.GRAPH, "share_of_floor": 0.75},
        row | other | {"share_of_floor": 0.875},
    ]
    files = {"layer-b": {"rows": timed[::-1]}, "layer-a": {"rows": timed[:2]}, "layer-c": speed.NOTHING}
    layers = speed.layers(files, ["b", "a", "c"])
    assert speed.fastest(layers) == "b: top-2, grouped (88%), EC, compiled (62%); a: EC (50%)"
    floor_alone = speed.layers({"layer-a": {"rows": timed[:1]}}, ["a"])
    assert speed.fastest(layers[layers["size"] == "c"]) == speed.fastest(floor_alone) == "nothing"


def test_a_gpu_page_without_a_gpu_has_gaps(own_home):
    found = speed.measured(tiny_jobs(), scale="gpu")
    layers = speed.layers(found, ["0.1B/64E"])
    assert layers["layer"].isna().all() and "Not run: 0.1B/64E." in plots.share_of_floor(layers).alt
    assert "not run" in plots.step_times(speed.rows(found, "step")).alt
    grown = speed.rows(found, "growth").reindex(columns=["axis", "value", "ms", "floor_ms"])
    assert "not run" in plots.growth(grown, exponents(grown)).alt
    assert "not run" in plots.profile(speed.rows(found, "profile")).alt
    assert speed.absent(found) == [] and not len(speed.by_layer(layers)) and speed.fastest(layers) == "nothing"


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


def test_where_and_with_which_code_a_result_was_timed_is_said():
    found = {"a": {"setting": {"device": "A", "commit": "1", "threads": 4, "repeats": 3}}, "none": speed.NOTHING}
    assert speed.taken(found, "a") == "one A (4 CPU threads, commit 1)"
    assert speed.taken(found, "none") == "no device yet"


def test_where_the_default_path_takes_longer_is_named_with_its_worst():
    rows = [
        ("eager", 512, 64, 1.02),
        ("eager", 2048, 64, 1.03),
        ("CUDA graph", 512, 64, 1.5),
        ("eager", 2048, 64, 1.25),
    ]
    auto = pd.DataFrame(rows, columns=["mode", "n", "d_model", "ratio"])
    assert speed.longer(auto) == "eager, n 2,048, d 64: 1.25 times; CUDA graph, n 512, d 64: 1.50 times"
    assert speed.longer(auto[:1]) == "nowhere"
