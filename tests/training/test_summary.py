"""What a summary says: of the last row, of the tokens that there were, of a run that finished."""

import math
import re
from datetime import UTC, datetime
from types import SimpleNamespace

import lightning as L
import pandas as pd
import pytest
import torch

from ecmoe import RunConfig, paths, run_or_load
from ecmoe.model.build import build_model, flops_per_token
from ecmoe.provenance import code_digest
from ecmoe.training import run as training
from ecmoe.training import summary as summaries
from ecmoe.training.lit import LitModel
from ecmoe.training.recorder import Recorder
from ecmoe.training.result import not_run
from ecmoe.training.summary import summarize
from ecmoe.training.trainer import resolved_precision

CURVE = pd.DataFrame({
    "step": [4, 8, 10], "tokens": [400, 800, 1000], "seconds": [1.0, 2.0, 3.0], "train_loss": [3.0, 2.5, 2.6],
    "tokens_per_second": [100.0, 400.0, 900.0], "val_loss": [3.0, 2.0, 2.25], "val_loss_causal": [3.5, 2.5, 2.75],
    "dropped": [0.5, 0.25, 0.125], "share_3": [0.0, 0.1, 0.2],
})  # fmt: skip
DATA = SimpleNamespace(bytes_per_token=4.0, provenance={"name": "a text"})
MADE = summaries.circumstances()


@pytest.mark.parametrize("gpu", [False, True])
def test_it_says_what_the_last_row_says_though_an_earlier_one_was_better(tiny_config, monkeypatch, gpu):
    """All of it, each number worked out anew."""
    monkeypatch.setattr(summaries, "peak_flops", lambda: 1e9)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 7e6)
    config = tiny_config(accumulate=3, devices=2, strategy="ddp", capacity_factor=1.0)
    said = summarize(config, CURVE, DATA, MADE, status="finished", sharing=3)
    sizes = {name: p.numel() for name, p in build_model(config).named_parameters() if name != "embedding.weight"}
    idle = sum(size for name, size in sizes.items() if name.endswith((".w1", ".w2"))) * 3 // 4  # a token has 1 of 4
    numbers = {
        "val_loss": 2.25, "val_loss_causal": 2.75, "train_loss": 2.6, "accuracy": math.nan,
        "perplexity": math.exp(2.25), "bits_per_byte": 2.25 / math.log(2) / 4,  # nats a token, 4 bytes a token
        "steps": 10, "tokens": 1000, "seconds": 3.0, "tokens_per_second": 400, "step_ms": 1e3 * 8 * 16 * 3 * 2 / 400,
        "mfu": 400 * flops_per_token(config) / 2e9, "peak_mb": 7.0 if gpu else math.nan,
        "parameters": sum(sizes.values()), "active_parameters": sum(sizes.values()) - idle, "world_size": 2, "sharing": 3,
    }  # fmt: skip
    assert {name: said[name] for name in numbers} == pytest.approx(numbers, nan_ok=True)
    words = not_run(config).summary | MADE | {"status": "finished", "precision": "bf16-mixed" if gpu else "32-true"}
    assert {name: said[name] for name in words} == words and words["code"] == code_digest()
    assert set(words["versions"]) >= {"torch", "lightning", "datasets", "tokenizers", "numpy"}
    ago = datetime.now(UTC) - datetime.fromisoformat(said["finished"])
    assert ago.total_seconds() < 60 and re.fullmatch(r"[\d-]+T\d\d:\d\d:\d\d\+00:00", said["finished"])
    assert set(said) == {*numbers, *words, "data", "routing", "finished"} and said["data"] == {"name": "a text"}
    assert said["routing"]["dropped"] == 0.125 and said["routing"]["share_3"] == 0.2


@pytest.mark.parametrize("status", ["diverged", "stopped"])
def test_a_run_that_broke_off_has_no_loss(tiny_config, status):
    said = summarize(tiny_config(), CURVE, DATA, MADE, status=status, error="why")
    assert all(
        math.isnan(said[key]) for key in ("val_loss", "val_loss_causal", "accuracy", "perplexity", "bits_per_byte")
    )
    assert said["status"] == status and said["error"] == "why" and said["steps"] == 10
    at_once = summarize(tiny_config(), CURVE[:0], DATA, MADE, status=status)
    assert (at_once["steps"], at_once["tokens"], at_once["routing"]) == (0, 0, {})
    for unknown in ("seconds", "train_loss", "tokens_per_second", "val_loss"):
        assert math.isnan(at_once[unknown]), unknown
    assert (at_once["sharing"], at_once["error"]) == (1, None)


