"""A figure of routed patches: which of them experts took."""

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

from ecmoe.report.plots.parts import Plot, nothing
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
    rows, said = [], []
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
    for arm, own in data.groupby("arm", sort=False):
        taken, right = own["patches_taken_percent"], (own["class"] == own["guess"]).sum()
        said.append(f"{arm}: {taken.mean():.0f}% of the patches, {taken.min():.0f}% to {taken.max():.0f}% of an image, and "
                    f"{(taken == 0).sum()} of {count} images lose all of theirs; {right} of {count} are classified rightly")  # fmt: skip
    return Plot(
        figure,
        f"Which patches of {count} images some expert took, at {places:g} expert places per patch. {'; '.join(said)}.",
        data,
    )


def _image(ax: Axes, image: np.ndarray, experts: np.ndarray | None = None) -> None:
    """image: (H, W, C) uint8. experts: (rows, columns) per patch."""
    gray = image.shape[2] == 1
    ax.imshow(image[..., 0] if gray else image, cmap="gray" if gray else None, vmin=0, vmax=255)
    for (r, c), n in np.ndenumerate(experts if experts is not None else np.ones((0, 0))):
        height, width = image.shape[0] / experts.shape[0], image.shape[1] / experts.shape[1]
        x, y = c * width - 0.5, r * height - 0.5
        if not n:
            ax.add_patch(Rectangle((x, y), width, height, facecolor="0.72", edgecolor="0.8", linewidth=0.5))
        elif n > 1:
            text = ax.text(x + width / 2, y + height / 2, str(n), ha="center", va="center", fontsize=9, color="white")
            text.set_path_effects([withStroke(linewidth=2, foreground="black")])
