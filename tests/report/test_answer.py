"""The answer of a page and how it was judged: what they say is what the verdict says, at every label."""

import dataclasses
from colorsys import rgb_to_hsv

import pandas as pd
import pytest
from bs4 import BeautifulSoup
from matplotlib.colors import to_rgb

from ecmoe.report import answer
from ecmoe.report.markup import COLORS, markup
from ecmoe.study import verdict as labels
from tests.report.plots.figures import luminance
from tests.study.known import CENTRE, judged, losses, seeds

HASH = {"EC-CF2 renormalized": seeds(3.60), "Hash modulo": seeds(3.62)}


def soup(html: str) -> BeautifulSoup:
    return BeautifulSoup(html, "html.parser")


def test_label_sentence_and_what_it_rests_on():
    found = judged("C6", losses(**HASH))
    page = soup(markup("verdict", found))
    assert page.find(class_="badge").text == found.label == "reproduced" and page.strong.text == "C6"
    assert page.find(class_="said").text == found.sentence and "0.020 nats above EC-CF2" in found.sentence
    assert page.find(class_="rests").text == f"Rests on {found.rests_on}." and not page.find(class_="warning")
    assert not page.code  # what else could be run would change no label
    less = judged("C6", losses(**HASH | {"Hash modulo": seeds(3.62, n=3)}))
    page = soup(markup("verdict", less))
    assert page.code.text == less.command and page.find(class_="rests") and less.label == "reproduced"


def test_a_label_of_some_parts_says_of_how_many():
    page = soup(markup("verdict", judged("C1", losses(**CENTRE))))
    assert page.find(class_="badge").text == "contradicted in 2 of 4 parts"
    assert COLORS["contradicted"] in page.find(class_="badge")["style"]


def test_not_run_is_one_line_with_its_command():
    page = soup(markup("verdict", judged("C6", {})))
    assert (
        page.find(class_="badge").text == "not run"
        and page.code.text == "ecmoe runs 05_other_routers --scale gpu --train"
    )
    assert not page.find(class_="rests")


def test_each_claim_has_its_answer_and_smoke_one_for_all(monkeypatch):
    shown = []
    monkeypatch.setattr(answer, "judge", lambda claim, scale: judged(claim, losses(**HASH), scale=scale))
    monkeypatch.setattr(answer, "show_html", lambda html: shown.append(soup(html).p.text))
    for scale in ("gpu", "smoke"):
        answer.answer(scale, "C1", "C6")
    assert shown == ["not run C1", "reproduced C6", "plumbing only"]


def test_runs_that_differ_in_what_they_must_not_are_marked():
    found = judged("C6", losses(**HASH))
    rests_on = dataclasses.replace(found.rests_on, mixed=("card", "code"))
    page = soup(markup("verdict", dataclasses.replace(found, rests_on=rests_on)))
    assert "differ in kind of device and code" in page.find(class_="warning").text
    for covered, steps in (((400, 200, 300), "200 to 400"), ((400, 400, 400), "400")):
        rests_on = dataclasses.replace(found.rests_on, repeats=("a", "b"), covered=covered)
        page = soup(markup("verdict", dataclasses.replace(found, rests_on=rests_on)))
        equal = f"equal to the last digit over the first {steps} steps"
        assert f"2 repeated runs, {equal}, show that these compute the same" in page.find(
            class_="rests"
        ).text and not page.find(class_="warning")


def test_a_claim_at_another_size_stands_beside_the_studys(monkeypatch):
    verdicts = {
        None: judged("C6", losses(**HASH)),
        "07_fine_tuning": judged("C6", losses(**HASH | {"Hash modulo": seeds(3.60)})),
    }
    monkeypatch.setattr(answer, "judge", lambda claim, scale, page=None: verdicts[page])
    rows = answer.at_size("gpu", "07_fine_tuning", "C6")
    assert rows["part"].tolist() == [part.name for part in verdicts["07_fine_tuning"].parts if part.label != "not run"]
    row = rows.iloc[0]
    assert (row["claim"], row["part"]) == ("C6", "modulo against EC-CF2")
    assert (row["verdict here"], row["its verdict"]) == ("no effect", "reproduced")
    assert row["here"].startswith("0.000 nats") and row["in the study"].startswith("+0.020 nats")
    verdicts["07_fine_tuning"] = judged("C6", losses(**HASH), scale="smoke")
    assert answer.at_size("smoke", "07_fine_tuning", "C6").empty  # where numbers mean nothing


