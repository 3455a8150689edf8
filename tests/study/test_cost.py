"""Table 1 and what it costs."""

import math

import pandas as pd
import pytest

from ecmoe import paths
from ecmoe.bench.clock import save
from ecmoe.model.build import TABLE_1, count_parameters, flops_per_token
from ecmoe.study import cost


def test_every_row_of_table_1_is_counted():
    sizes = cost.table_1().set_index("model")
    assert list(sizes.index) == list(TABLE_1)
    assert list(sizes) == [
        form.format(which) for which in ("total", "active") for form in ("{}", "printed_{}", "{}_ratio")
    ]
    assert {which: sizes.loc["0.1B/64E", f"printed_{which}"] for which in ("total", "active")} == {
        "total": 1.9e9,
        "active": 0.145e9,
    }
    counted = count_parameters(TABLE_1["0.1B/64E"].config)
    assert sizes.loc["0.1B/64E", ["total", "active"]].tolist() == [counted.total, counted.active]
    assert sizes.filter(like="ratio").stack().between(0.87, 1.0).all()  # in millions and in billions
    assert sizes.loc["0.1B", "total_ratio"] == pytest.approx(
        0.87, abs=0.01
    )  # 13% off, the paper doesn't say what it counts
    assert sizes.loc["0.1B/16E", "total_ratio"] == pytest.approx(0.96, abs=0.01)
    assert sizes.loc["0.1B/64E", "active_ratio"] == pytest.approx(0.88, abs=0.01)


def test_hours_follow_from_flops_and_a_stated_share(tmp_path, monkeypatch):
    monkeypatch.setenv("ECMOE_HOME", str(tmp_path))
    models = {"0.1B/64E": TABLE_1["0.1B/64E"].config}
    at_all = 1e9 * flops_per_token(TABLE_1["0.1B/64E"].config) / 989e12 / 3600  # hours, if the device did nothing else
    timed = pd.DataFrame({"arm": ["EC-CF2", "EC-CF2", "EC-CF2", "Dense"], "mfu": [0.2, 0.25, None, 0.9]})
    timed.attrs = {"setting": {"layers": 12, "d_model": 768, "num_experts": 64, "device": "H200"}, "absent": []}
    save(timed, paths.results("gpu", "bench") / "step.json")
    of_model = "0.25, timed for 12 layers of width 768, 64 experts"  # EC-CF2's best path
    for keys, share, said in (
        ({}, 0.25, of_model),
        ({"mfu": {"0.1B/64E": 0.5}}, 0.5, "0.50, its own steps"),
        ({"mfu": {"0.1B/64E": math.nan}}, 0.25, of_model),
        ({"mfu": {"another": 0.5}}, 0.25, of_model),
    ):
        (row,) = cost.hours(models, tokens=1e9, **keys).to_dict("records")
        assert (row["at_mfu"], row["gpu_hours"]) == (said, pytest.approx(at_all / share))
    (paths.results("gpu", "bench") / "step.json").unlink()
    assert list(cost.hours(models)["at_mfu"]) == ["0.40, assumed"]


def test_a_study_is_costed_arm_by_arm(tiny_config):
    config = tiny_config(steps=10)
    arms = {"EC": config, "Dense": config.replace(router="dense")}
    rows = cost.hours(arms).set_index("name")  # at an assumed rate, for nothing was timed in the tests' home
    assert list(rows.index) == list(arms)
    assert rows.loc["EC", "million_tokens"] == 10 * config.tokens_per_batch / 1e6
    assert rows.loc["EC", "parameters"] > rows.loc["EC", "active_parameters"] > 0
    assert rows.loc["Dense", "parameters"] == rows.loc["Dense", "active_parameters"]
    hours = 10 * config.tokens_per_batch * flops_per_token(config) / (0.4 * 989e12) / 3600
    assert rows.loc["EC", "gpu_hours"] == pytest.approx(hours)
    assert rows.loc["EC", "gflops_per_token"] == flops_per_token(config) / 1e9
