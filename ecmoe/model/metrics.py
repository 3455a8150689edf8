"""One list of what a run is measured by: a metric added here arrives in curves, summaries, tables and figures.

What a layer with experts tells, `of` computes from the layer's last forward, with tensors alone; this file needs no torch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Metric:
    """A number of a run.

    Attributes:
        name: of its column. label: what an axis says.
        unit: "nats" (a token; of images, an image), "share" (0 to 1, shown in percent), or whatever `label` says.
        curve: does each validation measure it? table: has a finished run one?
        of: an `MoE` -> a scalar tensor, what its last forward did; None: who trains measures it.
        worst: over layers and ranks the largest counts, not the mean.
        result: is it void in a run that broke off?
    """

    name: str
    label: str
    unit: str = ""
    curve: bool = True
    table: bool = True
    of: Callable[[Any], Any] | None = None
    worst: bool = False
    result: bool = False


MOST = 8  # experts that are counted one by one; share_8 is that many or more
SHARES = [f"share_{j}" for j in range(MOST + 1)]


def _demand(layer: Any) -> Any:
    return layer.demand.sum().clamp_min(1).float()


def _fullest(layer: Any) -> Any:
    return layer.demand.max() * layer.demand.numel() / _demand(layer)


def _share(j: int) -> Callable[[Any], Any]:
    return lambda layer: layer.experts_per_token[j] / layer.tokens.clamp_min(1)


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
    Metric("dropped", "requests dropped (%)", "share", of=lambda layer: 1 - layer.load.sum() / _demand(layer)),
    Metric("over_capacity", "fullest expert's demand above an equal share (%)", "share",
           of=lambda layer: _fullest(layer) - 1, worst=True),
    Metric("max_load", "fullest expert's demand over the mean demand", of=_fullest, worst=True),
    *(Metric(name, f"tokens that {j} experts took{' or more' * (j == MOST)} (%)", "share", of=_share(j))
      for j, name in enumerate(SHARES)),
]  # fmt: skip


def curve() -> list[str]:
    """Columns of a curve."""
    return [metric.name for metric in METRICS if metric.curve]


def table() -> list[str]:
    """Columns that a table of runs has even where no run could measure them."""
    return [metric.name for metric in METRICS if metric.table]


def of_layers() -> list[Metric]:
    """What layers with experts tell."""
    return [metric for metric in METRICS if metric.of is not None]


def results() -> list[str]:
    """What only a finished run has."""
    return [metric.name for metric in METRICS if metric.result]
