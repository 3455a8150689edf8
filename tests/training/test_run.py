"""run_or_load: what it keeps of a run and finds again; failures and divergence are kept, not hidden; errors come before any work."""

import contextlib
import inspect
import itertools
import os
import warnings
import weakref
from types import SimpleNamespace

import lightning as L
import pandas as pd
import pytest
import torch
import yaml
from torch import nn
from torch._functorch import config as functorch
from torch._functorch._aot_autograd.autograd_cache import BypassAOTAutogradCache, check_cacheable
from torch._inductor import config as inductor

from ecmoe import load_model, paths, run_or_load
from ecmoe.config import ConfigError, RunConfig
from ecmoe.data.batches import TextData
from ecmoe.files import seal
from ecmoe.model.build import build_model
from ecmoe.routers import ROUTERS
from ecmoe.training import gpus
from ecmoe.training import run as train
from ecmoe.training.lit import LitModel
from ecmoe.training.once import LostLock
from ecmoe.training.result import not_run, read_record, read_run
from ecmoe.training.run import _share_compiled_code


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


def test_a_run_that_other_code_has_trained_is_loaded_with_a_warning(tiny_config, tmp_path, monkeypatch, recwarn):
    config = tiny_config(seed=11)
    run_or_load(config, records=tmp_path, progress=False)
    recwarn.clear()
    assert run_or_load(config).ok and not recwarn.list
    monkeypatch.setattr("ecmoe.provenance.code_digest", lambda: "other")
    assert run_or_load(config, records=tmp_path).ok and not recwarn.list  # pages say so of records
    said = f"^{config.name} was trained by other code: delete .*{config.name} to train it again$"
    with pytest.warns(UserWarning, match=said) as told:
        assert run_or_load(config).ok
    assert told[0].filename == __file__  # of who asked


def test_summary_says_what_ran(tiny_config):
    config = tiny_config(seed=12)
    result = run_or_load(config, progress=False)
    s = result.summary
    assert s["config"] == config.to_dict() and s["status"] == "finished" and s["error"] is None
    written = yaml.safe_load((result.path / "config.yaml").read_text())
    assert list(written.items()) == list(config.to_dict().items())  # in the order in which keys are explained
    assert s["tokens"] == config.steps * config.tokens_per_batch and s["steps"] == config.steps
    assert s["bits_per_byte"] == pytest.approx(s["val_loss"] / 0.6931471805599453)  # bytes: one a token
    assert s["perplexity"] == pytest.approx(2.718281828459045 ** s["val_loss"])
    assert s["tokens_per_second"] > 0 and s["seconds"] > 0 and s["val_loss"] < 6
    assert s["val_loss_causal"] != s["val_loss"]
    assert s["data"]["licence"] and s["data"]["digest"]
    assert torch.__version__.startswith(s["versions"]["torch"])  # PyPI's has the version of CUDA in the former alone
    assert sum(s["routing"][f"share_{j}"] for j in range(9)) == pytest.approx(1)
    assert result.curve["step"].tolist() == [4, 8, 10]  # every eval_every steps, and the last


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
    assert model(torch.zeros(1, 5, dtype=torch.long)).shape[:2] == (1, 5)  # k = n c / e is 2 and a half


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
    for weights in (False, True):  # which no record has
        again = run_or_load(config, records=tmp_path, weights=weights)
        assert again.summary["val_loss"] == trained.summary["val_loss"] and again.path is None


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


