"""Laws of reading, for every layout: only headers first, each byte once, one handle, one decision."""

from __future__ import annotations

import argparse
import collections
import ctypes
import dataclasses
import datetime
import decimal
import enum
import fractions
import functools
import io
import json
import mmap
import os
import pathlib
import pickle
import re
import shutil
import subprocess
import sys
import tarfile
import uuid
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import save as safetensors_bytes
from safetensors.torch import save_file
from torch import Tensor

import polyak
from cli_runs import run
from corrupting import same, save_folder
from hostile_files import Case, averager, valid
from polyak import checkpoints, offline
from polyak.checkpoints import Checkpoint
from polyak.checkpoints._sniff import sniff
from since import since
from sparse_files import KINDS, MIB

Weights = dict[str, Tensor]
LARGE, SMALL = 10 * 1024, 16  # MiB


def read_bytes() -> int:
    """The bytes that this process has read by system calls."""
    return int(Path("/proc/self/io").read_text().split()[1])


def cached_bytes(path: Path) -> int:
    """The bytes of a file, or of a folder's files, that are in the page cache."""
    if path.is_dir():
        return sum(map(cached_bytes, path.iterdir()))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    total = 0
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        for start in range(0, size, 1 << 30):
            length = min(1 << 30, size - start)
            pages = (ctypes.c_ubyte * -(-length // mmap.PAGESIZE))()
            with mmap.mmap(file.fileno(), length, mmap.MAP_PRIVATE, offset=start) as memory:
                address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
                assert libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(length), pages) == 0
            total += mmap.PAGESIZE * int((numpy.frombuffer(bytes(pages), numpy.uint8) & 1).sum())
    return total


@pytest.mark.parametrize("kind", KINDS)
def test_only_headers_are_read_before_a_tensor_is_asked_for(tmp_path: Path, kind: str) -> None:
    """Of 10 GiB less than 1 MiB: by system calls, and by pages that are touched."""
    KINDS[kind](tmp_path / f"small-{kind}", SMALL)
    offline.describe(tmp_path / f"small-{kind}")  # what Python itself reads, to import
    path = tmp_path / kind
    KINDS[kind](path, LARGE)
    before, cached = read_bytes(), cached_bytes(path)
    found = offline.describe(path)
    assert read_bytes() - before < MIB
    assert cached_bytes(path) - cached < MIB
    weights = found.live or found.averages["average"].weights
    assert weights.bytes == LARGE * MIB


@pytest.mark.parametrize("kind", KINDS)
def test_averaging_reads_each_byte_once(tmp_path: Path, kind: str) -> None:
    """And finds what is damaged, where there is a checksum, by that one reading."""
    paths = [tmp_path / f"{i}-{kind}" for i in range(3)]
    for path in paths:
        KINDS[kind](path, SMALL)
    if kind == "distributed":
        paths = [saved_by_dcp(tmp_path / str(i)) for i in range(3)]
    offline.average(paths[:2])["head.weight"]
    before = read_bytes()
    offline.average(paths, [0.5, 0.25, 0.25]).write(tmp_path / "out.safetensors")
    assert read_bytes() - before < 3 * SMALL * MIB + 2 * MIB


def saved_by_dcp(folder: Path) -> Path:
    rows = SMALL * MIB // 2 // 4096
    save_folder({n: torch.zeros(rows, 1024) for n in ("head.weight", "body.weight")}, folder)
    return folder


CHECKED = ["archive.pt", "own.safetensors"]


@pytest.mark.parametrize("kind", CHECKED)
@pytest.mark.parametrize("at", [0.3, 0.6, 0.999])
def test_damage_is_found_when_the_tensor_is_first_read(
    tmp_path: Path, kind: str, at: float
) -> None:
    paths = [tmp_path / f"{i}-{kind}" for i in range(2)]
    for path in paths:
        KINDS[kind](path, SMALL)
    with paths[1].open("r+b") as file:
        file.seek(int(at * SMALL * MIB))
        file.write(b"\1")
    offline.describe(paths[1])
    found = checkpoints.read(paths[1])
    weights = found.live if found.live is not None else found.average()
    damaged = "head.weight" if at < 0.5 else "body.weight"
    for name in ("head.weight", "body.weight"):
        if name == damaged:
            with pytest.raises(ValueError, match=rf"1-{kind}: .* is damaged: its checksum is"):
                weights[name]
            with pytest.raises(ValueError, match=rf"1-{kind}: .* is damaged"):
                offline.average(paths)[name]
        else:
            assert not weights[name].any()
    with pytest.raises(ValueError, match="is damaged"):
        found.verify()
    checkpoints.read(paths[0]).verify()


def training_state() -> dict[str, Any]:
    model = torch.nn.Linear(30, 20)
    moments = {"exp_avg": torch.randn(20, 30), "settings": {"rate": 0.1, "betas": (0.9, 0.99)}}
    return {"model": model.state_dict(), "optimizer": moments, "step": 3}


def test_a_flipped_bit_of_a_training_is_found_when_it_is_loaded(tmp_path: Path) -> None:
    """torch's own reader compares no checksums."""
    path = tmp_path / "it"
    state = training_state()
    checkpoints.save_distributed(path, state)
    file = next(path.glob("*.distcp"))
    whole = file.read_bytes()
    parts = {
        "model.weight": state["model"]["weight"].numpy().tobytes(),
        "model.bias": state["model"]["bias"].numpy().tobytes(),
        "optimizer.exp_avg": state["optimizer"]["exp_avg"].numpy().tobytes(),
        "optimizer.settings.rate": b"G?\xb9\x99\x99\x99\x99\x99\x9a",
    }
    for name, data in parts.items():
        place = whole.index(data) + len(data) // 2
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=rf"{name}: the record .* is damaged: its checksum"):
            checkpoints.load_distributed(path, training_state())
        with pytest.raises(ValueError, match=rf"{name}: the record .* is damaged"):
            checkpoints.read(path).verify()
        file.write_bytes(whole)
    loaded = training_state()
    checkpoints.load_distributed(path, loaded)
    assert torch.equal(loaded["model"]["weight"], state["model"]["weight"])
    assert loaded["optimizer"]["settings"] == state["optimizer"]["settings"]


