"""Reports, end to end: a notebook with everything in it becomes a page that is safe and complete."""

import gc
import logging
import re
import sys
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from bs4 import BeautifulSoup
from matplotlib.figure import Figure

from ecmoe.config import ConfigError, RunConfig
from ecmoe.report import execution
from ecmoe.report import page as report
from ecmoe.report.execution import execute
from ecmoe.report.markup import math_html, table_html
from ecmoe.report.plots import Plot
from ecmoe.report.plots.style import COUNT_COLORS
from ecmoe.report.render import page_html, render, ways
from ecmoe.study.load import Study
from ecmoe.study.plan import Planned
from ecmoe.training.result import Result, not_run

EVIL = "<script>alert(1)</script>"


def notebook(*cells: tuple[str, str]):
    made = []
    for kind, source in cells:
        new = nbformat.v4.new_markdown_cell if kind == "md" else nbformat.v4.new_code_cell
        cell = new(source)
        if kind in ("parameters", "answer", "read"):
            cell.metadata["tags"] = [kind]
        made.append(cell)
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return nbformat.v4.new_notebook(cells=made, metadata={"kernelspec": kernel})


PARAMETERS = 'scale: str = "smoke"  # scale\nbase: dict = {}  # keys\nwidth: float = 1.0  # width\nfail: bool = False'
ANSWER = f"page.finding('It holds by 3 {EVIL}', 'two seeds')"
STUDY = f"""
import sys
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
if fail:
    raise ValueError("{EVIL} went wrong")
"""


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
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ECMOE_HOME", str(folder))
        good = execute(folder / "03_study.ipynb", folder / "03_study.html", files)
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


def test_the_first_and_the_last_page_have_one_neighbour(tmp_path):
    for name in ("01_a", "02_b_c", "10_d $x", "notes", "1_e"):
        (tmp_path / f"{name}.ipynb").touch()
    shown = {
        name: [(way["rel"], way["href"], way["text"]) for way in ways(tmp_path / f"{name}.ipynb")]
        for name in ("01_a", "02_b_c", "10_d $x", "notes")
    }
    first, last = ("prev", "01_a.html", "\u2190 01 A"), ("next", "10_d-20--24-x.html", "10 D $x \u2192")
    middle = "02_b_c.html"
    assert shown == {
        "01_a": [("next", middle, "02 B c \u2192")], "02_b_c": [first, last], "10_d $x": [("prev", middle, "\u2190 02 B c")], "notes": [],
    }  # fmt: skip


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


# Parts


@pytest.fixture
def shown(monkeypatch):
    """What a notebook would show, as one string of HTML."""
    pieces: list[str] = []
    monkeypatch.setattr("IPython.display.display", lambda data, raw: pieces.append(data["text/html"]))
    return pieces


def test_tables_are_escaped_and_missing_is_a_dash(shown):
    frame = pd.DataFrame(
        {
            "arm": [EVIL, "b"],
            "loss": [3.70149, np.nan],
            "tokens": [65_000_000, 1],
            "ok": [True, False],
            "t": [None, "x"],
        }
    )
    report.show_table(frame, "A <b>caption</b>", {"loss": ".2f"})
    soup = BeautifulSoup(shown[0], "html.parser")
    assert [[c.text for c in row.find_all(["th", "td"])] for row in soup.find_all("tr")] == [
        ["arm", "loss", "tokens", "ok", "t"],
        [EVIL, "3.70", "65,000,000", "yes", "–"],
        ["b", "–", "1", "no", "x"],
    ]
    assert soup.find("caption").text == "A <b>caption</b>"
    heads = [[cell["data-of"] for cell in row.find_all("td")] for row in soup.tbody.find_all("tr")]
    assert heads == [["loss", "tokens", "ok", "t"]] * 2  # which a phone shows beside each cell
    assert [h["scope"] for h in soup.find_all("th")] == ["col"] * 5 + ["row"] * 2
    assert "right" in soup.find_all("td")[0]["style"] and not soup.find_all("td")[2].get("style")
    assert "nowrap" in soup.find_all("td")[0]["style"] and "nowrap" not in soup.find_all("th")[1]["style"]
    with pytest.raises(ValueError, match=r"formats names \['lose'\]"):
        report.show_table(frame, formats={"lose": ".2f"})
    report.show_table(pd.DataFrame(columns=["a"]))
    assert "nothing" in shown[1]
    figure = Figure(figsize=(1, 1))
    figure.subplots()
    report.show(Plot(figure, "a line", frame), "A caption")
    assert BeautifulSoup(shown[2], "html.parser").find_all("td")[0].text.startswith("3.7")


