"""Task ids for task-level routing of text that has no tasks, by clustering windows of text."""

import numpy as np

from ecmoe.files import ConfigError

BUCKETS = 256  # the clusters count token ids modulo BUCKETS
FITTED = 20_000  # maximum number of windows that the clusters are fitted on


class TextClusters:
    """Task ids for text, which has no tasks: that of a window is the cluster of the window before it in the corpus.

    It is known before the first token, so routing never depends on a later token. This choice is ours; Kudugunta et al.
    (2021) use the language pair. The clusters are k-means over token frequencies of training windows, (m, T+1), with
    seed 0 for every run: they are part of the data."""

    def __init__(self, windows: np.ndarray, num_classes: int) -> None:
        from sklearn.cluster import MiniBatchKMeans  # slow to import, and only task-level runs need it

        some = windows[np.linspace(0, len(windows) - 1, min(len(windows), FITTED)).astype(int)]
        if num_classes > len(some):
            raise ConfigError(f"num_tasks={num_classes}: must be at most {len(some)}, the number of text windows")
        # Initialising many clusters is slow.
        start = {"n_init": 3} if num_classes <= 64 else {"n_init": 1, "init": "random"}
        self.clusters = MiniBatchKMeans(num_classes, random_state=0, **start).fit(frequencies(some))

    def before(self, windows: np.ndarray) -> np.ndarray:
        """Map consecutive windows (m, T+1) to the cluster of the window before each, (m,) int64; 0 for the first."""
        parts = (windows[start : start + 4096] for start in range(0, len(windows), 4096))
        found = [self.clusters.predict(frequencies(part)) for part in parts]
        return np.concatenate([[0], *found])[:-1].astype(np.int64)


def frequencies(windows: np.ndarray) -> np.ndarray:
    """(m, T+1) token ids -> (m, BUCKETS) float32 root frequencies (Hellinger distance, to which rare tokens matter)."""
    m, length = windows.shape
    ids = windows.astype(np.int64) % BUCKETS + BUCKETS * np.arange(m)[:, None]  # each window has buckets of its own
    counts = np.bincount(ids.ravel(), minlength=m * BUCKETS).reshape(m, BUCKETS)
    return np.sqrt(np.arange(length + 1) / length).astype(np.float32)[counts]
