"""Images: the same pictures in the same order, from every kind of source; errors that say what to do."""

import hashlib
import io
import lzma
import re

import numpy as np
import pytest
import torch
from PIL import Image

from ecmoe.config import RunConfig
from ecmoe.continual import ContinualConfig
from ecmoe.data import images
from ecmoe.files import ConfigError
from ecmoe.paths import with_content


def picture(value: int, size=(6, 4)) -> Image.Image:
    return Image.new("RGB", size, (value, 0, 255))


def folder_of(path, per_class=5, size=(6, 4)):
    for label, name in enumerate(("cat", "dog")):
        (path / name).mkdir(parents=True)
        for i in range(per_class):
            picture(20 * label + i, size).save(path / name / f"{i}.png")
    return f"images:{path}"


def pack(path, part: str, labels):
    data, places = b"", []
    for label in labels:
        buffer = io.BytesIO()
        picture(100 * label).save(buffer, "JPEG", quality=95)
        data = buffer.getvalue() + data  # the last comes first: only its line says where an image is
        places.append((len(data), buffer.tell(), label))
    lines = [f"{len(data) - end} {size} {label}" for end, size, label in places]
    (path / f"toy_{part}.jpgs.xz").write_bytes(lzma.compress(data))
    (path / f"toy_{part}.idx.xz").write_bytes(lzma.compress("\n".join(lines).encode()))


def test_digits_are_all_there_in_a_fixed_split():
    from sklearn.datasets import load_digits

    found, source = images.load("digits"), load_digits()
    assert found.train_x.shape == (1437, 1, 8, 8) and found.val_x.shape == (360, 1, 8, 8)
    assert found.train_x.dtype == torch.float32 and found.train_y.dtype == torch.int64
    assert found.train_x.min() == 0 and found.train_x.max() == 1
    np.testing.assert_array_equal(torch.cat([found.train_x, found.val_x])[:, 0].numpy() * 16, source.images)
    np.testing.assert_array_equal(torch.cat([found.train_y, found.val_y]), source.target)
    assert found.classes == tuple("0123456789") and torch.bincount(found.val_y).min() > 30
    said = found.provenance
    assert said["licence"] == "CC BY 4.0" and said["attribution"].startswith("Alpaydin and Kaynak 1998")
    assert said["name"].startswith("Optical Recognition of Handwritten Digits (scikit-learn")
    assert said["name"].endswith("first 1,437 train, last 360 validate)")
    sides = [part for side in (slice(1437), slice(1437, None)) for part in (source.images.astype(np.uint8)[side], source.target[side])]  # fmt: skip
    digest = hashlib.sha256(b"".join(part.tobytes() for part in sides) + repr(found.classes).encode()).hexdigest()
    assert said["digest"] == digest[:16]
    assert set(said) == {"name", "licence", "attribution", "digest", "train_images", "val_images", "shape"}
    assert (said["train_images"], said["val_images"], said["shape"]) == (1437, 360, [1, 8, 8])


def test_folder_holds_out_a_fifth_of_each_class(tmp_path):
    found = images.load(folder_of(tmp_path / "pets", 7))
    assert found.classes == ("cat", "dog") and found.train_x.shape == (12, 3, 4, 6)  # 6 wide, 4 high
    assert found.val_y.tolist() == [0, 1] and found.train_y.dtype == torch.int64
    red = (found.val_x[:, 0, 0, 0] * 255).round().int().tolist()
    assert red == [4, 24] and found.train_x[:, 2].min() == 1
    assert found.provenance["name"] == "pets" and found.provenance["licence"] == "not stated"


