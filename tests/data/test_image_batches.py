"""Batches of images: augmented by draws that no two ranks, steps or seeds share."""

import numpy as np
import torch

from ecmoe.config import RunConfig
from ecmoe.data.image_batches import AugmentedBatches, ImageData, shifted

X, Y = torch.rand(40, 3, 16, 16), torch.arange(40)


def batch(seed=0, rank=0, step=0):
    return AugmentedBatches((X, Y), 32, seed, 0, rank, 2).take(np.arange(32), step)[0]


def test_draws_are_of_seed_rank_and_step_alone():
    first = batch()
    assert torch.equal(first, batch())
    for other in (batch(seed=1), batch(rank=1), batch(step=1)):
        assert not torch.equal(first, other)


def test_only_who_asks_for_it_sees_them_moved():
    keys = {"data": "digits", "patch_size": 2, "sequence_length": 16, "layers": 2, "batch_size": 20}
    first = []
    for augment in (False, True):
        data = ImageData(RunConfig(augment=augment, **keys))
        data.setup()
        first.append(next(iter(data.train_batches(0, 0, 1))))
    (x, y), (moved, same) = first
    assert torch.equal(y, same) and torch.equal(moved, shifted(x, np.random.default_rng([0, 0, 0, 1])))


def test_an_image_is_moved_by_at_most_an_eighth_of_its_side_and_may_be_mirrored():
    x = torch.zeros(400, 1, 16, 16)
    x[:, :, 8, 4] = 1
    _, _, rows, columns = shifted(x, np.random.default_rng(0)).nonzero(as_tuple=True)
    assert len(rows) == 400 and set(rows.tolist()) == set(range(6, 11))
    assert set(columns.tolist()) == {*range(2, 7), *range(9, 14)}
    assert 150 < (columns < 8).sum() < 250
