"""Scaling: rates of short runs, against as many times one device's; one model on one device and on two."""

import json
import random
import string
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pandas as pd
import pytest
from typer.testing import CliRunner

from ecmoe import paths
from ecmoe.bench import across, scaling
from ecmoe.cli import app
from ecmoe.study import speed
from ecmoe.training.result import Result


def test_one_device_is_timed_by_a_short_run_and_what_cannot_be_is_named(tiny_config, monkeypatch):
    monkeypatch.setattr(scaling, "EVERY", 2)
    base = tiny_config().to_dict()
    first, table = scaling.bench_scaling(base, [1, 2], ["nobody's"], ["rank"], repeats=2)
    assert len(first) == 1 and not first.attrs["absent"]
    (row,) = table.to_dict("records")
    assert (row["strategy"], row["devices"], row["of_ideal"]) == ("auto", 1, 1.0)
    rate = tiny_config().tokens_per_batch / (row["ms"] / 1e3)
    assert row["low_ms"] <= row["ms"] <= row["high_ms"] and row["tokens_per_second"] == pytest.approx(rate, rel=0.5)
    (absent,) = table.attrs["absent"]
    assert (
        absent.startswith("nobody's on 2, pool rank (ConfigError: ")
        and table.attrs["setting"]["d_model"] == base["d_model"]
    )


def test_what_this_machine_cannot_train_is_named_before_it_is_tried(tiny_config, monkeypatch):
    monkeypatch.setattr(scaling, "train_run", lambda *_, **__: pytest.fail("tried"))
    (table,) = scaling.bench_scaling(tiny_config(precision="16-mixed").to_dict(), [1], repeats=2)
    assert not len(table) and "precision='16-mixed': needs a CUDA GPU" in table.attrs["absent"][0]


def test_a_run_that_diverges_is_no_rate(tiny_config, monkeypatch):
    monkeypatch.setattr(scaling, "EVERY", 2)
    (table,) = scaling.bench_scaling(tiny_config(learning_rate=1e30, warmup_steps=0).to_dict(), [1], repeats=2)
    assert not len(table) and "RuntimeError: the loss is" in table.attrs["absent"][0]


@pytest.mark.parametrize("order", [("1", "2"), ("2", "1")])
def test_twice_the_devices_are_held_to_twice_the_tokens_a_second(tiny_config, tmp_path, monkeypatch, order):
    speeds = {("auto", "batch"): 100.0, ("ddp", "rank"): 180.0, ("fsdp2", "rank"): 150.0, ("ddp", "batch"): 160.0}
    speeds |= {("fsdp2", "batch"): 140.0, ("ep", "rank"): 120.0, ("ep", "batch"): 110.0}

    def trained(config):
        rate = speeds[config.strategy, config.pool]
        rates = pd.DataFrame({"tokens_per_second": [1.0, rate - 1, rate, rate + 50]})  # the first doesn't count
        assert (config.steps, config.eval_every, config.eval_batches, config.checkpoint_every) == (60, 10, 1, 10**9)
        return SimpleNamespace(curve=rates, summary={"peak_mb": 5.0})

    monkeypatch.setattr(scaling, "_trained", trained)
    base = {"base": tiny_config(steps=7, eval_every=3).to_dict(), "layers": {}}
    monkeypatch.setattr(speed, "scaling", lambda scale: base)
    called = [
        "bench",
        "scaling",
        "--scale",
        "smoke",
        "--devices",
        order[0],
        "--devices",
        order[1],
        "--only",
        "training",
        "--out",
        str(tmp_path),
    ]
    shown = CliRunner().invoke(app, called)
    assert shown.exit_code == 0, shown.output
    kept = json.loads((tmp_path / "scaling.json").read_text())
    rows, setting = kept["rows"], base["base"] | {"repeats": 5}
    for row in rows:
        tokens, rate = tiny_config().tokens_per_batch * row["devices"], speeds[row["strategy"], row["pool"]]
        assert row["tokens_per_second"] == rate and row["ms"] == pytest.approx(1e3 * tokens / rate)
    assert setting.items() <= kept["setting"].items() and {row["peak_mb"] for row in rows} == {5.0}
    assert [(row["devices"], row["strategy"], row["pool"]) for row in rows] == [
        (1, "auto", "batch"), *((2, strategy, pool) for strategy in ("ddp", "fsdp2", "ep") for pool in ("rank", "batch")),
    ]  # fmt: skip
    shares = {(row["strategy"], row["pool"]): row["of_ideal"] for row in rows}
    assert shares == {("auto", "batch"): 1.0, ("ddp", "rank"): 0.9, ("ddp", "batch"): 0.8, ("fsdp2", "rank"): 0.75,
                      ("fsdp2", "batch"): 0.7, ("ep", "rank"): 0.6, ("ep", "batch"): 0.55}  # fmt: skip


