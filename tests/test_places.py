"""Places: whatever writes, and whatever lies at its path, nothing is lost, and errors name the path.

A new writer, or a new thing that may lie at a path, is one line in a table.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch.distributed.checkpoint.state_dict_saver import save

import polyak
from alone import ALONE
from polyak import Averager, Recorder, checkpoints
from polyak.offline import average, concatenate
from polyak.study._page import _write
from polyak.study._records import opened
from quick import first_quick
from since import since
from study_cases import FORM


def averager(size: int = 8) -> Averager:
    made = Averager({"w": torch.ones(size)}, "exponential(0.9)")
    made.update()
    return made


def saving(path: Path, size: int) -> None:
    with checkpoints.saving(path, overwrite=True) as folder:
        (folder / "inner").mkdir()
        polyak.save(folder / "inner" / "average", averager(size))


SOURCES = tempfile.TemporaryDirectory()  # removed when the tests end
Path(SOURCES.name).chmod(0o755)


@cache
def theirs(size: int) -> Path:
    """A file of torch's AveragedModel."""
    path = Path(SOURCES.name) / f"theirs-{size}"
    model = torch.optim.swa_utils.AveragedModel(torch.nn.Linear(size, 1))
    torch.save(model.state_dict(), path)
    return path


@cache
def ours(size: int) -> Path:
    path = Path(SOURCES.name) / f"ours-{size}"
    polyak.save(path, averager(size))
    return path


@cache
def an_adapter(size: int) -> Path:
    """A folder as PEFT writes it."""
    path = Path(SOURCES.name) / f"adapter-{size}"
    path.mkdir()
    factors = {"A": torch.ones(1, size), "B": torch.ones(size, 1)}
    held = {f"base_model.model.q.lora_{side}.weight": tensor for side, tensor in factors.items()}
    torch.save(held, path / "adapter_model.bin")
    settings = {"peft_type": "LORA", "lora_alpha": 1, "target_modules": ["q"]}
    (path / "adapter_config.json").write_text(json.dumps(settings))
    return path


ONE_AT_A_TIME = threading.Lock()


@cache
def distributed(size: int) -> Path:
    path = Path(SOURCES.name) / f"distributed-{size}"
    # All threads share the filters, and each sets them back for all when it ends.
    with ONE_AT_A_TIME, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        save({"w": torch.ones(size)}, checkpoint_id=path, **ALONE)
    return path


def like(path: Path, size: int) -> None:
    checkpoints.write_like(path, distributed(size), {"w": torch.zeros(size)}, overwrite=True)


def convert(path: Path, size: int) -> None:
    checkpoints.convert(theirs(size), path, "uniform()", count=1, overwrite=True)


class Writer(NamedTuple):
    """Something that writes an average of so many elements to a path, over what is there."""

    write: Callable[[Path, int], object]
    folder: bool = False
    suffix: str = ""


WRITERS = {
    "save": Writer(lambda path, n: polyak.save(path, averager(n), overwrite=True)),
    "save an EMA": Writer(
        lambda path, n: polyak.save(path, polyak.EMA(torch.nn.Linear(n, 1)), overwrite=True)
    ),
    "export": Writer(
        lambda path, n: checkpoints.export(path, averager(n), overwrite=True), suffix=".safetensors"
    ),
    "export in shards": Writer(
        lambda path, n: checkpoints.export(path, averager(n), shard_bytes=1 << 30, overwrite=True),
        folder=True,
    ),
    "convert": Writer(convert),
    "average of files": Writer(
        lambda path, n: average([ours(n)] * 2).write(path, overwrite=True), suffix=".safetensors"
    ),
    "adapters": Writer(
        lambda path, n: concatenate([an_adapter(n)] * 2).write(path, overwrite=True), folder=True
    ),
    "like a distributed folder": Writer(like, folder=True),
    "saving": Writer(saving, folder=True),
    "save_distributed": Writer(
        lambda path, n: checkpoints.save_distributed(path, {"a": averager(n)}, overwrite=True),
        folder=True,
    ),
    "save_distributed_async": Writer(
        lambda path, n: checkpoints.save_distributed_async(
            path, {"a": averager(n)}, overwrite=True
        ).result(),
        folder=True,
    ),
    "a study's page": Writer(lambda path, n: _write(path, b"x" * 4 * n)),
}
LATER = {"save_distributed_async": since("2.9", "a copy of a state in memory")}
NAMES = [pytest.param(name, marks=LATER.get(name, ())) for name in WRITERS]
FOLDERS = [name for name in NAMES if WRITERS[str(name.values[0])].folder]
FILES = [name for name in NAMES if not WRITERS[str(name.values[0])].folder]


