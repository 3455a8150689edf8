"""A run is made once, by one process; what is kept is believed only as it was written; what is finished is never lost."""

import multiprocessing
import os
import shutil
import threading

import lightning as L
import numpy as np
import pytest
import torch
from filelock import FileLock, Timeout

from ecmoe import load_model, paths, run_or_load
from ecmoe.files import ConfigError, Damaged
from ecmoe.training import once as protocol
from ecmoe.training import run as training
from ecmoe.training.result import not_run, read_record, read_run, write_run


def once(config, make, **how):
    return protocol.once(config, make, **{"records": None, "train": True, "weights": False, "progress": True} | how)


@pytest.fixture(scope="module")
def finished(tiny_config, tmp_path_factory):
    """A finished run: its config, and a copy of its folder."""
    config = tiny_config(seed=50, steps=4, eval_every=2)
    shutil.rmtree(paths.runs() / config.name, ignore_errors=True)  # a worker may set the module up twice
    result = run_or_load(config, progress=False)
    kept = tmp_path_factory.mktemp("once") / "kept"
    shutil.copytree(result.path, kept)
    return config, kept


@pytest.fixture
def run(finished):
    """The same, as new for each test."""
    config, kept = finished
    folder = paths.runs() / config.name
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(kept, folder)
    return config, folder


def flip(path, rng) -> None:
    content = bytearray(path.read_bytes())
    content[rng.integers(len(content))] ^= 1 << rng.integers(8)
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["summary.json", "curve.csv", "config.yaml", "model.safetensors"])
def test_every_flipped_bit_is_named_and_none_believed(run, name):
    config, folder = run
    good, rng = (folder / name).read_bytes(), np.random.default_rng(1)
    for _ in range(25):
        flip(folder / name, rng)
        with pytest.raises(Damaged, match=f"{name} is damaged .* delete it"):
            run_or_load(config, train=False, weights=True)
        with pytest.raises(Damaged, match=f"{name} is damaged"):
            load_model(folder)
        (folder / name).write_bytes(good)
    assert run_or_load(config, train=False).ok


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("summary.json", lambda path: path.write_text("{}")),
        ("summary.json", lambda path: path.write_text("")),
        ("curve.csv", lambda path: path.write_text("step,val_loss\n1,0.1\n")),
        ("curve.csv", lambda path: path.unlink()),
        ("config.yaml", lambda path: path.write_text(path.read_text().replace("d_model: 16", "d_model: 32"))),
    ],
)
def test_what_is_damaged_is_made_again_and_told(run, capsys, name, damage):
    config, folder = run
    before = read_run(folder).summary["val_loss"]
    damage(folder / name)
    again = run_or_load(config)
    assert again.ok and again.summary["val_loss"] == before and again.path == folder
    assert f"{name} is damaged" in (said := capsys.readouterr().err) and "next to the old files" in said
    assert said.count("is damaged") == 1
    assert not (folder / "again").exists() and load_model(folder)


def test_damaged_weights_are_made_again_where_they_are_wanted(run, capsys):
    config, folder = run
    weights = (folder / "model.safetensors").read_bytes()
    flip(folder / "model.safetensors", np.random.default_rng(0))
    assert run_or_load(config).ok and "damaged" not in capsys.readouterr().err  # nobody looks at them
    assert run_or_load(config, weights=True, progress=False).load_model() and not capsys.readouterr().err
    assert (folder / "model.safetensors").read_bytes() == weights


@pytest.mark.parametrize("how", [KeyboardInterrupt(), SystemExit(143), MemoryError()])
@pytest.mark.parametrize("kept", [True, False])
def test_an_interrupted_run_says_so_where_it_can_be_continued(tiny_config, capsys, how, kept):
    def make(folder, still_ours):
        if kept:
            (folder / "last.ckpt").touch()
        raise how

    config = tiny_config(seed=52)
    shutil.rmtree(paths.runs() / config.name, ignore_errors=True)
    with pytest.raises(type(how)) as ended:
        once(config, make)
    said = f"[{config.name}] interrupted: the same command continues from the last checkpoint\n"
    goes_on = kept and not isinstance(how, MemoryError)
    assert ended.value is how and capsys.readouterr().err == said * goes_on


@pytest.mark.parametrize("ended", ["failed", "killed"])
def test_a_finished_run_outlives_a_training_for_its_weights(run, monkeypatch, ended):
    config, folder = run
    (folder / "model.safetensors").unlink()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def end(*_):
        assert (folder / "again" / "curve.csv").exists()
        raise MemoryError if ended == "failed" else KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(training, "_whole_state", end)
        with pytest.raises((MemoryError, KeyboardInterrupt)):
            run_or_load(config, weights=True, progress=False)
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    assert run_or_load(config, train=False).ok
    assert run_or_load(config, weights=True, progress=False).load_model() and not (folder / "again").exists()


