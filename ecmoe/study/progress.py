"""A bar over the runs that a page trains now: which of how many, the time that is left, the last loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ecmoe.study.plan import Planned


class Progress:
    """Counts optimiser steps over all runs, since runs differ in how many they have."""

    def __init__(self, waiting: Sequence[Planned], bar: Any) -> None:
        self.waiting, self.bar = [one.name for one in waiting], bar

    def watching(self, one: Planned) -> list[Any]:
        """What `run_or_load` calls back while this run trains."""
        import lightning as L

        bar = self.bar
        bar.set_description(f"run {self.waiting.index(one.name) + 1} of {len(self.waiting)}, {one.arms[0]} s{one.seed}")

        class Watch(L.Callback):
            def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
                bar.update(trainer.global_step - bar.n + done)

            def on_validation_end(self, trainer: Any, *_: Any) -> None:
                if "val_loss" in trainer.callback_metrics:
                    bar.set_postfix(loss=f"{float(trainer.callback_metrics['val_loss']):.3f}")

        done = bar.n
        return [Watch()]


@contextmanager
def over(waiting: Sequence[Planned]) -> Iterator[Progress]:
    """The bar, in a notebook a widget; none where nothing waits."""
    from tqdm.auto import tqdm

    steps = sum(one.config.steps for one in waiting)
    with tqdm(total=steps, unit="step", disable=not waiting) as bar:
        yield Progress(waiting, bar)
