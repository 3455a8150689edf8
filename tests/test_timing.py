"""One clock for all rows."""

import pytest
import torch

from ecmoe import timing

CPU = torch.device("cpu")


def test_calls_are_taken_in_turns_each_in_another_order():
    order = []
    times = timing.in_turns({name: lambda name=name: order.append(name) for name in "abc"}, 20, CPU)
    turns = {"".join(order[i : i + 3]) for i in range(0, 60, 3)}
    assert all(sorted(turn) == list("abc") for turn in turns) and {turn[0] for turn in turns} == set("abc")
    assert {name: len(samples) for name, samples in times.items()} == {"a": 20, "b": 20, "c": 20}
    assert all(sample >= 0 for samples in times.values() for sample in samples)


def test_median_and_quartiles_in_milliseconds():
    assert timing.spread([0.003, 0.001, 0.002]) == pytest.approx({"ms": 2.0, "low_ms": 1.5, "high_ms": 2.5})


def test_on_a_gpu_the_host_runs_ahead_and_events_tell_the_time(monkeypatch):
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("event")

        def synchronize(self):
            log.append("wait")

        def elapsed_time(self, end):
            return 5.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append("device waits"), raising=False)
    assert timing.seconds(lambda: log.append("call"), torch.device("cuda")) == pytest.approx(0.005)
    assert log == ["device waits", "event", "call", "event", "wait"]


def test_a_cpu_tells_no_memory():
    assert timing.peak_mb(lambda: pytest.fail("called"), CPU) is None


def test_what_fails_is_named_and_the_rest_is_warm():
    absent = []
    calls = {("a", "x"): lambda: None, ("b", "y"): lambda: 1 / 0}
    works, memory = timing.warmed(calls, absent, CPU)
    assert list(works) == list(memory) == [("a", "x")] and absent == ["b, y (ZeroDivisionError: division by zero)"]
