"""Results: storage keeps what was measured."""

import hashlib
import math

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from ecmoe.config import SCHEMA, ConfigError, RunConfig
from ecmoe.files import Damaged, read_json, write_json
from ecmoe.model import metrics
from ecmoe.model.build import build_model
from ecmoe.training import result as results
from ecmoe.training.continuation import continue_text
from ecmoe.training.result import Result


def make(config: RunConfig, loss: float = 2.0, status: str = "finished", rows: int = 3) -> Result:
    curve = pd.DataFrame({"step": np.arange(1.0, rows + 1), "val_loss": np.linspace(loss + 1, loss, rows)})
    summary = {
        "config": config.to_dict(),
        "name": config.name,
        "seed": config.seed,
        "schema": SCHEMA,
        "status": status,
    }
    summary |= {
        "error": None,
        "val_loss": loss,
        "steps": rows,
        "routing": {"dropped": 0.25, "share_1": 0.5},
    }
    return Result(summary, curve.reindex(columns=metrics.curve()))


@pytest.mark.parametrize("status", ["finished", "diverged", "failed", "stopped", "not run"])
def test_however_a_run_ended_it_is_read_as_it_was_written(status, tmp_path):
    results.write_run(tmp_path, make(RunConfig(), status=status).summary)
    assert results.read_run(tmp_path).summary["status"] == status


def test_a_run_survives_the_disk(tmp_path):
    result = make(RunConfig(seed=3))
    result.curve.to_csv(tmp_path / "curve.csv", index=False)
    with pytest.raises(FileNotFoundError):
        results.read_run(str(tmp_path))  # not done
    summary = result.summary | {
        "mfu": math.nan,
        "numpy": np.float32(0.5),
        "nested": {"x": [np.int64(1), math.inf]},
    }
    results.write_run(tmp_path, summary)
    again = results.read_run(str(tmp_path))
    assert again.ok and again.path == tmp_path
    assert (
        again.summary["mfu"] is None and again.summary["numpy"] == 0.5 and again.summary["nested"] == {"x": [1, None]}
    )
    pd.testing.assert_frame_equal(again.curve, result.curve.astype(float))
    result.curve[["val_loss", "step"]].assign(of_tomorrow=1).to_csv(tmp_path / "curve.csv", index=False)
    results.write_run(tmp_path, summary)  # of a version that measured other things
    pd.testing.assert_frame_equal(results.read_run(tmp_path).curve, result.curve.astype(float))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["curve.csv", "summary.json"]


def test_a_summary_vouches_for_the_three_files_of_a_run(tmp_path):
    names = ("config.yaml", "curve.csv", "model.safetensors")
    for name in (*names, "last.ckpt"):
        (tmp_path / name).write_text(name)
    results.write_run(tmp_path, make(RunConfig()).summary)
    said = read_json(tmp_path / "summary.json", sealed=True)["files"]
    assert said == {name: hashlib.sha256(name.encode()).hexdigest() for name in names}


def test_a_file_that_was_made_again_is_taken_once_its_run_has_finished(tmp_path):
    again = tmp_path / "again"
    again.mkdir()
    (again / "curve.csv").touch()
    for status, place in (("diverged", tmp_path), ("finished", again)):
        results.write_run(again, make(RunConfig(), status=status).summary)
        assert results.place_of(tmp_path, "curve.csv") == place / "curve.csv"
        assert results.place_of(tmp_path, "config.yaml") == tmp_path / "config.yaml"  # which isn't there


def test_a_file_that_is_missing_and_one_that_differs_are_told_apart(tmp_path):
    for name in ("config.yaml", "curve.csv", "model.safetensors"):
        (tmp_path / name).write_text("a")
        results.write_run(tmp_path, make(RunConfig()).summary)
        results.read_run(tmp_path, verified=[name])
        (tmp_path / name).write_text("b")
        with pytest.raises(Damaged, match=rf"{name} is damaged \(its SHA-256 differs\)"):
            results.read_run(tmp_path, verified=[name])
        (tmp_path / name).unlink()
        with pytest.raises(Damaged, match=rf"{name} is damaged \(it is missing\)"):
            results.read_run(tmp_path, verified=[name])
        results.write_run(tmp_path, make(RunConfig()).summary)  # which says nothing of it
        results.read_run(tmp_path, verified=[name])


