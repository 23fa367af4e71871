"""A study resumes where it was, whatever interrupted it, and never mixes other conditions in."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from polyak.study._arms import article_arm
from polyak.study._data import make_data
from polyak.study._record_format import article_format
from polyak.study._records import opened
from polyak.study._runner import run_study
from polyak.study._settings import Settings
from polyak.study._trainer import conditions, run_seed
from study_cases import SMALL

ARMS = article_arm(SMALL)
FORM = article_format(conditions(SMALL, ARMS))


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
    with pytest.raises(ValueError, match=r"line 1: it was made under other conditions") as refused:
        study(4, undisturbed, replace(SMALL, batch_size=16, dropout=0.1))
    assert "batch_size: 32 there, 16 now" in str(refused.value)
    assert "dropout: 0.2 there, 0.1 now" in str(refused.value)
    assert undisturbed.read_bytes() == before


def test_other_arms_are_refused(undisturbed: Path) -> None:
    with pytest.raises(ValueError, match=r"arms: "):
        run_study(4, undisturbed, SMALL, jobs=1)


def changed(line: bytes, *keys: str, to: object = None) -> bytes:
    """A line with one of its values changed, or without it."""
    record = inner = json.loads(line)
    for key in keys[:-1]:
        inner = inner[key]
    if to is None:
        del inner[keys[-1]]
    else:
        inner[keys[-1]] = to
    return json.dumps(record).encode() + b"\n"


NOT_A_RECORD = "it is not the record of a run"
DAMAGED: list[tuple[str, Callable[[bytes], bytes], str]] = [
    ("no seed", lambda line: changed(line, "seed"), "seed is missing"),
    ("a text as seed", lambda line: changed(line, "seed", to="0"), "seed is '0', wanted an integer"),
    ("a list as seed", lambda line: changed(line, "seed", to=[0]), r"seed is \[0\], wanted an intege"),
    ("a truth as seed", lambda line: changed(line, "seed", to=True), "seed is True, wanted an integ"),
    ("a negative seed", lambda line: changed(line, "seed", to=-1), "seed is -1, wanted an integer"),
    ("no conditions", lambda line: changed(line, "conditions"), "it has no conditions"),
    ("conditions that are a list", lambda line: changed(line, "conditions", to=[]), "no conditions"),
    ("a condition more", lambda line: changed(line, "conditions", "x", to=1), "under other conditio"),
    ("a condition less", lambda line: changed(line, "conditions", "rows"), "under other conditions"),
    ("another fingerprint", lambda line: changed(line, "fingerprint", to="0" * 12), "its fingerprin"),
    ("no fingerprint", lambda line: changed(line, "fingerprint"), "its fingerprint is None"),
    ("a name more", lambda line: changed(line, "extra", to=1), r"\['extra'\] is unknown"),
    ("a name more inside", lambda line: changed(line, "live", "x", to=1), "is unknown in live"),
    ("no loss", lambda line: changed(line, "live", "mse"), "mse is missing in live"),
    ("NaN", lambda line: changed(line, "live", "mse", to=math.nan), "live.mse is nan, wanted a fini"),
    ("infinity", lambda line: changed(line, "live", "r2", to=math.inf), "live.r2 is inf, wanted"),
    ("a negative loss", lambda line: changed(line, "live", "mae", to=-1.0), "live.mae is -1.0, want"),
    ("an infinite loss in digits", lambda line: changed(line, "live", "mse", to=7.5).replace(b"7.5", b"1e999"), "inf, wan"),
    ("no history", lambda line: changed(line, "history"), "history is missing"),
    ("a curve less", lambda line: changed(line, "history", "r2_ema"), "r2_ema is missing in history"),
    ("a short curve", lambda line: changed(line, "history", "r2_ema", to=[0.5]), "has 1 values, wanted"),
    ("a text as curve", lambda line: changed(line, "history", "r2_ema", to="x"), "is 'x', wanted a lis"),
    ("no arm", lambda line: changed(line, "arms", to={}), "article_ema is missing in arms"),
    ("a text as epoch", lambda line: changed(line, "stop_epoch", to="9"), "stop_epoch is '9', wanted"),
    ("a name twice", lambda line: line.replace(b"{", b'{"seed": 5, ', 1), "a name occurs twice"),
    ("deep nesting", lambda _: b"[" * 100_000 + b"]" * 100_000 + b"\n", "nested too deep"),
    ("nesting in a record", lambda line: line.replace(b'"seed": 0', b'"seed": ' + b"[" * 900 + b"]" * 900), "seed is"),
    ("a long number", lambda line: line.replace(b'"seed": 0', b'"seed": 1' + b"0" * 5000), NOT_A_RECORD),
    ("no JSON", lambda _: b"no json\n", NOT_A_RECORD),
    ("an empty line", lambda line: b"\n" + line, NOT_A_RECORD),
    ("two records on a line", lambda line: line[:-1] + line, NOT_A_RECORD),
    ("a torn line before another", lambda line: line[:100] + b"\n" + line, NOT_A_RECORD),
    ("bytes", lambda _: bytes(range(256)) + b"\n", NOT_A_RECORD),
    ("a list", lambda _: b"[1]\n", r"it holds \[1\], wanted the record"),
    ("a number", lambda _: b"1\n", "it holds 1, wanted the record"),
    ("nothing", lambda _: b"null\n", "it holds None, wanted the record"),
    ("someone's notes without a line end", lambda _: b"do not lose me", NOT_A_RECORD),
    ("zeros without a line end", lambda _: bytes(100), NOT_A_RECORD),
    ("another JSON without a line end", lambda _: b'{"seed": 0}', "no conditions"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("damage", "message"), [d[1:] for d in DAMAGED], ids=[d[0] for d in DAMAGED]
)
@pytest.mark.parametrize("before", [0, 2])
def test_a_line_that_is_no_record_is_refused_and_stays(
    undisturbed: Path, tmp_path: Path, damage: Callable[[bytes], bytes], message: str, before: int
) -> None:
    """The error has the file, the line and what to do; the file and its other lines stay."""
    path = tmp_path / "results.jsonl"
    lines = undisturbed.read_bytes().splitlines(keepends=True)
    content = b"".join(lines[2 : 2 + before]) + damage(lines[0])
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as refused:
        study(1, path)
    first = str(refused.value).split("\n")[0]
    assert first.startswith(f"{path}, line {before + 1}: ")
    assert first.endswith("; remove this line to run it again, or choose another folder")
    assert len(str(refused.value)) < 1000
    assert path.read_bytes() == content


def test_two_lines_of_one_seed_are_refused_unless_they_are_equal(
    undisturbed: Path, tmp_path: Path
) -> None:
    path = tmp_path / "results.jsonl"
    lines = undisturbed.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1] + lines[0])
    assert study(2, path) == study(2, undisturbed)
    path.write_bytes(lines[0] + lines[1] + changed(lines[0], "live", "mse", to=0.5))
    with pytest.raises(ValueError, match="line 3: line 1 has other results of seed 0"):
        study(2, path)


def test_a_whole_last_line_without_its_end_is_kept(undisturbed: Path, tmp_path: Path) -> None:
    """An editor may leave the line end out; nothing is torn then."""
    path = tmp_path / "results.jsonl"
    lines = undisturbed.read_bytes().splitlines(keepends=True)
    path.write_bytes((lines[2] + lines[0])[:-1])
    with opened(path, FORM) as results:
        assert list(results.by_run) == [2, 0]
    assert path.read_bytes() == lines[2] + lines[0]


def test_a_torn_line_stays_where_another_line_is_refused(undisturbed: Path, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    lines = undisturbed.read_bytes().splitlines(keepends=True)
    content = changed(lines[0], "seed") + lines[1][:500]
    path.write_bytes(content)
    with pytest.raises(ValueError, match="line 1: seed is missing"):
        study(1, path)
    assert path.read_bytes() == content


@pytest.mark.parametrize("path", ["/dev/null", "/dev/zero", "/dev/full", ".", "pipe"])
def test_a_path_that_is_no_file_is_refused(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    with pytest.raises(ValueError, match=f"^{path} is .*; choose another folder$"):
        study(1, Path(path))


def test_a_file_where_the_folder_should_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("precious")
    with pytest.raises(NotADirectoryError, match="out is a file, wanted a folder"):
        study(1, tmp_path / "out" / "results.jsonl")
    assert (tmp_path / "out").read_text() == "precious"


def test_a_training_that_diverges_is_not_recorded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"seed 0: .* is (nan|inf), wanted a finite number"):
        study(1, tmp_path / "new" / "results.jsonl", replace(SMALL, learning_rate=1e30))
    assert not (tmp_path / "new").exists()


def test_a_study_that_fails_before_its_first_record_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError), opened(tmp_path / "a/b/results.jsonl", FORM):
        raise KeyError
    assert not list(tmp_path.iterdir())
    (tmp_path / "results.jsonl").touch()
    with pytest.raises(KeyError), opened(tmp_path / "results.jsonl", FORM) as results:
        results.add(run_seed(0, SMALL, make_data(SMALL), ARMS))
        raise KeyError
    assert lines(tmp_path / "results.jsonl") == 1


def test_a_full_disk_is_told_with_the_file(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part of the line may be written by then: it is a torn line."""
    path = tmp_path / "results.jsonl"
    record = json.loads(undisturbed.read_text().splitlines()[0])
    write = os.write
    parts = iter([100, 0])

    def full(handle: int, data: bytes) -> int:
        if part := next(parts):
            return write(handle, data[:part])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, opened(path, FORM) as results:
        patch.setattr(os, "write", full)
        with pytest.raises(OSError, match=f"No space left on device: '{path}'"):
            results.add(record)
    assert len(path.read_bytes()) == 100
    assert study(4, path) == study(4, undisturbed)


def test_two_studies_do_not_write_to_one_file(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    with opened(path, FORM), pytest.raises(OSError, match="another study is writing"):
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
    while process.poll() is None and lines(path) < seeds:
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
