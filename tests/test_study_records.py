"""A study resumes where it was, whatever interrupted it, and never mixes other conditions in."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from polyak.study._arms import article_arm
from polyak.study._records import opened, write_whole
from polyak.study._runner import run_study
from polyak.study._settings import Settings
from polyak.study._trainer import conditions
from study_cases import SMALL

ARMS = article_arm(SMALL)
CONDITIONS = conditions(SMALL, ARMS)


def study(seeds: int, path: Path, settings: Settings = SMALL) -> list[dict[str, object]]:
    return run_study(seeds, path, settings, jobs=1, arms=ARMS)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("undisturbed") / "results.jsonl"
    study(4, path)
    return path


def test_one_line_a_seed_and_no_seed_twice(undisturbed: Path, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    study(2, path)
    before = path.read_bytes()
    records = study(4, path)
    assert path.read_bytes().startswith(before)
    assert path.read_bytes() == undisturbed.read_bytes()
    assert [record["seed"] for record in records] == [0, 1, 2, 3]
    assert study(4, path) == records == study(4, undisturbed)
    assert len(path.read_text().splitlines()) == 4


def test_fewer_seeds_than_there_are_gives_those_asked_for(undisturbed: Path) -> None:
    assert [record["seed"] for record in study(3, undisturbed)] == [0, 1, 2]


@pytest.mark.parametrize("kept", [1, 1000, -1])
def test_a_torn_last_line_is_run_again(undisturbed: Path, tmp_path: Path, kept: int) -> None:
    path = tmp_path / "results.jsonl"
    *whole, last = undisturbed.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(whole) + last[:kept])
    study(4, path)
    assert path.read_bytes() == undisturbed.read_bytes()


def test_other_settings_are_refused_with_what_differs(undisturbed: Path) -> None:
    before = undisturbed.read_bytes()
    with pytest.raises(ValueError, match=r"line 1: made under other conditions") as refused:
        study(4, undisturbed, replace(SMALL, batch_size=16, dropout=0.1))
    assert "batch_size: 32 there, 16 now" in str(refused.value)
    assert "dropout: 0.2 there, 0.1 now" in str(refused.value)
    assert undisturbed.read_bytes() == before


def test_other_arms_are_refused(undisturbed: Path) -> None:
    with pytest.raises(ValueError, match=r"arms: "):
        run_study(4, undisturbed, SMALL, jobs=1)


@pytest.mark.parametrize("line", ['{"seed": 1}', "no json", "[1]"])
def test_a_line_that_is_no_record_is_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(ValueError, match="line 1: not a record of the study"):
        study(1, path)
    assert path.read_text() == line + "\n"


def test_two_studies_do_not_write_to_one_file(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    with opened(path, CONDITIONS), pytest.raises(OSError, match="another study is writing"):
        study(1, path)


def test_progress_tells_what_is_done(undisturbed: Path, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_bytes(undisturbed.read_bytes())
    told: list[tuple[int, int, bool]] = []
    run_study(6, path, SMALL, jobs=1, arms=ARMS, progress=lambda *now: told.append(now))
    assert told == [(4, 6, False), (5, 6, True), (6, 6, True)]


KILLED = """
import sys
from pathlib import Path
from polyak.study._arms import article_arm
from polyak.study._runner import run_study
from polyak.study._settings import Settings
settings = Settings(**{settings!r})
run_study(500, Path({path!r}), settings, jobs={jobs}, arms=article_arm(settings))
"""


@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_killed_study_goes_on_to_the_same_results(
    undisturbed: Path, tmp_path: Path, jobs: int
) -> None:
    path = tmp_path / "results.jsonl"
    script = KILLED.format(settings=asdict(SMALL), path=str(path), jobs=jobs)
    killed_after(2, path, script)
    done = lines(path)
    assert 2 <= done < 500
    wanted = max(done + 1, 4)
    records = study(wanted, path)
    assert records[:4] == study(4, undisturbed)
    assert [record["seed"] for record in records] == list(range(wanted))


def killed_after(seeds: int, path: Path, script: str) -> None:
    """Runs a study and kills it, once that many seeds are written, without a chance to tidy up."""
    process = subprocess.Popen(
        [sys.executable, "-c", script], stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and lines(path) < seeds:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with suppress(ProcessLookupError):  # its idle workers, which would wait for minutes
        os.killpg(process.pid, signal.SIGKILL)


def lines(path: Path) -> int:
    """Whole lines written so far."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.slow
def test_processes_do_not_change_a_result(undisturbed: Path, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    run_study(4, path, SMALL, jobs=-1, arms=ARMS)
    ours = {r["seed"]: r for r in map(json.loads, path.read_text().splitlines())}
    theirs = {r["seed"]: r for r in map(json.loads, undisturbed.read_text().splitlines())}
    assert ours == theirs


def test_a_file_is_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "page.html"
    write_whole(path, "ä")
    write_whole(path, "b")
    assert path.read_text(encoding="utf-8") == "b"
    assert list(path.parent.iterdir()) == [path]
