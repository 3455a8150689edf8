"""Places on GPUs: the emptiest first, never more than there are, found by processes that don't know of each other."""

from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import torch

from ecmoe import paths
from ecmoe.files import ConfigError
from ecmoe.training import gpus


@pytest.fixture
def three(monkeypatch, tmp_path):
    """Three GPUs, renumbered."""
    monkeypatch.setattr(paths, "cache", lambda: tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda gpu: SimpleNamespace(uuid=f"GPU-{'cab'[gpu]}"))
    monkeypatch.setenv("ECMOE_SLOTS", "2")


def test_runs_spread_over_the_gpus_and_wait_when_all_are_full(three, monkeypatch, capsys):
    with ExitStack() as held:
        assert [held.enter_context(gpus.slot()) for _ in range(5)] == [0, 1, 2, 0, 1]
        with gpus.slot() as last:
            assert last == 2 and "GPU 2 of 3: GPU-b" in capsys.readouterr().err
            monkeypatch.setattr(gpus.time, "sleep", lambda _: held.close())  # while it waits, the others end
            with gpus.slot() as again:
                assert again == 0 and "waiting for a place on one of 3 GPUs" in capsys.readouterr().err


def test_a_place_is_free_again_after_a_failure(three):
    for _ in range(3):
        with pytest.raises(ZeroDivisionError), gpus.slot() as gpu:
            raise ZeroDivisionError
        assert gpu == 0


def test_one_gpu_or_none_has_no_places(monkeypatch, three):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with gpus.slot() as one, gpus.slot() as other, gpus.slot() as third:
        assert one == other == third == 0


def test_a_wrong_number_of_places_is_named(three, monkeypatch):
    monkeypatch.setenv("ECMOE_SLOTS", "many")
    with pytest.raises(ConfigError, match="ECMOE_SLOTS=many: must be a whole number, 1 or more"), gpus.slot():
        pass
