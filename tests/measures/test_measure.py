"""A measurement is taken once, kept with the run, and read without weights."""

import gc
import shutil
import weakref
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from ecmoe import measures, paths
from ecmoe.files import ConfigError, Damaged, read_json, write_json
from ecmoe.measures import Measurement, Row, lock, measure, measurements, trained_model
from ecmoe.study.parameters import held_to
from ecmoe.training import gpus
from ecmoe.training import result as training_result
from ecmoe.training.result import Result, not_run
from ecmoe.training.run import run_or_load

CALLS = []


def weights(model, config, *, layers=1):
    assert not model.training
    CALLS.append(config.seed)
    return {"numbers": [sum(p.numel() for p in model.parameters())], "seed": config.seed, "layers": layers}


@pytest.fixture(autouse=True)
def row(monkeypatch):
    monkeypatch.setitem(measures.MEASURES, "weights", Row(f"{__name__}:weights", {"layers": int}))


def how(**keys) -> Measurement:
    return Measurement("weights", keys)


@pytest.mark.parametrize("keep", [False, True])
def test_taken_once_and_read_without_weights(tiny_config, keep):
    result = run_or_load(tiny_config(steps=2, seed=11), progress=False)
    one = how(layers=2 + keep)
    assert measure(result, one, scale="gpu", train=False) is None
    before = len(CALLS)
    found = measure(result, one, scale="gpu", keep=keep)
    assert found["seed"] == 11 and found["numbers"][0] > 1000 and found["layers"] == 2 + keep
    assert measure(result, one, scale="gpu", train=False) == found == measure(result, one, scale="gpu")
    assert len(CALLS) == before + 1
    kept, by_hand = (
        folder / f"{one.name}.json"
        for folder in (paths.results("gpu", "measures") / result.summary["name"], result.path / "measures")
    )
    assert (kept.exists(), by_hand.exists()) == (keep, not keep)  # what was found by hand never lies in reports
    said = {"run": result.summary["name"], "what": "weights", "keys": {"layers": 2 + keep}, "found": found}
    assert said.items() <= read_json(kept if keep else by_hand, sealed=True).items()
    assert measure(result, how(layers=9), scale="gpu", train=False) is None  # another setting is another one


def test_it_is_stored_with_where_and_by_what_code_it_was_computed(tiny_config, monkeypatch):
    """As they are before it begins; what was stored without is as its run."""
    made = {"device": "H100", "commit": "c0", "code": "c0de", "versions": {"torch": "2"}, "started": "2026"}
    monkeypatch.setattr("ecmoe.training.summary.circumstances", lambda: dict(made))
    monkeypatch.setattr(measures, "code_digest", lambda names: "-".join(names))
    monkeypatch.setattr(f"{__name__}.weights", lambda model, config, **keys: made.clear() or {"x": 1})
    result = run_or_load(tiny_config(steps=2, seed=11), progress=False)
    then, one = dict(made), how(layers=50)
    assert measures.as_measured(result, one, scale="gpu") is None
    measure(result, one, scale="gpu")
    path = result.path / "measures" / f"{one.name}.json"
    stored = read_json(path, sealed=True)
    assert stored == {"run": result.summary["name"], "what": "weights", "keys": {"layers": 50}, "found": {"x": 1},
                      **then, "measures": "measures"}  # fmt: skip
    del then["started"]
    assert measures.as_measured(result, one, scale="gpu") == result.summary | then | {"measures": "measures"}
    assert measures.as_measured(result, one, scale="gpu", keep=True) is None  # it is not in reports
    write_json(path, {key: stored[key] for key in ("run", "what", "keys", "found")}, sealed=True)
    assert measures.as_measured(result, one, scale="gpu") == result.summary
    write_json(path, {key: stored[key] for key in ("run", "what", "keys")}, sealed=True)
    with pytest.raises(Damaged, match=rf"measures/{path.name} is damaged \(it has no found\): delete it"):
        measure(result, one, scale="gpu")
    assert measures.as_measured(not_run(tiny_config(steps=2, seed=11)), one, scale="gpu") is None


