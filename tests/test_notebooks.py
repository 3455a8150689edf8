"""Every notebook runs from its first cell to its last, with its smoke parameters and runs of a few steps."""

import re
from pathlib import Path

import pytest
import yaml
from bs4 import BeautifulSoup

from ecmoe.report.execution import execute
from ecmoe.study.parameters import merge_parameters

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# 512 tokens a batch: as many as the largest pool of 09_causality, and a whole k for all experts.
TINY = {
    "layers": 2, "d_model": 16, "d_ff": 32, "heads": 2, "sequence_length": 32, "batch_size": 16, "max_bytes": 400_000,
    "steps": 4, "warmup_steps": 1, "eval_every": 2, "eval_batches": 2,
}  # fmt: skip


def parameters(notebook: Path, folder: Path) -> list[Path]:
    """The notebook's own files at smoke, and what makes its runs tiny."""
    files = [ROOT / "configs/scale/smoke.yaml", ROOT / f"configs/{notebook.stem}.yaml", folder / "tiny.yaml"]
    tiny = {"base": TINY, "seeds": [0]}
    overlay = ROOT / f"configs/scale/smoke/{notebook.stem}.yaml"
    if overlay.exists():
        own = yaml.safe_load(overlay.read_text())
        tiny = own | {
            "base": own.get("base", {}) | {k: TINY[k] for k in ("steps", "warmup_steps", "eval_every")},
            "seeds": [0],
        }
    if notebook.stem == "11_continual_learning":
        tiny["settings"] = merge_parameters(files[:2])["settings"] | {"steps": 3, "gate_steps": 3}
    if notebook.stem == "07_fine_tuning":
        tiny["measures"] = {"fine-tuned": {"task": ["lines"], "steps": 2, "batch_size": 4, "examples": 12}}
    if notebook.stem == "08_step_time":
        tiny["repeats"] = 2
    files[2].write_text(yaml.safe_dump(tiny))
    return files


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_and_shows_what_it_found(notebook, tmp_path, monkeypatch):
    monkeypatch.setenv("ECMOE_HOME", str(tmp_path))
    page = execute(notebook, tmp_path / "page.html", parameters(notebook, tmp_path), progress=False)
    soup = BeautifulSoup(page.read_text(), "html.parser")
    assert "plumbing only" in soup.text
    assert not re.search(r"Traceback|Warning:", soup.text)
    for image in soup.find_all("img"):
        assert len(image["alt"]) > 40 and image["src"].startswith("data:image/png")
    if "ecmoe.study.load" in notebook.read_text():
        statuses = {cell.text for cell in soup.find_all("td")} & {"finished", "failed", "diverged", "not run"}
        assert statuses == {"finished"}


def test_redrawn_without_training_it_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("ECMOE_HOME", str(tmp_path))
    notebook = ROOT / "notebooks/04_capped_experts.ipynb"
    page = execute(
        notebook, tmp_path / "page.html", parameters(notebook, tmp_path), train_missing=False, progress=False
    )
    assert "not run (4 of 4)" in BeautifulSoup(page.read_text(), "html.parser").text
    assert not list(tmp_path.glob("runs/*/curve.csv"))
