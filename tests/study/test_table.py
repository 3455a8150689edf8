"""Tables of runs: a gap is a gap, and two arms are never taken for two seeds of one."""

import math

from ecmoe.config import RunConfig
from ecmoe.study.table import by_routing, by_seed, curves, curves_by_seed, table
from ecmoe.training.result import not_run
from tests.training.test_result import make


def test_table_has_a_row_per_run_and_gaps_for_what_is_missing():
    config = RunConfig()
    rows = [
        make(config),
        not_run(config.replace(seed=1)),
        make(config.replace(seed=2), loss=9.0, status="diverged"),
    ]
    frame = table(rows)
    assert frame["arm"].tolist() == ["EC-CF2 raw"] * 3
    assert frame["status"].tolist() == ["finished", "not run", "diverged"]
    assert frame["val_loss"].iloc[0] == 2.0 and frame["val_loss"].iloc[1:].isna().all()
    assert frame["dropped"].iloc[0] == 0.25 and frame["num_experts"].eq(config.num_experts).all()
    assert frame["share_8"].isna().all() and frame["mfu"].isna().all()
    assert table([]).empty


def test_two_arms_are_never_two_seeds_of_one():
    narrow, wide = RunConfig(router="dense", d_ff=128), RunConfig(router="dense", d_ff=256)
    frame = table([make(narrow), make(wide), make(RunConfig())])
    assert frame["arm"].tolist() == ["Dense d_ff=128", "Dense d_ff=256", "EC-CF2 raw"]
    assert table([make(narrow), make(wide)], axes=["d_ff"])["arm"].tolist() == ["Dense", "Dense"]
    # Keys that the router doesn't read make no difference.
    assert table([make(narrow), make(narrow.replace(seed=1, num_experts=4))])["arm"].tolist() == [
        "Dense",
        "Dense",
    ]


def test_a_study_names_its_arms_itself():
    ours = [not_run(RunConfig(router="dense", d_ff=d_ff)) for d_ff in (128, 256)]
    assert list(table(ours)["arm"]) == ["Dense d_ff=128", "Dense d_ff=256"]
    study = {"Dense": ours[:1], "Dense, equal FLOPs": ours[1:]}
    assert list(table(study)["arm"]) == list(curves(study)["arm"]) == list(study)


def test_curves_are_tidy_and_name_the_missing():
    frame = curves([make(RunConfig()), not_run(RunConfig(router="dense"))])
    assert frame["arm"].tolist() == ["EC-CF2 raw"] * 3 + ["Dense"]
    assert frame["val_loss"].iloc[:3].tolist() == [3.0, 2.5, 2.0]
    assert math.isnan(frame["val_loss"].iloc[3]) and frame["status"].iloc[3] == "not run"
    assert curves([]).empty


def test_by_seed_takes_finished_runs_only():
    config = RunConfig()
    rows = [make(config), make(config.replace(seed=1), loss=3.0), not_run(config.replace(seed=2))]
    rows.append(make(config.replace(seed=3), status="diverged"))
    assert by_seed(rows) == {0: 2.0, 1: 3.0}
    assert by_seed(rows, "dropped") == {0: 0.25, 1: 0.25}


def test_both_routings_of_a_study_stand_below_each_other():
    done = make(RunConfig(), 2.0)
    done.summary["val_loss_causal"] = 2.5
    found = by_routing({"A": [done], "B": [not_run(RunConfig(seed=1))]})
    assert found["arm"].tolist() == ["A", "A", "B", "B"] and found["routing"].tolist() == ["as trained", "causally"] * 2
    assert found["loss"].tolist()[:2] == [2.0, 2.5] and found["loss"].isna().tolist() == [False, False, True, True]


def test_runs_that_broke_off_are_in_no_curve():
    runs = [make(RunConfig()), make(RunConfig(seed=1), status="diverged"), not_run(RunConfig(seed=2))]
    assert list(curves_by_seed(runs)) == [0]


def test_arms_that_differ_in_anything_get_another_label():
    """Every key that is identity, also one that the label leaves unsaid, and one that only one of two routers reads."""
    for change in ({"beta2": 0.95}, {"steps": 30}, {"data": "enwik8"}, {"gate": "scaled"}, {"moe_every": 1}):
        labels = table([make(RunConfig()), make(RunConfig(**change)), make(RunConfig(seed=1))])["arm"]
        assert labels[0] != labels[1] and labels[0] == labels[2], change
    pair = [make(RunConfig(router="hash", capacity_factor=1.25, steps=steps)) for steps in (60, 30)]
    assert table(pair)["arm"].tolist() == ["Hash steps=60", "Hash steps=30"]
