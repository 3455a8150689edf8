"""Train as one rank of a run: `by_torchrun` starts `-m ecmoe.training FOLDER [--no-weights]`, and holds the lock."""

import sys
from pathlib import Path

from ecmoe.config import RunConfig
from ecmoe.training.once import keep_failure
from ecmoe.training.ranks import end_with_caller, rank
from ecmoe.training.run import train_run

end_with_caller()
folder = Path(sys.argv[1])
config = RunConfig.from_yaml(folder / "config.yaml")
try:
    train_run(config, folder, keep_weights="--no-weights" not in sys.argv)
except Exception as failure:
    if rank() == 0:
        keep_failure(config, folder, failure)
    raise