def test_who_trains_is_told_all_that_the_caller_said(tiny_config, monkeypatch):
    told, here, callbacks, loggers = [], gpus.Place(gpu=3), [L.Callback()], [object()]
    monkeypatch.setattr(train, "place", lambda say: contextlib.nullcontext(None if say else here))
    monkeypatch.setattr(train, "train_run", lambda *given: told.append(given) or not_run(given[0]))
    config = tiny_config(seed=95)
    run_or_load(config, progress=False, callbacks=callbacks, loggers=loggers)
    ((_, folder, still_ours, *rest),) = told
    assert folder == paths.runs() / config.name and rest == [False, callbacks, loggers, here]
    (paths.runs() / f"{config.name}.lock").unlink(missing_ok=True)
    with pytest.raises(LostLock):
        still_ours()

    def by_torchrun(_, folder, still_ours):
        (paths.runs() / f"{folder.name}.lock").unlink()
        with pytest.raises(LostLock):
            still_ours()
        return not_run(two)

    two = config.replace(devices=2, strategy="ddp")
    monkeypatch.setattr(train, "check_machine", lambda config: None)
    monkeypatch.setattr(train, "by_torchrun", by_torchrun)
    assert run_or_load(two, progress=False).summary == not_run(two).summary


def test_where_nothing_is_said_a_run_is_trained_and_shown_and_its_weights_are_kept(tiny_config, tmp_path, monkeypatch):
    told, config = {}, tiny_config(seed=96)
    monkeypatch.setattr(train, "once", lambda config, make, **keys: told.update(keys) or not_run(config))
    run_or_load(config)
    assert told == {"records": None, "train": True, "weights": False, "progress": True}
    monkeypatch.setattr(train, "Recorder", lambda *given: told.update(recorder=given) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train.train_run(config, tmp_path)
    folder, progress, sharing, still_ours = told["recorder"]
    assert (folder, progress, sharing(), still_ours()) == (tmp_path, True, 1, None)
    assert inspect.signature(train.train_run).parameters["keep_weights"].default is True


IMAGES = [name for name in ROUTERS if name not in ("hash", "task_level")]  # these need token ids or tasks


@pytest.mark.parametrize(
    "changes",
    [
        *({"router": router} for router in ROUTERS),
        *({"router": router, "data": "digits"} for router in IMAGES),
        {"router": "hash", "hash_table": "balanced"},
        {"router": "task_level", "task_table": "fixed"},
        {"relative_init": "alibi", "optimizer": "adafactor", "moe_every": 1},
    ],
    ids=str,
)
def test_weights_are_drawn_once(tiny_config, tmp_path, monkeypatch, changes):
    """Layers would draw default values before, which takes seconds at the study's sizes."""
    made, config = [], tiny_config(**changes)
    kind = "LitClassifier" if config.images else "LitModel"
    build = getattr(train, kind)

    def spy(*given):
        torch.use_deterministic_algorithms(True)  # fills new memory with NaN, or the largest integer
        try:
            made.extend((torch.get_rng_state(), given[1:], build(*given)))
        finally:
            torch.use_deterministic_algorithms(False)
        return made[-1]

    monkeypatch.setattr(train, kind, spy)
    monkeypatch.setattr(train, "new_trainer", lambda *_, **keys: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train.train_run(config, tmp_path, progress=False)
    before, counts, found = made
    assert torch.equal(torch.get_rng_state(), before)
    expected = dict(tensors(build_model(config, *counts)))
    assert not torch.equal(torch.get_rng_state(), before)  # elsewhere, both are drawn
    assert dict(tensors(found.model)).keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in tensors(found.model))


def tensors(model):
    return itertools.chain(model.named_parameters(), model.named_buffers())


def test_only_what_a_model_draws_itself_is_left_undrawn():
    with train._Undrawn():
        buffers = [draw(torch.full((2, 3), torch.nan)) for draw in (nn.init.normal_, nn.init.kaiming_uniform_)]
        left = nn.init.normal_(nn.Parameter(torch.full((2, 3), torch.nan)))
    assert torch.stack(buffers).isfinite().all() and left.isnan().all()


def test_lightnings_warnings_are_not_shown_and_others_are(tiny_config):
    def warn(*_):
        for text, module in {
            "one": "lightning.x",
            "two": "x.lightning",
            "no, it does not have many workers": "y",
        }.items():
            warnings.warn_explicit(text, UserWarning, "a.py", 1, module)

    config = tiny_config(seed=97, steps=2, eval_every=2)
    with pytest.warns(UserWarning) as shown:
        run_or_load(config, callbacks=[L.pytorch.callbacks.LambdaCallback(on_train_start=warn)], progress=False)
    assert [str(one.message) for one in shown if one.filename == "a.py"] == ["two"]


def test_images_are_classified(tmp_path, monkeypatch):
    told, config = [], RunConfig(data="digits", sequence_length=16)
    monkeypatch.setattr(train, "LitClassifier", lambda *given: told.append(given) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train.train_run(config, tmp_path, progress=False)
    assert told == [(config,)]


def test_a_run_that_is_only_measured_leaves_no_weights(tiny_config, tmp_path, capsys):
    config = tiny_config(seed=94, steps=2, eval_every=2, checkpoint_every=1)
    result = train.train_run(config, tmp_path, progress=False, keep_weights=False)
    assert result.ok and not (tmp_path / "model.safetensors").exists() and (tmp_path / "last.ckpt").exists()
    assert read_run(tmp_path).summary["val_loss"] == result.summary["val_loss"]
    assert train.train_run(config, tmp_path, progress=False).ok  # goes on, and says nothing
    assert "resumes" not in capsys.readouterr().err and not (tmp_path / "last.ckpt").exists()


def test_weights_are_kept_in_the_types_that_the_model_has():
    model = torch.nn.Module()
    for i, dtype in enumerate((torch.float64, torch.bfloat16, torch.float32, torch.int64, torch.bool)):
        model.register_buffer(f"of_{i}", (torch.arange(6) / (1 if i > 2 else 3)).to(dtype).view(2, 3).T)
    found = train._whole_state(SimpleNamespace(model=model))
    assert list(found) == list(model.state_dict()) and all(value.is_contiguous() for value in found.values())
    for name, value in model.state_dict().items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value)


@pytest.mark.parametrize("gpu", [False, True])
def test_memory_of_unused_models_is_given_back_to_the_gpu(monkeypatch, gpu):
    """Models hold themselves: what is freed before they are collected stays with this process."""
    model, there = torch.nn.Linear(2, 3), []
    model.itself = [model]
    kept = weakref.ref(model)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: there.append(kept()))
    del model
    train.free_memory()
    assert kept() is None and there == [None] * gpu


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a CPU can't")
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"precision": "16-mixed"}, "precision='16-mixed': needs a CUDA GPU"),
        ({"kernels": "triton"}, "kernels='triton': needs a CUDA GPU"),
        ({"kernels": "triton-bmm"}, "kernels='triton-bmm': needs a CUDA GPU"),
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


