"""A run of tests leaves nothing behind but pytest's own folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_doctests_and_their_processes_leave_nothing_in_the_temporary_folder(tmp_path: Path) -> None:
    """The doctest makes a folder, which it does not remove."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "src/polyak/_files.py",
    ]
    own = ("PYTEST_XDIST_WORKER", "PYTEST_DEBUG_TEMPROOT")
    environment = {name: value for name, value in os.environ.items() if name not in own}
    environment["TMPDIR"] = str(tmp_path)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "mkdtemp" in (ROOT / command[-1]).read_text(), done.stdout
    assert [path.name.partition("-")[0] for path in tmp_path.iterdir()] in ([], ["pytest"])
