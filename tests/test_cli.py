"""The command line: quick help, errors in one line, a run as text and as JSON."""

import dataclasses
import errno
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import yaml
from typer.testing import CliRunner

import ecmoe
from ecmoe.cli import app
from ecmoe.config import RunConfig
from ecmoe.study.plan import plan
from ecmoe.training.result import Result

CHECK_LIGHT = """
import sys, ecmoe.cli
heavy = {"torch", "lightning", "pandas", "papermill", "nbconvert"} & set(sys.modules)
assert not heavy, f"imported too early: {heavy}"
import nbformat
assert "rfc3987_syntax.syntax_helpers" not in sys.modules, "grammars built"
"""


ROOT = Path(__file__).parents[1]


def call(*arguments: str):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_help_is_quick_and_names_the_commands():
    began = time.time()
    shown = subprocess.run([sys.executable, "-m", "ecmoe", "--help"], capture_output=True, text=True, check=True)
    assert time.time() - began < 10  # 0.3 s on an idle machine; with torch it would be many
    assert "Usage: ecmoe [" in shown.stdout
    assert all(command in shown.stdout for command in ("train", "generate", "bench", "report", "index", "keys"))
    subprocess.run([sys.executable, "-c", CHECK_LIGHT], check=True)


def test_alone_it_helps():
    for group, command in (([], "train"), (["bench"], "profile")):
        assert "Usage: " in (shown := call(*group).output) and command in shown


def test_help_breaks_lines_at_the_width_of_the_terminal_alone():
    (line,) = [line for line in call("again", "--help").output.splitlines() if "reports/SCALE/repeats" in line]
    assert len(line.rstrip()) > 60, "it ends where the source's line does"


@pytest.mark.parametrize(("caught", "code"), [(KeyboardInterrupt, 130), (RuntimeError, 1)])
def test_ctrl_c_is_130_where_lightning_catches_it_too(monkeypatch, caught, code):
    def run_or_load(*_, **__):
        try:
            raise caught
        except caught:
            sys.exit(1)

    monkeypatch.setattr("ecmoe.training.run.run_or_load", run_or_load)
    assert call("train").exit_code == code


def test_version():
    assert call("--version").output.strip() == ecmoe.__version__


def test_keys_lists_every_key_with_help():
    lines = call("keys").output.splitlines()
    assert [line.split()[0] for line in lines] == [field.name for field in dataclasses.fields(RunConfig)]
    for line, field in zip(lines, dataclasses.fields(RunConfig), strict=True):
        default = "null" if field.default is None else str(field.default)
        assert line.split()[1:] == f"{default} {field.metadata['help']}".split()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["bench", "scaling", "--strategy", "dpp"], "--strategy 'dpp': did you mean ddp?"),
        (["bench", "layer", "--set", f"n={10**14}"], "n=100000000000000: don't fit into this device's memory"),
        (["bench", "step", "--set", f"n={10**14}"], "n=100000000000000: don't fit into this device's memory"),
        (["bench", "scaling", "--pool", "ranks"], "--pool 'ranks': did you mean rank?"),
        (["bench", "scaling", "--only", "training,loses"], "--only 'loses': did you mean losses?"),
        (["report", "notebooks/00_routing.ipynb", "notebooks"], "notebooks is a folder: name the page in it"),
        (["runs", "--part", "3/2"], "--part 3/2: must be I/N"),
        (["runs", "--part", "0/2"], "--part 0/2: must be I/N"),
        (["runs", "--part", "first/2"], "--part first/2: must be I/N"),
        (["runs", "--part", "1/all"], "--part 1/all: must be I/N"),
        (["runs", "--part", "2"], "--part 2: must be I/N"),
        (["train", "--set", "step=3"], "did you mean steps"),
        (["train", "--set", "learning_rate=1e-3"], "write 1.0e-3"),
        (["train", "--set", "steps"], "key=value"),
        (["train", "--set", "=3"], "key=value"),
        (["train", "--set", "steps=[1"], "--set 'steps=[1': '[1' is no YAML value"),
        (["train", "absent.yaml"], "absent.yaml"),
        (["train", "steps=2"], "config 'steps=2' isn't there: did you mean --set steps=2?"),
        (["train", ROOT / "configs/01_convergence.yaml"], "is the plan of a page: `ecmoe runs 01_convergence` lists"),
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
    told = dict(line.split(maxsplit=1) for line in again.stdout.splitlines())
    shown = (
        "name",
        "status",
        "val_loss",
        "val_loss_causal",
        "perplexity",
        "tokens",
        "seconds",
        "tokens_per_second",
        "device",
    )
    for key in shown:
        assert told[key] == (f"{summary[key]:.6g}" if isinstance(summary[key], float) else str(summary[key]))
    assert (
        told["path"].endswith(config.name)
        and [key for key in told if key in shown] == list(shown)
        and "error" not in told
    )


