"""Files appear complete or not at all: whatever fails, whoever is killed, whoever races."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

import polyak._files
from patience import HANG
from polyak import _system as system
from polyak import _unfinished as unfinished
from polyak._files import making_folder, writing, writing_folder

# A process without torch, started without site-packages: it is there in a moment, so many can be killed.
LOAD = f"""
import os, sys, time
sys.path.insert(0, {str(Path(polyak._files.__file__).parent.parent)!r})
from pathlib import Path
from polyak import _files as files
place = Path(sys.argv[1])
"""
# Version n of a file is 1 MB of the byte n, and of a folder two such files.
WRITE = (
    LOAD
    + """
print("ready", flush=True)
for version in range(1, 256):
    with files.writing(place) as file:
        for _ in range(16):
            file.write(bytes([version]) * 65536)
"""
)
WRITE_FOLDER = (
    LOAD
    + """
print("ready", flush=True)
for version in range(1, 256):
    with files.writing_folder(place, overwrite=True) as folder:
        for name in ("first", "second"):
            (folder / name).write_bytes(bytes([version]) * 65536)
"""
)
RACE = (
    LOAD
    + """
sys.stdin.read(1)
try:
    with files.writing(place, overwrite=False) as file:
        file.write(sys.argv[2].encode() * 100_000)
    print("won")
except FileExistsError as error:
    print("exists" if str(place) in str(error) else "unnamed")
"""
)
RACE_FOLDER = RACE.replace("files.writing(", "files.writing_folder(").replace(
    "as file:\n        file.write(", 'as folder:\n        (folder / "it").write_bytes('
)
REPEAT = (
    LOAD
    + """
sys.stdin.read(1)
for _ in range(150):
    with files.writing(place) as file:
        file.write(sys.argv[2].encode() * 1000)
print("done")
"""
)


def started(code: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-S", "-c", code, *map(str, arguments)]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def kill_soon(code: str, place: Path, seconds: float) -> None:
    """Runs a writer and kills it so long after its first write began."""
    process = started(code, place)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate(timeout=HANG)
    assert process.returncode in (-signal.SIGKILL, 0), errors


def at_once(code: str, place: Path, count: int) -> list[str]:
    """What so many processes print that are let go together."""
    processes = [started(code, place, chr(97 + i)) for i in range(count)]
    time.sleep(0.3)
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("!")
        process.stdin.flush()
    ends = [process.communicate(timeout=HANG) for process in processes]
    assert not any(errors for _, errors in ends), ends
    return [output.strip() for output, _ in ends]


def test_a_file_appears_when_complete(tmp_path: Path) -> None:
    place = tmp_path / "weights"
    with writing(place) as file:
        file.write(b"new")
        assert not place.exists()
    assert place.read_bytes() == b"new"
    with writing(place) as file:
        file.write(b"newer")
        assert place.read_bytes() == b"new"
    assert place.read_bytes() == b"newer"
    assert [each.name for each in tmp_path.iterdir()] == ["weights"]


@pytest.mark.parametrize("before", [None, b"old"])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_all_as_it_was(
    tmp_path: Path, before: bytes | None, error: type[BaseException]
) -> None:
    place = tmp_path / "weights"
    if before is not None:
        place.write_bytes(before)
    with pytest.raises(error), writing(place) as file:
        file.write(b"half")
        raise error
    assert {each.name: each.read_bytes() for each in tmp_path.iterdir()} == (
        {} if before is None else {"weights": before}
    )


def test_what_exists_is_kept_unless_told(tmp_path: Path) -> None:
    place = tmp_path / "weights"
    place.write_bytes(b"old")
    with (
        pytest.raises(FileExistsError, match="weights already exists"),
        writing(place, overwrite=False),
    ):
        pass
    with (
        pytest.raises(
            FileExistsError, match="by another process in the meantime; pass overwrite=True"
        ),
        writing(tmp_path / "n", overwrite=False),
    ):
        (tmp_path / "n").write_bytes(b"of another")
    assert (tmp_path / "n").read_bytes() == b"of another"
    dangling = tmp_path / "link"
    dangling.symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError), writing(dangling, overwrite=False):
        pass
    assert place.read_bytes() == b"old"


NAMES = ["a[1]*?.bin", ".hidden", "ümläut", "with space", "$(x)", "-f"]


@pytest.mark.parametrize("name", NAMES)
def test_abandoned_parts_go_and_others_stay(tmp_path: Path, name: str) -> None:
    place = tmp_path / name
    mine = unfinished._HERE + "0" * 9
    abandoned = tmp_path / f".{name}.{mine}0.part"
    abandoned.write_bytes(b"left by a killed process")
    abandoned_folder = tmp_path / f".{name}.{mine}1.part"
    abandoned_folder.mkdir()
    (abandoned_folder / "it").write_bytes(b"left too")
    (tmp_path / f".another.{mine}0.part").write_bytes(b"of a name that may never come again")
    others = [f".{name}.part", f".{name}.mine.part", f"x{name}.{'0' * 16}.part", ".a1x.part"]
    for other in others:
        (tmp_path / other).write_bytes(b"of someone else")
    with writing(place) as file:
        file.write(b"it")
    assert {each.name for each in tmp_path.iterdir()} == {name, *others}


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_another_host_writes_stays_for_a_day(tmp_path: Path, kind: str) -> None:
    """Its lock may not be seen here: on NFS a folder's is not."""
    left = tmp_path / f".step-1.{'0' * 16}.part"
    left.mkdir() if kind == "folder" else left.touch()
    with writing(tmp_path / "step-2") as file:
        file.write(b"it")
    assert left.exists()
    day = unfinished._DAY + 60
    os.utime(left, (time.time() - day, time.time() - day))
    with writing(tmp_path / "step-3") as file:
        file.write(b"it")
    assert not left.exists()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_without_locks_files_are_written_and_nothing_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)
    abandoned = tmp_path / f".it.{unfinished._HERE}{'0' * 10}.part"
    abandoned.touch()
    with writing(tmp_path / "it") as file, writing_folder(tmp_path / "folder") as folder:
        file.write(b"it")
        (folder / "it").write_bytes(b"it")
    assert (tmp_path / "it").read_bytes() == (tmp_path / "folder" / "it").read_bytes() == b"it"
    assert abandoned.exists()


