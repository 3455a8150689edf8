"""Recorder: what is recorded, and what follows from it, is of all ranks; and what it counts as seconds and as a rate."""

import gc
import math
import os
import signal
import threading
from types import SimpleNamespace

import pytest
import torch

from ecmoe.files import sealed
from ecmoe.model import metrics
from ecmoe.training import recorder as recording
from ecmoe.training.lit import LitModel
from ecmoe.training.recorder import Diverged, Recorder


def trainer(other: float) -> SimpleNamespace:
    """Of rank 0 of two; whatever they exchange, rank 1 has `other`."""
    strategy = SimpleNamespace(all_gather=lambda value: torch.stack([value, torch.full_like(value, other)]))
    state = {"global_step": 3, "is_global_zero": True, "optimizers": [], "save_checkpoint": lambda path: path.touch()}
    return SimpleNamespace(strategy=strategy, world_size=2, **state)


@pytest.fixture
def module(tiny_config):
    lit = LitModel(tiny_config(steps=5, checkpoint_every=3))
    lit._trainer = trainer(2.0)
    lit.sums = {"loss": torch.tensor(6.0), "aux_loss": torch.tensor(0.0), "count": torch.tensor(2.0)}
    return lit


def test_a_row_is_of_all_ranks(module, tmp_path):
    recorder = Recorder(tmp_path, progress=False)
    recorder.on_validation_start(trainer(2.0), module)
    module.stepped = True
    for layer in module.model.moe_layers:  # as if each expert had taken 4 of 8 tokens
        for count, value in ((layer.load, 4), (layer.demand, 4), (layer.tokens, 8)):
            count.fill_(value)
    module.on_validation_epoch_start()
    for loss in (3.0, 4.0):
        recorder.on_validation_batch_end(None, module, {"val_loss": torch.tensor(loss)}, None, 0)
    recorder.on_validation_end(trainer(2.0), module)
    row = recorder.rows[3]
    assert row["val_loss"] == (3 + 4 + 2 + 2) / 4 and row["train_loss"] == (6 + 2) / (2 + 2)
    assert row["max_load"] == 2 and row["share_0"] == 1  # 1 and 0 here
    assert sealed(tmp_path / "last.ckpt")


def test_a_validation_without_a_step_before_it_has_no_training_loss_and_diverges_from_nothing(module, tmp_path):
    module.sums |= {"loss": torch.tensor(0.0), "count": torch.tensor(0.0)}
    module._trainer = one = trainer(0.0)
    recorder = Recorder(tmp_path, progress=False)
    recorder.on_validation_batch_end(None, module, {"val_loss": torch.tensor(1.0)}, None, 0)
    recorder.on_validation_end(one, module)
    assert math.isnan(recorder.rows[3]["train_loss"]) and recorder.rows[3]["val_loss"] == 0.5


def test_of_layers_and_ranks_a_load_is_the_worst_and_a_share_the_mean(module):
    names = [metric.name for metric in metrics.of_layers()]
    layers = [SimpleNamespace(statistics=lambda v=v: dict.fromkeys(names, torch.tensor(v))) for v in (1.0, 3.0)]
    module._modules["model"], module.stepped = SimpleNamespace(moe_layers=layers), True
    module.on_validation_epoch_start()
    said = {name: float(value) for name, value in module.statistics.items()}
    assert said["max_load"] == said["over_capacity"] == 3 and said["share_0"] == said["dropped"] == (1 + 3 + 2 + 2) / 4


def test_other_ranks_write_and_say_nothing_and_help_to_save(module, tmp_path, monkeypatch, capsys):
    shown, saved = [], []
    monkeypatch.setattr(recording, "tqdm", lambda **keys: shown.append(keys["disable"]))
    one = trainer(2.0)
    one.is_global_zero, one.save_checkpoint = False, saved.append
    recorder = Recorder(tmp_path)
    recorder.on_train_start(one, module)
    recorder.on_validation_start(one, module)
    recorder.on_validation_batch_end(None, module, {"val_loss": torch.tensor(1.0)}, None, 0)
    recorder.on_validation_end(one, module)
    assert shown == [True, True] and saved == [tmp_path / "last.ckpt"] and not any(tmp_path.iterdir())
    assert not capsys.readouterr().err and recorder.rows[3]["val_loss"] == 1.5


