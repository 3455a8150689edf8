"""`ecmoe` and `python -m ecmoe`: the command line, or one line that says what it lacks."""

import sys

from ecmoe import _HINT


def main() -> None:
    """Run the command line.

    Raises:
        SystemExit: always, with the command's exit code; 2 where a package of the extra `study` is not installed.
    """
    try:
        from ecmoe.cli import main

        main()
    except ModuleNotFoundError as missing:
        print(f"error: {_HINT.format(missing.name)}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