def test_a_lock_that_fails_otherwise_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, "the disk is gone")

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(OSError, match="the disk is gone"), writing(tmp_path / "it"):
        pass
    assert not list(tmp_path.iterdir())


def test_what_is_being_written_is_not_abandoned(tmp_path: Path) -> None:
    place = tmp_path / "weights"
    with writing(place) as slow:
        slow.write(b"slow")
        with writing(place) as quick:
            quick.write(b"quick")
        with writing_folder(tmp_path / "folder") as folder:
            with pytest.raises(ValueError), writing_folder(tmp_path / "folder"):
                raise ValueError
            (folder / "it").write_bytes(b"it")
        assert place.read_bytes() == b"quick"
    assert place.read_bytes() == b"slow"
    assert (tmp_path / "folder" / "it").read_bytes() == b"it"


def test_a_folder_appears_when_complete(tmp_path: Path) -> None:
    place = tmp_path / "new" / "model"
    with writing_folder(place) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "it").write_bytes(b"it")
        assert not place.exists()
    assert (place / "inner" / "it").read_bytes() == b"it"
    with pytest.raises(FileExistsError, match="model already exists"), writing_folder(place):
        pass
    with pytest.raises(ValueError), writing_folder(place, overwrite=True) as folder:
        raise ValueError
    assert (place / "inner" / "it").read_bytes() == b"it"
    with writing_folder(place, overwrite=True) as folder:
        (folder / "it").write_bytes(b"other")
    assert {each.name for each in place.iterdir()} == {"it"}
    assert [each.name for each in place.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("there", ["", "a", "a/b"])
def test_a_failed_write_leaves_no_folder_that_it_made(tmp_path: Path, there: str) -> None:
    (tmp_path / there).mkdir(parents=True, exist_ok=True)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(KeyError), writing_folder(tmp_path / "a/b/c") as folder:
        (folder / "half").touch()
        raise KeyError
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_that_is_not_empty_stays_when_a_block_fails(tmp_path: Path) -> None:
    with pytest.raises(KeyError), making_folder(tmp_path / "a/b"):
        (tmp_path / "a/other").touch()
        raise KeyError
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "a", tmp_path / "a/other"]


def test_a_folder_replaces_a_file_when_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    with writing_folder(tmp_path / "file", overwrite=True) as folder:
        (folder / "it").write_bytes(b"it")
    assert [each.name for each in (tmp_path / "file").iterdir()] == ["it"]


def test_a_folder_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    place = tmp_path / "model"
    with (
        pytest.raises(FileExistsError, match="by another process"),
        writing_folder(place) as folder,
    ):
        (folder / "it").write_bytes(b"it")
        place.mkdir()
    assert list(place.iterdir()) == []


