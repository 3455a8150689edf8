"""Mixture-of-Experts with Expert Choice Routing (Zhou et al., NeurIPS 2022), replicated and measured.

Use an MoE layer in your own model:

>>> import torch
>>> from ecmoe import MoE, track
>>> from ecmoe.routing import ExpertChoice
>>> moe = MoE(ExpertChoice(d_model=64, num_experts=8, capacity_factor=2.0), d_model=64, d_ff=256)
>>> optimizer = torch.optim.AdamW(moe.parameters())
>>> handle = track(moe, optimizer)  # update the running cut-offs at each step
>>> moe(torch.randn(4, 32, 64)).shape  # (B, T, d) -> (B, T, d)
torch.Size([4, 32, 64])

`build_model(RunConfig(...))` builds a model of the study; `run_or_load(RunConfig(...))` trains it or loads the result.
"""

import gc
from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Public name -> module, which is imported on first use, so that `ecmoe --help` needs no torch.
_HOME = {
    "MoE": "ecmoe.model.moe",
    "RunConfig": "ecmoe.config",
    "ConfigError": "ecmoe.config",
    "build_model": "ecmoe.model.build",
    "causal_routing": "ecmoe.routing",
    "track": "ecmoe.model.tracking",
    "run_or_load": "ecmoe.training.run",
    "load_model": "ecmoe.training.result",
}
__all__ = [*_HOME, "__version__"]

# For packages that a plain `pip install .` leaves out.
_HINT = "{} isn't installed; it comes with the extra 'study': pip install '.[study]' in a checkout of ecmoe"


def __getattr__(name: str) -> Any:
    if name in _HOME:
        collects = gc.isenabled()
        gc.disable()  # importing torch and Lightning leaves hardly any garbage; searching for it takes a quarter of the time
        try:
            return getattr(import_module(_HOME[name]), name)
        except ModuleNotFoundError as missing:
            raise ModuleNotFoundError(f"ecmoe.{name}: {_HINT.format(missing.name)}", name=missing.name) from missing
        finally:
            if collects:
                gc.enable()
    raise AttributeError(f"module 'ecmoe' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
