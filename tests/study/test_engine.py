"""Planned runs are found by name, carried out one by one, and lose nothing that was done."""

import contextlib
import json
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from ecmoe import paths
from ecmoe.cli import app
from ecmoe.files import ConfigError, Damaged, write_json
from ecmoe.measures import Measurement
from ecmoe.study import engine, plan
from ecmoe.study.load import load
from ecmoe.training.result import read_record

# What a bare GPU machine has not, and must not need to train and measure.
BARE = """
import sys
sys.modules.update(dict.fromkeys({absent}))  # an import of these now fails
from ecmoe.cli import main
main()
"""
# matplotlib too, but torchmetrics imports what is installed.
ABSENT = (
    "seaborn",
    "IPython",
    "jupyter_client",
    "nbformat",
    "nbconvert",
    "papermill",
    "snakemake",
    "sklearn",
    "ecmoe.report",
)


def call(*arguments: str):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture
def project(tmp_path, tiny_config, monkeypatch):
    """A scale of tiny runs: two arms, one of which can't be trained where its text is absent."""
    monkeypatch.setenv("ECMOE_HOME", str(tmp_path))
    base = tiny_config(steps=2, eval_every=2).to_dict()
    base = {key: base[key] for key in base if key not in ("seed", "router")}
    configs = tmp_path / "configs"
    (configs / "scale").mkdir(parents=True)
    (configs / "scale/gpu.yaml").write_text(json.dumps({"scale": "gpu", "seeds": [0, 1], "base": base}))
    (configs / "arms.yaml").write_text("EC: {}\nLost: {data: absent/text.txt}\n")
    (configs / "01_a.yaml").write_text("arms: [EC]\nmeasures: {losses: {pools: [sequence], seeds: [1]}}\n")
    (configs / "02_b.yaml").write_text("arms: [EC, Lost]\nseeds: [0]\n")
    monkeypatch.setattr(paths, "configs", lambda: configs)
    yield tmp_path


def test_what_is_there_and_what_is_missing(project):
    listed = call("runs")
    assert listed.exit_code == 0 and listed.stdout.splitlines()[-1] == "3 of 3 missing"
    first, second, lost = (one.name for one in plan.plan("gpu"))
    assert call("runs", "--names").stdout.split() == [first, second, lost]
    assert call("runs", "01_a", "--names").stdout.split() == [first, second]
    assert [call("runs", "--names", "--part", f"{i}/2").stdout.split() for i in (1, 2)] == [[first, lost], [second]]
    ran = call("run", first, second, lost)
    lines = ran.stdout.splitlines()
    assert ran.exit_code == 2 and len(lines) == 3  # one that fails stops no other
    assert lines[0].endswith("finished") and lines[1].endswith("finished") and "absent/text.txt" in lines[2]
    assert call("runs", "--missing", "--names").stdout.split() == [lost]
    assert [read_record(paths.results("gpu", "runs") / f"{name}.json").ok for name in (first, second)] == [True, True]
    assert not list(paths.runs().glob("*/model.safetensors"))
    once_more = call("run", first)
    assert once_more.exit_code == 0 and once_more.stdout.splitlines()[0].endswith("finished")
    (way,) = (project / "reports/gpu/measures").glob("*/*.json")
    assert way.parent.name == second and way.name.startswith("losses-")
    way.unlink()
    assert call("runs", "--missing").stdout.splitlines()[-1] == "2 of 3 missing"
    assert "to measure: losses-" in call("runs").stdout
    assert call("run", second, "--keep-weights").exit_code == 0 and way.exists()
    assert list(paths.runs().glob("*/model.safetensors"))


def test_a_page_reads_what_the_engine_kept(project):
    one = plan.plan("gpu")[1]
    assert engine.carry_out(one, "gpu", keep_weights=True) == "finished"
    study = load("01_a", {"scale": "gpu", "train_missing": False})
    assert [(r.summary["seed"], r.summary["status"]) for r in study["EC"]] == [(0, "not run"), (1, "finished")]
    measured = study.measured("losses")
    assert (
        set(measured["arm"]) == {"EC"}
        and set(measured["seed"]) == {1}
        and {"as trained", "sequence"} <= set(measured["way"])
    )
    assert study.parameters["seeds"] == [0, 1]
    missing = load("01_a", {"scale": "gpu", "train_missing": False, "seeds": [5], "base": {"steps": 3}})
    assert missing["EC"][0].summary["config"]["steps"] == 3


