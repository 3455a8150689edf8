"""One clock for all rows."""

import itertools
import time

import pytest
import torch

from ecmoe.bench import clock as timing
from ecmoe.bench.rows import OF_LAYER, Row, named, sized
from ecmoe.files import ConfigError

CPU = torch.device("cpu")


def test_calls_are_taken_in_turns_each_in_another_order():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    timing.in_turns(calls, 20, CPU)
    first = order.copy()
    order.clear()
    times = timing.in_turns(calls, 20, CPU)
    assert order == first  # always the same
    turns = {"".join(order[i : i + 3]) for i in range(0, 60, 3)}
    assert all(sorted(turn) == list("abc") for turn in turns) and {turn[0] for turn in turns} == set("abc")
    assert {name: len(samples) for name, samples in times.items()} == {"a": 20, "b": 20, "c": 20}
    assert all(sample >= 0 for samples in times.values() for sample in samples)


def test_a_call_takes_what_it_takes():
    assert 0.02 <= timing.seconds(lambda: time.sleep(0.02), CPU, 1, 0) < 2


@pytest.mark.parametrize(("kind", "times"), [("cuda", 3), ("cpu", 1)])
def test_calls_before_the_first_that_counts(kind, times):
    called = []
    timing.warm_up(lambda: called.append(kind), torch.device(kind))
    assert called == times * [kind]


def test_who_waits_for_each_other_agrees_on_how_many_calls_are_timed(monkeypatch):
    timed, agreed = [], []
    monkeypatch.setattr(timing, "burst", lambda call, device: (call, device))
    monkeypatch.setattr(timing, "seconds", lambda *given: timed.append(given) or 0.5)
    found = timing.in_turns({"x": "call"}, 2, CPU, agreed=lambda bursts: agreed.append(bursts) or {"x": (5, 7)})
    assert agreed == [{"x": ("call", CPU)}] and timed == [("call", CPU, 5, 7)] * 2 and found == {"x": [0.5, 0.5]}
    timing.in_turns({"x": "call"}, 1, CPU)  # which waits for nobody
    assert timed[2:] == [("call", CPU, "call", CPU)]


def test_median_and_quartiles_in_milliseconds():
    assert timing.spread([0.003, 0.001, 0.002]) == pytest.approx({"ms": 2.0, "low_ms": 1.5, "high_ms": 2.5})


def test_a_row_is_named_without_what_is_usual():
    assert str(Row("EC")) == "EC"
    assert (
        str(Row("EC", "cap 2", "triton", "compiled, CUDA graph", "forward"))
        == "EC, cap 2, triton, compiled, CUDA graph, forward"
    )
    assert named(("EC", "", "plain")) == "EC, plain"


def test_sizes_are_the_devices_but_for_those_that_are_given():
    assert sized("cpu", {"n": 8}, ("n", "d_ff")) == {"n": 8, "d_ff": 256}
    table_1 = {"n": 64 * 1024, "d_model": 768, "d_ff": 3072, "num_experts": 64, "layers": 12, "heads": 12}
    assert sized("cuda", {}) == table_1 | {"sequence_length": 1024, "vocab_size": 32_000}  # 0.1B/64E
    assert set(OF_LAYER) == {"n", "d_model", "d_ff", "num_experts"}
    small = {"n": 1024, "d_model": 64, "d_ff": 256, "num_experts": 8, "layers": 2, "heads": 4}
    assert sized("cpu", {}) == small | {"sequence_length": 128, "vocab_size": 512}  # which take seconds
    for given, said in (
        ({"d_model": 8}, "no size 'd_model' .given: 8.: must be one of n, d_ff"),
        ({"d_f": 8}, "no size 'd_f' .given: 8.: did you mean d_ff"),
        ({"n": 0}, "n=0 must be"),
        ({"n": 1.5}, "n=1.5 must be"),
    ):
        with pytest.raises(ConfigError, match=said):
            sized("cpu", given, ("n", "d_ff"))


