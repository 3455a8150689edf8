"""From cells and their outputs to HTML: what comes in which order, which headings lead where."""

import nbformat
from bs4 import BeautifulSoup

from ecmoe.report.render import page_html, render, ways
from tests.report.notebooks import notebook


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