def content(place: Path) -> dict[str, bytes]:
    files = [place] if place.is_file() else sorted(p for p in place.rglob("*") if p.is_file())
    return {str(file.relative_to(place)): file.read_bytes() for file in files}


def old(place: Path, writer: Writer) -> dict[str, bytes]:
    """Puts something there that a writer of the same kind would replace."""
    if writer.folder:
        place.mkdir()
        (place / "old").write_bytes(b"old")
    else:
        place.write_bytes(b"old")
    return content(place)


ASKED: dict[str, Callable[[Path], object]] = {
    "save": lambda path: polyak.save(path, averager()),
    "export": lambda path: checkpoints.export(path, averager()),
    "convert": lambda path: checkpoints.convert(theirs(8), path, "uniform()", count=1),
    "average of files": lambda path: average([ours(8)] * 2).write(path),
    "adapters": lambda path: concatenate([an_adapter(8)]).write(path),
    "like a distributed folder": lambda path: checkpoints.write_like(
        path, distributed(8), {"w": torch.zeros(8)}
    ),
    "saving": lambda path: checkpoints.saving(path).__enter__(),
    "save_distributed": lambda path: checkpoints.save_distributed(path, {"a": averager()}),
}


@pytest.mark.parametrize("name", ASKED)
def test_what_exists_is_replaced_only_on_request(tmp_path: Path, name: str) -> None:
    place = tmp_path / "new" / f"it{WRITERS[name].suffix}"
    WRITERS[name].write(place, 8)  # missing parents are made
    before = content(place)
    with pytest.raises(FileExistsError, match="already exists; pass overwrite=True to replace it"):
        ASKED[name](place)
    assert content(place) == before
    WRITERS[name].write(place, 16)
    assert content(place) != before


def make_socket(place: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        here = Path.cwd()
        os.chdir(place.parent)  # the address of a socket is short
        made.bind(place.name)
        os.chdir(here)


SPECIAL: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "a socket": make_socket,
    "a link to a device": lambda place: place.symlink_to(os.devnull),
    "a link to a pipe without a name": lambda place: place.symlink_to(
        f"/proc/self/fd/{os.pipe()[0]}"
    ),
    "a link to itself": lambda place: place.symlink_to(place),
}
if os.geteuid() == 0:
    SPECIAL["a device"] = lambda place: os.mknod(place, 0o600 | stat.S_IFCHR, os.makedev(1, 3))


def as_it_lies(place: Path) -> tuple[int, int, int]:
    found = place.lstat()
    return found.st_ino, found.st_mode, found.st_mtime_ns


@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_file_is_never_replaced(tmp_path: Path, name: str, special: str) -> None:
    place = tmp_path / f"it{WRITERS[name].suffix}"
    SPECIAL[special](place)
    before = as_it_lies(place)
    with pytest.raises(OSError, match=place.name):
        WRITERS[name].write(place, 8)
    assert as_it_lies(place) == before
    assert list(tmp_path.iterdir()) == [place]


@pytest.mark.parametrize("name", FILES)
def test_a_folder_is_not_replaced_by_a_file(tmp_path: Path, name: str) -> None:
    place = tmp_path / f"it{WRITERS[name].suffix}"
    place.mkdir()
    with pytest.raises(IsADirectoryError, match=place.name):
        WRITERS[name].write(place, 8)
    assert list(tmp_path.iterdir()) == [place] and place.is_dir()


def test_a_pipe_that_appears_meanwhile_stays(tmp_path: Path) -> None:
    from polyak._files import writing, writing_folder

    for write in (writing, lambda place: writing_folder(place, overwrite=True)):
        with pytest.raises(OSError, match="is a pipe"), write(tmp_path / "it"):
            os.mkfifo(tmp_path / "it")
        assert stat.S_ISFIFO((tmp_path / "it").lstat().st_mode)
        (tmp_path / "it").unlink()


