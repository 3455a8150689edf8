"""Repeat recorded runs, to check whether this code on this kind of device reproduces their numbers.

The code is refactored while runs are collected. It repeats its own runs to the last digit on the same kind of device; so if
changed code does, too, both versions compute the same, and their runs may be compared.
"""

import sys
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from pkgutil import resolve_name
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd

from ecmoe import paths
from ecmoe.config import ConfigError, RunConfig
from ecmoe.files import Damaged, Stored, read_json, write_json
from ecmoe.provenance import code_digest, device_name
from ecmoe.study.plan import config_class
from ecmoe.training.result import Result, read_record, write_record

COMPARED = ("train_loss", "val_loss", "val_loss_causal")  # columns of a curve, compared at the precision of records
OF_TASKS = ("accuracy", "accuracy_task_known", "relatedness")  # compared of tasks in sequence, which have no curve


def again(name: str, scale: str, steps: int | None = None) -> dict[str, Any]:
    """Train a recorded run again in a temporary folder and compare its numbers with the record, which stays unchanged.

    steps: stop at the first validation after this many steps; None: train to the end, as tasks in sequence always are, which have
    no validations. Return run, router (see `_router`), device, recorded (the record's code digest), code (today's), rows (how many
    were compared), equal, differs (column -> largest difference, None if only one of both has some value), which is stored in
    reports/SCALE/repeats only on the record's kind of device. Raise a ConfigError if there is no such record, it was changed, or
    its run needs several processes."""
    path = paths.results(scale, "runs") / f"{name}.json"
    if not path.exists():
        right = f"`ecmoe run {name} --scale {scale}` makes one"
        raise ConfigError(f"{name}: there is no record in {path.parent} to repeat; {right}")
    record = read_record(path)
    if record.summary.get("world_size", 1) > 1:
        raise ConfigError(f"{name}: only single-process runs can be repeated")
    keys, recorded, code = record.summary["config"], record.summary.get("code"), code_digest()
    config = config_class(keys).from_dict(keys)
    path = paths.results(scale, "repeats") / f"{name}-{recorded}-{code}.json"
    # What an earlier repeat compared; a damaged file is an error before anything is trained.
    before = read_json(path, sealed=True)["rows"] if path.exists() else 0
    ours, theirs = (_compared(result) for result in (_trained(config, steps or config.steps, record), record))
    ours, theirs = ours[ours.index.isin(theirs.index)].align(theirs, axis=1)
    theirs = theirs.loc[ours.index]
    gap, most = ours.isna().ne(theirs.isna()).any(), (ours - theirs).abs().max()
    differs = {c: None if gap[c] else float(most[c]) for c in ours if not ours[c].equals(theirs[c])}
    found = {
        "run": name, "router": _router(keys), "device": device_name(), "recorded": recorded, "code": code,
        "rows": len(ours), "equal": bool(len(ours)) and not differs, "differs": differs,
    }  # fmt: skip
    if found["device"] == record.summary["device"] and len(ours) >= before:
        try:
            write_json(path, found, sealed=True)
        except OSError as error:  # such as a full disk, which must not hide what was found
            print(f"{path} can't be written: {error}", file=sys.stderr, flush=True)
    return found


def _router(config: Mapping[str, Any]) -> str:
    """Return the router of a run, after a word for the code that trains it if that isn't text's: "images dense", "joint dense"."""
    data = paths.plain(config["data"])
    images = data in paths.IMAGES or data.startswith(paths.IMAGES_PREFIX)
    return f"{config.get('approach', 'images' * images)} {config['router']}".strip()


def _compared(result: Result) -> pd.DataFrame:
    """Return the numbers of a run that are compared, indexed by step; of tasks in sequence by the steps up to each task's end."""
    config, summary = result.summary["config"], result.summary
    if "approach" not in config:
        return result.curve.set_index("step").reindex(columns=list(COMPARED))
    matrices = [pd.DataFrame(summary[name], dtype=float).add_prefix(f"{name} ") for name in OF_TASKS if name in summary]
    return pd.concat(matrices, axis=1).set_axis([config["steps"] * (k + 1) for k in range(config["tasks"])])


def _trained(config: RunConfig, steps: int, record: Result) -> Result:
    """Train the run and return its summary, or that of its record if it was stopped, and its curve, rounded as records are."""
    from lightning.pytorch.callbacks import LambdaCallback

    from ecmoe.training.gpus import place
    from ecmoe.training.run import free_memory

    class Enough(Exception):
        pass

    def stop(trainer: Any, _: Any) -> None:
        if trainer.global_step >= steps:  # the curve has this step's row already
            raise Enough

    paths.cache().mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=paths.cache()) as aside, place() as where:
        folder, train = Path(aside), resolve_name(config.trained_by)
        try:
            trained = train(config, folder, callbacks=[LambdaCallback(on_validation_end=stop)], where=where)
        except Enough:
            trained = Result(record.summary, pd.read_csv(folder / "curve.csv"))
        free_memory()  # for the next run
        path = folder / f"{record.summary['name']}.json"
        write_record(path, trained)
        return read_record(path)


def kept(scale: str) -> list[Stored]:
    """Return all repeats of a scale. Raise Damaged if one fails its checksum."""
    return [read_json(path, sealed=True) for path in sorted(paths.results(scale, "repeats").glob("*.json"))]


def covered(runs: Collection[str], scale: str) -> list[int]:
    """Return how many steps, from the first on, each equal repeat of these runs compared. Raise Damaged if its record is gone."""
    steps = []
    for repeat in (one for one in kept(scale) if one["equal"] and one["run"] in runs):
        record = paths.results(scale, "runs") / f"{repeat['run']}.json"
        if not record.exists():
            raise Damaged(repeat.path, f"the record of its run is gone, {record}")
        steps.append(int(_compared(read_record(record)).index[repeat["rows"] - 1]))
    return steps


def linked(runs: Sequence[Mapping[str, Any]], repeats: Sequence[Mapping[str, Any]]) -> list[str] | None:
    """Return the repeated runs which show that all code versions of these runs (summaries) compute the same; else None.

    Two versions agree for a router and device if every repeat there by one version, of a run recorded by the other, was equal.
    For runs as they were measured, nothing shows that versions of the measuring code agree."""
    # Runs have no such code, and measurements stored before it was recorded don't say theirs.
    measuring = {run["measures"] for run in runs if "measures" in run}
    if len(measuring) > 1:
        return None
    if len({run.get("code") for run in runs}) < 2:
        return []
    of = [(run.get("device"), _router(run["config"]), run.get("code")) for run in runs]
    by_pair = defaultdict(list)
    for one in repeats:
        by_pair[one["device"], one["router"], frozenset((one["recorded"], one["code"]))].append(one)
    equal = [(key, those) for key, those in by_pair.items() if len(key[2]) > 1 and all(one["equal"] for one in those)]
    same = {kind: {kind[2]} for kind in of}  # code versions that compute the same as the run's own
    shown = []
    for kind, codes in same.items():
        pairs = {pair: those for (*where, pair), those in equal if tuple(where) == kind[:2]}
        while met := [pair for pair in pairs if pair & codes]:
            codes.update(*met)
            shown += [one["run"] for pair in met for one in pairs.pop(pair)]
    return list(dict.fromkeys(shown)) if set.intersection(*same.values()) else None
