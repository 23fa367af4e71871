"""A study resumes where it was, whatever interrupted it, and never mixes other conditions in."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from polyak.study import run
from polyak.study._conditions import Conditions
from polyak.study._records import opened
from quick import first_quick
from study_models import study

SMALL = study(schedules={"constant": lambda _: 1.0}, steps=4, evaluations=2, seeds=4)
FORM = Conditions(SMALL).format()


def measured(record: dict[str, Any]) -> dict[str, Any]:
    """A record without its times."""
    return {name: value for name, value in record.items() if name != "seconds"}


def completed(path: Path) -> list[dict[str, Any]]:
    """The records of all seeds; those that the file lacks are run."""
    return [measured(record) for record in run(SMALL, path.parent, jobs=1).records]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("undisturbed") / "results.jsonl"
    completed(path)
    return path


@pytest.mark.parametrize("kept", [1, 1000, -1])
def test_a_torn_last_line_is_run_again(undisturbed: Path, tmp_path: Path, kept: int) -> None:
    path = tmp_path / "results.jsonl"
    *whole, last = undisturbed.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(whole) + last[:kept])
    assert completed(path) == completed(undisturbed)
    *before, again = path.read_bytes().splitlines(keepends=True)
    assert before == whole and measured(json.loads(again)) == measured(json.loads(last))


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


LAST, CURVE = ("test", "ema", "last", "loss"), ("curves", "ema", "loss")
NOT_A_RECORD = "it is not the record of a run"
DAMAGED: list[tuple[str, Callable[[bytes], bytes], str]] = [
    ("no seed", lambda line: changed(line, "seed"), "seed is missing"),
    ("a text as seed", lambda line: changed(line, "seed", to="0"), "seed is '0', wanted an integer"),
    ("a list as seed", lambda line: changed(line, "seed", to=[0]), r"seed is \[0\], wanted an intege"),
    ("a truth as seed", lambda line: changed(line, "seed", to=True), "seed is True, wanted an integ"),
    ("a negative seed", lambda line: changed(line, "seed", to=-1), "seed is -1, wanted an integer"),
    ("no conditions", lambda line: changed(line, "conditions"), "it has no conditions"),
    ("conditions that are a list", lambda line: changed(line, "conditions", to=[]), "no conditions"),
    ("a condition more", lambda line: changed(line, "conditions", "x", to=1), "another version of polyak, under other conditions"),
    ("a condition less", lambda line: changed(line, "conditions", "steps"), "another version of polyak"),
    ("another fingerprint", lambda line: changed(line, "fingerprint", to="0" * 12), "its fingerprin"),
    ("no fingerprint", lambda line: changed(line, "fingerprint"), "its fingerprint is None"),
    ("a name more", lambda line: changed(line, "extra", to=1), r"\['extra'\] is unknown"),
    ("a name more inside", lambda line: changed(line, "seconds", "x", to=1), "is unknown in seconds"),
    ("no loss", lambda line: changed(line, *LAST), "loss is missing in test.ema.last"),
    ("NaN", lambda line: changed(line, *LAST, to=math.nan), "last.loss is nan, wanted a finite"),
    ("infinity", lambda line: changed(line, *LAST, to=math.inf), "last.loss is inf, wanted"),
    ("a negative rate", lambda line: changed(line, "learning_rate", to=-1.0), "learning_rate is -1.0, want"),
    ("an infinite loss in digits", lambda line: changed(line, *LAST, to=7.5).replace(b"7.5", b"1e999"), "inf, wan"),
    ("no curves", lambda line: changed(line, "curves"), "curves is missing"),
    ("a curve less", lambda line: changed(line, *CURVE), "loss is missing in curves.ema"),
    ("a short curve", lambda line: changed(line, *CURVE, to=[0.5]), "has 1 values, wanted"),
    ("a text as curve", lambda line: changed(line, *CURVE, to="x"), "is 'x', wanted a lis"),
    ("no arm", lambda line: changed(line, "bytes", to={}), "ema.* is missing in bytes"),
    ("a text as step", lambda line: changed(line, "steps", to=["9", "9"]), r"steps\[0\] is '9', wanted"),
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
@pytest.mark.parametrize("before", first_quick([2, 0]))
def test_a_line_that_is_no_record_is_refused_and_stays(
    undisturbed: Path, tmp_path: Path, damage: Callable[[bytes], bytes], message: str, before: int
) -> None:
    """The error has the file, the line and what to do; the file and its other lines stay."""
    path = tmp_path / "results.jsonl"
    lines = undisturbed.read_bytes().splitlines(keepends=True)
    content = b"".join(lines[2 : 2 + before]) + damage(lines[0])
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as refused:
        completed(path)
    first = str(refused.value).split("\n")[0]
    assert first.startswith(f"{path}, line {before + 1}: ")
    assert first.endswith("; remove this line to run it again, or choose another folder")
    assert len(str(refused.value)) < 1000
    assert path.read_bytes() == content


def test_two_lines_of_one_seed_are_refused_unless_they_are_equal(
    undisturbed: Path, tmp_path: Path
) -> None:
    """Times may differ."""
    path = tmp_path / "results.jsonl"
    lines = undisturbed.read_bytes().splitlines(keepends=True)
    slower = changed(lines[0], "seconds", "train", to=9.0)
    path.write_bytes(lines[0] + lines[1] + slower)
    assert completed(path) == completed(undisturbed)
    path.write_bytes(lines[0] + lines[1] + changed(lines[0], *LAST, to=0.5))
    with pytest.raises(ValueError, match="line 3: line 1 has other results of seed 0"):
        completed(path)


def test_a_whole_last_line_without_its_end_is_kept(undisturbed: Path, tmp_path: Path) -> None:
    """An editor may leave the line end out; nothing is torn then."""
    path = tmp_path / "results.jsonl"
    lines = undisturbed.read_bytes().splitlines(keepends=True)
    path.write_bytes((lines[2] + lines[0])[:-1])
    with opened(path, FORM) as results:
        assert [made.seed for made in results.by_run] == [2, 0]
    assert path.read_bytes() == lines[2] + lines[0]


def test_a_torn_line_stays_where_another_line_is_refused(undisturbed: Path, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    lines = undisturbed.read_bytes().splitlines(keepends=True)
    content = changed(lines[0], "seed") + lines[1][:500]
    path.write_bytes(content)
    with pytest.raises(ValueError, match="line 1: seed is missing"):
        completed(path)
    assert path.read_bytes() == content


@pytest.mark.parametrize("path", ["/dev/null", "/dev/zero", "/dev/full", ".", "pipe"])
def test_a_path_that_is_no_file_is_refused(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    refused = pytest.raises(ValueError, match=f"^{path} is .*; choose another folder$")
    with refused, opened(Path(path), FORM):
        pass


def test_a_file_where_the_folder_should_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("precious")
    with pytest.raises(NotADirectoryError, match="out is a file, wanted a folder"):
        completed(tmp_path / "out" / "results.jsonl")
    assert (tmp_path / "out").read_text() == "precious"


def test_a_study_that_fails_before_its_first_record_leaves_nothing(
    undisturbed: Path, tmp_path: Path
) -> None:
    with pytest.raises(KeyError), opened(tmp_path / "a/b/results.jsonl", FORM):
        raise KeyError
    assert not list(tmp_path.iterdir())
    (tmp_path / "results.jsonl").touch()
    record = json.loads(undisturbed.read_text().splitlines()[0])
    with pytest.raises(KeyError), opened(tmp_path / "results.jsonl", FORM) as results:
        results.add(record)
        raise KeyError
    assert (tmp_path / "results.jsonl").read_bytes().count(b"\n") == 1


def test_a_record_that_would_be_refused_is_not_written(undisturbed: Path, tmp_path: Path) -> None:
    record = json.loads(undisturbed.read_text().splitlines()[0])
    record["seconds"]["train"] = math.nan
    wanted = "seed 0, schedule constant, learning rate 0.05: seconds.train is nan, wanted a finite"
    refused = pytest.raises(ValueError, match=wanted)
    with refused, opened(tmp_path / "new" / "results.jsonl", FORM) as results:
        results.add(record)
    assert not (tmp_path / "new").exists()


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
    assert completed(path) == completed(undisturbed)


def test_two_studies_do_not_write_to_one_file(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    with opened(path, FORM), pytest.raises(OSError, match="another study is writing"):
        completed(path)


@pytest.mark.slow
def test_processes_do_not_change_a_result(undisturbed: Path, tmp_path: Path) -> None:
    several = run(SMALL, tmp_path, jobs=2).records
    assert [measured(record) for record in several] == completed(undisturbed)