@pytest.mark.parametrize(
    "seeds, said",
    [
        ([3.0, np.nan, 3.0], "Losses. Intervals: 95% over 3 seeds, each by itself."),
        ([2, 1, 3], "Losses. Intervals: 95% over 2 to 3 seeds, each by itself."),
        ([1, 1, 1], "Losses."),  # of one seed there is none
        (None, "Losses."),
    ],
)
def test_a_caption_says_what_intervals_are_and_over_how_many_seeds(shown, seeds, said):
    figure = Figure(figsize=(1, 1))
    figure.subplots()
    data = pd.DataFrame({"arm": ["a", "b", "c"]} | ({} if seeds is None else {"seeds": seeds}))
    report.show(Plot(figure, "a line", data), "Losses.")
    assert BeautifulSoup(shown[0], "html.parser").figcaption.text == said


def test_where_no_html_is_shown_stands_a_text(monkeypatch):
    given = []
    monkeypatch.setattr("IPython.display.display", lambda data, raw: given.append((data, raw)))
    figure = Figure(figsize=(1, 1))
    figure.subplots()
    report.show(Plot(figure, "a line", pd.DataFrame({"a": [1]})), "A caption.")
    report.show(Plot(None, "Loss: not run.", pd.DataFrame()), "A caption.")
    report.show_table(pd.DataFrame({"arm": ["x"], "b": [2]}))
    assert [(data["text/plain"], raw) for data, raw in given] == [
        ("A caption.\na line", True), ("Not run: A caption.", True), ("arm b x 2", True),
    ]  # fmt: skip


def test_columns_are_headed_as_one_writes_their_names():
    frame = pd.DataFrame([[0] * 5], columns=["gpu_hours", "gflops_per_token", "at_mfu", "embedding", "peak_mb"])
    heads = [head.text for head in BeautifulSoup(table_html(frame), "html.parser").thead.find_all("th")]
    assert heads == ["GPU hours", "GFLOPs per token", "at MFU", "embedding", "peak MB"]


def test_a_long_first_column_wraps_and_a_table_of_nothing_is_one():
    rows = BeautifulSoup(table_html(pd.DataFrame({"arm": ["C1", "EC-CF2 renormalized"]})), "html.parser")
    assert [th.get("class") for th in rows.tbody.find_all("th")] == [None, ["long"]]
    assert "nothing" in table_html(pd.DataFrame())


def test_numbers_are_written_by_their_size_whatever_their_sign_and_gaps_are_dashes():
    columns = {"loss": [-1234.5, 3.25], "count": pd.array([2, pd.NA], "Int64"), "share": [-0.25, 120.0]}
    page = BeautifulSoup(table_html(pd.DataFrame({"arm": ["a", "b"]} | columns)), "html.parser")
    cells = [[cell.text for cell in row.find_all("td")] for row in page.tbody.find_all("tr")]
    assert cells == [["-1,234", "2", "-0.2"], ["3", "\u2013", "120.0"]]


def test_the_source_of_a_formula_is_its_alternative_text():
    latex = r'a < b_{\text{"c"}}'
    for mode in ("inline", "block"):
        formula = BeautifulSoup(math_html(latex, mode), "html.parser").math
        assert (formula["alttext"], formula["display"]) == (latex, mode)


