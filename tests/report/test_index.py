"""All claims at a glance, and what pages rest on: distinct runs, what is missing, what they cost."""

import base64
import dataclasses
import hashlib
import json
import re
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
from bs4 import BeautifulSoup
from matplotlib.colors import to_hex

from ecmoe import paths
from ecmoe.config import RunConfig
from ecmoe.report import index
from ecmoe.report.answer import found
from ecmoe.report.markup import COLORS
from ecmoe.report.plots.style import PAPER
from ecmoe.study.answer import answer
from ecmoe.training.result import Result, not_run, write_record
from tests.study.known import CENTRE, judged, losses, seeds

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
        "EC: {}\nEC again: {}\nGShard: {router: token_choice, capacity_factor: 1.0, gate: renormalized}\n"
    )
    (configs / "01_a.yaml").write_text("arms: [EC]\nseeds: [0]\n")
    (configs / "02_b.yaml").write_text("arms: [EC, GShard]\nseeds: [0, 1, 2]\n")
    (configs / "03_c.yaml").write_text("arms: [ECC]\n")  # plans nothing
    (configs / "04_d.yaml").write_text("arms: [EC, EC again]\nseeds: [0, 2]\n")  # the same runs by two names
    monkeypatch.setattr(paths, "configs", lambda: configs)
    lost = finished(EC.replace(seed=1), 60)
    lost.summary["status"] = "diverged"
    for result in (finished(EC, 1800), lost, finished(TOP2.replace(seed=1), 900)):
        write_record(paths.results("gpu", "runs") / f"{result.summary['name']}.json", result)
    yield


def test_every_page_says_what_is_missing(pages):
    page = BeautifulSoup(index.studies_html("gpu", {"02_b": "02_b.failed.html"}), "html.parser")
    assert "make reproduce SCALE=gpu" in page.caption.text and not page.find("details")
    assert [[cell.text for cell in row.find_all(["th", "td"])] for row in page.tbody.find_all("tr")] == [
        ["01_a", "1 of 1", ""],
        ["02_b", "3 of 6", "GShard (seed 0, 2); EC (seed 2)"],  # one that diverged is a finding
        ["04_d", "1 of 2", "EC (seed 2)"],
    ]
    assert [a["href"] for a in page.find_all("a")] == ["02_b.failed.html"]  # the other isn't there yet
    (paths.configs() / "scale/smoke.yaml").write_text("scale: smoke\nbase: {}\n")
    assert "\u201cmake reproduce\u201d trains" in index.studies_html("smoke", {})


@pytest.mark.parametrize(("arm", "folded"), [("x" * 94, False), ("x" * 95, True)])  # 119 characters, and 120
def test_a_long_list_of_what_is_missing_is_folded(pages, arm, folded):
    arms = paths.configs() / "arms.yaml"
    arms.write_text(f"{arms.read_text()}{arm}: {{gate: renormalized}}\nother: {{gate: scaled}}\n")
    (paths.configs() / "01_a.yaml").write_text(f"arms: [EC, {arm}, other]\nseeds: [0]\n")
    cell = BeautifulSoup(index.studies_html("gpu", {}), "html.parser").find(attrs={"data-of": "missing"})
    missing = f"{arm} (seed 0); other (seed 0)"
    assert bool(cell.details) == folded and missing in cell.text
    assert not folded or (cell.summary.text, cell.details.text) == ("2 arms", f"2 arms{missing}")


# Claims

HASH = {"EC-CF2 renormalized": seeds(3.60), "Hash modulo": seeds(3.62)}


@pytest.fixture(scope="module")
def verdicts():
    """Two claims of which one was run, and one of a ratio that is 1."""
    claims = {"C1": judged("C1", {}), "C6": judged("C6", losses(**HASH))}
    return claims | {"C2": judged("C2", {}, bench={"even": [1.0, 1.002, 0.998, 1.001]})}


