"""The answer in words: three sentences of what holds, what doesn't, and what that means for a choice of router; and its cost.

Every number comes from verdicts and records, so README and index can't say what the results don't.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ecmoe import paths
from ecmoe.files import read_json
from ecmoe.study.label import CONTRADICTED, IN_DIRECTION, NO_EFFECT, NOT_RUN, PLUMBING, REPRODUCED, UNDECIDED
from ecmoe.study.verdict import ClaimVerdict, judge_all

# What somebody who chooses a router asks: claim and part.
CHOICE = (
    ("C1", "all steps, renormalized gates"),
    ("C2", "even routing, each on its best path"),
    ("C9", "loss against the twin of equal FLOPs"),
)


@dataclass(frozen=True)
class Answer:
    """sentences: three, or one where nothing was run. cost: GPU hours of all runs, and the command that repeats them."""

    sentences: tuple[str, ...]
    cost: str

    def __str__(self) -> str:
        return " ".join([*self.sentences, self.cost])


def answer(scale: str, verdicts: Mapping[str, ClaimVerdict] | None = None) -> Answer:
    """The paragraph on a scale.

    Args:
        verdicts: of `judge_all`, where they are at hand.
    """
    found = list((judge_all(scale) if verdicts is None else verdicts).values())
    by_label = {
        label: [v for v in found if v.label == label]
        for label in (REPRODUCED, IN_DIRECTION, NO_EFFECT, CONTRADICTED, UNDECIDED, NOT_RUN, PLUMBING)
    }
    cost = _cost(scale)
    if by_label[PLUMBING]:
        return Answer(("Scale smoke shows that every part works, and says nothing about the paper.",), cost)
    if len(by_label[NOT_RUN]) == len(found):
        return Answer(("Nothing was run yet.",), cost)
    return Answer((_holds(found, by_label), _does_not(by_label), _choice(found)), cost)


def _holds(found: Sequence[ClaimVerdict], by_label: Mapping[str, Sequence[ClaimVerdict]]) -> str:
    size = next((v.rests_on for v in found if v.claim == "C1" and v.rests_on.runs), None)
    size = size or next((v.rests_on for v in found if v.rests_on.runs), None)
    at = f"At {size.size}, trained on {size.tokens / 1e6:,.0f} million tokens, " if size else ""
    good, partly = by_label[REPRODUCED], by_label[IN_DIRECTION]
    run = len(found) - len(by_label[NOT_RUN])
    claims = f" of the paper's {len(found)} claims"
    if run < len(found):
        at, claims = (
            f"Of the paper's {len(found)} claims {run} {'was' if run == 1 else 'were'} run so far: {at[:1].lower()}{at[1:]}",
            "",
        )
    if not good and not partly:
        return f"{at}{'none' if at else 'None'}{claims} holds."
    parts = [f"{len(good)}{claims} hold{'s' * (len(good) == 1)}" + _listed(good)]
    if partly:
        parts.append(f"{len(partly)} hold{'s' * (len(partly) == 1)} in direction, but not by as much" + _listed(partly))
    text = f"{at}{', and '.join(parts)}."
    return text[0].upper() + text[1:]


def _does_not(by_label: Mapping[str, Sequence[ClaimVerdict]]) -> str:
    said = {
        CONTRADICTED: "the opposite was found for {}",
        NO_EFFECT: "no effect was found for {}",
        UNDECIDED: "{} undecided",
        NOT_RUN: "{} not run yet",
    }
    parts = []
    for label, text in said.items():
        some = by_label[label]
        if some:
            count = f"{len(some)}" if "for" in text else f"{len(some)} {'is' if len(some) == 1 else 'are'}"
            names = f" ({', '.join(v.claim for v in some)})" if label == NOT_RUN else _listed(some)
            parts.append(text.format(count) + names)
    if not parts:
        return "None is contradicted, undecided or without an effect."
    text = "; ".join(parts) + "."
    return text[0].upper() + text[1:]


def _choice(found: Sequence[ClaimVerdict]) -> str:
    sentences = {(v.claim, part.name): part for v in found for part in v.parts}
    parts = [sentences[key].sentence for key in CHOICE if key in sentences and sentences[key].estimate is not None]
    if not parts:
        return "What that means for a choice of router, no run tells yet."
    return f"For a choice of router: {'; '.join(parts)}."


def _listed(verdicts: Sequence[ClaimVerdict]) -> str:
    return f" ({'; '.join(f'{v.claim}: {v.about.short}' for v in verdicts)})" if verdicts else ""


def _cost(scale: str) -> str:
    runs = [read_json(path)["summary"] for path in sorted(paths.records(scale).glob("*.json"))]
    hours = sum(run.get("seconds") or 0 for run in runs) / 3600
    cards = ", ".join(sorted({run["device"] for run in runs if run.get("device")}))
    again = f"`make reproduce{f' SCALE={scale}' * (scale != 'smoke')}`"
    if not runs:
        return f"{again} runs it."
    return f"All {len(runs)} runs took {hours:.1f} hours of training on {cards}; {again} repeats them."
