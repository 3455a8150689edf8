"""The parts of README.md that are made of committed results: the answer, its figure, the claims, the layer's speed.

Each lies between two marks, such as <!-- claims:begin --> and <!-- claims:end -->; a test fails when what lies
there is not what the results give.
"""

from __future__ import annotations

import html
from collections.abc import Callable
from functools import cache

from ecmoe import paths
from ecmoe.files import write_text
from ecmoe.report import plots
from ecmoe.report.plots.parts import Plot
from ecmoe.report.scoreboard import CAPTION, claim_table, effects
from ecmoe.study import speed
from ecmoe.study.answer import answer
from ecmoe.study.verdict import ClaimVerdict, judge_all


def update(scale: str = "gpu") -> bool:
    """Draw the figures, fill in the README's parts; says whether the text changed.

    Raises:
        ValueError: a mark is missing, or there twice.
    """
    home = paths.root()
    path = home / "README.md"
    old = new = path.read_text(encoding="utf-8")
    for name, text in sections(scale).items():
        begin, _, end = _parts(new, name)
        new = f"{begin}\n{text}\n{end}"
    for name, draw in PICTURES.items():
        plot, _ = draw(scale)
        if plot.figure is not None:
            plot.save(home / image(name, scale))
    if new != old:
        write_text(path, new)
    return new != old


def sections(scale: str = "gpu") -> dict[str, str]:
    """Name of a part -> the Markdown that the committed results give."""
    found = {"claims": claim_table(_verdicts(scale), f"reports/{scale}/scoreboard.md#{{claim}}")}
    for name, draw in PICTURES.items():
        plot, caption = draw(scale)
        shown = f'<img src="{image(name, scale)}" alt="{html.escape(plot.alt)}">'
        found[name] = f"{shown}\n\n{caption}" if plot.figure is not None else f"Not run yet: {caption}"
    found["evidence"] = f"{answer(scale, _verdicts(scale))}\n\n{found['evidence']}"
    return found


def image(name: str, scale: str) -> str:
    """A figure's file, as seen from the README."""
    return f"reports/{scale}/readme-{name}.png"


def part(text: str, name: str) -> str:
    """What lies between the marks of that name."""
    return _parts(text, name)[1]


def _parts(text: str, name: str) -> tuple[str, str, str]:
    """What stands up to the first mark, with it; between the two; and from the second on."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"README.md must hold {begin} and then {end}, once each")
    (before, rest), after = text.split(begin), text.split(end)[1]
    return before + begin, rest.split(end)[0], end + after


@cache
def _verdicts(scale: str) -> dict[str, ClaimVerdict]:
    return judge_all(scale)


# A figure, and what it shows.


def _evidence(scale: str) -> tuple[Plot, str]:
    return effects(_verdicts(scale)), CAPTION


def _shares(scale: str) -> tuple[Plot, str]:
    plan = speed.plan(scale)
    found = speed.measured(speed.jobs(**plan), scale=scale, measure=False)
    size = next(iter(plan["layer_sizes"]))
    device = (found[speed.layer_file(size)] or {}).get("setting", {}).get("device", "no device yet")
    return plots.share_of_floor(speed.layers(found, [size])), (
        f"Speed of the layer, routing included, as a share of its matrix products alone, on one {device}; *triton* is our path on a GPU, rows without it "
        "are plain PyTorch."
    )


PICTURES: dict[str, Callable[[str], tuple[Plot, str]]] = {"evidence": _evidence, "speed": _shares}