@pytest.mark.parametrize("moves", range(5))
def test_a_kill_between_the_moves_into_place_loses_nothing(run, monkeypatch, moves):
    config, folder = run
    before = read_run(folder)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    replace, left = os.replace, [moves]

    def killed(source, target):
        if "again" in str(source) and str(target).startswith(str(folder)) and "again" not in str(target):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
        replace(source, target)

    with monkeypatch.context() as broken:
        broken.setattr(protocol.os, "replace", killed)
        broken.setattr(protocol.shutil, "rmtree", lambda again: killed(again / "last.ckpt", folder / "last.ckpt"))
        with pytest.raises(KeyboardInterrupt):
            run_or_load(config, weights=True, progress=False)
    found = read_run(folder)  # whoever looks in between
    assert found.ok and found.summary["seconds"] != before.summary["seconds"] and found.load_model()
    monkeypatch.setattr(training, "train_run", lambda *_: pytest.fail("trained again"))
    assert run_or_load(config, weights=True).ok and (folder / "model.safetensors").read_bytes() == weights
    assert moves == 4 or not (folder / "again").exists()


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "between parts", "longer", "no archive"])
def test_a_damaged_checkpoint_is_told_and_the_run_begins_anew(tiny_config, monkeypatch, capsys, damage):
    config = tiny_config(seed=51, steps=4, checkpoint_every=2, eval_every=4)
    folder = paths.runs() / config.name
    with monkeypatch.context() as broken:
        broken.setattr(training, "_whole_state", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_or_load(config, progress=False)
    checkpoint = folder / "last.ckpt"
    content = checkpoint.read_bytes()
    weight = content.index(
        torch.load(checkpoint, weights_only=True)["state_dict"]["model.norm.weight"].numpy().tobytes()
    )
    flipped = content[:weight] + bytes([content[weight] ^ 1]) + content[weight + 1 :]
    between = content[:12] + bytes([content[12] ^ 1]) + content[13:]  # no check sum of an archive covers this
    damages = {
        "empty": b"",
        "cut": content[:-100],
        "flipped": flipped,
        "between parts": between,
        "longer": content + b"x",
    }
    checkpoint.write_bytes(damages.get(damage, b"x" * 500))
    again = run_or_load(config)
    assert again.ok and "last.ckpt is damaged" in (said := capsys.readouterr().err) and "starts again" in said
    whole = run_or_load(config.replace(checkpoint_every=4, eval_every=2), progress=False)
    assert again.summary["val_loss"] == whole.summary["val_loss"] and not checkpoint.exists()
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("of", "before", "taken", "kept"),
    [
        (training.Recorder, "write_curve", True, set()),
        (training.Recorder, "save", False, set()),
        (training, "_whole_state", False, {"curve.csv"}),  # after the last step
    ],
)
def test_a_removed_lock_stops_the_run_that_held_it(of, before, taken, kept, tiny_config, monkeypatch):
    config = tiny_config(seed=52 + taken, checkpoint_every=3 if before == "save" else 100)
    go_on = getattr(of, before)

    def removed(*given):
        (paths.runs() / f"{config.name}.lock").unlink(missing_ok=True)
        if taken:  # by a second process
            (paths.runs() / f"{config.name}.lock").touch()
        return go_on(*given)

    shutil.rmtree(paths.runs() / config.name, ignore_errors=True)
    with monkeypatch.context() as meddled:
        meddled.setattr(of, before, removed)
        with pytest.raises(
            OSError, match=rf"{config.name}\.lock was removed while {config.name} was .* call again to resume"
        ):
            run_or_load(config, progress=False)
    left = {path.name for path in (paths.runs() / config.name).iterdir()}
    assert left == {"config.yaml"} | kept and run_or_load(config, progress=False).ok


def test_a_record_of_another_run_is_not_taken(run, tmp_path):
    config, _ = run
    run_or_load(config, records=tmp_path)
    other = config.replace(seed=99)
    shutil.copy(tmp_path / f"{config.name}.json", tmp_path / f"{other.name}.json")
    with pytest.raises(ConfigError, match=f"{other.name}.json is damaged .it holds the run {config.name}"):
        run_or_load(other, records=tmp_path)
    assert read_record(tmp_path / f"{config.name}.json").ok


def test_a_finished_run_of_another_schema_or_name_is_not_taken(run):
    config, folder = run
    other = config.replace(seed=98)
    shutil.copytree(folder, paths.runs() / other.name)
    with pytest.raises(Damaged, match=rf"summary\.json is damaged \(it holds the run {config.name}\)"):
        run_or_load(other, train=False)
    assert run_or_load(other, progress=False).summary["seed"] == 98


def test_what_a_killed_writer_left_is_swept_away(tiny_config):
    config = tiny_config(seed=53, steps=2, eval_every=2)
    folder = paths.runs() / config.name
    folder.mkdir(parents=True)
    (folder / ".last.ckpt.99.tmp").write_text("half of it")
    assert run_or_load(config, progress=False).ok and not [path for path in folder.iterdir() if path.suffix == ".tmp"]