def test_a_record_without_weights_is_trained_again(tiny_config):
    config = tiny_config(steps=2, seed=12)
    run_or_load(config, records=paths.results("gpu", "runs"), progress=False)
    shutil.rmtree(paths.runs() / config.name)
    record = run_or_load(config, records=paths.results("gpu", "runs"), progress=False)
    assert record.path is None
    assert measure(record, how(), scale="gpu")["seed"] == 12
    (paths.runs() / config.name / "model.safetensors").unlink()
    assert measure(record, how(layers=3), scale="gpu")["seed"] == 12


def test_a_model_is_read_once_for_all_that_ask_and_gone_afterwards(tiny_config, monkeypatch):
    result, read = run_or_load(tiny_config(steps=2, seed=11), progress=False), []
    load, given = training_result.load_model, []
    monkeypatch.setattr(training_result, "load_model", lambda path: (read.append(path), load(path))[1])
    with trained_model(result) as model:
        assert not read  # nobody has asked yet
        for layers in (21, 22):
            measure(
                result, how(layers=layers), scale="gpu", model=lambda: (given.append(weakref.ref(model())), model())[1]
            )
        measure(result, how(layers=22), scale="gpu", model=model)  # which is there
    assert read == [result.path] and given[0]() is None and len(given) == 2
    measure(result, how(layers=23), scale="gpu")
    assert len(read) == 2


def test_nothing_of_a_training_or_of_a_measurement_is_in_the_way_of_the_next(tiny_config, monkeypatch):
    """They are as large as the model, and a GPU may hold few; their parts point at each other."""
    left = []

    class Part:
        def __init__(self):
            self.itself = self
            left.append(weakref.ref(self))

    def seen(work):
        def work_and_leave(*args, **keys):
            there.append(sum(part() is not None for part in left))
            Part()
            return work(*args, **keys)

        return work_and_leave

    result, there = run_or_load(tiny_config(steps=2, seed=11), progress=False), []
    monkeypatch.setattr("ecmoe.training.run.run_or_load", seen(run_or_load))
    monkeypatch.setattr(training_result, "load_model", seen(training_result.load_model))
    monkeypatch.setattr(f"{__name__}.weights", seen(lambda model, config, **keys: {}))
    gc.disable()  # else it comes by chance
    try:
        with trained_model(result) as model:
            for layers in (31, 32):
                measure(result, how(layers=layers), scale="gpu", model=model)
    finally:
        gc.enable()
    assert there == [0, 0, 1, 0]  # before training, loading (which is part of measuring), the first and the second


def test_a_training_that_fails_is_not_tried_again_by_the_next_measurement(tiny_config, monkeypatch):
    """It may take hours, and a model may have eleven measurements."""
    tried, config = [], tiny_config(steps=2, seed=11)

    def fails(config, **keys):
        tried.append(keys)
        raise RuntimeError("no memory")

    monkeypatch.setattr("ecmoe.training.run.run_or_load", fails)
    finished = Result(not_run(config).summary | {"status": "finished"})
    with trained_model(finished) as model:
        for layers in (41, 42):
            with pytest.raises(RuntimeError, match="no memory"):
                measure(finished, how(layers=layers), scale="gpu", model=model)
    assert tried == [{"weights": True}]
    with pytest.raises(RuntimeError, match="no memory"):  # another call may find more memory
        measure(finished, how(layers=41), scale="gpu")
    assert len(tried) == 2


