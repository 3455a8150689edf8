"""The command line: `ecmoe train | runs | run | again | generate | bench | report | index | readme | keys`, also as `python -m ecmoe`.

What is wrong with a config or a notebook is told in one line, with exit code 2. Imports wait until a
command needs them, so that help comes at once.
"""

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ecmoe import __version__
from ecmoe.config import CHOICES, ConfigError, RunConfig
from ecmoe.files import nearest, parse_yaml, plain

if TYPE_CHECKING:
    import pandas as pd

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Mixture-of-Experts with Expert Choice Routing: train runs, make reports.",
)
# Of a run's summary.
SHOWN = ("name", "status", "error", "val_loss", "val_loss_causal", "accuracy", "perplexity", "bits_per_byte", "tokens",
         "seconds", "tokens_per_second", "mfu", "device", "path")  # fmt: skip
Set = Annotated[list[str] | None, typer.Option("--set", help="key=value, on top of the files")]


@contextmanager
def _one_line(*errors: type[Exception]) -> Iterator[None]:
    """Say these errors (none given: of a value or a file), which a user can mend, in one line, and end with 2."""
    errors = errors or (OSError, ValueError)
    try:
        yield
    except errors as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(2) from None


@app.command()
def train(
    configs: Annotated[list[Path] | None, typer.Argument(help="YAML files, later ones win")] = None,
    changes: Set = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the summary as JSON")] = False,
) -> None:
    """Train a run, or load it if it is there. No CONFIG: the defaults, EC-CF2 at smoke size."""
    with _one_line(ConfigError, OSError):
        config = RunConfig.from_yaml(*(configs or []), **_assignments(changes))
        from ecmoe.training.ranks import rank
        from ecmoe.training.run import run_or_load

        result = run_or_load(config)
        if rank():  # of torchrun: the first speaks for all
            return
    summary = plain(result.summary)
    if as_json:
        typer.echo(json.dumps(summary))
    for key in () if as_json else SHOWN:
        if (value := (summary | {"path": result.path}).get(key)) is not None:
            typer.echo(f"{key:18} {f'{value:.6g}' if isinstance(value, float) else value}")
    if not result.ok:
        raise typer.Exit(1)


Scale = Annotated[str, typer.Option(help="smoke, gpu or paper")]


@app.command()
def runs(
    pages: Annotated[list[str] | None, typer.Argument(help="such as 01_convergence; none: all")] = None,
    scale: Scale = "gpu",
    missing: Annotated[bool, typer.Option("--missing", help="only those that are not done")] = False,
    names: Annotated[bool, typer.Option("--names", help="only their names, one a line, as for xargs")] = False,
    check: Annotated[bool, typer.Option("--check", help="exit with 1 if any is not done")] = False,
    part: Annotated[str, typer.Option(help="this share of the plan: 2/3, the second of three machines")] = "1/1",
    arm: Annotated[list[str] | None, typer.Option(help="only arms whose name begins so, such as Hash")] = None,
    train_them: Annotated[
        bool, typer.Option("--train", help="train and measure what is missing, here and now")
    ] = False,
    jobs: Annotated[int, typer.Option(min=1, help="with --train: so many side by side")] = 1,
    within: Annotated[float, typer.Option(help="with --train: start none after so many minutes")] = math.inf,
) -> None:
    """List the plan: the runs and measurements that pages rest on, and what is there of them; or carry it out.

    Each is kept as it ends, so that a machine can be taken away at any time; pages then draw themselves from the records.
    """
    from ecmoe.study import engine
    from ecmoe.study.plan import plan, sound

    with _one_line():
        if not train_them and (jobs > 1 or within < math.inf):
            raise ValueError("--jobs and --within must come with --train, as nothing is trained without it")
        first, count = _part(part)
        planned, wrong = (plan(scale, pages), {}) if pages else sound(scale)
        all_arms = dict.fromkeys(name for one in planned for name in one.arms)
        for start in arm or ():
            if not any(name.startswith(start) for name in all_arms):
                raise ValueError(
                    f"--arm {start}: no arm of the plan begins so: {nearest(start, all_arms, '`ecmoe runs` lists them')}"
                )
        wanted = [one for one in planned if not arm or any(name.startswith(tuple(arm)) for name in one.arms)]
        lacking = [(one, engine.lacks(one, scale)) for one in wanted[first::count]]
    left = [one for one, lacks in lacking if lacks]
    if train_them:
        raise typer.Exit(engine.train(left, scale, jobs=jobs, minutes=within))
    for one, lacks in lacking:
        if lacks or not missing:
            where = f"{one.pages[0]:24} {one.arms[0]:48} s{one.seed}"
            typer.echo(one.name if names else f"{where:78} {one.name:46} {lacks or 'there'}")
    if not names:
        typer.echo(f"{len(left)} of {len(lacking)} missing")
    for error in wrong.values():
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
    if wrong:
        raise typer.Exit(2)
    if check and left:
        raise typer.Exit(1)


