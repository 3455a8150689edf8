"""Continual learning's study: approaches times seeds, its figures and its tables."""

import math

import pytest
from matplotlib import pyplot

from ecmoe import paths
from ecmoe.continual import runs
from ecmoe.report import plots
from ecmoe.study import continual
from ecmoe.study.load import load
from ecmoe.study.parameters import page_parameters
from ecmoe.training.result import not_run, write_record

FAST = {"steps": 25, "gate_steps": 60, "code": 16, "d_model": 16, "d_ff": 16}


def study_of(seeds, train=True, scale="smoke", **changes):
    settings = page_parameters("11_continual_learning", {"scale": scale})["settings"] | {
        "data": "digits",
        "patch": 4,
        **FAST,
        **changes,
    }
    return load("11_continual_learning", {"scale": scale, "seeds": seeds, "settings": settings, "train_missing": train})


@pytest.fixture(scope="module")
def study():
    """Every approach on split digits, one seed: some seconds in all."""
    return study_of([0], steps=40)


def test_records_are_read_first_and_by_hand_none_is_written(study, monkeypatch, tmp_path):
    (result,) = study["Expert Gate"]
    monkeypatch.setenv("ECMOE_HOME", str(tmp_path))
    write_record(paths.records("smoke") / f"{result.summary['name']}.json", result)
    monkeypatch.setattr(runs, "run_or_load", lambda settings, **_: not_run(settings))
    found = study_of([0], steps=40)
    assert found["Expert Gate"][0].summary["accuracy"] == result.summary["accuracy"]
    assert [found[name][0].summary["status"] for name in list(found)[1:]] == ["not run"] * 4
    assert len(list(paths.records("smoke").iterdir())) == 1


def test_a_run_that_fails_is_told_and_the_others_go_on(monkeypatch):
    monkeypatch.setattr(runs, "run_or_load", lambda settings, **_: 1 / 0)
    for (result,) in study_of([77]).values():
        assert result.summary["status"] == "failed" and "ZeroDivisionError" in result.summary["error"]


def drawn(plot):
    if plot.figure is not None:  # where nothing was run there is none
        plot.figure.canvas.draw()
    assert plot.alt and not pyplot.get_fignums()
    return plot


def test_figures_show_what_was_measured(study):
    shown = continual.with_oracle(study)
    plot = drawn(plots.retention(continual.retained(shown)))
    row = plot.data.query("approach == 'one dense network' and task == 'task 1' and after == 5")
    assert row["mean"].item() == pytest.approx(100 * study["one dense network"][0].summary["accuracy"][4][0])
    assert "one dense network: task 1" in plot.alt and "Not run" not in plot.alt
    plot = drawn(plots.kept_and_lost(continual.table(shown)))
    assert set(plot.data["approach"]) == set(shown) and "joint, dense" not in plot.alt.split("forgetting (")[1]
    gate, ec = study["Expert Gate"], study["one EC network"]
    tasks = gate[0].summary["task_names"]
    confusion, related = (continual.mean_matrix(gate, name) for name in ("confusion", "relatedness"))
    assert (
        f"{100 * gate[0].summary['gate_right']:.1f}% of a task's images"
        in drawn(plots.gate_choices(confusion, related, tasks)).alt
    )
    matrices = (
        continual.mean_matrix(gate, "moved"),
        continual.mean_matrix(ec, "moved"),
        continual.mean_matrix(ec, "expert_shares"),
    )
    assert "that were there by 0%." in drawn(plots.overwritten(*matrices, tasks)).alt


def test_gaps_are_named():
    nothing = continual.with_oracle(study_of([0, 1], train=False, steps=12345))
    for plot in (plots.retention(continual.retained(nothing)), plots.kept_and_lost(continual.table(nothing))):
        assert "Not run: Expert Gate, oracle gate" in drawn(plot).alt
    for plot in (plots.gate_choices(None, None, []), plots.overwritten(None, None, None, [])):
        assert "not run" in drawn(plot).alt
    assert continual.by_task(nothing)["all tasks"].isna().all()
    assert set(continual.compare(nothing, "gpu")["answer"]) == {"not run"}
    assert len(continual.origins(nothing["Expert Gate"])) == 0


def test_tables(study):
    shown = continual.with_oracle(study)
    tasks = continual.by_task(shown).set_index("approach")
    last = study["one EC network"][0].summary["accuracy"][4]
    assert tasks.loc["one EC network"].tolist() == pytest.approx([*last, sum(last) / 5])
    means = continual.by_approach(shown).set_index("approach")
    assert means.loc["oracle gate", "forgetting"] == 0 and math.isnan(means.loc["oracle gate", "gate_right"])
    rows = continual.compare(shown, "gpu")
    assert (
        rows["answer"].tolist() == ["undecided"] * len(rows) and rows["difference"][0] > 50
    )  # one seed has no interval
    assert set(continual.compare(shown, "smoke")["answer"]) == {"plumbing only"}
    assert continual.origins(study["Expert Gate"])["how"][0] == "scratch"
