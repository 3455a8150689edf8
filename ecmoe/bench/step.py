"""A whole training step on random tokens, expert choice against token choice (claim C2).

Forward, loss, backward, clipping, optimiser: what a run does, without data and logging. Arms differ in their routers
alone, so all share one set of weights, gradients and moments, and their steps are taken in turns, on any card that
holds one model. The learning rate is 0: the optimiser does all its work, and no step changes the next one's routing.

Every arm is measured on each path: "triton", the kernels; for token choice "grouped_mm", which drops nothing; and, where
there are no kernels and for the two arms of C2, "plain"; for these two the kernels also as a CUDA graph. The fastest is the
arm's best path. Token choice is routed by its own router, and evenly by force, which is its best case.

The arms of a study are timed by `bench_study`, each on the path that its runs take: runs come from several machines, and
may have shared one, so that their own seconds compare with nobody's.
"""

import contextlib
import copy
import statistics
from collections.abc import Mapping
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor
from torch.optim import Optimizer

from ecmoe.bench import clock as timing
from ecmoe.bench.baselines import Even, Grouped
from ecmoe.bench.clock import Call
from ecmoe.bench.layer import kernels_run
from ecmoe.bench.rows import COMPILED, EAGER, GRAPH, PLAIN, SIZES, named, sized
from ecmoe.config import ConfigError, RunConfig
from ecmoe.model.build import flops_per_token
from ecmoe.model.tracking import track
from ecmoe.provenance import peak_flops
from ecmoe.routing import ExpertChoice, Router, routers
from ecmoe.training import cuda_graph as graph
from ecmoe.training.lit import LitModel
from ecmoe.training.optimizer import clip
from ecmoe.training.trainer import repeatable

ARMS = {
    "EC-CF2": {"router": "expert_choice", "capacity_factor": 2.0},
    "EC-CF1": {"router": "expert_choice", "capacity_factor": 1.0},
    "GShard top-2": {"router": "token_choice", "top_k": 2, "capacity_factor": 1.0, "gate": "renormalized"},
    "Switch top-1": {"router": "token_choice", "top_k": 1, "capacity_factor": 1.0},
}

PAIR = ("EC-CF2", "GShard top-2")  # of claim C2


class Row(NamedTuple):
    """What is timed: an arm, whose choice it routes by ("own" or "even"), who computes, and in which mode."""

    arm: str
    routing: str
    path: str
    mode: str = EAGER


def bench_step(*, repeats: int = 15, compiled: bool = False, **sizes: int) -> pd.DataFrame:
    """Time a training step of each of `ARMS`.

    Args:
        repeats: steps that are timed, at least 2. compiled: under torch.compile, block by block.
        sizes: instead of those of the device in `SIZES`.

    Returns:
        the fields of a `Row`: milliseconds with quartiles, tokens per second, MFU of bf16's peak (where the
        device's is known), peak memory on a GPU, and in samples_ms every repeat; `attrs` hold the setting.
    """
    device, configs = timing.this_device(), arms(sizes)
    found = timing.timed(steps(configs, device, compiled=compiled), repeats)
    rows = [
        row._asdict() | {"peak_mb": (memory := found.memory[row]) and memory[1]} | _measured(configs[row.arm], samples)
        for row, samples in found.times.items()
    ]
    return timing.tabled(rows, found.absent, setting(configs, device) | {"repeats": repeats})


def bench_study(configs: Mapping[str, RunConfig], *, repeats: int = 15) -> pd.DataFrame:
    """Time a step of every arm of a study (name -> config, of text), on random tokens and at a learning rate of 0.

    Returns:
        a row per arm, as `bench_step` has them, without memory: all arms' models are held.
    """
    device = timing.this_device()
    # Steps are over one by one, so their graphs can share the memory of what only a step needs.
    pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
    with repeatable():  # as runs are
        found = timing.timed({(arm,): _run_step(config, device, pool) for arm, config in configs.items()}, repeats)
    rows = [{"arm": arm} | _measured(configs[arm], samples) for (arm,), samples in found.times.items()]
    return timing.tabled(rows, found.absent, {"repeats": repeats})


def _measured(config: RunConfig, samples: list[float]) -> dict[str, Any]:
    """What a table shows of a step's seconds, one a turn."""
    rate = config.batch_size * config.sequence_length / statistics.median(samples)
    took = {"tokens_per_second": rate, "mfu": rate * flops_per_token(config) / peak_flops()}
    return timing.spread(samples) | took | {"samples_ms": [1e3 * seconds for seconds in samples]}


def _run_step(config: RunConfig, device: torch.device, pool: Any) -> Call:
    """A step on the path that a run takes: compiled and as a CUDA graph where its config says so."""
    lit = LitModel(config, torch.ones(config.vocab_size)).to(device)  # how a hash table balances costs no time
    optimizer = lit.configure_optimizers()["optimizer"]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    if config.compile:
        for block in lit.model.blocks:
            block.compile(dynamic=False)
    captured = config.cuda_graph and device.type == "cuda" and graph.capturable(lit)
    return step_of(lit, optimizer, _tokens(config, device), pool=pool if captured else None, tracked=True)


