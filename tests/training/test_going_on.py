"""A run that was broken off goes on, and ends as one that was not, to the last bit."""

import os
import shutil
import signal
import subprocess
import sys

import lightning as L
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from ecmoe import load_model, paths, run_or_load
from ecmoe.training import run as train
from ecmoe.training.lit import LitModel
from ecmoe.training.recorder import Recorder


def test_the_last_checkpoint_stays_until_the_summary_is_written(tiny_config, monkeypatch, capsys):
    config = tiny_config(seed=33, checkpoint_every=2)
    with monkeypatch.context() as full:
        full.setattr(train, "write_run", lambda *a: (_ for _ in ()).throw(OSError("No space left on device")))
        with pytest.raises(OSError, match="No space"):
            run_or_load(config, progress=False)
    assert run_or_load(config).ok
    assert "resumes from step 8" in capsys.readouterr().err  # there is none after the last step


def test_killed_and_resumed_ends_the_same_to_the_last_bit(tiny_config, forked):
    # A router with noise, micro-batches and a checkpoint between validations: all state must come back.
    config = tiny_config(seed=17, router="token_choice", capacity_factor=1.0, balance="importance_load",
                         accumulate=2, checkpoint_every=3, steps=10)  # fmt: skip
    whole = run_or_load(config, progress=False)
    weights = load_model(whole.path).state_dict()
    whole.path.rename(whole.path.with_name("whole"))

    def killed() -> None:
        end = Recorder.on_train_batch_end

        def kill(self, trainer, *args):
            end(self, trainer, *args)
            if trainer.global_step == 7:
                os.kill(os.getpid(), signal.SIGKILL)

        Recorder.on_train_batch_end = kill
        run_or_load(config, progress=False)

    process = forked(killed)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    folder = paths.runs() / config.name
    assert (folder / "last.ckpt").exists() and not (folder / "summary.json").exists()

    again = run_or_load(config, progress=False)
    assert again.summary["val_loss"] == whole.summary["val_loss"]
    resumed = load_model(again.path).state_dict()
    assert all(torch.equal(resumed[name], weights[name]) for name in weights)
    clock = ["seconds", "tokens_per_second"]
    pd.testing.assert_frame_equal(again.curve.drop(columns=clock), whole.curve.drop(columns=clock), check_exact=True)