@app.command()
def run(
    names: Annotated[list[str], typer.Argument(help="of runs, as `ecmoe runs` lists them; or how they begin")],
    scale: Scale = "gpu",
    keep_weights: Annotated[
        bool, typer.Option("--keep-weights", help="leave them in runs/NAME; else only scale smoke does")
    ] = False,
) -> None:
    """Train runs of the plan, or load them, and take the measurements that pages want of them.

    Leaves reports/SCALE/runs/NAME.json and reports/SCALE/measures/NAME/*.json. The exit code is 1 if any failed, 2 if it
    will always fail, since something in its config can't be.
    """
    from ecmoe.study import engine
    from ecmoe.study.plan import sound

    with _one_line():
        wanted = engine.find(sound(scale)[0], names)
    raise typer.Exit(engine.in_turn(wanted, scale, keep_weights=keep_weights or scale == "smoke"))


@app.command()
def again(
    names: Annotated[list[str], typer.Argument(help="of recorded runs; or how they begin")],
    scale: Scale = "gpu",
    steps: Annotated[int | None, typer.Option(min=1, help="stop at the first validation after so many steps")] = None,
) -> None:
    """Train recorded runs anew, aside, and compare their curves: does this machine reproduce the numbers?

    The exit code is 1 if one differs. On the card of the record, what was found is kept in reports/SCALE/repeats: it shows
    whether two versions of the code compute the same.
    """
    from ecmoe.study import engine, repeats
    from ecmoe.study.plan import sound

    with _one_line():
        equal = True
        for run in engine.find(sound(scale)[0], names):
            one = repeats.again(run.name, scale, steps)
            equal &= one["equal"]
            by = "; ".join(f"{column} by up to {most:.3g}" for column, most in one["differs"].items())
            said = f"equal in {one['rows']} rows" if one["equal"] else f"of {one['rows']} rows some differ: {by}"
            typer.echo(f"{run.name}  code {one['recorded']} -> {one['code']}  {one['device']}  {said}")
    raise typer.Exit(int(not equal))


@app.command()
def report(
    notebook: Annotated[Path, typer.Argument(help="a notebook of notebooks/")],
    page: Annotated[Path, typer.Argument(help="the HTML page to write")],
    files: Annotated[list[Path] | None, typer.Option("-f", "--file", help="parameters in YAML, later ones win")] = None,
    changes: Set = None,
    no_train: Annotated[bool, typer.Option("--no-train", help="leave missing runs as gaps")] = False,
) -> None:
    """Execute a notebook with parameters and render it as one HTML page."""
    from ecmoe.report.execution import ReportError, execute

    with _one_line(ConfigError, ReportError, OSError):
        parameters = _assignments(changes)
        execute(notebook, page, files or [], parameters=parameters, train_missing=False if no_train else None)
    typer.echo(page)


@app.command()
def index(
    scale: Annotated[str, typer.Argument(help="smoke, gpu or paper")] = "smoke",
    reports: Annotated[Path | None, typer.Option(help="the folder of pages; default: reports/SCALE")] = None,
) -> None:
    """Write index.html: the scoreboard, with a list of the pages that are there."""
    from ecmoe.study.parameters import check_scale

    with _one_line():
        check_scale(scale)
        from ecmoe.report.index import index as write_index

        typer.echo(write_index(scale, reports))


