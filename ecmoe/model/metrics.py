"""The list of a run's metrics: a metric added here appears in curves, summaries, tables and figures. Needs no torch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Metric:
    """A metric of a run."""

    name: str  # of its column
    label: str  # of its axis
    unit: str = ""  # "nats" (per token, or per image), "share" (0 to 1, shown in percent); "": `label` gives the unit
    curve: bool = True  # whether each validation measures it
    table: bool = True  # whether tables of runs show it
    of: Callable[[Any], Any] | None = None  # MoE layer -> scalar of its last forward; None: of training
    worst: bool = False  # take the maximum over layers and ranks, not the mean
    result: bool = False  # whether only a finished run has a valid value


MOST = 8  # share_j: tokens that j experts took; share_8: 8 or more
SHARES = [f"share_{j}" for j in range(MOST + 1)]


# Integers are divided in float32, whatever the default dtype.
def _fullest(layer: Any) -> Any:
    return layer.demand.max() * layer.demand.numel() / layer.demand.sum().float()


def _share(j: int) -> Callable[[Any], Any]:
    return lambda layer: layer.experts_per_token[j] / layer.tokens.float()


METRICS = [
    Metric("step", "training step", table=False),
    Metric("tokens", "training tokens"),
    Metric("seconds", "training time (s)"),
    Metric("train_loss", "training loss (nats per token)", "nats"),
    Metric("learning_rate", "learning rate", table=False),
    Metric("aux_loss", "auxiliary loss", table=False),
    Metric("tokens_per_second", "training speed (tokens per second)"),
    Metric("val_loss", "validation loss (nats per token)", "nats", result=True),
    Metric("val_loss_causal", "validation loss, routed causally (nats per token)", "nats", result=True),
    Metric("accuracy", "validation accuracy (%)", "share", result=True),
    Metric("perplexity", "validation perplexity", curve=False, result=True),
    Metric("bits_per_byte", "validation loss (bits per byte)", curve=False, result=True),
    Metric("mfu", "share of the device's bf16 rate (MFU)", curve=False),
    Metric("step_ms", "time of a training step (ms)", curve=False),
    Metric("dropped", "requests dropped (%)", "share",
           of=lambda layer: 1 - layer.load.sum() / layer.demand.sum().float()),
    Metric("over_capacity", "fullest expert's demand above an equal share (%)", "share",
           of=lambda layer: _fullest(layer) - 1, worst=True),
    Metric("max_load", "fullest expert's demand over the mean demand", of=_fullest, worst=True),
    *(Metric(name, f"tokens that {j} experts took{' or more' * (j == MOST)} (%)", "share", of=_share(j))
      for j, name in enumerate(SHARES)),
]  # fmt: skip


def curve() -> list[str]:
    """Return the columns of a curve."""
    return [metric.name for metric in METRICS if metric.curve]


def table() -> list[str]:
    """Return the columns that a table of runs always has, even if no run measured them."""
    return [metric.name for metric in METRICS if metric.table]


def of_layers() -> list[Metric]:
    """Return the metrics that are computed from MoE layers."""
    return [metric for metric in METRICS if metric.of is not None]


def results() -> list[str]:
    """Return the names of the metrics that only finished runs have."""
    return [metric.name for metric in METRICS if metric.result]
