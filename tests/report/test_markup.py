"""Tables and formulas as HTML: how numbers are written, what their columns are called."""

import numpy as np
import pandas as pd
import pytest
from bs4 import BeautifulSoup

from ecmoe.report.markup import math_html, table_html


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
        ([0.0099, np.nan], ["0.0099", "–"]),
        ([0.001, 0.0026371], ["0.001", "0.00264"]),
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


def test_the_source_of_a_formula_is_its_alternative_text():
    latex = r'a < b_{\text{"c"}}'
    for mode in ("inline", "block"):
        formula = BeautifulSoup(math_html(latex, mode), "html.parser").math
        assert (formula["alttext"], formula["display"]) == (latex, mode)
