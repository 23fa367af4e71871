"""The tutorial works as written: its blocks are typed in from the first to the last."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parent.parent / "docs/tutorial.md"
MAY_DIFFER = 1  # the exit code of `polyak diff` for files that differ


@pytest.mark.slow
def test_the_tutorial_works_as_written(tmp_path: Path) -> None:
    commands = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": commands, "PYTHONWARNINGS": "error"}
    script, told = tmp_path / "train.py", []
    script.touch()
    for language, block in re.findall(r"```(python|sh)\n(.*?)```", PAGE.read_text(), re.DOTALL):
        if language == "python":
            script.write_text(script.read_text() + block)
            continue
        for line in block.splitlines():
            done = subprocess.run(
                ["bash", "-c", line], cwd=tmp_path, env=environment, capture_output=True, text=True
            )
            fine = (0, MAY_DIFFER) if line.startswith("polyak diff") else (0,)
            assert done.returncode in fine, f"{line}\n{done.stdout}{done.stderr}"
            told += [(line, done.stdout, done.stderr)]
    (_, first, fresh), (_, second, resumed), _ = [each for each in told if "train.py" in each[0]]
    assert first == second and "test loss of the live weights" in first
    assert not fresh and resumed == "continue from run/step-1000\n"
