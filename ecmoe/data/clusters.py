"""Classes of sequences, for task-level routing of text that has no tasks: what kind of text comes before.

A window's class is the cluster of the window before it in the corpus: known before the first token of the sequence,
so no token's routing sees a later one. Ours; Kudugunta et al. (2021) have the language pair.
"""

import numpy as np

from ecmoe.files import ConfigError

BUCKETS = 256  # token ids are counted modulo this
FITTED = 20_000  # windows that the clusters are fitted on


class TextClusters:
    """k-means over the token frequencies of training windows, (m, T+1), with seed 0: classes are part of the data, not of a run."""

    def __init__(self, windows: np.ndarray, num_classes: int) -> None:
        from sklearn.cluster import MiniBatchKMeans  # dear to import, and needed by task-level runs alone

        some = windows[np.linspace(0, len(windows) - 1, min(len(windows), FITTED)).astype(int)]
        if num_classes > len(some):
            raise ConfigError(
                f"num_tasks={num_classes}: must be at most the {len(some)} windows of text that classes are found in"
            )
        # Many clusters take long to place.
        start = {"n_init": 3} if num_classes <= 64 else {"n_init": 1, "init": "random"}
        self.clusters = MiniBatchKMeans(num_classes, random_state=0, **start).fit(frequencies(some))

    def before(self, windows: np.ndarray, chunk: int = 4096) -> np.ndarray:
        """(m, T+1) consecutive windows -> (m,) int64 class of the window before each; 0 for the first."""
        parts = (windows[start : start + chunk] for start in range(0, len(windows), chunk))
        found = [self.clusters.predict(frequencies(part)) for part in parts]
        return np.concatenate([[0], *found])[:-1].astype(np.int64)


def frequencies(windows: np.ndarray) -> np.ndarray:
    """(m, T+1) token ids -> (m, BUCKETS) float32, square roots of shares: Hellinger distances, where rare tokens count."""
    counts, row, length = np.zeros((len(windows), BUCKETS), np.uint32), np.arange(len(windows)), windows.shape[1]
    for ids in windows.T.astype(np.int64):
        counts[row, ids % BUCKETS] += 1
    return np.sqrt(np.arange(length + 1) / length).astype(np.float32)[counts]