def test_a_notebook_by_hand_trains_what_is_missing_and_leaves_reports_alone(project):
    study = load("01_a", {"scale": "gpu", "seeds": [1]})
    assert study["EC"][0].ok and len(study.measured("losses"))
    assert not (project / "reports").exists()


def test_a_run_that_diverged_is_a_finding(project, monkeypatch):
    one = plan.plan("gpu")[1]
    changed = one.config.replace(learning_rate=1e30, gradient_clip=0.0)
    one = plan.Planned(changed.name, changed, one.pages, one.arms, one.seed, one.measures)
    assert engine.carry_out(one, "gpu", keep_weights=True) == "diverged"
    assert not engine.lacks(one, "gpu") and read_record(plan.record(one, "gpu")).summary["status"] == "diverged"


def test_a_record_that_was_changed_is_not_believed(project):
    one = plan.plan("gpu")[1]
    write_json(plan.record(one, "gpu"), {"summary": {"status": "diverged"}}, sealed=True)
    assert engine.lacks(one, "gpu") == ""
    plan.record(one, "gpu").write_text(plan.record(one, "gpu").read_text().replace("diverged", "finished"))
    with pytest.raises(Damaged, match=one.name):
        engine.lacks(one, "gpu")


def test_a_run_is_locked_by_its_name(project, monkeypatch):
    locked = []
    monkeypatch.setattr("ecmoe.study.engine.lock", lambda name: locked.append(name) or contextlib.nullcontext())
    monkeypatch.setattr(
        "ecmoe.training.run.run_or_load", lambda config, *, records: locked.append((config, records)) or 1 / 0
    )
    one = plan.plan("gpu")[1]
    assert engine.carry_out(one, "paper", keep_weights=True) == "failed: ZeroDivisionError: division by zero"
    assert locked == [one.name, (one.config, paths.results("paper", "runs"))]


def test_a_measurement_that_fails_loses_neither_the_run_nor_the_others(project, capsys):
    one = plan.plan("gpu")[1]
    bad = Measurement("fine-tuned", {"task": "nosuch"})
    one = plan.Planned(one.name, one.config, one.pages, one.arms, one.seed, (bad, *one.measures))
    said = engine.carry_out(one, "paper", keep_weights=False)
    assert (
        said.startswith("failed: fine-tuned-nosuch: ") and engine.lacks(one, "paper") == "to measure: fine-tuned-nosuch"
    )
    assert list(paths.runs().glob("*/model.safetensors"))  # still wanted
    told = re.findall(r"^\[(\S+)\] (\S+): \d+ s$", capsys.readouterr().err, re.M)
    assert told == [(one.name, how.name) for how in one.measures[1:]]
    engine.carry_out(one, "paper", keep_weights=True)
    assert " s\n" not in capsys.readouterr().err  # what is there is not told again


def test_of_several_failures_one_that_a_retry_may_mend_is_told_first(project, monkeypatch):
    one, errors = plan.plan("gpu")[1], iter([ConfigError("a"), OSError("b"), ConfigError("c")])
    hows = tuple(Measurement("caps", {"n": n}) for n in range(3))
    one = plan.Planned(one.name, one.config, one.pages, one.arms, one.seed, hows)
    monkeypatch.setattr(
        "ecmoe.training.run.run_or_load", lambda config, *, records: SimpleNamespace(summary={"status": "finished"})
    )
    monkeypatch.setattr(engine, "trained_model", lambda of: contextlib.nullcontext())

    def fail(*given, **keys):
        raise next(errors)

    monkeypatch.setattr(engine, "measure", fail)
    said = engine.carry_out(one, "paper", keep_weights=True)
    assert re.findall(r"\w+: [abc]\b", said) == ["OSError: b", "ConfigError: a", "ConfigError: c"]


