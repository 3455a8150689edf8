"""Train as one rank of a run: `by_torchrun` starts `-m ecmoe.training FOLDER [--no-weights]`, and holds the lock."""

import os
import sys
import threading
from pathlib import Path

from ecmoe.config import RunConfig
from ecmoe.training.once import keep_failure
from ecmoe.training.ranks import rank
from ecmoe.training.run import train_run


def end_with_caller() -> None:
    """Exit when the call that started this rank ends and so closes its stdin: the next call starts ranks of its own."""
    os.read(0, 1)  # sys.stdin would take a lock that exit waits for
    os._exit(1)


threading.Thread(target=end_with_caller, daemon=True).start()
folder = Path(sys.argv[1])
config = RunConfig.from_yaml(folder / "config.yaml")
try:
    train_run(config, folder, keep_weights="--no-weights" not in sys.argv)
except Exception as failure:
    if rank() == 0:
        keep_failure(config, folder, failure)
    raise