def test_where_nothing_was_run_a_line_says_so_not_rows_of_dashes(shown):
    empty = pd.DataFrame({"arm": ["a", "b"], "loss": [np.nan] * 2, "against": ["(not run)", None]})
    report.show_table(empty, "Losses", fold="all of them")
    page = BeautifulSoup(shown.pop(), "html.parser")  # who opens it sees its rows
    assert page.summary.text == "all of them" and len(page.find_all("tr")) == 3 and not page.find(class_="not-run")
    report.show_table(empty, "Losses")
    report.show_table(empty[:0], "Losses")
    report.show_table(empty.assign(loss=1.5), "Losses")
    assert "1.500" in shown.pop()
    for page in shown:
        assert BeautifulSoup(page, "html.parser").find(class_="not-run").text == "Not run: Losses"
    assert len(shown) == 2
    shown.pop()
    config = RunConfig(steps=10)
    run = {"name": config.name, "status": "finished", "seed": 0, "device": "H100"}

    def study(scale, *there):
        each = [config, config.replace(seed=1, steps=20)]  # of unequal sizes: what wasn't run says nothing of them
        planned = [Planned(one.name, one, ("13_gates",), ("a",), one.seed) for one in each]
        return Study("13_gates", scale, {}, planned, (), {"a": [Result(r) for r in there]})

    report.finding("a minus b is (not run).", study("gpu"))
    page = BeautifulSoup(shown[1], "html.parser")
    assert page.find(class_="badge").text == "not run" and "at scale gpu" in page.find(class_="said").text
    assert page.code.text == "ecmoe runs 13_gates --scale gpu --train"
    report.finding("a minus b is +0.1.", study("gpu", run))
    report.finding("a minus b is +0.1.", study("smoke", run))
    other = config.replace(seed=1, steps=20).name
    report.finding("a minus b is +0.1.", study("gpu", run, run | {"name": other, "seed": 1, "device": None}))
    all_done = shown.pop()
    assert "--train" not in all_done and "Rests on 2 runs of 20,480 to 40,960 tokens (seeds 0, 1) of " in all_done
    report.finding("a minus b is +0.1.", study("gpu", run, run | {"name": other, "seed": 1, "status": "diverged"}))
    assert "--train" in (broke_off := shown.pop()) and "Rests on 1 run of 20,480 tokens (seed 0) of " in broke_off
    report.finding("a minus b is (not run).", study("smoke"))
    nothing = BeautifulSoup(shown.pop(), "html.parser")
    assert nothing.find(class_="badge").text == "plumbing only" and not nothing.code
    labels = [BeautifulSoup(part, "html.parser").find(class_="badge").text for part in shown[2:]]
    assert labels == ["finding", "plumbing only"] and "--train" in shown[2] and "--train" not in shown[3]
    assert "Rests on 1 run of 20,480 tokens (seed 0) of " in shown[2] and "Rests on" not in shown[1] + shown[3]


def test_text_is_coloured_by_count_and_escaped(shown):
    report.show_text(["a", EVIL, "\n", " "], [1, 0, 12, 1], "A caption <b>")
    page = BeautifulSoup(shown[0], "html.parser")
    assert page.pre.text == f"a{EVIL}\u23ce\n " and not page.find_all(["script", "b"])
    one, none, many, _ = page.pre.find_all("span")
    assert [span["title"] for span in (one, none, many)] == ["1 expert", "0 experts", "12 experts"]
    colors = [f"background:{COUNT_COLORS[i]};" for i in (1, 0, 8)]  # 8 or more are one colour
    assert [color in span["style"] for color, span in zip(colors, (one, none, many), strict=True)] == [True] * 3
    assert "line-through" in none["style"] and "line-through" not in one["style"]
    assert [span.text.strip() for span in page.p.find_all("span")] == ["0 experts", "1 expert", "12 experts"]
    with pytest.raises(ValueError, match="longer"):
        report.show_text(["a"], [1, 2], "")
    report.show_text(["a", "b", "c"], [16, 8, 1], "")
    key = BeautifulSoup(shown[1], "html.parser").p.find_all("span")
    assert [span.text.strip() for span in key] == ["1 expert", "8 experts", "16 experts"]


