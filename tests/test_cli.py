"""The command line: quick help, errors in one line, a run as text and as JSON."""

import dataclasses
import json
import subprocess
import sys
import time

import pytest
import yaml
from typer.testing import CliRunner

import ecmoe
from ecmoe.cli import app
from ecmoe.config import RunConfig

CHECK_LIGHT = """
import sys, ecmoe.cli
heavy = {"torch", "lightning", "pandas", "papermill", "nbconvert"} & set(sys.modules)
sys.exit(f"imported too early: {heavy}" if heavy else 0)
"""


def call(*arguments: str):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_help_is_quick_and_names_the_commands():
    began = time.time()
    shown = subprocess.run([sys.executable, "-m", "ecmoe", "--help"], capture_output=True, text=True, check=True)
    assert time.time() - began < 10  # 0.3 s on an idle machine; with torch it would be many
    assert all(command in shown.stdout for command in ("train", "generate", "bench", "report", "index", "keys"))
    subprocess.run([sys.executable, "-c", CHECK_LIGHT], check=True)


def test_alone_it_helps():
    for group, command in (([], "train"), (["bench"], "profile")):
        assert "Usage: " in (shown := call(*group).output) and command in shown


def test_version():
    assert call("--version").output.strip() == ecmoe.__version__


def test_keys_lists_every_key_with_help():
    lines = call("keys").output.splitlines()
    assert [line.split()[0] for line in lines] == [field.name for field in dataclasses.fields(RunConfig)]
    assert all(len(line.split()) > 2 for line in lines)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (
            ["runs", "--arm", "Hash modula", "--check"],
            "--arm Hash modula: no arm of the plan begins so: did you mean Hash",
        ),
        (["bench", "scaling", "--strategy", "dpp"], "--strategy dpp: did you mean ddp?"),
        (["bench", "scaling", "--only", "training,loses"], "--only loses: did you mean losses?"),
        (["report", "notebooks/00_routing.ipynb", "notebooks"], "notebooks is a folder: name the page in it"),
        (["runs", "--part", "3/2"], "--part 3/2: must be I/N"),
        (["train", "--set", "step=3"], "did you mean steps"),
        (["train", "--set", "learning_rate=1e-3"], "write 1.0e-3"),
        (["train", "--set", "steps"], "key=value"),
        (["train", "--set", "=3"], "key=value"),
        (["train", "--set", "steps=[1"], "YAML"),
        (["train", "absent.yaml"], "absent.yaml"),
        (["train", "--set", "data=absent/text.txt"], "absent/text.txt"),
        (["train", "--set", "data=/"], "data='/'"),
        (["train", "--set", "pool=0"], "pool=0: must be at least 1"),
        (["train", "--set", "beta2=1"], "must be below 1"),
        (["train", "--set", "num_nodes=2"], "num_nodes=2: start torchrun"),
        (["train", "--set", f"seed={10**23}"], "must be at most 9223372036854775807"),
        (["train", "--set", "seed=2024-13-45"], "is no YAML value"),
    ],
)
def test_what_is_wrong_is_one_line_and_code_2(arguments, named):
    result = call(*arguments)
    assert result.exit_code == 2
    assert named in result.stderr and len(result.stderr.strip().splitlines()) == 1
    assert result.stderr.startswith("error: ") and "Traceback" not in result.stderr


def test_train_prints_the_run(tiny_config, tmp_path):
    config = tiny_config(seed=90, steps=2, eval_every=2)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config.to_dict() | {"seed": 1}))
    shown = call("train", path, "--set", "seed=90", "--json")
    assert shown.exit_code == 0, shown.output
    summary = json.loads(shown.stdout)
    assert summary["config"] == config.to_dict() and summary["status"] == "finished"
    assert summary["mfu"] is None  # unknown on a CPU: JSON has no NaN
    again = call("train", path, "--set", "seed=90")
    assert again.exit_code == 0 and f"{summary['val_loss']:.6g}" in again.stdout and config.name in again.stdout