@pytest.mark.parametrize("name", ["curve.csv", "model.safetensors"])
def test_what_was_made_again_and_damaged_takes_no_place(run, tmp_path, name):
    config, folder = run
    shutil.copytree(folder, tmp_path / "again")
    shutil.move(tmp_path / "again", folder / "again")
    (folder / "curve.csv").write_text("step\n0\n")  # so that a move would be seen
    (folder / "again" / name).write_text("step\n1\n")
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    with pytest.raises(Damaged, match=rf"again.{name} is damaged"):
        run_or_load(config, train=False)
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    assert run_or_load(config, weights=True, progress=False).load_model() and not (folder / "again").exists()


def test_a_run_that_diverged_is_not_trained_again_for_its_weights_and_no_record(tiny_config, tmp_path):
    config = tiny_config(seed=158)
    (folder := paths.runs() / config.name).mkdir(parents=True)
    write_run(folder, not_run(config).summary | {"status": "diverged", "data": None})
    for keys in ({"weights": True}, {"records": tmp_path}):
        assert run_or_load(config, progress=False, **keys).summary["status"] == "diverged"
    assert not any(tmp_path.iterdir())


def test_a_rank_that_follows_takes_what_is_done_and_waits_for_no_lock(run, monkeypatch):
    config, made = run[0], []
    monkeypatch.setattr(protocol, "rank", lambda: 1)
    monkeypatch.setattr(protocol, "lock", lambda *_: pytest.fail("the first rank holds it"))
    assert once(config, lambda *_: pytest.fail("made again")).ok
    other = config.replace(seed=97)
    once(other, lambda folder, _: made.append(folder) or not_run(other))
    assert made == [paths.runs() / other.name]
    (run[1] / "model.safetensors").unlink()
    once(config, lambda folder, _: made.append(folder) or not_run(config), weights=True)
    assert made[1:] == [run[1] / "again"]


def test_two_processes_that_want_the_same_run_train_it_once(tiny_config, forked):
    config, results = tiny_config(seed=25, steps=20), multiprocessing.get_context("fork").Queue()

    def train() -> None:
        trained = []
        fit = L.Trainer.fit
        L.Trainer.fit = lambda *args, **keys: (trained.append(1), fit(*args, **keys))
        results.put((run_or_load(config, progress=False).ok, len(trained)))

    processes = [forked(train) for _ in range(2)]
    assert sorted(results.get(timeout=60) for _ in processes) == [(True, 0), (True, 1)]
    for process in processes:
        process.join()


@pytest.mark.parametrize("status", ["stopped", "diverged"])
def test_what_was_made_again_and_did_not_finish_is_told_and_takes_no_place(run, status):
    config, folder = run
    (folder / "model.safetensors").unlink()

    def end(again, _):
        write_run(again, not_run(config).summary | {"status": status})
        return read_run(again)

    assert once(config, end, weights=True).summary["status"] == status
    assert run_or_load(config, train=False).ok and read_run(folder).ok


def test_where_nothing_is_said_what_is_not_done_is_made_and_shown(monkeypatch, tmp_path, tiny_config):
    config, told, lock = tiny_config(), [], protocol.lock
    monkeypatch.setattr(paths, "runs", lambda: tmp_path)
    monkeypatch.setattr(protocol, "lock", lambda folder, progress: told.append(progress) or lock(folder, progress))
    ends = iter(["stopped", "finished"])

    def make(folder, still_ours):
        write_run(folder, not_run(config).summary | {"status": next(ends)})
        return read_run(folder)

    assert [once(config, make).summary["status"] for _ in range(3)] == ["stopped", "finished", "finished"]
    assert told == [True, True]  # the third found what was done, though without weights


@pytest.mark.parametrize("progress", [True, False])
def test_who_finds_the_lock_taken_waits_and_a_rank_does_not(tmp_path, monkeypatch, capsys, progress):
    taken, done = threading.Event(), threading.Event()

    def hold() -> None:
        with FileLock(tmp_path / "run.lock"):
            taken.set()
            done.wait()

    threading.Thread(target=hold, daemon=True).start()
    taken.wait()
    with monkeypatch.context() as ranks, pytest.raises(SystemExit, match="another process is computing run: wait"):
        ranks.setattr(protocol, "in_torchrun", lambda: True)
        with protocol.lock(tmp_path / "run", progress):
            pass
    assert not capsys.readouterr().err
    threading.Timer(0.1, done.set).start()
    with protocol.lock(tmp_path / "run", progress) as still_ours:
        still_ours()
        with pytest.raises(Timeout):  # nobody else has it
            FileLock(tmp_path / "run.lock").acquire(timeout=0)
    assert ("[run] waiting: another process is computing it" in capsys.readouterr().err) == progress


def test_a_failure_is_kept_until_a_try_succeeds_and_where_nothing_is_finished(tiny_config, run):
    protocol.keep_failure(*run, RuntimeError("of a rank"))
    assert read_run(run[1]).ok
    config = tiny_config(seed=96, steps=2)
    with pytest.raises(ZeroDivisionError):
        once(config, lambda *_: 1 / 0)
    kept = run_or_load(config, train=False).summary
    assert kept["status"] == "failed" and kept["error"] == "ZeroDivisionError: division by zero"
    assert run_or_load(config, progress=False).ok
