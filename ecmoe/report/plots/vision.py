"""Figures of routed patches: accuracy and what is left out by capacity, and which patches experts took."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

from ecmoe.report.plots.parts import (
    LABELS,
    Plot,
    grouped,
    lines_with_intervals,
    number_axis,
    sentence,
    series_text,
)
from ecmoe.report.plots.style import legend_below, new_figure


def accuracy_over_capacity(panels: Mapping[str, pd.DataFrame]) -> Plot:
    """Accuracy against expert places per patch, a panel for each way to come by it: mean and 95% interval per arm.

    Args:
        panels: title -> a row per arm, seed and capacity, as of `capacity.sweep`.
    """
    return _over_capacity({title: (frame, "accuracy") for title, frame in panels.items()})


def left_out_over_capacity(swept: pd.DataFrame) -> Plot:
    """Patches that no expert took, and images of which none was taken in any layer, against expert places per patch.

    Args:
        swept: of `capacity.sweep`.
    """
    return _over_capacity(
        {LABELS[column]: (swept, column) for column in ("patches_left_out", "images_left_out")}, title=True
    )


def _over_capacity(panels: Mapping[str, tuple[pd.DataFrame, str]], title: bool = False) -> Plot:
    figure, axes = new_figure(4.4, len(panels), sharey=not title)
    frames, said = [], []
    for ax, (name, (frame, column)) in zip(axes, panels.items(), strict=True):
        data = grouped(frame, "capacity", column)
        lines_with_intervals(ax, data, "capacity")
        number_axis(ax, data["capacity"], log=True)
        ax.set_xlabel(LABELS["capacity"])
        ax.set_title(name)
        if title:
            ax.set_ylim(bottom=0)
        said.append(f"{sentence(name)}. {series_text(data, 'capacity')}")
        frames.append(data.assign(panel=name))
    if not title:
        axes[0].set_ylabel("validation accuracy (%; the axis is cut)")
    legend_below(figure, axes[0])
    what = "What is left out" if title else sentence(LABELS["accuracy"])
    return Plot(figure, f"{what} by {LABELS['capacity']}. {' '.join(said)}", pd.concat(frames, ignore_index=True))


def patches_taken(galleries: Mapping[str, Mapping[str, Any]], places: float) -> Plot:
    """Some images, and a row per arm: patches that no expert took are grey; a number says that several took it.

    Args:
        galleries: arm -> of `capacity.patches_at`, all of the same images. places: expert places per patch.
    """
    count = len(next(iter(galleries.values()))["truth"]) if galleries else 1
    figure, axes = new_figure(1.0 + 1.2 * (len(galleries) + 1), count, len(galleries) + 1)
    for ax in axes:
        ax.grid(False)
        ax.spines[:].set_visible(False)
        ax.set(xticks=[], yticks=[])
    rows, said = [], []
    for i, (arm, found) in enumerate(galleries.items(), 1):
        pixels = np.frombuffer(base64.b64decode(found["pixels"]), np.uint8).reshape(found["shape"])
        for j in range(count):
            ax, experts = axes[i * count + j], np.array(found["experts"][j])
            right = found["guess"][j] == found["truth"][j]
            _draw(ax, pixels[j], experts)
            ax.set_xlabel(found["guess"][j] if right else f"{found['guess'][j]} (wrong)", fontsize=8)
            if i == 1:
                _draw(axes[j], pixels[j])
                axes[j].set_title(found["truth"][j], fontsize=9)
            taken = float((experts > 0).mean())
            rows.append((arm, j + 1, found["truth"][j], found["guess"][j], 100 * taken, int(experts.sum())))
        axes[i * count].set_ylabel(arm.replace(", ", ",\n"), fontsize=8)
        said.append(f"{arm}: {_shares([row for row in rows if row[0] == arm])}")
    if not galleries:
        axes[0].text(0.5, 0.5, "not run", ha="center", color="0.4", transform=axes[0].transAxes)
    data = pd.DataFrame(rows, columns=["arm", "image", "class", "guess", "patches_taken_percent", "places_taken"])
    alt = f"Which patches of {count} images some expert took, at {places:g} expert places per patch. "
    return Plot(figure, alt + ("; ".join(said) or "Not run") + ".", data)


def _draw(ax: Axes, image: np.ndarray, experts: np.ndarray | None = None) -> None:
    """image: (H, W, C) uint8. experts: (rows, columns) per patch."""
    gray = image.shape[2] == 1
    ax.imshow(image[..., 0] if gray else image, cmap="gray" if gray else None, vmin=0, vmax=255)
    if experts is None:
        return
    height, width = image.shape[0] / experts.shape[0], image.shape[1] / experts.shape[1]
    for (r, c), n in np.ndenumerate(experts):
        x, y = c * width - 0.5, r * height - 0.5
        if not n:
            ax.add_patch(Rectangle((x, y), width, height, facecolor="0.72", edgecolor="0.8", linewidth=0.5))
        elif n > 1:
            text = ax.text(x + width / 2, y + height / 2, str(n), ha="center", va="center", fontsize=7, color="white")
            text.set_path_effects([withStroke(linewidth=2, foreground="black")])


def _shares(rows: Sequence[tuple]) -> str:
    taken = [row[4] for row in rows]
    right = sum(row[2] == row[3] for row in rows)
    none = sum(share == 0 for share in taken)
    return (f"{np.mean(taken):.0f}% of the patches, {min(taken):.0f}% to {max(taken):.0f}% of an image, "
            f"and {none} of {len(rows)} images lose all of theirs; {right} of {len(rows)} are classified rightly")  # fmt: skip
