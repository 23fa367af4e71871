"""Files that are damaged or hostile: valid ones of every layout, and what is made of them."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata

import polyak
from corrupting import (
    Calls,
    archive,
    claimed,
    flipped,
    of_bytes,
    pickled,
    safetensors,
    save_folder,
)
from polyak import checkpoints
from polyak._lazy import spec_of
from polyak.checkpoints import _save as native
from polyak.checkpoints._dcp.tensors import DistributedTensors
from polyak.checkpoints._open.files import OpenFile
from polyak.checkpoints._safetensors import files as tensorfile
from polyak.checkpoints._safetensors.files import TensorFile
from reading_hostile import Net

MARKER = "marker-of-code-that-ran"


class Case(NamedTuple):
    """A file or folder to read, what it was made of, and the averager to load it into, if any."""

    path: Path
    made_of: str
    load: str | None = None
    unsummed: bool = False


def state() -> dict[str, Tensor]:
    """Weights with NaN, infinities and subnormal numbers, by the names of `Net`."""
    held = Net().state_dict()
    held["body.bias"] = torch.tensor([float("nan"), float("-inf")])
    held["norm.running_var"] = torch.tensor([1e-42, float("inf")])
    return held


def averager(rules: Any) -> polyak.Averager:
    made = polyak.Averager(Net(), rules)
    for _ in range(3):
        made.update()
    return made


def ema() -> polyak.EMA:
    made = polyak.EMA(Net(), beta=0.9)
    for _ in range(3):
        made.update()
    return made


def dictionaries() -> dict[str, dict[str, Any]]:
    """What other libraries save with torch.save, by their layouts' names."""
    live, average = state(), {name: 2 * each for name, each in state().items()}
    shadows = [torch.ones(2, 3), torch.zeros(2), torch.ones(2), torch.zeros(2)]
    settings = {"decay": 0.9, "min_decay": 0.0, "update_after_step": 1, "optimization_step": 5}
    settings |= {"use_ema_warmup": True, "inv_gamma": 1.0, "power": 2 / 3}
    module = {f"module.{name}": each for name, each in average.items()}
    ours = {"initted": torch.tensor(True), "step": torch.tensor(3)}
    ours |= {f"ema_model.{name}": each for name, each in average.items()}
    lightning = {"pytorch-lightning_version": "2.6", "state_dict": average}
    nemo = {"opt": {}, "ema": shadows, "current_step": 5, "decay": 0.9, "every_n_steps": 2}
    held = {"named_parameters_dict": average, "named_buffers_dict": {}}
    algorithm = {"ema_started": True, "ema_weights_active": True, "ema_model": held}
    return {
        "state-dict": dict(live),
        "averaged-model": {"n_averaged": torch.tensor(3), **module},
        "ema-pytorch": ours | {f"online_model.{name}": each for name, each in live.items()},
        "torch-ema": {"decay": 0.9, "num_updates": 5, "shadow_params": shadows, "collected_params": []},
        "diffusers": {**settings, "shadow_params": shadows},
        "lightning": {**lightning, "averaging_state": {"n_averaged": torch.tensor(3)},
                      "current_model_state": live, "callbacks": {"c": {"latest_update_step": 2}}},
        "nemo": {**lightning, "optimizer_states": [nemo]},
        "mmengine": {"state_dict": average, "ema_state_dict": {"steps": torch.tensor(3), **module}},
        "edm2": {"state": {"cur_nimg": 512}, "net": live, "ema": {"stds": [0.05, 0.1], "emas": [live, average]}},
        "timm": {"state_dict": live, "state_dict_ema": average, "epoch": 3},
        "composer": {"state": {"model": average, "algorithms": [("EMA", algorithm)]}},
        "nested": {"model": live, "ema": average, "step": 3},
    }  # fmt: skip


LOADED = {"averaged-model": "one", "torch-ema": "ratio", "mmengine": "one", "ema-pytorch": "ema"}


