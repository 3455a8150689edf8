"""What pages lack is named, and can be had without them."""

import shutil
from functools import partial

import pytest
from typer.testing import CliRunner

from ecmoe import paths
from ecmoe.cli import app
from ecmoe.config import ConfigError, RunConfig
from ecmoe.measures import causality, measure
from ecmoe.report import scoreboard
from ecmoe.study.missing import missing
from ecmoe.training.result import Result, not_run
from ecmoe.training.run import run_or_load

EC = RunConfig()
TOP2 = RunConfig(router="token_choice", capacity_factor=1.0, gate="renormalized")


def finished(config: RunConfig) -> Result:
    result = not_run(config)
    result.summary.update(status="finished")
    return result


@pytest.fixture
def pages(tmp_path, monkeypatch):
    """Two pages that share a run; one of them lacks two seeds of an arm."""
    monkeypatch.setenv("ECMOE_VERDICTS", str(tmp_path / "verdicts"))
    scoreboard.record_study([finished(EC)], "gpu", "01_a")
    there = finished(TOP2.replace(seed=1))
    scoreboard.record_study(
        [finished(EC), there, *(not_run(TOP2.replace(seed=seed)) for seed in (0, 2))], "gpu", "02_b"
    )


def test_missing_runs_can_be_trained_from_what_pages_keep(pages, monkeypatch, tmp_path):
    wanted = [("02_b", "GShard top-2 renormalized", TOP2.replace(seed=seed), {}) for seed in (0, 2)]
    assert missing("gpu") == missing("gpu", ["02_b"]) == wanted and missing("gpu", ["01_a"]) == []
    with pytest.raises(ConfigError, match="page '03_c': nothing is kept of it at scale gpu; there are 01_a, 02_b"):
        missing("gpu", ["03_c"])
    with monkeypatch.context() as later:
        later.setattr(RunConfig, "digest", lambda self: "of another version")
        with pytest.raises(
            ConfigError, match="would be token-choice-top2-c1-s0-of another version today; draw the page again"
        ):
            missing("gpu")
    trained = []
    monkeypatch.setattr(
        "ecmoe.training.run.run_or_load", lambda config, records: trained.append((config, records)) or finished(config)
    )
    shown = CliRunner().invoke(app, ["runs"])
    assert shown.exit_code == 0 and TOP2.name in shown.output and "2 missing" in shown.output and not trained
    assert "2 missing" in CliRunner().invoke(app, ["runs", "--arm", "EC", "--arm", "GShard"]).output
    assert CliRunner().invoke(app, ["runs", "--arm", "Hash"]).output == "0 missing\n"
    shown = CliRunner().invoke(app, ["runs", "02_b", "--train", "--part", "2/2"])
    assert shown.exit_code == 0 and trained == [(TOP2.replace(seed=2), paths.records("gpu"))]
    assert CliRunner().invoke(app, ["runs", "--train", "--within", "-1"]).exit_code == 0 and len(trained) == 1
    refused = CliRunner().invoke(app, ["runs", "--part", "3/2"])
    assert refused.exit_code == 2 and "--part 3/2: must be I/N" in refused.output
    monkeypatch.setattr("ecmoe.training.run.run_or_load", lambda *_, **__: 1 / 0)
    shown = CliRunner().invoke(app, ["runs", "--train"])
    assert shown.exit_code == 1 and "ZeroDivisionError" in shown.output and "2 failed" in shown.output


def test_what_a_page_wants_measured_is_kept_and_taken_without_it(tiny_config, tmp_path, monkeypatch):
    """A page that is drawn without weights names the measurement; `ecmoe runs --train` takes it, training what it must."""
    monkeypatch.setenv("ECMOE_HOME", str(tmp_path))
    monkeypatch.setenv("ECMOE_NOTEBOOK", "09_causality")
    config = tiny_config(steps=2, batch_size=4, seed=21)
    for result in (not_run(config), run_or_load(config, records=paths.records("gpu"), progress=False)):
        shutil.rmtree(paths.runs(), ignore_errors=True)
        compute = partial(causality.losses_by_routing, pools=[4])
        assert measure.measure(result, "losses-4", compute, scale="gpu", train=False) is None
        assert (
            measure.measure(result, "own", lambda model, config: {}, scale="gpu", train=False) is None
        )  # nobody finds it
        scoreboard.record_study([result], "gpu")
        (lacking,) = missing("gpu")
        assert lacking.config == config
        assert lacking.measures == {
            "losses-4": {"compute": "ecmoe.measures.causality:losses_by_routing", "keys": {"pools": [4]}}
        }
    assert "(to be measured)" in scoreboard.studies("gpu")[0]["missing (seeds)"].iloc[0]
    listed = CliRunner().invoke(app, ["runs"])
    assert "measure losses-4" in listed.output and "1 missing" in listed.output
    done = CliRunner().invoke(app, ["runs", "--train"])
    assert done.exit_code == 0 and missing("gpu") == []
    assert {row["way"] for row in measure.measure(result, "losses-4", compute, scale="gpu", train=False)["rows"]} >= {
        "causally",
        "4",
    }


@pytest.mark.parametrize("flags", [[], ["--train"]])
def test_a_scale_without_pages_is_no_scale_without_gaps(flags, tmp_path, monkeypatch):
    monkeypatch.setenv("ECMOE_HOME", str(tmp_path))
    for scale, said in (
        ("gpuu", "scale='gpuu': must be one of gpu, paper, smoke"),
        ("paper", "no page has been drawn at scale paper, so none says what it lacks: make report SCALE=paper"),
    ):
        shown = CliRunner().invoke(app, ["runs", "--scale", scale, *flags])
        assert shown.exit_code == 2 and shown.stderr == f"error: {said}\n" and not shown.stdout


def test_a_run_that_diverged_is_asked_for_nothing(pages, tmp_path):
    lost = not_run(EC.replace(seed=7))
    lost.summary.update(status="diverged")
    assert measure.measure(lost, "losses", causality.losses_by_routing, scale="gpu", train=False) is None
    scoreboard.record_study([lost], "gpu", "03_c")
    assert missing("gpu", ["03_c"]) == []


def test_only_functions_of_this_package_are_called(pages):
    with pytest.raises(ValueError, match="compute='os:system' of measurement 'evil': must be a function of ecmoe"):
        measure.take(finished(EC), {"evil": {"compute": "os:system", "keys": {}}}, "gpu")
