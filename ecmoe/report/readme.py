"""Generate from results what README.md has between marks such as <!-- claims:begin --> and <!-- claims:end -->."""

import html
import re

from ecmoe import paths
from ecmoe.files import ConfigError, write_text
from ecmoe.report.index import caption, effects, markdown
from ecmoe.report.plots import Plot, share_of_floor
from ecmoe.study import speed
from ecmoe.study.answer import answer, cost
from ecmoe.study.verdict import judge_all


def update(scale: str) -> bool:
    """Draw the figures, update the generated parts of README.md, and return whether its text changed. Raise a
    ConfigError at scale smoke, if there is no README.md, or if a mark is missing in it or occurs twice."""
    if scale == "smoke":
        raise ConfigError("scale='smoke' gives no verdicts to show in README.md: must be gpu or paper")
    path = paths.root() / "README.md"
    if not path.exists():
        raise ConfigError(f"{path} is not there: call this in a checkout, with ECMOE_HOME unset or set to it")
    old = new = path.read_text(encoding="utf-8")
    texts, plots = sections(scale)
    for name, text in texts.items():
        begin, end = (f"<!-- {name}:{where} -->" for where in ("begin", "end"))
        before, *inside = re.split(f"{begin}|{end}", new)
        if len(inside) != 2 or new != f"{before}{begin}{inside[0]}{end}{inside[1]}":
            raise ConfigError(f"README.md must hold {begin} and then {end}, once each")
        new = f"{before}{begin}\n{text}\n{end}{inside[1]}"
    for image, plot in plots.items():
        plot.save(paths.root() / image)
    if new != old:
        write_text(path, new)
    return new != old


def sections(scale: str) -> tuple[dict[str, str], dict[str, Plot]]:
    """Return two mappings: part ("evidence", "claims", "speed") -> its Markdown, and image file -> its figure."""
    verdicts, plan, plots = judge_all(scale), speed.plan(scale), {}
    timed, size = speed.measured(speed.jobs(**plan), scale=scale, measure=False), next(iter(plan["layer_sizes"]))
    of_layer = (
        "Speed of the layer, including routing, relative to its matrix products alone, on "
        f"{speed.taken(timed, speed.layer_file(size))}. *triton* and *cute* are this package's GPU paths; other rows are plain PyTorch."
    )
    pictures = {
        "evidence": (effects(verdicts), caption()),
        "speed": (share_of_floor(speed.layers(timed, [size])), of_layer),
    }
    found = {"claims": markdown("claims", verdicts, scale).rstrip()}
    for name, (plot, text) in pictures.items():
        found[name] = f"Not run yet: {text}"
        if plot.figure is not None:
            image = f"reports/{scale}/readme-{name}.png"
            found[name] = f'<img src="{image}" width="760" alt="{html.escape(plot.alt)}">\n\n{text}'
            plots[image] = plot
    found["evidence"] = "\n\n".join([*answer(verdicts), f"{found['evidence']} {cost(scale)}"])
    return found, plots
