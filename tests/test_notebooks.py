"""Every notebook runs from its first cell to its last, with its smoke parameters and runs of a few steps."""

import ast
import contextlib
import html
import io
import re
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pandas as pd
import pytest
import yaml
from bs4 import BeautifulSoup

from ecmoe.report.render import page_html
from ecmoe.study import speed
from ecmoe.study.parameters import merge_parameters, parameter_files

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
OWN_MODEL = "15_your_own_model"  # which it trains itself, whatever the results are
# 512 tokens a batch: as many as the largest pool of 09_causality, and a whole k for all experts.
TINY = {
    "layers": 2, "d_model": 16, "d_ff": 32, "heads": 2, "sequence_length": 32, "batch_size": 16, "max_bytes": 400_000,
    "steps": 4, "warmup_steps": 2, "eval_every": 2, "eval_batches": 2,
}  # fmt: skip


def parameters(notebook: Path, folder: Path) -> dict:
    """The notebook's own at smoke, and what makes its runs tiny."""
    files = [ROOT / "configs/scale/smoke.yaml", ROOT / f"configs/{notebook.stem}.yaml", folder / "tiny.yaml"]
    tiny = {"base": TINY, "seeds": [0]}
    overlay = ROOT / f"configs/scale/smoke/{notebook.stem}.yaml"
    if overlay.exists():
        own = yaml.safe_load(overlay.read_text())
        if "base" in own:  # sizes of its own
            tiny["base"] = own["base"] | {k: TINY[k] for k in ("steps", "warmup_steps", "eval_every")}
        tiny = own | tiny
    if notebook.stem == "11_continual_learning":
        tiny["base"] = {"steps": 3, "gate_steps": 3}
    if notebook.stem == "07_fine_tuning":
        tiny["measures"] = {"fine-tuned": {"task": ["lines"], "steps": 2, "batch_size": 4, "examples": 12}}
    if notebook.stem == "08_step_time":
        tiny["repeats"] = 2
    files[2].write_text(yaml.safe_dump(tiny))
    return merge_parameters(files)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Of all pages: arms that they share are trained once."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def page(home, monkeypatch, pytestconfig):
    """A notebook and its parameters -> its page, as HTML; not with --quick.

    Cells run in this process, where everything is imported already: a kernel for each notebook would spend most of its time
    on that. What a kernel adds is tried in tests/report/test_execution.py.
    """
    if pytestconfig.getoption("--quick"):
        pytest.skip("runs a notebook")
    monkeypatch.setenv("ECMOE_HOME", str(home))
    monkeypatch.setattr("ecmoe.study.parameters._CHECKED", set())

    def made(notebook: Path, values: dict) -> BeautifulSoup:
        shown, there = nbformat.read(notebook, as_version=4), {}
        for cell in shown.cells:
            if cell.cell_type != "code":
                continue
            outputs, streams = [], {"stdout": io.StringIO(), "stderr": io.StringIO()}
            monkeypatch.setattr("IPython.display.display", lambda data, raw, to=outputs: to.append(data))
            with contextlib.redirect_stdout(streams["stdout"]), contextlib.redirect_stderr(streams["stderr"]):
                exec(compile(cell.source, notebook.name, "exec"), there)
            cell.outputs = [nbformat.v4.new_output("display_data", data=data) for data in outputs]
            cell.outputs += [
                nbformat.v4.new_output("stream", name=name, text=text.getvalue())
                for name, text in streams.items()
                if text.getvalue()
            ]
            if "parameters" in cell.metadata.get("tags", ()):
                there.update(values)
        return BeautifulSoup(page_html(shown), "html.parser")

    return made


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_and_shows_what_it_found(notebook, page, home, tmp_path):
    soup = page(notebook, parameters(notebook, tmp_path))
    assert not re.search(r"Traceback|Warning:|not run", soup.text, re.IGNORECASE)
    answer = soup.find("section", class_="answer")
    assert answer.find(class_="said").text and answer.find_parent(class_="cell").find("figure")
    if notebook.stem not in ("00_routing", OWN_MODEL):  # which are the same at every scale
        assert answer.find(class_="badge").text == "plumbing only"
    for figure in soup.find_all("svg"):
        assert len(figure["aria-label"]) > 40
    headings = {heading.text for heading in soup.select("thead th")}
    assert not [name for name in headings if re.fullmatch(r"|index|level \d", name)]  # names that pandas gives
    if "page.show_runs(" in notebook.read_text():
        (runs,) = [line.text for line in soup.find_all("summary") if line.text.endswith("runs, one by one")]
        assert runs.split()[0] == runs.split()[2] != "0"
    assert not (home / "reports").exists()  # which the pipeline alone writes


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_answer_stands_in_one_cell_below_a_short_opening(notebook):
    cells = nbformat.read(notebook, as_version=4).cells
    (answer,) = [cell for cell in cells if "answer" in cell.metadata.get("tags", [])]
    assert re.search(r"page\.(answer|finding)\(", answer.source) and "page.show(" in answer.source
    assert len(cells[0].source.partition("\n\n")[2]) < 650, "the verdict would stand too far down"


