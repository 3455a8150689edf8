"""run_or_load: once and only once; resumed to the last bit; failures and divergence are kept, not hidden."""

import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import lightning as L
import pandas as pd
import pytest
import torch

from ecmoe import load_model, paths, run_or_load
from ecmoe.config import ConfigError, RunConfig
from ecmoe.data import tokens
from ecmoe.data.batches import TextData
from ecmoe.files import read_json, sealed, write_json
from ecmoe.training import run as train
from ecmoe.training.continuation import continue_text
from ecmoe.training.lit import LitModel
from ecmoe.training.once import LostLock
from ecmoe.training.ranks import by_torchrun, check_world
from ecmoe.training.recorder import Recorder
from ecmoe.training.result import not_run, read_record, read_run, write_run
from ecmoe.training.run import _share_compiled_code


def start(config: RunConfig) -> subprocess.Popen:
    """Train in a process of its own, begun."""
    script = f"from ecmoe import RunConfig, run_or_load; run_or_load(RunConfig.from_dict({config.to_dict()!r}))"
    return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_second_call_loads_the_first(tiny_config, monkeypatch):
    config = tiny_config(seed=11)
    first = run_or_load(config, progress=False)
    assert first.ok and first.path == paths.runs() / config.name
    assert not (first.path / "last.ckpt").exists() and not list(first.path.glob("*.tmp"))
    monkeypatch.setattr(train, "train_run", lambda *a: pytest.fail("trained again"))
    again = run_or_load(config)
    assert again.summary == read_run(first.path).summary
    assert again.summary["val_loss"] == first.summary["val_loss"]
    pd.testing.assert_frame_equal(again.curve, first.curve.astype(float))


def test_summary_says_what_ran(tiny_config):
    config = tiny_config(seed=12)
    result = run_or_load(config, progress=False)
    s = result.summary
    assert s["config"] == config.to_dict() and s["status"] == "finished" and s["error"] is None
    assert s["tokens"] == config.steps * config.tokens_per_batch and s["steps"] == config.steps
    assert s["bits_per_byte"] == pytest.approx(s["val_loss"] / 0.6931471805599453)  # bytes: one a token
    assert s["perplexity"] == pytest.approx(2.718281828459045 ** s["val_loss"])
    assert s["tokens_per_second"] > 0 and s["seconds"] > 0 and s["val_loss"] < 6
    assert s["val_loss_causal"] != s["val_loss"]
    assert s["data"]["licence"] and s["data"]["digest"]
    assert torch.__version__.startswith(s["versions"]["torch"])  # PyPI's has the version of CUDA in the former alone
    assert sum(s["routing"][f"share_{j}"] for j in range(9)) == pytest.approx(1)
    assert result.curve["step"].tolist() == [4, 8, 10]  # every eval_every steps, and the last


def test_the_curve_learns(tiny_config):
    curve = run_or_load(tiny_config(seed=12), progress=False).curve
    assert curve["val_loss"].iloc[-1] < curve["val_loss"].iloc[0]


def test_loaded_model_has_the_recorded_loss(tiny_config):
    config = tiny_config(seed=12)
    result = run_or_load(config, progress=False)
    model = result.load_model()
    data = TextData(config)
    data.setup("fit")
    lit = LitModel(config)
    lit.model = model
    with torch.no_grad():
        losses = [lit.loss(batch).double() for batch in data.val_dataloader()]
    assert float(torch.stack(losses).mean()) == pytest.approx(result.summary["val_loss"], abs=1e-6)
    assert not model.training and load_model(result.path).config == config


def test_missing_run_is_not_trained_when_told_so(tiny_config):
    config = tiny_config(seed=13)
    result = run_or_load(config, train=False)
    assert result.summary["status"] == "not run" and not result.ok
    assert not (paths.runs() / config.name).exists()


def test_records_come_first_and_are_added_to(tiny_config, tmp_path, monkeypatch):
    config = tiny_config(seed=14)
    trained = run_or_load(config, records=tmp_path, progress=False)
    assert read_record(tmp_path / f"{config.name}.json").summary["val_loss"] == trained.summary["val_loss"]
    monkeypatch.setenv("ECMOE_HOME", str(tmp_path / "elsewhere"))  # neither runs nor data here
    monkeypatch.setattr(train, "train_run", lambda *a: pytest.fail("trained again"))
    assert run_or_load(config, records=tmp_path).summary["val_loss"] == trained.summary["val_loss"]


