"""Results: storage keeps what was measured, and the table never mixes up two arms."""

import json
import math

import numpy as np
import pandas as pd
import pytest

from ecmoe.config import ConfigError, RunConfig
from ecmoe.training import result as results
from ecmoe.training.result import Result, arm_label, curves, not_run, table


def make(config: RunConfig, loss: float = 2.0, status: str = "finished", rows: int = 3) -> Result:
    curve = pd.DataFrame({"step": np.arange(1.0, rows + 1), "val_loss": np.linspace(loss + 1, loss, rows)})
    summary = {
        "config": config.to_dict(),
        "name": config.name,
        "seed": config.seed,
        "status": status,
    }
    summary |= {
        "error": None,
        "val_loss": loss,
        "steps": rows,
        "routing": {"dropped": 0.25, "share_1": 0.5},
    }
    return Result(summary, curve.reindex(columns=results.COLUMNS))


EC, TOP2 = (
    {"router": "expert_choice"},
    {"router": "token_choice", "top_k": 2, "capacity_factor": 1.0},
)


@pytest.mark.parametrize(
    ("keys", "label"),
    [
        (EC, "EC-CF2"),
        (EC | {"capacity_factor": 0.5}, "EC-CF0.5"),
        (EC | {"gate": "renormalized"}, "EC-CF2 renormalized"),
        (EC | {"pool": "sequence"}, "EC-CF2 pool=sequence"),
        (EC | {"pool": 1024}, "EC-CF2 pool=1024"),
        (EC | {"max_experts_per_token": 2}, "EC-CAP2"),
        (EC | {"max_experts_per_token": 3, "cap_solver": "dykstra"}, "EC-CAP3 dykstra"),
        (EC | {"max_experts_per_token": 2, "capacity_factor": 1.0}, "EC-CAP2 c=1"),
        (EC | {"moe_init_scale": 4.0}, "EC-CF2 init=4"),
        (TOP2, "GShard top-2"),
        (TOP2 | {"gate": "renormalized"}, "GShard top-2 renormalized"),
        (TOP2 | {"capacity_factor": None}, "GShard top-2 dropless"),
        (TOP2 | {"capacity_factor": 4.0, "aux_loss_weight": 0.0}, "GShard top-2 c=4 aux=0"),
        (TOP2 | {"top_k": 1, "capacity_factor": 1.25}, "Switch top-1"),
        (TOP2 | {"priority": "score"}, "GShard top-2 batch priority"),
        (TOP2 | {"balance": "bias"}, "GShard top-2 loss-free bias"),
        ({"router": "hash", "capacity_factor": 1.25}, "Hash"),
        ({"router": "hash", "capacity_factor": 1.25, "hash_table": "balanced"}, "Hash balanced"),
        ({"router": "dense"}, "Dense"),
        ({"router": "dense_moe"}, "Dense MoE"),
        ({"router": "linear_assignment"}, "BASE"),
        ({"router": "expert_threshold"}, "Threshold-CF2"),
    ],
)
def test_arm_label_says_what_is_unusual(keys, label):
    assert arm_label(keys) == label
    assert arm_label(RunConfig(**keys)) == label


def test_arm_label_leaves_out_what_stands_on_an_axis():
    assert arm_label(EC | {"capacity_factor": 0.5}, axes=["capacity_factor"]) == "EC"
    assert arm_label(TOP2 | {"capacity_factor": 8.0}, axes=["capacity_factor"]) == "GShard top-2"


def test_a_run_survives_the_disk(tmp_path):
    result = make(RunConfig(seed=3))
    result.curve.to_csv(tmp_path / "curve.csv", index=False)
    with pytest.raises(FileNotFoundError):
        results.read_run(tmp_path)  # not done
    summary = result.summary | {
        "mfu": math.nan,
        "numpy": np.float32(0.5),
        "nested": {"x": [np.int64(1), math.inf]},
    }
    results.write_summary(tmp_path, summary)
    again = results.read_run(tmp_path)
    assert again.ok and again.path == tmp_path
    assert (
        again.summary["mfu"] is None and again.summary["numpy"] == 0.5 and again.summary["nested"] == {"x": [1, None]}
    )
    pd.testing.assert_frame_equal(again.curve, result.curve.astype(float))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["curve.csv", "summary.json"]