def test_folder_with_its_own_split_keeps_it(tmp_path):
    folder_of(tmp_path / "train", 3)
    folder_of(tmp_path / "test", 2)
    picture(0).save(tmp_path / "train" / "x.png")  # of no class
    (tmp_path / "train" / "dog" / "deep").mkdir()
    picture(9).save(tmp_path / "train" / "dog" / "deep" / "x.png")  # of the class of the folder above
    found = images.load(f"images:{tmp_path}")
    assert found.train_y.tolist() == [0] * 3 + [1] * 4 and found.val_y.tolist() == [0, 0, 1, 1]
    assert found.classes == ("cat", "dog")
    for side, count in (("val", 1), ("validation", 4)):  # the first of three that is there
        folder_of(tmp_path / side, count)
        assert len(images.load(f"images:{tmp_path}").val_y) == 2 * count
    (tmp_path / "validation" / "emu").mkdir()
    picture(0).save(tmp_path / "validation" / "emu" / "x.png")  # a class that nobody trains on
    found = images.load(f"images:{tmp_path}")
    assert found.classes == ("cat", "dog", "emu") and found.train_y.max() == 1 and found.val_y.max() == 2
    with pytest.raises(ConfigError, match="classes=2 with .*: it has 3; set classes: 3"):
        images.check(RunConfig(data="digits", classes=2, channels=3, sequence_length=6), found)


def test_patches_of_pictures_that_are_not_square(tmp_path):
    data = folder_of(tmp_path)
    loaded = images.load(data)
    images.check(config := RunConfig(data=data, classes=2, channels=3, sequence_length=6), loaded)
    for keys, said in (
        ({"patch_size": 4}, "patch_size=4: must divide the 4 x 6 pixels of data='.*'$"),
        ({"patch_size": 3}, r"patch_size=3: must divide the 4 x 6 pixels"),
        ({"channels": 1}, "channels=1 with .*: its images are read as RGB; set channels: 3$"),
        ({"sequence_length": 4}, "images of 4 x 6 pixels have 6 patches of patch_size=2; set sequence_length: 6"),
    ):
        with pytest.raises(ConfigError, match=said):
            images.check(config.replace(**keys), loaded)


@pytest.mark.parametrize("place", ["{}", "."])
def test_packed_jpegs(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    pack(tmp_path, "train", [0, 1, 2, 1])
    pack(tmp_path, "test", [2, 0])
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "toy_train.jpgs.xz").write_bytes(b"of another day")
    (tmp_path.parent / f"{tmp_path.name}.about.yaml").write_text("{name: Toys, licence: CC0}")
    found = images.load(f"images:{place.format(tmp_path)}")
    assert found.train_y.tolist() == [0, 1, 2, 1] and found.val_y.tolist() == [2, 0]
    assert found.classes == ("0", "1", "2") and found.train_x.shape == (4, 3, 4, 6)
    red = found.train_x[:, 0].mean(dim=(1, 2)) * 255
    assert torch.allclose(red, torch.tensor([0.0, 100, 200, 100]), atol=4)  # JPEG is lossy
    assert found.provenance["name"] == "Toys" and found.provenance["licence"] == "CC0"


CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck"  # by label, as its authors number them


@pytest.mark.parametrize(("last", "classes"), [(9, tuple(CIFAR10.split())), (10, tuple(map(str, range(11))))])
def test_packed_cifar10_has_its_names_where_they_are_enough(tmp_path, last, classes):
    for part, labels in (("train", [0, 1]), ("test", [0, last])):
        pack(tmp_path, part, labels)
        for kind in ("jpgs", "idx"):
            (tmp_path / f"toy_{part}.{kind}.xz").rename(tmp_path / f"cifar10_{part}.{kind}.xz")
    assert images.load(f"images:{tmp_path}").classes == classes


@pytest.mark.parametrize("label", [-1, 1 << 16])
def test_a_label_that_cannot_be_is_named(tmp_path, label):
    for part in ("train", "test"):
        pack(tmp_path, part, [0, 1])
    (tmp_path / "toy_train.idx.xz").write_bytes(lzma.compress(f"0 9 1\n9 9 {label}".encode()))
    with pytest.raises(ConfigError, match="toy_train.idx.xz can't be read .labels must be 0 to 65,535"):
        images.load(f"images:{tmp_path}")


