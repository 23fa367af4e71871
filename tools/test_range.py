"""Run the fast tests with other versions of Python and torch, and write docs/versions.md.

    python tools/test_range.py                  all environments
    python tools/test_range.py 3.13-2.14.1      one of them

Each environment is made once, in `.ranges/`: a torch from PyPI brings some 5 GB of CUDA packages. A
version of Python that is not on the PATH is left out. The files of tests run one by one, each with a log
in `.ranges/<name>/logs`, so that a run that is interrupted leaves its figures.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RANGES = ROOT / ".ranges"
PAGE = ROOT / "docs/versions.md"
# Python, torch, numpy: the oldest, one in the middle, the newest.
ENVIRONMENTS = [
    ("3.12", "2.6.0", "1.26.4"),
    ("3.12", "2.9.1", "2.2.6"),
    ("3.13", "2.14.1", "2.5.5"),
    ("3.14", "2.14.1", "2.5.5"),
]
COUNT = re.compile(r"(\d+) (passed|failed|skipped|error)")
ROW = re.compile(r"\| (3\.\d+) \| (\S+) \| .+ \|\n")


def python_of(environment: Path, base: str, torch: str, numpy: str) -> Path:
    """The interpreter of an environment, which is made if it is not there."""
    interpreter = environment / "bin/python"
    if not (environment / "ready").exists():
        subprocess.run([base, "-m", "venv", "--clear", str(environment)], check=True)
        install = [str(interpreter), "-m", "pip", "install", "--quiet"]
        wanted = [f"torch=={torch}", f"numpy=={numpy}", "-e", f"{ROOT}[dev]"]
        subprocess.run([*install, *wanted], check=True)
        (environment / "ready").touch()
    return interpreter


def results(interpreter: Path) -> Iterator[str]:
    """The counts of the fast tests, after each of their files."""
    logs = interpreter.parent.parent / "logs"
    logs.mkdir(exist_ok=True)
    counts: Counter[str] = Counter()
    files = sorted((ROOT / "tests").glob("test_*.py"))
    for number, file in enumerate(files, 1):
        command = [str(interpreter), "-m", "pytest", "-q", "-n", "0", "-m", "not slow", str(file)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        (logs / f"{file.stem}.log").write_text(done.stdout + done.stderr)
        for count, kind in COUNT.findall(done.stdout.strip().rpartition("\n")[2]):
            counts[kind] += int(count)
        so_far = "" if number == len(files) else f" in {number} of {len(files)} files"
        yield ", ".join(f"{counts[kind]} {kind}" for kind in sorted(counts, reverse=True)) + so_far


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="such as 3.13-2.14.1")
    names = parser.parse_args().names
    for python, torch, numpy in ENVIRONMENTS:
        name = f"{python}-{torch}"
        if names and name not in names:
            continue
        base = shutil.which(f"python{python}")
        if base is None:
            print(f"{name} is left out: python{python} is not on the PATH")
            continue
        for result in results(python_of(RANGES / name, base, torch, numpy)):
            row = f"| {python} | {torch} | {numpy} | {date.today()} | {result} |\n"
            PAGE.write_text(with_row(PAGE.read_text(), row))
        print(row, end="", flush=True)


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