def test_a_caption_is_told_the_parts_that_it_names(monkeypatch):
    monkeypatch.setattr(answer, "judge", lambda claim, scale: judged(claim, losses(**HASH), scale=scale))
    parts = "modulo against EC-CF2", "spread over seeds"
    first, spread = answer.told("gpu", "C6", *parts).split(". ")
    assert first.startswith("Hash routing ends 0.") and spread.startswith("Hash routing's losses spread")
    assert spread.endswith(".")
    assert answer.told("smoke", "C6", *parts) == ""
    with pytest.raises(KeyError, match="modulo"):
        answer.told("gpu", "C6", "modulo")


def test_claims_are_judged_below_their_names(monkeypatch):
    verdicts, shown = {"C6": judged("C6", losses(**HASH)), "C1": judged("C1", {})}, []
    monkeypatch.setattr(answer, "judge", lambda claim, scale: verdicts[claim] if scale == "gpu" else None)
    monkeypatch.setattr(answer, "show_html", shown.append)
    answer.judged("gpu", "C6", "C1")
    page = soup(shown[0])
    assert [(h["id"], h.text) for h in page.find_all(["h2", "h3"])] == [
        ("judged", "How it was judged"), ("judged-C6", "C6"), ("judged-C1", "C1"),
    ]  # fmt: skip
    assert str(page).endswith(str(soup(answer.judged_html(verdicts["C1"])))) and str(
        soup(answer.judged_html(verdicts["C6"]))
    ) in str(page)
    answer.finding("It rises by 3.", "two seeds of <one> size")
    page = soup(shown[1])
    assert (page.find(class_="badge").text, page.find(class_="said").text) == ("finding", "It rises by 3.")
    assert page.find(class_="rests").text == "Rests on two seeds of <one> size." and not page.strong


def test_a_part_has_as_much_as_was_found():
    part = judged("C6", losses(**HASH)).parts[0]
    size, _, interval = answer.found(part).partition(" (")
    assert size.startswith("+0.020 nats") and interval
    for n, shown in ((1, size), (0, "\u2013")):
        assert answer.found(dataclasses.replace(part, effect=dataclasses.replace(part.effect, n=n))) == shown


def test_how_it_was_judged_has_every_part_with_its_rule(monkeypatch):
    found = judged("C6", losses(**HASH))
    page = soup(answer.judged_html(found))
    deciding, beside = page.find_all("table")
    assert [row.th.text for row in deciding.tbody.find_all("tr")] == [part.name for part in found.deciding]
    assert [row.th.text for row in beside.tbody.find_all("tr")] == [
        part.name for part in found.parts if not part.decides
    ]
    assert beside.find_parent("details") and not deciding.find_parent("details") and not page.caption
    headings = ["part", "verdict", "found", "seeds", "reproduced if", "minimum detectable effect"]
    assert [[th.text for th in table.thead.find_all("th")] for table in (deciding, beside)] == [headings] * 2
    assert [cell["data-of"] for cell in deciding.tbody.tr.find_all("td") if cell.find(class_="badge")] == ["verdict"]
    cells = [cell.text for cell in deciding.tbody.tr.find_all("td")]
    part = found.deciding[0]
    assert (
        cells[1].startswith("+0.020 nats (0.0")
        and cells[2] == "4 seeds"
        and cells[3] == part.rule
        and cells[0] == part.label
    )
    named = {dt.text: dt.find_next("dd").text for dt in page.find_all("dt")}
    assert named["refuted by"] == found.about.refuted_by and named["differs from the paper"] == found.about.differences
    assert "Holm" in named["rules"] and "80% power" in named["rules"] and "one that is planned" in named["rules"]
    amended = [one for one in answer.protocol().amendments if "C6" in one.claims]
    assert len(amended) == 3
    fold = page.find("dt", string="amendments").find_next("dd").details
    assert fold.summary.text == "3 amendments, the last of 2026-11-30" and not fold.has_attr("open")
    assert [li.text for li in fold.find_all("li")] == [f"{one.date}: {one.what} ({one.why})" for one in amended]
    rules = dataclasses.replace(answer.protocol(), amendments=[])
    monkeypatch.setattr(answer, "protocol", lambda: rules)
    never = soup(answer.judged_html(judged("C7", {})))
    assert never.find("dt", string="amendments").find_next("dd").text == "none"


