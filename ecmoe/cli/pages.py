"""Commands of pages: of one notebook, of the index, and of README.md."""

from pathlib import Path
from typing import Annotated

import typer

from ecmoe.cli.runs import Set
from ecmoe.files import assignments


def report(
    notebook: Annotated[Path, typer.Argument(help="a notebook of notebooks/")],
    page: Annotated[Path, typer.Argument(help="the HTML page to write")],
    files: Annotated[list[Path] | None, typer.Option("-f", "--file", help="parameters in YAML, later ones win")] = None,
    changes: Set = None,
    no_train: Annotated[bool, typer.Option("--no-train", help="leave missing runs as gaps")] = False,
) -> None:
    """Execute a notebook with parameters and render it as one HTML page."""
    from ecmoe.report.execution import execute

    execute(notebook, page, files or [], parameters=assignments(changes), train_missing=False if no_train else None)
    typer.echo(page)


def index(
    scale: Annotated[str, typer.Argument(help="smoke, gpu or paper")] = "smoke",
    reports: Annotated[Path | None, typer.Option(help="the folder of pages; default: reports/SCALE")] = None,
) -> None:
    """Write index.html: the scoreboard, with a list of the pages that are there."""
    from ecmoe.report.index import index as write_index

    typer.echo(write_index(scale, reports))


def readme(scale: Annotated[str, typer.Argument(help="whose results: gpu")] = "gpu") -> None:
    """Fill in README.md's figure and claim table from finished reports."""
    from ecmoe.report.readme import update

    typer.echo("README.md " + ("changed" if update(scale) else "is up to date"))
