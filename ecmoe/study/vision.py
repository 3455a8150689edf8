"""What page 10 asks of image runs: accuracy by capacity, as evaluated and as trained, and the differences of routers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from ecmoe.study import estimate
from ecmoe.study.estimate import Unit


def differences(panels: Mapping[str, pd.DataFrame], pairs: Sequence[tuple[str, str]]) -> pd.DataFrame:
    """How far the first arm of each pair is ahead, in points of accuracy over paired seeds: a column per capacity.

    Args:
        panels: name -> rows of arm, seed, capacity, accuracy.

    Returns:
        rows of panel, pair, and texts such as "+9.7 (+8.1 to +11.3)", the 95% interval; one seed has none.
    """
    rows = []
    for panel, frame in panels.items():
        measured = frame.dropna(subset="accuracy")
        for a, b in pairs:
            row = {"models": panel, "difference": f"{a} \u2212 {b}"}
            for c in sorted(frame["capacity"].unique()):
                at = measured[measured["capacity"] == c].set_index("seed")
                ours, theirs = (at.loc[at["arm"] == arm, "accuracy"].to_dict() for arm in (a, b))
                shared = estimate.shared(ours, theirs)
                effect = estimate.of_values((ours[seed] - theirs[seed] for seed in shared), Unit.SHARE)
                ends = effect.interval()
                between = f" ({100 * ends[0]:+.1f} to {100 * ends[1]:+.1f})" if ends else ""
                row[f"c = {c:g}"] = f"{100 * effect.value:+.1f}{between}" if effect.n else None
            rows.append(row)
    return pd.DataFrame(rows)