def result(seed: int, **summary) -> Result:
    config = RunConfig(seed=seed)
    data = {
        "name": EVIL,
        "licence": "PSF",
        "digest": "ab" * 32,
        "train_tokens": 1000,
        "tokenizer": "bytes",
    }
    default = {"config": config.to_dict(), "name": config.name, "seed": seed, "status": "finished", "error": None,
               "commit": "abc", "code": "c0de", "device": "CPU", "precision": "32-true", "world_size": 1, "seconds": 1800.0,
               "versions": {"torch": "2.13.0"}, "started": "2026-01-02T03:04:05+00:00", "data": data}  # fmt: skip
    return Result(default | summary)


def study(*results: Result) -> Study:
    return Study("03_study", "smoke", {}, [], (), {"an arm": list(results)})


def test_provenance_names_what_differs_and_what_is_missing(shown):
    report.provenance(study(result(0), result(1)))
    text = BeautifulSoup(shown[0], "html.parser").text
    assert "Note:" not in text and "1.00 hours" in text and "torch 2.13.0" in text and "licence: PSF" in text
    assert EVIL in text and EVIL not in shown[0]
    lost = result(
        2,
        status="diverged",
        error="the loss is nan",
        device="NVIDIA H200",
        versions={"torch": "2.11.0"},
        data={"name": EVIL, "digest": "cd" * 32},  # another text of the same name
    )
    report.provenance(study(result(0), lost, not_run(RunConfig(seed=3))))
    page = BeautifulSoup(shown[1], "html.parser")
    text, rows = page.text, {row.th.text: row.td.text for row in page.table.find_all("tr") if row.th and row.td}
    assert "differ in device, versions, data." in text and "failed" not in rows
    assert rows["diverged"] == f"{RunConfig(seed=2).name}: the loss is nan"
    assert "1 of 3 runs" in text
    report.provenance(study(result(0, commit="def"), result(1, code="beef")))
    assert "differ in code." in shown[2]  # two commits whose code decides the same are no matter
    old = [result(0), result(1, commit="def")]
    for one in old:
        del one.summary["code"]  # of which nothing else is known
    report.provenance(study(*old))
    assert "differ in commit." in shown.pop()
    report.provenance(study(*old[:1]))
    assert "Note:" not in shown.pop()  # alone it differs from nothing
    report.provenance(study(not_run(RunConfig())))
    report.provenance(study())
    assert [len(BeautifulSoup(page, "html.parser").select("details table")) for page in shown] == [1, 1, 1, 0, 0]


def test_provenance_is_no_longer_than_what_it_says(shown):
    silent = {"licence": "not stated", "attribution": "not stated"}
    mix = {
        "name": "A + B",
        "licence": "a: not stated; b: not stated",
        "attribution": "a: not stated; b: not stated",
        "parts": [silent] * 2,
    }
    half = mix | {"name": "A + C", "licence": "a: not stated; c: CC", "parts": [silent, silent | {"licence": "CC"}]}
    started = "2026-03-04T00:00:00"
    texts = (mix, silent | {"name": "A"}, half, *[mix] * 5)
    report.provenance(study(*(result(i, started=started, commit=f"c{i}", data=text) for i, text in enumerate(texts))))
    rows = {row.th.text: row.td for row in BeautifulSoup(shown[0], "html.parser").table.find_all("tr")}
    assert [text.removesuffix("; digest unknown") for text in rows["data"].stripped_strings] == [
        "A + B; licence: not stated", "A + C; licence: a: not stated; c: CC", "A; licence: not stated",
    ]  # fmt: skip
    assert rows["trained"].text == "2026-03-04" and not rows["data"].details
    assert rows["commit"].summary.text == "8" and "c7" in rows["commit"].details.text