def test_a_checkpoint_is_at_its_step_and_of_a_damaged_one_the_first_rank_tells(tmp_path, capsys):
    assert train._step_of(tmp_path / "last.ckpt", True) is None and not capsys.readouterr().err
    torch.save({"global_step": 5}, tmp_path / "last.ckpt")
    for say in (False, True):  # nobody has sealed it
        assert train._step_of(tmp_path / "last.ckpt", say) is None
        assert ("last.ckpt is damaged (its SHA-256 differs)" in capsys.readouterr().err) == say
    seal(tmp_path / "last.ckpt")
    assert train._step_of(tmp_path / "last.ckpt", True) == 5 and not capsys.readouterr().err


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
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/of/a/user")
    monkeypatch.delenv("TRITON_CACHE_DIR")
    _share_compiled_code()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/of/a/user"
    assert os.environ["TRITON_CACHE_DIR"] == str(paths.cache() / "triton")


def test_what_blocks_consist_of_is_traced_once_per_machine():
    """torch keeps no graph with a node that it doesn't know to depend on the graph alone."""

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, dy):
            return 2 * dy

    def block(x):
        with torch.autocast("cpu", enabled=False):
            x = x + 1
        return Twice.apply(x)

    graphs = []
    torch.compile(block, backend=lambda graph, inputs: graphs.append(graph) or graph)(torch.ones(2, requires_grad=True))
    with (
        functorch.patch(autograd_cache_allow_custom_autograd_functions=False),
        inductor.patch(unsafe_marked_cacheable_functions={}),
    ):
        with pytest.raises(BypassAOTAutogradCache):
            check_cacheable(*graphs)
        _share_compiled_code()
        check_cacheable(*graphs)