def test_record_of_other_text_warns(tiny_config, tmp_path):
    config = tiny_config(seed=14)
    run_or_load(config, records=tmp_path, progress=False)
    path = tmp_path / f"{config.name}.json"
    record = read_json(path, sealed=True)
    record["summary"]["data"]["source_sha256"] = "0" * 64
    write_json(path, record, sealed=True)
    with pytest.warns(UserWarning, match="data='stdlib' is another text here than the one that .* was trained on"):
        run_or_load(config, records=tmp_path)


@pytest.fixture
def texts(tmp_path):
    """Two texts, called alike."""
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "text.txt").write_text(f"The {name} of it, again and again, and not the end.\n" * 6000)
    return tmp_path


def test_another_text_of_the_same_name_is_not_taken_for_the_first(tiny_config, texts):
    a, b = (tiny_config(seed=31, data=str(texts / name / "text.txt")) for name in "ab")
    assert a.name != b.name
    trained = run_or_load(a, progress=False)
    assert run_or_load(b, train=False).summary["status"] == "not run"
    shutil.copy(texts / "a" / "text.txt", texts / "b" / "text.txt")
    b = b.replace(data=str(texts / "b" / "text.txt"))
    assert a.name == b.name  # a copy elsewhere is the same run
    assert run_or_load(b).summary["val_loss"] == trained.summary["val_loss"]
    (texts / "b" / "text.txt").write_text("The end.")
    for call in ({}, {"train": False}):
        with pytest.raises(ConfigError, match="another text here than the one .* bring that back, or leave out #"):
            run_or_load(b, **call)


def test_a_text_is_continued_in_the_vocabulary_of_the_run(tiny_config, texts):
    path = texts / "a" / "text.txt"
    config = tiny_config(seed=35, data=str(path), tokenizer="bpe", vocab_size=270, steps=2)
    result = run_or_load(config, progress=False)
    data = TextData(config)
    data.setup()
    bits = result.summary["val_loss"] / math.log(2)
    assert data.bytes_per_token > 1.5 and result.summary["bits_per_byte"] == pytest.approx(bits / data.bytes_per_token)
    assert continue_text(result.path, "The a", 2, temperature=0).startswith("The a")
    path.write_text(path.read_text().upper())
    assert continue_text(result.path, "The a", 2, temperature=0).startswith("The a")  # its tokens are kept
    shutil.rmtree(tokens.folder(config))
    with pytest.raises(ConfigError, match="not what is stated: bring that back"):
        continue_text(result.path, "The a", 2)


def test_bytes_continue_whatever_the_text_has_become(tiny_config, texts):
    path = texts / "a" / "text.txt"
    result = run_or_load(tiny_config(seed=36, data=str(path), steps=2), progress=False)
    write_run(result.path, result.summary | {"data": result.summary["data"] | {"digest": "of another text"}})
    assert continue_text(result.path, "The a", 2, temperature=0).startswith("The a")


