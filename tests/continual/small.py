"""The arms of page 11, small."""

from ecmoe.study import plan

FAST = {"steps": 25, "warmup_steps": 2, "gate_steps": 60, "code": 16, "d_model": 16, "d_ff": 16}


def page(**changes):
    """Arm -> its config on page 11, at smoke, but small."""
    planned = plan.of_page("11_continual_learning", "smoke", {"base": FAST | changes, "seeds": [0]})
    return {one.arms[0]: one.config for one in planned}


GATE = page()["Expert Gate"]
DENSE, EC = page()["one dense network"], page()["one EC network"]
