"""The command line: `ecmoe train | runs | run | again | generate | bench | report | index | readme | keys`, also as `python -m ecmoe`.

Commands import slow packages when called, so that `--help` is fast.
"""

import sys
from typing import Annotated, Any

import typer

from ecmoe import __version__
from ecmoe.cli.bench import bench
from ecmoe.cli.commands import again, generate, index, keys, readme, report, run, runs, train
from ecmoe.config import ConfigError

# Reading a notebook takes 0.1 s, or 0.8 s with this package: jsonschema would build grammars for a format that no notebook uses.
sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]


class Commands(typer.core.TyperGroup):
    """A command group that reports errors which a user can fix (config, notebook, file) in one line, with exit code 2."""

    def invoke(self, context: Any) -> Any:
        try:
            return super().invoke(context)
        except BrokenPipeError:  # an OSError, but no error: the output's reader, such as `head`, has closed the pipe
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
for command in (train, generate, keys, runs, run, again, report, index, readme):
    app.command()(command)
app.add_typer(bench, name="bench")


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="print the version")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


def main() -> None:
    """Run the command line."""
    app(prog_name="ecmoe")
