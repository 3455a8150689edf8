"""What figures share: `Plot`, the words on axes, means over seeds, and the numbers of the alternative text."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from matplotlib.figure import Figure

from ecmoe.model.metrics import METRICS
from ecmoe.report.plots.style import svg_of
from ecmoe.study.estimate import counted, of_values

LABELS = {metric.name: metric.label for metric in METRICS} | {
    "steps": "training steps in all",
    "num_experts": "number of experts e",
    "capacity_factor": "capacity factor c",
    "n": "tokens n",
    "devices": "GPUs",
    "d_model": "width d",
    "moe_init_scale": "initial scale of the MoE output, times fan-in",
    "capacity": "expert places per patch",
    "patches_left_out": "patches that no expert took (%)",
    "images_left_out": "images without any patch taken (%)",
    "loss": "loss (nats per token)",
    "final_accuracy": "accuracy after all tasks (%)",
    "forgetting": "forgetting (percentage points)",
}
PERCENT = [m.name for m in METRICS if m.unit == "share"] + [
    "patches_left_out", "images_left_out", "final_accuracy", "forgetting",
]  # fmt: skip


class Plot(NamedTuple):
    """A figure, its alternative text, and the numbers that it shows; no figure where nothing was run."""

    figure: Figure | None
    alt: str
    data: pd.DataFrame

    def svg(self) -> str:
        """The figure for a page."""
        return svg_of(self.figure, self.alt)

    def save(self, path: Path) -> None:
        """The figure as a PNG, for where a page can't be shown; the same bytes each time."""
        self.figure.savefig(path, dpi=150, metadata={"Software": None})


def nothing(what: str, arms: Sequence[str] = ()) -> Plot:
    """Of a figure for which nothing was run."""
    return Plot(None, f"{sentence(what)}: not run.{missing_text(arms, [])}", pd.DataFrame())


def over_seeds(frame: pd.DataFrame, keys: Sequence[str], value: str) -> pd.DataFrame:
    """A row for each value of the keys, in their order: mean, 95% interval over seeds (low, high), number of seeds."""
    rows = []
    for found, group in frame.groupby(list(keys), sort=False, dropna=False):
        effect = of_values(group[value])
        rows.append((*found, effect.mean, *bounds(group[value]), effect.n))
    data = pd.DataFrame(rows, columns=[*keys, "mean", "low", "high", "seeds"])
    return data.astype({"mean": float, "low": float, "high": float, "seeds": int})


def bounds(values: pd.Series) -> tuple[float, float]:
    """The 95% interval over seeds, as seaborn asks for error bars."""
    return of_values(values).interval() or (math.nan, math.nan)


def factor(column: str) -> float:
    """100 for what figures show in percent."""
    return 100.0 if column in PERCENT else 1.0


def short(x: float) -> str:
    """Three decimals for losses, none for large numbers."""
    return f"{x:.3f}" if abs(x) < 100 else f"{x:,.0f}"


def number(row: object) -> str:
    """A row's mean, and its interval in brackets, where there is one."""
    known = row.low is not None and not math.isnan(row.low)
    return short(row.mean) + (f" ({short(row.low)} to {short(row.high)})" if known else "")


def rows_text(data: pd.DataFrame, at: str | None = None) -> str:
    """What each row shows, in the order of the figure. at: a column with where that is."""
    return "; ".join(
        f"{row.arm} {number(row)}"
        + (f" at {getattr(row, at):g}" if at else "")
        + f", {counted(int(row.seeds), 'seed')}"
        for row in data.dropna(subset=["mean"]).itertuples()
    )


def series_text(data: pd.DataFrame, x: str) -> str:
    """What each line shows at each x."""
    return "; ".join(
        f"{arm}: {', '.join(f'{number(row)} at {getattr(row, x):g}' for row in own.itertuples())}"
        for arm, own in data.groupby("arm", sort=False)
    )


def missing_text(arms: Iterable[str], measured: Iterable[str]) -> str:
    """A sentence that names the arms without a measurement."""
    measured = set(measured)
    missing = [str(arm) for arm in arms if arm not in measured]
    return f" Not run: {', '.join(missing)}." if missing else ""


def sentence(text: str) -> str:
    """The text with its first letter capital, the rest as it is (MFU)."""
    return text[:1].upper() + text[1:]
