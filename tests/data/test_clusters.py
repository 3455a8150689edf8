"""Classes of sequences: clusters of what comes before, known before the first token."""

import itertools
import time
import tracemalloc

import numpy as np
import pytest
from sklearn.cluster import MiniBatchKMeans

from ecmoe.data import clusters, tokens
from ecmoe.data.batches import TextData
from ecmoe.data.clusters import BUCKETS, TextClusters, frequencies
from ecmoe.files import ConfigError

RANDOM = np.random.default_rng(0)


def text(kinds: np.ndarray) -> np.ndarray:
    """A window of 40 tokens for each kind: kind 0 has ids below 50, kind 1 ids from 100 to 150, ..."""
    return (RANDOM.integers(0, 50, (len(kinds), 40)) + 100 * kinds[:, None]).astype(np.uint16)


def test_frequencies_are_those_of_a_loop():
    windows = RANDOM.integers(0, 1000, (7, 33))
    for row, window in zip(frequencies(windows), windows, strict=True):
        expected = [sum(t % BUCKETS == b for t in window) / 33 for b in range(BUCKETS)]
        np.testing.assert_allclose(row**2, expected, atol=1e-6)


@pytest.mark.parametrize(("most", "fitted"), [(20_000, range(9)), (9, range(9)), (3, [0, 4, 8])])
def test_classes_are_found_in_windows_from_all_over(monkeypatch, most, fitted):
    windows, seen = np.arange(90).reshape(9, 10), []
    monkeypatch.setattr(clusters, "FITTED", most)
    monkeypatch.setattr(clusters, "frequencies", lambda some: seen.append(some) or frequencies(some))
    TextClusters(windows, 2)
    np.testing.assert_array_equal(seen[0], windows[fitted])


def test_a_class_tells_the_kind_of_the_window_before():
    kinds = RANDOM.integers(0, 2, 300)
    found = TextClusters(text(kinds), 2).before(text(kinds))
    assert found.dtype == np.int64 and found[0] == 0
    same = found[1:] == kinds[:-1]
    assert same.all() or (~same).all()  # which cluster is called 0 means nothing


def test_a_class_does_not_see_its_own_window():
    kinds = RANDOM.integers(0, 2, 50)
    classes, windows = TextClusters(text(kinds), 2), text(kinds)
    changed = windows.copy()
    changed[20] = text(1 - kinds)[20]
    before, after = classes.before(windows), classes.before(changed)
    assert before[20] == after[20] and before[21] != after[21]
    assert (np.delete(before, 21) == np.delete(after, 21)).all()


@pytest.mark.parametrize("classes", [64, 65])
def test_classes_are_those_of_k_means_in_the_shares_of_tokens_modulo_256(classes):
    """The same for ever: they are part of the data of a run."""
    windows = RANDOM.integers(0, 700, (200, 40)).astype(np.uint16)
    shares = np.stack([np.bincount(row % 256, minlength=256) for row in windows]) / 40
    few = {"n_init": 3} if classes == 64 else {"n_init": 1, "init": "random"}
    fitted = MiniBatchKMeans(classes, random_state=0, **few).fit(np.sqrt(shares).astype(np.float32))
    found = TextClusters(windows, classes)
    np.testing.assert_array_equal(found.before(windows)[1:], fitted.labels_[:-1])
    assert clusters.FITTED == 20_000 and len(set(TextClusters(windows[:64], 64).before(windows))) > 1


def test_many_short_windows_take_little_memory():
    windows = RANDOM.integers(0, 256, (300_000, 2)).astype(np.uint8)
    classes = TextClusters(windows, 4)
    tracemalloc.start()
    found = classes.before(windows)
    assert tracemalloc.get_traced_memory()[1] < 30e6  # all of their frequencies at once are 300 MB
    tracemalloc.stop()
    assert len(found) == 300_000
    np.testing.assert_array_equal(found[4001:4201], classes.clusters.predict(frequencies(windows[4000:4200])))


def test_many_classes_are_found_in_seconds_and_too_many_are_named():
    windows = text(RANDOM.integers(0, 20, 2000))
    started = time.perf_counter()
    assert len(set(TextClusters(windows, 1000).before(windows))) > 500
    assert time.perf_counter() - started < 5
    with pytest.raises(ConfigError, match="num_tasks=2001: must be at most 2000, the number of text windows"):
        TextClusters(windows, 2001)


@pytest.mark.parametrize("router", ["task_level", "expert_choice"])
def test_batches_of_task_level_routing_carry_them(tiny_config, router):
    data = TextData(tiny_config(router=router, num_tasks=4))
    data.prepare_data()
    data.setup()
    train, val = next(iter(data.train_dataloader())), next(iter(data.val_dataloader()))
    if router == "expert_choice":
        assert train.shape == val.shape == (8, 17) and len(data.train) == 1
        return
    for windows, tasks in (train, val):
        assert windows.shape == (8, 17) and tasks.shape == (8,)
    assert set(data.train[1]) == {0, 1, 2, 3}  # real text has more than one kind
    classes = TextClusters(data.train[0], 4)
    whole = tokens.load(data.config)
    for ids, loader in ((whole.train, data.train_dataloader()), (whole.val, data.val_dataloader())):
        (windows,) = whole.windows(ids, 16)
        of = set(zip(map(bytes, windows), classes.before(windows).tolist(), strict=True))  # text may repeat itself
        for batch, tasks in itertools.islice(loader, 2):
            assert all((bytes(row.tolist()), task) in of for row, task in zip(batch, tasks.tolist(), strict=True))
    again = TextData(tiny_config(router=router, num_tasks=4, seed=1))
    again.setup()
    assert (again.train[1] == data.train[1]).all()  # of the data, whatever the seed of the run