@pytest.mark.parametrize("change", ["a bit", "cut", "another run", "another measure", "other keys"])
def test_a_damaged_file_is_named(tiny_config, change):
    result = run_or_load(tiny_config(steps=2, seed=11), progress=False)
    one = how(layers={"a bit": 4, "cut": 5, "another run": 6, "another measure": 8, "other keys": 9}[change])
    found = measure(result, one, scale="gpu", keep=True)
    path = paths.results("gpu", "measures") / result.summary["name"] / f"{one.name}.json"
    text = path.read_text()
    if change == "a bit":
        path.write_text(text.replace(str(found["numbers"][0]), str(found["numbers"][0] ^ 1)))
    elif change == "cut":
        path.write_text(text[:-20])
    else:
        other = {"another run": {"run": "another"}, "another measure": {"what": "caps"}}.get(
            change, {"keys": {"layers": 3}}
        )
        write_json(path, read_json(path, sealed=True) | other, sealed=True)
    held = "'weights' of another|'caps' of|'weights' of .*, taken with {'layers': 3}"
    with pytest.raises(Damaged, match=f"{path.name}.*(check sum|Unterminated|holds ({held}))"):
        measure(result, one, scale="gpu", train=False)


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_the_model_lies_on_a_gpu_of_its_own_where_there_is_one(tiny_config, monkeypatch, kind):
    held = []

    @contextmanager
    def place(say):
        held.append(("a place", say))
        yield
        held.append("given back")

    @contextmanager
    def locked(name):
        held.append(name)
        yield
        held.append("free")

    def compute(model, config, **keys):
        held.append("computed")
        return {}

    result = run_or_load(tiny_config(steps=2, seed=11), progress=False)
    monkeypatch.setattr(gpus, "place", place)
    monkeypatch.setattr("ecmoe.measures.lock", locked)
    monkeypatch.setattr(f"{__name__}.weights", compute)
    monkeypatch.setattr("torch.cuda.is_available", lambda: kind == "cuda")
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "a GPU")
    monkeypatch.setattr("torch.set_float32_matmul_precision", held.append)
    monkeypatch.setattr(training_result, "load_model", lambda path: SimpleNamespace(to=held.append))
    monkeypatch.setattr("ecmoe.training.run.free_memory", lambda: held.append("freed"))
    monkeypatch.setattr(
        "ecmoe.training.run.run_or_load", lambda config, weights: (held.append((config, weights)), result)[1]
    )
    measure(result, how(layers={"cuda": 7, "cpu": 17}[kind]), scale="gpu")
    name = result.summary["name"]
    run = tiny_config(steps=2, seed=11), True  # with its weights
    used = [("a place", False), *["high"] * (kind == "cuda"), kind, "computed", "freed", "given back"]
    assert held == [name, "freed", run, "freed", *used, "free"]  # what is done leaves no room taken


def test_what_reports_hold_comes_before_what_was_found_by_hand(tiny_config):
    result = run_or_load(tiny_config(steps=2, seed=11), progress=False)
    one = how(layers=10)
    measure(result, one, scale="gpu")
    by_hand = result.path / "measures" / f"{one.name}.json"
    kept = read_json(by_hand, sealed=True) | {"found": {"seed": "reports"}}
    write_json(paths.results("gpu", "measures") / result.summary["name"] / by_hand.name, kept, sealed=True)
    assert (
        measure(result, one, scale="gpu") == {"seed": "reports"} and measure(result, one, scale="smoke")["seed"] == 11
    )


def test_a_run_that_is_missing_has_none(tiny_config):
    assert measure(not_run(tiny_config(seed=13)), how(), scale="gpu") is None


def test_other_task_files_are_another_measurement(tmp_path):
    names = []
    for folder, text in (("a", "{}"), ("b", "{}"), ("b", "{} ")):
        (tmp_path / folder / "rte").mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / "rte" / "train.jsonl").write_text(text)
        (one,) = measurements("fine-tuned", {"task": ["rte"], "folder": str(tmp_path / folder)})
        names.append(one.name)
    assert names[0] == names[1] != names[2]


def test_names_say_what_and_for_what_and_hold_nothing_else():
    one, other = measurements("accuracy-at", {"places": [0.1, 2.0]})
    assert (one.name, other.name) == ("accuracy-at-0-1", "accuracy-at-2-0")
    (tuned,) = measurements("fine-tuned", {"task": ["rte"], "steps": 10, "folder": "a"})
    (moved,) = measurements("fine-tuned", {"task": ["rte"], "folder": "b", "steps": 10})
    (longer,) = measurements("fine-tuned", {"task": ["rte"], "steps": 11})
    assert tuned.name == moved.name != longer.name and tuned.name.startswith("fine-tuned-rte-")
    (evil,) = measurements("fine-tuned", {"task": ["../$(x)"]})
    (capital,) = measurements("fine-tuned", {"task": ["SST_2"]})
    assert evil.name == "fine-tuned--x-" and capital.name == "fine-tuned-sst-2"
    assert list(measurements("losses", {"pools": [4]})) == [Measurement("losses", {"pools": [4]})]
    assert other == Measurement("accuracy-at", {"places": 2.0}) and tuned.keys["folder"] == "a"
    (nowhere,) = measurements("fine-tuned", {"task": ["rte"], "steps": 10, "folder": None})
    assert nowhere.name == tuned.name and len(tuned.name) == len("fine-tuned-rte-") + 8
    assert len({Measurement("dependence", keys).name for keys in ({}, {"kept": 0}, {"kept": 1})}) == 3
    assert not measures.MEASURES["caps"].keys and Measurement("caps", {}).name == "caps"


