"""`python -m polyak`: the command line."""

from polyak.cli import main

if __name__ == "__main__":
    main()
