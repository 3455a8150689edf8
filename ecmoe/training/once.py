"""Run each config at most once: load its result if it exists, otherwise compute it in a single process.

Stored results are used only if their checksums match (see `ecmoe.training.result`). If a finished run has to be
computed again, because its weights are missing or a file is damaged, the new files are written to its subfolder `again`
and replace the old ones once the run has finished. Finished work is never lost, even if the process is killed."""

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ecmoe import paths
from ecmoe.files import Damaged
from ecmoe.training import result as results
from ecmoe.training.ranks import in_torchrun, rank
from ecmoe.training.result import FILES, Result

DONE = ("finished", "diverged")  # statuses that another attempt would not change


class LostLock(OSError):
    """The run's lock file is gone: another process may compute the run now, so this one must stop writing."""


StillOurs = Callable[[], None]
Make = Callable[[Path, StillOurs], Result]


def once(config: Any, make: Make, *, records: Path | None, train: bool, weights: bool, progress: bool) -> Result:
    """Return the result of a run: from `records`, from `runs/`, or by computing it now. Configs with the same name are
    the same run. Other arguments are as in `ecmoe.run_or_load`.

    make: (folder, still_ours) -> Result. Computes the run, or resumes what an interrupted call left in the folder. It
    calls still_ours, which raises LostLock, before writing. It writes the summary last (`write_run`)."""
    record = None if records is None else Path(records) / f"{config.name}.json"
    if record is not None and record.exists():
        return results.read_record(record)
    folder = paths.runs() / config.name
    result = _done(config, folder, weights, say=train and progress, raises=not train)
    if result is None and not train:
        return results.read_run(folder) if (folder / "summary.json").exists() else results.not_run(config)
    if result is None and rank():
        return make(_place(folder), lambda: None)  # rank 0 holds the lock
    if result is None:
        with lock(folder, progress) as still_ours:  # another process may have finished it meanwhile
            result = _done(config, folder, weights, say=False) or _made(config, folder, make, still_ours)
    if record is not None and result.ok:
        results.write_record(record, result)
    return result


def _done(config: Any, folder: Path, weights: bool, *, say: bool, raises: bool = False) -> Result | None:
    """Return the stored result, or None if the run must be computed: missing, failed, damaged, or without `weights`."""
    if not (folder / "summary.json").exists():
        return None
    try:
        result = _stored(folder)
        if result.summary["name"] != config.name:
            raise Damaged(folder / "summary.json", f"it holds the run {result.summary['name']}")
        if result.summary["status"] not in DONE:
            return None
        if weights and result.ok:
            results.checked_weights(folder)
    except FileNotFoundError:  # the weights are missing
        return None
    except Damaged as damage:
        if raises:
            raise
        if say:
            print(f"{damage}; it is computed again now, next to the old files", file=sys.stderr, flush=True)
        return None
    return result


def _place(folder: Path) -> Path:
    """Return the folder in which to compute the run: `again` if the run's own folder holds, or may hold, a done run."""
    done = (folder / "summary.json").exists()
    with suppress(FileNotFoundError, Damaged):
        done = results.read_run(folder).summary["status"] in DONE
    return folder / "again" if done else folder


def _made(config: Any, folder: Path, make: Make, still_ours: StillOurs) -> Result:
    into = _place(folder)
    into.mkdir(parents=True, exist_ok=True)
    try:
        for left in into.glob(".*.tmp"):  # left by a process that was killed while writing
            left.unlink()
        (into / "summary.json").unlink(missing_ok=True)  # of an earlier, failed attempt
        result = make(into, still_ours)
    except (KeyboardInterrupt, SystemExit):  # Ctrl-C or SIGTERM
        if (into / "last.ckpt").exists():
            print(f"[{config.name}] interrupted: the same command continues from the last checkpoint", file=sys.stderr)
        raise
    except Exception as failure:
        keep_failure(config, into, failure)
        raise
    return _stored(folder) if into != folder and result.ok else result


def keep_failure(config: Any, folder: Path, failure: Exception) -> None:
    """Write why the run failed to its folder, unless that holds a done run, or another process may write to it."""
    with suppress(OSError):
        if _place(folder) == folder and not isinstance(failure, LostLock):
            said = {"status": "failed", "error": f"{type(failure).__name__}: {failure}"}
            results.write_run(folder, results.not_run(config).summary | said)


def _stored(folder: Path) -> Result:
    """Return the run in the folder. First replace its files by those in `again`, if all of these are complete; the summary
    last. After a kill in between, each file is in one of the folders (see `place_of`), and the next call continues."""
    again = folder / "again"
    if results.place_of(folder, "summary.json").parent == again:
        results.read_run(folder, verified=FILES)  # or Damaged
        for name in (*FILES, "summary.json"):
            if (again / name).exists():
                os.replace(again / name, folder / name)
        shutil.rmtree(again)
    return results.read_run(folder)


@contextmanager
def lock(folder: Path, progress: bool) -> Iterator[StillOurs]:
    """Hold the run's lock, waiting for it if needed. Yield a function that raises LostLock if the lock file is lost."""
    path = folder.parent / f"{folder.name}.lock"
    free = FileLock(path)
    try:
        held = free.acquire(timeout=0)
    except Timeout:
        if in_torchrun():
            raise SystemExit(f"another process is computing {folder.name}: wait for it, then call again") from None
        if progress:
            print(f"[{folder.name}] waiting: another process is computing it", file=sys.stderr, flush=True)
        held = free.acquire()
    with held:
        inode = path.stat().st_ino

        def still_ours() -> None:
            if not path.exists() or path.stat().st_ino != inode:
                raise LostLock(f"{path} was removed while {folder.name} was computed, so another process may compute it "
                                   "too: this one stops; call again to resume from the last checkpoint")  # fmt: skip

        yield still_ours
