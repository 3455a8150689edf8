"""Continual learning: tasks arrive in sequence. Expert Gate, one expert a task, beside one network with and without experts."""

from ecmoe.continual.expert_gate import ExpertGate, Gate, fit, probabilities, relatedness
from ecmoe.continual.learning import final_accuracy, forgetting, run, split
from ecmoe.continual.patchnet import PatchNet
from ecmoe.continual.runs import (
    ORACLE,
    by_approach,
    by_task,
    compare,
    mean_matrix,
    origins,
    records,
    retained,
    run_or_load,
    run_study,
    table,
    with_oracle,
)
from ecmoe.continual.settings import APPROACHES, Settings

__all__ = [
    "APPROACHES", "ORACLE", "ExpertGate", "Gate", "PatchNet", "Settings", "by_approach", "by_task", "compare",
    "final_accuracy", "fit", "forgetting", "mean_matrix", "origins", "probabilities", "records", "relatedness", "retained",
    "run", "run_or_load", "run_study", "split", "table", "with_oracle",
]  # fmt: skip