def test_a_row_of_parts_has_units_of_its_own_and_what_it_lacks():
    shares = {f"share_{j}": seeds(share, 0.006, n=3) for j, share in enumerate((0.1, 0.4, 0.3, 0.1, 0.1, 0, 0, 0, 0))}
    (part, *_) = parts = judged("C7", {"EC-CF2 renormalized": shares}).deciding
    rows = soup(answer.parts_html(parts, "reproduced")).tbody.find_all("tr")
    cells = [cell.text for cell in rows[0].find_all(["th", "td"])]
    assert cells[:2] == [part.name, part.label] and cells[2].startswith("70% (") and cells[4] == part.rule
    assert cells[3] == "3 seeds; missing: EC-CF2 renormalized (seed 3)"
    assert (
        cells[5] == f"{100 * part.effect.smallest(part.level, 0.8):.1f} points"
        and part.effect.smallest(part.level, 0.8) < 0.1
    )  # of shares that are compared
    fewer = {of: seeds(0.1, n=2) for of in shares}
    (row, *_) = soup(
        answer.parts_html(judged("C7", {"EC-CF2 renormalized": fewer}).deciding, "reproduced")
    ).tbody.find_all("tr")
    assert row.find_all("td")[2].text == "2 seeds; missing: EC-CF2 renormalized (seed 2), EC-CF2 renormalized (seed 3)"
    (row, *_) = soup(
        answer.parts_html(judged("C2", {}, bench={"even": [1.1, 1.12, 1.3]}).deciding, "undecided")
    ).tbody.find_all("tr")
    assert row.find_all("td")[4].text.endswith(" times, up or down") and row.find_all("td")[2].text == "3 turns"
    assert row.find_all("td")[1].text.startswith("1.170 times (")
    (spread,) = (part for part in judged("C6", losses(**HASH)).parts if part.how == "spread")
    (row,) = soup(answer.parts_html([spread], "reproduced")).tbody.find_all("tr")
    assert row.find_all("td")[4].text == f"{spread.effect.smallest(spread.level, 0.8):.3f} times, up or down"


def test_a_part_that_finished_runs_do_not_record_names_them_and_no_command():
    arm, shares = "EC-CF2 renormalized", {f"share_{j}": seeds(0.1, 0.006) for j in range(9)}
    found = judged("C7", {arm: {of: x for of, x in shares.items() if of != "share_4"}})
    lacks = f"share_3 + share_4 is not recorded by {arm} (seed 0, 1, 2, 3)"
    part = found.deciding[1]
    assert (part.label, part.sentence, part.missing) == ("not run", f"three or four: {lacks}", ())
    row = soup(answer.parts_html([part], "undecided")).tbody.tr
    assert row.find_all("td")[2].text == f"0 seeds; {lacks}"
    assert not soup(markup("verdict", found)).code  # which would train nothing
    del shares["share_3"]
    one_seed = {"share_4": seeds(0.1, n=1)}
    only = judged("C7", {arm: shares | one_seed | {"share_3": seeds(0.1)}}).deciding[1]
    assert only.effect.n == 1 and only.unrecorded == ((arm, 1), (arm, 2), (arm, 3))
    row = soup(answer.parts_html([only], "undecided")).tbody.tr
    assert row.find_all("td")[2].text == f"1 seed; share_3 + share_4 is not recorded by {arm} (seed 1, 2, 3)"
    none = judged("C7", {arm: {"val_loss": seeds(3.6)}})
    said = f"One or two experts: share_1 + share_2 is not recorded by {arm} (seed 0, 1, 2, 3)."
    page = soup(markup("verdict", none))
    assert (none.label, page.find(class_="said").text) == ("not run", said) and not page.code
    missing = judged("C7", {arm: {"val_loss": seeds(3.6, n=3)}})
    assert soup(markup("verdict", missing)).code.text == missing.command  # a seed that has yet to run