@pytest.fixture
def handlers():
    """The handlers before a test; afterwards they must be the same."""
    asked = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in asked]
    yield lambda: [signal.getsignal(number) for number in asked]
    assert [signal.getsignal(number) for number in asked] == before


@pytest.mark.parametrize(
    "steps, accumulate, loss, goes_on, saved",
    [
        (5, 1, 1.0, False, True),
        (5, 2, 1.0, True, False),  # within a step
        (3, 1, 1.0, True, False),  # after the last
        (5, 1, math.nan, False, False),
    ],
)
def test_a_signal_ends_a_run_after_a_whole_step_or_when_all_is_done(
    tiny_config, module, tmp_path, handlers, steps, accumulate, loss, goes_on, saved
):
    module.config = tiny_config(steps=steps, accumulate=accumulate, eval_every=2, checkpoint_every=100)
    recorder, one, went_on = Recorder(tmp_path, progress=False), trainer(loss), []
    with pytest.raises(Diverged if math.isnan(loss) else SystemExit) as ended, recorder.patient():
        os.kill(os.getpid(), signal.SIGTERM)
        assert not (tmp_path / "last.ckpt").exists()
        recorder.on_train_batch_end(one, module, None, None, 0)
        went_on.append(True)
    assert bool(went_on) == goes_on and (tmp_path / "last.ckpt").exists() == saved
    assert math.isnan(loss) or ended.value.code == 143


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_twice_a_run_ends_at_once(tmp_path, handlers, capfd, number):
    error = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: SystemExit}[number]
    with pytest.raises(error) as ended, Recorder(tmp_path, progress=False).patient():
        os.kill(os.getpid(), number)
        assert capfd.readouterr().err == "ends after this step, with a checkpoint; at once if asked again\n"
        os.kill(os.getpid(), number)
        pytest.fail("went on")
    assert number == signal.SIGINT or ended.value.code == 143


def test_only_the_main_thread_handles_signals(tmp_path, handlers):
    before, during, recorder = handlers(), [], Recorder(tmp_path, progress=False)

    def train():
        with recorder.patient():
            during.append(handlers())

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert during == [before]
    with recorder.patient():
        assert handlers() == [recorder._asked] * 2


def test_after_the_last_step_there_is_nothing_to_go_on_with(tiny_config, module, tmp_path):
    module.config = tiny_config(steps=3, checkpoint_every=3)
    recorder = Recorder(tmp_path, progress=False)
    recorder.on_validation_batch_end(None, module, {"val_loss": torch.tensor(1.0)}, None, 0)
    recorder.on_validation_end(trainer(2.0), module)
    assert not (tmp_path / "last.ckpt").exists()


def test_sums_of_ranks_keep_what_float32_would_lose(module):
    module.sums |= {"loss": torch.tensor(2.0**24), "count": torch.tensor(1.0)}
    module._trainer = trainer(1.0)
    assert float(module.means()["train_loss"]) == (2**24 + 1) / 2


def test_a_step_is_whole_after_all_of_its_batches(tiny_config, tmp_path):
    lit, recorder = LitModel(tiny_config(accumulate=3, checkpoint_every=9)), Recorder(tmp_path, progress=False)
    shown, so_far = [], []
    recorder.bar = SimpleNamespace(n=1, update=shown.append)
    for i in range(6):
        recorder.on_train_batch_end(trainer(2.0), lit, None, None, i)
        so_far.append(len(shown))
    assert so_far == [0, 0, 1, 1, 1, 2] and shown == [2, 2]  # from 1 to the trainer's step, 3


