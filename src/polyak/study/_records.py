"""The file of records: one JSON line per run in `results.jsonl`, so that a study can resume.

A line is written whole and synced to the disk before the next run counts as done. If the process is
killed while it writes a line, the next run cuts that torn last line off and runs it again.
Everything else that does not fit is refused, and the file stays as it was.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from polyak._files import making_folder
from polyak._system import Claim
from polyak.study._loop import Run
from polyak.study._record_format import Record, RecordFormat, require_record

_BEGINNING = b'{"seed": '  # of every line that `add` writes
_LONGEST = 1 << 26  # bytes; a record of 500 epochs has 1 / 500 of this


class Results:
    """An open `results.jsonl`, locked: the records of the runs that are done; `add` appends one."""

    def __init__(self, file: IO[bytes], form: RecordFormat) -> None:
        self._file = file
        self._form = form
        self._lines: dict[Run, int] = {}  # run -> the number of its line, for messages
        self.by_run: dict[Run, Record] = {}
        self._read()

    def add(self, record: Record) -> None:
        """Appends a record and waits until it is on the disk.

        Raises `ValueError` for a record that would be refused when it is read again: a training
        that diverged to infinity or NaN.
        """
        try:
            require_record(record, self._form)
        except ValueError as error:
            raise ValueError(f"{_run(record)}: {error}") from None
        self._write(json.dumps(record).encode() + b"\n")
        self.by_run[_run(record)] = record

    def _read(self) -> None:
        self._file.seek(0)
        lines = iter(lambda: self._file.readline(_LONGEST + 1), b"")
        for number, line in enumerate(lines, start=1):
            if line.endswith(b"\n"):
                self._take(number, line)
            elif _is_torn(line):  # by now all lines before it have been found right
                self._file.truncate(self._file.tell() - len(line))
            else:
                self._take(number, line)
                self._write(b"\n")

    def _take(self, number: int, line: bytes) -> None:
        """Keeps the record of a whole line; raises `ValueError` with the file and the line."""
        try:
            record = _parsed(line)
            require_record(record, self._form)
            run = _run(record)
            if _measured(self.by_run.setdefault(run, record)) != _measured(record):
                raise ValueError(f"line {self._lines[run]} has other results of {run}")
        except ValueError as error:
            problem, *details = str(error).split("\n")
            remedy = "remove this line to run it again, or choose another folder"
            message = f"{self._file.name}, line {number}: {problem}; {remedy}"
            raise ValueError("\n".join([message, *details])) from None
        self._lines.setdefault(run, number)

    def _write(self, line: bytes) -> None:
        """Appends bytes and waits until they are on the disk."""
        try:
            while line:
                line = line[os.write(self._file.fileno(), line) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            raise OSError(error.errno, error.strerror, self._file.name) from None


def _run(record: Record) -> Run:
    return Run(record["seed"], record["schedule"], record["learning_rate"])


def _measured(record: Record) -> Record:
    """The fields that a repeated run must give again: all but its times."""
    return {name: value for name, value in record.items() if name != "seconds"}


def _is_torn(line: bytes) -> bool:
    """Whether a line without its end is the beginning of a record, so that nothing else is lost."""
    if not _BEGINNING.startswith(line[: len(_BEGINNING)]):
        return False
    try:
        _parsed(line)
    except ValueError:
        return True
    return False  # whole JSON: only the line end is missing


def _parsed(line: bytes) -> Any:
    if len(line) > _LONGEST:
        raise ValueError("it is longer than any record")
    try:
        return json.loads(line.decode(), object_pairs_hook=_without_repetition)
    except ValueError as error:
        raise ValueError(f"it is not the record of a run ({error})") from None
    except RecursionError:
        raise ValueError("it is not the record of a run (nested too deep)") from None


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON's object; the parser alone would silently keep the last of two values of one name."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("a name occurs twice in it")
    return fields


@contextmanager
def opened(path: Path, form: RecordFormat) -> Iterator[Results]:
    """Opens (or makes) a results file for one study at a time.

    If the block raises before a record was added to a new file, the file and the folders that were made
    for it are removed.

    Raises `ValueError` naming the file and the line for a line that is not a record of these
    conditions, and for a path that is a folder, a pipe or a device; `BlockingIOError` while another
    study writes to the same file.
    """
    _require_regular(path)
    with making_folder(path.parent), path.open("a+b") as file, _claimed(path, file):
        try:
            yield Results(file, form)
        except BaseException:
            if not os.fstat(file.fileno()).st_size:
                with suppress(PermissionError):  # Windows removes nothing that is open
                    path.unlink(missing_ok=True)
            raise


@contextmanager
def _claimed(path: Path, file: IO[bytes]) -> Iterator[None]:
    """Holds an open file; raises `BlockingIOError` if another study does, or has just removed it."""
    with suppress(FileNotFoundError), closing(Claim(path)) as claim:
        if claim.take() and os.fstat(file.fileno()).st_nlink:
            yield
            return
    wanted = "wait until it is done, or stop it"
    raise BlockingIOError(f"{path}: another study is writing to it; {wanted}")


def _require_regular(path: Path) -> None:
    if path.exists() and not path.is_file():
        kind = "a folder" if path.is_dir() else "a pipe or a device"
        raise ValueError(f"{path} is {kind}, wanted a file of records; choose another folder")