def test_provenance_has_all_that_numbers_come_from(shown):
    text = {"name": "a text", "attribution": "by somebody", "licence": "CC", "digest": "0123456789abcdef", "train_tokens": 12345,
            "tokenizer": "bpe", "vocab_size": 512}  # fmt: skip
    images = {"name": "images", "digest": "f" * 20, "train_images": 2000, "val_images": 300, "shape": [3, 8, 9]}
    runs = [
        result(2, tokens=1000, started="2026-03-04T00:00:00", data=text, world_size=2, seconds=300.0, tokens_per_second=2.5),
        result(0, tokens=2500, started="2026-01-02T00:00:00", data=images, versions={"torch": "2.13", "a": "1"}, seconds=3.0),
        result(1, status="failed", error=None, started=None, data=None, seconds=None, tokens=None),
    ]  # fmt: skip
    report.provenance(study(*runs), "Ours is <b>smaller</b>.")
    page = BeautifulSoup(shown[0], "html.parser")
    rows = {row.th.text: list(row.td.stripped_strings) for row in page.table.find_all("tr")}
    assert list(rows.items()) == list({
        "code": ["c0de"], "commit": ["abc"], "device": ["CPU"], "precision": ["32-true"], "versions": ["a 1, torch 2.13", "torch 2.13.0"],
        "data": ["a text; by somebody; licence: CC; 12,345 training tokens (bpe, vocabulary 512); digest 0123456789ab",
                 "images; licence: unknown; 2,000 training and 300 validation images (3 x 8 x 9); digest ffffffffffff"],
        "processes": ["2"], "seeds": ["0, 1, 2"], "training time": ["303 seconds"], "tokens trained on": ["3,500"],
        "trained": ["2026-01-02 to 2026-03-04"], "failed": [RunConfig(seed=1).name],
    }.items())  # fmt: skip
    assert "Ours is <b>smaller</b>." in page.text and "differ in versions, data." in page.text
    cells = [[cell.text for cell in row.find_all(["th", "td"])] for row in page.details.table.find_all("tr")]
    assert cells == [
        ["name", "seconds", "tokens", "tokens per second", "device", "commit"],
        [runs[0].summary["name"], "300", "1,000", "2.500", "CPU", "abc"],
        [runs[1].summary["name"], "3", "2,500", "–", "CPU", "abc"],
    ]


def test_runs_one_by_one_are_folded_and_those_that_are_missing_named(shown):
    columns = ["arm", "seed", "status", "val_loss", "lost"]
    rows = [
        ("b", 0, "not run", np.nan),
        ("a", 0, "finished", 1.5),
        ("a", 1, "not run", np.nan),
        ("a", 2, "not run", np.nan),
        ("b", 1, "finished", 2.5),
    ]
    table = pd.DataFrame(rows, columns=columns[:4])
    report.show_runs(table.assign(more=1), ["lost", "val_loss"], "Ends.")
    table.loc[1, "status"] = "diverged"
    report.show_runs(table, ["val_loss"])
    report.show_runs(table[table["status"] != "not run"], ["val_loss"], "Ends.")
    first, second, whole = (BeautifulSoup(part, "html.parser") for part in shown)
    assert (whole.summary.text, whole.caption.text) == ("2 of 2 runs, one by one", "Ends.")
    assert first.summary.text == second.summary.text == "2 of 5 runs, one by one"
    assert first.caption.text == "Ends. Not run: b (seed 0); a (seed 1, 2)."
    cells = [
        [[cell.text for cell in row.find_all(["th", "td"])] for row in part.find_all("tr")] for part in (first, second)
    ]
    assert cells[0] == [["arm", "seed", "lost", "val loss"], ["a", "0", "–", "1.500"], ["b", "1", "–", "2.500"]]
    said = [["a", "0", "diverged", "1.500"], ["b", "1", "finished", "2.500"]]
    assert cells[1] == [["arm", "seed", "status", "val loss"], *said]


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ([1.0, 2500.0], ["1", "2,500"]),
        ([1000.0, 0.5], ["1,000", "0.5"]),
        ([100.0, 0.5], ["100.0", "0.5"]),
        ([0.5, 2500.4], ["0.5", "2,500.4"]),  # what is there is no 0
        ([1.5, 2500.4], ["2", "2,500"]),
        ([0.0, 2500.4], ["0", "2,500"]),
        ([999.94, 0.1], ["999.9", "0.1"]),
        ([99.99, -0.5], ["99.990", "-0.500"]),
        ([1000.0, 2.6], ["1,000", "3"]),
        ([0.01, 0.002], ["0.010", "0.002"]),
        ([0.0099, np.nan], ["9.90e-03", "–"]),
        ([True, False], ["yes", "no"]),
        (["a", None], ["a", "–"]),
    ],
)
def test_numbers_are_written_by_the_size_of_their_column(values, texts):
    cells = BeautifulSoup(table_html(pd.DataFrame({"name": ["x", "y"], "v": values})), "html.parser").find_all("td")
    assert [cell.text for cell in cells] == texts


