"""Continual learning's study: arms times seeds, its figures and its tables."""

import pytest
from matplotlib import pyplot

from ecmoe import paths
from ecmoe.report import plots
from ecmoe.study import continual
from ecmoe.study.load import load
from ecmoe.training import run
from ecmoe.training.result import Result, not_run, write_record

FAST = {"steps": 25, "warmup_steps": 2, "gate_steps": 60, "code": 16, "d_model": 16, "d_ff": 16}


def study_of(seeds, train=True, **changes):
    return load("11_continual_learning", {"seeds": seeds, "base": FAST | changes, "train_missing": train})


@pytest.fixture(scope="module")
def study():
    """Every arm on split digits, one seed: some seconds in all."""
    return study_of([0], steps=40)


def test_records_are_read_first_and_by_hand_none_is_written(study, monkeypatch, tmp_path):
    (result,) = study["Expert Gate"]
    monkeypatch.setenv("ECMOE_HOME", str(tmp_path))
    write_record(paths.results("smoke", "runs") / f"{result.summary['name']}.json", result)
    monkeypatch.setattr(run, "run_or_load", lambda config, **_: not_run(config))
    found = study_of([0], steps=40)
    assert found["Expert Gate"][0].summary["accuracy"] == result.summary["accuracy"]
    assert [found[name][0].summary["status"] for name in list(found)[1:]] == ["not run"] * 4
    assert len(list(paths.results("smoke", "runs").iterdir())) == 1


def test_a_run_that_fails_is_told_and_the_others_go_on(monkeypatch):
    monkeypatch.setattr(run, "run_or_load", lambda config, **_: 1 / 0)
    for (result,) in study_of([77]).values():
        assert result.summary["status"] == "failed" and "ZeroDivisionError" in result.summary["error"]


def drawn(plot):
    if plot.figure is not None:  # where nothing was run there is none
        plot.figure.canvas.draw()
    assert plot.alt and not pyplot.get_fignums()
    return plot


def test_figures_show_what_was_measured(study):
    plot = drawn(plots.retention(continual.retained(continual.with_oracle(study))))
    row = plot.data.query("arm == 'one dense network' and task == 'task 1' and after == 5")
    assert row["mean"].item() == pytest.approx(100 * study["one dense network"][0].summary["accuracy"][4][0])
    assert "one dense network: task 1" in plot.alt and "Not run" not in plot.alt
    gate = study["Expert Gate"]
    confusion, related = (continual.mean_matrix(gate, name) for name in ("confusion", "relatedness"))
    plot = drawn(plots.gate_choices(confusion, related, gate[0].summary["task_names"]))
    assert f"{100 * gate[0].summary['gate_right']:.1f}% of a task's images" in plot.alt


def test_gaps_are_named():
    nothing = continual.with_oracle(study_of([0, 1], train=False, steps=12345))
    assert "Not run: Expert Gate, oracle gate" in drawn(plots.retention(continual.retained(nothing))).alt
    assert "not run" in drawn(plots.gate_choices(None, None, [])).alt
    assert len(continual.origins(nothing["Expert Gate"])) == 0


def test_an_oracle_is_expert_gate_told_the_task(study):
    (gate,), (told,) = (continual.with_oracle(study)[arm] for arm in ("Expert Gate", "oracle gate"))
    assert told.summary["forgetting"] == 0 and told.summary["gate_right"] is None
    assert told.summary["final_accuracy"] == gate.summary["final_accuracy_task_known"] >= gate.summary["final_accuracy"]
    names, table = gate.summary["task_names"], continual.origins([gate])
    sources = ["nothing" if one["task"] is None else names[one["task"]] for one in gate.summary["origins"]]
    assert table["how"][0] == "scratch" and table["started from"].tolist() == sources and len(set(sources)) > 1


def test_tables_of_several_seeds():
    """Of two seeds that ran and one that didn't: rows, means, and where experts started."""
    runs = [
        Result({
            "seed": seed, "status": "finished", "task_names": ["trains", "dogs"], "accuracy": [[0.9, None], [0.8 - seed / 10, 0.7]],
            "confusion": [[1.0, 0.0], [seed, 1 - seed]],
            "origins": [{"task": None, "related": None, "how": "scratch"}, {"task": 0, "related": related, "how": how}],
        })
        for seed, related, how in ((0, 0.5, "fine-tuning"), (1, 0.7, "LwF"))
    ]  # fmt: skip
    lost = Result({"seed": 2, "status": "failed"})
    rows = continual.retained({"a": [*runs, lost]})
    shown = [(0, 1, 1, "trains", 0.9), (0, 2, 1, "trains", 0.8), (0, 2, 2, "dogs", 0.7)]
    shown += [(1, 1, 1, "trains", 0.9), (1, 2, 1, "trains", 0.7), (1, 2, 2, "dogs", 0.7)]
    columns = ["seed", "after", "task", "name", "accuracy"]
    assert list(rows) == ["arm", *columns]
    assert rows.iloc[:6][columns].values.tolist() == [[*cells, pytest.approx(x)] for *cells, x in shown]
    assert (
        set(rows["arm"]) == {"a"}
        and rows.iloc[6][["after", "task", "name", "accuracy"]].isna().all()
        and len(rows) == 7
    )
    assert continual.mean_matrix([*runs, lost], "confusion").values.tolist() == [[1.0, 0.0], [0.5, 0.5]]
    assert continual.mean_matrix([lost], "confusion") is None
    origins = continual.origins([*runs, lost]).fillna(0)
    assert list(origins) == list(continual.origins([])) == ["task", "started from", "relatedness", "how"]
    assert origins.to_dict("records") == [
        {"task": "trains", "started from": "nothing", "relatedness": 0, "how": "scratch"},
        {"task": "dogs", "started from": "trains", "relatedness": pytest.approx(0.6), "how": "fine-tuning; LwF"},
    ]