def test_of_many_ranks_the_first_speaks_for_all(monkeypatch):
    keys = "name status error val_loss val_loss_causal accuracy perplexity bits_per_byte tokens seconds tokens_per_second mfu device"
    found = Result(
        {"seed": 3, "commit": "c"} | {key: f"its {key}" for key in keys.split()} | {"status": "finished", "mfu": 0.25}
    )
    every = [f"{key:18} {found.summary[key]}" for key in keys.split()]
    monkeypatch.setattr("ecmoe.training.run.run_or_load", lambda config: found)
    for rank, said in ((0, every), (1, [])):
        monkeypatch.setattr("ecmoe.training.ranks.rank", lambda rank=rank: rank)
        shown = call("train")
        assert shown.stdout.splitlines() == said and shown.exit_code == 0


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
    assert again.exit_code == 0 and f"{summary} is damaged" in again.stderr and "computed again now" in again.stderr
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
    assert wrong.exit_code == 2 and "only a language model whose router needs no tasks" in wrong.stderr


# Words -> the function behind the command, and what it gets of them. ONE: all that is planned.
PASSED = {
    "generate RUN hello": ("training.continuation.continue_text", ["RUN", "hello", 200], {"temperature": 1.0, "top_k": None, "seed": 0}),
    "generate RUN hello --tokens 3 --temperature 0.5 --top-k 4 --seed 7": (
        "training.continuation.continue_text", ["RUN", "hello", 3], {"temperature": 0.5, "top_k": 4, "seed": 7}),
    "report a.ipynb a.html": ("report.execution.execute", ["a.ipynb", "a.html", []], {"parameters": {}}),
    "report a.ipynb a.html -f b.yaml -f c.yaml --set steps=2 --no-train": (
        "report.execution.execute", ["a.ipynb", "a.html", ["b.yaml", "c.yaml"]], {"parameters": {"steps": 2, "train_missing": False}}),
    "index": ("report.index.index", ["smoke", None], {}),
    "index --scale gpu --reports there": ("report.index.index", ["gpu", "there"], {}),
    "readme": ("report.readme.update", ["gpu"], {}),
    "readme --scale paper": ("report.readme.update", ["paper"], {}),
    "runs --train": ("study.engine.train", [["ONE of gpu"], "gpu"], {"jobs": 1}),
    "runs 01_a --scale paper --train --jobs 2": ("study.engine.train", [["ONE of paper 01_a"], "paper"], {"jobs": 2}),
    "run ONE": ("study.engine.in_turn", [["ONE of gpu"], "gpu"], {"keep_weights": False}),
    "run ONE --keep-weights": ("study.engine.in_turn", [["ONE of gpu"], "gpu"], {"keep_weights": True}),
    "run ONE --scale smoke": ("study.engine.in_turn", [["ONE of smoke"], "smoke"], {"keep_weights": True}),
    "again ONE": ("study.repeats.again", ["ONE", "gpu", None], {}),
    "again ONE --scale paper --steps 5": ("study.repeats.again", ["ONE", "paper", 5], {}),
    "bench layer --set n=4 --set repeats=2": ("study.speed.job", ["layer"], {"n": 4, "repeats": 2}),
    "bench profile": ("study.speed.job", ["profile"], {}),
}  # fmt: skip