def test_smoke_shows_rules_and_no_number():
    found = judged("C6", losses(**HASH), scale="smoke")
    page = soup(markup("verdict", found) + answer.judged_html(found))
    assert page.find(class_="badge").text == "plumbing only" and "4 seeds" not in page.text
    assert not page.find(class_=["rests", "not-run", "warning"])  # no verdict rests on them, nor would on more
    assert {th.text for th in page.thead.find_all("th")} == {"part", "reproduced if"}


def test_every_label_has_a_colour_on_which_white_can_be_read():
    for label in (*labels.WEAKEST_LAST, labels.PLUMBING):
        assert 1.05 / (luminance(COLORS[label]) + 0.05) > 4.5, label
    hues = {label: round(360 * rgb_to_hsv(*to_rgb(color))[0]) for label, color in COLORS.items()}
    ranges = {"reproduced": (120, 160), "reproduced in direction": (200, 220), "no effect": (260, 300), "contradicted": (0, 20),
              "undecided": (40, 55), "finding": (200, 220)}  # fmt: skip
    assert all(low <= hues[label] <= high for label, (low, high) in ranges.items())  # green holds, red doesn't
    grey = [rgb_to_hsv(*to_rgb(COLORS[label]))[1] for label in ("not run", "plumbing only")]
    assert max(grey) < 0.1 and len(COLORS) == len(ranges) + len(grey)


def test_a_difference_is_paired_and_says_its_sign():
    rows = [(arm, seed, loss + seed) for arm, loss in (("a", 2.0), ("b", 2.5)) for seed in (0, 1, 2)]
    frame = pd.DataFrame(rows, columns=["arm", "seed", "loss"])
    assert answer.difference(frame, "loss", "a", "b") == "-0.500 nats (-0.500 to -0.500; 3 seeds)"
    assert answer.difference(frame, "loss", "b", "a", unit="share") == "+50 points (50 to 50; 3 seeds)"
    assert answer.difference(frame[frame["seed"] == 0], "loss", "a", "b") == "-0.500 nats (1 seed)"
    assert answer.difference(frame[frame["seed"] > 0], "loss", "a", "b") == "-0.500 nats (2 seeds)"  # no verdict either
    assert answer.difference(frame, "loss", "a", "c") == "(not run)"
    assert answer.difference(frame, "loss", "a", "a") == "0.000 nats (0.000 to 0.000; 3 seeds)"  # on neither side
    level = frame.assign(loss=0.8 - 0.0002 * (frame["arm"] == "a"))
    assert answer.difference(level, "loss", "a", "b", unit="share") == "0.0 points (0.0 to 0.0; 3 seeds)"
    with pytest.raises(KeyError):
        answer.difference(frame, "lost", "a", "b")


@pytest.mark.parametrize(
    ("a", "b", "is_below"),
    [
        ([1.0, 1.1, 1.2], [2.0, 2.2, 2.1], True),  # differences of -1 and about -1.1
        ([2.0, 2.2, 2.1], [1.0, 1.1, 1.2], False),
        ([1.0, 1.9, 1.2], [2.0, 2.0, 2.0], False),  # below on average, but the interval crosses 0
        ([1.0, 1.1], [2.0, 2.1], False),  # too few seeds for an interval
        ([], [2.0, 2.1, 2.2], False),
    ],
)
def test_below_asks_for_the_whole_interval(a, b, is_below):
    rows = [(arm, seed, loss) for arm, losses in (("a", a), ("b", b)) for seed, loss in enumerate(losses)]
    assert answer.below(pd.DataFrame(rows, columns=["arm", "seed", "loss"]), "loss", "a", "b") is is_below