@app.command()
def readme(
    scale: Annotated[str, typer.Argument(help="whose results: gpu")] = "gpu",
) -> None:
    """Fill in README.md's figure and claim table from finished reports."""
    with _one_line():
        from ecmoe.report.readme import update

        typer.echo("README.md " + ("changed" if update(scale) else "is up to date"))


@app.command()
def generate(
    run: Annotated[str, typer.Argument(help="a finished run: its folder, its name, or how that begins")],
    prompt: Annotated[str, typer.Argument(help="the text to continue")],
    tokens: Annotated[int, typer.Option(min=1, help="tokens to add")] = 200,
    temperature: Annotated[float, typer.Option(min=0, help="0: the most likely token")] = 1.0,
    top_k: Annotated[int | None, typer.Option(min=1, help="sample among the k likeliest")] = None,
    seed: Annotated[int, typer.Option(min=0, help="of the samples")] = 0,
) -> None:
    """Continue a text with a trained run, routed causally."""
    with _one_line():
        from ecmoe.training.continuation import continue_text

        text = continue_text(run, prompt, tokens, temperature=temperature, top_k=top_k, seed=seed)
    typer.echo(text)


bench = typer.Typer(no_args_is_help=True, help="Time the layer, a training step, or all that the page of speed shows.")
app.add_typer(bench, name="bench")
TIMED = {
    "layer": "The MoE layer beside its floor, the six matrix products that it can't do without, and beside its rivals.",
    "auto": "What a run gets beside the plain path, size by size: it must never be slower.",
    "step": "A whole training step, expert choice against token choice.",
    "profile": "Where the time of EC-CF2's training step goes, by kind of work.",
}
Sizes = Annotated[
    list[str] | None,
    typer.Option("--set", help="key=value, such as n=4096; default: 0.1B/64E on a GPU, small on a CPU"),
]
Output = Annotated[Path | None, typer.Option("--json", help="keep the table as JSON")]


def _timed(name: str) -> Callable[..., None]:
    def command(changes: Sizes = None, output: Output = None) -> None:
        with _one_line():
            from ecmoe.study import speed

            _show(speed.job(name, **_assignments(changes))(), output)

    return command


for _name, _help in TIMED.items():
    bench.command(_name, help=_help)(_timed(_name))


@bench.command("all")
def bench_all(
    scale: Annotated[str | None, typer.Option(help="whose sizes; default: gpu with CUDA, else smoke")] = None,
    only: Annotated[str | None, typer.Option(help="these parts, by name or how it begins: layer,step")] = None,
    out: Annotated[Path | None, typer.Option(help="the folder; default: the scale's")] = None,
    force: Annotated[bool, typer.Option("--force", help="measure again what is there")] = False,
) -> None:
    """All that page 08 shows, and steps of page 01's arms; each part is kept at once, and one that fails stops no other."""
    import torch

    from ecmoe.study import speed

    with _one_line():
        scale = scale or ("gpu" if torch.cuda.is_available() else "smoke")
        known = speed.jobs(**speed.plan(scale))
        asked = only.split(",") if only else [""]
        starts = tuple(start for start in asked if start not in known)
        wanted = {name: job for name, job in known.items() if name in asked or name.startswith(starts)}
        if not wanted:
            raise ValueError(f"--only {only}: no such part; there are {', '.join(known)}")
    into, failed = out or speed.folder(scale), False
    typer.echo(f"{', '.join(wanted)} -> {into}")
    if torch.cuda.is_available() and len(wanted) > 1:  # what a part leaves on the GPU, or breaks, ends with its process
        command = [sys.executable, "-m", "ecmoe", "bench", "all", "--scale", scale, "--out", str(into)]
        command += ["--force"] * force
        raise typer.Exit(int(any([subprocess.run([*command, "--only", name]).returncode for name in wanted])))
    for name, outcome in speed.take(wanted, into, force=force):
        if outcome is None:
            typer.echo(f"{name}: is there already (--force measures again)")
        elif isinstance(outcome, Exception):
            failed = True
            typer.echo(f"{name}: {type(outcome).__name__}: {outcome}", err=True)
        else:
            typer.echo(f"\n{name}:")
            _show(outcome)
    raise typer.Exit(int(failed))


