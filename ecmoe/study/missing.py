"""What pages lack, runs and measurements, and how they come by it on a machine that needs no Jupyter."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from ecmoe import paths
from ecmoe.config import ConfigError, RunConfig
from ecmoe.files import read_json
from ecmoe.measures import measure
from ecmoe.report.scoreboard import DONE, study_folder
from ecmoe.study.parameters import check_scale


class Missing(NamedTuple):
    """A run that a page lacks, or of which it lacks measurements: `measures`, as `measure.take` has them."""

    page: str
    arm: str
    config: RunConfig
    measures: Mapping[str, Mapping[str, Any]]


def missing(scale: str, pages: Sequence[str] = ()) -> list[Missing]:
    """What the pages of a scale, or some of them, rest on and that isn't there.

    Seed by seed, as a page trains them, each run once, with the measurements that all these pages want; runs of continual
    learning are left out, as they are no `RunConfig`.

    Raises:
        ParameterError: no such scale. ConfigError: no page has been drawn at that scale; no such page; or a page that
        another version made, whose config now means another run.
    """
    check_scale(scale)
    kept = {path.stem: read_json(path) for path in sorted(study_folder(scale).glob("*.json"))}
    if not kept:
        raise ConfigError(
            f"no page has been drawn at scale {scale}, so none says what it lacks: make report SCALE={scale}"
        )
    for page in pages:
        if page not in kept:
            raise ConfigError(
                f"page {page!r}: nothing is kept of it at scale {scale}; there are {', '.join(kept) or 'none'}"
            )
    found: dict[str, Missing] = {}
    for page in pages or kept:
        for name, run in sorted(kept[page].items(), key=lambda named: named[1]["seed"]):
            there = run["status"] in DONE or (paths.records(scale) / f"{name}.json").exists()
            lacking = _lacking(name, run, scale)
            if (there and not lacking) or "config" not in run:
                continue
            config = RunConfig.from_dict(run["config"])
            if config.name != name:  # a default is another now
                raise ConfigError(
                    f"page {page!r}: run {name} would be {config.name} today; draw the page again: make report SCALE={scale}"
                )
            first = found.setdefault(name, Missing(page, run["arm"], config, {}))
            found[name] = first._replace(measures={**first.measures, **lacking})
    return list(found.values())


def _lacking(name: str, run: Mapping[str, Any], scale: str) -> dict[str, Any]:
    """The measurements of a run that its page lacked when it was drawn, and that nobody has taken since."""
    there = measure.folder(name, scale)
    return {what: how for what, how in run.get("measures", {}).items() if not (there / f"{what}.json").exists()}


def complete(wanted: Sequence[Missing], scale: str, jobs: int, deadline: float) -> Iterator[tuple[Missing, str]]:
    """Each with the status that its run ends with, or "failed: why", as they end; what is done is kept at once.

    Args:
        jobs: processes side by side; 1: this one. deadline: by time.monotonic(); nothing begins after it.
    """
    if jobs > 1:
        from ecmoe.study.side_by_side import side_by_side

        yield from side_by_side(partial(_complete, scale=scale), wanted, jobs, deadline)
        return
    for one in wanted:
        if time.monotonic() > deadline:
            return
        try:
            said = _complete(one, scale)
        except Exception as error:  # kept in the run's folder; the others are still wanted
            said = f"failed: {type(error).__name__}: {error}"
        yield one, said


def _complete(one: Missing, scale: str) -> str:
    """Train the run, unless it is there, and measure what is lacking."""
    from ecmoe.training.run import run_or_load

    result = run_or_load(one.config, records=paths.records(scale))
    measure.take(result, one.measures, scale)
    return result.summary["status"]
