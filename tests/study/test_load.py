"""The bar of a page that trains: it counts steps over all runs, and says which run it is and its last loss."""

import inspect
from types import SimpleNamespace

from ecmoe.config import RunConfig
from ecmoe.study.load import progress
from ecmoe.study.plan import Planned


def planned(seed: int) -> Planned:
    config = RunConfig(steps=10, seed=seed)
    return Planned(config.name, config, ("01_a",), ("EC",), seed)


def test_steps_are_counted_over_all_runs(capsys):
    with progress([planned(0), planned(1)]) as watching:
        for one, steps in ((planned(0), (4, 10)), (planned(1), (3,))):
            (watch,) = watching(one)
            for step in steps:
                watch.on_train_batch_end(SimpleNamespace(global_step=step))
            watch.on_validation_end(SimpleNamespace(callback_metrics={"val_loss": 2.5}))
        bar = inspect.getclosurevars(watching).nonlocals["bar"]
        assert (bar.n, bar.total) == (13, 20)
        assert bar.desc.startswith("run 2 of 2, EC s1") and "loss=2.500" in bar.postfix


def test_nothing_to_train_is_no_bar(capsys):
    with progress([]):
        pass
    assert capsys.readouterr().err == ""
