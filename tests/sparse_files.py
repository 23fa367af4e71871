"""Files of many gigabytes that take no room: holes where the content of tensors would be."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
import zlib
from collections import OrderedDict
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from isal.isal_zlib import crc32_combine
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from corrupting import Calls, Stored, pickled
from polyak._lazy import TensorSpec
from polyak.checkpoints._safetensors import files as tensorfile

MIB = 1 << 20
_CRC = zlib.crc32(bytes(MIB))
CHECKSUMS = {
    count: reduce(lambda crc, _: crc32_combine(crc, _CRC, MIB), range(count), 0)
    for count in (8, 5120)
}


def _weights(mebibytes: int) -> dict[str, object]:
    """Two tensors of zeros, half of it each, as torch.save describes them."""
    count = mebibytes * MIB // 2 // 4
    tensors = {}
    for i, name in enumerate(("head.weight", "body.weight")):
        storage = Stored(torch.FloatStorage, str(i), count)
        layout: tuple[Any, ...] = (0, (count // 1024, 1024), (1024, 1), False, OrderedDict())
        tensors[name] = Calls(torch._utils._rebuild_tensor_v2, storage, *layout)
    return {"model": tensors, "step": 3}


def archive(path: Path, mebibytes: int) -> None:
    """A file of torch.save."""
    with zipfile.ZipFile(path, "w") as opened:
        opened.writestr("archive/data.pkl", pickled(_weights(mebibytes)))
        for i in range(2):
            _hole(opened, f"archive/data/{i}", mebibytes // 2)


def _hole(opened: zipfile.ZipFile, name: str, mebibytes: int) -> None:
    """A record of zeros, which are not written."""
    file = opened.fp
    assert file is not None
    entry = zipfile.ZipInfo(name)
    entry.file_size = entry.compress_size = mebibytes * MIB
    entry.CRC = CHECKSUMS[mebibytes]
    entry.header_offset = file.tell()
    file.write(entry.FileHeader(zip64=True))
    file.seek(entry.file_size, os.SEEK_CUR)
    opened.filelist.append(entry)
    opened.start_dir = file.tell()


def pickles(path: Path, mebibytes: int) -> None:
    """A file of torch.save in the layout before torch 1.6."""
    with path.open("wb") as file:
        for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}):
            file.write(pickle.dumps(value, 2))
        file.write(pickled(_weights(mebibytes)))
        file.write(pickle.dumps(["0", "1"], 2))
        for _ in range(2):
            nbytes = mebibytes * MIB // 2
            file.write((nbytes // 4).to_bytes(8, "little"))
            file.seek(nbytes, os.SEEK_CUR)
        file.truncate()


def _specs(mebibytes: int) -> dict[str, TensorSpec]:
    rows = mebibytes * MIB // 2 // 4096
    return {
        name: TensorSpec((rows, 1024), torch.float32) for name in ("head.weight", "body.weight")
    }


def _safetensors(path: Path, specs: dict[str, TensorSpec], header: bytes) -> None:
    path.write_bytes(header)
    os.truncate(path, len(header) + sum(spec.nbytes for spec in specs.values()))


def plain(path: Path, mebibytes: int) -> None:
    """A safetensors file."""
    specs = _specs(mebibytes)
    _safetensors(path, specs, tensorfile.layout(specs, {"format": "pt"}).header)


def own(path: Path, mebibytes: int) -> None:
    """A file of `polyak.save`, of an average with two updates."""
    specs = {f"averages/average/average/{n}": spec for n, spec in _specs(mebibytes).items()}
    entry = {"dtype": "float32", "policy": "average", "aliases": []}
    average = {"rule": "uniform()", "tick": [2, 2.0, 1.0, None], "slots": ["average"]}
    described = {
        "format": 2,
        "pairs": [],
        "kind": "averager",
        "every": 1,
        "averages": {"average": average},
        "model": {n: {**entry, "shape": list(s.shape)} for n, s in _specs(mebibytes).items()},
    }
    sums = dict.fromkeys(specs, CHECKSUMS[mebibytes // 2])
    metadata = {tensorfile.KEY: json.dumps(described)}
    _safetensors(path, specs, tensorfile._header(specs, metadata, sums))


def indexed(path: Path, mebibytes: int) -> None:
    """A folder of safetensors files with an index."""
    path.mkdir()
    for name, spec in _specs(mebibytes).items():
        header = tensorfile.layout({name: spec}, {"format": "pt"}).header
        _safetensors(path / f"{name}.safetensors", {name: spec}, header)
    files = {name: f"{name}.safetensors" for name in _specs(mebibytes)}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def distributed(path: Path, mebibytes: int) -> None:
    """A folder of torch.distributed.checkpoint of two ranks, each tensor in two chunks."""
    path.mkdir()
    entries, places = {}, {}
    for number, (name, spec) in enumerate(_specs(mebibytes).items()):
        rows, chunks = spec.shape[0] // 2, []
        for rank in range(2):
            offset, nbytes = torch.Size((rank * rows, 0)), spec.nbytes // 2 + 4096
            chunks.append(ChunkStorageMetadata(offset, torch.Size((rows, 1024))))
            place = _StorageInfo(f"__{rank}_0.distcp", number * nbytes, nbytes)
            places[MetadataIndex(name, offset, rank)] = place
        properties = TensorProperties(dtype=torch.float32)
        entries[name] = TensorStorageMetadata(properties, torch.Size(spec.shape), chunks)
    for rank in range(2):
        (path / f"__{rank}_0.distcp").touch()
        os.truncate(path / f"__{rank}_0.distcp", mebibytes * MIB // 2 + 3 * 4096)
    (path / ".metadata").write_bytes(pickle.dumps(Metadata(entries, storage_data=places)))  # type: ignore[arg-type]


KINDS = {
    "archive.pt": archive,
    "pickles.pt": pickles,
    "plain.safetensors": plain,
    "own.safetensors": own,
    "indexed": indexed,
    "distributed": distributed,
}
"""File name -> what writes it, with a size in MiB of 16 or 10240."""
