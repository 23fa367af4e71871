"""Safetensors files: parity with the library, whole or refused, and no memory kept."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from corrupting import DTYPES, flipped, of_bytes, resident_bytes, safetensors, same
from polyak._lazy import TensorSpec, spec_of
from polyak.checkpoints._open.files import OpenFile
from polyak.checkpoints._safetensors import files as tensorfile
from polyak.checkpoints._safetensors.files import TensorFile, is_safetensors

in_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
tensors = st.dictionaries(
    st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__"),
    st.builds(
        of_bytes,
        st.sampled_from(DTYPES),
        st.lists(st.integers(0, 4), max_size=3).map(tuple),
        st.integers(0, 99),
    ),
    max_size=5,
)


def opened(path: Path) -> TensorFile:
    return TensorFile(OpenFile(path))


def checked(path: Path) -> dict[str, Tensor]:
    """All tensors of a file of ours, compared with its checksums."""
    file = opened(path)
    file.use_checksums()
    return dict(file)


def write(path: Path, held: Mapping[str, Tensor], checksums: bool = False) -> None:
    specs = {name: spec_of(tensor) for name, tensor in held.items()}
    tensorfile.write(path, specs, lambda name: [held[name]], {"a": "b"}, checksums=checksums)


@in_folder
@given(held=tensors, checksums=st.booleans())
def test_the_library_reads_what_is_written(
    tmp_path: Path, held: dict[str, Tensor], checksums: bool
) -> None:
    path = tmp_path / "ours.safetensors"
    write(path, held, checksums)
    found = load_file(path)
    assert found.keys() == held.keys()
    assert all(same(found[name], held[name]) for name in held)
    with safe_open(path, framework="pt") as opened:
        assert opened.metadata()["a"] == "b"


@in_folder
@given(held=tensors)
def test_what_the_library_writes_is_read(tmp_path: Path, held: dict[str, Tensor]) -> None:
    path = tmp_path / "theirs.safetensors"
    save_file(held, path, metadata={"format": "pt"})
    file = opened(path)
    assert file.keys() == held.keys()
    assert file.metadata == {"format": "pt"}
    assert file.specs == {name: spec_of(tensor) for name, tensor in held.items()}
    assert all(same(file[name], held[name]) for name in held)
    assert is_safetensors(OpenFile(path))


@pytest.mark.parametrize("padding", range(8))
def test_files_that_are_not_aligned(tmp_path: Path, padding: int) -> None:
    """Other writers do not pad the header, and put bytes before what is wider."""
    held = {"byte": of_bytes(torch.uint8, (3,)), "wide": of_bytes(torch.float64, (2, 2), 1)}
    header = b'{"byte":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},"wide":'
    header += b'{"dtype":"F64","shape":[2,2],"data_offsets":[3,35]}}' + b" " * padding
    body = b"".join(
        bytes(tensor.reshape(-1).view(torch.uint8).tolist()) for tensor in held.values()
    )
    path = tmp_path / "odd.safetensors"
    path.write_bytes(safetensors(header, body))
    file = opened(path)
    assert all(same(file[name], held[name]) for name in held)
    assert torch.equal(file["wide"].nan_to_num() * 2, held["wide"].nan_to_num() * 2)
    file.release("wide")
    assert same(file["wide"], held["wide"])


def test_a_view_is_of_the_file_and_writing_to_it_changes_no_file(tmp_path: Path) -> None:
    path = tmp_path / "it.safetensors"
    write(path, {"w": torch.arange(4.0)})
    before = path.read_bytes()
    opened(path)["w"].zero_()
    assert path.read_bytes() == before
    assert opened(path)["w"].tolist() == [0, 1, 2, 3]


def test_views_outlive_the_file_object(tmp_path: Path) -> None:
    path = tmp_path / "it.safetensors"
    write(path, {"w": torch.arange(1 << 16)})
    view = opened(path)["w"]
    path.unlink()
    assert torch.equal(view, torch.arange(1 << 16))


def test_released_pages_leave_memory_and_come_back(tmp_path: Path) -> None:
    path = tmp_path / "large.safetensors"
    held = {"small": of_bytes(torch.uint8, (5,)), "large": of_bytes(torch.float32, (1 << 24,), 1)}
    write(path, held)
    file = opened(path)
    start = resident_bytes()
    view = file["large"]
    assert same(view, held["large"])
    assert resident_bytes() - start > 60 << 20
    file.release("large")
    assert resident_bytes() - start < 8 << 20
    assert all(same(file[name], held[name]) for name in held)
    assert same(view, held["large"])


def test_what_is_written_stays_beside_released_pages(tmp_path: Path) -> None:
    """Only the pages that a tensor has for itself are given back."""
    path = tmp_path / "it.safetensors"
    write(path, {name: torch.zeros(3000) for name in "abc"})
    file = opened(path)
    for name in "ac":
        file[name].fill_(1.0)
    file.release("b")
    assert all(file[name].eq(1).all() for name in "ac")


def test_a_file_larger_than_the_memory(tmp_path: Path) -> None:
    """A mapping reserves nothing; the file has a hole, so it takes no room on the disk."""
    path = tmp_path / "huge.safetensors"
    count = 4 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 8
    header = {"w": {"dtype": "F64", "shape": [count], "data_offsets": [0, 8 * count]}}
    path.write_bytes(safetensors(header))
    os.truncate(path, path.stat().st_size + 8 * count)
    with path.open("r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(b"\0\0\0\0\0\0\xf0\x3f")
    tensor = opened(path)["w"]
    assert tensor.shape == (count,)
    assert (tensor[0].item(), tensor[-1].item()) == (0.0, 1.0)


@in_folder
@given(data=st.data())
def test_checksums_find_any_flipped_bit(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "it.safetensors"
    held = {"a": of_bytes(torch.bfloat16, (7, 3)), "b": of_bytes(torch.int64, (2,))}
    write(path, held, checksums=True)
    whole = path.read_bytes()
    checked(path)
    path.write_bytes(flipped(whole, data.draw(st.integers(0, 8 * len(whole) - 1))))
    with pytest.raises(ValueError, match=str(path)):
        checked(path)


def test_a_file_without_checksums_has_none(tmp_path: Path) -> None:
    path = tmp_path / "it.safetensors"
    write(path, {"w": torch.zeros(1)})
    with pytest.raises(ValueError, match="the header is not what was written"):
        checked(path)


def test_tensors_are_written_in_pieces(tmp_path: Path) -> None:
    path = tmp_path / "it.safetensors"
    told: list[int] = []
    tensorfile.write(
        path,
        {"w": TensorSpec((4, 2), torch.int32), "none": TensorSpec((0, 3), torch.int8)},
        lambda name: list(torch.arange(8, dtype=torch.int32).reshape(4, 2)) if name == "w" else [],
        {},
        progress=told.append,
    )
    assert told == [8] * 4
    found = load_file(path)
    assert torch.equal(found["w"], torch.arange(8, dtype=torch.int32).reshape(4, 2))
    assert found["none"].shape == (0, 3)


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t.T,
        lambda t: t[:, ::2],
        lambda t: t.expand(3, 4, 6),
        lambda t: t.to(torch.complex64).conj(),
        lambda t: t.to(torch.complex64).conj().imag,
        lambda t: torch.nn.Parameter(t),
    ],
)
def test_views_of_any_layout_are_written_as_they_read(tmp_path: Path, view: object) -> None:
    tensor = view(torch.arange(24.0).reshape(4, 6))  # type: ignore[operator]
    path = tmp_path / "it.safetensors"
    write(path, {"w": tensor})
    assert torch.equal(opened(path)["w"], tensor.detach().resolve_conj().resolve_neg())


WRONG: list[tuple[TensorSpec, list[Tensor], str]] = [
    (TensorSpec((2,), torch.float32), [torch.zeros(1)], "w: 4 bytes were given, wanted 8"),
    (TensorSpec((2,), torch.float32), [torch.zeros(3)], "w: 12 bytes were given, wanted 8"),
    (
        TensorSpec((2,), torch.float32),
        [torch.zeros(2).double()],
        "a piece is torch.float64, wanted",
    ),
]


@pytest.mark.parametrize(("wanted", "pieces", "message"), WRONG)
def test_pieces_must_fill_their_tensor(
    tmp_path: Path, wanted: TensorSpec, pieces: Iterable[Tensor], message: str
) -> None:
    path = tmp_path / "it.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match=message):
        tensorfile.write(path, {"w": wanted}, lambda _: pieces, {})
    assert [each.read_bytes() for each in tmp_path.iterdir()] == [b"old"]


def test_what_the_format_lacks_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "it.safetensors"
    with pytest.raises(TypeError, match=r"w is torch\.complex128, which a safetensors file cannot"):
        write(path, {"w": torch.zeros(1, dtype=torch.complex128)})
    with pytest.raises(ValueError, match="__metadata__"):
        write(path, {"__metadata__": torch.zeros(1)})
    write(path, {"w": torch.zeros(1)})
    with pytest.raises(FileExistsError, match=r"it\.safetensors already exists"):
        tensorfile.write(path, {}, lambda _: [], {}, overwrite=False)


def tensor_of(dtype: str, shape: list[int], offsets: list[int]) -> dict[str, object]:
    return {"w": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


DAMAGED = {
    "empty": b"",
    "text": b"not a safetensors file at all, but text of some length",
    "no header": bytes(8),
    "a header of 2^63 bytes": b"\xff" * 7 + b"\x7f{}",
    "cut short": safetensors(tensor_of("F32", [4], [0, 16]), bytes(15)),
    "more than it says": safetensors(tensor_of("F32", [4], [0, 16]), bytes(17)),
    "a shape that lies": safetensors(tensor_of("F32", [5], [0, 16]), bytes(16)),
    "a shape beyond 2^64": safetensors(tensor_of("F32", [1 << 40, 1 << 40], [0, 16]), bytes(16)),
    "negative": safetensors(tensor_of("F32", [-4], [0, 16]), bytes(16)),
    "a hole": safetensors(tensor_of("F32", [1], [4, 8]), bytes(8)),
    "an unknown dtype": safetensors(tensor_of("F31", [4], [0, 16]), bytes(16)),
    "a dtype of half bytes": safetensors(tensor_of("F4", [4], [0, 2]), bytes(2)),
    "deep": safetensors(b'{"w":' + b"[" * 100_000),
    "an array": safetensors(b"[]"),
    "another encoding": safetensors("{}".encode("utf-16")),
}


@pytest.mark.parametrize("data", DAMAGED.values(), ids=DAMAGED.keys())
def test_damaged_files_are_refused_by_name(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"bad\.safetensors"):
        opened(path)


def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(ValueError, match="pipe is a pipe or a device"):
        opened(pipe)
    with pytest.raises(ValueError, match="/dev/zero is a pipe or a device"):
        is_safetensors(OpenFile(Path("/dev/zero")))
    with pytest.raises(IsADirectoryError, match=str(tmp_path)):
        opened(tmp_path)
    with pytest.raises(FileNotFoundError, match="missing"):
        opened(tmp_path / "missing")
