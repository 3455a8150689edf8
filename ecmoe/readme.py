"""The parts of README.md that are made of committed results: the first figure and the claim table.

Each lies between two marks, such as <!-- claims:begin --> and <!-- claims:end -->; a test fails when what lies
there is not what the results give.
"""

from __future__ import annotations

import html
import os

from ecmoe import paths, plots
from ecmoe.parameters import merge_parameters, parameter_files
from ecmoe.plots.parts import Plot
from ecmoe.results import table
from ecmoe.scoreboard import claim_table
from ecmoe.study import run_study

NOTEBOOK = "01_convergence"


def update(scale: str = "gpu") -> bool:
    """Draw the figure, fill in the README's parts; says whether the text changed.

    Raises:
        ValueError: a mark is missing, or there twice.
    """
    home = paths.root()
    figure(scale).figure.savefig(home / image(scale), dpi=150, metadata={"Software": None})
    path = home / "README.md"
    old = new = path.read_text(encoding="utf-8")
    for name, text in sections(scale).items():
        new = new.replace(f"{_mark(name, 'begin')}{part(new, name)}", f"{_mark(name, 'begin')}\n{text}\n")
    if new != old:
        temporary = path.with_suffix(".tmp")
        temporary.write_text(new, encoding="utf-8")
        os.replace(temporary, path)
    return new != old


def sections(scale: str = "gpu") -> dict[str, str]:
    """Name of a part -> the Markdown that the committed results give."""
    page = f"reports/{scale}/{NOTEBOOK}.html"
    shown = f'<img src="{image(scale)}" alt="{html.escape(figure(scale).alt)}">'
    caption = f"Validation loss at the end of training: a tick per seed, the mean, its 95% interval. From [{NOTEBOOK}]({page})."
    return {
        "figure": f"{shown}\n\n{caption}",
        "claims": claim_table(paths.root() / "reports" / scale / "verdicts"),
    }


def figure(scale: str = "gpu") -> Plot:
    """The first figure: where the arms of the convergence study end."""
    study = merge_parameters(parameter_files(NOTEBOOK, scale, paths.root() / "configs"))
    runs = run_study(study["base"], study["arms"], study["seeds"], scale=scale, train=False)
    return plots.final_loss(table(result for by_arm in runs.values() for result in by_arm))


def image(scale: str) -> str:
    """The figure's file, as seen from the README."""
    return f"reports/{scale}/readme.png"


def part(text: str, name: str) -> str:
    """What lies between the marks of that name."""
    begin, end = _mark(name, "begin"), _mark(name, "end")
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"README.md must hold {begin} and then {end}, once each")
    return text.split(begin)[1].split(end)[0]


def _mark(name: str, which: str) -> str:
    return f"<!-- {name}:{which} -->"
