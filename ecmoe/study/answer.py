"""Summarise all claims: which hold, which don't, what that means for the choice of a router, and what the runs cost.

Every number is computed from verdicts and records, so README and index can't disagree with the results.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ecmoe import paths
from ecmoe.files import read_json
from ecmoe.study import verdict
from ecmoe.study.units import amount, counted, duration, span
from ecmoe.study.verdict import NOT_RUN, ClaimVerdict, capital

# (claim, part) of the comparisons that matter when choosing a router.
CHOICE = (
    ("C1", "all steps, renormalized gates"),
    ("C1", "against top-2 with nothing dropped"),
    ("C1", "steps for an equal loss, renormalized gates"),
    ("C6", "modulo against EC-CF1, at equal compute"),
    ("C2", "even routing, each on its best path"),
    ("C9", "loss against the twin of equal FLOPs"),
    ("C9", "time to the loss of the twin of equal FLOPs"),
)
NO_CHOICE = "No run shows yet what this means for the choice of a router."
# Label -> sentence template; filled with the number of claims that have the label, and which they are.
HOLDS = {
    verdict.REPRODUCED: "{n} hold{s} ({said})",
    verdict.IN_DIRECTION: "{n} hold{s} in direction ({said})",
}
OTHERS = {
    verdict.CONTRADICTED: "{n} {are} contradicted ({said})",
    verdict.NO_EFFECT: "no effect was found for {n} ({said})",
    verdict.UNDECIDED: "{n} {are} undecided ({ids})",
    NOT_RUN: "{n} {are} not run yet ({ids})",
}


def answer(verdicts: Mapping[str, ClaimVerdict]) -> list[str]:
    """Return what verdicts (from `judge_all`) say: what holds, what doesn't, and what that means for a choice of router;
    or one sentence if nothing can be concluded."""
    found, labels = list(verdicts.values()), {one.label for one in verdicts.values()}
    if verdict.PLUMBING in labels:
        return ["Scale smoke shows that every part works, and says nothing about the paper."]
    if labels <= {NOT_RUN}:
        return ["Nothing was run yet."]
    others = _told(found, OTHERS) or ["none is contradicted, undecided or without an effect"]
    parts = {(one.about.id, part.name): part.sentence for one in found for part in one.parts if part.effect.n}
    first, *more = [parts[key] for key in CHOICE if key in parts] or [""]
    choice = f"For a choice of router: {'. '.join([first, *map(capital, more)])}." if first else NO_CHOICE
    return [_holds(found), capital(f"{'; '.join(others)}."), choice]


def _holds(found: Sequence[ClaimVerdict]) -> str:
    kinds = Counter("limitation" if one.about.id.startswith("L") else "claim" for one in found)
    claims = " and ".join(counted(n, kind) for kind, n in kinds.items())
    run = [one for one in found if one.label != NOT_RUN]
    so_far = f", {len(run)} {'was' if len(run) == 1 else 'were'} run so far" if len(run) < len(found) else ""
    bases = [one.rests_on for one in run if one.rests_on.runs]
    at = ""
    for size, n in Counter(base.size for base in bases).most_common(1):  # some also rest on shorter runs of that size
        same = [base for base in bases if base.size == size]
        tokens = min(base.tokens[0] for base in same), max(base.tokens[1] for base in same)
        at = f" ({n} of them tested on models of {size}, trained on {replace(same[0], tokens=tokens).trained})"
    return f"Of the paper's {claims}{so_far}{at}: {', and '.join(_told(found, HOLDS)) or 'none holds'}."


def _told(found: Sequence[ClaimVerdict], texts: Mapping[str, str]) -> list[str]:
    """Return one clause for each label in `texts` that at least one claim has."""
    told = []
    for label, text in texts.items():
        if some := [one for one in found if one.label == label]:
            said, ids = "; ".join(map(_named, some)), ", ".join(one.about.id for one in some)
            s, are = ("s", "is") if len(some) == 1 else ("", "are")
            told.append(text.format(n=len(some), s=s, are=are, said=said, ids=ids))
    return told


def _named(one: ClaimVerdict) -> str:
    """Return a claim's number and what it says; or, if only some of its parts have its label, the names of these parts,
    and how many are undecided, with the numbers of the first."""
    if one.said == one.label:
        return f"{one.about.id}: {one.about.short}"
    names = [f"\u201c{part.name}\u201d" for part in one.deciding if part.label == one.label]
    text = f"{one.about.id}, in {len(names)} of {len(one.deciding)} parts: {' and '.join(names)}"
    undecided = [part for part in one.deciding if part.label == verdict.UNDECIDED]
    if undecided:
        first = undecided[0]
        are, such = ("are", "such as ") if len(undecided) > 1 else ("is", "")
        text += f", while {len(undecided)} {are} undecided, {such}\u201c{first.name}\u201d: "
        text += amount(first.effect.value, first.unit, compares=first.compares)
        text += f", {span(*first.interval, first.unit)}" if first.interval else ""
    return text


def cost(scale: str) -> str:
    """Return in words what a scale's runs took, and the command that continues. Raise Damaged if a record was changed."""
    runs = [read_json(path, sealed=True)["summary"] for path in sorted(paths.results(scale, "runs").glob("*.json"))]
    hours = sum(run.get("seconds") or 0 for run in runs) / 3600
    cards = ", ".join(sorted({run["device"] for run in runs if run.get("device")}))
    if not runs:
        return f"`{reproduce(scale)}` runs it."
    return f"All {len(runs)} runs took {duration(hours)} of training steps on {cards}; `{reproduce(scale)}` loads them and trains what is missing."


def reproduce(scale: str) -> str:
    """Return the command that trains what a scale lacks."""
    return f"make reproduce{f' SCALE={scale}' * (scale != 'smoke')}"
