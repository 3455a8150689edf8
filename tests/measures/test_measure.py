"""A measurement is taken once, kept with the run, and read without weights."""

import shutil

import pytest

from ecmoe import paths
from ecmoe.measures.measure import measure
from ecmoe.training.result import not_run
from ecmoe.training.run import run_or_load


def weights(model, config):
    assert not model.training
    weights.calls += 1
    return {"numbers": [sum(p.numel() for p in model.parameters())], "seed": config.seed}


weights.calls = 0


@pytest.mark.parametrize("scale", ["smoke", "gpu"])
def test_taken_once_and_read_without_weights(tiny_config, scale):
    config = tiny_config(steps=2, seed=11)
    records = None if scale == "smoke" else paths.records(scale)
    result = run_or_load(config, records=records, progress=False)
    assert measure(result, "weights", weights, scale=scale, train=False) is None
    before = weights.calls
    found = measure(result, "weights", weights, scale=scale)
    assert found["seed"] == 11 and found["numbers"][0] > 1000
    assert measure(result, "weights", weights, scale=scale, train=False) == found
    assert weights.calls == before + 1


def test_a_record_without_weights_is_trained_again(tiny_config):
    config = tiny_config(steps=2, seed=12)
    run_or_load(config, records=paths.records("gpu"), progress=False)
    shutil.rmtree(paths.runs() / config.name)
    record = run_or_load(config, records=paths.records("gpu"), progress=False)
    assert record.path is None
    assert measure(record, "again", weights, scale="gpu")["seed"] == 12
    (paths.runs() / config.name / "model.safetensors").unlink()
    assert measure(record, "and-again", weights, scale="gpu")["seed"] == 12


def test_what_is_missing_or_misnamed(tiny_config):
    missing = not_run(tiny_config(seed=13))
    assert measure(missing, "weights", weights) is None
    with pytest.raises(ValueError, match="small letters"):
        measure(missing, "../weights", weights)
