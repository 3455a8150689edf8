"""From a notebook to its page, end to end: with everything in it the page is safe and complete; one that fails leaves a page, too."""

import io
import json
import logging
import os
import pty
import re
import signal
import sys
from pathlib import Path

import nbformat
import pytest
from bs4 import BeautifulSoup

from ecmoe.config import ConfigError
from ecmoe.report import execution
from ecmoe.report.execution import execute
from ecmoe.report.render import page_html
from tests.report.notebooks import EVIL, notebook

PARAMETERS = 'scale: str = "smoke"  # scale\nbase: dict = {}  # keys\nwidth: float = 1.0  # width\nfail: bool = False'
ANSWER = f"page.finding('It holds by 3 {EVIL}', 'two seeds')"
STUDY = f"""
import json
import sys
from pathlib import Path
import ipykernel
import pandas as pd
from matplotlib.figure import Figure
from ecmoe.report import page
from ecmoe.report.plots import Plot
figure = Figure(figsize=(2, 1)); figure.subplots().plot([1, 2])
frame = pd.DataFrame({{"text": ["{EVIL}"], "n": [3]}})
print("{EVIL}")
print("a line of the log", file=sys.stderr)
page.show(Plot(figure, 'rises from "1" to 2 {EVIL}', frame), "A caption {EVIL}")
page.show_table(frame, "Words")
print(sys.executable, base, width)
connection = json.loads(Path(ipykernel.get_connection_file()).read_text())
print(repr(connection["transport"]), repr(connection["ip"]))
if fail:
    raise ValueError("{EVIL} went wrong")
"""


@pytest.fixture(autouse=True)
def heard():
    """SIGINT isn't ignored, as it is in a script's background jobs."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The same notebook executed twice, well and badly: text of the pages, folder, error."""
    folder = tmp_path_factory.mktemp("reports")
    intro = "# The title\n\nWhat it shows, with $S \\in R^{n \\times e}$.\n\n## Part one\n\n$$k = n c / e$$\n\n## Part one\n\n## End"
    for name in ("02_before", "03_study", "04_other"):
        cells = [("md", intro), ("parameters", PARAMETERS), ("code", STUDY), ("answer", ANSWER)]
        nbformat.write(notebook(*cells), folder / f"{name}.ipynb")
    (folder / "a.yaml").write_text("scale: gpu\nwidth: 2.0\nbase: {steps: 1, seed: 2}\n")
    (folder / "b.yaml").write_text("base: {steps: 3}\n")
    files = [folder / "a.yaml", folder / "b.yaml"]
    (folder / "03_study.failed.html").touch()  # of an earlier call
    (long := folder / ("long" * 30)).mkdir()  # too long for the path of a socket
    access = os.access
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ECMOE_HOME", str(folder))
        patch.setattr("tempfile.tempdir", str(long))
        good = execute(folder / "03_study.ipynb", folder / "03_study.html", files)
        patch.setattr("tempfile.tempdir", "/var/tmp")
        patch.setattr(execution.os, "access", lambda path, mode: path != "/tmp" and access(path, mode))
        with pytest.raises(ConfigError) as failure:
            execute(
                folder / "04_other.ipynb",
                folder / "04_other.html",
                files,
                parameters={"fail": True},
            )
    return (
        good.read_text(),
        (folder / "04_other.failed.html").read_text(),
        folder,
        str(failure.value),
    )


def test_a_page_sends_no_request_and_runs_no_script(pages):
    for page in pages[:2]:
        soup = BeautifulSoup(page, "html.parser")
        assert not soup.find("script") and not re.search(r"\bon\w+\s*=\s*[\"']", page.split("<body>")[0])
        for element in soup.find_all(src=True):
            assert element["src"].startswith("data:")
        for element in soup.find_all("link"):
            assert element["href"].startswith("data:")
        assert "@import" not in page and not re.search(r"url\((?!#)", page)  # a clip path of this page, at most
        policy = soup.find("meta", {"http-equiv": "Content-Security-Policy"})["content"]
        assert "default-src 'none'" in policy and "script-src" not in policy
        away = {a["href"] for a in soup.find_all("a") if ":" in a["href"]}
        assert away == {"https://arxiv.org/abs/2202.09368"}