def test_redrawn_without_training_it_says_what_is_missing(page, tmp_path, monkeypatch):
    monkeypatch.setenv("ECMOE_HOME", str(tmp_path))
    notebook = ROOT / "notebooks/04_capped_experts.ipynb"
    text = page(notebook, parameters(notebook, tmp_path) | {"train_missing": False}).text
    assert "0 of 5 runs, one by one" in text and "any of 5 runs" in text and "Not run: " in text
    assert not list(tmp_path.glob("runs/*/curve.csv"))


def test_drawn_for_an_arm_of_ones_own_it_says_that_what_it_compares_is_missing(page, tmp_path, monkeypatch):
    monkeypatch.setenv("ECMOE_HOME", str(tmp_path))
    notebook = ROOT / "notebooks/02_load_balance.ipynb"
    own = {"arms": {"mine": {"capacity_factor": 1.0}}, "sweep": [], "train_missing": False}
    text = page(notebook, parameters(notebook, tmp_path) | own).text
    assert "0 of 1 runs, one by one" in text and "whose auxiliary loss has weight ?" in text


def seen(soup: BeautifulSoup) -> tuple[list[str], list[float]]:
    """What a reader sees of a page, but for code and links: the lines of its text and figures, and the decimal numbers in them."""
    for aside in soup.main.select("nav, .quiet, details.code, details.log"):
        aside.decompose()
    for cell in soup.main.select(".cell"):
        del cell["id"]  # the pipeline's pages have a cell more, of their parameters
    lines = [line for line in str(soup.main).splitlines() if line.strip()]
    numbers = re.compile(r"\d+\.\d+(?:e-?\d+)?")
    return [numbers.sub("#", line) for line in lines], [float(x) for line in lines for x in numbers.findall(line)]


