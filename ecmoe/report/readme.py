"""The parts of README.md that are made of committed results: the answer, its figure, the claims, the layer's speed.

Each lies between two marks, such as <!-- claims:begin --> and <!-- claims:end -->; a test fails when what lies
there is not what the results give.
"""

import html

from ecmoe import paths
from ecmoe.files import write_text
from ecmoe.report.plots import Plot, share_of_floor
from ecmoe.report.scoreboard import CAPTION, Verdicts, claim_table, effects
from ecmoe.study import speed
from ecmoe.study.answer import answer
from ecmoe.study.verdict import judge_all


def update(scale: str = "gpu") -> bool:
    """Draw the figures, fill in the README's parts; says whether the text changed.

    Raises:
        ValueError: a mark is missing, or there twice.
    """
    path = paths.root() / "README.md"
    old = new = path.read_text(encoding="utf-8")
    texts, plots = sections(scale)
    for name, text in texts.items():
        begin, _, end = _parts(new, name)
        new = f"{begin}\n{text}\n{end}"
    for image, plot in plots.items():
        plot.save(paths.root() / image)
    if new != old:
        write_text(path, new)
    return new != old


def sections(scale: str = "gpu") -> tuple[dict[str, str], dict[str, Plot]]:
    """Name of a part -> the Markdown that the committed results give; file of an image -> the figure."""
    verdicts, plots = judge_all(scale), {}
    found = {"claims": claim_table(verdicts, f"reports/{scale}/scoreboard.md#{{claim}}")}
    for name, (plot, caption) in _pictures(scale, verdicts).items():
        found[name] = f"Not run yet: {caption}"
        if plot.figure is not None:
            image = f"reports/{scale}/readme-{name}.png"
            found[name] = f'<img src="{image}" alt="{html.escape(plot.alt)}">\n\n{caption}'
            plots[image] = plot
    found["evidence"] = f"{answer(scale, verdicts)}\n\n{found['evidence']}"
    return found, plots


def _pictures(scale: str, verdicts: Verdicts) -> dict[str, tuple[Plot, str]]:
    """Name of a part -> its figure, and what it shows."""
    plan = speed.plan(scale)
    found = speed.measured(speed.jobs(**plan), scale=scale, measure=False)
    size = next(iter(plan["layer_sizes"]))
    device = (found[speed.layer_file(size)] or {}).get("setting", {}).get("device", "no device yet")
    of_layer = f"Speed of the layer, routing included, as a share of its matrix products alone, on one {device}; *triton* is our path on a GPU, rows without it are plain PyTorch."
    return {"evidence": (effects(verdicts), CAPTION), "speed": (share_of_floor(speed.layers(found, [size])), of_layer)}


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
