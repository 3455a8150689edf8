"""Task ids for task-level routing of text that has no tasks, by clustering windows of text.

The task id of a window is the cluster of the preceding window in the corpus. It is known before the first token, so
routing never depends on a later token. This choice is ours; Kudugunta et al. (2021) use the language pair.
"""

import numpy as np

from ecmoe.files import ConfigError

BUCKETS = 256  # token ids are counted modulo BUCKETS
FITTED = 20_000  # maximum number of windows that the clusters are fitted on


class TextClusters:
    """k-means over token frequencies of training windows, (m, T+1), with seed 0 for every run: it is part of the data."""

    def __init__(self, windows: np.ndarray, num_classes: int) -> None:
        from sklearn.cluster import MiniBatchKMeans  # slow to import, and only task-level runs need it

        some = windows[np.linspace(0, len(windows) - 1, min(len(windows), FITTED)).astype(int)]
        if num_classes > len(some):
            raise ConfigError(f"num_tasks={num_classes}: must be at most {len(some)}, the number of text windows")
        # Initialising many clusters is slow.
        start = {"n_init": 3} if num_classes <= 64 else {"n_init": 1, "init": "random"}
        self.clusters = MiniBatchKMeans(num_classes, random_state=0, **start).fit(frequencies(some))

    def before(self, windows: np.ndarray, chunk: int = 4096) -> np.ndarray:
        """Map consecutive windows (m, T+1) to the cluster of the window before each, (m,) int64; 0 for the first."""
        parts = (windows[start : start + chunk] for start in range(0, len(windows), chunk))
        found = [self.clusters.predict(frequencies(part)) for part in parts]
        return np.concatenate([[0], *found])[:-1].astype(np.int64)


def frequencies(windows: np.ndarray) -> np.ndarray:
    """(m, T+1) token ids -> (m, BUCKETS) float32 root frequencies (Hellinger distance, to which rare tokens matter)."""
    counts, row, length = np.zeros((len(windows), BUCKETS), np.uint32), np.arange(len(windows)), windows.shape[1]
    for ids in windows.T.astype(np.int64):
        counts[row, ids % BUCKETS] += 1
    return np.sqrt(np.arange(length + 1) / length).astype(np.float32)[counts]
