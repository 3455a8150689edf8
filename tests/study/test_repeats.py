"""A recorded run trained anew: equal where the code computes the same; and which codes that shows to be one."""

import contextlib
import re
import shutil
from types import SimpleNamespace

import pandas as pd
import pytest
from typer.testing import CliRunner

from ecmoe import paths, run_or_load
from ecmoe.cli import app
from ecmoe.config import ConfigError
from ecmoe.files import Damaged, write_json, write_text
from ecmoe.report.markup import text_of
from ecmoe.report.page import provenance
from ecmoe.study import plan, repeats
from ecmoe.study.load import Study
from ecmoe.training.result import Result, not_run, read_record, write_record
from tests.continual.small import EC, GATE


def test_a_run_repeated_is_equal_to_the_last_digit_and_a_change_is_found(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setenv("ECMOE_HOME", str(tmp_path))
    config = tiny_config(steps=6, eval_every=2)
    run_or_load(config, records=paths.results("gpu", "runs"), progress=False)
    record = paths.results("gpu", "runs") / f"{config.name}.json"
    before, runs = record.read_bytes(), sorted(paths.runs().rglob("*"))
    found = repeats.again(config.name, "gpu")
    assert found["equal"] and found["rows"] == 3 and found["differs"] == {} and found["router"] == "expert_choice"
    assert repeats.kept("gpu") == [found] and found["recorded"] == found["code"]
    assert repeats.again(config.name, "gpu", steps=3)["rows"] == 2  # a validation follows every second step
    assert repeats.kept("gpu") == [found]  # the longer one says more

    kept = read_record(record)
    other = kept.curve.assign(val_loss=kept.curve["val_loss"] + [0, 0, 1e-6])
    write_record(record, Result(kept.summary | {"code": "before"}, other))
    monkeypatch.setattr(plan, "sound", lambda scale: ([plan.Planned(config.name, config, (), (), 0)], {}))
    again = ["again", config.name[:-3], "--scale", "gpu"]
    assert CliRunner().invoke(app, [*again, "--steps", "4"]).exit_code == 0  # equal so far
    told = CliRunner().invoke(app, again)
    said = f"{config.name}  code before -> {found['code']}  {found['device']}  of 3 rows some differ: val_loss by up to 1e-06"
    assert told.exit_code == 1 and told.stdout == said + "\n"
    assert {one["recorded"]: one["equal"] for one in repeats.kept("gpu")} == {"before": False, found["code"]: True}
    shutil.rmtree(paths.cache())  # as where nothing was read yet
    monkeypatch.setattr(repeats, "code_digest", lambda: "later")  # of which nothing is kept
    monkeypatch.setattr(repeats, "device_name", lambda: "another")  # says nothing of the code
    assert not repeats.again(config.name, "gpu", steps=2)["differs"] and len(repeats.kept("gpu")) == 2

    with monkeypatch.context() as patch:
        write_record(record, kept)
        for column in ("train_loss", "val_loss", "val_loss_causal"):
            patch.setattr(
                repeats,
                "_trained",
                lambda *_, column=column: Result(kept.summary, kept.curve.assign(**{column: kept.curve[column] + 0.5})),
            )
            assert repeats.again(config.name, "gpu")["differs"] == {column: pytest.approx(0.5)}
        patch.setattr(repeats, "_trained", lambda *_: kept)
        write_record(record, Result(kept.summary, kept.curve.iloc[1:]))  # which lacks the first validation
        shorter = repeats.again(config.name, "gpu")
        assert shorter["equal"] and shorter["rows"] == 2

    write_record(record, kept)
    assert record.read_bytes() == before and sorted(paths.runs().rglob("*")) == runs
    with pytest.raises(ConfigError, match="nobody: there is no record .*`ecmoe run nobody --scale gpu` makes one"):
        repeats.again("nobody", "gpu")
    (file,) = paths.results("gpu", "repeats").glob("*-before-*")
    file.write_text(file.read_text().replace("false", "true"))
    with pytest.raises(Damaged, match="check sum"):
        repeats.kept("gpu")
    monkeypatch.setattr(repeats, "code_digest", lambda: found["code"])
    monkeypatch.setattr(repeats, "_trained", lambda *_: pytest.fail("trained in vain"))
    write_record(record, Result(kept.summary | {"code": "before"}, kept.curve))
    with pytest.raises(Damaged, match="check sum"):
        repeats.again(config.name, "gpu")


def test_it_is_trained_where_there_is_room_until_enough_is_known_and_leaves_the_room(
    tiny_config, monkeypatch, tmp_path
):
    monkeypatch.setenv("ECMOE_HOME", str(tmp_path / "new"))  # where nothing was run
    config, did = tiny_config(), []

    @contextlib.contextmanager
    def place():
        yield "a card"
        did.append("left")

    def train_run(config, folder, *, callbacks, where):
        did.append((config, where, folder.parent))
        pd.DataFrame({"step": [3, 4], "val_loss": [2.5, 2.25]}).to_csv(folder / "curve.csv", index=False)
        for step in (3, 4, 5):
            callbacks[0].on_validation_end(SimpleNamespace(global_step=step), None)
            did.append(step)

    monkeypatch.setattr("ecmoe.training.gpus.place", place)
    monkeypatch.setattr("ecmoe.training.run.train_run", train_run)
    monkeypatch.setattr("ecmoe.training.run.free_memory", lambda: did.append("free"))
    curve = repeats._trained(config, 4, not_run(config)).curve
    assert did == [(config, "a card", paths.cache()), 3, "free", "left"] and not any(paths.cache().iterdir())
    assert curve[["step", "val_loss"]].values.tolist() == [[3, 2.5], [4, 2.25]]


def test_a_repeat_takes_the_place_of_one_that_compared_no_more_rows(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setenv("ECMOE_HOME", str(tmp_path))
    config = tiny_config()
    curve = pd.DataFrame({"step": [2, 4], **dict.fromkeys(repeats.COMPARED, [3.0, 2.5])})
    record = not_run(config).summary | {"status": "finished", "device": "a card", "code": "before"}
    monkeypatch.setattr(repeats, "device_name", lambda: "a card")
    monkeypatch.setattr(repeats, "read_record", lambda path: Result(record, curve))
    paths.results("gpu", "runs").mkdir(parents=True)
    (paths.results("gpu", "runs") / f"{config.name}.json").touch()
    lower, elsewhere = curve.assign(val_loss=[3.0, 2.25]), curve.assign(step=[3, 5])
    gap, without = curve.assign(val_loss=[3.0, None]), curve.drop(columns="train_loss")
    cases = [
        (curve, 2, {}),
        (lower, 2, {"val_loss": 0.25}),  # lower or higher
        (gap, 2, {"val_loss": None}),
        (without, 2, {"train_loss": None}),
        (curve[:1], 1, {}),
        (elsewhere, 0, {}),  # of no common step nothing is known
    ]
    for now, rows, differs in cases:
        monkeypatch.setattr(repeats, "_trained", lambda *_, now=now: Result(record, now))
        found = repeats.again(config.name, "gpu")
        assert (found["rows"], found["equal"], found["differs"]) == (rows, rows > 0 and not differs, differs)
        (kept,) = repeats.kept("gpu")
        assert (kept["rows"], kept["equal"]) == (2, now is curve)


def test_what_was_found_is_told_where_it_cannot_be_kept(tiny_config, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ECMOE_HOME", str(tmp_path))
    config = tiny_config()
    result = Result(not_run(config).summary | {"device": repeats.device_name()}, pd.DataFrame({"step": [2]}))
    write_record(paths.results("gpu", "runs") / f"{config.name}.json", result)
    monkeypatch.setattr(repeats, "_trained", lambda *_: result)
    paths.results("gpu", "repeats").touch()  # no folder
    assert repeats.again(config.name, "gpu")["rows"] == 1
    assert re.search(rf"gpu/repeats/{config.name}-.*\.json can't be written: ", capsys.readouterr().err)


def test_a_run_of_several_processes_is_not_repeated(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setenv("ECMOE_HOME", str(tmp_path))
    monkeypatch.setattr(repeats, "_trained", lambda config, *_: pytest.fail("trained"))
    record = not_run(tiny_config()).summary | {"status": "finished", "world_size": 2}
    monkeypatch.setattr(repeats, "read_record", lambda path: Result(record))
    (paths.results("gpu", "runs")).mkdir(parents=True)
    (paths.results("gpu", "runs") / "one.json").touch()
    with pytest.raises(ConfigError, match="one: only single-process runs can be repeated"):
        repeats.again("one", "gpu")
    record["world_size"] = 1
    for one in (record, {key: value for key, value in record.items() if key != "world_size"}):
        monkeypatch.setattr(repeats, "read_record", lambda path, one=one: Result(one))
        with pytest.raises(BaseException, match="trained"):
            repeats.again("one", "gpu")


@pytest.mark.parametrize("config", [GATE, EC], ids=["gates", "one network"])
def test_tasks_in_sequence_are_repeated_to_the_end_and_compared_task_by_task(config, tmp_path, monkeypatch):
    monkeypatch.setenv("ECMOE_HOME", str(tmp_path))
    config = config.replace(steps=5, gate_steps=5)
    run_or_load(config, records=paths.results("gpu", "runs"), progress=False)
    found = repeats.again(config.name, "gpu", steps=1)
    assert found["equal"] and found["rows"] == 5 and found["router"] == f"{config.approach} {config.router}"
    assert repeats.kept("gpu") == [found] and repeats.covered([config.name], "gpu") == [25]

    path = paths.results("gpu", "runs") / f"{config.name}.json"
    kept = read_record(path)
    for name in ("accuracy", "accuracy_task_known", "relatedness")[: 3 if "gate" in config.approach else 2]:
        rows = [[*row] for row in kept.summary[name]]
        rows[4][1] += 0.25
        write_record(path, Result(kept.summary | {name: rows}))
        monkeypatch.setattr(repeats, "_trained", lambda *_: kept)
        found = repeats.again(config.name, "gpu")
        assert not found["equal"] and found["differs"] == {f"{name} 1": pytest.approx(0.25)}


def test_repeats_are_kept_in_the_order_of_their_files(tmp_path, monkeypatch):
    monkeypatch.setenv("ECMOE_HOME", str(tmp_path))
    for name in "bca":
        write_json(tmp_path / f"reports/gpu/repeats/{name}.json", {"run": name}, sealed=True)
    assert repeats.kept("gpu") == [{"run": name} for name in "abc"] and repeats.kept("paper") == []


def run(code, router="dense", device="H100", data="stdlib"):
    return {"code": code, "device": device, "config": {"router": router, "data": data}}


def repeat(recorded, code, router="dense", device="H100", equal=True):
    return {
        "run": f"{router} {recorded}",
        "recorded": recorded,
        "code": code,
        "router": router,
        "device": device,
        "equal": equal,
    }


@pytest.mark.parametrize(
    ("runs", "kept", "shown"),
    [
        ([run("a"), run("a", "hash")], [], []),  # nothing to show
        ([run("a"), run("a")], [repeat("a", "b")], []),  # whatever was repeated
        ([run("a"), run("b")], [], None),
        ([run("a"), run("b")], [repeat("a", "b")], ["dense a"]),
        ([run("b"), run("a")], [repeat("a", "b")], ["dense a"]),  # either way round
        ([run("a"), run("c")], [repeat("a", "b"), repeat("c", "b")], ["dense a", "dense c"]),  # by way of a third
        ([run("a"), run("b")], [repeat("a", "b"), repeat("a", "b", equal=False)], None),
        ([run("a"), run("b")], [repeat("a", "b", device="H200")], None),
        ([run("a", data="images:x#0123456789abcdef"), run("b", data="digits")], [repeat("a", "b")], None),  # of text only
        ([run("a", data="images:x"), run("b", data="cifar10")], [repeat("a", "b", "images dense")], ["images dense a"]),
        ([run("a"), run("b"), run("b", device="H200")], [repeat("a", "b")], ["dense a"]),  # by b, on either card
        ([run("a"), run("a", device="H200"), run("b", device="H200")], [repeat("a", "b")], None),  # shown on one card of two
        ([run("a"), run("b", "hash")], [repeat("a", "b")], ["dense a"]),  # by b, both are known
        ([run("a"), run("a", "hash"), run("b", "hash")], [repeat("a", "b")], None),  # by neither
        ([run("a"), run("b", "hash"), run("c", "hash")], [repeat("a", "b"), repeat("b", "c", "hash")], ["dense a", "hash b"]),
        ([run("a"), run("b", "hash")], [repeat("a", "c"), repeat("b", "c", "hash")], ["dense a", "hash b"]),
        ([run("a"), run("b", "hash")], [repeat("a", "c"), repeat("b", "d", "hash")], None),
        ([run("a"), run("b"), run("c")], [repeat("a", "b"), repeat("a", "a")], None),
        ([run("a"), run("b")], [repeat("a", "b"), repeat("b", "b")], ["dense a"]),  # of one code nothing is shown
    ],
)  # fmt: skip
def test_runs_are_of_one_code_where_repeats_show_what_it_would_give(runs, kept, shown):
    assert repeats.linked(runs, kept) == shown


@pytest.mark.parametrize("router", ["dense", "joint dense"])
def test_repeats_of_texts_say_nothing_of_tasks_in_sequence(router):
    tasks = [run(code) for code in "ab"]
    for one in tasks:
        one["config"]["approach"] = "joint"
    assert repeats.linked(tasks, [repeat("a", "b", router)]) == (None if router == "dense" else ["joint dense a"])


def test_a_page_says_which_repeats_it_rests_on_in_place_of_a_warning(tmp_path, monkeypatch):
    monkeypatch.setenv("ECMOE_HOME", str(tmp_path))
    made = [run(code) | {"name": f"r{code}", "seed": 0, "status": "finished"} for code in "ab"]
    study = Study("01_a", "gpu", {}, [], (), {"EC": [Result(one) for one in made]})
    said = []
    monkeypatch.setattr("ecmoe.report.page.show_html", lambda html: said.append(text_of(html)))
    provenance(study)
    assert "differ in code" in said[0]
    curve = pd.DataFrame({"step": [200, 400, 600], "val_loss": 3.0})
    for i, (rows, equal) in enumerate([(2, True), (1, True), (3, False)]):
        one = repeat("a", "b" if equal else "c", equal=equal) | {"rows": rows}
        write_json(paths.results("gpu", "repeats") / f"{i}.json", one, sealed=True)
    record = paths.results("gpu", "runs") / "dense a.json"
    monkeypatch.setattr(repeats, "read_record", {record: Result(made[0], curve)}.__getitem__)
    gone = r"repeats/0\.json is damaged \(the record of its run is gone, .*runs/dense a\.json\): delete it, then"
    with pytest.raises(Damaged, match=gone):
        provenance(study)
    write_text(record, "")
    provenance(study)
    assert "differ" not in said[1] and "compute the same numbersdense a" in said[1]
    assert "equal to the last digit over the first 200 to 400 steps, which" in said[1]
    paths.results("gpu", "repeats").joinpath("1.json").unlink()
    assert repeats.covered(["dense a"], "gpu") == [400] and repeats.covered([], "gpu") == []
    write_json(paths.results("gpu", "repeats") / "3.json", {"run": "dense a"}, sealed=True)
    for read in (repeats.kept, lambda scale: repeats.covered(["dense a"], scale)):
        with pytest.raises(Damaged, match=r"repeats/3\.json is damaged \(it has no (device|equal)\)"):
            repeats.linked(made, read("gpu"))