def all_weights(found: Checkpoint) -> Iterator[tuple[str, Any]]:
    yield from found.averages.items()
    if found.live is not None:
        yield "live", found.live


def content(found: Checkpoint) -> dict[str, Weights]:
    return {name: {k: held[k].clone() for k in held} for name, held in all_weights(found)}


def exchanged(a: Path, b: Path) -> None:
    """Two names exchanged in one step, as our saves of folders do; files as `os.replace`."""
    if a.is_dir():
        rename = ctypes.CDLL(None, use_errno=True).renameat2
        assert rename(-100, os.fsencode(a), -100, os.fsencode(b), 2) == 0
        shutil.rmtree(b)
    else:
        b.replace(a)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[Case]:
    return list(valid(tmp_path_factory.mktemp("valid") / "it"))


def copied(case: Case, path: Path) -> Path:
    (shutil.copytree if case.path.is_dir() else shutil.copy)(case.path, path)
    return path


def changed(case: Case, path: Path) -> Path:
    """A file or folder of the same layout and size with other numbers, valid or not."""
    copied(case, path)
    files = [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]
    for file in files:
        if file.suffix not in (".json", "") or (file.suffix == "" and path.is_file()):
            data = bytearray(file.read_bytes())
            for place in range(len(data) // 2, len(data), 7):
                data[place] ^= 0xFF
            file.write_bytes(data)
    return path


def test_a_file_that_is_replaced_meanwhile_is_read_as_it_was(
    tmp_path: Path, cases: list[Case]
) -> None:
    """Between the header and any tensor: every layout, file or folder."""
    for case in cases:
        path = copied(case, tmp_path / case.path.name)
        wanted = content(checkpoints.read(path, "positions"))
        for replaced_at in range(3):
            found = checkpoints.read(path, "positions")
            number = 0
            for name, held in all_weights(found):
                for key in held:
                    if number == replaced_at:
                        exchanged(path, changed(case, tmp_path / "other"))
                    assert same(held[key], wanted[name][key]), (case.made_of, key)
                    number += 1
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
            copied(case, path)


SAVING = """
import sys, polyak, torch
averager = polyak.Averager({"w": torch.zeros(1 << 18), "v": torch.zeros(1 << 18)}, "window(4)")
for i in range(4):
    averager.update()
while True:
    polyak.save(sys.argv[1], averager, overwrite=True)
    averager = polyak.Averager({k: torch.full((1 << 18,), averager.average()["w"][0] + 1) for k in "wv"}, "window(4)")
    for i in range(4):
        averager.update()
"""


@pytest.mark.slow
def test_a_file_that_another_process_saves_again_and_again(tmp_path: Path) -> None:
    """Every reading is of one save: all numbers of all slots are the same."""
    path = tmp_path / "it.safetensors"
    with subprocess.Popen([sys.executable, "-c", SAVING, str(path)]) as saving:
        try:
            while not path.exists():
                assert saving.poll() is None
            seen = set()
            for _ in range(60):
                found = checkpoints.read(path)
                held = found.average()
                values = set(torch.cat([held["w"], held["v"]]).unique().tolist())
                assert len(values) == 1
                seen |= values
            assert len(seen) > 1, "nothing was saved meanwhile: the test shows nothing"
        finally:
            saving.kill()


OPENS = """
import sys, os, collections
from pathlib import Path
import polyak, torch
from polyak import checkpoints
from reading_hostile import read_all
import torch.distributed.checkpoint
folder = Path(sys.argv[1])
opened = collections.Counter()
def hook(event, arguments):
    if event == "open" and str(arguments[0]).startswith(str(folder)):
        opened[str(arguments[0])] += 1
sys.addaudithook(hook)
for path in sorted(folder.iterdir()):
    opened.clear()
    read_all(path)
    print(path.name, max(opened.values()), len(opened))
"""


@pytest.mark.slow
def test_each_file_is_opened_once(cases: list[Case]) -> None:
    """From the first byte to the last: whatever lies under its name later is another file."""
    done = subprocess.run(
        [sys.executable, "-c", OPENS, str(cases[0].path.parent)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent,
        env={
            **os.environ,
            "PYTHONPATH": f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}",
        },
    )
    opened = {line.rsplit(" ", 2)[0]: line.split(" ")[-2:] for line in done.stdout.splitlines()}
    assert len(opened) == len(cases) > 15
    assert {name: most for name, (most, _) in opened.items() if most != "1"} == {}


MODIFIED: dict[str, Callable[[Path], object]] = {
    "cut short": lambda file: os.truncate(file, file.stat().st_size - 1),
    "made longer": lambda file: os.truncate(file, file.stat().st_size + 1),
    "written over": lambda file: file.write_bytes(file.read_bytes()),
    "emptied": lambda file: os.truncate(file, 0),
}


@pytest.mark.parametrize("modify", MODIFIED.values(), ids=MODIFIED.keys())
def test_a_file_that_is_changed_in_place_is_noticed(
    tmp_path: Path, cases: list[Case], modify: Callable[[Path], object]
) -> None:
    for number, case in enumerate(cases):
        path = copied(case, tmp_path / f"{number}{case.path.suffix}")
        found = checkpoints.read(path, "positions")
        files = (
            [path] if path.is_file() else [*path.rglob("*.safetensors"), *path.rglob("*.distcp")]
        )
        for file in files:
            os.utime(file, ns=(1, 1))
            found = checkpoints.read(path, "positions")
            modify(file)
            with pytest.raises(
                ValueError, match=r"the file was changed in place while it was read"
            ):
                for _, held in all_weights(found):
                    for key in held:
                        held[key]
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            copied(case, path)


class Color(enum.Enum):
    """Of a training script, as `__main__`'s classes are."""

    RED = 1


@dataclasses.dataclass
class Config:
    """What a training script keeps its settings in."""

    rate: float = 0.1
    place: Path = dataclasses.field(default_factory=lambda: Path("/data"))
    inner: Any = None


class Settings(dict[str, Any]):
    """A dictionary of a class of its own."""


class Point(collections.namedtuple("Point", "x y")):
    """A tuple of a class of its own."""


OBJECTS: dict[str, tuple[Callable[[], Any], dict[str, int]]] = {
    "a path": (lambda: Path("/data/x"), {f"{Path.__module__}.PosixPath": 1}),
    "a pure path": (
        lambda: pathlib.PureWindowsPath("x"),
        {f"{Path.__module__}.PureWindowsPath": 1},
    ),
    "an enum": (lambda: Color.RED, {"test_reading.Color": 1}),
    "a date": (lambda: datetime.datetime(2026, 1, 1), {"datetime.datetime": 1}),
    "a time": (lambda: datetime.timedelta(3), {"datetime.timedelta": 1}),
    "a zone": (lambda: datetime.UTC, {"datetime.timezone": 1}),
    "a defaultdict": (lambda: collections.defaultdict(list, a=[1]), {}),
    "a counter": (lambda: collections.Counter("aab"), {}),
    "an ordered dictionary": (lambda: collections.OrderedDict(a=1), {}),
    "a deque": (lambda: collections.deque([1, 2], maxlen=3), {"collections.deque": 1}),
    "a partial": (lambda: functools.partial(int, base=10), {"functools.partial": 1}),
    "a dataclass": (lambda: Config(), {"test_reading.Config": 1}),
    "a dataclass within": (lambda: Config(inner=[Config()]), {"test_reading.Config": 1}),
    "a namespace": (lambda: argparse.Namespace(rate=0.1), {"argparse.Namespace": 1}),
    "a numpy scalar": (lambda: numpy.float64(0.5), {}),
    "a numpy date": (lambda: numpy.datetime64("2026-01-01"), {"numpy.generic": 1}),
    "an array": (lambda: numpy.ones(3), {"numpy.ndarray": 1}),
    "an array of objects": (lambda: numpy.array([None, Path()]), {"numpy.ndarray": 1}),
    "a generator of numpy": (
        lambda: numpy.random.default_rng(0),
        {"numpy.random._pickle.__generator_ctor": 1},
    ),
    "a state of numpy": (lambda: numpy.random.RandomState(0).get_state(), {"numpy.ndarray": 1}),
    "a set": (lambda: {1, "a"}, {}),
    "a frozen set": (lambda: frozenset({1, "a"}), {}),
    "a set of enums": (lambda: {Color.RED}, {"test_reading.Color": 1}),
    "a decimal": (lambda: decimal.Decimal("1.5"), {"decimal.Decimal": 1}),
    "a fraction": (lambda: fractions.Fraction(1, 3), {"fractions.Fraction": 1}),
    "a uuid": (lambda: uuid.UUID(int=3), {"uuid.UUID": 1}),
    "a named tuple": (lambda: Point(1, 2), {"test_reading.Point": 1}),
    "a pattern": (lambda: re.compile("a+"), {"re._compile": 1}),
    "a size": (lambda: torch.Size([2, 3]), {}),
    "a device": (lambda: torch.device("cuda:1"), {}),
    "a dtype": (lambda: torch.bfloat16, {}),
    "a layout": (lambda: torch.sparse_coo, {"torch.layout": 1}),
    "a generator's state": (lambda: torch.Generator().get_state(), {}),
    "a slice": (lambda: slice(1, 2), {"builtins.slice": 1}),
    "a range": (lambda: range(3), {"builtins.range": 1}),
    "a complex number": (lambda: 1j, {}),
    "an ellipsis": (lambda: ..., {"builtins.Ellipsis": 1}),
    "a large integer": (lambda: 1 << 4000, {}),
    "long bytes": (lambda: b"x" * 300, {}),
    "a bytearray": (lambda: bytearray(b"x" * 300), {}),
    "long text": (lambda: "é" * 300, {}),
    "a class": (lambda: Config, {"test_reading.Config": 1}),
    "a function": (lambda: os.system, {"posix.system": 1}),
    "an exception": (lambda: ValueError("x"), {"builtins.ValueError": 1}),
    "a dictionary of a class": (lambda: Settings(a=1), {"test_reading.Settings": 1}),
    "an enum as a key": (lambda: {Color.RED: 1}, {}),
    "a path as a key": (lambda: {Path("x"): 1}, {}),
    "a dtype as a key": (lambda: {torch.float32: 1}, {}),
    "an optimizer": (lambda: torch.optim.SGD([torch.ones(1)]), {"torch.optim.sgd.SGD": 1}),
    "a version": (lambda: torch.__version__, {"torch.torch_version.TorchVersion": 1}),
    "several": (
        lambda: [Path("a"), {"b": Path("c"), "d": (uuid.UUID(int=1),)}],
        {f"{Path.__module__}.PosixPath": 2, "uuid.UUID": 1},
    ),
}
"""An object that is saved beside weights, and what is set aside for it."""


@pytest.mark.parametrize("protocol", [None, 2, 3, 4, 5])
@pytest.mark.parametrize(("make", "aside"), OBJECTS.values(), ids=OBJECTS.keys())
def test_ordinary_objects_beside_the_weights(
    tmp_path: Path, make: Callable[[], Any], aside: dict[str, int], protocol: int | None
) -> None:
    """In both layouts of torch.save and every protocol; without one, before torch 1.6."""
    weights = torch.nn.Linear(2, 1).state_dict()
    state = {"state_dict": weights, "config": make(), "step": 3}
    path = tmp_path / "it.pt"
    if protocol is None:
        torch.save(state, path, _use_new_zipfile_serialization=False)
    else:
        torch.save(state, path, pickle_protocol=protocol)
    found = checkpoints.read(path)
    assert found.live is not None and set(found.live) == set(weights)
    assert all(torch.equal(found.live[name], weights[name]) for name in weights)
    assert dict(found.aside) == aside
    assert offline.describe(path).aside == aside


def test_a_configuration_of_omegaconf(tmp_path: Path) -> None:
    """As Lightning and NeMo save hyperparameters."""
    omegaconf = pytest.importorskip("omegaconf")
    config = omegaconf.OmegaConf.create({"model": {"width": 3, "path": "/x"}, "list": [1, 2]})
    weights = torch.nn.Linear(2, 1).state_dict()
    torch.save({"state_dict": weights, "hyper_parameters": config}, tmp_path / "it.ckpt")
    found = checkpoints.read(tmp_path / "it.ckpt")
    assert found.live is not None and torch.equal(found.live["weight"], weights["weight"])
    assert dict(found.aside) == {"omegaconf.dictconfig.DictConfig": 1}


def test_weights_in_a_dictionary_of_an_unknown_class_are_read(tmp_path: Path) -> None:
    weights = torch.nn.Linear(2, 1).state_dict()
    torch.save(Settings(state_dict=Settings(weights), step=3), tmp_path / "it.pt")
    found = checkpoints.read(tmp_path / "it.pt")
    assert found.live is not None and torch.equal(found.live["bias"], weights["bias"])
    assert dict(found.aside) == {"test_reading.Settings": 2}


def written_by(save: Callable[..., object], *arguments: Any) -> bytes:
    file = io.BytesIO()
    save(file, *arguments)
    return file.getvalue()


def folder_of_saves(path: Path) -> None:
    for i in (1, 2):
        (path / f"step-{i}").mkdir(parents=True)


def zipped(path: Path, *names: str) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, b"1")


