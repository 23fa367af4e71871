"""Name a file without weights by its first bytes, and say what to do with it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection
from pathlib import Path, PurePosixPath

from polyak.checkpoints._open.files import OpenFile

_FIRST = 512
_LINE = 60
_SOURCE = "average the checkpoints that it was made from"
_UNPACK = "unpack it first"
_PICKLED = "a pickle of Python: load it there, and save a dictionary name -> tensor with torch.save"
_BEGINS: tuple[tuple[int, bytes, str], ...] = (
    (0, b"version https://git-lfs", "a pointer of Git LFS: fetch the file itself (git lfs pull)"),
    (0, b"/annex/objects/", "a pointer of git-annex: fetch the file itself (git annex get)"),
    (0, b"GGUF", f"a GGUF file of llama.cpp, mostly quantised: {_SOURCE}"),
    (0, b"lmgg", f"a GGML file of llama.cpp: {_SOURCE}"),
    (0, b"tjgg", f"a GGML file of llama.cpp: {_SOURCE}"),
    (4, b"TFL3", f"a model of TensorFlow Lite: {_SOURCE}"),
    (
        0,
        b"\x89HDF",
        "an HDF5 file, as Keras writes: read it there, and save the weights as safetensors",
    ),
    (0, b"\x93NUMPY", "an array of numpy: save a dictionary name -> tensor with torch.save"),
    (0, b"7z\xbc\xaf\x27\x1c", f"a 7z archive: {_UNPACK}"),
    (0, b"Rar!", f"a rar archive: {_UNPACK}"),
    (0, b"\x7fELF", "a program or a library"),
    (0, b"SQLite format 3", "a database of SQLite"),
    (0, b"%PDF", "a PDF"),
    (0, b"\x89PNG", "a picture"),
    (0, b"\xff\xd8\xff", "a picture"),
    (0, b"(dp", _PICKLED),
    (0, b"}q", _PICKLED),
    (0, b"{", "a JSON file; an index of weights is named *.json"),
    (0, b"[", "a JSON file; an index of weights is named *.json"),
)
_PACKED = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"\xfd7zXZ": ("xz", "unxz"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
    b"\x04\x22\x4d\x18": ("lz4", "unlz4"),
}
_PACKED_SUFFIX = re.compile(r"\.(gz|xz|bz2|zst|lz4)$")
_MARKUP = (b"<!doctype", b"<html", b"<?xml", b"<error", b"<")


def looks(file: OpenFile) -> str:
    """Describe what a file looks like, and what to do with it; "" if its first bytes do not say."""
    first = file.read(0, _FIRST)
    for place, begin, what in _BEGINS:
        if first[place : place + len(begin)] == begin:
            return what
    for begin, (packer, command) in _PACKED.items():
        if first.startswith(begin):
            return f"a file packed by {packer}: unpack it first ({_unpacking(command, file.path)}), and read that"
    if first.lstrip().lower().startswith(_MARKUP):
        return "a page of HTML or XML: the download may have failed, so fetch the file again"
    if file.path.suffix == ".onnx" or (first[:1] == b"\x08" and b"\x12" in first[2:4]):
        return f"an ONNX model, a graph with its weights: {_SOURCE}"
    if file.path.suffix == ".dvc":
        return "a pointer of DVC: fetch the file itself (dvc pull)"
    if file.path.suffix == ".msgpack":
        return "weights of Flax: read them there, and save them as safetensors"
    if file.path.name.endswith(".index") or ".data-00000-of-" in file.path.name:
        return "a checkpoint of TensorFlow: read it there, and save the weights as safetensors"
    if not any(first):
        return "nothing but zeros: it was not written to its end, so copy or save it again"
    return _text(first)


def _unpacking(command: str, path: Path) -> str:
    """The command that unpacks a file beside itself; a packed tar archive, as `.nemo` may be, stays one."""
    name = _PACKED_SUFFIX.sub("", path.name)
    unpacked = path.with_name(name if name != path.name else f"unpacked-{name}")
    return f"{command} -c {shlex.quote(str(path))} > {shlex.quote(str(unpacked))}"


def _text(first: bytes) -> str:
    """Describe a text by its first line, which says why a download failed."""
    try:
        text = first.decode()
    except UnicodeDecodeError as error:
        if error.start < len(first) - 4:  # else the last character is only cut
            return ""
        text = first[: error.start].decode()
    if not text.replace("\n", " ").replace("\t", " ").replace("\r", " ").isprintable():
        return ""
    line = text.strip().partition("\n")[0][:_LINE]
    return f"text ({line!r}): if it should be weights, the download may have failed"


def refusal(file: OpenFile) -> ValueError:
    """The error for a file that is neither of torch.save nor of safetensors."""
    what = looks(file)
    said = (
        f"it looks like {what}"
        if what
        else f"it begins with {file.read(0, 16)!r}, so copy or fetch it again, or save its weights as safetensors "
        "where it is read"
    )
    return ValueError(f"{file.path} is neither a file of torch.save nor of safetensors: {said}")


def archive_kind(names: Collection[str]) -> str:
    """Name the kind of a zip archive that torch.save did not write, and say what to do."""
    ends = {PurePosixPath(name).name for name in names}
    if "constants.pkl" in ends:
        return "a TorchScript archive, which is code: torch.jit.load it, and torch.save its state_dict()"
    if ends & {"archive_format", "serialized_exported_program.json"}:
        return "a program of torch.export: torch.export.load it, and torch.save its state_dict"
    if "model.weights.h5" in ends:
        return "a model of Keras: read it there, and save the weights as safetensors"
    if ends and all(name.endswith(".npy") for name in ends):
        return "arrays of numpy: save a dictionary name -> tensor with torch.save"
    endings = ", ".join(sorted(ends - {""})[:5]) or "nothing"
    return f"a zip archive without data.pkl, which torch.save did not write ({endings:.200}): {_UNPACK}"
