"""What notebooks show: figures, tables, coloured text and where numbers come from, each escaped and with its gaps named."""

import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from bs4 import BeautifulSoup
from matplotlib.figure import Figure

from ecmoe.config import RunConfig
from ecmoe.provenance import code_digest
from ecmoe.report import page as report
from ecmoe.report.plots import Plot
from ecmoe.report.plots.style import COUNT_COLORS
from ecmoe.study.load import Study
from ecmoe.study.plan import Planned
from ecmoe.training.result import Result, not_run
from tests.report.notebooks import EVIL


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


def test_a_table_of_differences_says_what_its_intervals_are(shown):
    rows = [(arm, seed, loss + 0.01 * seed**2) for arm, loss in (("a", 2.0), ("b", 2.5)) for seed in range(3)]
    frame = pd.DataFrame(rows, columns=["arm", "seed", "loss"])
    for fewer, caption in ((0, "Losses. Intervals: 95%, each by itself."), (1, "Losses.")):
        said = report.difference(frame[frame["seed"] >= fewer], "loss", "a", "b")
        report.show_table(pd.DataFrame({"what": ["a minus b"], "loss": [said]}), "Losses.")
        assert BeautifulSoup(shown[-1], "html.parser").find("caption").text == caption


@pytest.mark.parametrize(
    "seeds, low, said",
    [
        ([3.0, np.nan, 3.0], [0.1, np.nan, 0.2], "Losses. Intervals: 95% over 3 seeds, each by itself."),
        ([4, 2, 3], [0.1, np.nan, 0.2], "Losses. Intervals: 95% over 3 to 4 seeds, each by itself; fewer have none."),
        ([4, 0, 3], [0.1, np.nan, 0.2], "Losses. Intervals: 95% over 3 to 4 seeds, each by itself."),
        ([2, 0, 1], [np.nan] * 3, "Losses. Means over 1 to 2 seeds."),
        ([3, 3, 3], None, "Losses. Means over 3 seeds."),  # a figure that draws no intervals
        ([1, 1, 1], [np.nan] * 3, "Losses."),  # of one seed there is none
        (None, None, "Losses."),
    ],
)
def test_a_caption_says_what_intervals_are_and_over_how_many_seeds(shown, seeds, low, said):
    figure = Figure(figsize=(1, 1))
    figure.subplots()
    columns = {"arm": ["a", "b", "c"], "seeds": seeds, "low": low}
    data = pd.DataFrame({name: values for name, values in columns.items() if values is not None})
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
    run = {"name": config.name, "status": "finished", "seed": 0, "device": "H100", "tokens": 20_480}

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
    report.finding(
        "a minus b is +0.1.", study("gpu", run, run | {"name": other, "seed": 1, "device": None, "tokens": 40_960})
    )
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
               "commit": "abc", "code": code_digest(), "device": "CPU", "precision": "32-true", "world_size": 1, "seconds": 1800.0,
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
    report.provenance(study(not_run(RunConfig())))
    report.provenance(study())
    assert [len(BeautifulSoup(page, "html.parser").select("details table")) for page in shown] == [1, 1, 1, 0, 0]


@pytest.mark.parametrize(
    "scale, code, noted", [("smoke", "beef", True), ("smoke", None, False), ("gpu", "beef", False)]
)
def test_provenance_of_small_runs_says_if_other_code_has_trained_them(shown, scale, code, noted):
    report.provenance(replace(study(result(0, code=code)), scale=scale))
    said = "Other code than this has trained runs of this page: delete runs/ and reports/smoke/{runs,measures} to train them again."
    assert (said in shown[0]) == noted == ("Note:" in shown[0])


def test_provenance_of_measurements_stands_beside_that_of_runs(shown, monkeypatch):
    """If it differs from their run's."""
    runs = [result(0).summary, result(1).summary]
    new = {"device": "H200", "commit": "abd", "versions": {"torch": "2.14.0"}, "measures": "d1"}
    for made in ([], runs, [runs[0], runs[1] | new], [runs[0] | {"measures": "d2"}, runs[1] | {"measures": "d1"}]):
        monkeypatch.setattr(Study, "as_measured", lambda self, made=made: made)
        report.provenance(study(result(0), result(1)))
    assert shown[0] == shown[1] and "Note:" not in shown[0] and "code of measurements" not in shown[0]
    page = BeautifulSoup(shown[2], "html.parser")
    rows = {row.th.text: list(row.td.stripped_strings) for row in page.table.find_all("tr")}
    assert (
        rows["device"] == ["CPU", "H200"]
        and rows["commit"] == ["abc", "abd"]
        and rows["code of measurements"] == ["d1"]
    )
    assert "The runs and measurements behind this page differ in device, versions." in page.text
    assert len(page.details.table.tbody.find_all("tr")) == 2 and "runs, one by one" not in page.text
    assert "behind this page differ in code of measurements." in shown[3]


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
        "A + B; licence: not recorded, see README.md", "A + C; licence: a: not stated; c: CC", "A; licence: not recorded, see README.md",
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
        "code": [code_digest()], "commit": ["abc"], "device": ["CPU"], "precision": ["32-true"], "versions": ["a 1, torch 2.13", "torch 2.13.0"],
        "data": ["a text; by somebody; licence: CC; 12,345 training tokens (bpe, vocabulary 512); digest 0123456789ab",
                 "images; licence: unknown; 2,000 training and 300 validation images (3 x 8 x 9); digest ffffffffffff"],
        "processes": ["2"], "seeds": ["0, 1, 2"], "training time": ["303 seconds"], "tokens trained on": ["3,500"],
        "passes of the longest run over its text": ["0.08"], "trained": ["2026-01-02 to 2026-03-04"], "failed": [RunConfig(seed=1).name],
    }.items())  # fmt: skip
    assert "Ours is <b>smaller</b>." in page.text and "differ in versions, data." in page.text
    cells = [[cell.text for cell in row.find_all(["th", "td"])] for row in page.details.table.find_all("tr")]
    assert cells == [
        ["arm", "name", "seconds", "tokens", "tokens per second", "device", "commit"],
        ["an arm", runs[0].summary["name"], "300", "1,000", "2.500", "CPU", "abc"],
        ["an arm", runs[1].summary["name"], "3", "2,500", "–", "CPU", "abc"],
    ]


def test_provenance_of_models_of_images_counts_patches(shown):
    config = RunConfig(data="digits", sequence_length=16)
    study = Study(
        "10_a", "smoke", {}, [Planned("a", config, (), (), 0)], (), {"EC": [result(0, tokens=3500, data=None)]}
    )
    report.provenance(study)
    page = BeautifulSoup(shown[0], "html.parser")
    assert page.find("th", string="patches trained on").find_next("td").text == "3,500"
    heads = [cell.text for cell in page.details.table.thead.find_all("th")]
    assert heads[3:5] == ["patches", "patches per second"] and "token" not in page.text
    assert page.details.summary.text == "name, seconds and patches of each run"


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
