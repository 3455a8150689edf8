"""What page 10 asks of image runs: accuracy by capacity, as evaluated and as trained, and the differences of routers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from ecmoe.study.stats import paired_difference


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
                by_seed = [(100 * at.loc[at["arm"] == arm, "accuracy"]).to_dict() for arm in (a, b)]
                effect = paired_difference(*by_seed, "points")
                between = "" if effect.low is None else f" ({effect.low:+.1f} to {effect.high:+.1f})"
                row[f"c = {c:g}"] = f"{effect.mean:+.1f}{between}" if effect.n else None
            rows.append(row)
    return pd.DataFrame(rows)
