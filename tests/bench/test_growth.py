"""How the time of a layer grows: what is timed at each size, and the power that fits."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from ecmoe.bench import growth
from ecmoe.bench import layer as bench
from ecmoe.bench.growth import bench_growth, exponents
from ecmoe.config import ConfigError

TINY = {"n": 64, "d_model": 8, "d_ff": 16, "num_experts": 4}


def test_exponents_are_those_of_a_power_law():
    rows = [{"axis": "n", "value": v, "ms": 3 * v**1.5, "floor_ms": 0.1 * v} for v in (1, 2, 8)]
    (found,) = exponents(pd.DataFrame(rows)).to_dict("records")
    assert [found[key] for key in ("exponent", "low", "high")] == pytest.approx([1.5] * 3)
    assert (found["of_floor"], found["at_1"]) == pytest.approx((1.0, 3.0))
    two = [
        {"axis": axis, "value": v, "ms": v**p, "floor_ms": 1.0}
        for axis, p in (("n", 2), ("d_model", 1))
        for v in (1, 2)
    ]
    found = exponents(pd.DataFrame(two))  # in the order of the axes; two points tell no interval
    assert found["axis"].tolist() == ["n", "d_model"] and found["exponent"].tolist() == pytest.approx([2, 1])
    assert found[["low", "high"]].isna().all(axis=None)
    noisy = pd.DataFrame(rows).assign(ms=[3.0, 9.0, 60.0])
    (found,) = exponents(noisy).to_dict("records")
    x, y = np.log([1, 2, 8]), np.log([3.0, 9.0, 60.0])
    slope, at_0 = np.polyfit(x, y, 1)
    error = (((y - at_0 - slope * x) ** 2).sum() / 1 / ((x - x.mean()) ** 2).sum()) ** 0.5  # of 3 points and 2 numbers
    low, high = slope - 12.7062 * error, slope + 12.7062 * error  # Student's t for 95% and 1 degree of freedom
    expected = {"exponent": slope, "low": low, "high": high, "of_floor": 1.0, "at_1": np.exp(at_0)}
    assert found.pop("axis") == "n" and found == pytest.approx(expected, rel=1e-5)


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
