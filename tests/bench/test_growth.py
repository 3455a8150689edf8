"""How the time of a layer grows: what is timed at each size, and the power that fits."""

from types import SimpleNamespace

import pandas as pd
import pytest

from ecmoe.bench import growth
from ecmoe.bench import layer as bench
from ecmoe.bench.growth import bench_growth, exponents
from ecmoe.config import ConfigError

TINY = {"n": 64, "d_model": 8, "d_ff": 16, "num_experts": 4}


def test_exponents_are_those_between_the_two_largest_sizes():
    rows = [  # in another order, and from where launching takes all the time
        {"axis": "n", "value": v, "ms": max(20.0, 3 * v**1.5), "floor_ms": 0.1 * v} for v in (16, 1, 4, 2)
    ]
    rows += [{"axis": "d_model", "value": v, "ms": v, "floor_ms": 1.0} for v in (1, 2)]
    found = exponents(pd.DataFrame(rows))
    assert found["axis"].tolist() == ["n", "d_model"]  # in their order
    assert found.drop(columns="axis").to_dict("records") == [
        pytest.approx({"exponent": 1.5, "of_floor": 1.0, "at_1": 3.0}),
        pytest.approx({"exponent": 1.0, "of_floor": 0.0, "at_1": 1.0}),
    ]
    assert exponents(pd.DataFrame(columns=["axis", "value", "ms", "floor_ms"])).empty


def test_growth_times_the_layer_that_a_run_gets_at_each_size(monkeypatch):
    asked = []

    def layer_and_input(**size):
        asked.append(size)
        return "layer", [f"x of {size['n']}"], "gradient"

    def timed(calls, repeats):
        asked.append((calls, repeats))
        missing = len(asked) == 2  # of the first, the floor
        times = {("layer",): [0.001, 0.004, 0.002], ("floor",): [0.003, 0.001, 0.0005]}
        return SimpleNamespace(times={("layer",): [1.0]} if missing else times, absent=["no memory"] * missing)

    monkeypatch.setattr(growth, "layer_and_input", layer_and_input)
    monkeypatch.setattr(growth, "forward_and_both", lambda *given: {bench.FORWARD: "forward", bench.BOTH: given})
    monkeypatch.setattr(growth, "floor", lambda *given: {bench.FORWARD: "forward", bench.BOTH: given})
    monkeypatch.setattr(growth.timing, "timed", timed)
    base = {"n": 64, "d_model": 8, "d_ff": 24, "num_experts": 4, "capacity_factor": 2.0}
    axes = {"d_model": [16], "capacity_factor": [0.5], "n": [32], "num_experts": [8]}
    table = bench_growth(base, axes, repeats=3)
    bench_growth(base, {"num_experts": [2]})
    assert asked.pop()[1] == 9 and asked.pop() == base | {"num_experts": 2, "kernels": "auto"}
    sizes = [base | {"d_model": 16, "d_ff": 48}, base | {"capacity_factor": 0.5}, base | {"n": 32}]
    sizes.append(base | {"num_experts": 8})
    assert asked[::2] == [size | {"kernels": "auto"} for size in sizes]
    assert asked[1::2] == [
        ({("layer",): ("layer", [x], "layer", "gradient"), ("floor",): ("layer", x, k)}, 3)
        for x, k in (("x of 64", 32), ("x of 64", 8), ("x of 32", 16), ("x of 64", 16))  # k = n c / e
    ]
    row = {"ms": 2.0, "low_ms": 1.5, "high_ms": 3.0, "floor_ms": 1.0}
    assert table.to_dict("records") == [
        {"axis": "capacity_factor", "value": 0.5} | row, {"axis": "n", "value": 32.0} | row,
        {"axis": "num_experts", "value": 8.0} | row,
    ]  # fmt: skip
    assert table.attrs["absent"] == ["no memory"] and (base | {"repeats": 3}).items() <= table.attrs["setting"].items()


def test_growth_names_what_it_cannot_take():
    with pytest.raises(ConfigError, match="n=33"):
        bench_growth(TINY | {"capacity_factor": 2.0}, {"n": [64, 33]})
    with pytest.raises(ValueError, match="layers"):
        bench_growth(TINY | {"capacity_factor": 2.0}, {"layers": [1]})