def _tokens(config: RunConfig, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(config.seed)
    shape = config.batch_size, config.sequence_length + 1
    return torch.randint(config.vocab_size, shape, generator=generator).to(device)


def arms(sizes: Mapping[str, int]) -> dict[str, RunConfig]:
    """The config of each arm, checked, before anything runs."""
    size = sized(timing.this_device().type, list(SIZES["cpu"]), sizes)
    n, T = size.pop("n"), size["sequence_length"]
    if n % T:
        raise ConfigError(f"n={n} tokens of a step must be whole sequences of sequence_length={T}")
    common = size | {"batch_size": n // T, "tokenizer": "bpe"}
    return {name: RunConfig.from_dict(common | keys) for name, keys in ARMS.items()}


def setting(configs: Mapping[str, RunConfig], device: torch.device) -> dict[str, Any]:
    """What all arms have in common."""
    config = next(iter(configs.values()))
    keys = [key for key in SIZES["cpu"] if key != "n"]
    return {"n": config.batch_size * config.sequence_length} | {key: getattr(config, key) for key in keys} | {
        "parameters": "float32", "products": "bfloat16" if device.type == "cuda" else "float32", 
        "optimizer": "AdamW, float32 moments",
    }  # fmt: skip


def steps(configs: Mapping[str, RunConfig], device: torch.device, *, compiled: bool = False) -> dict[Row, Call]:
    """A training step for every row, on the same weights, gradients and moments; those that are graphs come last."""
    torch.manual_seed(0)
    first = next(iter(configs.values()))
    lit = LitModel(first).to(device)
    optimizer = torch.optim.AdamW(lit.parameters(), lr=0.0, fused=True)
    batch = _tokens(first, device)
    calls: dict[Row, Call] = {}
    graphs: dict[Row, Call] = {}  # come last: one that can't be captured leaves little memory to others
    pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
    for arm, config in configs.items():
        tokens = config.router == "token_choice"
        paths = [PLAIN] if not kernels_run(device) else [PLAIN, "triton"] if arm in PAIR else ["triton"]
        for path in paths + ["grouped_mm"] * tokens:
            twin = _twin(lit, config, path)
            if compiled:
                for block in twin.model.blocks:
                    block.compile(dynamic=False)
            for routing in ("own", "even") if tokens else ("own",):
                row = Row(arm, routing, path, COMPILED if compiled else EAGER)
                even = routing == "even"
                calls[row] = step_of(twin, optimizer, batch, even)
                if arm in PAIR and path == "triton" and graph.capturable(twin):
                    mode = named((COMPILED * compiled, GRAPH))
                    graphs[row._replace(mode=mode)] = step_of(twin, optimizer, batch, even, pool)
    return calls | graphs


def _twin(lit: LitModel, config: RunConfig, path: str) -> LitModel:
    """A model with the router of another config on the same parameters."""
    twin = copy.deepcopy(lit, {id(p): p for p in lit.parameters()})
    for block in twin.model.blocks:
        if block.moe is None:
            continue
        weight, sizes = block.moe.router.weight, (config.d_model, config.num_experts)
        router: Router = ExpertChoice(*sizes, config.capacity_factor, gate=config.gate)
        if config.router == "token_choice":
            router = Even(*sizes, config.top_k, config.capacity_factor, gate=config.gate).to(weight.device)
            router.prepare(config.batch_size * config.sequence_length)
        router.weight = weight
        block.moe.router = router.to(weight.device)
        block.moe.kernels = "auto" if path == "grouped_mm" else path
        if path == "grouped_mm":
            block.moe = Grouped(block.moe)
    twin.routers = routers(twin)
    return twin


def check_room() -> None:
    """Raise an OutOfMemoryError unless a graph has room beside the steps before: one captured in part leaves them none."""
    torch.cuda.empty_cache()
    step, (free, _) = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated(), torch.cuda.mem_get_info()
    if free < 2 * step:
        needs = f"the {step / 1e9:.0f} GB of a step, beside other steps"
        raise torch.OutOfMemoryError(f"a graph keeps {needs}: {free / 1e9:.0f} GB are free")


def step_of(
    lit: LitModel, optimizer: Optimizer, batch: Tensor, even: bool = False, pool: Any = None, tracked: bool = False
) -> Call:
    """A training step on that batch. With a `pool` of memory its losses are a graph, captured in the first call; steps share it.
    even: routers that are `Even` choose evenly. tracked: the optimiser moves the routers' statistics already."""
    layers = [block.moe for block in lit.model.blocks if block.moe is not None]
    forced = [router.forced for router in lit.routers if isinstance(router, Even)]
    mixed = batch.is_cuda and lit.config.precision != "bf16-true"

    def step() -> None:
        for flag in forced:
            flag.fill_(float(even))
        with torch.autocast("cuda", torch.bfloat16) if mixed else contextlib.nullcontext():
            if pool is not None:
                if lit.captured is None:
                    check_room()
                    lit.captured = graph.captured(lit, batch, pool)
                loss, aux_loss = lit.captured(batch)
            else:
                loss = lit.loss(batch)
                aux_loss = sum(layer.aux_loss for layer in layers if layer.aux_loss is not None)
            loss = loss + aux_loss
        loss.backward()
        clip(lit.parameters(), optimizer, lit.config.gradient_clip)
        moving = None if tracked else track(lit.model, optimizer)  # for this step alone: others share the optimiser
        optimizer.step()
        if moving is not None:
            moving.remove()
        optimizer.zero_grad(set_to_none=True)
        for layer in layers:  # it ties weights to this stream, which a graph must not wait for
            layer.aux_loss = None

    return step
