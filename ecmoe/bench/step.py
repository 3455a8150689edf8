"""Time whole training steps on random tokens, expert choice against token choice (claim C2).

A step is forward, loss, backward, clipping and optimiser, as in a run, but without data loading and logging. The arms
(the configs compared) differ only in their routers, so they share weights, gradients and moments, and need the memory
of one model. The learning rate is 0: the optimiser does all its work, but no step changes the routing of the next.

Each arm is timed with several implementations (paths): "triton", our kernels; for token choice "grouped_mm", which
drops nothing; "plain", if there are no kernels, and for the two arms of C2; for these two, also the kernels in a CUDA
graph. The fastest path counts. Token choice is timed with its router's choices and, as its best case, forced balance.
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
from ecmoe.bench.rows import COMPILED, EAGER, GRAPH, PLAIN, named, sized
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

PAIR = ("EC-CF2", "GShard top-2")  # the arms of claim C2


class Row(NamedTuple):
    """What is timed: an arm, its routing (the router's "own" or forced "even"), its implementation (path), and mode."""

    arm: str
    routing: str
    path: str
    mode: str = EAGER


def bench_step(*, repeats: int = 15, compiled: bool = False, **sizes: int) -> pd.DataFrame:
    """Time a training step of each of `ARMS`. repeats: number of timings, at least 2. compiled: compile each block with
    torch.compile. sizes: replace the device's defaults in `SIZES`.

    Returns a row per `Row`: its fields, milliseconds with quartiles, tokens per second, MFU (model FLOP/s over the
    device's bf16 peak, if known), peak memory on a GPU, and all repeats in samples_ms; `attrs` contain the setting."""
    configs, rows = arms(sizes), []
    found = timing.timed(steps(configs, timing.this_device(), compiled=compiled), repeats)
    for row, samples in found.times.items():
        # The replay of a CUDA graph allocates nothing, so that its peak isn't known.
        memory = None if GRAPH in row.mode else found.memory[row]
        rows.append(row._asdict() | {"peak_mb": memory and memory[1]} | _measured(configs[row.arm], samples))
    return timing.tabled(rows, found.absent, setting(sizes) | {"repeats": repeats})


def bench_study(configs: Mapping[str, RunConfig], *, repeats: int = 15) -> pd.DataFrame:
    """Time a step of every arm of a study (name -> config, text only) as its runs take it, but with learning rate 0.
    The runs' own times aren't comparable: they come from several machines, and may have shared them.

    Returns a row per arm, as in `bench_step`, but without peak memory, because the models of all arms are in memory."""
    device = timing.this_device()
    # Only one step runs at a time, so their CUDA graphs can share memory.
    pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
    with repeatable():  # as in runs
        found = timing.timed({(arm,): _run_step(config, device, pool) for arm, config in configs.items()}, repeats)
    rows = [{"arm": arm} | _measured(configs[arm], samples) for (arm,), samples in found.times.items()]
    return timing.tabled(rows, found.absent, {"repeats": repeats})


def _measured(config: RunConfig, samples: list[float]) -> dict[str, Any]:
    """Return a table's columns for a step, from its seconds in each turn."""
    rate = config.batch_size * config.sequence_length / statistics.median(samples)
    took = {"tokens_per_second": rate, "mfu": rate * flops_per_token(config) / peak_flops()}
    return timing.spread(samples) | took | {"samples_ms": [1e3 * seconds for seconds in samples]}


def _run_step(config: RunConfig, device: torch.device, pool: Any) -> Call:
    """Return a step as runs take it: compiled, and in a CUDA graph, if the config says so."""
    lit = LitModel(config, torch.ones(config.vocab_size)).to(device)  # counts affect only how hash routing balances
    optimizer = lit.configure_optimizers()["optimizer"]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    if config.compile:
        lit.model.compile_blocks()
    captured = config.cuda_graph and device.type == "cuda" and graph.capturable(lit)
    return step_of(lit, optimizer, _tokens(config, device), pool=pool if captured else None, tracked=True)


def _tokens(config: RunConfig, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(config.seed)
    shape = config.batch_size, config.sequence_length + 1
    return torch.randint(config.vocab_size, shape, generator=generator).to(device)


def arms(sizes: Mapping[str, int]) -> dict[str, RunConfig]:
    """Return the config of each arm; raise a ConfigError for invalid sizes before anything is timed."""
    size = sized(timing.this_device().type, sizes)
    n, T = size.pop("n"), size["sequence_length"]
    if n % T:
        raise ConfigError(f"n={n} tokens of a step must be whole sequences of sequence_length={T}")
    common = size | {"batch_size": n // T, "tokenizer": "bpe"}
    return {name: RunConfig.from_dict(common | keys) for name, keys in ARMS.items()}


def setting(sizes: Mapping[str, int]) -> dict[str, Any]:
    """Return the setting that all arms share."""
    kind = timing.this_device().type
    computed = {"parameters": "float32", "products": "bfloat16" if kind == "cuda" else "float32"}
    return sized(kind, sizes) | computed | {"optimizer": "AdamW, float32 moments"}


def steps(configs: Mapping[str, RunConfig], device: torch.device, *, compiled: bool) -> dict[Row, Call]:
    """Return a training step for every row, on the same weights, gradients and moments; CUDA graphs come last."""
    torch.manual_seed(0)
    first = next(iter(configs.values()))
    lit = LitModel(first).to(device)
    optimizer = torch.optim.AdamW(lit.parameters(), lr=0.0, fused=True)
    batch = _tokens(first, device)
    calls: dict[Row, Call] = {}
    pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
    for arm, config in configs.items():
        tokens = config.router == "token_choice"
        paths = [PLAIN] if not kernels_run(device) else [PLAIN, "triton"] if arm in PAIR else ["triton"]
        for path in paths + ["grouped_mm"] * tokens:
            twin = _twin(lit, config, path)
            if compiled:
                twin.model.compile_blocks()
            captured = arm in PAIR and path == "triton" and graph.capturable(twin)
            for routing in ("own", "even") if tokens else ("own",):
                row, even = Row(arm, routing, path, COMPILED if compiled else EAGER), routing == "even"
                calls[row] = step_of(twin, optimizer, batch, even)
                if captured:
                    mode = named((COMPILED * compiled, GRAPH))
                    calls[row._replace(mode=mode)] = step_of(twin, optimizer, batch, even, pool)
    # Graphs last, because a failed capture leaves little memory for other steps.
    return dict(sorted(calls.items(), key=lambda call: GRAPH in call[0].mode))


def _twin(lit: LitModel, config: RunConfig, path: str) -> LitModel:
    """Return a model with the router of another config that shares `lit`'s parameters."""
    twin = copy.deepcopy(lit, {id(p): p for p in lit.parameters()})
    for layer in twin.model.moe_layers:
        weight, sizes = layer.router.weight, (config.d_model, config.num_experts)
        router: Router = ExpertChoice(*sizes, config.capacity_factor, gate=config.gate)
        if config.router == "token_choice":
            router = Even(*sizes, config.top_k, config.capacity_factor, gate=config.gate).to(weight.device)
            router.prepare(config.batch_size * config.sequence_length)
        router.weight = weight
        layer.router, layer.kernels = router.to(weight.device), "auto" if path == "grouped_mm" else path
    if path == "grouped_mm":
        for block in twin.model.blocks:
            block.moe = None if block.moe is None else Grouped(block.moe)
    twin.routers = routers(twin)
    return twin


def check_room() -> None:
    """Raise an OutOfMemoryError unless a CUDA graph has room; a failed capture would leave other steps no memory."""
    torch.cuda.empty_cache()
    step, (free, _) = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated(), torch.cuda.mem_get_info()
    if free < 2 * step:
        needs = f"the {step / 1e9:.0f} GB of a step, beside other steps"
        raise torch.OutOfMemoryError(f"a graph keeps {needs}: {free / 1e9:.0f} GB are free")


def step_of(
    lit: LitModel, optimizer: Optimizer, batch: Tensor, even: bool = False, pool: Any = None, tracked: bool = False
) -> Call:
    """Return a training step on `batch`. even: force `Even` routers to balance. pool: memory, shared by steps, for a CUDA
    graph of the losses, captured on the first call. tracked: the optimiser already updates router statistics."""
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
        # For this step only: other models share the optimiser.
        with contextlib.nullcontext() if tracked else track(lit.model, optimizer):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for layer in layers:  # its autograd graph ties weights to this stream, for which a CUDA graph must not wait
            layer.aux_loss = None

    return step
