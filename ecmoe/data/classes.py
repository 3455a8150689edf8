"""Classes of sequences, for task-level routing of text that has no tasks: what kind of text comes before.

A window's class is the cluster of the window before it in the corpus: known before the first token of the sequence,
so no token's routing sees a later one. Ours; Kudugunta et al. (2021) have the language pair.
"""

from __future__ import annotations

import numpy as np

BUCKETS = 256  # token ids are counted modulo this
FITTED = 20_000  # windows that the clusters are fitted on


class WindowClasses:
    """k-means over the token frequencies of windows, with seed 0: the classes are part of the data, not of a run.

    Args:
        windows: (m, T+1) token ids of the training split, in the order of the corpus. num_classes: at most m.
    """

    def __init__(self, windows: np.ndarray, num_classes: int) -> None:
        from sklearn.cluster import (
            MiniBatchKMeans,  # dear to import, and a machine without task-level runs need not have it
        )

        some = windows[np.linspace(0, len(windows) - 1, min(len(windows), FITTED)).astype(int)]
        self.clusters = MiniBatchKMeans(num_classes, random_state=0, n_init=3).fit(frequencies(some))

    def before(self, windows: np.ndarray) -> np.ndarray:
        """(m, T+1) consecutive windows -> (m,) int64 class of the window before each; 0 for the first."""
        labels = self.clusters.predict(frequencies(windows))
        return np.concatenate([[0], labels[:-1]]).astype(np.int64)


def frequencies(windows: np.ndarray, chunk: int = 4096) -> np.ndarray:
    """(m, T+1) token ids -> (m, BUCKETS) float32, square roots of shares: Hellinger distances, where rare tokens count."""
    rows = []
    for start in range(0, len(windows), chunk):
        part = windows[start : start + chunk].astype(np.int64) % BUCKETS
        place = part + BUCKETS * np.arange(len(part))[:, None]
        counts = np.bincount(place.ravel(), minlength=BUCKETS * len(part)).reshape(len(part), BUCKETS)
        rows.append(np.sqrt(counts / windows.shape[1]).astype(np.float32))
    return np.concatenate(rows)
