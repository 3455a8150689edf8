"""Continual learning: tasks arrive in sequence. Expert Gate, one expert a task, beside one network with and without experts.

Public names are loaded on first use, so that settings can be planned without torch."""

from importlib import import_module

_HOME = {
    "expert_gate": ("ExpertGate", "Gate", "fit", "probabilities", "relatedness"),
    "learning": ("final_accuracy", "forgetting", "run", "split"),
    "patchnet": ("PatchNet",),
    "runs": ("run_or_load",),
    "settings": ("APPROACHES", "Settings"),
}  # fmt: skip
_MODULE = {name: module for module, names in _HOME.items() for name in names}
__all__ = sorted(_MODULE)


def __getattr__(name: str):
    if name in _MODULE:
        return getattr(import_module(f"ecmoe.continual.{_MODULE[name]}"), name)
    raise AttributeError(f"module 'ecmoe.continual' has no attribute {name!r}")