def test_all_measurements_of_a_run_share_its_model(project, monkeypatch):
    asked, one = [], plan.plan("gpu")[1]
    result, hows = SimpleNamespace(summary={"status": "finished"}), [Measurement("caps", {}), *one.measures]
    one = plan.Planned(one.name, one.config, one.pages, one.arms, one.seed, tuple(hows))
    monkeypatch.setattr("ecmoe.training.run.run_or_load", lambda config, *, records: result)
    monkeypatch.setattr(engine, "trained_model", lambda of: contextlib.nullcontext(("model", of)))
    monkeypatch.setattr(engine, "measure", lambda *given, **keys: asked.append((given, keys)))
    assert engine.carry_out(one, "paper", keep_weights=True) == "finished"
    assert asked == [((result, how), {"scale": "paper", "keep": True, "model": ("model", result)}) for how in hows]
    assert not plan.record(one, "paper").exists()  # which `run_or_load` writes


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["runs", "01_b"], "no page '01_b'"),
        (["runs", "--scale", "gpuu"], "scale='gpuu': must be one of gpu"),
        (["runs", "--part", "3/2"], "--part 3/2: must be I/N"),
        (["runs", "--jobs", 2], "--jobs must come with --train"),
        (["run", "expert-choice"], "no run 'expert-choice' in the plan of scale gpu: 3 names begin with it"),
        (["run", "nosuch"], "no run 'nosuch' in the plan of scale gpu: `ecmoe runs --scale gpu` lists them"),
        (["run", "choice"], "no run 'choice' in the plan of scale gpu: did you mean expert-choice"),
        (["again", "expert-choice-c2-s0-0123456789ab"], "in the plan of scale gpu: `ecmoe runs --scale gpu` lists"),
    ],
)
def test_what_is_wrong_is_one_line_and_code_2(project, arguments, said):
    wrong = call(*arguments)
    assert wrong.exit_code == 2 and said in wrong.stderr and wrong.stderr.count("\n") == 1 and not wrong.stdout


def test_a_whole_name_is_no_beginning_of_another():
    planned = [SimpleNamespace(name=name) for name in ("b", "a-1", "a-12")]
    assert engine.find(planned, ["a-12", "a-1", "b"], "gpu") == [planned[2], planned[1], planned[0]]


def test_without_snakemake_one_after_the_other(project, monkeypatch):
    monkeypatch.setattr(engine.importlib.util, "find_spec", lambda name: None)
    done = call("runs", "01_a", "--train")
    assert done.exit_code == 0, done.output
    assert not any(engine.lacks(one, "gpu") for one in plan.plan("gpu", ["01_a"]))
    assert not list(paths.runs().glob("*/model.safetensors"))
    assert call("runs", "--train").exit_code == 2
    monkeypatch.setattr(engine, "in_turn", lambda *_, keep_weights: keep_weights)
    monkeypatch.setattr(engine, "CHECKOUT", project)  # without a Snakefile, whatever is installed
    for found in (None, "snakemake"):
        monkeypatch.setattr(engine.importlib.util, "find_spec", lambda name, found=found: found)
        assert [engine.train(plan.plan("gpu"), scale, jobs=1) for scale in ("smoke", "gpu", "paper")] == [
            True,
            False,
            False,
        ]


@pytest.mark.parametrize(
    ("said", "code"),
    [("finished finished", 0), ("finished failed:_ConfigError:_x", 2), ("failed:_OSError:_x finished", 1),
     ("failed:_ConfigError:_x failed:_OSError:_x", 1), ("failed:_dependence:_Damaged:_x failed:_Damaged:_y", 2),
     ("failed:_dependence:_OSError:_x", 1), ("diverged", 0)],
)  # fmt: skip
def test_the_exit_code_says_whether_to_try_again(project, monkeypatch, said, code):
    outcomes = iter(said.split())
    monkeypatch.setattr(engine, "carry_out", lambda *_, **__: next(outcomes).replace("_", " "))
    assert engine.in_turn(plan.plan("gpu")[: len(said.split())], "gpu", keep_weights=True) == code