def test_a_column_is_written_as_it_is_asked_for():
    formats = {"share": "{:.1%} of all", "time": ".1f", "named": lambda x: f"<{x}>"}
    table = table_html(pd.DataFrame({"share": [0.25], "time": [3.0], "named": ["a"]}), formats=formats)
    cells = BeautifulSoup(table, "html.parser").tbody.find_all(["th", "td"])
    assert [cell.text for cell in cells] == ["25.0% of all", "3.0", "<a>"]


def test_provenance_says_where_runs_shared_a_device(shown):
    report.provenance(study(result(0), result(1, sharing=1)))
    report.provenance(study(result(0), result(1, sharing=3), result(2, sharing=3)))
    alone, shared = (BeautifulSoup(page, "html.parser") for page in shown)
    assert "shared a device" not in alone.text
    row = shared.find("th", string=re.compile("^runs that shared a device")).find_next("td")
    assert list(row.stripped_strings) == ["3"]
    columns = [[cell.text for cell in page.details.table.thead.find_all("th")] for page in (alone, shared)]
    assert "sharing" not in columns[0] and "sharing" in columns[1] and {"seconds", "tokens"} <= set(columns[0])
    assert len(shared.details.table.tbody.find_all("tr")) == 3 and "1,800" in shared.details.text


def test_markdown_math_is_left_alone_by_markdown():
    page = page_html(notebook(("md", "# T\n\n$a_i * b_i * c_i$ and $x < y$\n\n\\begin{align}a &= b\\end{align}")))
    soup = BeautifulSoup(page, "html.parser")
    assert not soup.find("em") and len(soup.find_all("math")) == 3
    assert "<mo>&lt;</mo>" in page or "&lt;" in str(soup.find_all("math")[1])


def test_what_a_cell_shows_comes_before_its_log_and_its_headings_are_in_the_contents():
    made = notebook(
        ("md", "## No title\n\nWords.\n\n# A `title`\n\n<b>What</b> it\nshows.\n\n### Deep\n\n#### Deeper"),
        ("code", "1"),
        ("code", "2"),
        ("md", "# Another title\n\nMore <kbd>words</kbd>."),
    )
    made.cells[2].metadata["tags"] = ["of mine", "try"]
    bar = {"application/vnd.jupyter.widget-view+json": {}, "text/plain": "a bar that has ended"}
    heading = {"text/html": '<h2 id="judged">How <i>it</i> was</h2>', "text/plain": "How"}
    made.cells[1].outputs = [
        nbformat.v4.new_output("stream", name="stderr", text="a log"), nbformat.v4.new_output("display_data", data=bar),
        nbformat.v4.new_output("display_data", data=heading), nbformat.v4.new_output("stream", name="stdout", text="said"),
    ]  # fmt: skip
    page = BeautifulSoup(page_html(made, error={"where": "x", "what": "y", "cell": 3}), "html.parser")
    assert (page.title.text, page.find("meta", {"name": "description"})["content"]) == ("A title", "Words.")
    first, second = page.find(id="cell-2"), page.find(id="cell-3")
    text = first.text
    assert text.index("How it was") < text.index("said") < text.index("a log") and "a bar" not in text
    assert [key.text for key in page.find_all("kbd")] == ["words"]  # as it was written, unescaped
    links = [(a["href"], a.text) for a in page.find("nav", class_="contents").find_all("a")]
    assert links == [("#no-title", "No title"), ("#deep", "Deep"), ("#judged", "How it was")]
    assert [("quiet" in cell["class"], cell.details.summary.text) for cell in (first, second)] == [
        (False, "log"),
        (True, "yours to change"),
    ]
    assert [cell.find("details", class_="code").has_attr("open") for cell in (first, second)] == [
        False,
        True,
    ]  # where it failed
    assert page.find("meta", {"name": "ecmoe-status"})["content"] == "failed" and "Report" in page_html(
        notebook(("md", ""))
    )