def saved_bytes(value: float, *, old: bool = False) -> bytes:
    held = io.BytesIO()
    state = {"enc.weight": torch.full((3, 2), value), "enc.bias": torch.ones(2)}
    torch.save(state, held, _use_new_zipfile_serialization=not old)
    return held.getvalue()


def cut_short_within(folder: Path) -> None:
    folder.mkdir()
    (folder / "model.bin").write_bytes(saved_bytes(1)[:-200])


def packed(path: Path, saved: bytes) -> None:
    """The records of a file of torch.save, packed."""
    with (
        zipfile.ZipFile(io.BytesIO(saved)) as old,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))


def tarred(path: Path, files: dict[str, bytes], cut: int | None = None) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    if cut is not None:
        os.truncate(path, cut)


def pointer_of_metadata(path: Path) -> None:
    path.mkdir()
    (path / ".metadata").write_text("version https://git-lfs.github.com/spec/v1\n")


def folder_with(path: Path, *names: str) -> None:
    """A folder with files that hold nothing of use."""
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(b"\1nothing")


def texts_with(text: Path, *names: str) -> None:
    """A text beside other files."""
    folder_with(text.parent, *names)
    text.write_text("model_checkpoint_path: ckpt")


SNIFFED: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing": (lambda _: None, "No such file"),
    "empty": (lambda path: path.touch(), "the file is empty"),
    "text": (lambda path: path.write_text("epoch,loss\n1,2\n" * 9), "it looks like text"),
    "Git LFS": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        r"it looks like a pointer of Git LFS: fetch the file itself \(git lfs pull\)",
    ),
    "git-annex": (
        lambda path: path.write_text("/annex/objects/SHA256E-s9--0a.pt\n"),
        r"a pointer of git-annex: fetch the file itself \(git annex get\)",
    ),
    "git-annex, a link": (
        lambda path: path.symlink_to(".git/annex/objects/0a/1b/SHA256E-s9--0a.pt"),
        r"No such file .*: it is a link of git-annex: fetch its content \(git annex get\)",
    ),
    "a link": (lambda path: path.symlink_to("nowhere"), "it is a link that leads nowhere"),
    "DVC": (
        lambda path: path.with_name(f"{path.name}.dvc").write_text("outs:\n"),
        r"No such file .*: DVC keeps it: fetch it \(dvc pull\)",
    ),
    "a folder of pointers of DVC": (
        lambda path: folder_with(path, "model.pt.dvc"),
        r"model\.pt\.dvc is a pointer of DVC: fetch the file itself \(dvc pull\)",
    ),
    "HDF5": (lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(99)), "an HDF5 file"),
    "gzip": (lambda path: path.write_bytes(b"\x1f\x8b\x08" + bytes(99)), "packed by gzip"),
    "GGUF": (lambda path: path.write_bytes(b"GGUF" + bytes(99)), "a GGUF file"),
    "numpy": (
        lambda path: path.write_bytes(written_by(numpy.save, numpy.ones(3))),
        "an array of numpy",
    ),
    "HTML": (lambda path: path.write_text("<!doctype html><html>"), "the download may have failed"),
    "JSON": (lambda path: path.write_text('{"a": 1}' * 9), "a JSON file"),
    "zeros": (lambda path: path.write_bytes(bytes(99)), "nothing but zeros: it was not written"),
    "bytes": (lambda path: path.write_bytes(b"\1\xfe" * 50), r"it begins with b'\\x01\\xfe"),
    "a failed download": (
        lambda path: path.write_text("Entry not found"),
        r"it looks like text \('Entry not found'\): .* the download may have failed",
    ),
    "XML": (
        lambda path: path.write_text('\n <?xml version="1.0"?><Error/>'),
        "a page of HTML or XML",
    ),
    "ONNX": (
        lambda path: path.write_bytes(b"\x08\x08\x12\x07pytorch" + bytes(99)),
        "an ONNX model",
    ),
    "TensorFlow Lite": (
        lambda path: path.write_bytes(b"\x1c\0\0\0TFL3" + bytes(99)),
        "TensorFlow Lite",
    ),
    "bzip2": (lambda path: path.write_bytes(b"BZh91AY" + bytes(99)), r"bzip2: .*\(bunzip2 -c .*\)"),
    "zstd": (
        lambda path: path.write_bytes(b"\x28\xb5\x2f\xfd" + bytes(99)),
        r"zstd: .*\(unzstd -c .*\)",
    ),
    "a zip of a checkpoint": (
        lambda path: zipped(path, "run/model.pt", "readme.md"),
        r"which torch\.save did not write \(model\.pt, readme\.md\): unpack it first",
    ),
    "torch.export": (
        lambda path: zipped(path, "it/archive_format", "it/models/model.json"),
        r"a program of torch\.export: torch\.export\.load it",
    ),
    "Keras": (lambda path: zipped(path, "config.json", "model.weights.h5"), "a model of Keras"),
    "a tar without weights": (
        lambda path: tarred(path, {"model_config.yaml": b"a: 1"}),
        r"a tar archive with no file of torch\.save \(model_config\.yaml\): unpack it",
    ),
    "a tar with several": (
        lambda path: tarred(path, {"a.ckpt": saved_bytes(1), "b.ckpt": saved_bytes(2)}),
        r"with several files of weights \(a\.ckpt, b\.ckpt\): unpack it",
    ),
    "a tar that is cut short": (
        lambda path: tarred(path, {"model_weights.ckpt": saved_bytes(1)}, cut=1600),
        r"'model_weights\.ckpt' of \d+ bytes is cut short: copy or fetch",
    ),
    "metadata that are a pointer": (
        pointer_of_metadata,
        r"\.metadata looks like a pointer of Git LFS",
    ),
    "npz": (
        lambda path: path.write_bytes(written_by(numpy.savez, numpy.ones(3))),
        "arrays of numpy: save a dictionary",
    ),
    "an empty folder": (lambda path: path.mkdir(), r"holds no weights \(nothing\)"),
    "a folder of saves": (
        folder_of_saves,
        r"is a folder of folders \(step-1, step-2\).* such as .*step-2 .*latest",
    ),
    "a training without its end": (
        lambda path: folder_with(path, "step-1.pt", "step-2.pt"),
        r"is a folder that holds step-1\.pt, step-2\.pt: read one of its files, such as .*step-2\.pt",
    ),
    "models of one run's step": (
        lambda path: folder_with(path, "asr.pt", "lm.pt"),
        r"it holds asr\.pt, lm\.pt: read the file with the weights; to average a run, name that file \(file='asr\.pt'",
    ),
    "a save that was interrupted": (
        lambda path: folder_with(path, "__0_0.distcp"),
        r"it has no \.metadata: its save was interrupted",
    ),
    "parts by tensor parallel ranks": (
        lambda path: folder_with(path, "consolidated.00.pth", "consolidated.01.pth"),
        r"several ranks or stages wrote \(consolidated\.00\.pth, consolidated\.01\.pth\)",
    ),
    "parts by ranks deep below": (
        lambda path: folder_with(
            path, "model/pp_00/tp_00/sdp_00.pt", "model/pp_00/tp_00/sdp_01.pt", "trainer/rank_00.pt"
        ),
        r"several ranks or stages wrote \(sdp_00\.pt, sdp_01\.pt\)",
    ),
    "parts of a model without their index": (
        lambda path: folder_with(
            path, "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
        ),
        r"parts of one model \(model-00001-.*\) without their index",
    ),
    "one part alone": (
        lambda path: folder_with(path, "pytorch_model-00002-of-00003.bin"),
        r"parts of one model \(pytorch_model-00002-of-00003\.bin\) without their index",
    ),
    "parts of DeepSpeed's ranks": (
        lambda path: folder_with(
            path,
            "mp_rank_00_model_states.pt",
            "mp_rank_01_model_states.pt",
            "zero_pp_rank_0_mp_rank_00_optim_states.pt",
        ),
        r"several ranks or stages wrote \(mp_rank_00_model_states\.pt, mp_rank_01_model_states\.pt\)",
    ),
    "parts of a pipeline": (
        lambda path: folder_with(path, "layer_00-model_states.pt", "layer_01-model_states.pt"),
        r"several ranks or stages wrote",
    ),
    "parts of Megatron's ranks": (
        lambda path: folder_with(
            path, "mp_rank_00/model_optim_rng.pt", "mp_rank_01/model_optim_rng.pt"
        ),
        r"several ranks or stages wrote \(mp_rank_00, mp_rank_01\)",
    ),
    "DeepSpeed's universal form": (
        lambda path: folder_with(path, "zero/a.weight/fp32.pt", "mp_rank_00_model_states.pt"),
        r"it is DeepSpeed's universal form, .*: read the checkpoint that it was made from",
    ),
    "a SavedModel": (
        lambda path: folder_with(path, "saved_model.pb", "variables/variables.index"),
        "is a SavedModel of TensorFlow: read it there",
    ),
    "a pickle of protocol 0": (
        lambda path: path.write_bytes(pickle.dumps({"w": numpy.ones(3)}, 0)),
        "a pickle of Python: load it there, and save",
    ),
    "a pickle of protocol 1": (
        lambda path: path.write_bytes(pickle.dumps({"w": numpy.ones(3)}, 1)),
        "a pickle of Python: load it there, and save",
    ),
    "a file of torch.save that was packed again": (
        lambda path: packed(path, saved_bytes(1)),
        r"is packed, which torch\.save never does: unpack the archive, and pack it without",
    ),
    "a file of torch.save that is cut short": (
        lambda path: path.write_bytes(saved_bytes(1)[:-200]),
        "a damaged file of torch.save .*: copy or fetch it again",
    ),
    "a folder with a file of torch.save that is cut short": (
        cut_short_within,
        r"it/model\.bin: a damaged file of torch.save .*: copy or fetch it again",
    ),
    "a file of safetensors that is cut short": (
        lambda path: path.write_bytes(safetensors_bytes({"w": torch.ones(99)})[:-20]),
        "safetensors file cannot be read .*: copy or fetch it again",
    ),
    "a file of torch.save of an early version": (
        lambda path: tarred(path, {"pickle": b"1", "tensors": b"1", "storages": b"1"}),
        r"torch\.save of an early version wrote: load it with torch\.load, and save it again",
    ),
    "zarr": (lambda path: folder_with(path, "common.pt", "decoder.w/.zarray"), "arrays of zarr"),
    "Orbax": (
        lambda path: folder_with(path, "_CHECKPOINT_METADATA", "d/0"),
        "a checkpoint of Orbax",
    ),
    "a folder of TensorFlow": (
        lambda path: texts_with(path / "checkpoint", "ckpt.index", "ckpt.data-00000-of-00001"),
        r"holds no weights .*: ckpt\.data-00000-of-00001 is a checkpoint of TensorFlow",
    ),
    "a run of snapshots": (
        lambda path: polyak.Recorder(averager("exponential(0.9)"), path, every=1).update(),
        "is a folder of polyak.Recorder's snapshots",
    ),
}


