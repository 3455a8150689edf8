"""run_or_load: load the result of a run, or train it if there is none."""

import gc
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import lightning as L
import torch
from safetensors.torch import save_file
from torch import nn
from torch._functorch import config as functorch
from torch._inductor import config as inductor
from torch.overrides import TorchFunctionMode

from ecmoe import paths
from ecmoe.config import ConfigError, RunConfig
from ecmoe.data.batches import TextData
from ecmoe.data.corpus import source_sha256
from ecmoe.data.images import ImageData
from ecmoe.files import sealed, written
from ecmoe.provenance import by_other_code
from ecmoe.training.gpus import Place, number, place
from ecmoe.training.lit import LitClassifier, LitModel
from ecmoe.training.once import StillOurs, once
from ecmoe.training.ranks import by_torchrun, check_world, in_torchrun, rank
from ecmoe.training.recorder import Diverged, Recorder
from ecmoe.training.result import Result, write_config, write_run
from ecmoe.training.summary import circumstances, summarize
from ecmoe.training.trainer import check_machine, new_trainer, repeatable, resolved_precision, strategy

gc.freeze()  # what has been imported stays, so no garbage collection needs to search it


def run_or_load(
    config: RunConfig | Mapping[str, Any],
    *,
    records: Path | None = None,
    train: bool = True,
    progress: bool = True,
    weights: bool = False,
    callbacks: Sequence[L.Callback] = (),
    loggers: str | Sequence[Any] = (),
) -> Result:
    """Return the result of a run: from `records`, from `runs/`, or by training it now.

    Args:
        config: the run's config, or its keys and values; the same config is the same run.
        records: folder of committed results, searched first; a finished result from elsewhere is added to it.
        train: False: return a missing run as "not run" instead of training it.
        progress: print a line per validation to stderr.
        weights: train a finished run again if its weights aren't here. Without effect on records, which have none.
        callbacks, loggers: Lightning's, for a run that is trained now. A logger may be a name: csv, tensorboard, wandb.

    Returns:
        a Result with status finished, diverged, failed, stopped (by a callback, before its last step) or not run. The
        next call tries a failed run again, and continues a stopped or killed run from its last checkpoint. A run in
        `runs/` that other code has trained is returned with a warning.

    Raises:
        ConfigError: this machine can't train the run; or the local text that `data` names differs from the one that the
            stored run was trained on. (For records, and for texts that aren't files of yours, such as the standard
            library of another Python, this is only a warning.)
        Damaged: with train=False, a stored file differs from what was written. (Otherwise, the run is trained again.)"""
    config = RunConfig.of(config)

    def make(folder: Path, still_ours: StillOurs) -> Result:
        # All that can be wrong is found before any work is done.
        check_machine(config)
        number("ECMOE_SHARING", 1)
        by_processes = config.devices > 1 and not in_torchrun()
        if by_processes and (callbacks or loggers):
            raise ConfigError(f"devices={config.devices} with callbacks or loggers: they can't be passed to subprocesses; "
                              f"start torchrun --nproc-per-node={config.devices} with a script that calls run_or_load")  # fmt: skip
        writers = [_logger(logger, folder) for logger in ([loggers] if isinstance(loggers, str) else loggers)]
        if by_processes:
            return by_torchrun(config, folder, still_ours)
        with place(progress) if config.ranks == 1 else nullcontext(Place()) as where:
            return resolve_name(config.trained_by)(config, folder, still_ours, progress, callbacks, writers, where)

    check_world(config)
    result = once(config, make, records=records, train=train, weights=weights, progress=progress)
    then, here = (result.summary.get("data") or {}).get("source_sha256"), None
    with suppress(ConfigError):  # it isn't here. (To compare tokens instead of their source could take long.)
        here = source_sha256(config.data)
    if None not in (then, here) and then != here:
        said = f"data={config.data!r} differs from the data that {config.name} was trained on"
        if result.path and (content := paths.content_of(config.data)):
            raise ConfigError(f"{said}: restore the files, or leave out {content} to train a new run")
        warnings.warn(said, stacklevel=2)
    if result.path and by_other_code(result.summary):  # records are compared by repeats
        warnings.warn(f"{config.name} was trained by other code: delete {result.path} to train it again", stacklevel=2)
    return result