def test_headings_of_signs_have_an_address_and_tables_scroll(tmp_path):
    words = "# T\n\n## !!!\n\n## ???\n\n## A *b* (c)\n\n| a | b |\n|---|---|\n| 1 | 2 |"
    render(notebook(("md", words)), tmp_path / "reports/gpu/01_a.html", tmp_path / "notebooks/01 a.ipynb")
    page = BeautifulSoup((tmp_path / "reports/gpu/01_a.html").read_text(), "html.parser")
    assert [heading["id"] for heading in page.main.find_all("h2")] == ["section", "section-2", "a-b-c"]
    assert [td.text for td in page.find("div", class_="scroll").table.find_all("td")] == ["1", "2"]
    assert page.find("a", string="Notebook")["href"] == "../../notebooks/01%20a.ipynb"


def test_of_what_a_cell_shows_html_comes_before_a_picture():
    made = notebook(("md", "# T"), ("code", "1"))
    data = {"image/png": "iVBORw0KGgo=", "text/html": "<b>shown</b>", "text/plain": "plain"}
    made.cells[1].outputs = [nbformat.v4.new_output("display_data", data=data)]
    assert "<b>shown</b>" in (page := page_html(made)) and "image/png" not in page
    made.cells[1].outputs[0].data = {"image/svg+xml": "<svg id='other'/>", "text/latex": "$x$", "text/plain": "plain"}
    made.cells[1].outputs += [nbformat.v4.new_output("stream", name="stderr", text=text) for text in ("one,", " log")]
    page = BeautifulSoup(page_html(made), "html.parser")
    assert not page.find(id="other") and "plain" in page.main.text and not page.find("math")
    assert [log.pre.text.strip() for log in page.find_all("details", class_="log")] == ["one, log"]
    made.cells[1].outputs = made.cells[1].outputs[:1]
    for plain, alt in (("a 'plot'", "a 'plot'"), ("", "a figure")):
        made.cells[1].outputs[0].data = {"image/png": "iVBORw0KGgo=", "text/plain": plain}
        picture = BeautifulSoup(page_html(made), "html.parser").find("img")
        assert (picture["src"], picture["alt"]) == ("data:image/png;base64,iVBORw0KGgo=", alt)


def test_a_kernel_has_a_folder_of_its_own_as_long_as_it_lives(tmp_path, monkeypatch):
    errors = []
    for hook in ("unraisablehook", "excepthook"):
        monkeypatch.setattr(sys, hook, lambda *error: errors.append(error))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # which may be too long for a socket's path
    managers = [execution._ThisPython() for _ in range(2)]
    folders = [Path(manager.ip).parent for manager in managers]
    assert all(folder.is_dir() and folder.parent == Path("/tmp") for folder in folders) and folders[0] != folders[1]
    assert managers[0].kernel_spec.argv[1:] == [
        "-m", "ipykernel_launcher", "-f", "{connection_file}", "--log-level=50",
    ]  # fmt: skip
    assert {manager.transport for manager in managers} == {"ipc"} and managers[0].kernel_spec.argv[0] == sys.executable
    folders[1].rmdir()  # somebody else tidied up
    managers.clear()
    gc.collect()
    assert not any(folder.exists() for folder in folders) and not errors