def test_a_label_may_have_16_bits(tmp_path):
    for part in ("train", "test"):
        pack(tmp_path, part, [0, 1])
    places = lzma.open(tmp_path / "toy_train.idx.xz", "rt").read()
    (tmp_path / "toy_train.idx.xz").write_bytes(lzma.compress(f"{places[:-1]}65535".encode()))
    assert images.load(f"images:{tmp_path}").train_y.tolist() == [0, 65535]


def test_a_jpeg_that_cannot_be_read_is_named_by_its_place(tmp_path):
    for part in ("train", "test"):
        pack(tmp_path, part, [0, 1])
    places = lzma.open(tmp_path / "toy_test.idx.xz", "rt").read().split("\n")
    (tmp_path / "toy_test.idx.xz").write_bytes(lzma.compress(f"{places[0]}\n3 9 1".encode()))
    with pytest.raises(ConfigError, match=r"toy_test\.jpgs\.xz, image 1 can't be read"):
        images.load(f"images:{tmp_path}")


@pytest.mark.parametrize("of", ["digest", "source_sha256"])  # of pixels and of files
def test_digest_tells_other_images_apart(tmp_path, of):
    digests = [images.load(folder_of(tmp_path / name, n)).provenance[of] for name, n in (("a", 5), ("b", 5), ("c", 6))]
    assert digests[0] == digests[1] != digests[2]


def test_digest_covers_labels_and_names_of_classes(tmp_path):
    digests = set()
    for name, labels in (("toy", [0, 1, 2, 1]), ("toy", [1, 0, 2, 1]), ("cifar10", [0, 1, 2, 1])):
        folder = tmp_path / f"{name}{labels[0]}"
        folder.mkdir()
        for part in ("train", "test"):
            pack(folder, part, [0, 1, 2, 1])
            lines = lzma.open(folder / f"toy_{part}.idx.xz", "rt").read().split("\n")
            lines = [f"{line[:-1]}{label}" for line, label in zip(lines, labels, strict=True)]
            (folder / f"{name}_{part}.idx.xz").write_bytes(lzma.compress("\n".join(lines).encode()))
            (folder / f"toy_{part}.jpgs.xz").rename(folder / f"{name}_{part}.jpgs.xz")
        found = images.load(f"images:{folder}")
        assert found.train_y.tolist() == labels
        digests.add(found.provenance["digest"])
    assert len(digests) == 3


def test_another_folder_of_the_same_name_is_another(tmp_path):
    for place, count in (("A", 5), ("B", 6)):
        data = folder_of(tmp_path / place / "cats", count)
        assert len(images.load(data).train_y) == 2 * (count - 1)
    (tmp_path / "B" / "cats" / "cat" / "5.png").unlink()
    (tmp_path / "B" / "cats" / "dog" / "5.png").unlink()
    assert len(images.load(data).train_y) == 8  # what is in memory is found by content
    stated = with_content(data)
    assert stated == f"{data}#" + with_content(f"images:{tmp_path / 'A' / 'cats'}")[-16:]
    (tmp_path / "B").rename(tmp_path / "gone")
    assert with_content(data) == stated  # what was read is known by what it held
    (tmp_path / "gone").rename(tmp_path / "B")
    picture(7).save(tmp_path / "B" / "cats" / "cat" / "0.png")
    with pytest.raises(ConfigError, match=", not what is stated"):
        images.load(stated)


@pytest.mark.parametrize("kind", [RunConfig, ContinualConfig])
def test_runs_on_other_images_of_the_same_name_are_other_runs(tmp_path, kind):
    data = [folder_of(tmp_path / place / "cats", count) for place, count in (("A", 5), ("B", 6), ("C", 5))]
    keys = {"layers": 2} if kind is RunConfig else {}
    a, b, copy = (kind(data=one, **keys).name for one in data)
    assert a == copy != b