def valid(folder: Path) -> Iterator[Case]:
    """A valid file or folder of every layout."""
    folder.mkdir()
    polyak.save(folder / "polyak", averager("exponential(0.9)"))
    yield Case(folder / "polyak", "polyak", "one")
    polyak.save(folder / "several", averager({"a": "exponential(0.9)", "b": "bema()"}))
    yield Case(folder / "several", "several", "several")
    polyak.save(folder / "ema", ema())
    yield Case(folder / "ema", "ema", "ema")
    for name, held in dictionaries().items():
        torch.save(held, folder / f"{name}.pt")
        yield Case(folder / f"{name}.pt", name, LOADED.get(name))
    torch.save(state(), folder / "legacy.pt", _use_new_zipfile_serialization=False)
    yield Case(folder / "legacy.pt", "legacy", unsummed=True)
    save_file(state(), folder / "plain.safetensors", metadata={"format": "pt"})
    yield Case(folder / "plain.safetensors", "safetensors", unsummed=True)
    yield from _valid_folders(folder)


def _valid_folders(folder: Path) -> Iterator[Case]:
    nested = {"model": state(), "optimizer": {"exp_avg": torch.ones(2)}, "step": 3}
    save_folder(nested, folder / "dcp")
    yield Case(folder / "dcp", "dcp")
    one = averager("exponential(0.9)")
    save_folder(native.encoded("save", {"": one}, native.packed, None)[""], folder / "native")
    yield Case(folder / "native", "native", "one")
    checkpoints.save_distributed(folder / "training", {"model": state(), "average": one, "step": 3})
    yield Case(folder / "training", "training", "one")
    (folder / "sharded").mkdir()
    names = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(state())}
    for file in set(names.values()):
        save_file(
            {n: each for n, each in state().items() if names[n] == file}, folder / "sharded" / file
        )
    index = json.dumps({"metadata": {}, "weight_map": names})
    (folder / "sharded" / "model.safetensors.index.json").write_text(index)
    yield Case(folder / "sharded", "sharded", unsummed=True)
    (folder / "pretrained").mkdir()
    save_file(state(), folder / "pretrained" / "model.safetensors")
    settings = {
        key: value for key, value in dictionaries()["diffusers"].items() if key != "shadow_params"
    }
    (folder / "pretrained" / "config.json").write_text(json.dumps(settings))
    yield Case(folder / "pretrained", "pretrained", unsummed=True)


def damaged(data: bytes, chosen: random.Random, each: int) -> Iterator[bytes]:
    """The bytes cut, flipped, overwritten, moved: so many of every kind."""
    size = len(data)
    for _ in range(each):
        start = chosen.randrange(size)
        stop = min(size, start + chosen.choice([1, 2, 8, 100]))
        yield data[:start]
        yield flipped(data, chosen.randrange(8 * size))
        yield flipped(data, chosen.randrange(8 * min(size, 400)))  # where headers are
        yield data[:start] + bytes(stop - start) + data[stop:]
        yield data[:start] + chosen.randbytes(stop - start) + data[stop:]
        yield data[:start] + data[stop:]
        yield data[:start] + data[start:stop] * 2 + data[stop:]


def corrupted(case: Case, folder: Path, chosen: random.Random, each: int) -> Iterator[Case]:
    """Copies of a valid file or folder, each with one file damaged."""
    whole = case.path if case.path.is_file() else None
    files = [whole] if whole else sorted(file for file in case.path.rglob("*") if file.is_file())
    for file in files:
        for number, data in enumerate(damaged(file.read_bytes(), chosen, each)):
            place = folder / f"{case.made_of}-{file.name.strip('.')}-{number}"
            if whole:
                place = place.with_name(place.name + file.suffix)
                place.write_bytes(data)
            else:
                shutil.copytree(case.path, place)
                (place / file.relative_to(case.path)).write_bytes(data)
            yield case._replace(path=place)


HOSTILE_VALUES: list[Any] = [
    None, True, -1, 0, 3.5, float("nan"), float("inf"), 1e308, 10**30, "", "x" * 5000, "../../x",
    [], [1], [[[]]], {}, {"a": 1}, [None] * 50,
]  # fmt: skip
RULES = [
    "window(1000000000)", "tail(" * 80 + "uniform()" + ", 1)" * 80, "exponential(2)", "power(1e308)",
    "exponential(0.9) + 1", "__import__('os')", "(" * 500, "bema()", "window(3)",
]  # fmt: skip


def varied(value: Any, replacements: list[Any]) -> Iterator[Any]:
    """A structure with one part replaced, or missing, for every part and replacement."""
    yield from replacements
    if isinstance(value, dict):
        for key in value:
            rest = {name: part for name, part in value.items() if name != key}
            yield rest
            for part in varied(value[key], replacements):
                yield {**rest, key: part}
    elif isinstance(value, (list, tuple)):
        for place in range(min(len(value), 2)):
            for part in varied(value[place], replacements):
                yield type(value)([*value[:place], part, *value[place + 1 :]])


