"""The Vision Transformer and its runs: against loops; trained, resumed and loaded like any other run."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from ecmoe import load_model, paths, run_or_load
from ecmoe.config import ConfigError, RunConfig
from ecmoe.data.images import AugmentedBatches, ImageData, shifted
from ecmoe.model.build import build_model, count_parameters, flops_per_token
from ecmoe.model.vision import PatchEmbedding
from ecmoe.study.plan import config_class
from ecmoe.study.table import table
from ecmoe.training.recorder import Recorder
from ecmoe.training.result import read_record, write_record


@pytest.fixture(scope="session")
def digits():
    """`digits(**changes)`: a config that trains on images in about a second."""

    def make(**changes) -> RunConfig:
        tiny = {
            "data": "digits", "patch_size": 2, "sequence_length": 16, "layers": 2, "d_model": 16, "d_ff": 32, "heads": 2,
            "num_experts": 4, "batch_size": 20, "steps": 12, "warmup_steps": 2, "eval_every": 6, "eval_batches": 5,
            "learning_rate": 1e-2,
        }  # fmt: skip
        return RunConfig.from_dict(tiny | changes)

    return make


# Names


def test_records_keep_their_names():
    """Keys that came later, and that a run doesn't read, change no name."""
    for path in (Path(__file__).parents[2] / "reports/gpu/runs").glob("*.json"):
        summary = json.loads(path.read_text(encoding="utf-8"))["summary"]
        config = config_class(summary["config"]).from_dict(summary["config"])
        if not config.images and "relative_init" not in summary["config"]:
            continue  # of a text with another start of the position bias, which makes it another run
        assert config.name == summary["name"] == path.stem


def test_each_kind_of_run_is_named_by_the_keys_that_it_reads(digits):
    text = RunConfig()
    assert text.replace(patch_size=4, channels=3, classes=2, augment=True).name == text.name
    images = digits()
    assert images.replace(vocab_size=300, max_bytes=9, relative_buckets=8, relative_init="normal").name == images.name
    assert images.replace(patch_size=4, sequence_length=4).name != images.name
    assert (
        len({images.replace(data=d).name for d in ("digits", "images:/a/pets", "images:/b/pets", "images:toys")}) == 3
    )


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"router": "hash"}, ["router='hash'", "token ids", "expert_choice"]),
        ({"router": "task_level"}, ["router='task_level'", "tasks"]),
        ({"patch_size": 3}, ["patch_size=3", "must divide the 8 x 8"]),
        ({"patch_size": 4}, ["sequence_length=16", "set sequence_length: 4"]),
        ({"channels": 3}, ["channels=3", "set channels: 1"]),
        ({"classes": 5}, ["classes=5", "set classes: 10"]),
        ({"eval_batches": 50}, ["360 validation images", "1000", "eval_batches=50"]),
        ({"batch_size": 2000}, ["1437 training images", "batch_size=2000"]),
    ],
)
def test_error_names_key_value_and_remedy(digits, changes, named):
    with pytest.raises(ConfigError) as error:
        ImageData(digits(**changes)).setup()
    assert all(text in str(error.value) for text in named), str(error.value)


# Model


def test_patches_are_those_of_a_loop():
    embedding = PatchEmbedding(SimpleNamespace(patch_size=3, channels=4, d_model=36, sequence_length=30))
    embedding.patch, embedding.position = torch.nn.Identity(), torch.nn.Parameter(torch.zeros(30, 36))
    x = torch.randn(2, 4, 15, 18)  # 5 x 6 patches
    places = [(r, c) for r in range(0, 15, 3) for c in range(0, 18, 3)]
    expected = torch.stack(
        [torch.stack([x[b, :, r : r + 3, c : c + 3].reshape(-1) for r, c in places]) for b in range(2)]
    )
    assert torch.equal(embedding(x), 2 * expected - 1)


def test_attention_sees_all_patches_and_knows_their_places(digits):
    model = build_model(digits(router="dense")).eval()
    x = torch.rand(1, 1, 8, 8)
    attended = model.blocks[0].attention(model.embedding(x))
    changed = x.clone()
    changed[..., -1, -1] = 1 - changed[..., -1, -1]
    moved = model.blocks[0].attention(model.embedding(changed)) - attended
    assert (moved.abs().amax(-1) > 0).all()  # the first patch too sees the last
    assert not torch.allclose(model(x), model(x.flip(-1)))


def test_shared_parameters_start_alike_and_sizes_are_counted(digits):
    config = digits()
    model, dense = build_model(config), build_model(config.replace(router="dense"))
    assert torch.equal(model.embedding.position, dense.embedding.position)
    out = model(torch.rand(20, 1, 8, 8))
    assert out.shape == (20, 10) and 0.3 < out.std() < 3
    count = count_parameters(config)
    assert count.total == sum(p.numel() for p in model.parameters())
    experts = 2 * 4 * 16 * 32
    assert count.active == count.total - experts + experts * 2 // 4
    assert flops_per_token(config) == 6 * count.active + 12 * 2 * 16 * 16
    assert [len(m.moe_layers) for m in (model, dense)] == [1, 0]


def test_the_head_reads_the_mean_of_all_patches(digits):
    model, x = build_model(digits(d_model=64)), torch.rand(3, 1, 8, 8)
    patches = model.through(model.embedding(x))
    torch.testing.assert_close(model(x), sum(patches.unbind(1)) / 16 @ model.head.weight.T)
    assert model.head.weight.std().item() == pytest.approx(64**-0.5, rel=0.1)
    assert model.embedding.patch.weight.std().item() == pytest.approx(4**-0.5, rel=0.15)


