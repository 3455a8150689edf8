"""Tables of runs: a gap is a gap, and arms keep their names."""

import math

from ecmoe.config import RunConfig
from ecmoe.model.metrics import METRICS
from ecmoe.study.table import curves, table
from ecmoe.training.result import not_run
from tests.training.test_result import make


def test_table_has_a_row_per_run_and_gaps_for_what_is_missing():
    config = RunConfig()
    rows = [
        make(config),
        not_run(config.replace(seed=1)),
        make(config.replace(seed=2), loss=9.0, status="diverged"),
    ]
    frame = table({"EC": rows, "Dense": [not_run(RunConfig(router="dense"))]})
    assert frame["arm"].tolist() == ["EC"] * 3 + ["Dense"]
    assert frame["status"].tolist() == ["finished", "not run", "diverged", "not run"]
    assert frame["val_loss"].iloc[0] == 2.0 and frame["val_loss"].iloc[1:].isna().all()
    assert frame["dropped"].iloc[0] == 0.25 and frame["num_experts"].eq(config.num_experts).all()
    assert frame["share_8"].isna().all() and frame["mfu"].isna().all()
    assert not any(isinstance(x, dict | list) for x in frame.to_numpy().flat)
    assert table({}).empty
    unfinished = make(config, status="diverged")
    unfinished.summary.update({"mfu": 0.25, "val_loss_causal": 3.0})
    (row,) = table({"EC": [unfinished]}).to_dict("records")
    kept = {metric.name for metric in METRICS if metric.table and not metric.result} & {"mfu", "dropped", "share_1"}
    assert {name: row[name] for name in kept} == {"mfu": 0.25, "dropped": 0.25, "share_1": 0.5}  # what it took
    assert all(math.isnan(row[name]) for name in ("val_loss", "val_loss_causal"))
    made = make(config)
    made.summary["precision"] = "bf16-mixed"  # in which it was trained, whatever was asked for
    (row,) = table({"EC": [made]}).to_dict("records")
    assert row["precision"] == "bf16-mixed" != made.summary["config"]["precision"]


def test_curves_are_tidy_and_name_the_missing():
    frame = curves({"EC": [make(RunConfig())], "Dense": [not_run(RunConfig(router="dense"))]})
    assert frame["arm"].tolist() == ["EC"] * 3 + ["Dense"]
    assert frame["val_loss"].iloc[:3].tolist() == [3.0, 2.5, 2.0]
    assert math.isnan(frame["val_loss"].iloc[3]) and frame["status"].iloc[3] == "not run"
    assert curves({}).empty and frame.index.tolist() == list(range(4))
