"""Entry point of `ecmoe` and `python -m ecmoe`: run the command line, or name the package that is missing."""

import sys

from ecmoe import _HINT


def main() -> None:
    """Run the command line and exit with its code; 2 if a package of the extra `study` isn't installed."""
    try:
        from ecmoe.cli import main

        main()
    except ModuleNotFoundError as missing:
        print(f"error: {_HINT.format(missing.name)}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
