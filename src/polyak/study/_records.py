"""Records: one JSON line per seed in `results.jsonl`, appended as seeds finish, so that a study resumes.

A line is written whole and synced before the next seed counts as done. A last line torn by an
interruption is cut off and its seed run again; anything else that does not fit is refused.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from polyak.study._settings import differences

Record = dict[str, Any]


class Results:
    """An open `results.jsonl`, locked: the records of seeds done, and where to add more."""

    def __init__(self, file: IO[bytes], conditions: Mapping[str, Any]) -> None:
        self._file = file
        self._conditions = conditions
        self.by_seed = {record["seed"]: record for record in self._read()}

    def add(self, record: Record) -> None:
        """Appends a record and waits until it is on the disk."""
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.by_seed[record["seed"]] = record

    def _read(self) -> Iterator[Record]:
        self._file.seek(0)
        lines = self._file.read().splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):
            self._file.truncate(sum(map(len, lines[:-1])))
            lines.pop()
        for number, line in enumerate(lines, start=1):
            yield self._checked(number, line)

    def _checked(self, number: int, line: bytes) -> Record:
        """The record of one whole line, if it is one and was made under the same conditions."""
        where = f"{self._file.name}, line {number}"
        try:
            record: Record = json.loads(line)
            stored = record["conditions"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{where}: not a record of the study ({error!r})") from None
        if changed := differences(stored, self._conditions):
            raise ValueError(
                f"{where}: made under other conditions; use another folder, or the same settings.\n"
                + "\n".join(changed)
            )
        return record


@contextmanager
def opened(path: Path, conditions: Mapping[str, Any]) -> Iterator[Results]:
    """Opens (or makes) a results file for one study at a time.

    Raises `ValueError` for records of other conditions, listing what differs, and `BlockingIOError`
    while another study writes to the same file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            wanted = "wait until it is done, or stop it"
            raise BlockingIOError(f"{path}: another study is writing to it; {wanted}") from None
        yield Results(file, conditions)


def write_whole(path: Path, text: str) -> None:
    """Writes a file so that it is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)