def test_without_a_rate_of_one_device_no_share_is_known(tiny_config, monkeypatch):
    def trained(config):
        if config.devices == 1:
            raise RuntimeError("no memory")
        return SimpleNamespace(curve=pd.DataFrame({"tokens_per_second": [1.0, 180.0, 180.0]}), summary={"peak_mb": 5.0})

    monkeypatch.setattr(scaling, "_trained", trained)
    *_, table = scaling.bench_scaling(tiny_config().to_dict(), [1, 2, 4], ["ddp"], ["batch"], repeats=2)
    assert table["tokens_per_second"].tolist() == [180.0, 180.0] and table["of_ideal"].isna().all()


def test_a_router_without_a_pool_is_trained_once_by_each_strategy(tiny_config, monkeypatch):
    trained = []
    monkeypatch.setattr(scaling, "_trained", lambda config: trained.append(config.strategy) or 1 / 0)
    base = tiny_config(router="token_choice").to_dict()
    *_, table = scaling.bench_scaling(base, [1, 2], ["ddp", "ep"], ["rank", "batch"], repeats=2)
    assert trained == ["auto", "ddp", "ep"] and len(table.attrs["absent"]) == 3


@pytest.mark.parametrize("only", ["", "layers", "losses,training"])
@pytest.mark.parametrize("there", [0, 3])
def test_the_command_passes_on_what_it_is_asked_for(only, there, tmp_path, monkeypatch):
    asked = {"base": {"d_model": 8}, "devices": [1, 4, 2], "strategies": ["ddp"], "layers": {"a": {"n": 4}}}
    called, scales, repeats = [], [], 7 if only else 5

    def one(name, *arguments, **keys):
        called.append((name, arguments, keys))
        return scaling.timing.tabled([{"ms": 1.0}], [], {"of": name})

    def each(name, *arguments, **keys):  # measures when it is asked for a table
        yield one(name, *arguments, **keys)

    for module, name, bench in ((scaling, "scaling", each), (across, "across", each), (scaling, "losses", one)):
        monkeypatch.setattr(module, f"bench_{name}", partial(bench, name))
    monkeypatch.setattr(speed, "scaling", lambda scale: scales.append(scale) or dict(asked))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)  # which may ask for the number of devices
    monkeypatch.setattr("torch.cuda.device_count", lambda: there)
    monkeypatch.setattr(speed, "may", lambda scale: bool(there) or scale == "smoke")
    words = "--strategy fsdp2 --strategy ep --pool batch".split()
    words += f"--scale smoke --repeats 7 --only {only}".split() if only else []
    shown = CliRunner().invoke(app, ["bench", "scaling", *words, "--out", str(tmp_path)])
    assert shown.exit_code == 0, shown.output
    several = [2] if there else [2, 4]
    given = {"base": asked["base"], "devices": asked["devices"], "strategies": ["fsdp2", "ep"], "pools": ["batch"]}
    every = {
        "training": ("scaling", (), given | {"repeats": repeats}),
        "layers": ("across", (asked["layers"], several), {"repeats": repeats}),
        "losses": ("losses", (asked["base"], several[-1], "fsdp2"), {}),
    }
    files = {"training": "scaling", "layers": "scaling-layers", "losses": "scaling-losses"}
    CliRunner().invoke(app, ["bench", "scaling", "--scale", "smoke", "--only", "losses", "--out", str(tmp_path / "x")])
    assert called.pop() == ("losses", (asked["base"], several[-1], "ddp"), {}) and scales.pop() == "smoke"
    parts = only.split(",") if only else list(every)
    assert called == [every[part] for part in parts] and scales == ["gpu" if there and not only else "smoke"]
    kept = {path.name: json.loads(path.read_text())["setting"]["of"] for path in tmp_path.glob("*.json")}
    assert kept == {f"{files[part]}.json": every[part][0] for part in parts}


def test_every_scale_says_what_is_trained():
    at_gpu = speed.scaling("gpu")
    assert (
        at_gpu["base"]["d_model"] == 768 and at_gpu["base"]["vocab_size"] == 16384 and at_gpu["devices"] == [1, 2, 4, 8]
    )
    assert at_gpu["layers"]["8B/64E"]["d_model"] == 4096 and list(at_gpu["layers"]) == ["0.1B/64E", "8B/64E"]
    assert at_gpu["strategies"] == ["ddp", "fsdp2", "ep"] and at_gpu["pools"] == ["rank", "batch"]
    sizes = {"sequence_length": 1024, "layers": 12, "d_ff": 3072, "heads": 12, "batch_size": 64}  # 65,536 tokens a GPU
    assert sizes.items() <= at_gpu["base"].items()
    assert speed.scaling("smoke")["base"]["data"] == "stdlib"