@pytest.mark.parametrize("whose", ["ours", "the other's"])
def test_ranks_diverge_together(module, tmp_path, whose):
    recorder, both = Recorder(tmp_path, progress=False), trainer(2.0 if whose == "ours" else math.nan)
    if whose == "ours":
        module.sums["loss"].fill_(math.nan)
    module._trainer = both
    with pytest.raises(Diverged, match="^the training loss is nan before step 3$"):
        recorder.on_train_batch_end(both, module, None, None, 0)
    assert not (tmp_path / "last.ckpt").exists()  # the one before is good
    recorder.on_validation_batch_end(None, module, {"val_loss": torch.tensor(1.0)}, None, 0)
    losses = r"nan \(validation: 1.5\)" if whose == "ours" else r"nan \(validation: nan\)"
    with pytest.raises(Diverged, match=f"^the loss is {losses} at step 3$"):
        recorder.on_validation_end(both, module)


def test_a_checkpoint_holds_the_mean_of_the_sums(module):
    module._fabric, checkpoint = None, {}
    module.trainer = trainer(2.0)
    module.on_save_checkpoint(checkpoint)
    assert checkpoint["sums"] == {"loss": 4.0, "aux_loss": 1.0, "count": 2.0}


def test_a_row_counts_all_ranks_tokens_and_the_time_since_the_row_before(tiny_config, tmp_path, capsys):
    lit = LitModel(tiny_config(steps=5, accumulate=3, devices=2, strategy="ddp", checkpoint_every=9))
    lit._trainer = trainer(2.0)
    for shared, before in ((1, None), (1, 1), (2, 1), (1, 2)):  # runs side by side now, and before it was broken off
        recorder = Recorder(tmp_path, sharing=lambda n=shared: n)
        said = {"shared": before} if before else {}  # nothing: alone
        recorder.load_state_dict({"seconds": 6.0, "marked": [1, 2.0], "rows": []} | said)
        recorder.began = None
        lit.sums |= {"loss": torch.tensor(6.0), "aux_loss": torch.tensor(8.0), "count": torch.tensor(2.0)}
        recorder.on_validation_batch_end(None, lit, {"val_loss": torch.tensor(1.0)}, None, 0)
        recorder.on_validation_end(trainer(2.0), lit)
        row = recorder.rows[3]
        assert row["tokens"] == 3 * 8 * 16 * 3 * 2 and row["seconds"] == 6.0
        rate = 2 * 8 * 16 * 3 * 2 / (6.0 - 2.0)
        assert row["aux_loss"] == (8 + 2) / (2 + 2) and list(recorder.curve()) == metrics.curve()
        alone = shared == (before or 1) == 1
        assert row["tokens_per_second"] == rate if alone else math.isnan(row["tokens_per_second"])
        said = capsys.readouterr().err
        assert (
            f"[{lit.config.name}] step 3/5  loss 2.0000  validation 1.5000" in said
            and (f"{rate:,.0f} tokens/s" in said) == alone
        )


def test_seconds_are_shared_by_the_most_runs_that_were_side_by_side(tmp_path):
    counts = iter([1, 3, 2, 1, 1])
    recorder = Recorder(tmp_path, sharing=lambda: next(counts))
    recorder.began -= 30  # half a minute goes by, and two others come
    recorder.on_validation_start(None, None)
    assert recorder.seconds == pytest.approx(10, abs=0.1) and (recorder.shared, recorder.sharing) == (3, 2)
    recorder.on_validation_start(None, None)  # the others have ended
    assert (recorder.shared, recorder.sharing) == (3, 1)