def test_callbacks_and_loggers_come_along(tiny_config, tmp_path, monkeypatch):
    config = tiny_config(seed=63)
    seen = []
    watch = L.pytorch.callbacks.LambdaCallback(on_train_batch_end=lambda *a: seen.append(a[-1]))
    best = L.pytorch.callbacks.ModelCheckpoint(monitor="val_loss")
    monkeypatch.setenv("ECMOE_SHARING", "3")
    result = run_or_load(config.to_dict(), callbacks=[watch, best], loggers="csv", progress=False)
    assert result.summary["sharing"] == 3 and result.curve["tokens_per_second"].isna().all()
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
    monkeypatch.setattr(train, "check_machine", lambda config: None)
    for keys in ({"callbacks": [watch]}, {"loggers": ["csv"]}):
        with pytest.raises(
            ConfigError, match="devices=2 with callbacks or loggers: .* start torchrun --nproc-per-node=2"
        ):
            run_or_load(other.replace(devices=2, strategy="ddp"), progress=False, **keys)
    logger = L.pytorch.loggers.CSVLogger(result.path)
    assert train._logger(logger, result.path) is logger
    place = {"save_dir": tmp_path / "a-run"}
    for name, of in {"wandb": "WandbLogger", "tensorboard": "TensorBoardLogger"}.items():
        monkeypatch.setattr(L.pytorch.loggers, of, lambda **keys: keys)
        keys = {"project": "ecmoe", "name": "a-run"} if name == "wandb" else {"name": name, "version": ""}
        assert train._logger(name, tmp_path / "a-run") == place | keys


@pytest.mark.parametrize("checkpoints", [False, True])
def test_trainer_recorder_and_model_are_told_what_the_config_says(tiny_config, tmp_path, monkeypatch, checkpoints):
    given, made, where = {}, [], gpus.Place(gpu=3 if checkpoints else None)
    monkeypatch.setattr(train, "LitModel", lambda *told: made.append((*told, torch.initial_seed())))
    monkeypatch.setattr(train, "new_trainer", lambda _, **keys: given.update(keys) or 1 / 0)
    shared = []
    monkeypatch.setattr(train, "_share_compiled_code", lambda: shared.append(1))
    config = tiny_config(steps=7, accumulate=3, eval_every=5, eval_batches=2, devices=2, num_nodes=2, strategy="ddp")
    config, data, still_ours = config.replace(seed=9), TextData(config), lambda: None
    data.setup()
    callbacks = [L.Callback(), *[L.pytorch.callbacks.ModelCheckpoint()] * checkpoints]
    for some in (callbacks, [] if not checkpoints else callbacks[1:]):
        with pytest.raises(ZeroDivisionError):
            train.train_run(config, tmp_path, still_ours, progress=False, callbacks=some, where=where)
        recorder, ((told, counts, seed),) = given["callbacks"][0], [made.pop()]
        assert (recorder.folder, recorder.progress, recorder.count) == (tmp_path, False, where.sharing)
        assert recorder.still_ours is still_ours and (told, seed) == (config, 9)
        assert counts.tolist() == data.token_counts.tolist()
        assert (given["devices"], given["num_nodes"]) == ([3] if checkpoints else 2, 2) and given["callbacks"][
            1:
        ] == some
        assert (given["max_steps"], given["accumulate_grad_batches"], given["val_check_interval"]) == (7, 3, 15)
        assert given["limit_val_batches"] == 2 and given["enable_checkpointing"] is checkpoints and shared.pop()
        assert given["check_val_every_n_epoch"] is None and given["num_sanity_val_steps"] == 0
        assert (
            given["use_distributed_sampler"] is given["inference_mode"] is False
            and given["default_root_dir"] == tmp_path
        )
        assert isinstance(given["strategy"], L.pytorch.strategies.DDPStrategy) and given["logger"] == []