@pytest.mark.parametrize("words", PASSED)
def test_a_command_passes_on_what_it_is_given(words, monkeypatch):
    function, given, keys = PASSED[words]
    asked = []

    def spy(*args, **kwargs):
        asked.append((args, kwargs))
        return {"equal": True, "rows": 1, "differs": {}, "recorded": "", "code": "", "device": ""}

    def planned(scale, pages=()):
        return [SimpleNamespace(name="ONE", arms=("EC",), of=" ".join([scale, *pages]))]

    def said(value):
        if isinstance(value, list | tuple | dict):
            return [said(one) for one in value]
        return f"ONE of {value.of}" if hasattr(value, "of") else str(value) if isinstance(value, Path) else value

    monkeypatch.setattr(f"ecmoe.{function}", spy)  # first: what this imports must get the plan as it is
    asked_scale = words.split("--scale ")[-1].split()[0] if "--scale" in words else "gpu"
    monkeypatch.setattr("ecmoe.study.engine.lacks", lambda one, scale: "missing" * (scale == asked_scale))
    monkeypatch.setattr("ecmoe.study.plan.plan", planned)
    monkeypatch.setattr("ecmoe.study.plan.sound", lambda scale: (planned(scale), {}))
    call(*words.split())
    ((args, kwargs),) = asked
    assert (said(args), kwargs) == (given, keys)


@pytest.mark.parametrize(
    ("words", "least"),
    [("generate a b --tokens", 1), ("generate a b --temperature", 0), ("generate a b --top-k", 1), ("generate a b --seed", 0),
     ("again a --steps", 1), ("runs --jobs", 1), ("bench scaling --devices", 1), ("bench scaling --repeats", 2)],
)  # fmt: skip
def test_a_number_has_its_least(words, least, monkeypatch):
    for function in ("training.continuation.continue_text", "study.plan.sound", "study.speed.scaling"):
        monkeypatch.setattr(f"ecmoe.{function}", lambda *_, **__: 1 / 0)  # it is let in
    assert isinstance(call(*words.split(), least).exception, ZeroDivisionError)
    refused = call(*words.split(), least - 1)
    said = " ".join(refused.stderr.replace("\u2502", "").split())
    assert refused.exit_code == 2 and f"'{words.split()[-1]}': Input should be greater than or equal to {least}" in said


def test_a_page_is_named_where_it_was_written(monkeypatch):
    monkeypatch.setattr("ecmoe.report.execution.execute", lambda *_, **__: None)
    monkeypatch.setattr("ecmoe.report.index.index", lambda *_: "there/index.html")
    said = [call(*words.split()).output for words in ("report a.ipynb b/c.html", "index --scale gpu")]
    assert said == ["b/c.html\n", "there/index.html\n"]


def test_bench_all_measures_what_it_is_asked_for_once(tmp_path, monkeypatch):
    made = []

    def job(name):
        table = pd.DataFrame([{"ms": 1.0}])
        table.attrs["setting"] = {"n": 4}
        return lambda: made.append(name) or table

    monkeypatch.setattr(
        "ecmoe.study.speed.jobs", lambda **_: {name: job(name) for name in ("layer-a", "step", "growth")}
    )
    asked = ["bench", "all", "--scale", "smoke", "--out", str(tmp_path), "--only"]
    for words, expected in (
        (["step"], ["step"]),
        (["step,layer,"], ["layer-a"]),
        (["growth,step", "--force"], ["step", "growth"]),
    ):
        made.clear()
        assert call(*asked, *words).exit_code == 0 and made == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["growth.json", "layer-a.json", "step.json"]
    wrong = call(*asked, "steps")
    assert wrong.exit_code == 2 and "--only steps: no such part; there are layer-a, step, growth" in wrong.stderr


