"""A study: arms times seeds, each a run. What notebooks call instead of a loop of their own."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from ecmoe import paths
from ecmoe.config import ConfigError, RunConfig
from ecmoe.training.result import Result, not_run


def configs(
    base: Mapping[str, Any], arms: Mapping[str, Mapping[str, Any]], seeds: Sequence[int]
) -> dict[str, list[RunConfig]]:
    """Label of the arm -> its config for each seed; all are checked before anything runs.

    Args:
        base: RunConfig keys that all arms share. arms: label -> the keys in which the arm differs; beside them
            `seeds`, where an arm needs others than the study's (a close comparison needs more).
        seeds: one run of each arm for each.

    Raises:
        ConfigError: names the arm beside key, value and remedy.
    """
    made = {}
    for label, changes in arms.items():
        try:
            keys = {**base, **changes}
            made[label] = [RunConfig.from_dict({**keys, "seed": seed}) for seed in keys.pop("seeds", seeds)]
        except ConfigError as error:
            raise ConfigError(f"arm {label!r}: {error}") from error
    return made


def with_seeds(
    arms: Mapping[str, Mapping[str, Any]], more_seeds: Mapping[str, Sequence[int]], second_look: Sequence[str] = ()
) -> dict[str, dict[str, Any]]:
    """The arms, some of them with seeds of their own: label -> seeds.

    Args:
        second_look: labels of those whose seeds were added to after a first look at their verdict (`stats.Effect.looks`).

    Raises:
        ConfigError: there is no arm of that label.
    """
    for key, labels in {"more_seeds": more_seeds, "second_look": second_look}.items():
        for label in labels:
            if label not in arms:
                raise ConfigError(f"{key} names arm {label!r}, but the arms are {', '.join(arms)}")
    return {
        label: {**keys} | ({"seeds": more_seeds[label]} if label in more_seeds else {}) for label, keys in arms.items()
    }


def run_study(
    base: Mapping[str, Any],
    arms: Mapping[str, Mapping[str, Any]],
    seeds: Sequence[int],
    *,
    scale: str = "smoke",
    train: bool = True,
) -> dict[str, list[Result]]:
    """Run or load every arm with every seed, seed by seed, so that a study cut short is still a paired one.

    Returns label -> a Result for each seed. A run that fails is reported and the others go on. At scale gpu and paper finished runs are looked for
    in reports/<scale>/runs first, and new ones are added there.
    """
    from ecmoe.training.run import run_or_load  # torch and Lightning: not needed to look at configs

    made = configs(base, arms, seeds)
    records = None if scale == "smoke" else paths.records(scale)
    results: dict[str, list[Result]] = {label: [] for label in made}
    for i in range(max(map(len, made.values()), default=0)):
        for label, by_seed in made.items():
            if i >= len(by_seed):
                continue
            config = by_seed[i]
            try:
                result = run_or_load(config, records=records, train=train)
            except Exception as error:  # its run folder keeps the error too
                print(f"[{label} s{config.seed}] failed: {error}", file=sys.stderr, flush=True)
                result = not_run(config)
                result.summary.update(status="failed", error=f"{type(error).__name__}: {error}")
            results[label].append(result)
    return results
