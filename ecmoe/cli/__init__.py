"""The command line: `ecmoe train | runs | run | again | generate | bench | report | index | readme | keys`, also as `python -m ecmoe`.

Commands import slow packages when called, so that `--help` is fast.
"""

from typing import Annotated, Any

import typer

from ecmoe import __version__
from ecmoe.cli import pages, runs
from ecmoe.cli.bench import bench
from ecmoe.config import ConfigError


class Commands(typer.core.TyperGroup):
    """A command group that reports errors which a user can fix (config, notebook, file) in one line, with exit code 2."""

    def invoke(self, context: Any) -> Any:
        try:
            return super().invoke(context)
        except (
            BrokenPipeError
        ):  # an OSError, but no error: the reader of the output, such as `head`, has closed the pipe
            raise
        except SystemExit as left:  # at Ctrl-C Lightning exits with 1: raise the KeyboardInterrupt instead
            raise (left.__context__ if isinstance(left.__context__, KeyboardInterrupt) else left) from None
        except (ConfigError, OSError) as error:
            typer.echo(f"error: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(2) from None


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Mixture-of-Experts with Expert Choice Routing: train runs, make reports.",
)
OF_RUNS = (runs.train, runs.generate, runs.keys, runs.runs, runs.run, runs.again)
for command in (*OF_RUNS, pages.report, pages.index, pages.readme):
    app.command()(command)
app.add_typer(bench, name="bench")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


Version = Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")]


@app.callback()
def _root(version: Version = False) -> None:
    pass


def main() -> None:
    """Run the command line."""
    app(prog_name="ecmoe")
