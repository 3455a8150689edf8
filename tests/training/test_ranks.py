"""The processes of one run: two train as one, they end with their caller, and rank variables of others say nothing."""

import io
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from ecmoe import load_model, paths, run_or_load
from ecmoe.config import ConfigError, RunConfig
from ecmoe.files import sealed
from ecmoe.training import run as train
from ecmoe.training.once import LostLock
from ecmoe.training.ranks import by_torchrun, check_world
from ecmoe.training.result import not_run, read_run, write_config, write_run


def start(config: RunConfig) -> subprocess.Popen:
    """Train in a process of its own, begun."""
    script = f"from ecmoe import RunConfig, run_or_load; run_or_load(RunConfig.from_dict({config.to_dict()!r}))"
    return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


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
    monkeypatch.setattr(train, "train_run", lambda *_: pytest.fail("would wait for the other"))
    with pytest.raises(
        ConfigError,
        match="^num_nodes=2: start torchrun --nnodes=2 --nproc-per-node=1 -m ecmoe train CONFIG on every node$",
    ):
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


def test_a_torchrun_that_dies_is_not_taken_for_an_earlier_failure(tiny_config, tmp_path, monkeypatch, capfd):
    config = tiny_config(seed=42, strategy="ddp", devices=2)
    folder = paths.runs() / config.name
    folder.mkdir(parents=True)
    write_run(folder, not_run(config).summary | {"status": "failed", "error": "of yesterday"})
    (tmp_path / "python").write_text('#!/bin/sh\necho "$@"\nkill -9 $$\n')
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(RuntimeError, match=f"^training {config.name} on 2 devices ended with code -9$"):
        run_or_load(config, progress=False)
    assert RunConfig.from_yaml(folder / "config.yaml") == config
    asked = f"-m torch.distributed.run --standalone --nproc-per-node=2 -m ecmoe.training {folder}"
    assert capfd.readouterr() == ("", f"{asked}\n")  # output is for results of the caller
    for no_file in (SimpleNamespace(), io.StringIO()):  # a notebook's
        monkeypatch.setattr(sys, "stderr", no_file)
        with pytest.raises(RuntimeError, match="ended with code -9"):
            run_or_load(config, progress=False)
        assert capfd.readouterr().out == f"{asked}\n"
    with pytest.raises(RuntimeError, match="ended with code -9"):
        by_torchrun(config.replace(devices=3), tmp_path, lambda: None, keep_weights=False)
    asked = asked.replace("=2", "=3").replace(str(folder), str(tmp_path))
    assert capfd.readouterr().out == f"{asked} --no-weights\n"


@pytest.mark.parametrize("keep_weights", [True, False])
def test_the_first_rank_says_why_it_failed(tiny_config, tmp_path, monkeypatch, keep_weights):
    config, told = tiny_config(devices=2, strategy="ddp"), []
    write_config(tmp_path, config)
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path), *["--no-weights"] * (not keep_weights)])
    monkeypatch.setattr(
        threading, "Thread", lambda **_: SimpleNamespace(start=lambda: None)
    )  # of a rank, with a caller
    monkeypatch.setattr(train, "train_run", lambda *given, **keys: told.append((given, keys)) or 1 / 0)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(ZeroDivisionError):
            runpy.run_module("ecmoe.training.__main__")
        assert (tmp_path / "summary.json").exists() == (rank == "0")
    assert told == [((config, tmp_path), {"keep_weights": keep_weights})] * 2
    assert read_run(tmp_path).summary["error"] == "ZeroDivisionError: division by zero"


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