def test_a_tally_a_line_a_claim_and_parts_that_unfold(verdicts):
    page = BeautifulSoup(
        index.scoreboard_html("gpu", verdicts, {"05_other_routers": "05_other_routers.failed.html"}),
        "html.parser",
    )
    assert {li.span.text: li.text.split()[-1] for li in page.find(class_="tally").find_all("li")} == {
        "reproduced": "1", "no effect": "1", "not run": "1",
    }  # fmt: skip
    figure, effects = page.figure, index.effects(verdicts)
    assert figure.svg["aria-label"] == effects.alt and figure.figcaption.text == index.caption()
    numbers = figure.find_next("details", class_="numbers").tbody.find_all("tr")
    assert len(numbers) == len(effects.data) == 2
    lines = page.find(class_="claims").find_all("li", recursive=False)
    assert [line["id"] for line in lines] == ["C1", "C6", "C2"] and not any(
        line.details.has_attr("open") for line in lines
    )
    assert [line.summary.find(class_="badge").text for line in lines] == ["not run", "reproduced", "no effect"]
    assert "EC-CF2 needs fewer steps" in lines[0].summary.text and verdicts["C6"].sentence in lines[1].text
    assert [a["href"] for a in page.find_all("a")] == ["05_other_routers.failed.html"]  # there are no other pages


