"""Continual learning: tasks arrive in sequence. Expert Gate, one expert a task, beside one network with and without experts.

settings.py is the schema of a run, runs.py makes or finds one, learning.py learns and measures, expert_gate.py and
patchnet.py are the networks."""

from ecmoe.continual.settings import APPROACHES, Settings

__all__ = ["APPROACHES", "Settings"]
