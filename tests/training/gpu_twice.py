"""On a GPU: train the same run twice, and say where the two part. `python tests/training/gpu_twice.py [key=value ...]`

Each way trains twice, the second time in a process of its own, and prints the first step and the first tensor that differ,
and the milliseconds of a step: as runs are trained, and without `repeatable`, which is what it costs and what it is for.
"""

import json
import subprocess
import sys
import time
from contextlib import nullcontext

import torch

from ecmoe.config import RunConfig
from ecmoe.data.batches import TextData
from ecmoe.files import parse_yaml
from ecmoe.training import trainer
from ecmoe.training.lit import LitModel

STEPS, WARM = 30, 10
STUDY = {
    "layers": 8, "d_model": 512, "d_ff": 1024, "heads": 8, "num_experts": 32, "sequence_length": 512, "batch_size": 32,
    "max_bytes": 20_000_000, "optimizer": "adamw", "learning_rate": 1e-3, "gate": "renormalized",
}  # fmt: skip
WAYS = {
    "eager": {},
    "graph": {"cuda_graph": True},
    "compiled": {"compile": True, "cuda_graph": True},
    "compiled plain": {"compile": True, "kernels": "plain"},
    "eager plain": {"kernels": "plain"},
}


def trained(keys: dict, repeatable: bool) -> dict:
    """The sum of absolute values of every gradient after each step, as exact hexadecimals; and the time of a step."""
    config = RunConfig.from_dict(STUDY | keys | {"steps": STEPS, "eval_every": STEPS})
    data = TextData(config)
    data.prepare_data()
    data.setup("fit")
    sums: list[dict[str, str]] = []
    times: list[float] = []

    class Watch(trainer.L.Callback):
        def on_before_optimizer_step(self, _, module, optimizer):
            if len(sums) < WARM:
                found = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
                sums.append({name: float(g.double().abs().sum()).hex() for name, g in reversed(list(found.items()))})

        def on_train_batch_end(self, *_):
            if len(times) >= WARM:  # nothing waits for the device before
                torch.cuda.synchronize()
            times.append(time.perf_counter())

    with trainer.repeatable() if repeatable else nullcontext():
        lit = LitModel(config, torch.as_tensor(data.token_counts))
        trainer.new_trainer(config, devices=1, max_steps=STEPS, limit_val_batches=0, callbacks=[Watch()]).fit(lit, data)
    weights = {name: float(p.double().abs().sum()).hex() for name, p in lit.named_parameters()}
    return {"sums": sums, "weights": weights, "ms": 1e3 * (times[-1] - times[WARM]) / (STEPS - 1 - WARM)}


def difference(a: dict, b: dict) -> str:
    for step, (one, other) in enumerate(zip(a["sums"], b["sums"], strict=True)):
        apart = [name for name in one if one[name] != other[name]]
        if apart:
            return (
                f"step {step}: {len(apart)} of {len(one)} gradients differ, from the output on {', '.join(apart[:4])}"
            )
    apart = [name for name in a["weights"] if a["weights"][name] != b["weights"][name]]
    return f"weights differ after {STEPS} steps: {', '.join(apart[:4])}" if apart else "the same to the last bit"


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(trained(*json.loads(sys.argv[2]))))
        raise SystemExit
    given = dict(pair.split("=", 1) for pair in sys.argv[1:])
    given = {key: parse_yaml(value) for key, value in given.items()}
    for way, keys in WAYS.items():
        for repeatable in (True, False):
            call = [sys.executable, __file__, "--one", json.dumps([keys | given, repeatable])]
            done = [subprocess.run(call, stdout=subprocess.PIPE, text=True) for _ in range(2)]
            if any(one.returncode for one in done):
                print(f"{way:15} {'repeatable' if repeatable else 'as it comes':11} failed", flush=True)
                continue
            a, b = (json.loads(one.stdout.splitlines()[-1]) for one in done)
            print(
                f"{way:15} {'repeatable' if repeatable else 'as it comes':11} {a['ms']:7.2f} {b['ms']:7.2f} ms  {difference(a, b)}",
                flush=True,
            )