def test_a_damaged_run_is_named(tiny_config, tmp_path, monkeypatch):
    from ecmoe import run_or_load

    monkeypatch.setenv("ECMOE_HOME", str(tmp_path))
    run = run_or_load(tiny_config(steps=2, eval_every=2), progress=False).path
    weights, summary = run / "model.safetensors", run / "summary.json"
    weights.write_bytes(weights.read_bytes()[:-100])
    wrong = call("generate", run.name, "def f")
    assert wrong.exit_code == 2 and wrong.stderr.count("\n") == 1 and f"{weights} is damaged" in wrong.stderr
    summary.write_bytes(summary.read_bytes()[:-100])
    again = call("train", run / "config.yaml")
    assert again.exit_code == 0 and f"{summary} is damaged" in again.stderr and "made again now" in again.stderr
    assert call("generate", run.name[:20], "def f", "--tokens", 1).exit_code == 0


@pytest.mark.parametrize("changes", [
    {"data": "digits", "channels": 1, "classes": 10, "patch_size": 2}, {"router": "task_level"},
])  # fmt: skip
def test_generate_refuses_what_continues_no_text(changes, tiny_config, tmp_path):
    from safetensors.torch import save_file

    from ecmoe import build_model
    from ecmoe.training.result import not_run, write_run

    config = tiny_config(**changes)
    save_file(build_model(config).state_dict(), tmp_path / "model.safetensors")
    write_run(tmp_path, not_run(config).summary | {"status": "finished", "data": None})
    wrong = call("generate", tmp_path, "hi")
    assert wrong.exit_code == 2 and "only a language model whose router reads tokens alone" in wrong.stderr


@pytest.mark.parametrize(("changed", "said"), [(True, "README.md changed"), (False, "README.md is up to date")])
def test_readme_says_whether_it_changed(changed, said, monkeypatch):
    asked = []
    monkeypatch.setattr("ecmoe.report.readme.update", lambda scale: asked.append(scale) or changed)
    assert call("readme").output.strip() == call("readme", "paper").output.strip() == said and asked == ["gpu", "paper"]


def test_index_of_an_unknown_scale_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("ECMOE_HOME", str(tmp_path))
    wrong = call("index", "nonsense")
    assert wrong.exit_code == 2 and "scale='nonsense': must be one of gpu, paper, smoke" in wrong.stderr
    assert not any(tmp_path.iterdir())
    for reports, options in (("mine", ["--reports", tmp_path / "mine"]), ("reports/gpu", [])):
        assert call("index", "gpu", *options).exit_code == 0 and (tmp_path / reports / "index.html").exists()


def test_readme_says_where_it_looked_and_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("ECMOE_HOME", str(tmp_path))
    wrong = call("readme")
    assert wrong.exit_code == 2 and wrong.stderr.count("\n") == 1 and "ECMOE_HOME unset" in wrong.stderr
    assert f"{tmp_path / 'README.md'} is not there" in wrong.stderr and not any(tmp_path.iterdir())


def test_report_with_an_unknown_parameter_runs_nothing(tmp_path):
    import nbformat

    cell = nbformat.v4.new_code_cell("steps: int = 1", metadata={"tags": ["parameters"]})
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "n.ipynb")
    (tmp_path / "p.yaml").write_text("step: 2\n")
    for given in (["-f", tmp_path / "p.yaml"], ["--set", "step=2"]):
        result = call("report", tmp_path / "n.ipynb", tmp_path / "n.html", *given)
        assert result.exit_code == 2 and "did you mean steps" in result.stderr
        assert not (tmp_path / "n.html").exists()


@pytest.mark.parametrize(("options", "trains"), [([], None), (["--no-train"], False)])
def test_a_report_trains_as_its_files_say_unless_it_is_told_not_to(options, trains, monkeypatch):
    given = {}
    monkeypatch.setattr("ecmoe.report.execution.execute", lambda *_, **keys: given.update(keys))
    assert call("report", "n.ipynb", "n.html", "--set", "steps=2", *options).exit_code == 0
    assert given == {"parameters": {"steps": 2}, "train_missing": trains}


def test_generate_continues_a_text_with_a_run(tiny_config):
    from ecmoe import run_or_load

    path = run_or_load(tiny_config(seed=90, steps=2, eval_every=2)).path
    shown = call("generate", path, "def f", "--tokens", 5, "--temperature", 0)
    assert shown.exit_code == 0, shown.output
    assert shown.stdout.startswith("def f")
    assert shown.stdout == call("generate", path, "def f", "--tokens", 5, "--temperature", 0).stdout
    for run, prompt, named in [
        (path / "absent", "def f", "absent"),
        (path, "", "prompt='': must have at least one token"),
    ]:
        wrong = call("generate", run, prompt)
        assert wrong.exit_code == 2 and named in wrong.stderr
