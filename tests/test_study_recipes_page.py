"""docs/own-study.md keeps its word: its recipe runs by its commands."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[1] / "docs" / "own-study.md").read_text()
(RECIPE,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
COMMANDS = [line.split("#")[0] for line in re.findall(r"^polyak study run .*", PAGE, re.MULTILINE)]


def test_the_page_is_one_page_and_its_recipe_one_screen() -> None:
    assert len(PAGE.splitlines()) <= 120
    assert len(RECIPE.splitlines()) <= 60


@pytest.mark.slow
def test_the_recipe_runs_as_the_page_says(tmp_path: Path) -> None:
    (tmp_path / "my_study.py").write_text(RECIPE)
    quick, full = COMMANDS
    for command, seeds in ((quick, 2), (full.replace("my_study", "small"), 1)):
        # The full form is cut to some steps: the page's words are about the same files.
        small = RECIPE.replace("steps=800", "steps=160")
        (tmp_path / "small.py").write_text(small)
        words = [*shlex.split(command)[1:], "--seeds", str(seeds), "--jobs", "1"]
        done = subprocess.run(
            [sys.executable, "-W", "error", "-m", "polyak", *words],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    runs = (tmp_path / "study-diabetes" / "results.jsonl").read_text().splitlines()
    assert len(runs) == 6
    assert set(json.loads(runs[0])["test"]) == {"live", "ema_1%", "ema_10%", "mean_50%"}
    for folder in ("study-diabetes", "study-diabetes-quick"):
        assert (tmp_path / folder / "report.html").is_file()
        assert (tmp_path / folder / "verdicts.json").is_file()
