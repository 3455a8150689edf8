"""Scaling: rates of short runs, against as many times one device's."""

import json
from types import SimpleNamespace

import pandas as pd
import pytest
from typer.testing import CliRunner

from ecmoe.bench import scaling
from ecmoe.cli import app
from ecmoe.study import speed


def test_one_device_is_timed_by_a_short_run_and_what_cannot_be_is_named(tiny_config, monkeypatch):
    monkeypatch.setattr(scaling, "EVERY", 2)
    base = tiny_config().to_dict()
    first, table = scaling.bench_scaling(base, [1, 2], ["nobody's"], repeats=2)
    assert len(first) == 1 and not first.attrs["absent"]
    (row,) = table.to_dict("records")
    assert (row["strategy"], row["devices"], row["of_ideal"]) == ("auto", 1, 1.0)
    rate = tiny_config().tokens_per_batch / (row["ms"] / 1e3)
    assert row["low_ms"] <= row["ms"] <= row["high_ms"] and row["tokens_per_second"] == pytest.approx(rate, rel=0.5)
    (absent,) = table.attrs["absent"]
    assert absent.startswith("nobody's on 2 (ConfigError: ") and table.attrs["setting"]["d_model"] == base["d_model"]


def test_twice_the_devices_are_held_to_twice_the_tokens_a_second(tiny_config, tmp_path, monkeypatch):
    speeds = {("auto", 1): 100.0, ("ddp", 2): 180.0, ("fsdp2", 2): 150.0}

    def trained(config):
        rates = pd.DataFrame({"tokens_per_second": [1.0] + [speeds[config.strategy, config.devices]] * 3})
        return SimpleNamespace(curve=rates, summary={"peak_mb": 5.0})

    monkeypatch.setattr(scaling, "_trained", trained)
    base = {"base": tiny_config().to_dict(), "strategies": ["ddp", "fsdp2"]}
    monkeypatch.setattr(speed, "scaling", lambda scale: base)
    called = ["bench", "scaling", "--scale", "smoke", "--devices", "1", "--devices", "2", "--out", str(tmp_path)]
    shown = CliRunner().invoke(app, called)
    assert shown.exit_code == 0, shown.output
    rows = json.loads((tmp_path / "scaling.json").read_text())["rows"]
    assert [(row["strategy"], row["of_ideal"]) for row in rows] == [("auto", 1.0), ("ddp", 0.9), ("fsdp2", 0.75)]


def test_every_scale_says_what_is_trained():
    at_gpu = speed.scaling("gpu")
    assert at_gpu["base"]["d_model"] == 768 and at_gpu["base"]["vocab_size"] == 16384 and at_gpu["devices"] == [1, 2]
    assert speed.scaling("smoke")["base"]["data"] == "stdlib"


def test_what_was_timed_is_kept_at_once(tiny_config, tmp_path, monkeypatch):
    def table_then_killed(base, repeats):
        yield scaling.timing.tabled([{"strategy": "auto", "ms": 3.0}], [], {"repeats": repeats})
        raise KeyboardInterrupt

    monkeypatch.setattr(scaling, "bench_scaling", table_then_killed)
    monkeypatch.setattr(speed, "scaling", lambda scale: {"base": tiny_config().to_dict()})
    CliRunner().invoke(app, ["bench", "scaling", "--scale", "smoke", "--repeats", "3", "--out", str(tmp_path)])
    kept = json.loads((tmp_path / "scaling.json").read_text())
    assert kept["rows"] == [{"strategy": "auto", "ms": 3.0}] and kept["setting"]["repeats"] == 3