def test_a_page_leads_to_its_neighbours_and_its_notebook(pages):
    soup = BeautifulSoup(pages[0], "html.parser")
    assert [(a["rel"], a["href"], a.text) for a in soup.nav.find_all("a", rel=["prev", "next"])] == [
        (["prev"], "02_before.html", "\u2190 02 Before"), (["next"], "04_other.html", "04 Other \u2192"),
    ]  # fmt: skip
    assert soup.find("a", string="Notebook")["href"] == "03_study.ipynb"
    assert soup.find("a", string="Search")["href"] == "index.html#search"
    assert soup.find("a", string="Contents")["href"] == "#contents" and soup.find(id="contents")


def test_the_answer_comes_first_and_code_after_what_it_shows(pages):
    soup = BeautifulSoup(pages[0], "html.parser")
    order = [cell["id"] for cell in soup.find_all("div", class_="cell")]
    assert order == ["cell-1", "cell-5", "cell-2", "cell-3", "cell-4"]  # the injected parameters are the third
    study = soup.find(id="cell-4")
    assert study.find("figure").sourceline < study.find("details", class_="code").sourceline
    read = page_html(notebook(("md", "# T"), ("read", "1 + 1")))
    assert BeautifulSoup(read, "html.parser").find("details", class_="code").has_attr("open")


def test_text_from_data_is_escaped_everywhere(pages):
    for page in pages[:2]:
        assert EVIL not in page
        assert page.count("&lt;script&gt;alert(1)") >= 5  # stdout, alt, caption, table, error or code


def test_a_figure_has_alt_caption_and_numbers(pages):
    soup = BeautifulSoup(pages[0], "html.parser")
    assert soup.find("svg")["aria-label"] == f'rises from "1" to 2 {EVIL}' and soup.find("svg")["role"] == "img"
    assert soup.find("figcaption").text == f"A caption {EVIL}"
    assert soup.find("details", class_="numbers").find("td").text == "3"


def test_a_page_has_title_contents_and_folded_code(pages):
    soup = BeautifulSoup(pages[0], "html.parser")
    assert soup.title.text == "The title" and soup.html["lang"] == "en"
    assert soup.find("meta", {"name": "description"})["content"].startswith("What it shows")
    links = [a["href"] for a in soup.find("nav", class_="contents").find_all("a")]
    assert links == ["#part-one", "#part-one-2", "#end"] and all(soup.find(id=link[1:]) for link in links)
    assert [d.find("summary").text for d in soup.find_all("details", class_="code")] == [
        "code", "parameters and their defaults", "parameters of this report", "code",
    ]  # fmt: skip
    assert not any(d.has_attr("open") for d in soup.find_all("details"))
    assert soup.find("details", class_="log").find("pre").text.strip() == "a line of the log"


def test_formulas_are_mathml(pages):
    soup = BeautifulSoup(pages[0], "html.parser")
    shown = [(m["display"], m["alttext"]) for m in soup.find_all("math")]
    assert shown == [
        ("inline", "S \\in R^{n \\times e}"),
        ("block", "k = n c / e"),
    ]
    assert "$" not in soup.find("p").text


def test_parameters_reach_a_kernel_of_this_python(pages):
    assert f"{sys.executable} {{'steps': 3, 'seed': 2}} 2.0" in BeautifulSoup(pages[0], "html.parser").text


def test_a_failed_notebook_names_its_cell_and_leaves_a_page(pages):
    good, bad, folder, message = pages
    assert "04_other.ipynb, cell 4 failed: ValueError" in message and "went wrong" in message
    assert not (folder / "04_other.html").exists()  # else it would be taken for done
    assert not (folder / "03_study.failed.html").exists()
    soup = BeautifulSoup(bad, "html.parser")
    section = soup.find("section", class_="failed")
    assert "went wrong" in section.text and soup.find(id="cell-4").find("details", class_="code").has_attr("open")
    assert section.find("a")["href"] == "#cell-4" and "Traceback" in soup.find(id="cell-4").text
    assert "An Exception was encountered" not in soup.text  # papermill's own note
    assert BeautifulSoup(good, "html.parser").find("section", class_="failed") is None