@pytest.mark.parametrize("notebook", [path for path in NOTEBOOKS if path.stem != OWN_MODEL], ids=lambda path: path.stem)
def test_the_committed_page_is_what_the_committed_results_give(notebook, page, monkeypatch):
    """Who changes what a page says or draws, knowing or not, sees it here; `make report SCALE=gpu` writes the pages anew."""
    monkeypatch.setenv("ECMOE_HOME", str(ROOT))
    values = merge_parameters(parameter_files(notebook.stem, "gpu"))
    values |= {"train_missing": False} if "train_missing" in notebook.read_text(encoding="utf-8") else {}
    committed = BeautifulSoup((ROOT / f"reports/gpu/{notebook.stem}.html").read_text(encoding="utf-8"), "html.parser")
    (text, numbers), (written, given) = (seen(soup) for soup in (page(notebook, values), committed))
    assert text == written
    np.testing.assert_allclose(numbers, given, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_committed_page_shows_the_code_of_its_notebook(notebook):
    """Which `seen` leaves out, so that a cell may have changed while its page stayed."""
    page = (ROOT / f"reports/gpu/{notebook.stem}.html").read_text(encoding="utf-8")
    blocks = re.findall(r'<details class="code".*?<pre>(.*?)</pre>', page, re.DOTALL)
    code = [html.unescape(re.sub(r"<[^>]+>", "", block)).strip() for block in blocks]
    shown = [text for text in code if not text.startswith("# Parameters\n")]  # the pipeline's own cell
    cells = nbformat.read(notebook, as_version=4).cells
    assert sorted(shown) == sorted(cell.source.strip() for cell in cells if cell.cell_type == "code")


TRIED = {path.stem: path for path in NOTEBOOKS if "mine = {}" in path.read_text(encoding="utf-8")}
# What of the arms is shown where it isn't their loss.
SHOWN = {
    "07_fine_tuning": ({"lowest_first": False}, ["accuracy"]),
    "10_vision": ({}, ["accuracy"]),
    "11_continual_learning": ({}, ["final_accuracy"]),
}


@pytest.mark.parametrize("name", TRIED)
def test_what_a_reader_tries_is_shown_beside_what_is_there(name, monkeypatch):
    """The cell tagged `try`, with its functions replaced by ones that tell what they are given; left as it is, it does nothing."""
    (cell,) = [
        cell.source for cell in nbformat.read(TRIED[name], as_version=4).cells if "try" in cell.metadata.get("tags", [])
    ]
    shown, timed, study = [], [], "the study"
    there = {
        "study": study, "table": lambda study: study, "average": lambda found: found,
        "beside": lambda of, mine: SimpleNamespace(measured=lambda what: (what, of, mine)) if name == "07_fine_tuning" else (of, mine),
        "plots": SimpleNamespace(final_loss=lambda frame, *columns, **keys: (frame, columns, keys), share_of_floor=lambda frame: frame),
        "page": SimpleNamespace(show=lambda plot, caption: shown.append((plot, caption))), "speed": speed,
    }  # fmt: skip
    row = {"layer": "EC-CF2", "variant": "", "path": "plain", "mode": "eager", "what": "forward", "ms": 1.0}
    monkeypatch.setattr("ecmoe.bench.layer.bench_layer", lambda **sizes: timed.append(sizes) or pd.DataFrame([row]))
    exec(cell, there)
    assert not shown
    exec(cell.replace("mine = {}", "mine = {'n': 4}", 1), there)
    ((plot, caption),) = shown
    if name == "08_step_time":
        assert timed == [{"n": 4}] and plot.to_dict("records") == [row | {"name": "EC-CF2", "size": "yours"}]
        return
    keys, columns = SHOWN.get(name, ({}, []))
    given = ("fine-tuned", study, {"n": 4}) if name == "07_fine_tuning" else (study, {"n": 4})
    assert plot == (given, tuple(columns), keys) and "Your" in caption


def assigned(source: str) -> set[str]:
    """The names that code assigns to, at any depth."""
    nodes = ast.walk(ast.parse(source))
    return {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_parameters_are_known_at_every_scale_and_keep_their_values(notebook):
    """Who runs a cell again reads the parameters again, not what another cell has made of them."""
    cells = [cell for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "code"]
    (parameters,) = [assigned(cell.source) for cell in cells if "parameters" in cell.metadata.get("tags", ())]
    for scale in ("smoke", "gpu", "paper"):
        assert parameters <= {"train_missing", *merge_parameters(parameter_files(notebook.stem, scale))}
    for cell in cells:
        if "parameters" not in cell.metadata.get("tags", ()):
            assert not assigned(cell.source) & parameters


@pytest.mark.parametrize("name", ["00_routing", "08_step_time", OWN_MODEL])
def test_the_first_cells_may_be_run_again(name, monkeypatch):
    """By when the names that the notebook has defined are among its parameters."""
    monkeypatch.setattr("ecmoe.study.parameters._CHECKED", set())
    parameters, loads = nbformat.read(ROOT / f"notebooks/{name}.ipynb", as_version=4).cells[1:3]
    there: dict = {}
    for _ in range(2):
        exec(parameters.source, there)
        there["train_missing"] = False
        exec(loads.source, there)


WRONG = {
    "an unknown name": ("factor=4", "has no parameter 'factor'"),
    "an unknown name in capitals": ("SEEDS=[4]", "has no parameter 'SEEDS' (given: [4]): did you mean seeds?"),
    "text for a boolean": ("train_missing='false'", "train_missing='false' must be a bool"),
    "a number for a list": ("seeds=3", "seeds=3 must be a list"),
    "an unknown scale": ("scale='gpuu'", "scale='gpuu': must be one of"),
    "an unknown arm": ("arms=['EC-CF2 renormalised']", "did you mean EC-CF2 renormalized"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_parameter_of_plain_papermill_stops_before_anything_trains(name, tmp_path, monkeypatch):
    """The cells before the answer, as papermill and Lab run them: parameters, those that were given, what is loaded."""
    monkeypatch.setenv("ECMOE_HOME", str(tmp_path))
    monkeypatch.setattr("ecmoe.study.parameters._CHECKED", set())
    given, said = WRONG[name]
    cells = nbformat.read(ROOT / "notebooks/03_capacity_factor.ipynb", as_version=4).cells
    there: dict = {}
    exec(cells[1].source, there)
    exec(given, there)
    with pytest.raises(ValueError, match=re.escape(said)):
        exec(cells[2].source, there)
    assert not (tmp_path / "runs").exists() and not (tmp_path / "reports").exists()
