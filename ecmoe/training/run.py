"""run_or_load: train what is missing, load what is there. Also `torchrun -m ecmoe.training.run CONFIG...`."""

from __future__ import annotations

import datetime
import gc
import math
import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pandas as pd
import torch
import yaml
from filelock import FileLock, Timeout
from safetensors.torch import load_file, save_file

from ecmoe import paths
from ecmoe.config import SCHEMA, ConfigError, RunConfig
from ecmoe.data.batches import RunData, TextData, is_other_data
from ecmoe.files import write_text, written
from ecmoe.model.transformer import Trunk, build_model, count_parameters, flops_per_token
from ecmoe.paths import content_of
from ecmoe.provenance import code_digest, commit, device_name, peak_flops, versions
from ecmoe.routers import arm_label
from ecmoe.training.lit import LitClassifier, LitModel
from ecmoe.training.recorder import Diverged, Recorder
from ecmoe.training.result import (
    Result,
    not_run,
    read_record,
    read_run,
    write_record,
    write_summary,
)
from ecmoe.training.trainer import new_trainer, repeatable, resolved_precision, strategy


def run_or_load(
    config: RunConfig,
    *,
    records: Path | None = None,
    train: bool = True,
    progress: bool = True,
    weights: bool = False,
) -> Result:
    """The result of a run: from `records`, from `runs/`, or by training it now.

    Args:
        config: the run; the same config is the same run.
        records: folder of committed results, looked at first; a run trained here is added to it.
        train: False: a run that is missing comes back as "not run".
        progress: print a line per validation to stderr.
        weights: train a finished run again if its weights aren't here. Not with records, which have none.

    Returns:
        a Result whose status is finished, diverged, failed or not run. A run that failed keeps its error
        and is tried again by the next call; one that was killed goes on from its last checkpoint.

    Raises:
        ConfigError: `data` is a local text of the same name as the run's, but another one. (Of records, and of texts that
            are no files of yours, such as the standard library's of another Python, that is a warning.)
    """
    if records is not None and (records / f"{config.name}.json").exists():
        result = read_record(records / f"{config.name}.json")
        _check_data(config, result, warn=True)
        return result
    folder = paths.runs() / config.name
    result = _finished(config, folder, weights)
    if result is None and not train:
        return read_run(folder) if (folder / "summary.json").exists() else not_run(config)
    if result is None:
        result = _train_once(config, folder, progress, weights)
    if records is not None and result.ok:
        write_record(records / f"{config.name}.json", result)
    return result


def free_memory() -> None:
    """Give back what a model that is no longer used holds on a GPU: its parts point at each other, and others may share it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def load_model(path: str | Path) -> Trunk:
    """The trained model of a run folder, in evaluation mode, its cut-offs included."""
    path = Path(path)
    config = RunConfig.from_yaml(path / "config.yaml")
    counts = torch.ones(config.vocab_size) if config.hash_table == "balanced" else None  # the table is in the file
    model = build_model(config, counts)
    model.load_state_dict(load_file(path / "model.safetensors"))
    return model.eval()


def _finished(config: RunConfig, folder: Path, weights: bool = False) -> Result | None:
    """The run, if nothing is left to do: a failed one is to be tried again, and one without the weights that are wanted."""
    if not (folder / "summary.json").exists():
        return None
    result = read_run(folder)
    if result.summary["status"] not in ("finished", "diverged"):
        return None
    _check_data(config, result, warn=not content_of(config.data))
    lost = weights and result.ok and not (folder / "model.safetensors").exists()
    return None if lost else result


def _train_once(config: RunConfig, folder: Path, progress: bool, weights: bool = False) -> Result:
    """Train under the run's lock: whoever comes second finds it done."""
    in_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    if config.num_nodes > 1 and not in_torchrun:
        raise ConfigError(
            f"num_nodes={config.num_nodes}: start torchrun --nnodes={config.num_nodes} -m ecmoe.training.run on every node"
        )
    folder.mkdir(parents=True, exist_ok=True)
    if in_torchrun and os.environ.get("RANK") != "0":
        return _train(config, folder, progress)
    lock = FileLock(folder.parent / f"{config.name}.lock")
    try:
        held = lock.acquire(timeout=0)
    except Timeout:
        if in_torchrun:
            raise SystemExit(f"another process trains {config.name}: wait for it, then call again") from None
        if progress:
            print(f"[{arm_label(config)} s{config.seed}] waiting: another process trains it", file=sys.stderr)
        held = lock.acquire()
    with held:
        result = _finished(config, folder, weights)
        if result is not None:
            return result
        if config.devices > 1 and not in_torchrun:
            return _train_by_torchrun(config, folder)
        try:
            return _train(config, folder, progress)
        finally:
            free_memory()


