"""Holds: a folder of snapshots has one recorder, whoever asks and by whatever path."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from polyak import Averager, Recorder, _hold
from polyak.snapshots import snapshots

OTHER = """
import os, sys, time, torch
from polyak import Averager, Recorder, _hold
_hold.PATIENCE = 0.2
averager = Averager({"w": torch.ones(2)}, "exponential(0.9)")
averager.update()
folder = sys.argv[1]
def refused(call):
    try:
        call()
    except ValueError as error:
        assert "is in use" in str(error) and folder in str(error), error
        return True
    return False
def say(text):
    print(text, flush=True)
"""
# The first records, and the second is a fork of it.
FORKED = """
recorder = Recorder(averager, folder, every=1)
recorder.update()
if os.fork() == 0:
    again = refused(lambda: Recorder(averager, folder, every=1, resume=True))
    inherited = refused(recorder.record)
    os._exit(0 if again and inherited else 1)
_, status = os.wait()
recorder.record()
say("refused" if status == 0 else "both have it")
"""
# The first is killed, and what it forked lives on.
LEFT = """
recorder = Recorder(averager, folder, every=1)
if os.fork() == 0:
    say("forked")
    sys.stdin.read()
    os._exit(0)
time.sleep(600)
"""
# The first ends its recording, and what it forked before takes the folder over.
HANDED_ON = """
recorder = Recorder(averager, folder, every=1)
ready, done = os.pipe(), os.pipe()
if os.fork() == 0:
    os.read(ready[0], 1)
    recorder.record()
    os.write(done[1], b"!")
    sys.stdin.read()
    os._exit(0)
recorder.close()
os.write(ready[1], b"!")
os.read(done[0], 1)
assert refused(lambda: Recorder(averager, folder, every=1, resume=True))
say("handed on")
"""
HOLDS = """
recorder = Recorder(averager, folder, every=1)
say("holds")
sys.stdin.read()
"""


def averager() -> Averager:
    made = Averager({"w": torch.ones(2)}, "exponential(0.9)")
    made.update()
    return made


@contextmanager
def running(code: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-W", "ignore", "-c", OTHER + code, str(folder)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            yield process
        finally:
            process.kill()
            assert process.stdin is not None
            process.stdin.close()  # what it forked ends as well


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None and process.stderr is not None
    return process.stdout.readline().strip() or process.stderr.read()


def link(folder: Path) -> Path:
    place = folder.with_name("link")
    if not place.is_symlink():
        place.symlink_to(folder)
    return place


PATHS: dict[str, Callable[[Path], Path | str]] = {
    "the same": lambda folder: folder,
    "as text": str,
    "relative": os.path.relpath,
    "through its parent": lambda folder: folder / ".." / folder.name,
    "through a link": link,
    "through a link to its parent": lambda folder: link(folder.parent) / folder.name,
}


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("path", PATHS)
def test_a_second_recorder_is_refused_by_any_path(tmp_path: Path, path: str, resume: bool) -> None:
    folder = tmp_path / "runs" / "a"
    first = Recorder(averager(), folder, every=1)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"is in use in this process.*close\(\).*another fo"):
            Recorder(averager(), PATHS[path](folder), every=1, resume=resume)
        first.record()
    assert len(snapshots(folder)) == 1


def test_one_of_many_threads_gets_the_folder(tmp_path: Path) -> None:
    ready = threading.Barrier(8)
    got: list[Recorder | ValueError] = []

    def record() -> None:
        mine = averager()
        ready.wait()
        try:
            got.append(Recorder(mine, tmp_path / "run", every=1))
        except ValueError as error:
            got.append(error)

    for _ in range(8):
        threads = [threading.Thread(target=record) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        recorders = [each for each in got if isinstance(each, Recorder)]
        assert len(got) == 8 and len(recorders) == 1, got
        recorders.pop().close()
        got.clear()


@pytest.mark.parametrize("end", ["closed", "deleted"])
def test_a_recorder_that_ended_lets_go(tmp_path: Path, end: str) -> None:
    mine = averager()
    recorder = Recorder(mine, tmp_path, every=1)
    recorder.update()
    if end == "closed":
        recorder.close()
        recorder.close()
        with pytest.raises(RuntimeError, match="it is closed; make another one with resume=True"):
            recorder.record()
    else:
        del recorder
    assert Recorder(mine, tmp_path, every=1, resume=True).record()


def test_a_recorder_that_could_not_be_made_lets_go(tmp_path: Path) -> None:
    mine = averager()
    Recorder(mine, tmp_path, every=1).record()
    with pytest.raises(ValueError, match="has 1 snapshots") as kept:
        Recorder(mine, tmp_path, every=1)
    with pytest.raises(ValueError, match="of the run None"):
        Recorder(averager(), tmp_path, every=1, resume=True)
    assert kept is not None  # as a traceback that someone keeps
    assert Recorder(mine, tmp_path, every=1, resume=True).record()


def test_folders_of_their_own_disturb_no_one(tmp_path: Path) -> None:
    recorders = [Recorder(averager(), tmp_path / name, every=1) for name in "abc"]
    assert len({recorder.record() for recorder in recorders}) == 3


def test_the_folder_stays_the_same_where_the_process_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recorder = Recorder(averager(), "run", every=1)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert recorder.record().parent == tmp_path / "run"


def test_a_folder_that_was_removed_is_taken_anew(tmp_path: Path) -> None:
    first = Recorder(averager(), tmp_path / "run", every=1)
    shutil.rmtree(tmp_path / "run")
    assert first.record().exists()
    with pytest.raises(ValueError, match="is in use in this process"):
        Recorder(averager(), tmp_path / "run", every=1, resume=True)
    shutil.rmtree(tmp_path / "run")
    second = Recorder(averager(), tmp_path / "run", every=1)
    with pytest.raises(ValueError, match="is in use in this process"):
        first.record()
    second.close()
    assert first.record().exists()


def test_a_recorder_is_not_copied(tmp_path: Path) -> None:
    recorder = Recorder(averager(), tmp_path, every=1)
    for call in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="a Recorder cannot be copied or pickled"):
            call(recorder)


@pytest.mark.slow
def test_another_process_is_refused_until_the_first_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is killed may take a moment to end: that is waited for."""
    with running(HOLDS, tmp_path) as other:
        assert said(other) == "holds"
        monkeypatch.setattr(_hold, "PATIENCE", 0.2)
        with pytest.raises(ValueError, match="is in use by another process"):
            Recorder(averager(), tmp_path, every=1)
        monkeypatch.setattr(_hold, "PATIENCE", 600.0)
        end = threading.Timer(0.5, other.kill)
        end.start()
        assert Recorder(averager(), tmp_path, every=1).record()
        end.join()


@pytest.mark.slow
def test_a_forked_process_is_refused_while_its_parent_records(tmp_path: Path) -> None:
    with running(FORKED, tmp_path) as other:
        assert said(other) == "refused"


@pytest.mark.slow
def test_what_a_killed_process_forked_does_not_keep_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_hold, "PATIENCE", 600.0)
    with running(LEFT, tmp_path) as other:
        assert said(other) == "forked"
        other.kill()
        began = time.monotonic()
        recorder = Recorder(averager(), tmp_path, every=1)
        assert recorder.record() and time.monotonic() - began < 600


@pytest.mark.slow
def test_a_folder_goes_over_to_a_forked_process(tmp_path: Path) -> None:
    with running(HANDED_ON, tmp_path) as other:
        assert said(other) == "handed on"
