"""A figure of routed patches: which of them experts took."""

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.patheffects import withStroke

from ecmoe.report.plots.parts import Plot, nothing, sentence
from ecmoe.report.plots.style import new_figure, plain


@plain()
def patches_taken(galleries: Mapping[str, Mapping[str, Any]], places: float) -> Plot:
    """Some images, and a row per arm: patches that no expert took are grey; a number says that several took it.

    Args:
        galleries: arm -> of `image_capacity.patches_at`, all of the same images. places: expert places per patch.
    """
    if not galleries:
        return nothing(f"which patches some expert took, at {places:g} expert places per patch")
    count = len(next(iter(galleries.values()))["truth"])
    figure, axes = new_figure(1.0 + 1.2 * (len(galleries) + 1), count, len(galleries) + 1)
    for ax in axes:
        ax.grid(False)
        ax.spines[:].set_visible(False)
        ax.set(xticks=[], yticks=[])
    rows = []
    for i, (arm, found) in enumerate(galleries.items(), 1):
        pixels = np.frombuffer(base64.b64decode(found["pixels"]), np.uint8).reshape(found["shape"])
        for j, (truth, guess) in enumerate(zip(found["truth"], found["guess"], strict=True)):
            ax, experts = axes[i * count + j], np.array(found["experts"][j])
            _image(ax, pixels[j], experts)
            ax.set_xlabel(guess if guess == truth else f"{guess} (wrong)", fontsize=9)
            if i == 1:
                _image(axes[j], pixels[j])
                axes[j].set_title(truth, fontsize=9)
            rows.append((arm, j + 1, truth, guess, 100 * float((experts > 0).mean()), int(experts.sum())))
        axes[i * count].set_ylabel(arm.replace(", ", ",\n"), fontsize=9)
    data = pd.DataFrame(rows, columns=["arm", "image", "class", "guess", "patches_taken_percent", "places_taken"])
    said = [
        f"{arm}: {taken.mean():.0f}% of the patches, {taken.min():.0f}% to {taken.max():.0f}% of an image, and "
        f"{(taken == 0).sum()} of {count} images lose all of theirs"
        for arm, taken in data.groupby("arm", sort=False)["patches_taken_percent"]
    ]
    what = f"which patches of {count} images some expert took, at {places:g} expert places per patch"
    return Plot(figure, f"{sentence(what)}. {'; '.join(said)}.", data)


def _image(ax: Axes, image: np.ndarray, experts: np.ndarray | None = None) -> None:
    """image: (H, W, C) uint8. experts: (rows, columns) per patch."""
    height, width = image.shape[:2]
    ax.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=255)
    if experts is None:
        return
    left_out, edges = np.ma.masked_where(experts > 0, experts), (-0.5, width - 0.5, height - 0.5, -0.5)
    ax.imshow(left_out, cmap=ListedColormap(["0.72"]), extent=edges)
    high, wide = height / experts.shape[0], width / experts.shape[1]
    for (row, column), n in np.ndenumerate(experts):
        if n > 1:
            at = (column + 0.5) * wide - 0.5, (row + 0.5) * high - 0.5
            text = ax.text(*at, str(n), ha="center", va="center", fontsize=9, color="white")
            text.set_path_effects([withStroke(linewidth=2, foreground="black")])
