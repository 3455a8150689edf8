"""Recorder: the Lightning callback that writes a run's curve, checkpoints and progress, and stops diverging runs."""

import gc
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import pandas as pd
import torch
from tqdm import tqdm

from ecmoe.files import seal, written
from ecmoe.model import metrics
from ecmoe.training.lit import LitModel


class Diverged(RuntimeError):
    """The loss is no longer a finite number."""


class Recorder(L.Callback):
    """Callback that writes a row of `curve.csv` per validation, and `last.ckpt` every `checkpoint_every` steps.

    folder: the run's folder. progress: print a line per validation, and show the remaining time on a terminal.
    sharing: returns the number of runs on the device now. Seconds are divided by it; above 1, no rate is recorded.
    still_ours: called before files are written; raises if another process may write to the folder, too."""

    def __init__(
        self,
        folder: Path,
        progress: bool = True,
        sharing: Callable[[], int] = lambda: 1,
        still_ours: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder, self.progress, self.count, self.still_ours = folder, progress, sharing, still_ours
        self.shared = self.sharing = sharing()  # `shared`: the largest so far, including before a resume
        self.rows: dict[int, dict[str, float]] = {}
        self.losses: dict[str, list[torch.Tensor]] = {}
        self.seconds = 0.0  # of training, without validation, checkpoints, and a first step that compiles
        self.began: float | None = time.perf_counter()  # None: the clock is stopped
        self.marked = (0, 0.0)  # step and seconds at the last validation
        self.bar = tqdm(disable=True)
        self.compiling = False  # does the next step, the first of this process, compile?
        self.ending: SystemExit | None = None  # asked for by a signal, to be raised after a step

    # Lightning stores this state in checkpoints, so that a resumed run continues its clock and curve.
    def state_dict(self) -> dict[str, Any]:
        rows = list(self.rows.values())
        return {"seconds": self._clock(), "shared": self.shared, "marked": list(self.marked), "rows": rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seconds, self.marked = state["seconds"], tuple(state["marked"])
        self.shared = max(self.shared, state.get("shared", 1))
        self.rows = {int(row["step"]): row for row in state["rows"]}

    def on_train_start(self, trainer: L.Trainer, module: LitModel) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self.began = time.perf_counter()
        config = module.config
        self.compiling = config.compile or module.device.type == "cuda"
        hidden = None if self.progress and trainer.is_global_zero else True  # None: shown only on a terminal
        keys = {"initial": trainer.global_step, "unit": "step", "leave": False, "disable": hidden}
        self.bar = tqdm(total=config.steps, desc=config.name, **keys)

    def on_train_batch_end(self, trainer: L.Trainer, module: LitModel, _: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if (batch_idx + 1) % module.config.accumulate:
            return
        if self.compiling:  # at least Triton kernels; also after a resume in another process
            if module.device.type == "cuda":
                torch.cuda.synchronize()
            # Objects that exist now stay. Each garbage collection would search them for half a second, and all ranks wait.
            gc.collect()
            gc.freeze()
            self.began, self.marked, self.compiling = time.perf_counter(), (step, self.seconds), False
        self.bar.update(step - self.bar.n)
        if step % module.config.eval_every:  # otherwise a checkpoint includes the row of the validation that follows
            self._end_of_step(trainer, module, step)

    def on_train_end(self, trainer: L.Trainer, module: LitModel, *_: Any) -> None:
        self.bar.close()
        gc.unfreeze()

    on_exception = on_train_end  # after an error, Lightning doesn't call on_train_end

    def on_validation_start(self, trainer: L.Trainer, module: LitModel) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.sharing = max(self.sharing, self.count())
        self.seconds, self.losses = self._clock(), {}
        self.shared, self.sharing = max(self.shared, self.sharing), self.count()
        self.began = None  # stop the clock during validation

    def on_validation_batch_end(self, trainer: L.Trainer, module: LitModel, outputs: Any, *_: Any) -> None:
        for name, value in outputs.items():
            self.losses.setdefault(name, []).append(value.detach())

    def on_validation_end(self, trainer: L.Trainer, module: LitModel) -> None:
        config, step = module.config, trainer.global_step
        every = trainer.strategy.all_gather  # a rank sees only its own batches, but all must decide alike below
        trained = bool(module.sums["count"])
        means = module.means()
        tokens, seconds = (step - self.marked[0]) * config.tokens_per_batch, self.seconds - self.marked[1]
        row = {
            "step": step,
            "tokens": step * config.tokens_per_batch,
            "seconds": self.seconds,
            "learning_rate": trainer.optimizers[0].param_groups[0]["lr"] if trainer.optimizers else math.nan,
            # If other runs share the device, the rate depends on how busy they are.
            "tokens_per_second": tokens / seconds if tokens and seconds and self.shared == 1 else math.nan,
        }
        losses = {name: every(torch.stack(values)).double().mean() for name, values in self.losses.items()}
        row |= {name: float(value) for name, value in (means | losses | module.statistics).items()}
        self.rows[step], self.marked = row, (step, self.seconds)
        self.write_curve(trainer)
        self.began = time.perf_counter()
        if self.progress and trainer.is_global_zero:
            rate = f"  {row['tokens_per_second']:,.0f} tokens/s" if row["tokens_per_second"] > 0 else ""
            shown = f"loss {row['train_loss']:.4f}  validation {row['val_loss']:.4f}"
            tqdm.write(f"[{config.name}] step {step}/{config.steps}  {shown}{rate}", sys.stderr)
        if not (math.isfinite(row["val_loss"]) and (not trained or math.isfinite(row["train_loss"]))):
            raise Diverged(f"the loss is {row['train_loss']} (validation: {row['val_loss']}) at step {step}")
        self._end_of_step(trainer, module, step)

    def _end_of_step(self, trainer: L.Trainer, module: LitModel, step: int) -> None:
        """Save a checkpoint if one is due after this step and its validation, or if the run is to end now; none after the
        last step, as only the validation that follows it records its routing statistics."""
        if step < module.config.steps and (self.ending or step % module.config.checkpoint_every == 0):
            loss = float(trainer.strategy.all_gather(module.sums["loss"]).sum())
            if not math.isfinite(loss):
                raise Diverged(f"the training loss is {loss} before step {step}")
            self.save(trainer)
            if self.ending:
                raise self.ending

    @contextmanager
    def patient(self) -> Iterator[None]:
        """Within the context, Ctrl-C or SIGTERM ends the run after its current step, with a checkpoint, or at the end of
        the context, when all is written. A second signal ends it at once."""
        if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
            yield
            return
        before = {number: signal.signal(number, self._asked) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
            if self.ending:
                raise self.ending
        except SystemExit as ended:
            if ended.code == 128 + signal.SIGINT:
                raise KeyboardInterrupt from None
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _asked(self, number: int, frame: Any) -> None:
        if self.ending:
            raise self.ending
        # The exit code is that of a shell. Lightning would turn a KeyboardInterrupt into exit code 1.
        self.ending = SystemExit(128 + number)
        # A print would fail if the signal came in the middle of another one.
        os.write(2, b"ends after this step, with a checkpoint; at once if asked again\n")

    def curve(self) -> pd.DataFrame:
        """Return all rows so far with every column of a curve, NaN where nothing was measured."""
        return pd.DataFrame(list(self.rows.values())).reindex(columns=metrics.curve())

    def write_curve(self, trainer: L.Trainer) -> None:
        if trainer.is_global_zero:
            self.still_ours()
            with written(self.folder / "curve.csv") as temporary:
                self.curve().to_csv(temporary, index=False)

    def save(self, trainer: L.Trainer) -> None:
        """Write last.ckpt atomically: a kill leaves the previous checkpoint intact. The clock is stopped meanwhile."""
        self.seconds, self.began = self._clock(), None
        if trainer.is_global_zero:
            self.still_ours()
            with written(self.folder / "last.ckpt") as temporary:
                trainer.save_checkpoint(temporary)
                seal(temporary)
        else:  # sharded weights are gathered from all ranks
            trainer.save_checkpoint(self.folder / "last.ckpt")
        self.began = time.perf_counter()

    def _clock(self) -> float:
        return self.seconds + ((time.perf_counter() - self.began) / self.sharing if self.began is not None else 0.0)
