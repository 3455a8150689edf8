"""The parts of README.md that are made of committed results: its figures and the claim table.

Each lies between two marks, such as <!-- claims:begin --> and <!-- claims:end -->; a test fails when what lies
there is not what the results give.
"""

from __future__ import annotations

import html
from collections.abc import Callable
from typing import Any

from ecmoe import paths
from ecmoe.files import write_text
from ecmoe.report import plots
from ecmoe.report.plots.parts import Plot
from ecmoe.report.scoreboard import claim_table
from ecmoe.study import speed
from ecmoe.study.cost import beside_paper
from ecmoe.study.load import load
from ecmoe.study.parameters import merge_parameters, parameter_files
from ecmoe.study.table import by_routing, table
from ecmoe.training.result import Result


def update(scale: str = "gpu") -> bool:
    """Draw the figures, fill in the README's parts; says whether the text changed.

    Raises:
        ValueError: a mark is missing, or there twice.
    """
    home = paths.root()
    path = home / "README.md"
    old = new = path.read_text(encoding="utf-8")
    for name, text in sections(scale).items():
        new = new.replace(f"{_mark(name, 'begin')}{part(new, name)}", f"{_mark(name, 'begin')}\n{text}\n")
    for name, (notebook, draw) in PICTURES.items():
        draw(notebook, scale)[0].figure.savefig(home / image(name, scale), dpi=150, metadata={"Software": None})
    if new != old:
        write_text(path, new)
    return new != old


def sections(scale: str = "gpu") -> dict[str, str]:
    """Name of a part -> the Markdown that the committed results give."""
    found = {}
    for name, (notebook, draw) in PICTURES.items():
        plot, caption = draw(notebook, scale)
        shown = f'<img src="{image(name, scale)}" alt="{html.escape(plot.alt)}">'
        found[name] = f"{shown}\n\n{caption} From [{notebook}](reports/{scale}/{notebook}.html)."
    size = beside_paper(_study("01_convergence", scale)["base"])
    return found | {
        "claims": f"{claim_table(paths.root() / 'reports' / scale / 'verdicts')}\n\nHere, but for C2 and C3: {size}."
    }


def image(name: str, scale: str) -> str:
    """A figure's file, as seen from the README."""
    return f"reports/{scale}/readme-{name}.png"


def part(text: str, name: str) -> str:
    """What lies between the marks of that name."""
    begin, end = _mark(name, "begin"), _mark(name, "end")
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"README.md must hold {begin} and then {end}, once each")
    return text.split(begin)[1].split(end)[0]


def _mark(name: str, which: str) -> str:
    return f"<!-- {name}:{which} -->"


def _study(notebook: str, scale: str) -> dict[str, Any]:
    return merge_parameters(parameter_files(notebook, scale, paths.root() / "configs"))


def _runs(notebook: str, scale: str) -> dict[str, list[Result]]:
    return load(notebook, {"scale": scale, "train_missing": False})


# A figure of a page, and what it shows.


def _ends(notebook: str, scale: str) -> tuple[Plot, str]:
    return plots.final_loss(table(_runs(notebook, scale))), (
        "Validation loss at the end of training: a tick per seed, the mean, its 95% interval."
    )


def _leaks(notebook: str, scale: str) -> tuple[Plot, str]:
    labels = "validation loss (nats per token)", "causally minus as trained (nats per token)"
    plot = plots.leak(by_routing(_runs(notebook, scale)), "loss", *labels)
    return plot, (
        "The same weights, routed as trained and causally, by running cut-offs that see one token alone; right of 0, the loss as trained owes something "
        "to tokens of the future."
    )


def _shares(notebook: str, scale: str) -> tuple[Plot, str]:
    plan = speed.plan(scale)
    found = speed.measured(speed.jobs(**plan), scale=scale, measure=False)
    size = next(iter(plan["layer_sizes"]))
    device = (found[speed.layer_file(size)] or {}).get("setting", {}).get("device", "no device yet")
    return plots.share_of_floor(speed.layers(found, [size])), (
        f"Speed of the layer, routing included, as a share of its matrix products alone, on one {device}; *triton* is our path on a GPU, rows without it "
        "are plain PyTorch."
    )


PICTURES: dict[str, tuple[str, Callable[[str, str], tuple[Plot, str]]]] = {
    "evidence": ("01_convergence", _ends),
    "causality": ("09_causality", _leaks),
    "speed": (speed.SPEED, _shares),
}