def test_all_effects_on_one_scale_are_turned_to_the_papers_side(verdicts):
    plot = index.effects(verdicts)
    assert [ax.get_ylim() for ax in plot.figure.axes] == [(0.5, -0.5)] * 2  # half a row's place around a row
    assert all(ax.get_xlabel().startswith("right of 0: agrees with the paper") for ax in plot.figure.axes)
    for ax, (unit, of) in zip(plot.figure.axes, plot.data.groupby("unit"), strict=True):
        bars, *marks = ax.collections
        marks = marks[: len(of)]
        assert [bar.tolist() for bar in bars.get_segments()] == [
            [[r.low, i], [r.high, i]] for i, r in enumerate(of.itertuples())
        ]
        assert [mark.get_offsets()[0].tolist() for mark in marks] == [[mean, i] for i, mean in enumerate(of["mean"])]
        colors = [to_hex(color) for color in bars.get_edgecolor()]
        assert colors == [to_hex(color) for mark in marks for color in mark.get_facecolor()]
        assert colors == [COLORS[label].lower() for label in of["label"]] and ax.get_title() == unit
        assert [tick.get_text().replace("\n", " ") for tick in ax.get_yticklabels()] == of["name"].tolist()
        assert all(len(line) < 43 for tick in ax.get_yticklabels() for line in tick.get_text().split("\n"))
        assert ax.xaxis.get_major_formatter()(0.01, 0) == "0.01" and ax.get_lines()[0].get_xdata() == [0, 0]
    c1 = index.effects(verdicts | {"C1": judged("C1", losses(**CENTRE))}).figure
    assert c1.axes[0].get_gridspec().get_height_ratios() == [6.5, 2.5]  # as many rows in nats, and one in percent
    assert c1.get_size_inches()[1] > plot.figure.get_size_inches()[1] + 4 * 0.2
    [legend] = plot.figure.legends
    named = {
        text.get_text(): handle.get_facecolor()
        for text, handle in zip(legend.texts, legend.legend_handles, strict=True)
    }
    assert list(named) == [label for label in COLORS if label in set(plot.data["label"])]
    assert all(to_hex(color[0]) == COLORS[label].lower() for label, color in named.items())
    shown = plot.data.set_index("name")
    assert shown.loc["C6 modulo against EC-CF2", "mean"] == pytest.approx(0.02)  # the paper: hash above
    assert shown.loc["C2 even routing, each on its best path", ["mean", "unit"]].tolist() == [
        pytest.approx(0.025, abs=1e-3),
        "percent",
    ]
    assert not shown.index.str.startswith("C1").any()
    said = [
        f"{row.name} {row.mean:.3f} ({row.low:.3f} to {row.high:.3f}), {row.label}"
        for row in plot.data.itertuples(index=False)
    ]
    assert all(one in plot.alt for one in said) and {"reproduced", "no effect"} <= set(plot.data["label"])
    below = index.effects({"C9": judged("C9", losses(**{"EC-CF2 renormalized": seeds(3.6), "Dense": seeds(3.7)}))})
    row = below.data.set_index("name").loc["C9 loss against the twin of equal width"]
    assert row["mean"] == pytest.approx(0.1) and row["low"] <= row["mean"] <= row["high"]  # the paper: EC below
    wide = judged("C9", losses(**{"EC-CF2 renormalized": seeds(3.6), "Dense": seeds(3.7, 0.01)}))
    low, high = wide.parts[0].interval
    row = index.effects({"C9": wide}).data.set_index("name").loc[f"C9 {wide.parts[0].name}"]
    assert (row["low"], row["high"]) == (-high, -low) and row["high"] - row["low"] > 0.01
    half = index.effects({"C1": judged("C1", losses(**CENTRE))})  # the paper: at or below
    assert half.data.set_index("name").loc["C1 half the steps, renormalized gates", "mean"] == pytest.approx(-0.099)
    assert half.figure.axes[0].get_xlim()[1] > 0.099  # the largest is seen, beside smaller ones
    shares = {"share_1": 0.4, "share_2": 0.3, "share_3": 0.14, "share_4": 0.08} | dict.fromkeys(
        ("share_5", "share_6", "share_7", "share_8"), 0.005
    )
    near = index.effects(
        {"C7": judged("C7", {"EC-CF2 renormalized": {of: seeds(x, 0.001) for of, x in shares.items()}})}
    )
    assert near.data["mean"].tolist() == pytest.approx(
        [20.0, -1.0, -1.0]
    )  # over 50%; from 23% and 3%, whose side is neither
    assert near.data["name"].tolist() == [
        "C7 one or two experts (above 50%)",
        "C7 three or four (0: the paper's 23%)",
        "C7 more than four (0: the paper's 3.0%)",
    ]
    assert (near.data["low"] < near.data["mean"]).all() and set(near.data["unit"]) == {"percent"}
    assert index.effects({"C1": verdicts["C1"]}).figure is None
    level = judged("C6", losses(**dict.fromkeys(("EC-CF2 renormalized", "Hash modulo"), seeds(3.6))))
    mostly = index.effects({"one": level, "other": level, "C6": verdicts["C6"]})
    assert mostly.alt.count("C6 modulo against EC-CF2 0.000 (0.000 to 0.000), no effect") == 2  # of no size at all
    part = dataclasses.replace(verdicts["C6"].parts[0], says="near", figure=0.0, neutral=0.5)
    assert index._to_the_papers_side(part, 0.25, 0.1, 0.4) == (0.25, 0.1, 0.4)  # the figure is 0, and not nothing
    two = judged("C6", losses(**{"EC-CF2 renormalized": seeds(3.6), "Hash modulo": seeds(3.62, noise=0.03)}))
    left, right = index.effects({"C6": verdicts["C6"], "wide": two, "C9": verdicts["C6"]}).figure.axes[0].get_xlim()
    assert left == -right and right < 0.1  # one wide interval doesn't squeeze the rest
    alone = index.effects({"wide": two})
    low, high = alone.data.loc[0, ["low", "high"]]
    assert alone.figure.axes[0].get_xlim()[1] > max(-low, high) > 0.04  # whole, where all are as wide
    turned = judged("C6", losses(**{"EC-CF2 renormalized": seeds(3.6), "Hash modulo": seeds(3.58)}))
    (ax,), (other,) = (index.effects({"C6": one}).figure.axes for one in (verdicts["C6"], turned))
    assert ax.get_xlim() == pytest.approx(other.get_xlim())  # for and against the paper alike
    assert ax.xaxis.get_transform().linthresh == other.xaxis.get_transform().linthresh == 0.01


def shape(mark) -> list:
    return mark.get_paths()[0].vertices.tolist()