@pytest.mark.parametrize("out", [True, False])
def test_what_was_timed_is_kept_at_once(out, tiny_config, tmp_path, monkeypatch):
    def table_then_killed(base, devices, repeats):
        yield scaling.timing.tabled([{"strategy": "auto", "ms": 3.0}], [], {"repeats": repeats})
        raise KeyboardInterrupt

    monkeypatch.setattr(scaling, "bench_scaling", table_then_killed)
    asked = {"base": tiny_config().to_dict(), "devices": [1], "layers": {}}
    monkeypatch.setattr(speed, "scaling", lambda scale: asked)
    monkeypatch.setenv("ECMOE_HOME", str(tmp_path / "home"))
    place = ["--out", str(tmp_path)] if out else []
    CliRunner().invoke(app, ["bench", "scaling", "--scale", "smoke", "--repeats", "3", *place])
    kept = json.loads(((tmp_path if out else paths.results("smoke", "bench")) / "scaling.json").read_text())
    assert kept["rows"] == [{"strategy": "auto", "ms": 3.0}] and kept["setting"]["repeats"] == 3


@pytest.mark.parametrize("devices", [1, 2])
def test_a_run_that_is_timed_takes_a_place_and_leaves_nothing(devices, tiny_config, tmp_path, monkeypatch):
    monkeypatch.setenv("ECMOE_HOME", str(tmp_path / "new"))  # where nothing was run
    config, told = tiny_config(devices=devices, strategy="auto" if devices == 1 else "ddp"), []

    def alone(of, folder, *, where, keep_weights):
        told.append((of, where, keep_weights, folder.parent))
        return Result({"status": "finished"})

    def several(of, folder, still_ours, keep_weights):
        told.append((of, "their own", keep_weights, folder.parent))
        return Result({"status": "finished"})

    for name in ("check_machine", "free_memory"):
        monkeypatch.setattr(scaling, name, lambda *of, name=name: told.append((name, *of)))
    monkeypatch.setattr(scaling, "place", lambda: nullcontext("a place"))
    monkeypatch.setattr(scaling, "train_run", alone)
    monkeypatch.setattr(scaling, "by_torchrun", several)
    assert scaling._trained(config).ok and not list(paths.cache().iterdir())
    assert told[:2] == [("check_machine", config), ("free_memory",)]  # of the run before
    assert told[2:] == [(config, "a place" if devices == 1 else "their own", False, paths.cache())]


def test_the_difference_is_of_several_less_that_of_one_on_the_same_batch(tiny_config, monkeypatch):
    asked = []

    def trained(config):
        asked.append(config)
        losses = {"train_loss": [3.0, 2.0 + config.devices], "val_loss": [4.0, 5.0 * config.devices]}
        return SimpleNamespace(curve=pd.DataFrame({"step": [3.0, 6.0], "tokens": 7.0, **losses}))

    monkeypatch.setattr(scaling, "_trained", trained)
    config = tiny_config(batch_size=9, pool="rank")
    table = scaling.bench_losses(config.to_dict(), 2, "fsdp2", steps=39)
    same = config.replace(steps=39, eval_every=3, checkpoint_every=10**9, pool="batch")
    several = {"devices": 2, "strategy": "fsdp2", "batch_size": 4, "eval_batches": 2}
    scaling.bench_losses(config.to_dict(), 2, "fsdp2")
    scaling.bench_losses(config.to_dict(), 2, "fsdp2", steps=5)
    assert [(config.steps, config.eval_every) for config in asked[2:]] == 2 * [(200, 20)] + 2 * [(5, 1)]
    assert asked[:2] == [same.replace(**several), same.replace(batch_size=8, eval_batches=1)]
    assert {"devices": 2, "strategy": "fsdp2", "batch_size": 9}.items() <= table.attrs["setting"].items()
    assert table["step"].dtype == int and table.to_dict("list") == {
        "step": [3, 6], "train_loss_one": [3.0, 3.0], "val_loss_one": [4.0, 5.0],
        "train_loss_several": [3.0, 4.0], "val_loss_several": [4.0, 10.0], "difference": [0.0, 1.0],
    }  # fmt: skip


def test_one_model_on_one_device_and_on_two(tiny_config, tmp_path):
    draw = random.Random(0)  # not Python's own sources: in some version of them, a tie is routed otherwise
    words = ["".join(draw.choices(string.ascii_lowercase, k=draw.randint(2, 9))) for _ in range(500)]
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": " ".join(draw.choices(words, k=100))}) + "\n" for _ in range(300)))
    config = tiny_config(learning_rate=1e-3, data=str(text))
    table = scaling.bench_losses(config.to_dict(), 2, "ddp", steps=10)
    assert table["step"].tolist() == list(range(1, 11))
    assert table["difference"].abs().max() < 1e-5 and table["difference"].abs().max() > 0  # two sums, in another order
    assert table["val_loss_several"].tolist() == pytest.approx(
        table["val_loss_one"].tolist(), abs=5e-3
    )  # a cut-off may fall otherwise
    assert table["train_loss_one"].nunique() == 10
