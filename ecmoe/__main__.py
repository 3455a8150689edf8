"""`python -m ecmoe`: the command line."""

from ecmoe.cli import main

if __name__ == "__main__":
    main()
