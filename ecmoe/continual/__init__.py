"""Continual learning of tasks in sequence: Expert Gate, with an expert per task, against one network for all tasks.

config.py adds keys to RunConfig, learning.py trains and evaluates, and expert_gate.py implements Expert Gate."""

from ecmoe.continual.config import ContinualConfig

__all__ = ["ContinualConfig"]
