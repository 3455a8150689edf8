"""Pages in a real browser: on a phone and a desk, in the dark and on paper, by keyboard, and without a network."""

from dataclasses import replace

import nbformat
import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot

from ecmoe.report import index as index_module
from ecmoe.report import page, plots
from ecmoe.report.render import render
from tests.report.browser import CHROMIUM, Browser
from tests.study.known import CENTRE, judged, losses, seeds

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on the PATH (Debian: apt install chromium): pages are not tried in a browser"
)
INTRO = "# A title of a page that is long enough to need two lines on a phone\n\nWhat it is about, in a sentence or two.\n\n| router | weight | in evaluation |\n|---|---|---|\n| c | of_more_letters_than_fit | of_more_letters_than_fit |\n| d | e | |"


def show_something():
    arms, seeds = ("EC-CF2 renormalized", "GShard top-2 raw", "Dense"), range(3)
    rows = [(arm, seed, 4 + len(arm) / 100 + seed / 1e3) for arm in arms for seed in seeds]
    frame = pd.DataFrame(rows, columns=["arm", "seed", "val_loss"])
    said = "Expert choice ends 0.020 nats below GShard top-2 (0.015 to 0.025; 3 seeds)."
    page.finding(said, "9 runs of 52 million tokens")
    page.show(plots.final_loss(frame), "A caption that is long enough to be wrapped on a phone, and on a desk, too.")
    wide = pd.concat([frame] * 4, axis=1).set_axis([f"a_long_name_{i}" for i in range(12)], axis=1)
    page.show_table(wide, "A wide table")
    said = {"what": ["prompt", *["more"] * 12], "value": ["Once upon a time " * 20, *["of it"] * 12]}
    page.show_table(pd.DataFrame(said), "A long table")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two pages as notebooks leave them, and the index over them and over claims of known verdicts."""
    folder = tmp_path_factory.mktemp("pages")
    shown = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("IPython.display.display", lambda data, raw: shown.append(data))
        show_something()
    outputs = [nbformat.v4.new_output("display_data", data=data) for data in shown]
    for name in ("01_one", "02_two"):
        cells = [
            nbformat.v4.new_markdown_cell(INTRO),
            nbformat.v4.new_code_cell("1 + 1", outputs=outputs, metadata={"tags": ["answer"]}),
            nbformat.v4.new_code_cell("# " + "x" * 118, metadata={"tags": ["read"]}),
        ]
        cells += [
            nbformat.v4.new_markdown_cell(f"## Part {i}\n\nSome words on capacity {'and more ' * 60}.")
            for i in range(5)
        ]
        if name == "02_two":
            cells.append(nbformat.v4.new_markdown_cell("## Capacity\n\nThe last part."))
        nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / f"{name}.ipynb")
    for name in ("01_one", "02_two"):
        render(nbformat.read(folder / f"{name}.ipynb", 4), folder / f"{name}.html", source=folder / f"{name}.ipynb")
    ahead = {"EC-CF2 renormalized": seeds(3.58), "EC-CF2 raw": seeds(3.58)}
    longest = judged("C1", losses(**CENTRE | ahead))  # the longest label: in direction in 2 of 4 parts
    found = {
        "C1": judged("C1", {}),
        "C6": judged("C6", losses(**{"EC-CF2 renormalized": seeds(3.60), "Hash modulo": seeds(3.62)})),
        "C9": replace(longest, about=replace(longest.about, id="C9")),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_module, "judge_all", lambda scale: found)
        index_module.index("gpu", folder)
    return folder


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("browser")) as tab:
        yield tab


def top(tab, selector: str) -> float:
    return tab.js(f"document.querySelector({selector!r}).getBoundingClientRect().top")


PAGES = ["01_one.html", "index.html"]


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("width", [390, 1280])
def test_no_sideways_scroll_and_every_badge_is_seen(folder, tab, name, width):
    tab.open(folder / name, width)
    assert tab.js("document.documentElement.scrollWidth") <= width
    boxes = tab.js(
        "[...document.querySelectorAll('main .badge')].filter(b => b.checkVisibility({contentVisibilityAuto: true})).map(b => b.getBoundingClientRect()).map(b => [b.left, b.right])"
    )
    assert len(boxes) >= 1 and all(left >= 0 and right <= width for left, right in boxes)
    cells = tab.js("[...document.querySelectorAll('main td')].map(e => e.getBoundingClientRect().right)")
    assert max(cells) <= width or width > 600  # on a phone a table of many columns is a list
    labels = tab.js(
        "[...document.querySelectorAll('figure svg text')].map(t => parseFloat(getComputedStyle(t).fontSize) * Math.hypot(t.getScreenCTM().a, t.getScreenCTM().b))"
    )
    assert min(labels) >= 8  # pixels: small, and still read


def test_on_a_phone_each_cell_of_a_list_has_the_name_of_its_column(folder, tab):
    labels = "[...document.querySelectorAll('table')].map(t => [...t.querySelectorAll('td')].map(c => getComputedStyle(c, '::before').content))"
    tab.open(folder / "01_one.html", 390)
    assert tab.js(labels)[0] == ['"router: "', '"weight: "', '"in evaluation: "'] * 2
    assert tab.js("[...document.querySelectorAll('td:empty')].map(e => e.checkVisibility())") == [False]
    tab.open(folder / "01_one.html", 1280)
    assert set(tab.js(labels)[0]) == {"none"}


def test_the_answer_comes_first(folder, tab):
    tab.open(folder / "01_one.html", 1280)
    assert top(tab, ".badge") <= 600 and top(tab, "figure") <= 1400
    tab.open(folder / "index.html", 1280)
    assert top(tab, ".tally") <= 600 and top(tab, "figure") <= 1400


@pytest.mark.parametrize("width", [390, 1200, 1280])
def test_what_a_claim_unfolds_to_has_the_width_of_the_page(folder, tab, width):
    tab.open(folder / "index.html", width)
    tab.js("document.querySelectorAll('.claims details').forEach(one => one.open = true)")
    lines = (
        "[...document.querySelectorAll('.claims details details > summary')].map(e => e.getBoundingClientRect().height)"
    )
    assert tab.js(lines) and max(tab.js(lines)) <= 2 * 26  # lines
    beyond = tab.js("[...document.querySelectorAll('.claims .scroll')].map(e => e.scrollWidth - e.clientWidth)")
    assert len(beyond) > 4 and max(beyond) <= 0  # no column of a table is cut off


@pytest.mark.parametrize("name", PAGES)
def test_no_request_leaves(folder, tab, name):
    tab.open(folder / name, 1280)
    tab.js("window.scrollTo(0, 1e5)")
    assert [address for address in tab.asked if not address.startswith("data:")] == [(folder / name).resolve().as_uri()]


@pytest.mark.parametrize("name", PAGES)
def test_what_can_be_opened_is_reached_by_keyboard_and_the_focus_is_seen(folder, tab, name):
    tab.open(folder / name, 1280)
    tab.press("Tab")
    assert (
        tab.js("document.activeElement.className") == "skip"
        and tab.js("document.activeElement.getBoundingClientRect().left") >= 0
    )
    reached = set()
    for _ in range(60):
        tab.press("Tab")
        reached.add(tab.js("document.activeElement.tagName + ' ' + document.activeElement.className"))
    assert {"SUMMARY ", "A "} <= reached and {"DIV plot", "DIV scroll"} & reached
    tab.js("document.querySelector('main summary').focus()")
    assert tab.js("getComputedStyle(document.activeElement).outlineStyle") != "none"
    tab.press("Enter")
    assert tab.js("document.activeElement.parentElement.open") is True


def test_in_the_dark_figures_are_no_white_slabs(folder, tab):
    tab.open(folder / "01_one.html", 1280, dark=True)
    paper = tab.js("getComputedStyle(document.documentElement).backgroundColor")
    assert paper == "rgb(22, 25, 29)"
    whites = (
        "[...document.querySelectorAll('svg *')].filter(e => getComputedStyle(e).fill == 'rgb(255, 255, 255)').length"
    )
    assert tab.js(whites) == 0
    assert tab.js("getComputedStyle(document.querySelector('svg text')).fill") == "rgb(227, 230, 234)"  # the page's ink


def test_on_paper_nothing_is_cut_off(folder, tab):
    for name in PAGES:
        tab.open(folder / name, 720, media="print")
        assert tab.js("document.documentElement.scrollWidth") <= 720
        assert tab.js("getComputedStyle(document.querySelector('nav.top')).display") == "none"
        assert tab.js("getComputedStyle(document.querySelector('main .badge')).color") == "rgb(0, 0, 0)"
        wide = tab.js(
            "[...document.querySelectorAll('main table, main svg, main .badge')].map(e => e.getBoundingClientRect().right)"
        )
        assert max(wide) <= 722


def test_code_that_is_meant_to_be_read_is_whole_on_a_desk_and_on_paper(folder, tab):
    code = "[...document.querySelectorAll('details.code')].map(e => e.checkVisibility() && [e.open, e.querySelector('pre').scrollWidth <= e.querySelector('pre').clientWidth + 1])"
    tab.open(folder / "01_one.html", 1280)
    assert [seen for seen in tab.js(code) if seen[0]] == [[True, True]]  # 120 columns
    tab.open(folder / "01_one.html", 720, media="print")
    assert [seen for seen in tab.js(code) if seen] == [[True, True]]  # and nothing that is folded


def test_on_paper_numbers_and_short_words_stay_whole_and_short_tables_on_one_sheet(folder, tab):
    tab.open(folder / "01_one.html", 720, media="print")
    lines = """[...document.querySelectorAll('main .scroll :is(td[style], tbody th:not(.long))')].map(
        cell => { const range = document.createRange(); range.selectNodeContents(cell); return range.getClientRects().length })"""
    assert len(tab.js(lines)) > 9 and set(tab.js(lines)) == {1}
    breaks = "[...document.querySelectorAll('table')].map(table => [table.tBodies[0].rows.length, getComputedStyle(table).breakInside])"
    assert {(rows > 12, how) for rows, how in tab.js(breaks)} == {(False, "avoid"), (True, "auto")}
    heads = "[...document.querySelectorAll('thead, caption, h2')].map(head => getComputedStyle(head).breakAfter)"
    assert set(tab.js(heads)) == {"avoid"}  # no head at the end of a sheet


@pytest.mark.parametrize("dark", [False, True])
def test_a_shadow_says_that_a_figure_goes_on_to_the_right(folder, tab, tmp_path, dark):
    def at_the_edge(width: int, scrolled: int = 0) -> float:
        """How far the median colour of the frame's last column is from that of the page below it."""
        tab.open(folder / "01_one.html", width, dark=dark)
        tab.js(
            f"document.querySelector('.plot').scrollIntoView(); document.querySelector('.plot').scrollLeft = {scrolled}"
        )
        top, right, bottom = tab.js(
            "(r => [r.top, r.right, r.bottom])(document.querySelector('.plot').getBoundingClientRect())"
        )
        tab.picture(tmp_path / "page.png", whole=False)
        picture = pyplot.imread(tmp_path / "page.png")[..., :3]
        edge, below = picture[int(top) + 1 : int(bottom) - 1, int(right) - 2], picture[int(bottom) + 4]
        edge, paper = (np.median(part, axis=0) for part in (edge, below))
        return float(abs(edge - paper).max())

    assert at_the_edge(390) > 0.1
    assert at_the_edge(390, scrolled=1000) < 0.02  # its end
    assert at_the_edge(1280) < 0.02  # there is no more


def test_the_search_finds_words_of_every_page(folder, tab):
    tab.open(folder / "index.html", 1280)
    tab.js("document.getElementById('words').focus()")
    for letter in "capac":
        tab.do("Input.insertText", text=letter)
    found = tab.js("[...document.querySelectorAll('.hits a')].map(a => a.getAttribute('href'))")
    assert {"01_one.html#part-0", "02_two.html#part-4"} <= set(found)
    assert found[0] == "02_two.html#capacity"  # whose heading has it
    assert tab.js("document.querySelectorAll('.hits small')[1].textContent").startswith("Some words on capacity")
    tab.do("Input.insertText", text=" nowhere")
    assert "No page has" in tab.js("document.querySelector('.hits').textContent")


@pytest.mark.parametrize(("width", "breaks"), [(390, "normal"), (1280, "nowrap")])
def test_how_many_runs_there_are_stands_in_one_line_where_there_is_room(folder, tab, width, breaks):
    tab.open(folder / "index.html", width)
    cells = "[...document.querySelectorAll('td[data-of=runs]')]"
    assert set(tab.js(f"{cells}.map(cell => getComputedStyle(cell).whiteSpace)")) == {breaks}
