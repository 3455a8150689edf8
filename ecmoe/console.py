"""What commands share: an error that a user can mend is one line and exit code 2."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import typer


@contextlib.contextmanager
def one_line(*errors: type[Exception]) -> Iterator[None]:
    """Say these errors (none given: of a value or a file) in one line, and end with 2."""
    errors = errors or (OSError, ValueError)
    try:
        yield
    except errors as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(2) from None
