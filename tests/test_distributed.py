"""Folders of torch.distributed.checkpoint: what real ranks saved is read whole, and lies are refused."""

from __future__ import annotations

import os
import pickle
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed._shard.sharded_tensor import metadata as earlier
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from corrupting import Calls, resident_bytes, same, save_folder
from launching import said_by
from polyak._lazy import spec_of
from polyak._ranks.shard_geometry import Box
from polyak.checkpoints._dcp.metadata import _tiles
from polyak.checkpoints._dcp.tensors import DistributedTensors
from polyak.checkpoints._torch_save.pickles import Aside

RANKS = Path(__file__).with_name("saving_ranks.py")


def saved_by(world: int, folder: Path) -> Path:
    """A folder that so many real processes saved."""
    said_by(RANKS, world, folder)
    return folder


def flat(value: object, prefix: str = "") -> dict[str, object]:
    """The entries of a structure by their path, as a planner flattens them."""
    parts: Any = ()
    if isinstance(value, dict):
        parts = value.items()
    elif isinstance(value, list) and any(isinstance(part, (dict, Tensor)) for part in value):
        parts = enumerate(value)
    else:
        return {prefix: value}
    found: dict[str, object] = {}
    for name, part in parts:
        found |= flat(part, f"{prefix}.{name}" if prefix else str(name))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 4])
def test_what_ranks_save_is_read_whole(tmp_path: Path, world: int) -> None:
    folder = saved_by(world, tmp_path)
    wanted = flat(torch.load(folder / "wanted.pt", weights_only=True))
    tensors = {name: value for name, value in wanted.items() if isinstance(value, Tensor)}
    objects = {name: value for name, value in wanted.items() if name not in tensors}
    for kind in ("saved", "async"):
        found = DistributedTensors(folder / kind)
        assert found.keys() == tensors.keys()
        assert found.specs == {name: spec_of(tensor) for name, tensor in tensors.items()}
        assert all(same(found[name], tensors[name]) for name in found)
        assert {name: found.object(name) for name in found.objects} == objects
        for name in found:
            found.release(name)
        assert all(same(found[name], tensors[name]) for name in found)
    chunks = [len(each) for each in found.chunks.values()]
    assert max(chunks) == world


STATE = {"model": {"a": torch.arange(12.0).reshape(3, 4), "b": torch.ones(2)}, "step": 3}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_folder(STATE, tmp_path / "it")
    return tmp_path / "it"


def described(folder: Path) -> Metadata:
    metadata: Metadata = pickle.loads((folder / ".metadata").read_bytes())
    return metadata


def describe(folder: Path, metadata: object) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def test_one_process_without_a_group(saved: Path) -> None:
    found = DistributedTensors(saved)
    assert list(found) == ["model.a", "model.b"]
    assert torch.equal(found["model.a"], STATE["model"]["a"])  # type: ignore[index]
    assert {name: found.object(name) for name in found.objects} == {"step": 3}
    assert len(found) == 2
    with pytest.raises(KeyError):
        found["step"]
    with pytest.raises(KeyError):
        found.object("model.a")


def test_a_folder_keeps_no_memory(tmp_path: Path) -> None:
    held = torch.randn(1 << 24)
    save_folder({"w": held}, tmp_path)
    start = resident_bytes()
    found = DistributedTensors(tmp_path)
    view = found["w"]
    assert resident_bytes() - start < 8 << 20
    assert torch.equal(view, held)
    assert resident_bytes() - start > 60 << 20
    found.release("w")
    assert resident_bytes() - start < 8 << 20
    assert torch.equal(view, held)


def test_what_is_written_to_a_view_stays_and_is_no_damage(saved: Path) -> None:
    """Also when the tensor is asked for again, which checks its file again."""
    found = DistributedTensors(saved)
    view = found["model.a"]
    view.fill_(7.0)
    found["model.a"]
    assert view.eq(7).all()
    assert torch.equal(DistributedTensors(saved)["model.a"], STATE["model"]["a"])  # type: ignore[index]


def test_metadata_of_earlier_torch(saved: Path) -> None:
    """Before torch 2.3 the properties were of another module."""
    metadata = described(saved)
    for each in metadata.state_dict_metadata.values():
        if isinstance(each, TensorStorageMetadata):
            each.properties = earlier.TensorProperties(dtype=each.properties.dtype)  # type: ignore[assignment]
    describe(saved, metadata)
    assert b"sharded_tensor" in (saved / ".metadata").read_bytes()
    assert torch.equal(DistributedTensors(saved)["model.b"], torch.ones(2))


def split(folder: Path, parts: list[tuple[list[int], Tensor]], shape: list[int]) -> None:
    """A folder whose one tensor lies in these chunks: offsets, content."""
    folder.mkdir()
    chunks, places = [], {}
    with (folder / "__0_0.distcp").open("wb") as file:
        for offsets, part in parts:
            start = file.tell()
            torch.save(part, file)
            place = _StorageInfo("__0_0.distcp", start, file.tell() - start)
            places[MetadataIndex("w", torch.Size(offsets))] = place
            chunks.append(ChunkStorageMetadata(torch.Size(offsets), part.shape))
    properties = TensorProperties(dtype=torch.float32)
    entry = TensorStorageMetadata(properties, torch.Size(shape), chunks)
    describe(folder, Metadata({"w": entry}, storage_data=places))