def test_verdicts_of_effects_differ_in_their_marks_too():
    gone = {"Dense": seeds(3.6), "Dense equal FLOPs": seeds(3.5)}  # no effect, and contradicted
    verdicts = {
        "C6": judged("C6", losses(**HASH)),
        "C9": judged("C9", losses(**{"EC-CF2 renormalized": seeds(3.6)} | gone)),
        "wide": judged("C6", losses(**HASH | {"Hash modulo": seeds(3.62, noise=0.03)})),
    }
    plot = index.effects(verdicts)
    (legend,) = plot.figure.legends
    marks = {text.get_text(): shape(handle) for text, handle in zip(legend.texts, legend.legend_handles, strict=True)}
    assert {"reproduced", "no effect", "contradicted", "undecided"} == set(marks)
    assert not any(one == other for one, other in combinations(marks.values(), 2))
    drawn = [mark for ax in plot.figure.axes for mark in ax.collections[1:] if len(mark.get_offsets())]
    assert [shape(mark) for mark in drawn] == [marks[label] for label in plot.data["label"]]


def test_what_puts_a_part_in_direction_is_an_open_mark_in_its_row():
    ahead = {"EC-CF2 renormalized": seeds(3.58), "EC-CF2 raw": seeds(3.58)}
    verdict = judged("C1", losses(**CENTRE | ahead))
    plot = index.effects({"C1": verdict})
    (ax,), rows = plot.figure.axes, plot.data.set_index("name")
    assert list(rows.index[:4]) == [
        "C1 half the steps, renormalized gates", "C1 all steps, renormalized gates",
        "C1 half the steps, raw gates", "C1 all steps, raw gates",
    ]  # fmt: skip
    of = {part.name: part for part in verdict.parts}["all steps, renormalized gates"]
    shown = rows.loc["C1 all steps, renormalized gates"]
    assert shown["label"] == of.label and shown["mean"] == pytest.approx(-of.effect.value) and shown["mean"] > 0
    assert len(ax.get_yticks()) == len(rows) - 2 == 4 and ax.get_ylim() == (3.5, -0.5)
    half, whole, *_ = marks = [mark for mark in ax.collections[1:] if len(mark.get_offsets())]
    assert [mark.get_offsets()[0, 1] for mark in marks] == [0, 0, 1, 1, 2, 3]
    assert shape(half) == shape(whole)
    (color,), (paper,) = half.get_facecolor(), whole.get_facecolor()
    assert to_hex(color) == to_hex(whole.get_edgecolor()[0]) == COLORS["reproduced in direction"]
    assert to_hex(paper) == PAPER and "beside" not in plot.data
    *_, legend = plot.figure.legends[0].texts
    assert legend.get_text().startswith("open: ")
    contradicted = index.effects({"C1": judged("C1", losses(**CENTRE))})
    assert contradicted.figure.get_figheight() == plot.figure.get_figheight()  # of as many rows
    assert len(contradicted.data) == 4 and "open" not in str([text for text in contradicted.figure.legends[0].texts])


def test_names_of_effects_that_take_two_lines_leave_each_other_room():
    c9, longest = judged("C9", losses(**CENTRE)), "causal loss of one sequence minus that of pools by position"
    c9 = replace(c9, parts=tuple(replace(part, name=longest) for part in c9.parts))
    figure = index.effects(dict.fromkeys("abcdef", c9)).figure
    figure.draw_without_rendering()
    labels = figure.axes[0].get_yticklabels()
    assert all("\n" in label.get_text() for label in labels) and len(labels) > 1
    boxes = [label.get_window_extent() for label in labels]
    assert all(upper.y0 >= lower.y1 for upper, lower in pairwise(boxes))


def row_of(part) -> str:
    return (
        f"| {part.name} | {found(part)} | {part.effect.sample if part.effect.n else 0} | {part.rule} | {part.label} |"
    )