@pytest.mark.parametrize("name", ["in[1]", "*", "a{b,c}"])
def test_a_folder_is_no_pattern(tmp_path, name):
    folder_of(tmp_path / "in1", 6)
    folder_of(tmp_path / "ab", 6)
    assert len(images.load(folder_of(tmp_path / name)).train_y) == 8
    picture(0).save(tmp_path / name / "cat" / "0[1].png")
    assert len(images.load(f"images:{tmp_path / name}").train_y) + 2 == 11


def test_greys_of_16_bits_keep_their_shades(tmp_path):
    ramp = np.linspace(0, 65535, 64).reshape(8, 8)
    for label in "ab":
        (tmp_path / label).mkdir()
        for i in range(10):
            Image.fromarray(ramp.astype(np.uint16)).save(tmp_path / label / f"{i}.png")
    found = images.load(f"images:{tmp_path}").train_x
    assert found.shape == (16, 3, 8, 8)
    np.testing.assert_allclose(found[0, 2].numpy(), ramp / 65535, atol=0.5 / 255 + 1e-6)


def test_a_picture_of_any_mode_is_read_as_red_green_and_blue(tmp_path):
    wide, rng = 6, np.random.default_rng(0)
    colours, greys = rng.integers(0, 256, (4, wide, 3), np.uint8), rng.integers(0, 256, (4, wide), np.uint8)
    alpha, which = np.full((4, wide), 99, np.uint8), rng.integers(0, 5, (4, wide), np.uint8)
    palette = Image.fromarray(which, "P")
    palette.putpalette((table := rng.integers(0, 256, (5, 3), np.uint8)).tobytes())
    grey = np.stack([greys] * 3, axis=2)
    saved = {
        "1": (Image.fromarray(greys > 127), 255 * (grey > 127)),
        "L": (Image.fromarray(greys), grey),
        "LA": (Image.fromarray(np.dstack([greys, alpha])), grey),
        "P": (palette, table[which]),
        "RGB": (Image.fromarray(colours), colours),
        "RGBA": (Image.fromarray(np.dstack([colours, alpha])), colours),
    }
    for side in ("train", "val"):
        for mode, (image, _) in saved.items():
            (tmp_path / side / mode).mkdir(parents=True)
            image.save(tmp_path / side / mode / "x.png")
            assert Image.open(tmp_path / side / mode / "x.png").mode == mode
    found = images.load(f"images:{tmp_path}")
    assert found.classes == tuple(saved) and found.train_y.tolist() == list(range(6))
    for x in (found.train_x, found.val_x):
        expected = np.stack([pixels for _, pixels in saved.values()]).transpose(0, 3, 1, 2)
        np.testing.assert_allclose(x.numpy(), expected / 255, atol=1e-7)


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "text", "bomb", "float", "32 bits", "negative"])
def test_a_picture_that_cannot_be_read_is_named(tmp_path, damage, monkeypatch):
    folder_of(tmp_path)
    path = tmp_path / "dog" / "3.png"
    content = bytearray(path.read_bytes())
    if damage == "bomb":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 23)  # of 24: Pillow itself only warns
    elif damage in (of_greys := {"float": np.float32(0), "32 bits": np.int32(65536), "negative": np.int32(-1)}):
        path = tmp_path / "dog" / "9.tif"
        Image.fromarray(np.full((4, 6), of_greys[damage])).save(path)
    else:
        content[len(content) // 2] ^= 0x55
        path.write_bytes({"cut": content[:-20], "flip": content, "empty": b"", "text": b"no picture"}[damage])
    with pytest.raises(
        ConfigError,
        match=rf"data='images:.*': .*{'0.png' if damage == 'bomb' else path.name} can't be read \(\w+: .+\): repair",
    ):
        images.load(f"images:{tmp_path}")


def test_a_folder_of_training_images_alone_holds_some_out(tmp_path):
    folder_of(tmp_path / "train")
    found = images.load(f"images:{tmp_path}")
    assert found.classes == ("cat", "dog") and (len(found.train_y), len(found.val_y)) == (8, 2)


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ("digit", ["data='digit'", "isn't a folder"]),
        ("images:nowhere", ["data='images:nowhere'", "isn't a folder", "sub-folder"]),
        (f"images:{300 * 'a'}", ["data='images:aaaa", "isn't a folder"]),  # longer than a file's name may be
    ],
)
def test_error_names_key_value_and_remedy(data, named):
    with pytest.raises(ConfigError) as error:
        images.load(data)
    assert all(text in str(error.value) for text in named)