def test_runs_are_listed_with_who_wants_them_and_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("ECMOE_HOME", str(tmp_path))
    monkeypatch.setattr("ecmoe.study.engine.lacks", lambda one, scale: "missing" * (one.seed == 1))
    planned = plan("gpu", ["09_causality"])
    missing = sum(one.seed == 1 for one in planned)
    *lines, last = call("runs", "09_causality").output.splitlines()
    assert [re.split("  +", line) for line in lines] == [
        ["09_causality", one.arms[0], f"s{one.seed}", one.name, "missing" if one.seed == 1 else "done"] for one in planned
    ]  # fmt: skip
    assert last == f"{missing} of {len(planned)} missing" and 0 < missing < len(planned)
    names = call("runs", "09_causality", "--missing", "--names", "--check")
    assert names.output.split() == [one.name for one in planned if one.seed == 1] and names.exit_code == 1
    assert call("runs", "09_causality").exit_code == 0
    monkeypatch.setattr("ecmoe.study.engine.lacks", lambda *_: "")
    assert call("runs", "09_causality", "--check").exit_code == 0
    monkeypatch.setattr(
        "ecmoe.study.plan.sound", lambda scale: (planned, {"01_a": ValueError("page '01_a'\nis wrong")})
    )
    wrong = call("runs")
    assert wrong.exit_code == 2 and wrong.stderr == "error: page '01_a' is wrong\n" and last[-10:] in wrong.stdout
    planned.clear()  # of the only page
    wrong = call("runs")
    assert (wrong.exit_code, wrong.stderr, wrong.stdout) == (2, "error: page '01_a' is wrong\n", "0 of 0 missing\n")


def test_what_was_timed_is_printed_and_kept_where_asked(monkeypatch, tmp_path):
    table = pd.DataFrame({"path": ["plain"], "ms": [1.23456], "samples_ms": [[1.0]], "mfu": [None]})
    table.attrs = {"setting": {"n": 4}, "absent": ["a rival"]}
    monkeypatch.setattr("ecmoe.study.speed.job", lambda name, **keys: lambda: table)
    monkeypatch.chdir(tmp_path)
    said = [call("bench", "layer", *more).stdout.split() for more in ([], ["--json", tmp_path / "a.json"])]
    assert (
        said[0]
        == said[1]
        == "n=4 path ms plain 1.235 not measured (not installed, or not possible here): a rival".split()
    )
    (kept,) = tmp_path.iterdir()
    assert json.loads(kept.read_text())["rows"][0]["samples_ms"] == [1.0]


@pytest.mark.parametrize(("equal", "code"), [([True, True], 0), ([False, True], 1), ([True, False], 1)])
def test_one_run_that_differs_is_an_exit_code(equal, code, monkeypatch):
    planned = [SimpleNamespace(name=name) for name in "ab"]
    found = {
        "rows": 3,
        "differs": {"val_loss": 0.25, "train_loss": 1e-5, "accuracy": None},
        "recorded": "x",
        "code": "y",
        "device": "CPU",
    }
    monkeypatch.setattr("ecmoe.study.repeats.again", lambda name, *_: found | {"equal": equal["ab".index(name)]})
    monkeypatch.setattr("ecmoe.study.plan.sound", lambda scale: (planned, {}))
    ran = call("again", "a", "b")
    said = [
        "equal in 3 rows"
        if one
        else "of 3 rows some differ: val_loss by up to 0.25; train_loss by up to 1e-05; accuracy because only one has a value"
        for one in equal
    ]
    assert ran.exit_code == code and ran.stdout.splitlines() == [
        f"{n}  code x -> y  CPU  {s}" for n, s in zip("ab", said, strict=True)
    ]