def test_a_kernel_opens_no_port_and_has_a_folder_of_its_own_as_long_as_it_lives(pages):
    told = [re.search(r"'(ipc|tcp)' '(.+?)/kernel'", BeautifulSoup(page, "html.parser").text) for page in pages[:2]]
    folders = [Path(one[2]) for one in told]
    assert {one[1] for one in told} == {"ipc"} and folders[0] != folders[1]
    assert not any(folder.exists() for folder in folders)
    assert [str(folder.parent) for folder in folders] == ["/tmp", "/var/tmp"]  # the latter where /tmp can't be written
    assert execution._ThisPython().kernel_spec.argv == [
        sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}", "--log-level=50",
    ]  # fmt: skip


def test_a_notebook_that_trains_shows_its_bar_on_the_terminal_and_not_on_the_page(tmp_path, monkeypatch):
    trains = "from ecmoe.study.progress import progress_bar\nwith progress_bar(40) as bar:\n    bar.update(40)\nprint('trained')"
    nbformat.write(notebook(("code", trains)), tmp_path / "a.ipynb")
    screen, terminal = pty.openpty()
    with open(terminal, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        page = execute(tmp_path / "a.ipynb", tmp_path / "a.html")
        shown = ""
        while "40/40" not in shown:  # a terminal gives what it has so far
            shown += os.read(screen, 10_000).decode()
    os.close(screen)
    assert "[a] cell 1/1" in shown
    assert "trained" in page.read_text() and "40/40" not in page.read_text()


def test_what_a_notebook_showed_before_its_kernel_died_is_on_the_page(tmp_path):
    cells = [("code", "print('so', 'far')"), ("code", "import os; os._exit(1)")]
    nbformat.write(notebook(*cells), tmp_path / "a.ipynb")
    with pytest.raises(ConfigError, match=r"a\.ipynb failed: DeadKernelError"):
        execute(tmp_path / "a.ipynb", tmp_path / "a.html")
    page = BeautifulSoup((tmp_path / "a.failed.html").read_text(), "html.parser")
    assert page.find(id="cell-1").pre.text.strip() == "so far" and not page.find("a", string="Go to the cell")


@pytest.mark.parametrize("begun", [True, False])
def test_a_kernel_that_dies_leaves_a_page_of_what_was_done(begun, tmp_path, monkeypatch, capsys):
    def dies(source, executed, values, *, on_cell_start, cwd, kernel_name, config, **more):
        assert (cwd, kernel_name, values) == (tmp_path, "python3", {"width": 2.0})
        same = {"language": "python", "progress_bar": False, "stderr_file": sys.stderr, "start_timeout": 180}
        assert more == same | {"kernel_manager_class": execution._ThisPython}
        for number, cell in enumerate(source.cells):
            on_cell_start(cell=cell, cell_index=number)
        if begun:
            nbformat.write(source, executed)
        raise RuntimeError("no memory")

    monkeypatch.setattr("papermill.execute_notebook", dies)
    logging.getLogger("papermill").setLevel(logging.NOTSET)
    nbformat.write(notebook(("md", "# The title"), ("parameters", PARAMETERS)), tmp_path / "01_a.ipynb")
    (tmp_path / "a.yaml").write_text("width: 1.5\n")
    with pytest.raises(ConfigError, match=r"01_a\.ipynb failed: RuntimeError: no memory"):
        execute(tmp_path / "01_a.ipynb", tmp_path / "01_a.html", [tmp_path / "a.yaml"], parameters={"width": 2.0})
    assert capsys.readouterr().err == "[01_a] cell 2/3\n"  # of code; one more will hold the parameters
    assert logging.getLogger("papermill").level == logging.ERROR  # its warnings aren't for who runs a page
    assert not (tmp_path / "01_a.html").exists() and (tmp_path / "01_a.failed.html").exists() == begun
    if begun:
        page = BeautifulSoup((tmp_path / "01_a.failed.html").read_text(), "html.parser")
        assert (
            page.title.text == "The title" and "RuntimeError: no memory" in page.find("section", class_="failed").text
        )


def test_a_page_lies_where_it_is_asked_for_and_leads_to_its_notebook(tmp_path, monkeypatch):
    def run(source, executed, values, *, cwd, **_):
        given.append((values, cwd))
        nbformat.write(source, executed)

    given = []
    monkeypatch.setattr("papermill.execute_notebook", run)
    cells = [("md", "# T"), ("parameters", "train_missing: bool = True\nwidth: float = 1.0")]
    nbformat.write(notebook(*cells), tmp_path / "a.ipynb")
    (tmp_path / "new/pages/a.failed.html").parent.mkdir(parents=True)
    (tmp_path / "new/pages/a.failed.html").touch()
    page = execute(str(tmp_path / "a.ipynb"), str(tmp_path / "new/pages/a.html"), parameters={"width": 2.0})
    assert given == [({"width": 2.0}, tmp_path)]  # the notebook's folder, wherever the page goes
    assert page == tmp_path / "new/pages/a.html" and [path.name for path in page.parent.iterdir()] == ["a.html"]
    assert BeautifulSoup(page.read_text(), "html.parser").find("a", string="Notebook")["href"] == "../../a.ipynb"


def test_a_page_makes_its_folders(tmp_path, monkeypatch):
    def run(source, executed, values, *, cwd, **_):
        nbformat.write(source, executed)
        assert cwd == tmp_path  # the notebook's, also where its name is given from there

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("papermill.execute_notebook", run)
    nbformat.write(notebook(("md", "# T")), tmp_path / "a.ipynb")
    assert execute("a.ipynb", "reports/new/a.html") == Path("reports/new/a.html")
    assert (tmp_path / "reports/new/a.html").exists()


@pytest.mark.parametrize("text", ["# A README\n", "[]", "{}"])
def test_what_is_no_notebook_is_named(text, tmp_path):
    (tmp_path / "README.md").write_text(text)
    with pytest.raises(ConfigError, match=r"README\.md can't be read .*: it must be a notebook"):
        execute(tmp_path / "README.md", tmp_path / "out" / "o.html")
    assert not (tmp_path / "out/o.html").exists()
    failed = BeautifulSoup((tmp_path / "out/o.failed.html").read_text(), "html.parser")  # which the list of pages names
    assert failed.title.text == "README" and "must be a notebook" in failed.find("section", class_="failed").text
    with pytest.raises(ConfigError):
        execute(tmp_path / "absent.ipynb", tmp_path / "out" / "absent.html")
    assert not (tmp_path / "out/absent.failed.html").exists()


def test_parameters_that_cannot_be_read_are_named_by_their_file(tmp_path):
    nbformat.write(notebook(("md", "# T")), tmp_path / "a.ipynb")
    (tmp_path / "bad.yaml").write_text("seeds: [\n")
    with pytest.raises(ConfigError, match=r"bad\.yaml' can't be read"):
        execute(tmp_path / "a.ipynb", tmp_path / "a.html", [tmp_path / "bad.yaml"])
    assert "bad.yaml" in BeautifulSoup((tmp_path / "a.failed.html").read_text(), "html.parser").text


def test_a_parameter_has_a_name_that_python_can_set(tmp_path):
    nbformat.write(notebook(("md", "# T")), tmp_path / "a.ipynb")
    with pytest.raises(ConfigError, match=r"base\.steps=30: .* keys of runs belong to base, as in base=\{steps: 3\}"):
        execute(tmp_path / "a.ipynb", tmp_path / "a.html", parameters={"base.steps": 30})


def test_a_failed_page_that_cannot_be_written_hides_no_error(tmp_path, capsys):
    nbformat.write(notebook(("md", "# T")), tmp_path / "a.ipynb")
    (tmp_path / "file").touch()  # where the page's folder should be
    with pytest.raises(ConfigError, match="base=3 must hold"):
        execute(tmp_path / "a.ipynb", tmp_path / "file" / "a.html", parameters={"base": 3})
    assert f"{tmp_path}/file/a.failed.html can't be written: " in capsys.readouterr().err


def test_a_page_takes_the_place_of_no_other_kind_of_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    nbformat.write(notebook(("md", "# T")), "a.ipynb")
    before = Path("a.ipynb").read_bytes()
    for page, said in (("a.ipynb", "must end in .html, such as a.html"), ("a", "such as a.html"), ("", "is a folder")):
        with pytest.raises(ConfigError, match=said):
            execute("a.ipynb", page)
    assert Path("a.ipynb").read_bytes() == before and os.listdir() == ["a.ipynb"]


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_signal_ends_the_kernel_too(number, error, tmp_path):
    """The kernel asks for it in the middle of a cell."""
    asks = f"""
import json, os, time, ipykernel
from pathlib import Path
file = ipykernel.get_connection_file()
Path("told").write_text(json.dumps([os.getpid(), file, json.loads(Path(file).read_text())["ip"]]))
os.kill(os.getppid(), {int(number)})
time.sleep(60)
"""
    nbformat.write(notebook(("code", asks)), tmp_path / "a.ipynb")
    before = signal.getsignal(number)
    with pytest.raises(error) as ended:
        execute(tmp_path / "a.ipynb", tmp_path / "a.html")
    assert signal.getsignal(number) is before and (error is KeyboardInterrupt or ended.value.code == 143)
    kernel, connection, sockets = json.loads((tmp_path / "told").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(kernel, 0)
    assert not Path(connection).exists() and not Path(sockets).parent.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.ipynb", "told"]


@pytest.mark.parametrize("moment", ["cell 1/1", "in the cell"])
def test_a_signal_where_python_ignores_exceptions_still_lets_the_kernel_save_and_ends_it(moment, tmp_path, monkeypatch):
    class Ignoring:
        def __del__(self):
            signal.raise_signal(signal.SIGTERM)

    class Screen(io.StringIO):
        def write(self, text):
            if moment in text:
                Ignoring()
            return len(text)

    saves = """
import sys, time
from pathlib import Path
try:
    print("in the cell", file=sys.stderr, flush=True)
    time.sleep(8)
except KeyboardInterrupt:
    time.sleep(1)
    Path("saved").touch()
"""
    nbformat.write(notebook(("code", saves)), tmp_path / "a.ipynb")
    monkeypatch.setattr(sys, "stderr", Screen())
    with pytest.raises(SystemExit, match="143"):
        execute(tmp_path / "a.ipynb", tmp_path / "a.html")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.ipynb", "saved"]


def test_an_ignored_ctrl_c_stays_ignored(tmp_path, monkeypatch):
    def run(source, executed, values, **_):
        signal.raise_signal(signal.SIGINT)
        nbformat.write(source, executed)

    monkeypatch.setattr("papermill.execute_notebook", run)
    nbformat.write(notebook(("md", "# T")), tmp_path / "a.ipynb")
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert execute(tmp_path / "a.ipynb", tmp_path / "a.html").exists()
    finally:
        signal.signal(signal.SIGINT, before)


def test_what_a_signal_ends_has_no_failed_page_and_a_second_signal_does_not_wait(tmp_path, monkeypatch):
    def run(source, executed, values, **_):
        nbformat.write(source, executed)
        for _ in range(number := next(signals)):
            signal.raise_signal(signal.SIGINT)
        waited.append(number)
        raise RuntimeError("its processes have got a signal, too")

    signals, waited = iter((1, 2, 0)), []
    monkeypatch.setattr("papermill.execute_notebook", run)
    nbformat.write(notebook(("md", "# T")), tmp_path / "a.ipynb")
    for error in (KeyboardInterrupt, KeyboardInterrupt, ConfigError):
        assert os.listdir(tmp_path) == ["a.ipynb"]
        with pytest.raises(error):
            execute(tmp_path / "a.ipynb", tmp_path / "a.html")
    assert waited == [1, 0] and (tmp_path / "a.failed.html").exists()