def test_folders_without_an_exchange_of_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(polyak._files, "_rename", lambda *_: False)
    place = tmp_path / "model"
    for content in (b"first", b"second"):
        with writing_folder(place, overwrite=True) as folder:
            (folder / "it").write_bytes(content)
        assert (place / "it").read_bytes() == content
    assert [each.name for each in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("overwrite", [True, False])
def test_writers_of_one_new_folder_do_not_disturb_each_other(
    tmp_path: Path, overwrite: bool
) -> None:
    """With `overwrite` all succeed, and the last one stays; without, one succeeds."""
    ready, outcomes = threading.Barrier(6), Counter[str]()

    def write(place: Path) -> None:
        ready.wait()
        try:
            with writing_folder(place, overwrite=overwrite) as folder:
                (folder / "it").write_bytes(b"it")
            outcomes["written"] += 1
        except FileExistsError:
            outcomes["refused"] += 1

    for round in range(40):
        place = tmp_path / str(round)
        threads = [threading.Thread(target=write, args=(place,)) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [each.name for each in place.iterdir()] == ["it"]
    assert outcomes == ({"written": 240} if overwrite else {"written": 40, "refused": 200})
    assert len(list(tmp_path.iterdir())) == 40


@pytest.mark.skipif(system.WINDOWS, reason="Windows has no locks of folders")
@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("first", ["the writer", "who removes"])
def test_who_comes_late_removes_nothing_that_was_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, first: str
) -> None:
    """Two see a hidden name that is not locked yet. One removes it, and its writer makes it again
    before the other one gets the lock of what is gone; or the writer itself gets that lock late."""
    make, write = {
        "file": (lambda path: path.touch(), writing),
        "folder": (lambda path: path.mkdir(), writing_folder),
    }[kind]
    late = tmp_path / f".it.{unfinished._HERE}{'0' * 10}.part"
    lock, made = system.locked, list[Path]()

    def locks_late(handle: int, **options: bool) -> bool:
        if not made:
            made.append(late)
            unfinished.remove(late)
            if first == "who removes":
                make(late)
        return lock(handle, **options)

    monkeypatch.setattr(system, "locked", locks_late)
    if first == "who removes":
        make(late)
        with write(tmp_path / "it"):
            pass
        assert late.exists()
    else:
        monkeypatch.setattr(polyak._files, "beside", lambda *_: late)
        with write(tmp_path / "it"):
            assert late.exists()
    assert made


@pytest.mark.slow
def test_killed_at_any_moment_the_last_complete_file_stays(tmp_path: Path) -> None:
    place = tmp_path / "weights"
    chosen = random.Random(0)
    seen: set[int] = set()
    for attempt in range(240):
        if attempt >= 24 and len(seen) > 3:
            break
        # On a busy machine few versions are written in this time, so it grows.
        kill_soon(WRITE, place, chosen.uniform(0.0, 0.08 * (1 + attempt / 24)))
        if place.exists():
            content = place.read_bytes()
            assert len(content) == 1 << 20
            assert content == content[:1] * len(content)
            seen.add(content[0])
    assert len(seen) > 3, "the kills came at one moment: the test shows nothing"
    with writing(place) as file:
        file.write(b"it")
    assert [each.name for each in tmp_path.iterdir()] == ["weights"]


@pytest.mark.slow
def test_killed_at_any_moment_a_complete_folder_stays(tmp_path: Path) -> None:
    place = tmp_path / "model"
    with writing_folder(place) as folder:
        for name in ("first", "second"):
            (folder / name).write_bytes(bytes(65536))
    chosen = random.Random(1)
    seen: set[int] = set()
    for attempt in range(240):
        if attempt >= 24 and len(seen) > 3:
            break
        # On a busy machine few versions are written in this time, so it grows.
        kill_soon(WRITE_FOLDER, place, chosen.uniform(0.0, 0.08 * (1 + attempt / 24)))
        contents = {each.name: each.read_bytes() for each in place.iterdir()}
        assert contents.keys() == {"first", "second"}
        assert contents["first"] == contents["second"] == contents["first"][:1] * 65536
        seen.add(contents["first"][0])
    assert len(seen) > 3, "the kills came at one moment: the test shows nothing"


@pytest.mark.slow
@pytest.mark.parametrize("code", [RACE, RACE_FOLDER], ids=["file", "folder"])
def test_one_of_many_wins_a_race(tmp_path: Path, code: str) -> None:
    for round in range(4):
        place = tmp_path / f"weights-{round}"
        outcomes = at_once(code, place, 8)
        assert sorted(outcomes) == ["exists"] * 7 + ["won"]
        winner = chr(97 + outcomes.index("won"))
        held = place / "it" if place.is_dir() else place
        assert held.read_bytes() == winner.encode() * 100_000
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.slow
def test_writers_to_one_place_do_not_take_each_other_for_abandoned(tmp_path: Path) -> None:
    place = tmp_path / "weights"
    assert at_once(REPEAT, place, 6) == ["done"] * 6
    content = place.read_bytes()
    assert content == content[:1] * 1000
    assert [each.name for each in tmp_path.iterdir()] == ["weights"]


@pytest.mark.slow
def test_a_folder_is_never_missing_while_it_is_replaced(tmp_path: Path) -> None:
    place = tmp_path / "model"
    place.mkdir()
    process = started(WRITE_FOLDER, place)
    looks = 0
    while process.poll() is None:
        assert place.is_dir()
        looks += 1
    assert process.communicate(timeout=HANG) == ("ready\n", "")
    assert looks > 1000