LINKS: dict[str, Callable[[Path], Path]] = {
    "to what is there": lambda folder: folder / "target",
    "relative": lambda _: Path("target"),
    "to nothing yet": lambda folder: folder / "nothing",
    "to nothing in a missing folder": lambda folder: folder / "a" / "b" / "nothing",
    "to a link": lambda folder: folder / "second",
}


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("name", NAMES)
def test_through_a_link_its_target_is_written(tmp_path: Path, name: str, link: str) -> None:
    writer, folder = WRITERS[name], tmp_path / "elsewhere"
    folder.mkdir()
    old(folder / "target", writer)
    (folder / "second").symlink_to("target")
    place = folder / f"link{writer.suffix}"
    leads = LINKS[link](folder)
    place.symlink_to(leads)
    writer.write(place, 8)
    assert place.is_symlink() and place.readlink() == leads
    assert (folder / "second").is_symlink()
    wanted = tmp_path / f"plain{writer.suffix}"
    writer.write(wanted, 8)
    assert content(place.resolve()).keys() == content(wanted).keys()
    assert "old" not in content(place.resolve()) and content(place.resolve()) != {".": b"old"}


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444, 0o666])
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_replaced_passes_its_permissions_on(
    tmp_path: Path, name: str, mode: int
) -> None:
    place = tmp_path / f"it{WRITERS[name].suffix}"
    place.write_bytes(b"old")
    place.chmod(mode)
    WRITERS[name].write(place, 8)
    assert place.read_bytes() != b"old"
    assert stat.S_IMODE(place.stat().st_mode) == mode


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_that_is_replaced_passes_its_permissions_on(tmp_path: Path, name: str) -> None:
    place = tmp_path / "it"
    old(place, WRITERS[name])
    place.chmod(0o2750)
    WRITERS[name].write(place, 8)
    assert "old" not in content(place)
    assert stat.S_IMODE(place.stat().st_mode) == 0o2750


ACCESS = "system.posix_acl_access"


def access_list(*entries: tuple[int, int, int]) -> bytes:
    """(tag, permissions, user) of each entry, as Linux stores them."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


# A user may read and write. The group may not, although the mode's bits for the group are rw.
ONE_USER = access_list(
    (1, 6, 2**32 - 1), (2, 6, 1234), (4, 0, 2**32 - 1), (16, 6, 2**32 - 1), (32, 0, 2**32 - 1)
)


@pytest.mark.skipif(sys.platform != "linux", reason="Python has no such lists elsewhere")
@pytest.mark.parametrize("listed", [True, False], ids=["list", "no list"])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_replaced_passes_its_access_list_on(
    tmp_path: Path, name: str, listed: bool
) -> None:
    place = tmp_path / f"it{WRITERS[name].suffix}"
    old(place, WRITERS[name])
    try:
        if listed:
            os.setxattr(place, ACCESS, ONE_USER)
        else:  # what is new in the folder gets a list
            place.chmod(0o700 if WRITERS[name].folder else 0o600)
            os.setxattr(tmp_path, "system.posix_acl_default", ONE_USER)
    except OSError:
        pytest.skip("this file system has no access lists")
    mode = place.stat().st_mode
    WRITERS[name].write(place, 8)
    assert place.stat().st_mode == mode
    assert (ACCESS in os.listxattr(place)) == listed
    assert not listed or os.getxattr(place, ACCESS) == ONE_USER


@pytest.mark.parametrize("name", NAMES)
def test_what_is_new_has_the_permissions_of_the_umask(tmp_path: Path, name: str) -> None:
    place = tmp_path / f"it{WRITERS[name].suffix}"
    before = os.umask(0o027)
    try:
        WRITERS[name].write(place, 8)
    finally:
        os.umask(before)
    assert stat.S_IMODE(place.stat().st_mode) == (0o750 if WRITERS[name].folder else 0o640)


def test_a_file_under_way_is_no_more_open_than_the_one_that_it_replaces(tmp_path: Path) -> None:
    from polyak._files import writing

    (tmp_path / "it").touch(0o600)
    with writing(tmp_path / "it") as file:
        assert stat.S_IMODE(Path(file.name).stat().st_mode) == 0o600


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a file away")
@pytest.mark.parametrize("name", NAMES)
def test_the_owner_stays(tmp_path: Path, name: str) -> None:
    place = tmp_path / f"it{WRITERS[name].suffix}"
    old(place, WRITERS[name])
    os.chown(place, 1234, 5678)
    WRITERS[name].write(place, 8)
    assert (place.stat().st_uid, place.stat().st_gid) == (1234, 5678)


LETTERS = {"one byte": "a", "two bytes": "é", "three bytes": "語", "four bytes": "🦙"}


def name_of(nbytes: int, letter: str, suffix: str) -> str:
    """A name of so many bytes."""
    count, rest = divmod(nbytes - len(suffix), len(letter.encode()))
    return letter * count + "-" * rest + suffix


@pytest.mark.parametrize("letter", first_quick(LETTERS.values(), 2), ids=LETTERS)
@pytest.mark.parametrize("name", NAMES)
def test_names_are_as_long_as_the_file_system_allows(
    tmp_path: Path, name: str, letter: str
) -> None:
    most, writer = os.pathconf(tmp_path, "PC_NAME_MAX"), WRITERS[name]
    for nbytes in (90, 101, 200, most - 22, most):
        place = tmp_path / name_of(nbytes, letter, writer.suffix)
        for _ in range(2):
            writer.write(place, 8)
        assert content(place)
        shutil.rmtree(place) if writer.folder else place.unlink()
    place = tmp_path / name_of(most + 1, letter, writer.suffix)
    with pytest.raises(OSError, match="too long"):
        writer.write(place, 8)
    assert list(tmp_path.iterdir()) == []


@contextmanager
def limited_files(_: Path) -> Iterator[None]:
    """No file may have more than 64 KiB: a write then fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A file system of 256 KiB; for root, where it may mount one."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k,mode=777", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this process may not mount a file system")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("full", [limited_files, small_disk])