def test_pool_of_one_image_routes_as_if_the_others_were_not_there(digits):
    model = build_model(digits(pool="sequence")).eval()
    x = torch.rand(6, 1, 8, 8)
    torch.testing.assert_close(model(x)[2:3], model(x[2:3]))


# Data


def test_batches_pair_images_with_their_classes(digits):
    data = ImageData(digits())
    data.setup()
    lookup = {x.numpy().tobytes(): int(y) for x, y in zip(*data.train, strict=True)}
    batches = [b for _, b in zip(range(3), data.train_dataloader(), strict=False)]
    for x, y in batches:
        assert x.shape == (20, 1, 8, 8) and y.dtype == torch.int64
        assert [lookup[image.numpy().tobytes()] for image in x] == y.tolist()
    assert sum(len(y) for _, y in data.val_dataloader()) == 100
    data.start_step = 2
    assert torch.equal(next(iter(data.train_dataloader()))[0], batches[2][0])


def test_shifted_is_a_loop_over_images():
    """By as far as the height says, whatever the width."""
    for height, width, most in ((16, 28, 2), (6, 20, 1)):
        x = torch.rand(40, 2, height, width)
        moved, draw = shifted(x, np.random.default_rng(3)), np.random.default_rng(3)
        down, right = draw.integers(0, 2 * most + 1, (2, 40, 1))
        mirror = draw.random(40) < 0.5
        for i in range(40):
            wide = torch.zeros(2, height + 2 * most, width + 2 * most)
            wide[:, most : most + height, most : most + width] = x[i]
            y, z = int(down[i, 0]), int(right[i, 0])
            expected = wide[:, y : y + height, z : z + width]
            assert torch.equal(moved[i], expected.flip(-1) if mirror[i] else expected)
        assert moved.is_contiguous() and 10 < mirror.sum() < 30


def test_augmented_batches_resume_where_they_were():
    x, y = torch.rand(50, 1, 8, 8), torch.arange(50)
    first = [b for _, b in zip(range(9), AugmentedBatches((x, y), 5, 0), strict=False)]
    later = [b for _, b in zip(range(5), AugmentedBatches((x, y), 5, 0, 4), strict=False)]
    for (a, i), (b, j) in zip(first[4:], later, strict=True):
        assert torch.equal(a, b) and torch.equal(i, j)
    assert not any(torch.equal(a, x[i]) for a, i in first)


# Runs


def test_a_run_classifies_and_its_accuracy_is_what_a_loop_counts(digits, tmp_path):
    config = digits(steps=60, eval_every=30)
    result = run_or_load(config, records=tmp_path, progress=False)
    s = result.summary
    assert result.ok and s["accuracy"] > 0.3 and result.curve["accuracy"].notna().all()
    for key in ("val_loss_causal", "bits_per_byte", "perplexity"):  # nothing is causal, nothing has bytes
        assert s[key] is None or math.isnan(s[key])
    assert s["parameters"] == count_parameters(config).total

    model, data = result.load_model(), ImageData(config)
    data.setup()
    right = total = 0
    with torch.no_grad():
        for x, y in data.val_dataloader():
            for logits, label in zip(model(x), y, strict=True):
                right += max(range(10), key=lambda c: logits[c]) == label
                total += 1
    assert total == 100 and s["accuracy"] == pytest.approx(float(right) / total)

    record = read_record(tmp_path / f"{config.name}.json")
    assert table({"EC": [record]})["accuracy"].item() == s["accuracy"]
    write_record(tmp_path / "again.json", record)


def test_broken_off_and_resumed_ends_the_same_to_the_last_bit(digits, monkeypatch):
    config = digits(router="token_choice", capacity_factor=0.5, priority="score", balance="importance_load",
                    augment=True, checkpoint_every=4)  # fmt: skip
    whole = run_or_load(config, progress=False)
    weights = load_model(whole.path).state_dict()
    whole.path.rename(whole.path.with_name("whole-images"))
    end = Recorder.on_train_batch_end

    def break_off(self, trainer, *a):
        end(self, trainer, *a)
        if trainer.global_step == 9:
            raise OSError("the machine went down")

    with monkeypatch.context() as broken, pytest.raises(OSError):
        broken.setattr(Recorder, "on_train_batch_end", break_off)
        run_or_load(config, progress=False)
    assert (paths.runs() / config.name / "last.ckpt").exists()
    again = run_or_load(config, progress=False)
    resumed = load_model(again.path).state_dict()
    assert all(torch.equal(resumed[name], weights[name]) for name in weights)
    same = ["step", "train_loss", "val_loss", "accuracy"]
    pd.testing.assert_frame_equal(again.curve[same], whole.curve[same], check_exact=True)


def test_validation_batches_mix_classes_that_lie_apart(digits, monkeypatch):
    from ecmoe.data import images

    loaded = images.load("digits")
    order = loaded.val_y.argsort()  # as a folder has them: class by class
    sorted_ = loaded._replace(val_x=loaded.val_x[order], val_y=loaded.val_y[order])
    monkeypatch.setattr(images, "load", lambda data: sorted_)
    batches = []
    for _ in range(2):
        data = ImageData(digits())
        data.setup()
        batches.append(list(data.val_dataloader()))
    assert all(len(y.unique()) > 5 for _, y in batches[0])
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(*batches, strict=True))


def test_a_patch_is_read_from_minus_1_to_1_and_has_a_place(digits):
    model = build_model(digits(d_model=64))
    embedding, black = model.embedding, torch.zeros(1, 1, 8, 8)
    assert embedding.position.shape == (16, 64) and float(embedding.position.std()) == pytest.approx(0.1, rel=0.1)
    of_black = -embedding.patch.weight.sum(1) + embedding.position
    torch.testing.assert_close(embedding(black)[0], of_black)
    torch.testing.assert_close(embedding(black + 0.5)[0], embedding.position)