@pytest.mark.parametrize("size", [(8, 4), (6, 8)])
def test_sizes_must_agree(tmp_path, size):
    folder_of(tmp_path / "train", 3)
    picture(0, size).save(tmp_path / "train/cat/x.png")
    told = f"data='images:{tmp_path}': has images of 4 x 6 and {size[1]} x {size[0]} pixels, height x width ({tmp_path}/train/cat/x.png)"
    with pytest.raises(ConfigError, match=rf"^{re.escape(told)}, but all must have the same size: resize them$"):
        images.load(f"images:{tmp_path}")


def test_a_side_without_classes_is_named(tmp_path):
    folder_of(tmp_path / "train", 3)
    (tmp_path / "test").mkdir()
    picture(0).save(tmp_path / "test" / "x.png")
    told = f"data='images:{tmp_path}': has no images in class folders; it must hold a sub-folder of image files per class, either"
    with pytest.raises(
        ConfigError, match=f"^{re.escape(told)} directly or below train and one of validation, val, test$"
    ):
        images.load(f"images:{tmp_path}")


def test_unreadable_folders_are_named(tmp_path):
    with pytest.raises(ConfigError, match="sub-folder of image files"):
        images.load(f"images:{tmp_path}")
    pack(tmp_path, "train", [0])
    told = re.escape(f"data='images:{tmp_path}': {tmp_path}/toy_test.jpgs.xz with toy_test.idx.xz can't be read (")
    with pytest.raises(ConfigError, match=f"^{told}.*No such file.* a line `offset length label` for each$"):
        images.load(f"images:{tmp_path}")
    pack(tmp_path, "test", [])
    with pytest.raises(ConfigError, match=f"^data='images:{tmp_path}': contains no images$"):
        images.load(f"images:{tmp_path}")


def test_cifar10_comes_from_the_hub(monkeypatch):
    import datasets

    rows = [{"img": picture(i, (32, 32)), "label": i % 10} for i in range(20)]
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=list(images.CIFAR10))})
    made = datasets.Dataset.from_list(rows, features=features)
    asked = []
    monkeypatch.setattr(
        datasets, "load_dataset", lambda path: asked.append(path) or {"train": made, "test": made.select([7])}
    )
    images._load.cache_clear()
    found = images.load("cifar10")
    assert asked == ["uoft-cs/cifar10"] and found.classes == images.CIFAR10 and found.train_x.shape == (20, 3, 32, 32)
    assert (found.provenance["name"], found.provenance["licence"]) == ("CIFAR-10", "not stated")
    assert found.provenance["attribution"].startswith("Krizhevsky 2009")
    assert found.train_y.tolist() == [i % 10 for i in range(20)]
    for x, reds in ((found.train_x, range(20)), (found.val_x, [7])):
        assert (x[:, :, 5, 31] * 255).round().int().tolist() == [[red, 0, 255] for red in reds]
    with pytest.raises(ConfigError, match="patch_size=3: must divide the 32 x 32 pixels"):
        images.check(RunConfig(data="cifar10", patch_size=3), found)
    assert found.val_y.tolist() == [7] and list(found.classes) == sorted(set(found.classes))
    images._load.cache_clear()

    def offline(path):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    told = "data='cifar10': `datasets` can't load 'uoft-cs/cifar10' (ConnectionError: no network); the Hub must be reachable, "
    with pytest.raises(
        ConfigError, match=f"^{re.escape(told)}or give a local copy as data: images:PATH, or take data: digits$"
    ):
        images.load("cifar10")


# Batches

X, Y = torch.rand(3, 16, 16).expand(64, 3, 16, 16), torch.arange(64)  # all alike, whatever their order


