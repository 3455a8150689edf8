"""What pages rest on: distinct runs, what is missing, and what they cost."""

import json

import pytest
from bs4 import BeautifulSoup

from ecmoe.config import RunConfig
from ecmoe.report import page as report
from ecmoe.report import scoreboard
from ecmoe.report.execution import _forget
from ecmoe.study import stats
from ecmoe.training.result import Result, not_run

EC = RunConfig()
TOP2 = RunConfig(router="token_choice", capacity_factor=1.0, gate="renormalized")


def finished(config: RunConfig, seconds: float) -> Result:
    result = not_run(config)
    result.summary.update(status="finished", seconds=seconds, tokens=2_000_000, device="GPU")
    return result


@pytest.fixture
def pages(tmp_path, monkeypatch):
    """Two pages that share a run; one of them lacks two seeds of an arm, and has a run that diverged."""
    monkeypatch.setenv("ECMOE_VERDICTS", str(tmp_path / "verdicts"))
    shared = finished(EC, 1800)
    lost = finished(EC.replace(seed=1), 60)
    lost.summary["status"] = "diverged"
    missing = [not_run(TOP2.replace(seed=seed)) for seed in (0, 2)]
    scoreboard.record_study([shared], "gpu", "01_a")
    scoreboard.record_study([shared, lost, *missing, finished(TOP2.replace(seed=1), 900)], "gpu", "02_b")
    return tmp_path / "studies"


def test_every_page_says_what_is_missing_and_a_shared_run_counts_once(pages):
    rows, total = scoreboard.studies("gpu")
    assert rows["page"].tolist() == ["01_a", "02_b"]
    assert rows["runs"].tolist() == [1, 5] and rows["finished"].tolist() == [1, 2]
    assert rows["hours"].tolist() == pytest.approx([0.5, 0.75])
    assert rows["missing (seeds)"].tolist() == ["", "EC-CF2 (diverged) s1; GShard top-2 renormalized s0, s2"]
    assert total.startswith("2 distinct runs in all") and "4 million tokens, 0.75 hours of training on GPU" in total


def test_a_run_of_another_kind_has_its_approach_for_a_name(pages):
    run = Result({"config": {"approach": "joint"}, "name": "joint-s0", "seed": 0, "status": "not run"})
    scoreboard.record_study([run, finished(EC, 1)], "gpu", "11_c")
    assert scoreboard.studies("gpu")[0]["missing (seeds)"].iloc[-1] == "joint s0"
    scoreboard.record_study([run], "gpu", "11_c")
    assert scoreboard.studies("gpu")[0]["missing (seeds)"].iloc[-1] == "all of them"


def test_shown_with_the_command_that_repeats_it(pages, monkeypatch):
    shown = []
    monkeypatch.setattr(report, "display", lambda data, raw: shown.append(data["text/html"]))
    report.show_studies("gpu")
    page = BeautifulSoup(shown[0], "html.parser")
    assert "make reproduce SCALE=gpu" in page.caption.text
    assert [a["href"] for a in page.find_all("a")] == ["01_a.html", "02_b.html"]


@pytest.mark.parametrize(
    ("high", "said"),
    [
        (1.06, "1.02 x the steps (0.98 to 1.06; 6 seeds)\nrules out the paper's 0.5"),
        (None, "1.02 x the steps (1 seed, no interval)"),
    ],
)
def test_a_figure_of_the_paper_that_is_ruled_out_stands_in_the_table(tmp_path, monkeypatch, high, said):
    monkeypatch.setenv("ECMOE_VERDICTS", str(tmp_path))
    effect = stats.Effect(1.02, high and 0.98, high, 6 if high else 1, "ratio of steps")
    scoreboard.record(stats.verdict(effect, 0.5, scale="gpu"), "C1", "gpu")
    assert scoreboard.scoreboard(tmp_path).set_index("id")["here"]["C1"] == said
    assert ("rules out" in scoreboard.claim_table(tmp_path)) is bool(high)


def test_every_part_of_a_claim_stands_in_the_table_with_its_own_verdict(tmp_path, monkeypatch):
    monkeypatch.setenv("ECMOE_VERDICTS", str(tmp_path))
    parts = {
        "a minus b": stats.verdict(stats.Effect(-0.03, -0.04, -0.02, 6, "nats per token"), scale="gpu"),
        "b minus c": stats.verdict(stats.Effect(-0.01, -0.03, 0.01, 3, "nats per token"), scale="gpu"),
        "c minus d": stats.verdict(stats.interval([]), scale="gpu"),
    }
    scoreboard.record(stats.all_of({name: parts[name] for name in ("a minus b", "b minus c")}), "C8", "gpu")
    row = scoreboard.scoreboard(tmp_path).set_index("id").loc["C8"]
    assert row["here"] == (
        "a minus b: -0.03 nats per token (-0.04 to -0.02; 6 seeds) reproduced\n"
        "b minus c: -0.01 nats per token (-0.03 to 0.01; 3 seeds) undecided"
    )
    assert "6 seeds) reproduced<br>b minus c" in scoreboard.claim_table(tmp_path)
    assert row["verdict"] == "undecided"
    scoreboard.record(stats.all_of(parts), "C8", "gpu")
    row = scoreboard.scoreboard(tmp_path).set_index("id").loc["C8"]
    assert row["verdict"] == "undecided" and row["here"].endswith("undecided\nc minus d: not run")
    scoreboard.record(stats.all_of({name: parts["c minus d"] for name in "abc"}), "C8", "gpu")
    assert scoreboard.scoreboard(tmp_path).set_index("id").loc["C8", ["here", "verdict"]].tolist() == ["", "not run"]


def test_a_run_by_hand_leaves_nothing_and_a_new_execution_starts_afresh(pages, monkeypatch):
    monkeypatch.delenv("ECMOE_NOTEBOOK", raising=False)
    scoreboard.record_study([not_run(EC)], "gpu")
    assert sorted(path.name for path in pages.iterdir()) == ["01_a.json", "02_b.json"]
    monkeypatch.setenv("ECMOE_NOTEBOOK", "03_c")
    scoreboard.record_study([not_run(EC)], "gpu")
    assert json.loads((pages / "03_c.json").read_text())[EC.name]["status"] == "not run"
    _forget("03_c", "gpu")
    assert not (pages / "03_c.json").exists() and (pages / "01_a.json").exists()


def test_nothing_run_is_a_table_too(tmp_path, monkeypatch):
    monkeypatch.setenv("ECMOE_VERDICTS", str(tmp_path / "verdicts"))
    rows, total = scoreboard.studies("gpu")
    assert not len(rows) and total.startswith("0 distinct runs")
