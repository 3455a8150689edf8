"""Table 1 and what it costs."""

import pytest

from ecmoe import cost, paths
from ecmoe.model import TABLE_1, flops_per_token
from ecmoe.results import Result, not_run, write_record


def test_every_row_of_table_1_is_counted():
    sizes = cost.table_1().set_index("model")
    assert list(sizes.index) == list(TABLE_1)
    assert sizes.loc["0.1B", "total_ratio"] == pytest.approx(0.87, abs=0.01)  # 13% off, the paper doesn't say what it counts
    assert sizes.loc["0.1B/16E", "total_ratio"] == pytest.approx(0.96, abs=0.01)
    assert sizes.loc["0.1B/64E", "active_ratio"] == pytest.approx(0.88, abs=0.01)


def test_hours_follow_from_flops_and_a_stated_share(tiny_config):
    row = cost.estimates(tokens=1e9, scale="nothing there").set_index("model").loc["0.1B/64E"]
    assert row["mfu_source"] == "assumed"
    assert row["gpu_hours"] == pytest.approx(1e9 * flops_per_token(TABLE_1["0.1B/64E"].config) / (0.4 * 989e12) / 3600)
    config = tiny_config()
    write_record(paths.records("measured") / "a.json", Result(not_run(config).summary | {"mfu": 0.2}))
    again = cost.estimates(tokens=1e9, scale="measured").set_index("model").loc["0.1B/64E"]
    assert again["gpu_hours"] == pytest.approx(2 * row["gpu_hours"]) and "1 runs" in again["mfu_source"]