def batch(seed=0, rank=0, step=0):
    return next(iter(images.AugmentedBatches((X, Y), 32, seed, step, rank, 2)))[0]


def test_draws_are_of_seed_rank_and_step_alone():
    first = batch()
    assert torch.equal(first, batch())
    for other in (batch(seed=1), batch(rank=1), batch(step=1)):
        assert not torch.equal(first, other)
    for_ever = images.shifted(X[:32], np.random.default_rng([4, 1, 3, 1]))
    assert torch.equal(batch(seed=4, rank=1, step=3), for_ever)


def test_shifted_is_a_loop_over_images():
    x = torch.rand(9, 3, 17, 40)  # moved by 17 / 8 = 2 in both directions
    found, draw = images.shifted(x, np.random.default_rng(5)), np.random.default_rng(5)
    (down, right), mirrored = draw.integers(0, 5, (2, 9, 1)) - 2, draw.random(9) < 0.5
    assert 0 < mirrored.sum() < 9 and found.is_contiguous()
    for image, before, (by,), (aside,), mirror in zip(found, x, down, right, mirrored, strict=True):
        expected = torch.zeros(3, 17, 40)
        for row in range(max(0, -by), min(17, 17 - by)):
            for column in range(max(0, -aside), min(40, 40 - aside)):
                expected[:, row, column] = before[:, row + by, column + aside]
        assert torch.equal(image, expected.flip(2) if mirror else expected)


def test_only_who_asks_for_it_sees_them_moved():
    keys = {"data": "digits", "patch_size": 2, "sequence_length": 16, "layers": 2, "batch_size": 20}
    first = []
    for augment in (False, True):
        data = images.ImageData(RunConfig(augment=augment, **keys))
        data.setup()
        first.append(next(iter(data.train_dataloader())))
    (x, y), (moved, same) = first
    assert torch.equal(y, same) and torch.equal(moved, images.shifted(x, np.random.default_rng([0, 0, 0, 1])))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"batch_size": 1438, "eval_batches": 1}, "1437 training"),
        ({"batch_size": 361, "eval_batches": 1}, "360 validation"),
    ],
)
def test_too_few_images_are_named(keys, said):
    with pytest.raises(ConfigError, match=f"data='digits' has {said} images, but .* need {keys['batch_size']} "):
        images.ImageData(RunConfig(data="digits", sequence_length=16, router="dense", **keys)).setup()


def test_validation_is_spread_over_its_images_in_an_order_that_stays():
    data = images.ImageData(RunConfig(data="digits", sequence_length=16, batch_size=7, eval_batches=9, seed=3))
    data.setup()
    loaded = images.load("digits")
    which = np.random.default_rng(0).permutation([round(i * 359 / 62) for i in range(63)])
    assert torch.equal(data.val[0], loaded.val_x[which]) and torch.equal(data.val[1], loaded.val_y[which])
    assert data.digest == loaded.provenance["digest"] and data.classes == loaded.classes
    assert data.provenance == loaded.provenance


def test_a_small_image_is_moved_too():
    x = torch.arange(1.0, 17).view(1, 1, 4, 4).expand(200, 1, 4, 4)
    seen = images.shifted(x, np.random.default_rng(0)).flatten(1)
    assert len(seen.unique(dim=0)) == 3 * 3 * 2  # by a pixel at most in each direction, and mirrored


def test_an_image_is_moved_by_at_most_an_eighth_of_its_side_and_may_be_mirrored():
    x = torch.zeros(400, 1, 26, 28)
    x[:, :, 12, 6] = 1
    _, _, rows, columns = images.shifted(x, np.random.default_rng(0)).nonzero(as_tuple=True)
    assert len(rows) == 400 and set(rows.tolist()) == set(range(9, 16))  # 26 / 8, rounded down
    assert set(columns.tolist()) == {*range(3, 10), *range(18, 25)}
    assert 150 < (columns < 14).sum() < 250
