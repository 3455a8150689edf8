"""What pages rest on: distinct runs, what is missing, and what they cost."""

import pytest
from bs4 import BeautifulSoup

from ecmoe import paths
from ecmoe.config import RunConfig
from ecmoe.report import page as report
from ecmoe.report import scoreboard
from ecmoe.study import arms, stats
from ecmoe.training.result import Result, not_run, write_record

EC = RunConfig()
TOP2 = RunConfig(router="token_choice", capacity_factor=1.0, gate="renormalized")


def finished(config: RunConfig, seconds: float) -> Result:
    result = not_run(config)
    result.summary.update(status="finished", seconds=seconds, tokens=2_000_000, device="GPU")
    return result


@pytest.fixture
def pages(tmp_path, monkeypatch):
    """Two pages that share a run; one of them lacks two seeds of an arm, and has a run that diverged."""
    monkeypatch.setenv("ECMOE_HOME", str(tmp_path))
    configs = tmp_path / "configs"
    (configs / "scale").mkdir(parents=True)
    (configs / "scale/gpu.yaml").write_text("scale: gpu\nbase: {}\n")
    (configs / "arms.yaml").write_text(
        "EC: {}\nGShard: {router: token_choice, capacity_factor: 1.0, gate: renormalized}\n"
    )
    (configs / "01_a.yaml").write_text("arms: [EC]\nseeds: [0]\n")
    (configs / "02_b.yaml").write_text("arms: [EC, GShard]\nseeds: [0, 1, 2]\n")
    monkeypatch.setattr(paths, "configs", lambda: configs)
    arms.named.cache_clear()
    lost = finished(EC.replace(seed=1), 60)
    lost.summary["status"] = "diverged"
    for result in (finished(EC, 1800), lost, finished(TOP2.replace(seed=1), 900)):
        write_record(paths.records("gpu") / f"{result.summary['name']}.json", result)
    yield
    arms.named.cache_clear()


def test_every_page_says_what_is_missing_and_a_shared_run_counts_once(pages):
    rows, total = scoreboard.studies("gpu")
    assert rows["page"].tolist() == ["01_a", "02_b"]
    assert rows["runs"].tolist() == [1, 6] and rows["finished"].tolist() == [1, 2]
    assert rows["hours"].tolist() == pytest.approx([0.5, 0.75])
    assert rows["missing (seeds)"].tolist() == ["", "GShard s0, s2; EC (diverged) s1; EC s2"]
    assert total.startswith("2 distinct runs in all") and "4 million tokens, 0.75 hours of training on GPU" in total


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