@pytest.mark.parametrize(
    ("what", "keys", "said"),
    [
        ("dependance", {}, "measurement 'dependance': did you mean dependence?"),
        ("losses", {"pool": [4]}, "has no key 'pool': did you mean pools?"),
        ("accuracy-at", {"places": 0.1}, "places=0.1 must be a list"),
        ("accuracy-at", {"places": []}, "places=[] must be a list"),
        ("fine-tuned", {"steps": 3}, "task=None must be a list"),
    ],
)
def test_what_cannot_be_asked_for_is_named(what, keys, said):
    with pytest.raises(ConfigError) as error:
        list(measurements(what, keys))
    assert said in str(error.value)


def test_every_row_names_a_function_with_these_keys():
    import inspect
    from importlib import import_module

    for what, row in measures.MEASURES.items():
        module, _, name = row.compute.partition(":")
        model, config, *keys = inspect.signature(getattr(import_module(module), name)).parameters
        assert (model, config, tuple(keys)) == ("model", "config", tuple(row.keys)), what
        assert set(row.where) | {row.each} <= {*row.keys, None}


SETTINGS = {  # measurement -> what it takes and what it refuses, by key
    "count": ("dependence: kept; next-token: batches classes; decoding: tokens; fine-tuned: steps batch_size examples",
              [1, 7], [0, 1.5, "3", True]),
    "above 0": ("fine-tuned: learning_rate; accuracy-at: places", [0.5, 2], [0.0, float("inf"), float("nan"), "1"]),
    "name": ("fine-tuned: task folder", ["cb"], [3]),
    "pools": ("losses: pools", [[4, "batch"]], [[0], [1.5], 4]),
    "nothing": ("fine-tuned: folder examples", [None], []),
    "something": ("fine-tuned: task steps batch_size learning_rate", [], [None]),
}  # fmt: skip


@pytest.mark.parametrize(("keys", "taken", "refused"), SETTINGS.values(), ids=SETTINGS)
def test_a_setting_is_what_it_may_be(keys, taken, refused):
    for what, names in (one.split(": ") for one in keys.split("; ")):
        for kind in (measures.MEASURES[what].keys[name] for name in names.split()):
            assert [held_to(kind, value, what) for value in taken] == taken
            for value in refused:
                with pytest.raises(ConfigError):
                    held_to(kind, value, what)


def test_a_row_leads_to_the_measurement_that_its_name_says(tiny_config):
    """The two without keys; that no other is another's, its keys tell (see above)."""
    result = run_or_load(tiny_config(steps=2, seed=11), progress=False)
    model = result.load_model()
    tokens, caps = (
        measure(result, Measurement(what, {}), scale="gpu", model=lambda: model)
        for what in ("experts-by-token", "caps")
    )
    assert len("".join(tokens["text"])) == len(tokens["counts"][0]) == 16 and not {"rows"} & set(tokens)
    assert {(row["cap"], row["solver"]) for row in caps["rows"]} == {
        (b, s) for b in (2, 3) for s in ("feasible", "dykstra")
    }


def test_a_process_may_hold_the_lock_of_a_run_twice(tmp_path, monkeypatch):
    monkeypatch.setenv("ECMOE_HOME", str(tmp_path / "new"))  # where nothing was run
    with lock("a-run") as held, lock("a-run").acquire(timeout=1):
        assert Path(held.lock_file) == paths.runs() / "a-run.measures.lock"