@pytest.mark.parametrize(("make", "message"), SNIFFED.values(), ids=SNIFFED.keys())
def test_what_is_not_read_is_said_to_be_what_it_looks_like(
    tmp_path: Path, make: Callable[[Path], object], message: str
) -> None:
    make(tmp_path / "it")
    with pytest.raises((ValueError, OSError), match=message) as caught:
        checkpoints.read(tmp_path / "it")
    assert str(tmp_path / "it") in str(caught.value)


def with_a_dtype(path: Path, code: str, nbytes: int) -> None:
    """A safetensors file with a tensor of a dtype that we do not know between two others."""
    entries = {
        "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "q": {"dtype": code, "shape": [8], "data_offsets": [8, 8 + nbytes]},
        "z": {"dtype": "F32", "shape": [1], "data_offsets": [8 + nbytes, 12 + nbytes]},
    }
    text = json.dumps(entries).encode()
    content = torch.tensor([1.0, 2.0]).numpy().tobytes() + bytes(nbytes)
    content += torch.tensor([3.0]).numpy().tobytes()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content)


@pytest.mark.parametrize(("code", "nbytes"), [("F4", 4), ("F6_E2M3", 6), ("F3_NEW", 3), ("X", 0)])
def test_a_tensor_of_a_dtype_that_is_not_known_is_named_and_left_aside(
    tmp_path: Path, code: str, nbytes: int
) -> None:
    path = tmp_path / "it.safetensors"
    with_a_dtype(path, code, nbytes)
    found = checkpoints.read(path)
    assert found.live is not None and found.left == {f"q ({code})": 1}
    assert {name: t.tolist() for name, t in found.live.items()} == {"a": [1.0, 2.0], "z": [3.0]}
    out = tmp_path / "mean.safetensors"
    assert f"not used: q ({code})" in run("average", path, "--out", out).stderr
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="the safetensors file cannot be read"):
        checkpoints.read(path)