@pytest.mark.parametrize("there", [True, False], ids=["old", "new"])
@pytest.mark.parametrize("name", NAMES)
def test_without_space_the_path_is_named_and_the_old_content_stays(
    tmp_path: Path, name: str, full: Callable[[Path], AbstractContextManager[None]], there: bool
) -> None:
    writer = WRITERS[name]
    theirs(1 << 20), ours(1 << 20), an_adapter(1 << 20), distributed(1 << 20)
    with full(tmp_path):
        place = tmp_path / f"it{writer.suffix}"
        before = old(place, writer) if there else {}
        with pytest.raises(OSError, match=r"No space left|File too large") as error:
            writer.write(place, 1 << 20)
        assert str(error.value.filename).startswith(str(place))
        assert ".part" not in str(error.value)
        assert (content(place) if there else {}) == before
        assert list(tmp_path.iterdir()) == [place] * there


@pytest.mark.parametrize("full", [limited_files, small_disk])
def test_a_recorder_without_space_names_the_snapshot(
    tmp_path: Path, full: Callable[[Path], AbstractContextManager[None]]
) -> None:
    with full(tmp_path):
        recorder = Recorder(averager(1 << 20), tmp_path / "run", every=1)
        with pytest.raises(OSError, match="run/snapshot-0000000001"):
            recorder.record()
        assert list((tmp_path / "run").iterdir()) == []


def test_torchs_own_files_in_a_folder_that_is_saved_have_its_name(tmp_path: Path) -> None:
    named = pytest.raises(OSError, match=r"No space left on device: .*/step-1'")
    with small_disk(tmp_path):
        with named, checkpoints.saving(tmp_path / "step-1") as folder:
            torch.save({"w": torch.ones(1 << 20)}, folder / "model.pt")
        assert list(tmp_path.iterdir()) == []