def test_the_readme_has_a_line_for_each_claim_and_github_a_page(verdicts):
    lines = index.markdown("claims", verdicts, "gpu").splitlines()
    assert len(lines) == 2 + len(verdicts)
    assert (
        lines[3]
        == "| [C6](reports/gpu/scoreboard.md#c6) | hash routing, one expert per token, is worse than EC-CF2, two on average | reproduced |"
    )
    text = index.markdown("scoreboard", verdicts, "gpu")
    assert "## C6\n\n**reproduced.**" in text and "| modulo against EC-CF2 | +0.020 nats" in text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    heads = "| part | found | seeds | reproduced if | verdict |"
    assert rows == [
        row for verdict in verdicts.values() for row in (heads, *map(row_of, verdict.deciding))
    ]  # no others
    assert "To run it: `ecmoe runs 01_convergence --scale gpu --train`" in text
    unrecorded = {"C7": judged("C7", {"EC-CF2 renormalized": {"val_loss": seeds(3.6)}})}
    told = index.markdown("scoreboard", unrecorded, "gpu")
    assert f"\n\n{unrecorded['C7'].sentence}\n\n" in told and "To run it" not in told
    assert f"{verdicts['C6'].sentence} Rests on {verdicts['C6'].rests_on}." in text
    (part,) = verdicts["C6"].deciding
    split = {"C6": replace(verdicts["C6"], parts=(replace(part, name="a | b"),))}
    assert "\n| a \\| b | +0.020 nats" in index.markdown("scoreboard", split, "gpu")


def test_a_label_of_some_parts_alone_says_so_wherever_claims_are_listed():
    verdicts, said = {"C1": judged("C1", losses(**CENTRE))}, "contradicted in 2 of 4 parts"
    assert f"| {said} |" in index.markdown("claims", verdicts, "gpu")
    assert f"**{said}.**" in index.markdown("scoreboard", verdicts, "gpu")
    page = BeautifulSoup(index.scoreboard_html("gpu", verdicts, {}), "html.parser")
    badge = page.find(class_="claims").find(class_="badge")
    assert badge.text == said and COLORS["contradicted"] in badge["style"]
    assert page.find(class_="tally").find(class_="badge").text == "contradicted"


PAGE = """<html><head><meta name="viewport" content="wide"><title>A &amp; B</title><meta name="description" content="About it"><style>x</style></head><body>
<nav>no</nav><main>Before <style>y</style><h1>A &amp; B</h1><p>First   words</p><details class="code">code</details><h2 id="part">A <i>part</i></h2>
<section class="answer"><p><span class="badge">it holds</span> <strong>C1</strong></p><p class="said">A is 0.5 &lt; b. B isn't.</p></section><svg aria-label="it rises"><text>1</text></svg><math>n</math><h4>in it</h4><details class="log">log</details></main></body></html>"""


def test_pages_are_found_once_each_with_what_can_be_searched(tmp_path, monkeypatch):
    files = ("01_a.html", "01_a.failed.html", "02_b.failed.html", "03_c.html", "index.html")
    for name in files:
        (tmp_path / name).write_bytes(PAGE.encode() if name != "03_c.html" else b"<p>no p\xe4ge")  # of anyone's
    one, failed, other = index._pages(tmp_path)
    assert [page["file"] for page in (one, failed, other)] == ["01_a.html", "02_b.failed.html", "03_c.html"]
    assert [page["name"] for page in (one, failed, other)] == ["01_a", "02_b", "03_c"]
    assert [page["failed"] for page in (one, failed, other)] == [False, True, False]
    assert (one["title"], other["title"], other["answers"]) == ("A & B", "03_c", [])
    assert one["answers"] == [('<span class="badge">it holds</span> <strong>C1</strong>', "A is 0.5 < b.")]
    assert one["sections"] == [
        ("main", "", "Before"), ("main", "A & B", "First words"), ("part", "A part", "it holds C1 A is 0.5 < b. B isn't. it rises in it"),
    ]  # fmt: skip
    monkeypatch.setattr(index, "_LONGEST", 5)
    assert [text for *_, text in next(index._pages(tmp_path))["sections"]] == ["Befor", "First", "it ho"]