@since("2.8", "float4_e2m1fn_x2")
def test_a_tensor_of_a_dtype_that_is_not_known_in_a_file_of_torch(tmp_path: Path) -> None:
    packed = torch.zeros(4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    torch.save({"model": {"w": torch.ones(2), "q": packed}}, tmp_path / "it.pt")
    found = checkpoints.read(tmp_path / "it.pt")
    assert found.live is not None and list(found.live) == ["w"]
    assert list(found.left) == ["model.q (a tensor of the dtype torch.float4_e2m1fn_x2)"]


def in_shards(folder: Path, state: Weights) -> None:
    folder.mkdir()
    save_file(state, folder / "a.safetensors")
    torch.save(state, folder / "b.bin")
    index = json.dumps({"weight_map": {"x": "a.safetensors", "w": "b.bin"}})
    (folder / "model.safetensors.index.json").write_text(index)


def saved_by_polyak(path: Path, state: Weights) -> None:
    held = polyak.Averager(state, "uniform()")
    held.update()
    polyak.save(path, held)


# What is written -> whether some of its bytes are compared with checksums, and whether some cannot be.
VERIFIED: dict[str, tuple[Callable[[Path, Weights], object], bool, bool]] = {
    "torch.save": (lambda path, state: torch.save(state, path), True, False),
    "torch before 1.6": (
        lambda path, state: torch.save(state, path, _use_new_zipfile_serialization=False),
        False,
        True,
    ),
    "safetensors": (lambda path, state: save_file(state, path), False, True),
    "polyak": (saved_by_polyak, True, False),
    "shards of both": (in_shards, True, True),
    "torch.distributed.checkpoint": (lambda path, state: save_folder(state, path), True, False),
}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize(("write", "compared", "unchecked"), VERIFIED.values(), ids=VERIFIED)
def test_verify_says_what_was_compared_and_what_cannot_be(
    tmp_path: Path, write: Callable[[Path, Weights], object], compared: bool, unchecked: bool
) -> None:
    write(tmp_path / "it", {"w": torch.ones(1000), "x": torch.ones(1000)})
    found = checkpoints.read(tmp_path / "it")
    dict(found.live or found.average())  # tensors that were read are compared already, and count
    checked = found.verify()
    assert ((checked.compared > 400), (checked.unchecked > 400)) == (compared, unchecked)
    said = run("inspect", tmp_path / "it", "--verify").stdout.splitlines()[-1]
    assert ("fit their checksums" in said, "have no checksum" in said) == (compared, unchecked)


def test_a_shard_that_is_a_pointer_is_said_to_be_one(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": "a.safetensors"}}))
    with pytest.raises(ValueError, match=r"a\.safetensors is neither .* a pointer of Git LFS"):
        offline.describe(tmp_path)
    index.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match=r"index\.json: .* a pointer of Git LFS"):
        offline.describe(tmp_path)


@pytest.mark.parametrize("old", [False, True])
def test_the_weights_of_a_nemo_archive_are_read_where_they_lie(tmp_path: Path, old: bool) -> None:
    """A tar with a configuration and one file of torch.save; its checksums are those of that file."""
    paths = [tmp_path / "1.nemo", tmp_path / "3.nemo"]
    for path, value in zip(paths, (1.0, 3.0), strict=True):
        config = {"./model_config.yaml": b"a: 1\n" * 200, "./vocab.txt": b"a"}
        tarred(path, {**config, "./model_weights.ckpt": saved_bytes(value, old=old)})
    found = checkpoints.read(paths[0])
    assert found.live is not None and found.live["enc.weight"].tolist() == [[1.0, 1.0]] * 3
    assert offline.average(paths)["enc.weight"].tolist() == [[2.0, 2.0]] * 3
    found.verify()
    if not old:
        content = paths[0].read_bytes()
        place = content.index(torch.ones(6).numpy().tobytes())
        paths[0].write_bytes(content[:place] + b"\1" + content[place + 1 :])
        with pytest.raises(ValueError, match=r"1\.nemo: .*data/0.* is damaged"):
            checkpoints.read(paths[0]).verify()


def test_sniff_says_what_a_path_is(cases: list[Case]) -> None:
    kinds = {case.made_of: sniff(case.path).kind for case in cases}
    own = {name: kinds.pop(name) for name in ("polyak", "several", "ema")}
    assert set(own.values()) == {"polyak"}
    folders = {name: kinds.pop(name) for name in ("dcp", "native", "training")}
    assert set(folders.values()) == {"dcp"}
    assert kinds.pop("sharded") == "index"
    assert {kinds.pop(name) for name in ("safetensors", "pretrained")} == {"safetensors"}
    assert set(kinds.values()) == {"torch"}
    averager_of = next(case.path for case in cases if case.made_of == "training") / "average"
    assert (sniff(averager_of).kind, sniff(averager_of).key) == ("dcp", "average")


class TestWhatAnIndexDoesNotList:
    """Tensors and files beside those of the index are named, and so are tensors of unknown dtypes."""

    def folder(self, path: Path, listed: Mapping[str, str], files: Mapping[str, bytes]) -> Path:
        path.mkdir()
        for name, content in files.items():
            (path / name).write_bytes(content)
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
        return path

    FILES = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")

    def test_a_tensor_and_a_file(self, tmp_path: Path) -> None:
        first, second = self.FILES
        more = {"a": torch.ones(2), "c": torch.ones(1)}
        folder = self.folder(
            tmp_path / "it", {"a": first},
            {first: safetensors_bytes(more), second: safetensors_bytes({"b": torch.ones(3)})},
        )  # fmt: skip
        found = checkpoints.read(folder)
        wanted = {"c (not in the index)": 1, second: 0}
        assert list(found.weights()) == ["a"] and found.left == wanted
        assert list(offline.average([folder, folder])) == ["a"]

    def test_a_tensor_of_an_unknown_dtype(self, tmp_path: Path) -> None:
        first = self.FILES[0]
        header = {
            "q": {"dtype": "F4", "shape": [4], "data_offsets": [4, 6]},
            "w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        }
        text = json.dumps(header).encode()
        content = len(text).to_bytes(8, "little") + text + bytes(6)
        folder = self.folder(tmp_path / "it", {"q": first, "w": first}, {first: content})
        found = checkpoints.read(folder)
        assert list(found.weights()) == ["w"] and list(found.left) == ["q (F4)"]
        assert list(offline.average([folder, folder])) == ["w"]

    def test_a_tensor_that_lies_in_another_file_is_an_error(self, tmp_path: Path) -> None:
        first, second = self.FILES
        files = {
            name: safetensors_bytes({key: torch.ones(2)})
            for name, key in ((first, "a"), (second, "b"))
        }
        folder = self.folder(tmp_path / "it", {"a": first, "b": first}, files)
        with pytest.raises(ValueError, match=f"it says that b is in {first}, which has no such"):
            offline.average([folder])


def test_files_that_may_hold_weights_beside_those_that_are_read_are_named(tmp_path: Path) -> None:
    """In the folder and in the folders in it, but not states of the training and other checkpoints."""
    told = ["pytorch_model.bin", "2_Dense/model.safetensors", "original/consolidated.00.pth"]
    others = [
        "optimizer.pt",
        "rng_state.pth",
        "training_args.bin",
        "config.json",
        "checkpoint-5/model.safetensors",
    ]
    for name in (*told, *others):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"{}")
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    assert sorted(checkpoints.read(tmp_path).left) == sorted(told)
    said = run("average", tmp_path, tmp_path, "--out", tmp_path.with_suffix(".safetensors")).stderr
    assert (
        "not used: pytorch_model.bin, 2_Dense/model.safetensors, original/consolidated.00.pth"
        in said
    )
    shutil.rmtree(tmp_path / "original")
    (tmp_path / "original").symlink_to(tmp_path / "original")  # nothing can be listed there
    assert sorted(checkpoints.read(tmp_path).left) == sorted(told[:2])
