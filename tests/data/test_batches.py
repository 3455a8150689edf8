import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ecmoe.config import ConfigError, RunConfig
from ecmoe.data import batches as data
from ecmoe.data import images, tokens
from ecmoe.data.batches import Batches, TextData

WINDOWS = np.arange(101 * 5, dtype=np.uint16).reshape(101, 5)  # window i starts with 5 i


def take(batches, count):
    return [batch[:, 0] // 5 for batch in itertools.islice(batches, count)]


@settings(deadline=None)
@given(st.integers(1, 8), st.integers(1, 4), st.integers(0, 2**40))
def test_an_epoch_repeats_no_window_over_all_ranks(batch_size, world, seed):
    ranks = [Batches([WINDOWS], batch_size, seed, rank=r, world=world) for r in range(world)]
    steps = ranks[0].steps_per_epoch
    assert steps == 101 // (batch_size * world)
    for epoch in (0, 1):
        seen = torch.cat([b for rank in ranks for b in take(rank, 2 * steps)[epoch * steps : (epoch + 1) * steps]])
        assert len(seen) == len(seen.unique()) == steps * batch_size * world


@settings(deadline=None)
@given(st.integers(0, 70), st.integers(0, 1), st.integers(0, 9))
def test_resume_anywhere_equals_uninterrupted(start, rank, seed):
    whole = take(Batches([WINDOWS], 4, seed, rank=rank, world=2), 75)
    resumed = take(Batches([WINDOWS], 4, seed, start=start, rank=rank, world=2), 75 - start)
    assert all(torch.equal(a, b) for a, b in zip(whole[start:], resumed, strict=True))


def test_seeds_and_epochs_differ_and_ranks_deal_out_one_order():
    first = torch.cat(take(Batches([WINDOWS], 4, seed=0), 50))
    assert not torch.equal(first[:100], first[100:])  # another order in the second epoch
    assert not torch.equal(first, torch.cat(take(Batches([WINDOWS], 4, seed=1), 50)))
    # two ranks see in one step what one rank sees in two accumulated micro-batches
    one, two = (
        take(Batches([WINDOWS], 4, 0), 24),
        [take(Batches([WINDOWS], 4, 0, rank=r, world=2), 12) for r in (0, 1)],
    )
    assert all(torch.equal(one[2 * s + r], two[r][s]) for s in range(12) for r in (0, 1))


def test_no_epoch_of_a_seed_is_one_of_another_seed():
    epochs = [list(itertools.islice(Batches([np.arange(50)], 50, seed), 6)) for seed in range(5)]
    orders = {tuple(order.tolist()) for some in epochs for order in some[:5]}
    assert len(orders) == 25 and all(sorted(order) == list(range(50)) for order in orders)
    assert (epochs[3][5].numpy() == np.random.default_rng([3, 5]).permutation(50)).all()  # for ever


def test_batches_are_whole_windows():
    for batch in itertools.islice(Batches([WINDOWS], 3, 0), 5):
        assert batch.dtype == torch.int64 and batch.shape == (3, 5)
        assert (batch == batch[:, :1] + torch.arange(5)).all() and (batch[:, 0] % 5 == 0).all()


@pytest.fixture(scope="module")
def text():
    config = RunConfig(max_bytes=400_000, sequence_length=32, batch_size=4, eval_batches=6)
    found = TextData(config)
    found.prepare_data()
    found.setup("fit")
    return found


def test_train_batches_are_text_of_the_training_split(text):
    batches = list(itertools.islice(text.train_dataloader(), 4))
    whole = bytes(np.asarray(tokens.load(text.config).train))
    assert all(b.shape == (4, 33) and b.dtype == torch.int64 for b in batches)
    assert all(bytes(row.tolist()) in whole for b in batches for row in b)
    assert text.tokenizer.decode(batches[0][0]) == bytes(batches[0][0].tolist()).decode(errors="replace")
    assert text.tokenizer.encode(["def f():"])[0].tolist() == list(b"def f():")


@pytest.mark.parametrize(("module", "what"), [(tokens, TextData), (images, images.ImageData)])
def test_what_takes_long_is_done_before_the_ranks_set_up(module, what, monkeypatch):
    asked = []
    monkeypatch.setattr(module, "load", asked.append)
    what(config := RunConfig(data="digits", patch_size=2, sequence_length=16)).prepare_data()
    assert asked in ([config], [config.data])


def test_start_step_skips_what_was_seen(text):
    whole = list(itertools.islice(text.train_dataloader(), 8))
    resumed = TextData(text.config)
    resumed.setup("fit")
    resumed.start_step = 5
    for a, b in zip(whole[5:], resumed.train_dataloader(), strict=False):
        assert torch.equal(a, b)


def test_another_seed_deals_the_windows_in_another_order(text):
    other = TextData(text.config.replace(seed=1))
    other.setup("fit")
    assert not torch.equal(next(iter(other.train_dataloader())), next(iter(text.train_dataloader())))


def test_validation_is_fixed_spread_out_and_not_trained_on(text):
    batches = list(text.val_dataloader())
    assert [b.shape for b in batches] == [(4, 33)] * 6
    other = TextData(text.config.replace(seed=5, router="dense", accumulate=3))
    other.setup()
    assert all(torch.equal(a, b) for a, b in zip(batches, other.val_dataloader(), strict=True))
    val = tokens.load(text.config).val
    rows = torch.cat(batches)
    last = len(val) // 33 - 1
    for i, row in enumerate(rows.numpy()):  # no overlap
        np.testing.assert_array_equal(row, val[33 * round(i * last / 23) :][:33])


@pytest.mark.parametrize("gpu", [False, True])
def test_batches_lie_in_memory_from_which_a_gpu_copies(text, monkeypatch, gpu):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert [loader.pin_memory for loader in (text.train_dataloader(), text.val_dataloader())] == [gpu, gpu]


def test_all_of_the_text_may_validate(text):
    windows = len(tokens.load(text.config).val) // 33
    whole, more = (TextData(text.config.replace(batch_size=1, eval_batches=windows + extra)) for extra in (0, 1))
    whole.setup()
    assert len(whole.val_batches()) == windows
    with pytest.raises(ConfigError, match=f"has {windows} validation windows"):
        more.setup()


def test_a_rank_is_counted_over_all_machines(text):
    data = TextData(text.config.replace(devices=2, num_nodes=2))
    assert data._place == (0, 1)
    data.trainer = SimpleNamespace(global_rank=3, local_rank=1, world_size=4)
    assert data._place == (3, 4)
    data.setup()
    whole = list(itertools.islice(text.train_dataloader(), 12))
    data.start_step = 1
    for step, batch in zip((1, 2), data.train_dataloader(), strict=False):
        assert torch.equal(batch, whole[4 * step + 3])


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_trainer_has_no_more_ranks_than_the_config(text, world):
    """Else its last rank would have got no validation batch: there are as many as eval_batches of the config's ranks."""
    data = TextData(text.config.replace(devices=2, eval_batches=1))
    data.setup()
    data.trainer = SimpleNamespace(global_rank=world - 1, world_size=world)
    for loader in (data.train_dataloader, data.val_dataloader):
        if world <= 2:
            assert next(iter(loader())) is not None
        else:
            with pytest.raises(ConfigError, match="^devices=2 x num_nodes=1, but the trainer has 3 ranks: set devices"):
                loader()


def test_validation_over_ranks_is_the_validation_of_one(text, monkeypatch):
    whole = torch.cat(list(text.val_dataloader()))
    parts = []
    ranks = TextData(text.config.replace(devices=3, eval_batches=5))  # the sixth: all ranks validate equally often
    ranks.setup("fit")  # before a trainer is attached
    assert torch.equal(torch.cat(list(ranks.val_dataloader())), whole)
    for rank in (0, 1, 2):
        monkeypatch.setattr(TextData, "_place", (rank, 3))
        parts.append(list(ranks.val_dataloader()))
    assert [len(p) for p in parts] == [2, 2, 2]
    assert torch.equal(torch.cat([b for step in zip(*parts, strict=True) for b in step]), whole)


def test_counts_digest_and_provenance(text):
    train = tokens.load(text.config).train
    assert text.token_counts.dtype == np.int64 and text.token_counts.shape == (256,)
    assert (text.token_counts == np.bincount(train, minlength=256)).all()
    assert text.bytes_per_token == 1.0 and text.digest == text.provenance["digest"]
    said = text.provenance
    counts = {f"{side}_{what}" for side in ("train", "val") for what in ("tokens", "bytes", "documents")}
    words = {"name", "licence", "attribution", "split", "digest", "source_sha256", "tokenizer", "vocab_size"}
    assert set(said) == counts | words and said["tokenizer"] == "bytes" and len(said["source_sha256"]) == 64
    assert "PSF" in said["licence"] and said["attribution"] and said["vocab_size"] == 256
    assert said["train_tokens"] == len(train) and all(said[key] is not None for key in (*data._PROVENANCE, "split"))
    assert said["train_documents"] == (np.asarray(train) == 0).sum() and said["val_documents"] > 0


def test_bytes_per_token_of_bpe_is_that_of_the_validation_windows():
    config = RunConfig(max_bytes=400_000, tokenizer="bpe", vocab_size=400, sequence_length=32, batch_size=4)
    found = TextData(config)
    found.setup("fit")
    train = found.train
    found.setup("validate")
    assert found.train is train  # read once
    targets = torch.cat(list(found.val_dataloader()))[:, 1:]
    size = sum(len(found.tokenizer.decode(row).encode()) for row in targets)
    assert found.bytes_per_token == pytest.approx(size / targets.numel(), rel=0.01)  # a window may cut a character
    assert found.bytes_per_token == found.tokenizer.byte_lengths[targets].mean() > 1.3


@pytest.mark.parametrize("keys, named", [
    ({"batch_size": 16384}, "training windows"), ({"eval_batches": 500}, "validation windows"),
    ({"sequence_length": 500_000, "router": "dense"}, "training windows"),
    ({"batch_size": 1024, "devices": 4, "num_nodes": 4}, "on every rank, need 16384"),
])  # fmt: skip
def test_too_small_a_corpus_names_the_keys(text, keys, named):
    with pytest.raises(ConfigError) as error:
        TextData(text.config.replace(**keys)).setup()
    given = text.config.replace(**keys)
    for word in (named, "data='stdlib'", f"batch_size={given.batch_size},", f"eval_batches={given.eval_batches},",
                 "sequence_length", "max_bytes=400000"):  # fmt: skip
        assert word in str(error.value)


def test_a_copy_has_its_own_name_and_the_same_tokens(tmp_path):
    said = []
    for name in ("books", "novels"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text("A line of text.\n\n" * 5000)
        found = TextData(RunConfig(data=str(tmp_path / name), sequence_length=16, batch_size=4, eval_batches=2))
        found.setup()
        said.append(found.provenance)
    assert [one["name"] for one in said] == ["books", "novels"] and said[0]["digest"] == said[1]["digest"]


def test_a_checkpoint_of_other_tokens_is_not_gone_on_from(text):
    text.load_state_dict(text.state_dict())
    with pytest.raises(
        ConfigError, match=f"has changed since the checkpoint.*from 0123 to {text.digest}: .*runs/{text.config.name}"
    ):
        text.load_state_dict({"digest": "0123"})


def test_licence_stated_after_tokenising(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("A line of text.\n\n" * 5000)
    config = RunConfig(data=str(path), sequence_length=16, batch_size=4, eval_batches=2)
    with pytest.raises(ConfigError, match=f"data='{path}' has"):  # without what the key states of its content
        TextData(config.replace(eval_batches=10**6)).setup()
    for licence in ("not stated", "CC0"):
        found = TextData(config)
        found.setup()
        assert found.provenance["licence"] == licence
        (tmp_path / "book.txt.about.yaml").write_text("licence: CC0")