WHOLE = torch.arange(24.0).reshape(4, 6)
TILINGS = {
    "a pinwheel": [([0, 0], WHOLE[:1, :4]), ([0, 4], WHOLE[:3, 4:]), ([1, 0], WHOLE[1:, :2]),
                   ([3, 2], WHOLE[3:, 2:]), ([1, 2], WHOLE[1:3, 2:4])],
    "uneven": [([0, 0], WHOLE[:1]), ([1, 0], WHOLE[1:]), ([4, 0], WHOLE[4:])],
}  # fmt: skip
BROKEN = {
    "a gap": [([0, 0], WHOLE[:1]), ([2, 0], WHOLE[2:])],
    "an overlap": [([0, 0], WHOLE[:2]), ([1, 0], WHOLE[1:])],
    "a gap and an overlap": [([0, 0], WHOLE[:2]), ([1, 0], WHOLE[1:3])],
    "beyond": [([0, 0], WHOLE[:2]), ([2, 0], WHOLE[:3])],
    "nothing": [],
    "empty": [([0, 0], WHOLE[:0])],
    "other dimensions": [([0], WHOLE[0])],
}


@pytest.mark.parametrize("parts", TILINGS.values(), ids=TILINGS.keys())
def test_chunks_that_tile(tmp_path: Path, parts: list[tuple[list[int], Tensor]]) -> None:
    split(tmp_path / "it", parts, [4, 6])
    assert torch.equal(DistributedTensors(tmp_path / "it")["w"], WHOLE)


@pytest.mark.parametrize("parts", BROKEN.values(), ids=BROKEN.keys())
def test_chunks_that_do_not_tile(tmp_path: Path, parts: list[tuple[list[int], Tensor]]) -> None:
    split(tmp_path / "it", parts, [4, 6])
    with pytest.raises(ValueError, match=r"it: w: \d chunks do not tile the shape \(4, 6\)"):
        DistributedTensors(tmp_path / "it")


boxes = st.tuples(*[st.tuples(st.integers(0, 4), st.integers(1, 3)) for _ in range(2)])


@given(
    chosen=st.lists(boxes, min_size=1, max_size=4),
    shape=st.tuples(st.integers(1, 5), st.integers(1, 5)),
)
def test_tiling_is_covering_every_element_once(chosen: list[Any], shape: tuple[int, int]) -> None:
    """Also for boxes made by cutting the whole, so that some do tile."""
    chunks = [Box(tuple(o for o, _ in box), tuple(n for _, n in box)) for box in chosen]
    cut = min(chosen[0][0][0], shape[0] - 1)
    halves = [Box((0, 0), (cut, shape[1])), Box((cut, 0), (shape[0] - cut, shape[1]))]
    for tried in (chunks, [half for half in halves if 0 not in half.shape]):
        painted = torch.zeros(10, 10)
        for (top, left), (height, width) in tried:
            painted[top : top + height, left : left + width] += 1
        wanted = torch.zeros(10, 10)
        wanted[: shape[0], : shape[1]] = 1
        assert _tiles(Box((0, 0), shape), tried) == torch.equal(painted, wanted)


def moved(**changes: object) -> Callable[[Path], None]:
    """Changes where an entry is said to lie."""

    def change(folder: Path) -> None:
        metadata = described(folder)
        place = metadata.storage_data[MetadataIndex("model.a", torch.Size([0, 0]))]
        for name, value in changes.items():
            setattr(place, name, value)
        describe(folder, metadata)

    return change


def reformed(**changes: object) -> Callable[[Path], None]:
    """Changes what is said of a tensor."""

    def change(folder: Path) -> None:
        metadata = described(folder)
        for name, value in changes.items():
            setattr(metadata.state_dict_metadata["model.a"], name, value)
        describe(folder, metadata)

    return change


def linked_out(folder: Path) -> None:
    outside = folder.parent / "outside.distcp"
    (folder / "__0_0.distcp").rename(outside)
    (folder / "__0_0.distcp").symlink_to(outside)


def unplaced(folder: Path) -> None:
    metadata = described(folder)
    del metadata.storage_data[MetadataIndex("model.a", torch.Size([0, 0]))]
    describe(folder, metadata)


def cut_short(folder: Path) -> None:
    os.truncate(folder / "__0_0.distcp", (folder / "__0_0.distcp").stat().st_size - 1)


def of_chunk(offsets: list[int], sizes: list[int]) -> list[ChunkStorageMetadata]:
    return [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))]