def train_run(
    config: RunConfig,
    folder: Path,
    still_ours: StillOurs = lambda: None,
    progress: bool = True,
    callbacks: Sequence[L.Callback] = (),
    loggers: Sequence[Any] = (),
    where: Place | None = None,
    keep_weights: bool = True,
) -> Result:
    """Train a run, or resume it from the last checkpoint in `folder`; the summary, written last, says how it ended.

    still_ours: as in `once`. callbacks, loggers: Lightning's objects, no names. where: the run's slot on a GPU; None:
    each of its ranks uses one GPU. keep_weights: False: don't store the weights of the finished run."""
    _share_compiled_code()
    made, leads, where = circumstances(), rank() == 0, where or Place()
    if leads:
        write_config(folder, config)
    data = ImageData(config) if config.images else TextData(config)
    data.prepare_data()
    data.setup("fit")
    torch.manual_seed(config.seed)
    with _Undrawn():
        module = LitClassifier(config) if config.images else LitModel(config, torch.as_tensor(data.token_counts))
    if resolved_precision(config) == "64-true":  # else Lightning would restore checkpoints in float32
        module.double()
    recorder = Recorder(folder, progress, where.sharing, still_ours)
    trainer = new_trainer(
        config,
        devices=config.devices if where.gpu is None else [where.gpu],
        num_nodes=config.num_nodes,
        strategy=strategy(config),
        max_steps=config.steps,
        accumulate_grad_batches=config.accumulate,
        val_check_interval=config.eval_every * config.accumulate,
        check_val_every_n_epoch=None,
        limit_val_batches=config.eval_batches,
        num_sanity_val_steps=0,
        callbacks=[recorder, *callbacks],
        logger=list(loggers),
        enable_checkpointing=any(isinstance(callback, L.pytorch.callbacks.Checkpoint) for callback in callbacks),
        default_root_dir=folder,
        use_distributed_sampler=False,  # TextData distributes the batches itself
        inference_mode=False,
    )
    checkpoint = folder / "last.ckpt"
    step = _step_of(checkpoint, leads)
    if step is not None:
        data.start_step = step * config.accumulate
        if progress and leads:
            print(f"[{config.name}] resumes from step {step}", file=sys.stderr)
    # The ranks of a run end at once: one that waits could wait for another that has ended.
    with recorder.patient() if config.ranks == 1 else nullcontext():
        status, error = "finished", None
        try:
            with repeatable(), warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*(does not have many workers|IterableDataset).*")
                warnings.filterwarnings("ignore", module="lightning.*")
                trainer.fit(module, datamodule=data, ckpt_path=None if step is None else checkpoint, weights_only=True)
                if trainer.global_step < config.steps:
                    status = "stopped"
                    error = f"a callback stopped it after step {trainer.global_step} of {config.steps}"
                    recorder.save(trainer)
                elif config.steps not in recorder.rows:  # the last step isn't a multiple of eval_every
                    trainer.validate(module, datamodule=data, verbose=False)
        except Diverged as diverged:
            status, error = "diverged", str(diverged)
        state = _whole_state(module) if status == "finished" and keep_weights else None
        curve = recorder.curve()
        summary = summarize(config, curve, data, made, status=status, error=error, sharing=recorder.shared)
        if leads:
            still_ours()
            if state is not None:
                with written(folder / "model.safetensors") as temporary:
                    save_file(state, temporary)
            write_run(folder, summary)
            if state is not None:  # the run is done, and the optimiser's state no longer needed
                checkpoint.unlink(missing_ok=True)
    return Result(summary, curve, folder)


def free_memory() -> None:
    """Free the GPU memory of unused models for other processes. Models have reference cycles: collect garbage first."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _logger(logger: Any, folder: Path) -> Any:
    """Return the logger, or create the logger of that name, which writes to the run's folder."""
    if not isinstance(logger, str):
        return logger
    known = {"csv": "CSVLogger", "tensorboard": "TensorBoardLogger", "wandb": "WandbLogger"}
    if logger not in known:
        raise ConfigError(f"logger {logger!r}: must be one of {', '.join(known)}, or a Lightning logger")
    keys = {"project": "ecmoe", "name": folder.name} if logger == "wandb" else {"name": logger, "version": ""}
    try:
        return getattr(L.pytorch.loggers, known[logger])(save_dir=folder, **keys)
    except ModuleNotFoundError as error:
        raise ConfigError(f"logger {logger!r} needs a package: pip install {logger}") from error


def _step_of(checkpoint: Path, say: bool) -> int | None:
    """Return the step after which a checkpoint was written; None if it is missing, or damaged, which is printed."""
    if not checkpoint.exists():
        return None
    try:
        if not sealed(checkpoint):
            raise ValueError("its SHA-256 differs")
        return int(torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["global_step"])
    except Exception as error:  # damaged bytes may raise anything
        if say:
            print(f"{checkpoint} is damaged ({error}); the run starts again", file=sys.stderr, flush=True)
        return None


def _share_compiled_code() -> None:
    """Share code compiled by Inductor, Triton and QuACK between runs of this machine: later runs of a shape start fast."""
    caches = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton", "QUACK_CACHE_DIR": "quack"}
    default = "torchinductor_"  # prefix of torch's own folder, which an import may have set
    for variable, folder in caches.items():
        if Path(os.environ.get(variable, default)).name.startswith(default):
            os.environ[variable] = str(paths.cache() / folder)
    # By default, torch stores no block that has an autograd function or switches autocast off: each process would derive
    # its backward pass anew. All that such a block depends on is in its traced graph, the key under which it is stored.
    functorch.autograd_cache_allow_custom_autograd_functions = True
    autocast = ("torch.amp.autocast_mode._enter_autocast", "torch.amp.autocast_mode._exit_autocast")
    inductor.unsafe_marked_cacheable_functions |= dict.fromkeys(autocast, "arguments only")


class _Undrawn(TorchFunctionMode):
    """Skip the default values of parameters, but not of buffers: `Trunk.initialize` draws all parameters, faster."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (nn.init.normal_, nn.init.kaiming_uniform_) and isinstance(kwargs["tensor"], nn.Parameter):
            return kwargs["tensor"]
        return func(*args, **kwargs)


def _whole_state(module: LitModel) -> dict[str, torch.Tensor]:
    """Return the model's tensors on the CPU, gathered from all ranks if sharded (so every rank must call it)."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    state = get_model_state_dict(module.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return {name: tensor.contiguous() for name, tensor in state.items()}