def test_a_run_goes_on_with_the_text_that_it_began_with(tiny_config, texts, monkeypatch):
    path = texts / "a" / "text.txt"
    config, text = tiny_config(seed=32, data=str(path), checkpoint_every=2), path.read_text()
    with monkeypatch.context() as broken:
        broken.setattr(train, "_whole_state", lambda module: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_or_load(config, progress=False)
    path.write_text(text.upper())
    assert tiny_config(seed=32, data=str(path), checkpoint_every=2).name != config.name
    shutil.rmtree(tokens.folder(config))
    with pytest.raises(ConfigError, match="not what is stated: bring that back"):
        run_or_load(config, progress=False)
    path.write_text(text)
    assert run_or_load(config, progress=False).ok


def test_the_last_checkpoint_stays_until_the_summary_is_written(tiny_config, monkeypatch, capsys):
    config = tiny_config(seed=33, checkpoint_every=2)
    with monkeypatch.context() as full:
        full.setattr(train, "write_run", lambda *a: (_ for _ in ()).throw(OSError("No space left on device")))
        with pytest.raises(OSError, match="No space"):
            run_or_load(config, progress=False)
    assert run_or_load(config).ok
    assert "goes on from step 8" in capsys.readouterr().err  # there is none after the last step


def test_a_finished_run_that_lost_its_weights_is_trained_again_for_them(tiny_config):
    config = tiny_config(seed=34, steps=2)
    result = run_or_load(config, progress=False)
    (result.path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="weights=True"):
        run_or_load(config).load_model()
    again = run_or_load(config, weights=True, progress=False)
    assert again.load_model() and again.summary["val_loss"] == result.summary["val_loss"]


def test_failed_run_keeps_its_error_and_is_tried_again(tiny_config, monkeypatch):
    config = tiny_config(seed=15)
    with monkeypatch.context() as broken:
        broken.setattr(LitModel, "loss", lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_or_load(config, progress=False)
    kept = run_or_load(config, train=False).summary
    assert kept["status"] == "failed" and "ZeroDivisionError" in kept["error"] and "val_loss" not in kept
    assert run_or_load(config, progress=False).ok


def test_diverged_run_ends_as_diverged_with_its_last_good_checkpoint(tiny_config, monkeypatch):
    config = tiny_config(seed=16, checkpoint_every=2)
    loss, calls = LitModel.loss, []

    def explode(self, batch):
        calls.append(1)
        return loss(self, batch) * (float("nan") if len(calls) > 3 else 1)

    monkeypatch.setattr(LitModel, "loss", explode)
    result = run_or_load(config, progress=False)
    assert result.summary["status"] == "diverged" and "step 4" in result.summary["error"]
    checkpoint = torch.load(result.path / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 2
    assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())
    monkeypatch.setattr(train, "train_run", lambda *a: pytest.fail("trained again"))
    assert run_or_load(config).summary["status"] == "diverged"


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


def test_arms_with_the_same_seed_see_the_same_batches(tiny_config):
    batches = []
    for router in ("expert_choice", "dense"):
        data = TextData(tiny_config(router=router))
        data.setup("fit")
        batches.append([b for _, b in zip(range(5), data.train_dataloader(), strict=False)])
    assert all(torch.equal(a, b) for a, b in zip(*batches, strict=True))


@pytest.mark.parametrize(
    "changes",
    [
        {"router": "token_choice", "capacity_factor": 1.0, "z_loss_weight": 0.001},
        {"router": "hash", "capacity_factor": 1.0, "hash_table": "balanced"},
        {"router": "token_choice", "capacity_factor": 0.5, "priority": "score", "balance": "importance_load"},
        {"router": "token_choice", "capacity_factor": None, "balance": "bias", "top_k": 1},
        {"router": "dense", "optimizer": "adafactor", "learning_rate": 0.01},
        {"router": "dense_moe"},
        {"router": "linear_assignment"},
        {"router": "kmeans", "capacity_factor": 1.25},
        {"router": "task_level", "num_tasks": 4},
        {"router": "task_level", "num_tasks": 4, "task_table": "fixed"},
        {"router": "expert_threshold"},
        {"max_experts_per_token": 2},
        {"max_experts_per_token": 3, "cap_solver": "dykstra"},
    ],
)
def test_other_routers_and_optimizers_learn(tiny_config, changes):
    result = run_or_load(tiny_config(**changes), progress=False)
    assert result.ok and result.curve["val_loss"].iloc[-1] < result.curve["val_loss"].iloc[0]


def test_accumulated_micro_batches_are_one_batch(tiny_config):
    """Without competition between tokens, 2 x 4 sequences give the step of 1 x 8."""
    whole = tiny_config(router="dense", batch_size=8, steps=3, eval_every=3, eval_batches=1)
    halves = whole.replace(batch_size=4, accumulate=2, eval_batches=2)
    results = [run_or_load(config, progress=False) for config in (whole, halves)]
    assert results[0].summary["val_loss"] == pytest.approx(results[1].summary["val_loss"], abs=1e-4)
    assert [result.curve["tokens"].tolist() for result in results] == [[3 * 8 * 16]] * 2


def test_cutoffs_move_once_a_step_and_never_in_evaluation(tiny_config):
    config = tiny_config(seed=30, accumulate=2, steps=4, eval_every=1)
    model = run_or_load(config, progress=False).load_model()
    cutoff = model.moe_layers[0].router.cutoff
    assert float(cutoff.weight) == pytest.approx(1 - cutoff.beta**4) and float(cutoff.count) == 0


def test_wrong_number_of_processes_is_refused(tiny_config, monkeypatch):
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="3 processes run: start torchrun --nproc-per-node=2 -m ecmoe train"):
        run_or_load(tiny_config(devices=2, strategy="ddp"))
    monkeypatch.setenv("WORLD_SIZE", "4")
    check_world(tiny_config(devices=2, num_nodes=2, strategy="ddp"))
    with pytest.raises(ConfigError, match="devices=2 x num_nodes=3, but 4 processes run"):
        check_world(tiny_config(devices=2, num_nodes=3, strategy="ddp"))


def test_several_nodes_need_torchrun_on_each_and_nothing_is_written(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setenv("ECMOE_HOME", str(tmp_path))
    with pytest.raises(ConfigError, match="num_nodes=2: start torchrun --nnodes=2"):
        run_or_load(tiny_config(num_nodes=2), progress=False)
    assert not any(tmp_path.iterdir())


TWENTY = {"seed": 40, "steps": 20, "max_experts_per_token": 2}


def _as_rank(config: RunConfig, rank: int, port: int) -> None:
    """What torchrun tells its ranks, without the seconds that it takes."""
    os.environ |= {"TORCHELASTIC_RUN_ID": "x", "RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0"}
    os.environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    train.by_torchrun = None  # a rank starts no ranks
    run_or_load(config, progress=False)


@pytest.mark.parametrize(("strategy", "eval_batches", "eval_every"), [("ddp", 4, 10), ("fsdp2", 6, 8), ("ep", 4, 10)])
def test_two_ranks_are_one_process_over_both_batches(
    tiny_config, forked, free_port, strategy, eval_batches, eval_every
):
    """Two gloo processes train one model; the tokens of both compete. With 20 steps, 8 and 16 leave one at the end."""
    keys = TWENTY | {"eval_every": eval_every}
    two = tiny_config(**keys, strategy=strategy, devices=2, batch_size=4, eval_batches=eval_batches)
    if strategy != "fsdp2":  # once by torchrun itself
        port = free_port()
        ranks = [forked(_as_rank, two, rank, port) for rank in range(2)]
        for rank in ranks:
            rank.join(timeout=100)
    result = run_or_load(two, train=strategy == "fsdp2", progress=False)
    assert result.ok, result.summary["error"]
    one = run_or_load(tiny_config(**keys, batch_size=8, eval_batches=eval_batches // 2), progress=False)
    assert result.summary["world_size"] == 2 and result.summary["tokens"] == one.summary["tokens"]
    assert (
        result.curve["step"].tolist() == one.curve["step"].tolist() == sorted({*range(eval_every, 21, eval_every), 20})
    )
    for name in ("train_loss", "aux_loss", "val_loss", "val_loss_causal", "share_1"):
        assert result.curve[name].tolist() == pytest.approx(one.curve[name].tolist(), abs=1e-4), name
    weights = load_model(one.path).state_dict()
    for name, value in load_model(result.path).state_dict().items():
        torch.testing.assert_close(value, weights[name], atol=1e-3, rtol=1e-3)


def test_ranks_that_are_told_to_end_wait_for_nobody(tiny_config, forked, free_port):
    config = tiny_config(
        seed=43, strategy="ddp", devices=2, batch_size=4, steps=10**5, eval_every=10**5, checkpoint_every=2
    )
    port, checkpoint, until = free_port(), paths.runs() / config.name / "last.ckpt", time.monotonic() + 60
    ranks = [forked(_as_rank, config, rank, port) for rank in range(2)]
    while not checkpoint.exists() and time.monotonic() < until:
        time.sleep(0.05)
    for rank in ranks:
        rank.terminate()
    for rank in ranks:
        rank.join(timeout=10)
    codes = [rank.exitcode for rank in ranks]
    for rank in ranks:
        rank.kill()
    assert codes[0] == -signal.SIGTERM and codes[1] is not None  # which may have seen that the first is gone
    assert sealed(checkpoint) and not run_or_load(config, train=False).ok


def test_a_torchrun_that_dies_is_not_taken_for_an_earlier_failure(tiny_config, tmp_path, monkeypatch):
    config = tiny_config(seed=42, strategy="ddp", devices=2)
    folder = paths.runs() / config.name
    folder.mkdir(parents=True)
    write_run(folder, not_run(config).summary | {"status": "failed", "error": "of yesterday"})
    (tmp_path / "python").write_text("#!/bin/sh\nkill -9 $$\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(RuntimeError, match="on 2 devices ended with code -9"):
        run_or_load(config, progress=False)


@pytest.mark.parametrize("lost_at", [1, 2])
def test_ranks_end_where_their_lock_is_lost(tiny_config, tmp_path, monkeypatch, lost_at):
    (tmp_path / "python").write_text("#!/bin/sh\nread line; echo ended > ended\n")  # its input ends with the call
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.chdir(tmp_path)
    asked = []

    def still_ours() -> None:
        asked.append(time.monotonic())
        if len(asked) == lost_at:
            raise LostLock("gone")

    with pytest.raises(LostLock):
        by_torchrun(tiny_config(devices=2, strategy="ddp"), tmp_path, still_ours)
    assert (tmp_path / "ended").exists() and asked[-1] - asked[0] >= 2 * (lost_at - 1)  # it asks every other second


def test_ranks_end_with_their_caller(tiny_config):
    """They hold no lock: the next call would train the same folder beside them."""
    config = tiny_config(seed=41, strategy="ddp", devices=2, batch_size=4, steps=10**4, checkpoint_every=1)
    process = start(config)
    while process.poll() is None and not (paths.runs() / config.name / "last.ckpt").exists():
        time.sleep(0.1)
    process.kill()
    process.communicate(timeout=60)  # at its end nobody holds its output any more
    assert process.returncode == -signal.SIGKILL and not (paths.runs() / config.name / "summary.json").exists()


@pytest.mark.parametrize(("compiled", "kept"), [(False, 60.0), (True, 0.0)])
def test_a_first_step_that_compiles_is_not_in_the_seconds(tmp_path, tiny_config, compiled, kept):
    recorder = Recorder(tmp_path, progress=False)
    module = SimpleNamespace(config=tiny_config(compile=compiled), device=torch.device("cpu"))
    for step in (1, 2):
        if step == 1:
            recorder.on_train_start(SimpleNamespace(global_step=0), module)
        recorder.began -= 60  # a minute goes by
        recorder.on_train_batch_end(
            SimpleNamespace(global_step=step, is_global_zero=True), module, None, None, step - 1
        )
    assert recorder._clock() == pytest.approx(kept + 60, abs=5) and recorder.marked == (
        int(compiled),
        pytest.approx(0, abs=5),
    )


@pytest.mark.parametrize(("sharing", "rate"), [(1, 8 * 256 / 4), (2, math.nan)])
def test_a_rate_is_of_the_steps_since_the_last_row_and_nobodys_beside_others(tmp_path, tiny_config, sharing, rate):
    recorder = Recorder(tmp_path, progress=False, sharing=lambda: sharing)
    recorder.marked, recorder.seconds, recorder.losses = (4, 10.0), 14.0, {"val_loss": [torch.tensor(2.0)]}
    ranks = SimpleNamespace(all_gather=lambda value: value[None])
    optimizer = SimpleNamespace(param_groups=[{"lr": 0.25}])
    means = {"train_loss": torch.tensor(2.0), "aux_loss": torch.tensor(0.0)}
    module = SimpleNamespace(config=tiny_config(accumulate=2), sums={"count": torch.tensor(1)}, means=lambda: means, statistics={})  # fmt: skip
    recorder.on_validation_end(
        SimpleNamespace(global_step=12, optimizers=[optimizer], is_global_zero=True, strategy=ranks), module
    )
    row = recorder.rows[12]
    assert (
        row["tokens"] == 12 * 256
        and row["learning_rate"] == 0.25
        and row["tokens_per_second"] == pytest.approx(rate, nan_ok=True)
    )


def test_of_runs_that_share_a_device_each_counts_its_share_of_the_seconds(tmp_path, tiny_config):
    there = [2]
    recorder = Recorder(tmp_path, progress=False, sharing=lambda: there[0])
    recorder.on_train_start(
        SimpleNamespace(global_step=0), SimpleNamespace(config=tiny_config(), device=torch.device("cpu"))
    )
    recorder.began -= 60  # a minute goes by
    assert recorder._clock() == pytest.approx(30, abs=5)
    there[0] = 1
    recorder.on_validation_start(None, None)  # the other has ended meanwhile, nobody knows when
    assert recorder.seconds == pytest.approx(30, abs=5) and recorder.shared == 2 and recorder.sharing == 1
    again = Recorder(tmp_path, progress=False, sharing=lambda: 2)
    again.load_state_dict(recorder.state_dict())
    again.began = None
    assert again._clock() == pytest.approx(30, abs=5)  # what is counted isn't divided again


TINY = ["layers=2", "d_model=16", "d_ff=16", "heads=2", "num_experts=4", "batch_size=4", "sequence_length=16",
        "eval_batches=1", "max_bytes=200000", "eval_every=20"]  # fmt: skip


def command(tmp_path, *settings: str) -> subprocess.Popen:
    """`ecmoe train` in a home of its own."""
    call = [sys.executable, "-m", "ecmoe", "train", *(word for s in [*TINY, *settings] for word in ("--set", s))]
    return subprocess.Popen(call, env=os.environ | {"ECMOE_HOME": str(tmp_path)}, stderr=subprocess.PIPE, text=True)


def test_sigterm_ends_with_143_and_the_next_call_goes_on(tmp_path):
    settings = ("steps=100000", "checkpoint_every=1000")
    with command(tmp_path, *settings) as process:
        for line in process.stderr:
            if "step 40/" in line:
                process.send_signal(signal.SIGTERM)
                break
        process.communicate(timeout=60)
    assert process.returncode == 143 and not list(tmp_path.glob("runs/*/summary.json"))
    with command(tmp_path, *settings) as process:
        said = process.stderr.readline()
        process.terminate()
        process.communicate(timeout=60)
    assert "goes on from step" in said and int(said.split()[-1]) >= 40  # nothing that was done is done again


@pytest.mark.parametrize(("at", "accumulate"), [(3, 1), (4, 1), (5, 2)])  # 4: in a validation, where nothing is saved
def test_what_sigterm_ended_goes_on_to_the_last_bit(tiny_config, at, accumulate):
    config = tiny_config(seed=65 + at, accumulate=accumulate, steps=7)
    end = L.pytorch.callbacks.LambdaCallback(
        on_train_batch_end=lambda trainer, *_: trainer.global_step == at and os.kill(os.getpid(), signal.SIGTERM)
    )
    with pytest.raises(SystemExit) as ended:
        run_or_load(config, callbacks=[end], progress=False)
    folder = paths.runs() / config.name
    assert ended.value.code == 143 and (folder / "last.ckpt").exists() == (at != 4)
    again = run_or_load(config, progress=False)
    weights = load_model(folder).state_dict()
    shutil.rmtree(folder)
    whole = run_or_load(config, progress=False)
    assert all(torch.equal(weights[name], value) for name, value in load_model(folder).state_dict().items())
    same = ["step", "train_loss", "val_loss", "val_loss_causal", "learning_rate"]
    pd.testing.assert_frame_equal(again.curve[same], whole.curve[same], check_exact=True)


@pytest.mark.parametrize(
    "left_over",
    [
        {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"},
        {"SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "j", "SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "3",
         "SLURM_NODELIST": "localhost"},
    ],
)  # fmt: skip
def test_rank_variables_of_others_say_nothing_of_a_run(tiny_config, tmp_path, forked, left_over):
    def train() -> None:
        os.environ |= left_over | {"ECMOE_HOME": str(tmp_path)}
        run_or_load(tiny_config(steps=2), progress=False)

    process = forked(train)
    process.join(timeout=60)
    assert process.exitcode == 0
    assert {path.name for path in tmp_path.glob("runs/*/*")} >= {"summary.json", "model.safetensors", "curve.csv"}


def test_double_precision_is_resumed_to_the_last_bit(tiny_config, monkeypatch):
    config = tiny_config(seed=60, precision="64-true", checkpoint_every=3, steps=6, eval_every=6)
    whole = run_or_load(config, progress=False)
    weights = load_model(whole.path).state_dict()
    shutil.rmtree(whole.path)
    with monkeypatch.context() as broken:
        broken.setattr(LitModel, "on_validation_epoch_start", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_or_load(config, progress=False)
    again = run_or_load(config, progress=False)
    resumed = load_model(again.path).state_dict()
    assert all(torch.equal(resumed[name], weights[name]) for name in weights)
    assert again.summary["val_loss"] == whole.summary["val_loss"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a CPU can't")
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"precision": "16-mixed"}, "precision='16-mixed': needs a CUDA GPU"),
        ({"kernels": "triton"}, "kernels='triton': needs a CUDA GPU"),
        ({"d_ff": 10**12}, "d_ff=1000000000000, .* take .* GiB, and this device has"),
        ({"d_model": 2**40}, "d_model=1099511627776, .* lower one of them"),
        ({"num_experts": 10**9, "router": "dense_moe"}, "num_experts=1000000000"),
        ({"tokenizer": "bpe", "vocab_size": 2**50}, "vocab_size=1125899906842624"),
    ],
)
def test_what_a_machine_cannot_do_is_said_before_any_work(tiny_config, monkeypatch, changes, named):
    monkeypatch.setattr(TextData, "prepare_data", lambda self: pytest.fail("work began"))
    with pytest.raises(ConfigError, match=named):
        run_or_load(tiny_config(seed=61, **changes), progress=False)


def test_a_wrong_number_in_the_environment_is_named(tiny_config, monkeypatch):
    for wrong in ("abc", "0", "-1", "1.5"):
        monkeypatch.setenv("ECMOE_SHARING", wrong)
        with pytest.raises(ConfigError, match=f"ECMOE_SHARING={wrong}: must be a whole number, 1 or more"):
            run_or_load(tiny_config(seed=62), progress=False)


def test_compiled_code_lies_in_the_cache_unless_a_user_says_where(monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/tmp/torchinductor_somebody")  # as imports of torch's do
    monkeypatch.setenv("TRITON_CACHE_DIR", "/elsewhere")
    _share_compiled_code()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(paths.cache() / "inductor")
    assert os.environ["TRITON_CACHE_DIR"] == "/elsewhere"


def test_callbacks_and_loggers_come_along(tiny_config):
    config = tiny_config(seed=63)
    seen = []
    watch = L.pytorch.callbacks.LambdaCallback(on_train_batch_end=lambda *a: seen.append(a[-1]))
    best = L.pytorch.callbacks.ModelCheckpoint(monitor="val_loss")
    result = run_or_load(config, callbacks=[watch, best], loggers=["csv"], progress=False)
    assert result.ok and seen == list(range(config.steps)) and best.best_model_score > 0
    logged = pd.read_csv(result.path / "csv" / "metrics.csv")
    assert logged["val_loss"].dropna().tolist() == pytest.approx(result.curve["val_loss"].tolist(), abs=1e-5)
    other = tiny_config(seed=64)
    for name, said in {
        "wandb": "needs a package: pip install wandb",
        "excel": "must be one of csv, tensorboard, wandb",
    }.items():
        with pytest.raises(ConfigError, match=f"logger '{name}'.* {said}"):
            run_or_load(other, loggers=[name], progress=False)
        assert not (paths.runs() / other.name / "config.yaml").exists()  # before any work
    logger = L.pytorch.loggers.CSVLogger(result.path)
    assert train._logger(logger, result.path) is logger


@pytest.mark.parametrize("checkpoints", [False, True])
def test_the_trainer_is_told_what_the_config_says(tiny_config, tmp_path, monkeypatch, checkpoints):
    given = {}
    monkeypatch.setattr(train, "new_trainer", lambda _, **keys: given.update(keys) or 1 / 0)
    config = tiny_config(steps=7, accumulate=3, eval_every=5, eval_batches=2, devices=2, num_nodes=2, strategy="ddp")
    callbacks = [L.Callback(), *[L.pytorch.callbacks.ModelCheckpoint()] * checkpoints]
    for some in (callbacks, [] if not checkpoints else callbacks[1:]):
        with pytest.raises(ZeroDivisionError):
            train.train_run(config, tmp_path, progress=False, callbacks=some)
        assert (given["devices"], given["num_nodes"]) == (2, 2) and given["callbacks"][1:] == some
        assert (given["max_steps"], given["accumulate_grad_batches"], given["val_check_interval"]) == (7, 3, 15)
        assert given["limit_val_batches"] == 2 and given["enable_checkpointing"] is checkpoints
        assert isinstance(given["strategy"], L.pytorch.strategies.DDPStrategy) and given["logger"] == []


def test_a_run_that_a_callback_stops_is_not_finished_and_goes_on(tiny_config):
    config = tiny_config(seed=65)
    stop = L.pytorch.callbacks.LambdaCallback(
        on_train_batch_end=lambda trainer, *_: setattr(trainer, "should_stop", trainer.global_step >= 6)
    )
    result = run_or_load(config, callbacks=[stop], progress=False)
    assert result.summary["status"] == "stopped" and "after step 6 of 10" in result.summary["error"]
    assert result.summary["val_loss"] != result.summary["val_loss"] and not (result.path / "model.safetensors").exists()
    whole = run_or_load(config.replace(eval_every=10), progress=False)  # the same run, which goes on
    shutil.rmtree(whole.path)
    assert whole.summary["val_loss"] == run_or_load(config, progress=False).summary["val_loss"]