LIES: dict[str, tuple[Callable[[Path], None], str]] = {
    "above": (
        moved(relative_path="../__0_0.distcp"),
        r"'\.\./__0_0\.distcp' is not the name of a file",
    ),
    "absolute": (moved(relative_path="/etc/passwd"), "'/etc/passwd' is not the name of a file"),
    "a folder": (moved(relative_path=".."), r"'\.\.' is not the name"),
    "missing": (moved(relative_path="x.distcp"), r"the file x\.distcp is missing"),
    "a number": (moved(relative_path=3), "lies in a file whose name is not text"),
    "linked out": (linked_out, "is a link that leads out of the folder"),
    "beyond": (moved(offset=10**9), "ends beyond them: the file is cut short"),
    "long": (moved(length=10**9), "ends beyond them: the file is cut short"),
    "negative": (moved(offset=-5), "wanted sizes and offsets, got"),
    "short": (moved(length=7), "a chunk of 48 bytes has fewer bytes in its file"),
    "upon another": (moved(offset=1300), "entries overlap"),
    "cut short": (cut_short, "ends beyond them: the file is cut short"),
    "unplaced": (unplaced, "model.a: the metadata does not say where it is stored"),
    "packed": (moved(transform_descriptors=["zstd"]), r"was written through \['zstd'\]"),
    "a larger shape": (reformed(size=torch.Size([3, 1 << 50])), "do not tile"),
    "a huge chunk": (
        reformed(size=torch.Size([1 << 50]), chunks=of_chunk([0], [1 << 50])),
        "does not say where|a chunk of .* bytes has fewer",
    ),
    "no dtype": (reformed(properties=None), "model.a is a tensor of an unknown dtype"),
    "sparse": (
        reformed(properties=TensorProperties(layout=torch.sparse_coo)),
        "a layout that is not torch.strided",
    ),
    "no chunks": (reformed(chunks=None), "model.a is a tensor without a list of chunks"),
}


@pytest.mark.parametrize(("lie", "message"), LIES.values(), ids=LIES.keys())
def test_metadata_that_lie_are_refused(
    saved: Path, lie: Callable[[Path], None], message: str
) -> None:
    lie(saved)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        DistributedTensors(saved)
    assert str(caught.value).startswith(f"{saved}: ")


def test_a_chunk_must_be_what_the_metadata_say(saved: Path) -> None:
    reformed(properties=TensorProperties(dtype=torch.int32))(saved)
    found = DistributedTensors(saved)
    with pytest.raises(
        ValueError, match=r"__0_0\.distcp: model\.a has a chunk of another shape or dtype"
    ):
        found["model.a"]
    assert torch.equal(found["model.b"], torch.ones(2))


def test_a_damaged_chunk_is_refused_by_its_file_and_name(saved: Path) -> None:
    file = saved / "__0_0.distcp"
    content = torch.arange(12.0).numpy().tobytes()
    whole = file.read_bytes()
    file.write_bytes(whole.replace(content, b"\x01" + content[1:]))
    with pytest.raises(ValueError, match=r"__0_0\.distcp: model\.a: the record .* is damaged"):
        DistributedTensors(saved)["model.a"]


MARKER = "marker-of-code-that-ran"
HOSTILE: dict[str, tuple[object, str]] = {
    "code": (Calls(os.system, f"touch {MARKER}"), r"posix\.system"),
    "code within": (Metadata({"a": Calls(eval, f"open({MARKER!r}, 'w')")}), r"builtins\.eval"),  # type: ignore[dict-item]
    "a class": (Metadata({}, planner_data=subprocess.Popen, storage_data={}), r"subprocess\.Popen"),
    "a loader": (Metadata({}, storage_data=Calls(pickle.loads, b"")), r"_pickle\.loads"),
}


@pytest.mark.parametrize(("hostile", "name"), HOSTILE.values(), ids=HOSTILE.keys())
def test_code_is_named_and_never_run(
    saved: Path, monkeypatch: pytest.MonkeyPatch, hostile: object, name: str
) -> None:
    monkeypatch.chdir(saved)
    describe(saved, hostile)
    with pytest.raises(ValueError, match=rf"it: .* is a {name}"):
        DistributedTensors(saved)
    assert not (saved / MARKER).exists()


def test_an_object_that_needs_code_is_set_aside(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(saved)
    state = {"bad": Calls(os.system, f"touch {MARKER}"), "good": {"a": (1, "b")}}
    save_folder(state, saved / "other")
    found = DistributedTensors(saved / "other")
    assert found.object("good.a") == (1, "b")
    bad = found.object("bad")
    assert isinstance(bad, Aside) and bad.name == "posix.system"
    assert not (saved / MARKER).exists()


@pytest.mark.parametrize("data", [b"", b"text", pickle.dumps(3), pickle.dumps({}), b"\x80\x04"])
def test_damaged_metadata_are_refused(saved: Path, data: bytes) -> None:
    (saved / ".metadata").write_bytes(data)
    with pytest.raises(ValueError, match=re.escape(str(saved))):
        DistributedTensors(saved)


def test_an_unfinished_save_is_refused_in_words(saved: Path) -> None:
    (saved / ".metadata").unlink()
    with pytest.raises(FileNotFoundError, match="is missing: the folder's save was not finished"):
        DistributedTensors(saved)
    os.mkfifo(saved / ".metadata")
    with pytest.raises(ValueError, match="is a pipe or a device"):
        DistributedTensors(saved)