def test_it_is_written_after_all_that_it_names(tiny_config, monkeypatch):
    config, order = tiny_config(seed=70, steps=2, eval_every=2), []
    folder = paths.runs() / config.name
    for name in ("save_file", "write_run"):
        write = getattr(training, name)
        monkeypatch.setattr(training, name, lambda *a, n=name, w=write: (order.append((n, sorted(p.name for p in folder.glob("*.*")))), w(*a)))  # fmt: skip
    run_or_load(config, progress=False)
    assert [name for name, _ in order] == ["save_file", "write_run"]
    assert not any("summary" in name for name in order[0][1]) and "model.safetensors" in order[1][1]


def test_a_rows_means_are_of_the_steps_since_the_last_row(tiny_config, tmp_path):
    lit = LitModel(tiny_config())
    lit._trainer = SimpleNamespace(strategy=SimpleNamespace(all_gather=lambda value: value[None]))
    for losses in ([3.0, 5.0], [1.0]):
        for loss in losses:
            lit.sums["loss"] += loss
            lit.sums["aux_loss"] += loss / 4
            lit.sums["count"] += 1
        assert {name: float(value) for name, value in lit.means().items()} == {
            "train_loss": sum(losses) / len(losses), "aux_loss": sum(losses) / len(losses) / 4
        }  # fmt: skip
    assert all(torch.isnan(value) for value in lit.means().values())


def test_a_resumed_curve_has_the_rows_of_before(tmp_path):
    recorder = Recorder(tmp_path, progress=False)
    recorder.rows, recorder.marked = {4: {"step": 4, "val_loss": 3.0}}, (4, 2.5)
    recorder.began, recorder.seconds, recorder.shared = None, 5.5, 3
    again = Recorder(tmp_path, progress=False)
    again.load_state_dict(recorder.state_dict())
    again.began = None
    assert again.state_dict() == recorder.state_dict() == {
        "seconds": 5.5, "shared": 3, "marked": [4, 2.5], "rows": [{"step": 4, "val_loss": 3.0}]
    }  # fmt: skip
    assert (
        again.rows == recorder.rows
        and again.curve()[["step", "val_loss"]].to_numpy().tolist() == [[4, 3.0]]
        and again.marked == (4, 2.5)
    )


def test_code_is_that_with_which_a_run_began(tiny_config, monkeypatch):
    """A working tree may move on while a run is under way, whose process has loaded what was there before."""
    before = summaries.circumstances()

    def move_on(*_):
        for name in ("code_digest", "commit"):
            monkeypatch.setattr(summaries, name, lambda: "later")

    moved = L.pytorch.callbacks.LambdaCallback(on_train_start=move_on)
    said = run_or_load(tiny_config(seed=72, steps=4, eval_every=2), progress=False, callbacks=[moved]).summary
    assert summaries.circumstances()["code"] == "later"
    assert (said["code"], said["commit"]) == (before["code"], before["commit"])
    assert said["started"] <= said["finished"]


def test_circumstances_are_a_runs_device_code_libraries_and_start(monkeypatch):
    for name in ("device_name", "commit", "code_digest", "now"):
        monkeypatch.setattr(summaries, name, lambda name=name: name)
    monkeypatch.setattr(summaries, "versions", lambda *names: " ".join(sorted(names)))
    assert summaries.circumstances() == {
        "device": "device_name", "commit": "commit", "code": "code_digest",
        "versions": "datasets lightning numpy tokenizers torch", "started": "now",
    }  # fmt: skip


def test_images_have_no_perplexity():
    config = RunConfig(data="digits", patch_size=2, sequence_length=16)
    data = SimpleNamespace(provenance={"name": "digits"})  # of no bytes
    said = summarize(config, CURVE.assign(accuracy=[0.25, 0.75, 0.5]), data, MADE, status="finished")
    assert said["accuracy"] == 0.5 and math.isnan(said["bits_per_byte"]) and said["data"] == {"name": "digits"}
    assert config.precision == "auto" and said["precision"] == resolved_precision(config) != "auto"
    assert math.isnan(said["perplexity"]) and said["val_loss"] == 2.25


def test_a_perplexity_beyond_all_numbers_loses_no_run(tiny_config):
    said = summarize(tiny_config(), CURVE.assign(val_loss=800.0), DATA, MADE, status="finished")
    assert said["val_loss"] == 800 and math.isnan(said["perplexity"])


def test_a_run_without_a_row_says_nothing_of_routing(tiny_config):
    said = summarize(tiny_config(num_nodes=2, devices=3, strategy="ddp"), CURVE[:0], DATA, MADE, status="diverged")
    assert said["routing"] == {} and said["steps"] == 0 and math.isnan(said["step_ms"]) and said["world_size"] == 6
