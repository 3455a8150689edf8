"""Commands that write pages: from one notebook, the index, and README.md."""

from pathlib import Path
from typing import Annotated

import typer

from ecmoe.cli.runs import Set
from ecmoe.files import assignments


def report(
    notebook: Annotated[Path, typer.Argument(help="a notebook in notebooks/")],
    page: Annotated[Path, typer.Argument(help="the HTML page to write")],
    files: Annotated[
        list[Path] | None, typer.Option("-f", "--file", help="YAML parameters; later files override")
    ] = None,
    changes: Set = None,
    no_train: Annotated[bool, typer.Option("--no-train", help="show missing runs as gaps")] = False,
) -> None:
    """Execute a notebook with parameters and render it as one HTML page."""
    from ecmoe.report.execution import execute

    execute(notebook, page, files or [], parameters=assignments(changes), train_missing=False if no_train else None)
    typer.echo(page)


def index(
    scale: Annotated[str, typer.Argument(help="smoke, gpu or paper")] = "smoke",
    reports: Annotated[Path | None, typer.Option(help="folder of the pages; default: reports/SCALE")] = None,
) -> None:
    """Write index.html (verdicts, list of pages, search) and scoreboard.md."""
    from ecmoe.report.index import index as write_index

    typer.echo(write_index(scale, reports))


def readme(scale: Annotated[str, typer.Argument(help="scale of the results")] = "gpu") -> None:
    """Update the generated parts of README.md (summary, figures, claim table) from the results of a scale."""
    from ecmoe.report.readme import update

    typer.echo("README.md " + ("changed" if update(scale) else "is up to date"))