def test_a_table_says_what_its_times_belong_to(monkeypatch):
    for name, value in {"device_name": "a card", "commit": "abc"}.items():
        monkeypatch.setattr(timing, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    table = timing.tabled([{"ms": 2.0, "what": "x"}], ["y (no memory)"], {"n": 4, "device": "?"}, step_ms=3.0)
    machine = {"device": "a card", "torch": torch.__version__, "threads": torch.get_num_threads(), "commit": "abc"}
    assert table.to_dict("records") == [{"ms": 2.0, "what": "x"}]
    setting = {"n": 4, **machine, "settled_s": timing.SETTLE}
    assert table.attrs == {"setting": setting, "absent": ["y (no memory)"], "step_ms": 3.0}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    nothing = timing.tabled([], [], {})
    assert nothing.empty and list(nothing) == ["ms"] and nothing.attrs == {"setting": machine, "absent": []}


@pytest.fixture
def log(monkeypatch):
    """What a GPU would be asked for."""
    said, made = [], []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing
            made.append(self)

        def record(self):
            said.append(("start", "end")[made.index(self) % 2])

        def synchronize(self):
            said.append("wait")

        def elapsed_time(self, end):
            assert made.index(end) == made.index(self) + 1
            return 30.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    for name, value in {
        "synchronize": None,
        "reset_peak_memory_stats": None,
        "memory_allocated": 3e6,
        "max_memory_allocated": 8e6,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda name=name, value=value: said.append(name) or value)
    return said


def test_on_a_gpu_calls_follow_each_other_and_events_tell_the_time(log):
    call = lambda: log.append("call")  # noqa: E731  what doesn't count comes before, and no rest between
    assert timing.seconds(call, torch.device("cuda"), count=2, settle=3) == pytest.approx(0.015)
    assert log == ["call"] * 3 + ["start", "call", "call", "end", "wait"]


def test_a_burst_is_as_long_as_it_takes_the_chip_to_settle(log):
    assert timing.burst(lambda: None, torch.device("cuda")) == (5, 20)  # of 0.01 s each
    assert timing.burst(lambda: None, CPU) == (1, 0)


@pytest.mark.parametrize(("one", "expected"), [(1e-4, (256, 2000)), (0.03, (2, 7)), (0.3, (1, 1))])
def test_a_burst_is_some_50_ms_after_at_least_200(one, expected, monkeypatch):
    asked = []
    monkeypatch.setattr(timing, "seconds", lambda *given: asked.append(given) or one)
    assert timing.burst("call", torch.device("cuda")) == expected and asked == [("call", torch.device("cuda"), 3, 0)]


def test_a_gpu_tells_what_a_call_takes_of_its_memory_a_cpu_nothing(log):
    assert timing.peak_mb(lambda: log.append("call"), torch.device("cuda")) == (3.0, 8.0)
    assert log == ["synchronize", "reset_peak_memory_stats", "memory_allocated", "call", "synchronize", "max_memory_allocated"]  # fmt: skip
    assert timing.peak_mb(lambda: pytest.fail("called"), CPU) is None


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_on_a_gpu_alone_more_calls_come_after_all_others(log, monkeypatch, kind):
    monkeypatch.setattr(timing, "this_device", lambda: torch.device(kind))
    calls = {("a",): lambda: log.append("a"), ("b",): lambda: 1 / 0}
    further = lambda works, absent: {("c",): lambda: log.append(f"c after {list(works)}, {len(absent)} absent")}  # noqa: E731
    found = timing.timed(calls, 3, further)
    kept = {"cuda": [("a",), ("c",)], "cpu": [("a",)]}[kind]
    assert {key: len(samples) for key, samples in found.times.items()} == dict.fromkeys(kept, 3) and len(
        found.absent
    ) == 1
    called = [said for said in log if said.startswith(("a", "c "))]
    assert found.memory == {("a",): (3.0, 8.0) if kind == "cuda" else None}
    first = called.index("c after [('a',)], 1 absent") if kind == "cuda" else len(called)
    assert set(called[:first]) == {"a"} and "a" not in called[first:]
    assert len(called[:first]) >= {"cuda": 3, "cpu": 1}[kind] + 3
    turns = []
    monkeypatch.setattr(timing, "in_turns", lambda calls, *_: turns.append(list(calls)) or {})
    timing.timed({("a",): lambda: None}, 2)
    assert turns == [[("a",)], []][: 1 + (kind == "cuda")]  # no more, where none are given


def test_backward_passes_run_in_the_thread_that_times():
    """As in training; what was set is set again."""
    own_thread: list[bool] = []
    timing.timed({("a",): lambda: own_thread.append(torch._C._is_multithreading_enabled())}, 2)
    assert own_thread and not any(own_thread) and torch._C._is_multithreading_enabled()


def test_what_fails_is_named_and_the_rest_is_warm(monkeypatch):
    limits, resets = [], []

    def call():
        how = torch._dynamo.config
        limits.append((how.recompile_limit, how.accumulated_recompile_limit, how.specialize_float))

    def peak(call, device):
        if call is calls["c",]:
            raise MemoryError("\n  none left\nmore")

    calls = {("a", "x"): call, ("b", "y"): lambda: 1 / 0, ("c",): lambda: None}
    monkeypatch.setattr(torch._dynamo, "reset", lambda: resets.append(len(limits)))
    monkeypatch.setattr(timing, "peak_mb", peak)
    times, memory, absent = timing.timed(calls, 2)
    assert list(times) == list(memory) == [("a", "x")]
    assert absent == ["b, y (ZeroDivisionError: division by zero)", "c (MemoryError: none left)"]
    assert len(timing.reason(ValueError(500 * "x"))) == 160
    assert resets == [0] and set(limits) == {(256, 1024, True)}  # many layers may be compiled side by side
    for repeats in (1, 2.5):
        with pytest.raises(ValueError, match=f"repeats={repeats}: must be a whole number of at least 2"):
            timing.timed({}, repeats)


@pytest.mark.parametrize(("tick", "said"), [
    (0.5, []), (1, ["turn 2 of 2, 10 s"]),
    (10, ["a, x: 10 s to get warm", "b: 10 s to get warm", "turn 1 of 2, 50 s", "turn 2 of 2, 100 s"]),
])  # fmt: skip
def test_what_takes_long_says_how_it_goes(tick, said, monkeypatch, capsys):
    """A clock that goes on by a tick each time it is read, twice a call."""
    monkeypatch.setattr(time, "perf_counter", itertools.count(0, tick).__next__)
    found = timing.timed({("a", "x"): lambda: None, ("b",): lambda: None}, 2)
    assert capsys.readouterr().err.splitlines() == [f"[bench] {line}" for line in said]
    assert set(found.times["b",]) == {tick}
