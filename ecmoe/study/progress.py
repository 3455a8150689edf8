"""A bar over the runs that a page trains now: which of how many, the time that is left, the last loss."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ecmoe.study.plan import Planned


@contextmanager
def over(waiting: Sequence[Planned]) -> Iterator[Callable[[Planned], list[Any]]]:
    """The bar, in a notebook a widget; none where nothing waits. Yields: run -> the callbacks that it is trained with.

    It counts optimiser steps over all runs, since runs differ in how many they have.
    """
    from tqdm.auto import tqdm

    names, steps = [one.name for one in waiting], [one.config.steps for one in waiting]
    with tqdm(total=sum(steps), unit="step", disable=not waiting) as bar:

        def watching(one: Planned) -> list[Any]:
            import lightning as L  # not needed to read what is there

            number = names.index(one.name)
            bar.set_description(f"run {number + 1} of {len(names)}, {one.arms[0]} s{one.seed}")
            done = sum(steps[:number])
            bar.update(done - bar.n)  # of a run that ended early, or calls nobody back

            class Watch(L.Callback):
                def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
                    bar.update(trainer.global_step - bar.n + done)

                def on_validation_end(self, trainer: Any, *_: Any) -> None:
                    if "val_loss" in trainer.callback_metrics:
                        bar.set_postfix(loss=f"{float(trainer.callback_metrics['val_loss']):.3f}")

            return [Watch()]

        yield watching
