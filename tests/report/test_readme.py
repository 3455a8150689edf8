"""README.md: its code runs, and its figure and claim table are those of the committed results."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from ecmoe import MoE
from ecmoe.report import readme
from ecmoe.routing import Dense, ExpertThreshold, KMeans, LinearAssignment

README = Path(__file__).parents[2] / "README.md"
TEXT = README.read_text(encoding="utf-8")
EXAMPLES = dict(re.findall(r"<!-- test:(\w+) -->\n```python\n(.*?)```", TEXT, re.DOTALL))


@pytest.fixture(autouse=True)
def committed(monkeypatch):
    """The results of this checkout, not of a test's own home."""
    monkeypatch.setenv("ECMOE_HOME", str(README.parent))


def test_every_generated_part_is_what_the_results_give(committed_verdicts, monkeypatch):
    monkeypatch.setattr(readme, "judge_all", {"gpu": committed_verdicts}.get)
    for name, text in readme.sections("gpu")[0].items():
        assert f"<!-- {name}:begin -->\n{text}\n<!-- {name}:end -->" in TEXT, f"{name}: run `ecmoe readme`"


def test_update_replaces_what_lies_between_the_marks(tmp_path, monkeypatch):
    made = {"evidence": "![new]", "claims": "| new |"}
    drawn = {"figure.png": Drawn(), "in/other.png": Drawn()}
    scales = []
    monkeypatch.setattr(readme, "sections", lambda scale: scales.append(scale) or (made, drawn))
    monkeypatch.setattr(readme.paths, "root", lambda: tmp_path)
    page = tmp_path / "README.md"
    marks = "{} a\n<!-- {}:begin -->\nold\n<!-- {}:end -->\n"
    page.write_text("".join(marks.format(name, name, name) for name in made) + "last\n")
    with pytest.raises(ValueError, match="scale='smoke' gives no verdicts"):
        readme.update("smoke")
    assert not scales  # refused before anything is drawn or written
    assert readme.update("gpu") and not readme.update("paper") and scales == ["gpu", "paper"]
    assert {name: figure.path for name, figure in drawn.items()} == {name: tmp_path / name for name in drawn}
    for name, text in made.items():
        assert f"<!-- {name}:begin -->\n{text}\n<!-- {name}:end -->" in page.read_text()
    os.utime(page, (0, 0))
    assert not readme.update("gpu") and page.stat().st_mtime == 0  # what hasn't changed isn't written
    assert page.read_text().startswith("evidence a\n") and page.read_text().endswith("\nlast\n")
    begin, end = (f"<!-- evidence:{where} -->" for where in ("begin", "end"))
    for wrong in ("no marks", f"{end} a {begin}", f"{begin} a {begin}", f"{begin} a {end} {end}"):
        page.write_text(wrong)
        with pytest.raises(ValueError, match="evidence:begin"):
            readme.update("gpu")
        assert page.read_text() == wrong


def test_a_figure_has_its_words_in_quotes_and_a_part_without_one_says_so(monkeypatch):
    plot = readme.Plot(Drawn(), 'a "b" <c>', None)
    asked, plan, measured = [], readme.speed.plan, readme.speed.measured
    monkeypatch.setattr(readme, "judge_all", lambda scale: asked.append(scale) or {})
    monkeypatch.setattr(readme.speed, "plan", lambda scale: asked.append(scale) or plan(scale))
    monkeypatch.setattr(
        readme.speed,
        "measured",
        lambda jobs, *, scale, measure: asked.append((scale, measure)) or measured(jobs, scale=scale, measure=False),
    )
    monkeypatch.setattr(readme, "effects", lambda verdicts: plot)
    monkeypatch.setattr(readme, "share_of_floor", lambda layers: plot._replace(figure=None))
    texts, plots = readme.sections("paper")
    assert '"reports/paper/readme-evidence.png" width="760" alt="a &quot;b&quot; &lt;c&gt;">' in texts["evidence"]
    assert texts["speed"].startswith("Not run yet: Speed of the layer") and "on no device yet. " in texts["speed"]
    assert plots == {"reports/paper/readme-evidence.png": plot}
    assert asked == ["paper", "paper", ("paper", False)] and "make reproduce SCALE=paper" in texts["evidence"]


class Drawn:
    """A figure that need not be drawn."""

    def save(self, path):
        self.path = path


def test_the_layer_example_runs():
    there = {}
    exec(compile(EXAMPLES["layer"], "README.md", "exec"), there)
    assert there["y"].shape == there["x"].shape
    assert 0 <= float(there["moe"].statistics()["share_2"]) <= 1
    del there["y"]
    exec(compile(EXAMPLES["others"], "README.md", "exec"), there)
    assert there["y"].shape == there["x"].shape
    for one in (Dense, ExpertThreshold, KMeans, LinearAssignment):  # which need nothing more
        assert MoE(one(64, 8), 64, 256)(there["x"]).shape == there["x"].shape


def test_the_router_example_is_a_router(monkeypatch):
    lines = (EXAMPLES["router"] + EXAMPLES["router_test"]).splitlines()
    assert len(lines) < 36
    module = ModuleType("ecmoe.routing.prototyping")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(EXAMPLES["router"], vars(module))
    there = {}
    # Of no file: hypothesis would take its text for the source.
    exec(compile(EXAMPLES["router_test"], "<README.md>", "exec"), there)
    there["test_200_problems"]()
    router = there["Prototyping"](8, 5)  # groups of three and of two
    moe = MoE(router, 8, 16)
    x = torch.randn(2, 6, 8)
    logits = router.logits(x)
    for row, weights in zip(logits.tolist(), router.assign(logits).dense(12).tolist(), strict=True):
        expected = [0.0] * 5
        for group in ((0, 2, 4), (1, 3)):
            best = max(group, key=row.__getitem__)
            expected[best] = math.exp(row[best]) / sum(math.exp(row[i]) for i in group)
        assert weights == pytest.approx(expected)
    moe(x).sum().backward()
    assert router.weight.grad.abs().sum() > 0
    padded = logits.detach().index_fill(0, torch.tensor([3]), torch.nan).requires_grad_()
    router.assign(padded, mask=torch.arange(12) != 3).dense(12).square().sum().backward()
    assert padded.grad.isfinite().all() and not padded.grad[3].any() and padded.grad[4].any()


def test_the_router_example_may_be_copied_as_it_is():
    command = [sys.executable, "-m", "ruff", "check", "--stdin-filename", "ecmoe/routing/prototyping.py", "-"]
    ran = subprocess.run(command, input=EXAMPLES["router"], cwd=README.parent, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout


def test_the_run_example_trains_and_loads(tmp_path, monkeypatch):
    monkeypatch.setenv("ECMOE_HOME", str(tmp_path))
    there = {}
    exec(compile(EXAMPLES["run"], "README.md", "exec"), there)
    assert there["result"].ok and not there["model"].training
