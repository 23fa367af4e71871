"""Where a system has less than Linux, files and studies still appear complete or not at all.

`like_windows` takes away what Windows does not have. It is no Windows: the laws were not run on one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from patience import HANG

# Files of tests, and the tests in them that need what is taken away.
FILES = {
    "test_files.py": [
        "abandoned_parts_go",  # a folder that was left goes after a day
        "without_locks",  # of which these have one that fails
        "a_lock_that_fails",
    ],
    "test_folders.py": [],
    "test_recording.py": [],
    "test_saving.py": [
        # They replace a file that an error's traceback still has open.
        "TestRefusals and test_a_claim_of_slots",
        "test_descriptions_that_make_no_sense",
    ],
    "test_cli_files.py": [],
    "test_study_records.py": [
        # An empty file of records stays, since it is open when the study fails.
        "test_a_training_that_diverges",
        "test_a_study_that_fails_before",
    ],
}
HOLDS = """
import sys
from pathlib import Path
import like_windows

like_windows.pytest_configure()
from polyak._system import Claim

claim = Claim(Path(sys.argv[1]))
print(claim.take(), flush=True)
sys.stdin.read()
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_the_laws_of_files_hold(name: str) -> None:
    here = Path(__file__).parent
    left_out = " or ".join(f"({each})" for each in FILES[name])
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "like_windows"]
    command += ["-p", "no:cacheprovider", "-m", "not slow", str(here / name)]
    command += ["-k", f"not ({left_out})"] if left_out else []
    done = subprocess.run(command, capture_output=True, text=True, env=_environment())
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_claim_beside_ends_with_its_process(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "it"
    path.mkdir() if kind == "folder" else path.touch()
    first, second = _Claims(path), _Claims(path)
    assert (first.said, second.said) == ("True", "False")
    second.end()
    first.kill()
    third = _Claims(path)
    assert third.said == "True"
    third.end()


class _Claims:
    def __init__(self, path: Path) -> None:
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            [sys.executable, "-c", HOLDS, str(path)], stdin=pipe, stdout=pipe, text=True, env=_environment()
        )  # fmt: skip
        assert self._process.stdout is not None
        self.said = self._process.stdout.readline().strip()

    def kill(self) -> None:
        self._process.kill()
        self.end()

    def end(self) -> None:
        self._process.communicate(timeout=HANG)


def _environment() -> dict[str, str]:
    here = Path(__file__).parent
    return {**os.environ, "PYTHONPATH": f"{here}{os.pathsep}{here.parent / 'src'}"}