def test_a_run_says_in_a_line_how_it_ended():
    config = RunConfig(seed=3)
    missing = results.not_run(config)
    assert (
        repr(missing) == f"<{config.name}: not run>"
        and repr(make(config)) == f"<{config.name}: finished, val_loss 2.0000>"
    )
    assert list(missing.curve.columns) == metrics.curve() and set(missing.curve.dtypes) == {np.dtype(float)}


def record_of(result, folder):
    path = folder / f"{result.summary['name']}.json"
    results.write_record(path, result)
    return path


def test_a_record_is_thinned_and_keeps_both_ends(tmp_path):
    result = make(RunConfig(), rows=1000)
    path = record_of(result, tmp_path)
    again = results.read_record(str(path))
    assert len(again.curve) == 300
    assert again.curve["step"].iloc[[0, -1]].tolist() == [1.0, 1000.0]
    assert again.curve["step"].is_monotonic_increasing and again.curve["step"].is_unique
    assert again.curve["val_loss"].iloc[-1] == pytest.approx(2.0)
    assert again.curve["dropped"].isna().all()  # not measured stays not measured
    assert set(again.curve.dtypes) == {np.dtype(float)}
    written = path.read_text()
    assert "NaN" not in written and len(written.splitlines()) == 1
    assert again.curve["val_loss"][1] == float(f"{result.curve['val_loss'][3]:.7g}") != result.curve["val_loss"][3]
    other = make(RunConfig(seed=3), rows=299)
    few = Result(other.summary, other.curve[["val_loss", "step"]])  # of a version that measured less
    assert results.read_record(record_of(few, tmp_path)).curve["step"].tolist() == list(range(1, 300))


def test_every_flipped_bit_of_a_record_is_found(tmp_path):
    path = record_of(make(RunConfig()), tmp_path)
    good = path.read_bytes()
    rng = np.random.default_rng(0)
    for at, bit in zip(rng.integers(len(good), size=60), rng.integers(8, size=60), strict=True):
        path.write_bytes(good[:at] + bytes([good[at] ^ (1 << bit)]) + good[at + 1 :])
        with pytest.raises(ConfigError, match=f"{path.name} is damaged .* delete it"):
            results.read_record(path)
            raise AssertionError(f"bit {bit} of byte {at} was believed: {path.read_bytes()[at - 20 : at + 20]}")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"status": "great"}, "its status is 'great'"),
        ({"schema": 99}, f"schema 99, but this version has {SCHEMA}"),
        ({"name": "../../elsewhere"}, "its name is '../../elsewhere'"),
        *(({key: None}, f"has no {key}") for key in ("config", "name", "seed", "schema", "status")),
    ],
)
def test_a_record_that_no_run_writes_is_not_believed(tmp_path, changes, named):
    """Whoever wrote it sealed it, too."""
    summary = {
        key: value
        for key, value in (make(RunConfig()).summary | changes).items()
        if value is not None or key == "error"
    }
    write_json(tmp_path / "a.json", {"summary": summary, "curve": {}}, sealed=True)
    with pytest.raises(ConfigError, match=f"a.json is damaged .*{named}") as error:
        results.read_record(tmp_path / "a.json")
    assert str(error.value).count("is damaged") == 1
    for why, broken in {
        "it has no summary": {},
        "it has no curve": {"summary": {}},
        "its curve is no table": {"summary": {}, "curve": 3},
        "of numbers: int too large": {"summary": {}, "curve": {"val_loss": [10**400]}},
        "its summary is no mapping": {"summary": [], "curve": {}},
        "it has no config": {"summary": {}, "curve": {}},
    }.items():
        write_json(tmp_path / "a.json", broken, sealed=True)
        with pytest.raises(ConfigError, match=rf"a\.json is damaged .*{why}") as error:
            results.read_record(tmp_path / "a.json")
        assert str(error.value).count("is damaged") == 1


def test_a_record_of_another_run_is_not_believed(tmp_path):
    ours, theirs = (make(RunConfig(seed=seed)) for seed in (0, 1))
    path = record_of(ours, tmp_path)
    record_of(theirs, tmp_path).replace(path)
    with pytest.raises(ConfigError, match=f"{path.name} is damaged .it holds the run {theirs.summary['name']}"):
        results.read_record(path)


def test_a_changed_loss_is_not_believed(tmp_path):
    results.write_record(tmp_path / "a.json", make(RunConfig()))
    record = read_json(tmp_path / "a.json")
    record["summary"]["val_loss"] = -1.0
    write_json(tmp_path / "a.json", record)
    with pytest.raises(ConfigError, match="its check sum doesn't match"):
        results.read_record(tmp_path / "a.json")