def lying_natives(folder: Path, chosen: random.Random, most: int) -> Iterator[Case]:
    """Our own files with a description that lies, under a digest that is right."""
    for kind, name in (("one", "polyak"), ("several", "several"), ("ema", "ema")):
        file = TensorFile(OpenFile(folder.parent / "valid" / name))
        described = json.loads(file.metadata[tensorfile.KEY])
        held = dict(file)
        lies = list(varied(described, HOSTILE_VALUES + RULES))
        for number, lie in enumerate(chosen.sample(lies, min(most, len(lies)))):
            place = folder / f"native-{name}-{number}"
            write_native(place, held, json.dumps(lie))
            yield Case(place, "lie", kind)
    for number, text in enumerate(
        ("[" * 5000, "[" * 50_000 + "]" * 50_000, "3", "", '"x"', "NaN", "1" * 9999)
    ):
        place = folder / f"native-text-{number}"
        write_native(place, held, text)
        yield Case(place, "lie", "one")
    for number, lost in enumerate(held):
        place = folder / f"native-lost-{number}"
        rest = {key: each for key, each in held.items() if key != lost}
        write_native(place, rest, file.metadata[tensorfile.KEY])
        yield Case(place, "lie", "ema")
    yield from _lying_folders(folder, chosen, most)


def _lying_folders(folder: Path, chosen: random.Random, most: int) -> Iterator[Case]:
    """Folders of ours with a description that lies, or that is no text."""
    held = dict(DistributedTensors(folder.parent / "valid" / "native"))
    described = json.loads(bytes(held[tensorfile.KEY].tolist()))
    lies = chosen.sample(list(varied(described, HOSTILE_VALUES + RULES)), most)
    texts = [json.dumps(lie).encode() for lie in lies]
    tensors = [torch.tensor(list(text), dtype=torch.uint8) for text in [*texts, b"", b"\xff{"]]
    tensors += [torch.zeros(3), torch.zeros((2, 2), dtype=torch.uint8), torch.empty(0)]
    for number, tensor in enumerate(tensors):
        place = folder / f"native-folder-{number}"
        save_folder({**held, tensorfile.KEY: tensor}, place)
        yield Case(place, "lie", "one")
    for number, lost in enumerate(held):
        place = folder / f"native-folder-lost-{number}"
        save_folder({key: each for key, each in held.items() if key != lost}, place)
        yield Case(place, "lie", "one")


def write_native(path: Path, held: Mapping[str, Tensor], text: str) -> None:
    specs = {key: spec_of(each) for key, each in held.items()}
    tensorfile.write(path, specs, lambda key: [held[key]], {tensorfile.KEY: text}, checksums=True)


def lying_dictionaries(folder: Path, chosen: random.Random, most: int) -> Iterator[Case]:
    """Dictionaries of other libraries with one part that is not what belongs there."""
    tensors = [torch.empty(0), torch.ones(3), torch.tensor(float("nan")), torch.tensor(1e30)]
    tensors += [torch.tensor(2**40), torch.zeros(1, dtype=torch.complex64)]
    tensors += [
        of_bytes(torch.float8_e5m2, (2,)),
        torch.zeros((0, 1 << 40)),
        torch.ones(1).expand(9999),
    ]
    for name, held in dictionaries().items():
        lies = [lie for lie in varied(held, [*HOSTILE_VALUES, *tensors]) if isinstance(lie, dict)]
        for number, lie in enumerate(chosen.sample(lies, min(most, len(lies)))):
            place = folder / f"dict-{name}-{number}.pt"
            torch.save(lie, place)
            yield Case(place, "lie", LOADED.get(name))