def _train_by_torchrun(config: RunConfig, folder: Path) -> Result:
    """Several ranks in a process group of their own: Lightning allows a notebook's kernel one device only.

    They hold no lock, so they mustn't outlive this call: their input is a pipe that ends with it, however it ends.
    """
    _write_yaml(config, folder / "config.yaml")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [
        f"--nproc-per-node={config.devices}",
        "-m",
        "ecmoe.training.run",
        str(folder / "config.yaml"),
        "--unlocked",
    ]
    (folder / "summary.json").unlink(missing_ok=True)  # an earlier failure's would be taken for this try's
    output = sys.stderr.fileno() if hasattr(sys.stderr, "fileno") else None
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=output) as torchrun:
        code = torchrun.wait()
    if not (folder / "summary.json").exists():
        raise RuntimeError(f"training {config.name} on {config.devices} devices ended with code {code}")
    return read_run(folder)


def _end_with_caller() -> None:
    """Where `_train_by_torchrun` is gone, or has been interrupted, its ranks would go on beside the next call's."""
    os.read(0, 1)  # not sys.stdin, whose lock an exit waits for
    os._exit(1)


def _train(config: RunConfig, folder: Path, progress: bool) -> Result:
    """Train, or go on from the last checkpoint; leaves summary.json whatever happens."""
    started = datetime.datetime.now(datetime.UTC)
    label = f"{arm_label(config)} s{config.seed}"
    recorder = Recorder(folder, label, progress, sharing())
    status, error, data, module = "finished", None, None, None
    leads = os.environ.get("RANK", "0") == "0"
    if leads:
        _write_yaml(config, folder / "config.yaml")
    try:
        data = open_data(config)
        data.prepare_data()
        data.setup("fit")
        torch.manual_seed(config.seed)
        module = LitClassifier(config) if config.images else LitModel(config, torch.as_tensor(data.token_counts))
        trainer = _trainer(config, recorder)
        checkpoint = folder / "last.ckpt"
        resume = str(checkpoint) if checkpoint.exists() else None
        if resume:
            step = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["global_step"]
            data.start_step = step * config.accumulate
            if progress and leads:
                print(f"[{label}] goes on from step {step}", file=sys.stderr)
        with repeatable(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*(does not have many workers|IterableDataset).*")
            warnings.filterwarnings("ignore", module="lightning.*")
            trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
            if config.steps not in recorder.rows:  # the last step is no multiple of eval_every
                trainer.validate(module, datamodule=data, verbose=False)
    except Diverged as diverged:
        status, error = "diverged", str(diverged)
    except KeyboardInterrupt:
        raise
    except Exception as failure:
        status, error = "failed", f"{type(failure).__name__}: {failure}"
        if leads:
            summary = _summary(config, recorder, status, error, started, data)
            write_summary(folder, summary)
        raise
    summary = _summary(config, recorder, status, error, started, data)
    state = _whole_state(module) if status == "finished" else None
    if leads:
        if state is not None:
            with written(folder / "model.safetensors") as temporary:
                save_file(state, temporary)
        write_summary(folder, summary)
        if state is not None:  # done: the weights are kept, the optimiser's state isn't
            (folder / "last.ckpt").unlink(missing_ok=True)
    return Result(summary, recorder.curve(), folder)


def open_data(config: RunConfig) -> RunData:
    """The text or the images of a config, in batches."""
    if config.images:
        from ecmoe.data.image_batches import ImageData

        return ImageData(config)
    return TextData(config)


def _trainer(config: RunConfig, recorder: Recorder) -> L.Trainer:
    return new_trainer(
        config,
        devices=config.devices,
        num_nodes=config.num_nodes,
        strategy=strategy(config),
        max_steps=config.steps,
        accumulate_grad_batches=config.accumulate,
        val_check_interval=config.eval_every * config.accumulate,
        check_val_every_n_epoch=None,
        limit_val_batches=config.eval_batches,
        num_sanity_val_steps=0,
        callbacks=[recorder],
        use_distributed_sampler=False,  # TextData deals out the batches itself
        inference_mode=False,
    )


def _whole_state(module: LitModel) -> dict[str, torch.Tensor]:
    """The model's tensors on the CPU, gathered from all ranks if sharded (so every rank must call it)."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(module.model, options=options)
    return {name: tensor.contiguous() for name, tensor in state.items()}


def _summary(
    config: RunConfig,
    recorder: Recorder,
    status: str,
    error: str | None,
    started: datetime.datetime,
    data: RunData | None,
) -> dict[str, Any]:
    curve = recorder.curve()
    last = curve.iloc[-1].to_dict() if len(curve) else {}
    val_loss = last.get("val_loss", math.nan) if status == "finished" else math.nan
    rate = float(curve["tokens_per_second"].median()) if len(curve) else math.nan
    count = count_parameters(config)
    world = config.devices * config.num_nodes
    return {
        "config": config.to_dict(),
        "name": config.name,
        "seed": config.seed,
        "schema": SCHEMA,
        "status": status,
        "error": error,
        "val_loss": val_loss,
        "val_loss_causal": last.get("val_loss_causal", math.nan) if status == "finished" else math.nan,
        "accuracy": last.get("accuracy", math.nan) if status == "finished" else math.nan,
        "perplexity": math.exp(val_loss) if val_loss < 700 and not config.images else math.nan,
        "bits_per_byte": val_loss / math.log(2) / getattr(data, "bytes_per_token", math.nan),
        "train_loss": last.get("train_loss", math.nan),
        "steps": int(last.get("step", 0)),
        "tokens": int(last.get("tokens", 0)),
        "seconds": last.get("seconds", math.nan),
        "tokens_per_second": rate,
        "step_ms": 1e3 * config.tokens_per_batch / rate if rate else math.nan,
        "mfu": rate * flops_per_token(config) / (peak_flops() * world),
        "parameters": count.total,
        "active_parameters": count.active,
        "device": device_name(),
        "precision": resolved_precision(config),
        "world_size": world,
        "sharing": recorder.shared,
        "commit": commit(),
        "code": code_digest(),
        "versions": versions("torch", "lightning", "datasets", "tokenizers", "numpy"),
        "data": getattr(data, "provenance", None),  # a run can fail before its data is there
        "started": started.isoformat(timespec="seconds"),
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "routing": {k: v for k, v in last.items() if k in ("dropped", "over_capacity", "max_load") or "share_" in k},
    }


def sharing() -> int:
    """Runs that train side by side on this device, said by who started them ($ECMOE_SHARING)."""
    return int(os.environ.get("ECMOE_SHARING", "1"))


def _check_data(config: RunConfig, result: Result, warn: bool) -> None:
    if is_other_data(config, result.summary.get("data")):
        said = f"data={config.data!r} is another text here than the one that {config.name} was trained on"
        if not warn:
            raise ConfigError(f"{said}: bring that back, or leave out {content_of(config.data)} for a run of its own")
        warnings.warn(said, stacklevel=4)


def _write_yaml(config: RunConfig, path: Path) -> None:
    write_text(path, yaml.safe_dump(config.to_dict(), sort_keys=False))


def main(arguments: list[str]) -> None:
    """`python -m ecmoe.training.run CONFIG...`, alone or on every rank of torchrun."""
    unlocked = "--unlocked" in arguments  # the caller holds the lock
    if unlocked:
        threading.Thread(target=_end_with_caller, daemon=True).start()
    config = RunConfig.from_yaml(*[a for a in arguments if a != "--unlocked"])
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world != config.devices * config.num_nodes:
        raise SystemExit(
            f"devices={config.devices} x num_nodes={config.num_nodes}, but {world} processes run: start "
            f"torchrun --nproc-per-node={config.devices} -m ecmoe.training.run CONFIG..."
        )
    folder = paths.runs() / config.name
    folder.mkdir(parents=True, exist_ok=True)
    result = _finished(config, folder)
    if result is None:
        result = _train(config, folder, True) if unlocked else _train_once(config, folder, True)
    if os.environ.get("RANK", "0") == "0":
        print(
            pd.Series(result.summary)[["name", "status", "val_loss", "accuracy", "bits_per_byte", "tokens_per_second"]]
        )


if __name__ == "__main__":
    main(sys.argv[1:])
