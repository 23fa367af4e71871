"""Bugs planted one by one, and which test kills each: `python benchmarks/planted.py [--write] [--only WORDS]`.

Each bug is one line of `planted_bugs`. It is put into a copy of `src`, and only the test files nearest to it run.
Faults of applied(), updates and shared memory that were found once are put back in the same way. Against
these, random programs (`benchmarks/stress.py`) run first, and the tests where these find nothing.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from planted_bugs import BUGS, FAULTS, Bug

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SURVIVED = "**survived**"


def broken_copy(bug: Bug, folder: Path) -> Path:
    """A copy of the sources with the bug in it."""
    copy = folder / "src"
    shutil.copytree(ROOT / "src", copy, ignore=shutil.ignore_patterns("__pycache__"))
    for path, old, new in bug.changes:
        file = copy / "polyak" / path
        text = file.read_text()
        if text.count(old) != 1:
            raise ValueError(
                f"{bug.name}: {old!r} is {text.count(old)} times in {path}, wanted once"
            )
        file.write_text(text.replace(old, new))
    return copy


def run(command: list[str], sources: Path) -> str:
    """What a command prints, with these sources in place of the repository's; 0 and 1 are its verdicts."""
    environment = {**os.environ, "PYTHONPATH": str(sources), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    if done.returncode not in (0, 1):
        raise RuntimeError(f"{command} ended with {done.returncode}: {done.stdout}{done.stderr}")
    return done.stdout


def by_tests(bug: Bug, sources: Path) -> str:
    """The first test that fails."""
    files = [f"tests/test_{name}.py" for name in bug.tests]
    slow = [] if bug.slow else ["-m", "not slow"]
    options = ["-x", "-q", "-n", "0", "-p", "no:cacheprovider", "--tb=no", *slow]
    printed = run([sys.executable, "-m", "pytest", *options, *files], sources)
    failed = re.search(r"^(?:FAILED|ERROR) tests/([^\s\[]+)", printed, re.MULTILINE)
    return f"`{failed[1]}`" if failed else SURVIVED


def by_programs(sources: Path, programs: int) -> str:
    """The law that a random program finds broken, with its seed."""
    stress = [sys.executable, "benchmarks/stress.py", "--processes", "1", "--first", "0"]
    limits = ["--faults", "1", "--programs", str(programs), "--minutes", "5"]
    printed = run([*stress, *limits], sources)
    law = re.search(r"^\d+ times: (.+)$", printed, re.MULTILINE)
    seed = law and re.search(r"--seed (\d+) --ops (\S+)", printed[law.end() :])
    return f"stress: {law[1]} (`--seed {seed[1]} --ops {seed[2]}`)" if law and seed else ""


def killer(bug: Bug, programs: int = 0) -> str:
    with tempfile.TemporaryDirectory(prefix="planted-") as folder:
        sources = broken_copy(bug, Path(folder))
        found = by_programs(sources, programs) if programs else ""
        return found or by_tests(bug, sources)


def table(bugs: tuple[Bug, ...], heads: str, programs: int, processes: int) -> str:
    with ThreadPoolExecutor(processes) as pool:
        lines = []
        for bug, found in zip(bugs, pool.map(lambda b: killer(b, programs), bugs), strict=True):
            lines.append(f"| {bug.name} | {found} |")
            print(lines[-1], flush=True)
    return "\n".join([heads, "|---|---|", *lines])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/planted.md")
    parser.add_argument("--only", default="", help="bugs whose name has these words")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--programs", type=int, default=1500, help="programs against each fault")
    options = parser.parse_args()
    bugs = tuple(bug for bug in BUGS if options.only in bug.name)
    faults = tuple(fault for fault in FAULTS if options.only in fault.name)
    first = table(bugs, "| planted bug | killed by |", 0, options.processes)
    heads = "| fault put back | found by |"
    second = table(faults, heads, options.programs, options.processes)
    if options.write:
        text = f"# Planted bugs\n\n`{Path(__file__).name} --write` made this page.\n\n"
        (RESULTS / "planted.md").write_text(f"{text}{first}\n\n{second}\n")
    return int(SURVIVED in first + second)


if __name__ == "__main__":
    sys.exit(main())
