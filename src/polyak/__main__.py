"""`python -m polyak`: the command line."""

from polyak.cli import app

if __name__ == "__main__":
    app()