@bench.command("scaling")
def bench_scaling(
    scale: Annotated[str | None, typer.Option(help="whose sizes; default: gpu with CUDA, else smoke")] = None,
    devices: Annotated[list[int] | None, typer.Option(min=1, help="each of these; default: as page 08")] = None,
    strategy: Annotated[list[str] | None, typer.Option(help="each of these: ddp, fsdp2, ep")] = None,
    pool: Annotated[list[str] | None, typer.Option(help="whose tokens compete: rank, batch")] = None,
    repeats: Annotated[int, typer.Option(min=2, help="samples of ten steps; medians count")] = 5,
    only: Annotated[str, typer.Option(help="these parts")] = "training,layers,losses",
    out: Annotated[Path | None, typer.Option(help="the folder; default: the scale's")] = None,
) -> None:
    """Training on one GPU and on several, by every strategy, against as many times one; layers whose experts are shared out,
    against their floor; and the losses of one model on one GPU and on several. Each row is kept at once."""
    import torch

    from ecmoe.bench import across, scaling
    from ecmoe.study import speed

    with _one_line():
        scale = scale or ("gpu" if torch.cuda.is_available() else "smoke")
        for option, words, known in (
            ("strategy", strategy or [], CHOICES["strategy"]),
            ("pool", pool or [], CHOICES["pool"]),
            ("only", only.split(","), ("training", "layers", "losses")),
        ):
            for word in words:
                if word not in known:
                    raise ValueError(f"--{option} {word}: {nearest(word, known)}")
        given = {"devices": devices, "strategies": strategy, "pools": pool}
        asked = speed.scaling(scale) | {key: value for key, value in given.items() if value}
        layers, base, into = asked.pop("layers"), asked["base"], out or speed.folder(scale)
        there = torch.cuda.device_count() or max(asked["devices"])
        several = [many for many in asked["devices"] if 1 < many <= there]
        if "training" in only:
            for table in scaling.bench_scaling(**asked, repeats=repeats):
                _show(table, into / "scaling.json")
        if "layers" in only:
            for table in across.bench_across(layers, several, repeats=repeats):
                _show(table, into / "scaling-layers.json")
        if "losses" in only and several:
            how = (strategy or ["ddp"])[0]
            _show(scaling.bench_losses(base, max(several), how), into / "scaling-losses.json")


def _show(table: "pd.DataFrame", output: Path | None = None) -> None:
    """Print what was measured, and where; and keep it in a file."""
    from ecmoe.bench.clock import save

    if output:
        save(table, output)
    typer.echo(" ".join(f"{key}={value}" for key, value in table.attrs["setting"].items()))
    rows = table.drop(columns="samples_ms", errors="ignore").dropna(axis=1, how="all")
    typer.echo(rows.to_string(index=False, float_format="{:.4g}".format, na_rep=""))
    if table.attrs.get("absent"):
        typer.echo("\nnot measured, since not there or not possible:\n" + "\n".join(table.attrs["absent"]))


@app.command()
def keys() -> None:
    """List the keys of a run: name, default, meaning."""
    import dataclasses

    for field in dataclasses.fields(RunConfig):
        default = "null" if field.default is None else str(field.default)
        typer.echo(f"{field.name:26} {default:14} {field.metadata['help']}")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    pass


def _part(text: str) -> tuple[int, int]:
    """ "2/3" -> 1, 3."""
    try:
        part, count = map(int, text.split("/"))
    except ValueError:
        part = count = 0
    if not 1 <= part <= count:
        raise ValueError(f"--part {text}: must be I/N with I in 1..N, such as 1/2")
    return part - 1, count


def _assignments(pairs: list[str] | None) -> dict[str, Any]:
    """`key=value` as in YAML: 2 is a number, null is nothing, 1.0e-3 is a number."""
    values = {}
    for pair in pairs or []:
        key, equals, text = pair.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set {pair!r} must be key=value, such as capacity_factor=1.0")
        try:
            values[key.strip()] = parse_yaml(text)
        except ConfigError as error:
            raise ConfigError(f"--set {pair!r}: {text!r} is no YAML value: {error}") from error
    return values


def main() -> None:
    """Run the command line."""
    app(prog_name="ecmoe")