@pytest.mark.parametrize("every", [2, 4])
def test_resume_right_after_a_validation(tiny_config, every):
    config = tiny_config(seed=18 + every, checkpoint_every=every)
    whole = run_or_load(config, progress=False)
    whole.path.rename(whole.path.with_name(f"whole{every}"))

    class End(L.Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == 4:
                raise KeyError

    with pytest.raises(KeyError):
        run_or_load(config, callbacks=[End()], progress=False)
    again = run_or_load(config, progress=False)
    assert again.curve["step"].tolist() == whole.curve["step"].tolist()
    pd.testing.assert_frame_equal(again.curve[["val_loss"]], whole.curve[["val_loss"]], check_exact=True)


def test_a_checkpoint_holds_the_row_of_its_step(tiny_config, monkeypatch):
    saved, save = [], Recorder.save
    monkeypatch.setattr(Recorder, "save", lambda self, trainer: (saved.append((trainer.global_step, list(self.rows))), save(self, trainer)))  # fmt: skip
    run_or_load(tiny_config(seed=66, steps=5, eval_every=2, checkpoint_every=1), progress=False)
    assert saved == [(1, []), (2, [2]), (3, [2]), (4, [2, 4])]  # once a step, and none after the last


TINY = ["layers=2", "d_model=16", "d_ff=16", "heads=2", "num_experts=4", "batch_size=4", "sequence_length=16",
        "eval_batches=1", "max_bytes=200000", "eval_every=20"]  # fmt: skip


def command(tmp_path, *settings: str) -> subprocess.Popen:
    """`ecmoe train` in a home of its own."""
    call = [sys.executable, "-m", "ecmoe", "train", *(word for s in [*TINY, *settings] for word in ("--set", s))]
    return subprocess.Popen(call, env=os.environ | {"ECMOE_HOME": str(tmp_path)}, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_what_a_signal_ended_goes_on_at_the_next_call(tmp_path, number, code):
    settings = ("steps=100000", "checkpoint_every=1000")
    with command(tmp_path, *settings) as process:
        for line in process.stderr:
            if "step 40/" in line:
                process.send_signal(number)
                break
        said = process.communicate(timeout=60)[1]
    assert process.returncode == code and not list(tmp_path.glob("runs/*/summary.json"))
    assert "interrupted: the same command continues from the last checkpoint\n" in said
    with command(tmp_path, *settings) as process:
        said = process.stderr.readline()
        process.terminate()
        process.communicate(timeout=60)
    assert "resumes from step" in said and int(said.split()[-1]) >= 40  # nothing that was done is done again


@pytest.mark.parametrize(("at", "accumulate"), [(2, 1), (3, 1), (5, 2)])  # before a step, and a step with a validation
def test_what_sigterm_ended_goes_on_to_the_last_bit(tiny_config, at, accumulate):
    config = tiny_config(seed=65 + at, accumulate=accumulate, steps=7)
    last = at * accumulate - 1  # micro-batch of step `at`
    end = L.pytorch.callbacks.LambdaCallback(
        on_train_batch_end=lambda *given: given[-1] == last and os.kill(os.getpid(), signal.SIGTERM)
    )
    with pytest.raises(SystemExit) as ended:
        run_or_load(config, callbacks=[end], progress=False)
    folder = paths.runs() / config.name
    assert ended.value.code == 143 and (folder / "last.ckpt").exists()
    again = run_or_load(config, progress=False)
    weights = load_model(folder).state_dict()
    shutil.rmtree(folder)
    whole = run_or_load(config, progress=False)
    assert all(torch.equal(weights[name], value) for name, value in load_model(folder).state_dict().items())
    same = ["step", "train_loss", "val_loss", "val_loss_causal", "learning_rate"]
    pd.testing.assert_frame_equal(again.curve[same], whole.curve[same], check_exact=True)


def test_double_precision_is_resumed_to_the_last_bit(tiny_config, monkeypatch):
    config = tiny_config(seed=60, precision="64-true", checkpoint_every=3, steps=6, eval_every=6)
    whole = run_or_load(config, progress=False)
    weights = load_file(whole.path / "model.safetensors")
    assert {value.dtype for value in weights.values() if value.is_floating_point()} == {torch.float64}
    shutil.rmtree(whole.path)
    with monkeypatch.context() as broken:
        broken.setattr(LitModel, "on_validation_epoch_start", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_or_load(config, progress=False)
    again = run_or_load(config, progress=False)
    resumed = load_file(again.path / "model.safetensors")
    assert all(torch.equal(resumed[name], weights[name]) for name in weights)
    assert again.summary["val_loss"] == whole.summary["val_loss"]


def test_a_run_that_a_callback_stops_is_not_finished_and_goes_on(tiny_config):
    config = tiny_config(seed=65)
    stop = L.pytorch.callbacks.LambdaCallback(
        on_train_batch_end=lambda trainer, *_: setattr(trainer, "should_stop", trainer.global_step >= 6)
    )
    result = run_or_load(config, callbacks=[stop], progress=False)
    assert result.summary["status"] == "stopped" and "after step 6 of 10" in result.summary["error"]
    assert result.summary["val_loss"] != result.summary["val_loss"] and not (result.path / "model.safetensors").exists()
    assert torch.load(result.path / "last.ckpt", weights_only=True)["global_step"] == 6
    whole = run_or_load(config.replace(eval_every=10), progress=False)  # the same run, which goes on
    shutil.rmtree(whole.path)
    assert whole.summary["val_loss"] == run_or_load(config, progress=False).summary["val_loss"]
