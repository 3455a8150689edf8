"""Repeats: a recorded run, trained anew aside, shows whether this code on this card ends in the same numbers.

Evidence is gathered over weeks while code is tidied. The same code repeats a run to the last digit on one kind of card; so
where other code repeats it, too, both compute the same, and their runs may be compared.
"""

import contextlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd

from ecmoe import paths
from ecmoe.config import ConfigError, RunConfig
from ecmoe.files import read_json, write_json
from ecmoe.provenance import code_digest, device_name
from ecmoe.training.result import Result, read_record, write_record

COMPARED = ("train_loss", "val_loss", "val_loss_causal")  # columns of a curve, with all digits that a record keeps


def again(name: str, scale: str, steps: int | None = None) -> dict[str, Any]:
    """Train a recorded run anew, aside, and compare its curve; nothing of the record is touched.

    Args:
        steps: stop at the first validation after so many steps of its schedule; None: at its end.

    Returns:
        run, router, device, recorded (code of the record), code, rows that were compared, equal, differs (where, and by how
        much). Kept in reports/SCALE/repeats where the card is the record's (elsewhere it says nothing of the code).

    Raises:
        ConfigError: no such record, or one that isn't trained in this process. Damaged: it isn't what was written.
    """
    path = paths.records(scale) / f"{name}.json"
    if not path.exists():
        raise ConfigError(f"{name}: has no record in {path.parent} that could be repeated; `ecmoe run` makes one")
    record = read_record(path)
    if "approach" in record.summary["config"] or record.summary.get("world_size", 1) > 1:
        raise ConfigError(f"{name}: only runs of one process, of text or images, are repeated")
    config = RunConfig.from_dict(record.summary["config"])
    curve = _curve(config, steps or config.steps, record)
    ours, theirs = (of.set_index("step")[list(COMPARED)] for of in (curve, record.curve))
    ours = ours[ours.index.isin(theirs.index)]
    differs = (ours - theirs.loc[ours.index]).abs().max().loc[lambda most: most > 0]
    found = {
        "run": name, "router": config.router, "device": device_name(), "recorded": record.summary.get("code"),
        "code": code_digest(), "rows": len(ours), "equal": bool(len(ours)) and ours.equals(theirs.loc[ours.index]),
        "differs": differs.to_dict(),
    }  # fmt: skip
    path = folder(scale) / f"{name}-{found['recorded']}-{found['code']}.json"
    longer = path.exists() and read_json(path, sealed=True)["rows"] > len(ours)  # an earlier one, which says more
    if found["device"] == record.summary["device"] and not longer:
        write_json(path, found, sealed=True)
    return found


def _curve(config: RunConfig, steps: int, record: Result) -> pd.DataFrame:
    """Trained now, with the digits of a record."""
    from lightning.pytorch.callbacks import LambdaCallback

    from ecmoe.training.gpus import place
    from ecmoe.training.run import free_memory, train_run

    class Enough(Exception):
        pass

    def stop(trainer: Any, _: Any) -> None:
        if trainer.global_step >= steps:  # its row is written
            raise Enough

    paths.cache().mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=paths.cache()) as aside, place() as where:
        folder = Path(aside)
        with contextlib.suppress(Enough):
            train_run(config, folder, callbacks=[LambdaCallback(on_validation_end=stop)], where=where)
        free_memory()  # for the next
        curve = pd.read_csv(folder / "curve.csv")
        write_record(folder / "record.json", Result(record.summary, curve))
        return read_record(folder / "record.json").curve


def folder(scale: str) -> Path:
    """Where repeats are kept, a file each, so that those of several machines add up."""
    return paths.records(scale).with_name("repeats")


def kept(scale: str) -> list[dict[str, Any]]:
    """All repeats of a scale. Raises Damaged: as `again`."""
    return [read_json(path, sealed=True) for path in sorted(folder(scale).glob("*.json"))]


def linked(runs: Sequence[Mapping[str, Any]], repeats: Sequence[Mapping[str, Any]]) -> list[str] | None:
    """The repeats which show that one code would give the numbers of all these runs (summaries); None where that isn't shown.

    Two codes compute the same of a router on a card if all repeats of its runs by the other were equal there.
    """
    if len({run.get("code") for run in runs}) < 2:
        return []
    of = [(run.get("device"), run["config"].get("router"), run.get("code")) for run in runs]
    by_pair = defaultdict(list)
    for one in repeats:
        by_pair[one["device"], one["router"], frozenset((one["recorded"], one["code"]))].append(one)
    equal = [(key, those) for key, those in by_pair.items() if len(key[2]) > 1 and all(one["equal"] for one in those)]
    same = {kind: {kind[2]} for kind in of}  # codes that compute the same as the run's own
    shown = []
    for kind, codes in same.items():
        pairs = {pair: those for (*where, pair), those in equal if tuple(where) == kind[:2]}
        while met := [pair for pair in pairs if pair & codes]:
            codes.update(*met)
            shown += [one["run"] for pair in met for one in pairs.pop(pair)]
    return list(dict.fromkeys(shown)) if set.intersection(*same.values()) else None