@pytest.mark.parametrize("end", ["on_train_end", "on_exception"])
def test_python_looks_no_more_through_what_was_there_at_the_first_step(tiny_config, tmp_path, monkeypatch, end):
    monkeypatch.setattr(recording, "gc", gc)
    there, before = [[] for _ in range(10_000)], gc.get_freeze_count()
    lit, recorder, one = LitModel(tiny_config(compile=True, steps=9)), Recorder(tmp_path, progress=False), trainer(2.0)
    recorder.on_train_start(one, lit)
    assert gc.get_freeze_count() <= before  # some that were frozen have no reference left, and are gone
    recorder.on_train_batch_end(one, lit, None, None, 0)
    assert gc.get_freeze_count() >= before + len(there) / 2
    getattr(recorder, end)(one, lit, *([RuntimeError()] if end == "on_exception" else []))
    assert gc.get_freeze_count() == 0
    gc.freeze()


def test_the_clock_starts_when_the_device_has_finished_the_step_that_compiles(tiny_config, tmp_path, monkeypatch):
    done = []
    lit, recorder, one = LitModel(tiny_config(compile=True, steps=9)), Recorder(tmp_path, progress=False), trainer(2.0)
    monkeypatch.setattr(type(lit), "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("step"))
    monkeypatch.setattr(recording.time, "perf_counter", lambda: float(len(done)))
    recorder.on_train_start(one, lit)
    recorder.on_train_batch_end(one, lit, None, None, 0)
    assert done == ["step"] and recorder.began == 1.0


def test_the_clock_stands_in_validations_and_while_a_checkpoint_is_written(module, tmp_path, monkeypatch):
    now, shown, one = [5.0], [], trainer(2.0)
    one.save_checkpoint = lambda path: (path.touch(), now.append(now[-1] + 1000))
    monkeypatch.setattr(recording.time, "perf_counter", lambda: now[-1])
    monkeypatch.setattr(recording, "tqdm", lambda **keys: shown.append(keys))
    recorder = Recorder(tmp_path, progress=False)
    recorder.on_train_start(one, module)
    assert shown[-1] == {
        "total": 5,
        "initial": 3,
        "desc": module.config.name,
        "unit": "step",
        "leave": False,
        "disable": True,
    }
    for seconds in (1.0, 2.0):
        now.append(now[-1] + seconds)
        recorder.on_validation_start(one, module)
        now.append(now[-1] + 100)
        recorder.on_validation_batch_end(None, module, {"val_loss": torch.tensor(2 * seconds)}, None, 0)
        recorder.on_validation_end(one, module)  # and a checkpoint
    assert now[-1] == 2208 and recorder._clock() == 3.0 and recorder.marked == (3, 3.0)
    assert recorder.rows[3]["val_loss"] == (4 + 2) / 2  # of the last validation alone


@pytest.mark.parametrize("gpu", [False, True])
def test_seconds_and_memory_are_those_of_the_work_that_a_gpu_was_given(module, tmp_path, monkeypatch, gpu):
    """It runs behind its host: the clock stops when it has finished. Of the memory before, nothing counts."""
    done = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: done.append("forgotten"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("finished"))
    monkeypatch.setattr(recording.time, "perf_counter", lambda: 10.0 * len(done))
    recorder = Recorder(tmp_path, progress=False)
    recorder.on_train_start(trainer(2.0), module)
    recorder.on_validation_start(trainer(2.0), module)
    assert (done, recorder.seconds) == ((["forgotten", "finished"], 10.0) if gpu else ([], 0.0))


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
    recorder.on_train_start(trainer(2.0), SimpleNamespace(config=tiny_config(), device=torch.device("cpu")))
    recorder.began -= 60  # a minute goes by
    assert recorder._clock() == pytest.approx(30, abs=5) and recorder.state_dict()["seconds"] == pytest.approx(
        30, abs=5
    )
    there[0] = 1
    recorder.on_validation_start(None, None)  # the other has ended meanwhile, nobody knows when
    assert recorder.seconds == pytest.approx(30, abs=5) and recorder.shared == 2 and recorder.sharing == 1
    again = Recorder(tmp_path, progress=False, sharing=lambda: 2)
    again.load_state_dict(recorder.state_dict())
    again.began = None
    assert again._clock() == pytest.approx(30, abs=5)  # what is counted isn't divided again