def test_a_run_that_broke_off_is_an_exit_code(tiny_config, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tiny_config(learning_rate=1e30, gradient_clip=0.0, warmup_steps=0).to_dict()))
    lost = call("train", path)
    words = [line.split()[0] for line in lost.stdout.splitlines()]
    assert lost.exit_code == 1 and words[:3] == ["name", "status", "error"] and words[-2:] == ["device", "path"]


@pytest.mark.parametrize(("changed", "said"), [(True, "README.md changed"), (False, "README.md is up to date")])
def test_readme_says_whether_it_changed(changed, said, monkeypatch):
    asked = []
    monkeypatch.setattr("ecmoe.report.readme.update", lambda scale: asked.append(scale) or changed)
    assert call("readme").output.strip() == call("readme", "--scale", "paper").output.strip() == said
    assert asked == ["gpu", "paper"]


def test_index_of_an_unknown_scale_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("ECMOE_HOME", str(tmp_path))
    monkeypatch.setattr("ecmoe.report.index.judge_all", {"gpu": {}}.get)  # that of the committed results is in report/
    wrong = call("index", "--scale", "nonsense")
    assert wrong.exit_code == 2 and "scale='nonsense': must be one of gpu, paper, smoke" in wrong.stderr
    assert not any(tmp_path.iterdir())
    for reports, options in (("mine", ["--reports", tmp_path / "mine"]), ("reports/gpu", [])):
        assert call("index", "--scale", "gpu", *options).exit_code == 0 and (tmp_path / reports / "index.html").exists()


def test_readme_says_where_it_looked_and_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("ECMOE_HOME", str(tmp_path))
    wrong = call("readme")
    assert wrong.exit_code == 2 and wrong.stderr.count("\n") == 1 and "ECMOE_HOME unset" in wrong.stderr
    assert f"{tmp_path / 'README.md'} is not there" in wrong.stderr and not any(tmp_path.iterdir())


def test_a_reader_who_has_seen_enough_is_no_error(monkeypatch):
    def gone(text, err=False):
        if not err:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")
        said.append(text)

    said = []
    monkeypatch.setattr("typer.echo", gone)
    assert call("keys").exit_code == 1 and not said


@pytest.mark.parametrize(
    "words",
    ["runs --check", "runs 01_convergence", "run x", "again x", "index --scale smoke", "bench all", "bench scaling"],
)
def test_what_needs_a_plan_says_so_outside_a_checkout(words, tmp_path, monkeypatch):
    monkeypatch.setenv("ECMOE_CONFIGS", str(tmp_path))
    wrong = call(*words.split())
    said = f"error: {tmp_path} plans no run: ECMOE_CONFIGS must be the configs/ of a checkout\n"
    assert (wrong.exit_code, wrong.stderr) == (2, said)


def test_report_with_an_unknown_parameter_trains_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("ECMOE_HOME", str(tmp_path))
    result = call("report", ROOT / "notebooks/03_capacity_factor.ipynb", tmp_path / "n.html", "--set", "seed=[2]")
    assert result.exit_code == 2 and "has no parameter 'seed' (given: [2]): did you mean seeds?" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["n.failed.html"]
    assert "did you mean seeds?" in (tmp_path / "n.failed.html").read_text()


def test_generate_prints_on_a_terminal_that_lacks_characters(monkeypatch):
    monkeypatch.setattr("ecmoe.training.continuation.continue_text", lambda *_, **__: "d\u00e9f\ufffd\u65e5")
    shown = CliRunner(charset="latin-1").invoke(app, ["generate", "a-run", "def"])
    assert shown.exit_code == 0 and shown.stdout == "d\u00e9f??\n"


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
        (path, "\udcff", "prompt='\\udcff': must be UTF-8"),
    ]:
        wrong = call("generate", run, prompt)
        assert wrong.exit_code == 2 and named in wrong.stderr
    assert call("generate", path, "def f", "--seed", 2**63).exit_code == 2