def test_what_a_notebook_showed_before_its_kernel_died_is_on_the_page(tmp_path):
    cells = [("code", "print('so', 'far')"), ("code", "import os; os._exit(1)")]
    nbformat.write(notebook(*cells), tmp_path / "a.ipynb")
    with pytest.raises(ConfigError, match=r"a\.ipynb failed: DeadKernelError"):
        execute(tmp_path / "a.ipynb", tmp_path / "a.html")
    page = BeautifulSoup((tmp_path / "a.failed.html").read_text(), "html.parser")
    assert page.find(id="cell-1").pre.text.strip() == "so far" and not page.find("a", string="Go to the cell")


@pytest.mark.parametrize("begun", [True, False])
def test_a_kernel_that_dies_leaves_a_page_of_what_was_done(begun, tmp_path, monkeypatch, capsys):
    def dies(source, executed, values, *, on_cell_start, cwd, kernel_name, **more):
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
        execute(
            tmp_path / "01_a.ipynb", tmp_path / "01_a.html", [tmp_path / "a.yaml"], parameters={"width": 2.0},
            train_missing=False,  # which this notebook doesn't have
        )  # fmt: skip
    assert capsys.readouterr().err == "[01_a] cell 2/3\n"  # of code; one more will hold the parameters
    assert logging.getLogger("papermill").level == logging.ERROR  # its warnings aren't for who runs a page
    assert not (tmp_path / "01_a.html").exists() and (tmp_path / "01_a.failed.html").exists() == begun
    if begun:
        page = BeautifulSoup((tmp_path / "01_a.failed.html").read_text(), "html.parser")
        assert (
            page.title.text == "The title" and "RuntimeError: no memory" in page.find("section", class_="failed").text
        )


@pytest.mark.parametrize("asked", [None, True, False])
def test_a_notebook_that_has_the_parameter_is_told_whether_to_train(asked, tmp_path, monkeypatch):
    def run(source, executed, values, *, cwd, **_):
        given.append((values, cwd))
        nbformat.write(source, executed)

    given = []
    monkeypatch.setattr("papermill.execute_notebook", run)
    cells = [("md", "# T"), ("parameters", "train_missing: bool = True\nwidth: float = 1.0")]
    nbformat.write(notebook(*cells), tmp_path / "a.ipynb")
    (tmp_path / "new/pages/a.failed.html").parent.mkdir(parents=True)
    (tmp_path / "new/pages/a.failed.html").touch()
    page = execute(
        str(tmp_path / "a.ipynb"), str(tmp_path / "new/pages/a.html"), parameters={"width": 2.0}, train_missing=asked
    )
    told = {"width": 2.0} | ({} if asked is None else {"train_missing": asked})
    assert given == [(told, tmp_path)]  # the notebook's folder, wherever the page goes
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


def test_an_arm_that_cannot_be_is_named_at_the_scale_that_was_asked_for(tmp_path, monkeypatch):
    def of_page(*asked):
        raise ConfigError(f"{asked} can't be")

    monkeypatch.setattr(execution, "of_page", of_page)
    monkeypatch.setattr(execution.paths, "configs", lambda: tmp_path)
    (tmp_path / "scale").mkdir()
    for name in ("01_a", "scale/gpu", "scale/smoke"):
        (tmp_path / f"{name}.yaml").write_text("{}")
    nbformat.write(notebook(("md", "# The title"), ("parameters", PARAMETERS)), tmp_path / "01_a.ipynb")
    for given in ({"scale": "gpu"}, {}):
        with pytest.raises(ConfigError, match=f"'01_a', '{given.get('scale', 'smoke')}', {given}.*can't be"):
            execute(tmp_path / "01_a.ipynb", tmp_path / "01_a.html", parameters=given)
    assert "can't be" in BeautifulSoup((tmp_path / "01_a.failed.html").read_text(), "html.parser").text


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