def test_the_index_has_claims_pages_search_and_what_is_missing(verdicts, tmp_path, monkeypatch):
    monkeypatch.setattr(index, "judge_all", lambda scale: verdicts if scale == "gpu" else {})
    (tmp_path / "05_other_routers.html").write_text(PAGE)
    (tmp_path / "08_step_time.failed.html").write_text("<p>no page")
    made = index.index("gpu", str(tmp_path))
    page = BeautifulSoup(made.read_text(), "html.parser")
    assert made == tmp_path / "index.html"
    assert page.find("meta", {"name": "description"})["content"].startswith("At scale gpu. EC is expert choice")
    headings = ["What holds", "All pages", "Search", "What was run, and what is missing"]
    assert [heading.text for heading in page.main.find_all("h2")] == headings
    listed = [
        [li.a["href"], li.a.text, [small.text for small in li.find_all("small")], li.find(class_="mark") is not None]
        for li in page.find("nav", class_="pages").find_all("li")
    ]
    assert listed == [
        ["05_other_routers.html", "A & B", ["it holds C1 A is 0.5 < b."], False],
        ["08_step_time.failed.html", "08_step_time.failed", [], True],
    ]
    words, script = page.find_all("script")
    assert json.loads(words.string)[1:-1] == [
        ["05_other_routers.html", "A & B", "main", "A & B", "First words"],
        ["05_other_routers.html", "A & B", "part", "A part", "it holds C1 A is 0.5 < b. B isn't. it rises in it"],
    ]
    allowed = base64.b64encode(hashlib.sha256(script.string.encode()).digest()).decode()  # that script, and no other
    assert f"script-src 'sha256-{allowed}'" in page.find("meta", {"http-equiv": "Content-Security-Policy"})["content"]
    links = {claim: [a["href"] for a in page.find(id=claim).find_all("a")[:1]] for claim in verdicts}
    assert links == {"C1": [], "C6": ["05_other_routers.html"], "C2": ["08_step_time.failed.html"]}  # what is there
    studies = page.main.find_all("table")[-1].find_all("a")
    assert [a["href"] for a in studies] == ["05_other_routers.html"]  # page 08 trains nothing
    assert page.text.count("make reproduce SCALE=gpu") == 2  # in the answer, and below those runs
    assert answer(verdicts)[0] in page.text
    assert "all pages and results" in page.footer.text and page.find("a", string="Search")["href"] == "#search"
    assert not page.find("a", string=["All reports", "Notebook"])  # it is the first, and is made from none
    assert (tmp_path / "scoreboard.md").read_text() == index.markdown("scoreboard", verdicts, "gpu")


def test_the_committed_index_is_what_the_committed_pages_and_results_give(tmp_path, committed_verdicts, monkeypatch):
    """Who changes the index, the scoreboard or their style sees it here; `ecmoe index --scale gpu` writes them anew."""
    root = Path(__file__).parents[2]
    monkeypatch.setenv("ECMOE_HOME", str(root))
    monkeypatch.setattr(index, "judge_all", {"gpu": committed_verdicts}.get)
    for path in (root / "reports/gpu").glob("[0-9]*.html"):
        (tmp_path / path.name).symlink_to(path)
    index.index("gpu", tmp_path)
    for name in ("index.html", "scoreboard.md"):
        made, committed = ((folder / name).read_text(encoding="utf-8") for folder in (tmp_path, root / "reports/gpu"))
        decimals = re.compile(
            r"\d+\.\d+(?:e-?\d+)?"
        )  # of figures, whose last digits other libraries may round otherwise
        assert decimals.sub("#", made) == decimals.sub("#", committed)
        made, committed = (np.array(decimals.findall(text), dtype=float) for text in (made, committed))
        np.testing.assert_allclose(made, committed, rtol=1e-6, atol=1e-5)


def test_smoke_judges_nothing():
    found = {"C6": judged("C6", losses(**HASH), scale="smoke")}
    page = BeautifulSoup(index.scoreboard_html("smoke", found, {}), "html.parser")
    assert page.find(class_="badge").text == "plumbing only" and "4 seeds" not in page.text and not page.find("svg")


def test_nothing_run_is_a_table_too(tmp_path, monkeypatch):
    monkeypatch.setenv("ECMOE_HOME", str(tmp_path))
    page = BeautifulSoup(index.studies_html("gpu", {}), "html.parser")
    rows = [[cell.text for cell in row.find_all("td")] for row in page.tbody.find_all("tr")]
    assert rows and all(runs.startswith("0 of ") and missing == "all of them" for runs, missing in rows)
