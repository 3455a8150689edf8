"""Continual learning: tasks arrive in sequence. Expert Gate, one expert a task, beside one network with and without experts.

config.py says what such a run reads beside a RunConfig's keys, learning.py learns and measures, expert_gate.py is Expert Gate."""

from ecmoe.continual.config import ContinualConfig

__all__ = ["ContinualConfig"]