def test_each_run_is_a_line_however_long_its_error(project, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(
        engine, "carry_out", lambda *given, **keys: asked.append((*given, keys)) or "failed: OSError: a\n  b"
    )
    planned = plan.plan("gpu")[:2]
    assert engine.in_turn(planned, "gpu", keep_weights=False) == 1
    assert capsys.readouterr().out.splitlines() == [
        f"{one.pages[0]} {one.arms[0]} s{one.seed}  {one.name}  failed: OSError: a b" for one in planned
    ]
    assert asked == [(one, "gpu", {"keep_weights": False}) for one in planned]


def test_snakemake_gets_the_runs(project, monkeypatch):
    planned, did, waits, ends = plan.plan("gpu")[:2], [], [], 0

    class Process:  # can't be killed
        def __init__(self, command, cwd):
            did.append((command, cwd))

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def wait(self):
            waits.append(ends)
            if ends is None and len(waits) == 1:
                raise KeyboardInterrupt
            return ends

    monkeypatch.setattr(engine.subprocess, "Popen", Process)
    assert engine.train(planned, "gpu", jobs=3) == 1  # it says that all went well, and nothing is there
    ((command, folder),) = did
    assert folder == engine.CHECKOUT and (folder / "Snakefile").exists()
    said = [sys.executable, "-m", "snakemake", "--cores", "all", "--resources", "place=3", "--config", "scale=gpu"]
    assert command == [*said, f"runs={planned[0].name},{planned[1].name}", "--", "trained"]
    assert engine.train([], "gpu", jobs=1) == 0 and len(did) == 1
    monkeypatch.setattr(engine, "lacks", lambda *_: "")
    for ends in (0, 3):  # all is there, whatever else failed
        assert engine.train(planned, "gpu", jobs=1) == ends
    monkeypatch.setattr(engine, "lacks", lambda one, scale: "missing" * (one is planned[1]))
    for ends in (0, 3):
        assert engine.train(planned, "gpu", jobs=1) == (ends or 1)
    waits.clear()
    ends = None  # Ctrl-C: Snakemake got it, too, and ends when its runs have ended
    with pytest.raises(KeyboardInterrupt):
        engine.train(planned, "gpu", jobs=1)
    assert len(waits) == 2


def test_a_bare_machine_trains_and_measures(tmp_path, monkeypatch):
    """No notebooks, no figures, no Snakemake: a run of this checkout's smoke plan, with its measurements."""
    monkeypatch.setenv("ECMOE_HOME", str(tmp_path))
    (one,) = [one for one in plan.plan("smoke", ["09_causality"]) if one.arms[0].endswith("pool sequence")][:1]
    shown = subprocess.run(
        [sys.executable, "-c", BARE.format(absent=ABSENT), "runs", "09_causality", "--scale", "smoke", "--names"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert one.name in shown.stdout.split()
    code = (
        "from ecmoe.measures import causality, inspection, fine_tuning; import ecmoe.training.run, ecmoe.study.engine"
    )
    subprocess.run(
        [sys.executable, "-c", BARE.format(absent=ABSENT).replace("from ecmoe.cli import main\nmain()", code)],
        check=True,
    )


@pytest.mark.parametrize(("visible", "gpus"), [("", 0), ("-1", 0), ("0", 1), ("0,1", 2), (" 3 , GPU-a,", 2)])
def test_gpus_that_may_be_used_are_counted(monkeypatch, visible, gpus):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setenv("ECMOE_SLOTS", "3")
    assert engine.places() == (gpus, 3 if gpus else 1)
    for slots in ("many", "0", "-1"):
        monkeypatch.setenv("ECMOE_SLOTS", slots)
        with pytest.raises(ConfigError, match=f"ECMOE_SLOTS={slots}: must be a whole number, 1 or more"):
            engine.places()


def test_gpus_of_the_machine_count_where_none_is_chosen(monkeypatch):
    listed = "GPU 0: NVIDIA H200 (UUID: GPU-a)\n  MIG 1g: (UUID: MIG-b)\nGPU 1: NVIDIA H200 (UUID: GPU-c)\n"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("ECMOE_SLOTS", raising=False)
    monkeypatch.setattr(
        subprocess, "run", lambda command, **_: SimpleNamespace(stdout=listed * (command == ["nvidia-smi", "-L"]))
    )
    for there, found in (("/usr/bin/nvidia-smi", (2, 4)), (None, (0, 1))):
        monkeypatch.setattr(engine.shutil, "which", lambda name, there=there: there if name == "nvidia-smi" else None)
        assert engine.places() == found
