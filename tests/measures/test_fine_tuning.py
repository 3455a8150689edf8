"""Fine-tuning learns what can be learned, sees no padding, and names what it can't do."""

import base64
import functools
import json
import warnings
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils.data import DataLoader

from ecmoe.data import tasks
from ecmoe.data.tokenizer import Bytes
from ecmoe.measures import fine_tuning
from ecmoe.measures.fine_tuning import LitFineTuning, fine_tuned
from ecmoe.model.build import build_model
from ecmoe.model.transformer import Block
from ecmoe.training.trainer import new_trainer

ROUTERS = {
    "EC": {},
    "top-2": {"router": "token_choice", "top_k": 2, "capacity_factor": 1.0, "gate": "renormalized"},
    "dense": {"router": "dense"},
}


@pytest.fixture
def shouting(tmp_path):
    """A folder with a task that one letter decides: does the sentence end in an exclamation mark?"""
    dice = np.random.default_rng(0)
    (tmp_path / "cola").mkdir()
    for split, count in (("train", 160), ("validation", 43)):
        labels = dice.integers(0, 2, count).tolist()
        rows = [
            {"sentence": "".join(dice.choice(list("abc "), dice.integers(3, 12))) + ".!"[label], "label": label}
            for label in labels
        ]
        (tmp_path / "cola" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.mark.parametrize("keys", ROUTERS.values(), ids=ROUTERS)
def test_learns_an_easy_task_and_leaves_the_run_as_it_was(tiny_config, shouting, keys):
    config = tiny_config(**keys)
    model = build_model(config).eval()
    before, state = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    settings = {"task": "cola", "folder": str(shouting), "steps": 60, "batch_size": 16, "learning_rate": 1e-2}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = fine_tuned(model, config, **settings)
    assert not said
    (row,) = found["rows"]
    for right, share in (("right", "accuracy"), ("right_causal", "accuracy_causal")):
        bits = np.unpackbits(np.frombuffer(base64.b64decode(found[right]), np.uint8), count=43)
        assert bits.mean() == row[share]
    assert row["accuracy"] > 0.9 > row["majority"] and row["accuracy_causal"] > 0.8
    assert (row["train"], row["validation"], row["truncated"]) == (160, 43, 0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's random numbers are touched
    assert fine_tuned(model, config, **settings) == found  # the same seed


def test_padding_and_the_fill_of_the_last_batch_change_nothing(tiny_config):
    config = tiny_config(
        router="hash", capacity_factor=None, precision="32-true"
    )  # whom tokens meet there is no matter
    tuned = LitFineTuning(build_model(config), config, 3, 1e-3, 10).eval()
    torch.nn.init.normal_(tuned.head.weight)
    tokens, lengths = torch.randint(1, 200, (5, 12)), torch.tensor([12, 7, 3, 9, 1])
    together = tuned(tokens, lengths)
    for i, length in enumerate(lengths):
        torch.testing.assert_close(together[i : i + 1], tuned(tokens[i : i + 1, :length], lengths[i : i + 1]))
    right = together.argmax(1)
    labels = torch.tensor([0, 1, 0, 0, 1]) + right  # the second and the fifth are wrong
    trainer = new_trainer(config, devices=1)
    sizes = []
    tuned.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    for batch_size in (4, 5):  # expert choice's tokens compete in batches of one size
        found = fine_tuning.right(trainer, tuned, (tokens, lengths, labels % 3), batch_size)
        assert found.tolist() == [True, False, True, True, False]
    assert sizes == [4, 4, 5] and right.any()
    for other in (1, 2):  # a larger class or a smaller one
        assert not fine_tuning.right(trainer, tuned, (tokens, lengths, (right + other) % 3), 5).any()


def test_padding_takes_no_places_of_experts(tiny_config):
    config = tiny_config(precision="32-true")
    tuned = LitFineTuning(build_model(config), config, 3, 1e-3, 10).eval()
    torch.nn.init.normal_(tuned.head.weight)
    tokens, lengths = torch.randint(1, 200, (4, 16)), torch.tensor([16, 6, 4, 6])
    other = torch.where(torch.arange(16) < lengths[:, None], tokens, 250)
    found = tuned(tokens, lengths)
    assert torch.equal(found, tuned(other, lengths))
    with torch.device("meta"):  # where what is made without `device=` has no numbers
        assert torch.equal(found, tuned(tokens, lengths))


def test_gradients_are_clipped_and_the_second_accuracy_is_routed_causally(tiny_config, shouting, monkeypatch):
    config, seen, seeds = tiny_config(seed=3, d_model=24, sequence_length=32), {"norms": [], "causal": []}, []

    def clipped(parameters, optimizer, max_norm):
        torch.nn.utils.clip_grad_norm_(parameters, 1e-9)  # nothing moves, if this clips
        seen["norms"].append(max_norm)

    def predicted(tuned, batch, batch_idx):
        rate = tuned.configure_optimizers()["optimizer"].param_groups[0]["initial_lr"]
        assert (tuned.config.steps, rate, tuple(tuned.head.weight.shape)) == (2, 0.125, (2, 24))
        dynamo = torch._dynamo.config
        seen["compiling"] = dynamo.recompile_limit, dynamo.specialize_float
        seen["causal"].append(tuned.model.moe_layers[0].router.causal)
        return batch[2] == int(seen["causal"][-1])

    monkeypatch.setattr("ecmoe.training.lit.clip", clipped)
    monkeypatch.setattr(LitFineTuning, "predict_step", predicted)
    monkeypatch.setattr(torch, "manual_seed", seeds.append)  # of noise on the logits, where a router has some
    trainers = []  # inference tensors could be in no later training step's graph
    monkeypatch.setattr(fine_tuning, "new_trainer", lambda *a, **k: trainers.append(k) or new_trainer(*a, **k))
    batches, orders = fine_tuning.Batches, []
    monkeypatch.setattr(fine_tuning, "Batches", lambda *given: (orders.append(given[1:]), batches(*given))[1])
    entered, most, encode = [], [], fine_tuning._encode
    monkeypatch.setattr(fine_tuning, "repeatable", lambda: nullcontext(entered.append("repeatable")))
    monkeypatch.setattr(fine_tuning, "_encode", lambda *given: most.append(given[2]) or encode(*given))
    asked = {
        "task": "cola",
        "folder": str(shouting),
        "steps": 2,
        "batch_size": 11,
        "examples": 20,
        "learning_rate": 0.125,
    }
    found = fine_tuned(build_model(config), config, **asked)
    labels = [json.loads(line)["label"] for line in (shouting / "cola/validation.jsonl").read_text().splitlines()][:20]
    wrong = {"accuracy": 1 - np.mean(labels), "accuracy_causal": np.mean(labels)}  # it always says 0, and then 1
    assert trainers == [{"max_steps": 2, "inference_mode": False}]
    majority = max(np.mean(labels), 1 - np.mean(labels))
    counts = {"train": 20, "validation": 20, "truncated": 0.0}
    assert found["rows"] == [{"task": "cola", **wrong, "majority": pytest.approx(majority), **counts}]
    assert seen.pop("compiling") == (64, True)  # each size by itself, with numbers as constants
    assert seen == {"norms": [1.0, 1.0], "causal": [False, False, True, True]} and seeds[0] == 3 and orders == [(11, 3)]
    assert entered == ["repeatable"] and most == [32]


def test_how_a_task_is_tuned_where_nothing_is_asked_for(tiny_config, shouting, monkeypatch):
    asked = []
    monkeypatch.setattr(fine_tuning, "LitFineTuning", lambda *given: asked.append(given[2:]) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fine_tuned(build_model(tiny_config()), tiny_config(), task="cola", folder=str(shouting))
    monkeypatch.setitem(tasks.TASKS, "cola", tasks.TASKS["cola"]._replace(classes=3))
    with pytest.raises(ZeroDivisionError):
        fine_tuned(build_model(tiny_config()), tiny_config(), task="cola", folder=str(shouting))
    assert asked == [(2, 3e-4, 300), (3, 3e-4, 300)]  # classes, learning rate, steps


def test_weights_and_moments_stay_on_the_device_between_its_loops(tiny_config, shouting, monkeypatch):
    """Lightning's teardown would take 30 GB of the paper's model to the host, for each task three times."""
    config, moved, trainers = tiny_config(), [], []
    monkeypatch.setattr(LitFineTuning, "cpu", lambda tuned: moved.append(tuned) or tuned)
    monkeypatch.setattr(
        fine_tuning, "new_trainer", lambda *a, **k: trainers.append(new_trainer(*a, **k)) or trainers[0]
    )
    fine_tuned(build_model(config), config, task="cola", folder=str(shouting), steps=2, batch_size=16)
    assert not moved and len(trainers) == 1 and trainers[0].global_step == 2


def test_a_fused_step_tunes_like_any_other(tiny_config, shouting, monkeypatch):
    """As on a GPU, in its precision: Lightning's own clipping would refuse the optimiser."""
    adamw, found, config = torch.optim.AdamW, [], tiny_config(precision="bf16-mixed")
    for fused in (False, True):
        monkeypatch.setattr(torch.optim, "AdamW", lambda *given, f=fused, **keys: adamw(*given, **keys | {"fused": f}))
        settings = {"task": "cola", "folder": str(shouting), "steps": 60, "batch_size": 16, "learning_rate": 1e-2}
        found.append(fine_tuned(build_model(config), config, **settings)["rows"][0]["accuracy"])
    assert min(found) > 0.9 and found[0] == pytest.approx(found[1], abs=0.05)


def test_compiled_it_tunes_alike_and_compiles_each_size_once_for_all_tasks(tiny_config, shouting, monkeypatch):
    torch._dynamo.reset()
    counter = CompileCounter()
    monkeypatch.setattr(Block, "compile", functools.partialmethod(torch.nn.Module.compile, backend=counter))
    found = {}
    for compiled in (False, True, True):  # the second task meets blocks of another model
        config = tiny_config(compile=compiled, precision="32-true", sequence_length=256)
        settings = {"task": "cola", "folder": str(shouting), "steps": 12, "batch_size": 16, "learning_rate": 1e-2}
        found[compiled] = fine_tuned(build_model(config), config, **settings)
        assert counter.frame_count == (config.layers if compiled else 0)
    assert found[True] == found[False]  # padding is seen by nobody


@pytest.mark.parametrize("longest, T", [(1, 128), (128, 128), (129, 512), (513, 1024), (1024, 1024)])
def test_compiled_there_are_few_sizes_and_none_is_longer_than_a_sequence(tiny_config, longest, T):
    config = tiny_config(compile=True, sequence_length=1024)
    tuned = LitFineTuning(build_model(config), config, 3, 1e-3, 10)
    tokens = torch.randint(1, 200, (2, -(-longest // 16) * 16))
    cut, lengths, labels = tuned.on_before_batch_transfer((tokens, torch.tensor([1, longest]), torch.zeros(2)), 0)
    assert (
        cut.shape == (2, T)
        and torch.equal(cut[:, :longest], tokens[:, :longest])
        and not cut[:, tokens.shape[1] :].any()
    )
    assert (lengths.tolist(), labels.tolist()) == ([1, longest], [0, 0])


def batch_of(seed, count=8):
    """Tokens, lengths, labels, as a batch has them."""
    dice = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 200, (count, 16), generator=dice)
    return tokens, torch.full((count,), 16), torch.randint(3, (count,), generator=dice)


def test_a_batch_is_cut_to_its_longest_in_steps_of_16(tiny_config):
    tuned = LitFineTuning(build_model(tiny_config()), tiny_config(), 3, 1e-3, 10)
    tokens, labels = torch.arange(3 * 64).view(3, 64), torch.tensor([0, 1, 2])
    for longest, columns in ((1, 16), (16, 16), (17, 32), (40, 48), (64, 64)):
        lengths = torch.tensor([1, longest, 1])
        cut = tuned.on_before_batch_transfer((tokens, lengths, labels), 0)
        assert torch.equal(cut[0], tokens[:, :columns]) and cut[1] is lengths and cut[2] is labels


def test_the_balance_loss_is_part_of_what_is_tuned(tiny_config):
    config = tiny_config(router="token_choice", capacity_factor=1.0, aux_loss_weight=0.5)
    tuned = LitFineTuning(build_model(config), config, 3, 1e-3, 10)
    tokens, lengths, labels = batch_of(0)
    loss = tuned.training_step((tokens, lengths, labels), 0)
    plain = torch.nn.functional.cross_entropy(tuned(tokens, lengths), labels)
    assert float((loss - plain).detach()) == pytest.approx(
        0.5, rel=0.2
    )  # 1 times its weight, for a router that is nearly even


def test_the_rate_warms_up_and_decays_to_nothing(tiny_config):
    config = tiny_config(router="dense")
    tuned = LitFineTuning(build_model(config).eval(), config, 3, 0.5, 25)
    assert tuned.model.training  # as routers need to know
    assert not tuned.head.weight.any() and not tuned.head.bias.any()  # all classes alike
    made = tuned.configure_optimizers()
    rates = []
    for _ in range(25):
        rates.append(made["optimizer"].param_groups[0]["lr"])
        made["optimizer"].step()
        made["lr_scheduler"]["scheduler"].step()
    assert rates[:3] == pytest.approx([0.25, 0.5, 0.5]) and rates[-1] == pytest.approx(0.5 / 23)
    assert np.allclose(np.diff(rates[2:]), -0.5 / 23) and made["lr_scheduler"]["interval"] == "step"
    assert all(group["weight_decay"] == 0 for group in made["optimizer"].param_groups)
    longer = LitFineTuning(build_model(config), config, 3, 0.5, 30).configure_optimizers()["optimizer"]
    assert longer.param_groups[0]["lr"] == pytest.approx(0.5 / 3)  # the first of a tenth


def test_running_statistics_move_once_a_step(tiny_config):
    """Wang et al.'s bias moves by 0.001 a step, up or down."""
    config = tiny_config(router="token_choice", capacity_factor=1.0, balance="bias", aux_loss_weight=0.0)
    tuned = LitFineTuning(build_model(config), config, 3, 1e-3, 5)
    new_trainer(config, devices=1, max_steps=5).fit(tuned, DataLoader([batch_of(i) for i in range(5)], batch_size=None))
    bias = torch.cat([layer.router.bias for layer in tuned.model.moe_layers]) / 0.001
    assert bias.abs().max() <= 5.01 and bias.abs().max() > 0.9
    torch.testing.assert_close(bias, bias.round(), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("pieces", "most", "fitted"),
    [
        ([[1, 2, 3], [4, 5]], 5, [1, 2, 3, 4, 5]),
        ([[1, 2, 3, 4, 5, 6], [7, 8]], 5, [4, 5, 6, 7, 8]),
        ([[1, 2, 3, 4], [5, 6, 7, 8]], 4, [3, 4, 7, 8]),
        ([[1, 2, 3, 4], [5, 6, 7, 8]], 6, [2, 3, 4, 6, 7, 8]),
        ([[1, 2, 3]], 2, [2, 3]),
        ([[1, 2, 3], [4, 5, 6, 7, 8]], 5, [2, 3, 6, 7, 8]),
        ([[*range(10)], [20], [*range(30, 35)]], 8, [7, 8, 9, 20, 31, 32, 33, 34]),
    ],
)
def test_what_is_too_long_loses_the_beginning_of_the_longest(pieces, most, fitted):
    assert fine_tuning._fitted(pieces, most) == fitted


def test_what_cannot_be_fine_tuned_is_named(tiny_config, shouting):
    config = tiny_config(router="task_level")
    with pytest.raises(ValueError, match="only a language model whose router reads tokens alone"):
        fine_tuned(None, config, task="cola", folder=str(shouting))
    with pytest.raises(ValueError, match="task 'cola': batch_size=32 is more than its 8 training examples"):
        fine_tuned(None, tiny_config(), task="cola", folder=str(shouting), examples=8)
    dense = tiny_config(router="dense")  # as many are enough
    fine_tuned(build_model(dense), dense, task="cola", folder=str(shouting), examples=8, batch_size=8, steps=1)


def test_examples_are_their_texts_each_ended_by_a_line_break_and_padded_behind():
    sides = [
        tasks.Examples([("ab", "c"), ("d", "")], np.array([1, 2])),
        tasks.Examples([("x" * 20,), ("y" * 17,)], np.array([3, 4])),
    ]
    ((tokens, lengths, labels), other), truncated = fine_tuning._encode(Bytes(), sides, 18)
    assert [bytes(row.tolist()) for row in tokens] == [b"ab\nc\n".ljust(16, b"\0"), b"d\n\n".ljust(16, b"\0")]
    assert (lengths.tolist(), labels.tolist()) == ([5, 3], [1, 2]) and truncated == 1 / 4
    assert bytes(other[0][0].tolist()) == (b"x" * 17 + b"\n").ljust(32, b"\0") and other[2].tolist() == [3, 4]


def test_truncated_is_a_share_of_all_examples():
    sides = [tasks.Examples([("a" * size,) for size in sizes], np.zeros(len(sizes), int)) for sizes in ([9, 2], [2, 2])]
    _, truncated = fine_tuning._encode(Bytes(), sides, 8)
    assert truncated == 0.25
