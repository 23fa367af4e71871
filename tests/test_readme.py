"""The README keeps its word: its example runs, its commands exist, its links lead somewhere."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from quick import first_quick, slow_if

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [
    ROOT / "README.md",
    ROOT / "README.zh.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
]


def blocks(language: str) -> list[str]:
    pages = README + (ROOT / "README.zh.md").read_text()
    return re.findall(rf"```{language}\n(.*?)```", pages, re.DOTALL)


EXAMPLES = first_quick(blocks("python"), 0)
LINES = [line for block in blocks("sh") for line in block.splitlines()]


def test_the_example_runs_for_a_few_steps(tmp_path: Path) -> None:
    (long,) = blocks("python")[:1]
    assert "range(1000)" in long
    test_the_example_runs_as_written(long.replace("range(1000)", "range(20)"), tmp_path)


@pytest.mark.parametrize("code", EXAMPLES)
def test_the_example_runs_as_written(code: str, tmp_path: Path) -> None:
    (tmp_path / "example.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "-W", "error", "example.py"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert len([line for line in code.splitlines() if line]) <= 15


@pytest.mark.parametrize(
    "line", [slow_if(x, slow="--out" in x) for x in LINES if x.startswith("polyak explain")]
)
def test_the_commands_run_as_written(line: str, tmp_path: Path) -> None:
    command = shlex.split(line, comments=True)[1:]
    done = subprocess.run(
        [sys.executable, "-m", "polyak", *command], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert bool(list(tmp_path.rglob("*.png"))) == ("--out" in command)


def test_the_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        assert (
            set(re.findall(r"(?:^|`)make ([a-z-]+)", page.read_text(), re.MULTILINE)) <= targets
        ), page


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_the_readme_is_short() -> None:
    assert README.count("\n") <= 120
