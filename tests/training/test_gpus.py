"""Places on GPUs: the emptiest first, never more than there are, found by processes that don't know of each other."""

from contextlib import ExitStack, contextmanager
from types import SimpleNamespace

import pytest
import torch

from ecmoe import paths
from ecmoe.files import ConfigError
from ecmoe.training import gpus


@pytest.fixture
def three(monkeypatch, tmp_path):
    """Three GPUs, renumbered; the current one is the last of the list."""
    current = [0]

    @contextmanager
    def device(gpu):
        current.append(gpu)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(paths, "cache", lambda: tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda gpu: SimpleNamespace(uuid=f"GPU-{'cab'[gpu]}"))
    monkeypatch.setenv("ECMOE_SLOTS", "2")
    return current


def test_runs_spread_over_the_gpus_count_each_other_and_wait_when_all_are_full(three, monkeypatch, capsys):
    with ExitStack() as held:
        places = [held.enter_context(gpus.place()) for _ in range(5)]
        assert [place.gpu for place in places] == [0, 1, 2, 0, 1]
        assert [place.sharing() for place in places] == [2, 2, 1, 2, 2]
        with gpus.place() as last:
            assert three[-1] == last.gpu == 2 and last.sharing() == 2 and "GPU 2 of 3: GPU-b" in capsys.readouterr().err
            monkeypatch.setattr(gpus.time, "sleep", lambda _: held.close())  # while it waits, the others end
            with gpus.place() as again:
                assert again.gpu == 0 and again.sharing() == 1
                assert "waiting for a slot on 3 GPUs, 2 slots each ($ECMOE_SLOTS)" in capsys.readouterr().err


@pytest.mark.parametrize(("there", "used"), [(64, 4), (4, 4), (2, 2)])
def test_a_run_with_a_place_uses_few_threads(three, there, used):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(there)
        with pytest.raises(ZeroDivisionError), gpus.place():
            assert torch.get_num_threads() == used
            raise ZeroDivisionError
        assert torch.get_num_threads() == there
    finally:
        torch.set_num_threads(before)


def test_a_place_is_free_again_after_a_failure(three, tmp_path):
    for _ in range(3):
        with pytest.raises(ZeroDivisionError), gpus.place() as place:
            raise ZeroDivisionError
        assert place.gpu == 0 and place.others == [tmp_path / "gpus" / "GPU-c-1.lock"]  # where all processes look


def test_who_wants_no_progress_is_told_no_gpu(three, capsys):
    with gpus.place(say=False) as first, gpus.place(False) as second:
        assert (first.gpu, second.gpu) == (0, 1) and not capsys.readouterr().err


def test_runs_on_one_gpu_count_each_other_and_none_on_a_cpu(three, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with gpus.place() as one, gpus.place() as other:
        assert one.gpu == other.gpu == 0 and one.sharing() == other.sharing() == 2
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with gpus.place() as one, gpus.place() as other, gpus.place() as third:
        assert one.gpu is other.gpu is third.gpu is None and one.sharing() == 1
        monkeypatch.setenv("ECMOE_SHARING", "3")  # who started them knows
        assert third.sharing() == 3


def test_two_gpus_are_more_than_one(three, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with ExitStack() as held:
        for _ in range(4):
            held.enter_context(gpus.place())
        assert "GPU 1 of 2: GPU-a" in capsys.readouterr().err
        monkeypatch.setattr(gpus.time, "sleep", lambda _: held.close())
        with gpus.place():
            assert "waiting for a slot on 2 GPUs, 2 slots each" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("say", "said"), [(False, ""), (True, "waiting for a slot on 1 GPU, 4 slots each ($ECMOE_SLOTS)\n")]
)
def test_one_gpu_has_four_places_and_says_nothing_of_itself(three, monkeypatch, capsys, say, said):
    monkeypatch.delenv("ECMOE_SLOTS")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(gpus.time, "sleep", lambda _: pytest.fail("waits"))
    with ExitStack() as held:
        assert [held.enter_context(gpus.place()).sharing() for _ in range(4)] == [1, 2, 3, 4]
        assert not capsys.readouterr().err
        monkeypatch.setattr(gpus.time, "sleep", lambda _: held.close())
        with gpus.place(say) as fifth:
            assert fifth.sharing() == 1 and capsys.readouterr().err == said


def test_a_wrong_number_of_places_is_named(three, monkeypatch):
    monkeypatch.setenv("ECMOE_SLOTS", "")  # as if it were not there
    assert gpus.number("ECMOE_SLOTS", 4) == 4
    for wrong in ("many", "0", "²"):
        monkeypatch.setenv("ECMOE_SLOTS", wrong)
        with pytest.raises(ConfigError, match=f"ECMOE_SLOTS={wrong}: must be a whole number, 1 or more"), gpus.place():
            pass
