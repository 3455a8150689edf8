"""Side by side: every item is done once, in order, at its place; what dies or fails takes nothing else along."""

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from ecmoe.study.side_by_side import _places, side_by_side


def work(item: str) -> str:
    """Imported by the processes, which see no fixture and no patch."""
    if item == "raise":
        raise ValueError("two\nlines")
    if item == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if item.startswith("sleep"):
        time.sleep(float(item.split()[1]))
    if item.startswith("large"):  # finds no memory as often as it says
        with open(item.split()[1], "a+") as tries:
            tries.write("x")
            tries.seek(0)
            if len(tries.read()) <= int(item.split()[2]):
                raise MemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    return f"{os.getpid()} of {os.environ['ECMOE_SHARING']}"


def test_what_fails_or_dies_is_named_and_stops_no_other():
    items = ["a", "die", "b", "raise", "die", "c", "d"]
    ended = list(side_by_side(work, items, 2))
    assert sorted(item for item, _ in ended) == sorted(items)  # each once
    said = {item: text for item, text in ended}
    assert said["die"] == "failed: its process ended with code -9" and said["raise"] == "failed: ValueError: two\nlines"
    good = [said[item].split(" of ") for item in "abcd"]
    assert {sharing for _, sharing in good} == {"2"} and str(os.getpid()) not in dict(good)
    assert not multiprocessing.active_children() and "ECMOE_SHARING" not in os.environ


def test_a_process_serves_item_after_item_in_the_order_given():
    ended = list(side_by_side(work, "abc", 1))
    assert [item for item, _ in ended] == ["a", "b", "c"] and len({text for _, text in ended}) == 1


def test_after_an_error_a_fresh_process_goes_on():
    (_, before), _, (_, after) = side_by_side(work, ["a", "raise", "b"], 1)
    assert before != after and not after.startswith("failed")


def test_what_finds_no_memory_comes_again_with_less_beside_it(tmp_path, capfd):
    once, never = f"large {tmp_path / 'a'} 1", f"large {tmp_path / 'b'} 9"
    said = dict(side_by_side(work, [once, "b", "c"], 2))
    assert not any(text.startswith("failed") for text in said.values()) and len(said) == 3
    assert "no memory beside 1 more: comes again" in capfd.readouterr().err
    said = dict(side_by_side(work, [never, "b", "c"], 3))
    assert said[never] == "failed: MemoryError: CUDA out of memory. Tried to allocate 2 GiB" and len(said) == 3
    assert (tmp_path / "b").read_text() == "xxx"  # beside two, beside one, alone
    assert not said["b"].startswith("failed") and not multiprocessing.active_children()


def test_none_begins_after_the_deadline():
    assert list(side_by_side(work, "ab", 2, deadline=time.monotonic())) == []
    ended = list(side_by_side(work, ["sleep 1.5", "late"], 1, deadline=time.monotonic() + 1))
    assert [item for item, _ in ended] == ["sleep 1.5"]


def test_who_stops_listening_ends_what_is_at_work():
    began = time.monotonic()
    for item, _ in side_by_side(work, ["sleep 200", "quick"], 2):
        assert item == "quick"
        break
    assert time.monotonic() - began < 60 and not multiprocessing.active_children()


def test_a_killed_parent_leaves_nobody_behind(tmp_path):
    script = textwrap.dedent("""
        import os, signal
        from test_side_by_side import side_by_side, work
        if __name__ == "__main__":
            for item, _ in side_by_side(work, ["sleep 200", "quick"], 2):
                print(item, flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
    """)
    (tmp_path / "parent.py").write_text(script)
    paths = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    parent = [sys.executable, str(tmp_path / "parent.py")]
    done = subprocess.run(parent, env=os.environ | {"PYTHONPATH": paths}, stdout=subprocess.PIPE, text=True, timeout=60)
    assert (
        done.returncode == -signal.SIGKILL and done.stdout == "quick\n"
    )  # at its end nobody holds its output any more


@pytest.mark.parametrize(
    ("gpus", "visible", "jobs", "places"),
    [
        (0, None, 3, [(None, "3")] * 3),
        (0, "", 2, [(None, "2")] * 2),
        (1, None, 3, [("0", "3")] * 3),
        (2, None, 3, [("0", "2"), ("1", "1"), ("0", "2")]),
        (2, "5, GPU-ab", 4, [("5", "2"), ("GPU-ab", "2")] * 2),
        (4, None, 2, [("0", "1"), ("1", "1")]),
    ],
)
def test_places_are_spread_over_the_gpus_that_are_visible(monkeypatch, gpus, visible, jobs, places):
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [(place.get("CUDA_VISIBLE_DEVICES"), place["ECMOE_SHARING"]) for place in _places(jobs)] == places


def test_cores_are_shared_unless_somebody_has_said_how_many(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.delenv("TORCHINDUCTOR_COMPILE_THREADS", raising=False)
    assert {(place["OMP_NUM_THREADS"], place["TORCHINDUCTOR_COMPILE_THREADS"]) for place in _places(6)} == {("3", "2")}