def test_a_record_is_thinned_and_keeps_both_ends(tmp_path):
    result = make(RunConfig(), rows=1000)
    results.write_record(tmp_path / "a.json", result)
    again = results.read_record(tmp_path / "a.json")
    assert len(again.curve) == results.CURVE_POINTS
    assert again.curve["step"].iloc[[0, -1]].tolist() == [1.0, 1000.0]
    assert again.curve["step"].is_monotonic_increasing and again.curve["step"].is_unique
    assert again.curve["val_loss"].iloc[-1] == pytest.approx(2.0)
    assert again.curve["dropped"].isna().all()  # not measured stays not measured
    assert "NaN" not in (tmp_path / "a.json").read_text()
    assert [r.summary["name"] for r in results.load_records(tmp_path)] == [result.summary["name"]]
    assert results.load_records(tmp_path / "absent") == []


def test_damage_is_named(tmp_path):
    (tmp_path / "a.json").write_text('{"summary": ')
    (tmp_path / "cut.json").write_bytes('{"summary": "ü'.encode()[:-1])
    for name in ("a", "cut"):
        with pytest.raises(ConfigError, match=rf"{name}\.json is damaged .* delete it"):
            results.read_record(tmp_path / f"{name}.json")
    (tmp_path / "b.json").write_text(json.dumps({"summary": {}}))
    with pytest.raises(ValueError, match=r"b\.json is no record"):
        results.read_record(tmp_path / "b.json")


def test_table_has_a_row_per_run_and_gaps_for_what_is_missing():
    config = RunConfig()
    rows = [
        make(config),
        not_run(config.replace(seed=1)),
        make(config.replace(seed=2), loss=9.0, status="diverged"),
    ]
    frame = table(rows)
    assert frame["arm"].tolist() == ["EC-CF2"] * 3
    assert frame["status"].tolist() == ["finished", "not run", "diverged"]
    assert frame["val_loss"].iloc[0] == 2.0 and frame["val_loss"].iloc[1:].isna().all()
    assert frame["dropped"].iloc[0] == 0.25 and frame["num_experts"].eq(config.num_experts).all()
    assert frame["share_8"].isna().all() and frame["mfu"].isna().all()
    assert table([]).empty


def test_two_arms_are_never_two_seeds_of_one():
    narrow, wide = RunConfig(router="dense", d_ff=128), RunConfig(router="dense", d_ff=256)
    frame = table([make(narrow), make(wide), make(RunConfig())])
    assert frame["arm"].tolist() == ["Dense d_ff=128", "Dense d_ff=256", "EC-CF2"]
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
    assert frame["arm"].tolist() == ["EC-CF2"] * 3 + ["Dense"]
    assert frame["val_loss"].iloc[:3].tolist() == [3.0, 2.5, 2.0]
    assert math.isnan(frame["val_loss"].iloc[3]) and frame["status"].iloc[3] == "not run"
    assert curves([]).empty


def test_by_seed_takes_finished_runs_only():
    config = RunConfig()
    rows = [make(config), make(config.replace(seed=1), loss=3.0), not_run(config.replace(seed=2))]
    rows.append(make(config.replace(seed=3), status="diverged"))
    assert results.by_seed(rows) == {0: 2.0, 1: 3.0}
    assert results.by_seed(rows, "dropped") == {0: 0.25, 1: 0.25}


def test_weights_that_are_not_here_are_named(tmp_path, monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.setenv("ECMOE_HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="record holds none"):
        make(RunConfig()).load_model()


def test_both_routings_of_a_study_stand_below_each_other():
    done = make(RunConfig(), 2.0)
    done.summary["val_loss_causal"] = 2.5
    found = results.by_routing({"A": [done], "B": [not_run(RunConfig(seed=1))]})
    assert found["arm"].tolist() == ["A", "A", "B", "B"] and found["routing"].tolist() == ["as trained", "causally"] * 2
    assert found["loss"].tolist()[:2] == [2.0, 2.5] and found["loss"].isna().tolist() == [False, False, True, True]
