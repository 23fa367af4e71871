"""Run the fast tests with other versions of Python and torch, and write docs/versions.md.

    python tools/test_range.py                  all environments
    python tools/test_range.py 3.13-2.14.1      one of them

Each environment is made once, in `.ranges/`: a torch from PyPI brings some 5 GB of CUDA packages.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RANGES = ROOT / ".ranges"
PAGE = ROOT / "docs/versions.md"
# Python, torch, numpy: the oldest, one in the middle, the newest.
ENVIRONMENTS = [
    ("3.12", "2.6.0", "2.0.2"),
    ("3.12", "2.9.1", "2.2.6"),
    ("3.13", "2.14.1", "2.5.5"),
    ("3.14", "2.14.1", "2.5.5"),
]
ROW = re.compile(r"\| (3\.\d+) \| (\S+) \| .+ \|\n")


def python_of(environment: Path, python: str, torch: str, numpy: str) -> Path:
    """The interpreter of an environment, which is made if it is not there."""
    interpreter = environment / "bin/python"
    if not (environment / "ready").exists():
        base = shutil.which(f"python{python}")
        if base is None:
            raise SystemExit(f"python{python} is not on the PATH: install it, or leave it out")
        subprocess.run([base, "-m", "venv", "--clear", str(environment)], check=True)
        install = [str(interpreter), "-m", "pip", "install", "--quiet"]
        wanted = [f"torch=={torch}", f"numpy=={numpy}", "-e", f"{ROOT}[dev]"]
        subprocess.run([*install, *wanted], check=True)
        (environment / "ready").touch()
    return interpreter


def result(interpreter: Path) -> str:
    """The last line of the fast tests."""
    command = [str(interpreter), "-m", "pytest", "-q", "-n", "2", "-m", "not slow", "tests"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    (interpreter.parent.parent / "tests.log").write_text(done.stdout + done.stderr)
    last = done.stdout.strip().splitlines()[-1]
    return re.sub(r" in .*", "", last).strip("= ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="such as 3.13-2.14.1")
    names = parser.parse_args().names
    for python, torch, numpy in ENVIRONMENTS:
        name = f"{python}-{torch}"
        if names and name not in names:
            continue
        interpreter = python_of(RANGES / name, python, torch, numpy)
        row = f"| {python} | {torch} | {numpy} | {date.today()} | {result(interpreter)} |\n"
        print(row, end="", flush=True)
        PAGE.write_text(with_row(PAGE.read_text(), row))


def with_row(page: str, row: str) -> str:
    """The page with a row of its table in place of the old one of that environment, or as the last."""
    rows = list(ROW.finditer(page))
    environment = ROW.fullmatch(row)
    assert environment is not None
    for old in rows:
        if old.group(1, 2) == environment.group(1, 2):
            return page[: old.start()] + row + page[old.end() :]
    return page[: rows[-1].end()] + row + page[rows[-1].end() :]


if __name__ == "__main__":
    main()