def test_a_model_is_loaded_to_be_used_with_its_table_and_for_any_length(tmp_path, tiny_config):
    for router in ("hash", "expert_choice"):
        config = tiny_config(router=router, hash_table="balanced", capacity_factor=1.0)
        saved = build_model(config, torch.arange(256) ** 2)
        save_file(saved.state_dict(), tmp_path / "model.safetensors")
        summary = make(config).summary
        results.write_run(tmp_path, summary | {"config": summary["config"] | {"kernels": "triton"}})  # by a GPU
        model = results.load_model(str(tmp_path))
        assert Result(make(config).summary, path=tmp_path).load_model().config == config  # wherever it lies
        assert not model.training and model(torch.zeros(1, 5, dtype=torch.long)).shape == (1, 5, 256)
        assert all(torch.equal(model.state_dict()[name], value) for name, value in saved.state_dict().items())


@pytest.mark.parametrize(("data", "dtype"), [("stdlib", torch.float64), ("digits", torch.float64), ("stdlib", torch.bfloat16)])  # fmt: skip
def test_a_model_has_the_dtype_of_its_file(tmp_path, tiny_config, data, dtype):
    config = tiny_config(data=data, sequence_length=16)
    saved = build_model(config).to(dtype)
    for parameter in saved.parameters():
        parameter.data.add_(torch.rand(parameter.shape, dtype=torch.float64))  # float32 doesn't hold these
    save_file(saved.state_dict(), tmp_path / "model.safetensors")
    results.write_run(tmp_path, make(config).summary)
    model = results.load_model(tmp_path)
    for name, value in saved.state_dict().items():
        assert model.state_dict()[name].dtype == value.dtype and torch.equal(model.state_dict()[name], value)
    given = torch.rand(4, 1, 8, 8) if config.images else torch.randint(256, (4, 16))
    assert model(given).dtype == dtype and all(p.requires_grad for p in model.parameters())


def test_weights_that_are_not_here_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("ECMOE_HOME", str(tmp_path))
    of_run = make(config := RunConfig(seed=5)).load_model
    home = tmp_path / "runs" / config.name
    for place, ask, status in (
        (home, of_run, "there is no such folder"), (tmp_path, lambda: continue_text(tmp_path, "A", 2), "not finished"),
    ):  # fmt: skip
        told = rf"no weights in {place} \(status: {status}\): only finished runs .*, and records have none"
        with pytest.raises(FileNotFoundError, match=told):
            ask()
    results.write_run(tmp_path, make(config).summary | {"status": "failed", "error": "ConfigError: no such text"})
    with pytest.raises(FileNotFoundError, match=r"\(status: failed: ConfigError: no such text\): only finished"):
        continue_text(tmp_path, "A", 2)


def test_a_run_is_found_by_path_name_or_beginning(tmp_path, monkeypatch):
    monkeypatch.setenv("ECMOE_HOME", str(tmp_path))
    for name in ("dense-s0-1", "dense-s0-12", "hash-s1-3"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    runs = tmp_path / "runs"
    (runs / "hash-s1-3.lock").touch()
    assert (
        results.find_run(runs / "hash-s1-3")
        == results.find_run("hash-s1-3")
        == results.find_run("h")
        == runs / "hash-s1-3"
    )
    assert results.find_run("dense-s0-1") == runs / "dense-s0-1"  # a whole name, though another begins so
    with pytest.raises(FileNotFoundError, match="'dense' matches 2 runs: dense-s0-1, dense-s0-12"):
        results.find_run("dense")
    (runs / "dense-s0-12" / "model.safetensors").touch()  # the other failed, or has just begun
    assert results.find_run("dense") == runs / "dense-s0-12" and results.find_run("dense-s0-1") == runs / "dense-s0-1"
    (runs / "dense-s0-1" / "model.safetensors").touch()
    with pytest.raises(FileNotFoundError, match="'dense' matches 2 runs"):
        results.find_run("dense")
    for number in range(6):
        (tmp_path / "runs" / f"top-{number}").mkdir()
    with pytest.raises(FileNotFoundError, match="'top' matches 6 runs: top-0, top-1, top-2, top-3, top-4; give"):
        results.find_run("top")
    for wrong in ("kmeans", "", "s1-3"):
        with pytest.raises(FileNotFoundError, match=f"{wrong!r} matches no run; give a folder of {runs}, or"):
            results.find_run(wrong)
