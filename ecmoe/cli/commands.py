"""All commands but `bench`: they train and use runs, of a config or of the plan, and write pages."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from ecmoe import paths
from ecmoe.config import LARGEST, ConfigError, RunConfig
from ecmoe.files import assignments, plain

Set = Annotated[list[str] | None, typer.Option("--set", help="key=value, overrides the files")]
Scale = Annotated[str, typer.Option(help="smoke, gpu or paper")]
# Keys of a run's summary that `ecmoe train` prints.
SHOWN = ("name", "status", "error", "val_loss", "val_loss_causal", "accuracy", "perplexity", "bits_per_byte", "tokens",
         "seconds", "tokens_per_second", "mfu", "device", "path")  # fmt: skip


def train(
    configs: Annotated[list[Path] | None, typer.Argument(help="YAML files; later files override")] = None,
    changes: Set = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the summary as JSON")] = False,
) -> None:
    """Train a run, or load it if it was trained before. Without CONFIGS: the defaults, EC-CF2 at smoke size."""
    for path in configs or []:
        if "=" in str(path) and not path.exists():
            raise ConfigError(f"config {str(path)!r} isn't there: did you mean --set {path}?")
        if path.resolve().parent == paths.configs().resolve() and path.name[:1].isdigit():
            raise ConfigError(f"config {str(path)!r} is the plan of a page: `ecmoe runs {path.stem}` lists its runs")
    config = RunConfig.from_yaml(*(configs or []), **assignments(changes))
    from ecmoe import run_or_load
    from ecmoe.training.ranks import rank

    result = run_or_load(config)
    if rank():  # under torchrun only rank 0 prints
        return
    summary = plain(result.summary)
    if as_json:
        typer.echo(json.dumps(summary))
    for key in () if as_json else SHOWN:
        if (value := (summary | {"path": result.path}).get(key)) is not None:
            typer.echo(f"{key:18} {f'{value:.6g}' if isinstance(value, float) else value}")
    if not result.ok:
        raise typer.Exit(1)


def runs(
    pages: Annotated[list[str] | None, typer.Argument(help="such as 01_convergence; default: all")] = None,
    scale: Scale = "gpu",
    missing: Annotated[bool, typer.Option("--missing", help="only runs that are not done")] = False,
    names: Annotated[bool, typer.Option("--names", help="print only names, one per line, as for xargs")] = False,
    check: Annotated[bool, typer.Option("--check", help="exit with 1 if any run is not done")] = False,
    part: Annotated[str, typer.Option(help="one share of the plan: 2/3 for the second of three machines")] = "1/1",
    train_them: Annotated[bool, typer.Option("--train", help="train and measure what is missing")] = False,
    jobs: Annotated[int, typer.Option(min=1, help="with --train: number of runs at a time")] = 1,
) -> None:
    """List the plan (the runs and measurements that pages need) and what is missing; or, with --train, carry it out.

    Each run is saved as it ends, so the machine may be stopped at any time; pages are then drawn from the records."""
    from ecmoe.study import engine
    from ecmoe.study.plan import plan, sound

    if jobs > 1 and not train_them:
        raise ConfigError("--jobs must come with --train, as nothing is trained without it")
    first, _, count = part.partition("/")
    if not (first.isdecimal() and count.isdecimal() and 1 <= int(first) <= int(count)):
        raise ConfigError(f"--part {part}: must be I/N with I in 1..N, such as 1/2")
    planned, wrong = (plan(scale, pages), {}) if pages else sound(scale)
    lacking = [(one, engine.lacks(one, scale)) for one in planned[int(first) - 1 :: int(count)]]
    left = [one for one, lacks in lacking if lacks]
    if train_them:
        raise typer.Exit(engine.train(left, scale, jobs=jobs))
    for one, lacks in lacking:
        if lacks or not missing:
            where = f"{one.pages[0]:24} {one.arms[0]:48} s{one.seed}"
            typer.echo(one.name if names else f"{where:78} {one.name:46} {lacks or 'done'}")
    if not names:
        typer.echo(f"{len(left)} of {len(lacking)} missing")
    for error in wrong.values():
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
    raise typer.Exit(2 if wrong else int(check and bool(left)))


def run(
    names: Annotated[list[str], typer.Argument(help="names of runs, as `ecmoe runs` lists them, or unique prefixes")],
    scale: Scale = "gpu",
    keep_weights: Annotated[bool, typer.Option("--keep-weights", help="keep runs/NAME's weights, as at smoke")] = False,
) -> None:
    """Train runs of the plan, or load them, and take the measurements that pages need.

    Writes reports/SCALE/runs/NAME.json and reports/SCALE/measures/NAME/*.json. Exit code: 1 if a run failed; 2 if all failures
    are due to invalid configs, which a retry can't fix."""
    from ecmoe.study import engine
    from ecmoe.study.plan import sound

    wanted = engine.find(sound(scale)[0], names, scale)
    raise typer.Exit(engine.in_turn(wanted, scale, keep_weights=keep_weights or scale == "smoke"))


STOP = "stop at the first validation after this many steps; short runs of tasks in sequence (page 11) are never stopped"


def again(
    names: Annotated[list[str], typer.Argument(help="names of recorded runs, or unique prefixes")],
    scale: Scale = "gpu",
    steps: Annotated[int | None, typer.Option(min=1, help=STOP)] = None,
) -> None:
    """Train recorded runs again in a temporary folder and compare: does this machine reproduce their numbers?

    Exit code: 1 if a run differs. If this device is of the record's kind, the comparison is saved in reports/SCALE/repeats, where
    it shows whether two versions of the code compute the same."""
    from ecmoe.study import engine, repeats
    from ecmoe.study.plan import sound

    equal = True
    for run in engine.find(sound(scale)[0], names, scale):
        one = repeats.again(run.name, scale, steps)
        equal &= one["equal"]
        gap = "because only one has a value"
        by = [f"{name} {gap if most is None else f'by up to {most:.3g}'}" for name, most in one["differs"].items()]
        said = f"equal in {one['rows']} rows" if one["equal"] else f"of {one['rows']} rows some differ: {'; '.join(by)}"
        typer.echo(f"{run.name}  code {one['recorded']} -> {one['code']}  {one['device']}  {said}")
    raise typer.Exit(int(not equal))


def generate(
    run: Annotated[str, typer.Argument(help="a finished run in runs/: its folder, its name, or a unique prefix")],
    prompt: Annotated[str, typer.Argument(help="the text to continue")],
    tokens: Annotated[int, typer.Option(min=1, help="number of tokens to add")] = 200,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the most likely token")] = 1.0,
    top_k: Annotated[int | None, typer.Option(min=1, help="sample among the k most likely tokens")] = None,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST, help="random seed of the samples")] = 0,
) -> None:
    """Continue a text with a trained model, using causal routing."""
    from ecmoe.training.continuation import continue_text

    try:
        text = continue_text(run, prompt, tokens, temperature=temperature, top_k=top_k, seed=seed)
    except UnicodeEncodeError as error:
        raise ConfigError(f"prompt={prompt!r}: must be UTF-8") from error
    except ValueError as error:
        raise ConfigError(str(error)) from error
    encoding = sys.stdout.encoding or "utf-8"  # of a terminal, which may lack characters that a model of bytes makes
    typer.echo(text.encode(encoding, "replace").decode(encoding))


def keys() -> None:
    """List the keys of a run's config: name, default, meaning."""
    for field in dataclasses.fields(RunConfig):
        default = "null" if field.default is None else str(field.default)
        typer.echo(f"{field.name:26} {default:14} {field.metadata['help']}")


def report(
    notebook: Annotated[Path, typer.Argument(help="a notebook in notebooks/")],
    page: Annotated[Path, typer.Argument(help="the HTML page to write")],
    files: Annotated[list[Path] | None, typer.Option("-f", "--file", help="YAML; later files override")] = None,
    changes: Set = None,
    no_train: Annotated[bool, typer.Option("--no-train", help="show missing runs as gaps")] = False,
) -> None:
    """Execute a notebook with parameters and render it as one HTML page."""
    from ecmoe.report.execution import execute

    parameters = assignments(changes) | ({"train_missing": False} if no_train else {})
    execute(notebook, page, files or [], parameters=parameters)
    typer.echo(page)


def index(
    scale: Scale = "smoke",
    reports: Annotated[Path | None, typer.Option(help="folder of the pages; default: reports/SCALE")] = None,
) -> None:
    """Write index.html (verdicts, list of pages, search) and scoreboard.md."""
    from ecmoe.report.index import index as write_index

    typer.echo(write_index(scale, reports))


def readme(scale: Annotated[str, typer.Option(help="gpu or paper; smoke has no verdicts")] = "gpu") -> None:
    """Update the generated parts of README.md (summary, figures, claim table) from the results of a scale."""
    from ecmoe.report.readme import update

    typer.echo("README.md " + ("changed" if update(scale) else "is up to date"))
