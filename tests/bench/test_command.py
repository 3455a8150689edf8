"""`ecmoe bench`: what it takes, refuses, prints and keeps, part by part."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from ecmoe import paths
from ecmoe.bench.step import ARMS
from ecmoe.cli import app
from ecmoe.study import speed
from tests.bench.test_step import STEP


def options(keys):
    return [word for key, value in keys.items() for word in ("--set", f"{key}={value}")]


def test_an_error_of_another_kind_is_shown_as_it_is(monkeypatch):
    monkeypatch.setattr(speed, "job", lambda *_, **__: lambda: (_ for _ in ()).throw(RuntimeError("something else")))
    assert CliRunner().invoke(app, ["bench", "layer"]).exception.args == ("something else",)


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
        ["layer", "--set", "name=auto"],
    ],
)
def test_no_option_is_silently_ignored(command):
    refused = CliRunner().invoke(app, ["bench", *command])
    assert refused.exit_code == 2 and isinstance(refused.exception, SystemExit)
    if "--set" in command:
        assert command[-1].partition("=")[0] in refused.stderr and refused.stderr.count("\n") == 1


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


def test_a_table_is_printed_without_samples_empty_columns_and_words_for_gaps(monkeypatch):
    rows = [{"arm": "a", "ms": 1.23456, "mfu": None, "peak_mb": None, "samples_ms": [1.0]}, {"arm": "b", "mfu": 0.5}]
    table = pd.DataFrame(rows)
    table.attrs |= {"setting": {"n": 4, "device": "a card"}, "absent": ["c (no memory)"]}
    monkeypatch.setattr(speed, "job", lambda name, **_: lambda: table)
    shown = CliRunner().invoke(app, ["bench", "layer"])
    setting, *lines = shown.stdout.splitlines()
    assert setting == "n=4 device=a card" and [line.split() for line in lines] == [
        ["arm", "ms", "mfu"], ["a", "1.235"], ["b", "0.5"], [],
        ["not", "measured", "(not", "installed,", "or", "not", "possible", "here):"], ["c", "(no", "memory)"],
    ]  # fmt: skip


def test_a_table_that_cannot_be_kept_is_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "job", lambda name, **_: fake)
    shown = CliRunner().invoke(app, ["bench", "layer", "--json", str(tmp_path)])
    assert shown.exit_code == 2 and str(tmp_path) in shown.stderr and "\n" in shown.stdout.strip()


def test_a_fraction_of_a_token_is_named_before_anything_is_timed():
    shown = CliRunner().invoke(app, ["bench", "layer", *options({"n": 33, "num_experts": 4})])
    assert shown.exit_code == 2 and "n=33" in shown.stderr


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
    assert shown.exit_code == 0 and shown.stdout.count("exists already") == 2
    assert "growth: exists already (--force measures it again)" in shown.stdout
    monkeypatch.setenv("ECMOE_HOME", str(tmp_path / "home"))
    assert CliRunner().invoke(app, [*command[:4], "--only", "growth"]).exit_code == 0
    assert [path.name for path in paths.results("smoke", "bench").iterdir()] == ["growth.json"]
    monkeypatch.setattr(speed, "jobs", lambda **_: {"step": fake, "step-times": fake})
    for only, parts in (("step", "step"), ("ste", "step, step-times"), (",", "step, step-times")):
        shown = CliRunner().invoke(app, [*command, "--only", only])  # a whole name is no beginning of another
        assert shown.stdout.startswith(f"{parts} -> {tmp_path}\n")
    monkeypatch.setattr(speed, "jobs", lambda **_: dict.fromkeys(("layer-a", "step", "growth"), fake))
    refused = CliRunner().invoke(app, [*command, "--only", "stepp"])
    assert refused.exit_code == 2 and "layer-a, step, growth" in refused.stderr


@pytest.mark.parametrize("command", ["all", "scaling"])
@pytest.mark.parametrize(
    ("scale", "said"), [("gpu", "gpu: its timings need a GPU"), ("gpuu", "must be one of gpu, paper")]
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


def test_measuring_needs_no_jupyter():
    """The machine that measures has torch, and neither notebooks nor what makes pages."""
    code = "import sys, ecmoe.cli, ecmoe.study.speed, ecmoe.study.engine, ecmoe.study.plan; print([m for m in ('IPython', 'papermill', 'nbformat', 'jupyter_client', 'datasets') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