def headers() -> Iterator[bytes]:
    """Files that begin as safetensors and lie."""
    offsets = [
        [0, 16],
        [16, 0],
        [-1, 15],
        [0, 1 << 62],
        [1 << 62, (1 << 62) + 16],
        [0, 15],
        [0.0, 16.0],
    ]
    shapes: list[Any] = [
        [4],
        [],
        [-4],
        [1 << 62, 4],
        [1 << 63],
        [0, 1 << 63],
        [2, 2.0],
        [[4]],
        "4",
        None,
    ]
    for dtype in ("F32", "f32", "F4", "F6_E2M3", "F8_E8M0", "", "F" * 1000, 3):
        for shape in shapes:
            for data_offsets in offsets:
                entry = {"dtype": dtype, "shape": shape, "data_offsets": data_offsets}
                yield safetensors({"w": entry}, bytes(16))
    yield safetensors(b'{"a":' * 20_000)
    yield safetensors(b"[" * 50_000)
    yield safetensors({"__metadata__": {"polyak": 3}})
    yield safetensors({"__metadata__": {"polyak": "{}"}})
    yield safetensors({"__metadata__": "x", "w": {}})
    for length in (0, 1, 7, 8, 99_999_999, 100_000_001, (1 << 63) - 1, (1 << 64) - 1):
        yield length.to_bytes(8, "little") + b"{}"


def programs() -> Iterator[bytes]:
    """Pickles that would run code, allocate, or never end."""
    for function in (os.system, os.unlink, os.open, exec, eval, open, print, getattr, __import__):
        for protocol in (0, 1, 2, 3, 4, 5):
            yield pickled(Calls(function, f"touch {MARKER}"), protocol)
    for maker in (bytearray, torch.FloatTensor, torch.Tensor, torch.UntypedStorage, list, range):
        yield pickled({"w": Calls(maker, 10**12)})
    for rebuild in (torch._utils._rebuild_parameter, torch._utils._rebuild_qtensor):
        yield pickled(Calls(rebuild, 1, 2, 3))
    value: list[Any] = []
    for _ in range(50):
        value = [value] * 5
    yield pickled(value)
    yield b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b"."
    yield b"\x80\x02}" + b")" + b"2\x86" * 60 + b"K\x01s."
    yield b"\x80\x02]q\0h\0a."


def layouts() -> Iterator[bytes]:
    """Archives whose tensors claim what they do not have."""
    storage = torch.arange(4.0).numpy().tobytes()
    numbers = [0, 1, -1, 4, 5, 1 << 31, 1 << 40, 1 << 62, 1 << 70]
    for count in numbers:
        for offset in (0, 3, -1, 1 << 62):
            for shape, stride in [
                ((4,), (1,)),
                ((2, 2), (2, 1)),
                ((10**12,), (0,)),
                ((0, 1 << 62), (1, 1)),
            ]:
                yield claimed(torch.FloatStorage, count, offset, shape, stride, storage)
    for name in ("/data.pkl", "../data.pkl", "archive/../data.pkl", "C:\\data.pkl", ""):
        yield archive({name: pickled({}), "data/0": storage})
    for order in (b"big", b"", b"little\n", b"middle"):
        yield archive({"data.pkl": pickled({}), "byteorder": order})


def indexes() -> Iterator[str]:
    """Indexes that lead elsewhere, or are none."""
    names: list[Any] = [
        "../plain.safetensors", "/etc/passwd", "/dev/zero", "/dev/stdin", "..", ".", "", "\0", "x" * 300,
        "part-0.safetensors/", "./part-0.safetensors", "~", "$HOME", "part-0.safetensors\0", 3, None, [], {},
        "model.safetensors.index.json", "missing", "pipe", "folder", "link",
    ]  # fmt: skip
    for name in names:
        yield json.dumps({"weight_map": {"body.weight": name}})
    yield from ("", "{", "[]", "null", "3", '{"weight_map": []}', "[" * 100_000, '{"a":' * 50_000)
    yield '{"weight_map": {"a": "part-0.safetensors", "a": "part-1.safetensors"}}'


