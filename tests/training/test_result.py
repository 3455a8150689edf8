"""Results: storage keeps what was measured."""

import json
import math

import numpy as np
import pandas as pd
import pytest

from ecmoe.config import ConfigError, RunConfig
from ecmoe.training import result as results
from ecmoe.training.result import Result


def make(config: RunConfig, loss: float = 2.0, status: str = "finished", rows: int = 3) -> Result:
    curve = pd.DataFrame({"step": np.arange(1.0, rows + 1), "val_loss": np.linspace(loss + 1, loss, rows)})
    summary = {
        "config": config.to_dict(),
        "name": config.name,
        "seed": config.seed,
        "status": status,
    }
    summary |= {
        "error": None,
        "val_loss": loss,
        "steps": rows,
        "routing": {"dropped": 0.25, "share_1": 0.5},
    }
    return Result(summary, curve.reindex(columns=results.COLUMNS))


def test_a_run_survives_the_disk(tmp_path):
    result = make(RunConfig(seed=3))
    result.curve.to_csv(tmp_path / "curve.csv", index=False)
    with pytest.raises(FileNotFoundError):
        results.read_run(tmp_path)  # not done
    summary = result.summary | {
        "mfu": math.nan,
        "numpy": np.float32(0.5),
        "nested": {"x": [np.int64(1), math.inf]},
    }
    results.write_summary(tmp_path, summary)
    again = results.read_run(tmp_path)
    assert again.ok and again.path == tmp_path
    assert (
        again.summary["mfu"] is None and again.summary["numpy"] == 0.5 and again.summary["nested"] == {"x": [1, None]}
    )
    pd.testing.assert_frame_equal(again.curve, result.curve.astype(float))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["curve.csv", "summary.json"]


def test_a_record_is_thinned_and_keeps_both_ends(tmp_path):
    result = make(RunConfig(), rows=1000)
    results.write_record(tmp_path / "a.json", result)
    again = results.read_record(tmp_path / "a.json")
    assert len(again.curve) == results.CURVE_POINTS
    assert again.curve["step"].iloc[[0, -1]].tolist() == [1.0, 1000.0]
    assert again.curve["step"].is_monotonic_increasing and again.curve["step"].is_unique
    assert again.curve["val_loss"].iloc[-1] == pytest.approx(2.0)
    assert again.curve["dropped"].isna().all()  # not measured stays not measured
    assert "NaN" not in (tmp_path / "a.json").read_text()
    assert [r.summary["name"] for r in results.load_records(tmp_path)] == [result.summary["name"]]
    assert results.load_records(tmp_path / "absent") == []


def test_damage_is_named(tmp_path):
    (tmp_path / "a.json").write_text('{"summary": ')
    (tmp_path / "cut.json").write_bytes('{"summary": "ü'.encode()[:-1])
    for name in ("a", "cut"):
        with pytest.raises(ConfigError, match=rf"{name}\.json is damaged .* delete it"):
            results.read_record(tmp_path / f"{name}.json")
    (tmp_path / "b.json").write_text(json.dumps({"summary": {}}))
    with pytest.raises(ValueError, match=r"b\.json is no record"):
        results.read_record(tmp_path / "b.json")


def test_weights_that_are_not_here_are_named(tmp_path, monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.setenv("ECMOE_HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="record holds none"):
        make(RunConfig()).load_model()