def test_a_study_without_space_names_its_records(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    named = pytest.raises(OSError, match=r"File too large: .*results\.jsonl")
    with opened(path, FORM) as results, limited_files(tmp_path), named:
        results._write(b"x" * (1 << 17))


@contextmanager
def not_as_root() -> Iterator[None]:
    """As a user who may write only where all may."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def write_once_as_root(name: str, folder: Path) -> None:
    """Another user may not read this Python's own modules, nor the inputs that tests share."""
    WRITERS[name].write(folder / f"once{WRITERS[name].suffix}", 8)


@pytest.mark.parametrize("name", NAMES)
def test_where_nothing_may_be_written_the_path_is_named(name: str, tmp_path: Path) -> None:
    write_once_as_root(name, tmp_path)
    folder = Path(tempfile.mkdtemp())  # pytest's own folders are closed to other users
    writer, place = WRITERS[name], folder / f"it{WRITERS[name].suffix}"
    before = old(place, writer)
    try:
        folder.chmod(0o555)
        with not_as_root(), pytest.raises(PermissionError) as error:
            writer.write(place, 8)
        assert str(place) in str(error.value) and ".part" not in str(error.value)
        assert content(place) == before and list(folder.iterdir()) == [place]
    finally:
        folder.chmod(0o755)
        shutil.rmtree(folder)


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_that_cannot_be_listed_is_written_to(name: str, tmp_path: Path) -> None:
    write_once_as_root(name, tmp_path)
    folder = Path(tempfile.mkdtemp())
    place = folder / f"it{WRITERS[name].suffix}"
    try:
        folder.chmod(0o333)
        with not_as_root():
            WRITERS[name].write(place, 8)
        folder.chmod(0o755)
        assert content(place)
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize("name", NAMES)
def test_missing_folders_are_made_or_what_is_in_the_way_is_named(tmp_path: Path, name: str) -> None:
    writer = WRITERS[name]
    place = tmp_path / "a" / "b" / f"it{writer.suffix}"
    writer.write(place, 8)
    assert content(place)
    (tmp_path / "file").touch()
    for way in (tmp_path / "file", tmp_path / "file" / "b"):
        with pytest.raises(NotADirectoryError, match="file"):
            writer.write(way / f"it{writer.suffix}", 8)


@contextmanager
def waits_at_most(seconds: int) -> Iterator[None]:
    """Ends what waits for a pipe that no one writes to."""

    def end(*_: object) -> None:
        raise TimeoutError(f"nothing came in {seconds} seconds")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("way", ["a file", "a link to nothing"])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_in_the_way_is_named(tmp_path: Path, name: str, way: str) -> None:
    place = tmp_path / "way"
    place.touch() if way == "a file" else place.symlink_to("nothing")
    with pytest.raises(NotADirectoryError, match=r"way"):
        WRITERS[name].write(place / f"it{WRITERS[name].suffix}", 8)


@pytest.mark.parametrize("here", [".", "..", "a/.."])
def test_the_folder_one_is_in_may_be_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: str
) -> None:
    place = tmp_path / "run"
    (place / "a").mkdir(parents=True)
    monkeypatch.chdir(place if here != ".." else place / "a")
    with checkpoints.saving(here, overwrite=True) as folder:
        (folder / "it").write_text("it")
    assert content(place) == {"it": b"it"} and list(tmp_path.iterdir()) == [place]


def test_a_folder_may_hold_links_and_files_that_cannot_be_read(tmp_path: Path) -> None:
    with waits_at_most(60), checkpoints.saving(tmp_path / "step-1") as folder:
        (folder / "best").symlink_to("nothing yet")
        (folder / "outside").symlink_to(tmp_path)
        os.mkfifo(folder / "pipe")
        (folder / "closed").touch(0o200)
    assert len(list((tmp_path / "step-1").iterdir())) == 4


@pytest.mark.parametrize("name", NAMES)
def test_of_writers_to_one_path_the_last_one_is_there_whole(tmp_path: Path, name: str) -> None:
    writer = WRITERS[name]
    place = tmp_path / f"it{writer.suffix}"
    sizes = range(100, 108)
    problems: list[BaseException] = []

    def write(size: int) -> None:
        try:
            for _ in range(3):
                writer.write(place, size)
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=write, args=(size,)) for size in sizes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems and list(tmp_path.iterdir()) == [place]
    wanted = []
    got = lengths(place)
    for size in sizes:
        writer.write(place, size)
        wanted.append(lengths(place))
    assert got in wanted


def lengths(place: Path) -> dict[str, int]:
    return {name: len(data) for name, data in content(place).items()}


def test_of_two_folders_at_one_path_the_first_that_ends_is_kept(tmp_path: Path) -> None:
    place = tmp_path / "step-1"
    with pytest.raises(FileExistsError, match=r"step-1 was written by another process"):  # noqa: SIM117
        with checkpoints.saving(place) as late, checkpoints.saving(place) as early:
            (early / "it").write_text("early")
            (late / "it").write_text("late")
    assert (place / "it").read_text() == "early"
    assert list(tmp_path.iterdir()) == [place]