def special(folder: Path) -> Iterator[Path]:
    """What is no file at all, and files that are no checkpoints."""
    os.mkfifo(folder / "pipe.pt")
    yield folder / "pipe.pt"
    (folder / "empty folder").mkdir()
    yield folder / "empty folder"
    (folder / "a folder.pt").mkdir()
    yield folder / "a folder.pt"
    (folder / "loop.pt").symlink_to(folder / "loop.pt")
    yield folder / "loop.pt"
    (folder / "dangling.pt").symlink_to(folder / "nowhere")
    yield folder / "dangling.pt"
    (folder / "device.pt").symlink_to("/dev/zero")
    yield folder / "device.pt"
    (folder / "pipes").mkdir()
    os.mkfifo(folder / "pipes" / ".metadata")
    yield folder / "pipes"
    (folder / "pipe of an index").mkdir()
    os.mkfifo(folder / "pipe of an index" / "model.safetensors.index.json")
    yield folder / "pipe of an index"
    (folder / "pipe of settings").mkdir()
    os.mkfifo(folder / "pipe of settings" / "config.json")
    save_file(state(), folder / "pipe of settings" / "model.safetensors")
    yield folder / "pipe of settings"
    for name, data in {
        "empty": b"",
        "text": b"text\n" * 99,
        "zeros": bytes(9999),
        "zip": b"PK\3\4",
    }.items():
        for suffix in ("pt", "safetensors", "bin", "json", "ckpt"):
            (folder / f"{name}.{suffix}").write_bytes(data)
            yield folder / f"{name}.{suffix}"
    yield folder / "missing.pt"


def made(folder: Path) -> Iterator[Case]:
    """Files that are hostile by intent."""
    for number, data in enumerate((*headers(), *layouts())):
        path = folder / f"claim-{number}.pt"
        path.write_bytes(data)
        yield Case(path, "lie", "one" if number % 10 == 0 else None)
    legacy = (folder.parent / "valid" / "legacy.pt").read_bytes()
    start = legacy.index(b"\x80\x02c")
    for number, program in enumerate(programs()):
        wrapped = {"zip": archive({"data.pkl": program}), "raw": program}
        wrapped["old"] = legacy[:start] + program + b"\x80\x02]."
        for kind, data in wrapped.items():
            path = folder / f"program-{kind}-{number}.pt"
            path.write_bytes(data)
            yield Case(path, "lie", "ema" if kind == "zip" else None)
        place = folder / f"program-dcp-{number}"
        shutil.copytree(folder.parent / "valid" / "dcp", place)
        (place / ".metadata").write_bytes(program)
        yield Case(place, "lie")
    yield from _made_folders(folder)
    for path in special(folder):
        yield Case(path, "lie", "one")


def _made_folders(folder: Path) -> Iterator[Case]:
    for number, text in enumerate(indexes()):
        place = folder / f"index-{number}"
        shutil.copytree(folder.parent / "valid" / "sharded", place)
        os.mkfifo(place / "pipe")
        (place / "folder").mkdir()
        (place / "link").symlink_to("/etc/passwd")
        (place / "model.safetensors.index.json").write_text(text)
        yield Case(place, "lie")
    for number, change in enumerate(_metadata_lies()):
        place = folder / f"metadata-{number}"
        shutil.copytree(folder.parent / "valid" / "dcp", place)
        described = pickle.loads((place / ".metadata").read_bytes())
        change(described)
        (place / ".metadata").write_bytes(pickle.dumps(described))
        yield Case(place, "lie")


def _metadata_lies() -> Iterator[Callable[[Metadata], None]]:
    """Changes of what a folder's metadata say, each of one field of one entry."""
    places: list[Any] = ["../x", "/etc/passwd", "..", "", "\0", 3, None, "x" * 300, ".metadata"]
    numbers: list[Any] = [-1, 0, 1, 10**6, 1 << 62, 1 << 70, 0.5, None, "3", []]
    sizes: list[Any] = [(), (0,), (2, 3, 1), (3, 2), (1 << 40, 3), (-2, 3), None, "23", ((),)]
    storage = {"relative_path": places, "offset": numbers, "length": numbers}
    for field, values in {**storage, "transform_descriptors": ["zstd", ["zstd"]]}.items():
        for value in values:
            yield lambda m, f=field, v=value: setattr(next(iter(m.storage_data.values())), f, v)  # type: ignore[misc]
    for field in ("size", "chunks", "properties"):
        for value in sizes:
            yield lambda m, f=field, v=value: setattr(_entry(m), f, v)  # type: ignore[misc]
    for field in ("offsets", "sizes"):
        for value in sizes:
            yield lambda m, f=field, v=value: setattr(_entry(m).chunks[0], f, v)  # type: ignore[misc]
    for field in ("state_dict_metadata", "storage_data", "planner_data"):
        for value in HOSTILE_VALUES:
            yield lambda m, f=field, v=value: setattr(m, f, v)  # type: ignore[misc]
    yield lambda m: _entry(m).chunks.append(_entry(m).chunks[0])


def _entry(metadata: Metadata) -> Any:
    return metadata.state_dict_metadata["model.body.weight"]
