"""Files of torch.save and indexed files: as torch reads them, or refused; nothing run, no bombs."""

from __future__ import annotations

import argparse
import collections
import io
import json
import os
import pickle
import re
import time
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from corrupting import (
    DTYPES,
    Calls,
    Stored,
    archive,
    claimed,
    flipped,
    of_bytes,
    pickled,
    resident_bytes,
    same,
)
from polyak.checkpoints._loading import IndexedTensors, load_pickle, release
from polyak.checkpoints._mapped import place
from polyak.checkpoints._tensorfile import form
from polyak.checkpoints._torchtensors import Unread

in_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
LAYOUTS = [True, False]  # the zip archive, and what came before it
layouts = pytest.mark.parametrize("archived", LAYOUTS, ids=["archive", "pickles"])


def save(value: object, path: Path, archived: bool = True, **options: Any) -> None:
    torch.save(value, path, _use_new_zipfile_serialization=archived, **options)


def alike(got: object, wanted: object) -> bool:
    """Whether two structures agree to the last bit; ordered dictionaries are dictionaries."""
    if isinstance(wanted, Tensor):
        return type(got) is Tensor and same(got, wanted.detach())
    if isinstance(wanted, dict):
        assert isinstance(got, dict)
        keys = [*got] == [*wanted]
        return keys and all(alike(got[name], wanted[name]) for name in wanted)
    if isinstance(wanted, (list, tuple)):
        assert isinstance(got, (list, tuple))
        kinds = isinstance(got, tuple) == isinstance(wanted, tuple)
        return kinds and len(got) == len(wanted) and all(map(alike, got, wanted))
    if isinstance(wanted, set):
        return got == wanted
    return type(got) is type(wanted) and repr(got) == repr(wanted)


tensors = st.builds(
    of_bytes,
    st.sampled_from([*DTYPES, torch.complex128]),
    st.lists(st.integers(0, 3), max_size=3).map(tuple),
    st.integers(0, 99),
)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(),
    st.binary(),
    st.complex_numbers(),
)
keys = st.one_of(st.text(), st.integers(), st.booleans(), st.tuples(st.text(), st.integers()))
structures = st.recursive(
    st.one_of(scalars, tensors, st.sampled_from(DTYPES)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner, inner),
        st.dictionaries(keys, inner, max_size=3),
        st.dictionaries(st.text(), inner, max_size=3).map(OrderedDict),
        st.frozensets(st.integers(), max_size=3).map(set),
    ),
    max_leaves=8,
)


@in_folder
@given(value=structures, archived=st.booleans(), protocol=st.integers(2, 5))
def test_what_torch_saves_is_read(
    tmp_path: Path, value: object, archived: bool, protocol: int
) -> None:
    path = tmp_path / "it.pt"
    save(value, path, archived, pickle_protocol=protocol)
    found = load_pickle(path)
    assert alike(found, value)
    if archived and protocol == 2:  # what torch's own careful reader knows in full
        with suppress(pickle.UnpicklingError):  # bytes that are empty, for one
            assert alike(found, torch.load(path, weights_only=True))


class Model(nn.Module):
    """A model with what state dicts have: tied weights, buffers, attributes, half precision."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.tied = nn.Linear(3, 3)
        self.tied.weight = self.first.weight
        self.low = nn.Parameter(torch.randn(2).half())
        self.register_buffer("positions", torch.arange(4).expand(1, 4))


@layouts
def test_a_training_state_is_read_as_torch_reads_it(tmp_path: Path, archived: bool) -> None:
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 5])
    model.norm(model.first(torch.randn(4, 3))).sum().backward()
    optimizer.step()
    setattr(model.first.weight, "note", "an attribute")  # noqa: B010
    state = {
        "model": model.state_dict(),
        "parameters": list(model.parameters()),
        "optimizer": optimizer.state_dict(),
        "schedule": {**schedule.state_dict(), "milestones": dict(schedule.milestones)},
        "random": torch.get_rng_state(),
        "shape": model.low.shape,
        "device": torch.device("cuda:3"),
        "bytes": bytearray(b"\0\xff"),
        "deep": [[[[[[[[[[(1,)]]]]]]]]]],
    }
    path = tmp_path / "it.pt"
    save(state, path, archived)
    found = load_pickle(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of typed storages in the old layout
        assert alike(found, torch.load(path, weights_only=True))
    held = found["model"]
    assert held["first.weight"].data_ptr() == held["tied.weight"].data_ptr()
    assert found["schedule"]["milestones"] == {3: 1, 5: 1}


def test_counters_and_numpy_numbers_are_plain(tmp_path: Path) -> None:
    path = tmp_path / "it.pt"
    value = {"counter": collections.Counter("aab"), "best": numpy.float64(0.1)}
    value |= {"step": numpy.int32(-3), "done": numpy.bool_(True), "half": numpy.float16(0.5)}
    save(value, path)
    wanted = {"counter": {"a": 2, "b": 1}, "best": 0.1, "step": -3, "done": True, "half": 0.5}
    assert alike(load_pickle(path), wanted)


def test_objects_beside_weights_are_left_unread(tmp_path: Path) -> None:
    path = tmp_path / "it.pt"
    options = argparse.Namespace(rate=0.1)
    save(
        {"args": options, "losses": numpy.ones(3), "w": torch.ones(2), "kind": numpy.ndarray}, path
    )
    found = load_pickle(path)
    assert torch.equal(found["w"], torch.ones(2))
    assert [type(found[name]) for name in ("args", "losses", "kind")] == [Unread] * 3
    assert found["args"].name == "argparse.Namespace"


def test_views_of_any_layout(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    complexes = of_bytes(torch.complex64, (3,)).nan_to_num()
    value = [base.T, base[1:3, ::2], base[0, 0], base.expand(3, 4, 6), complexes.conj()]
    value += [complexes.clone().conj().imag, torch.ones(1).expand(1000), torch.empty(0, 5)]
    path = tmp_path / "it.pt"
    save(value, path)
    for got, wanted in zip(load_pickle(path), value, strict=True):
        assert torch.equal(got, wanted)
        assert got.stride() == wanted.stride() or wanted.numel() == 0
        assert got.is_conj() == wanted.is_conj()


def test_only_views_that_lie_as_they_read_have_a_place_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "it.pt"
    plain = torch.randn(3, dtype=torch.complex64)
    save([plain, plain.conj(), plain.clone().conj().imag.clone(), torch.zeros(2, 3).T], path)
    found = load_pickle(path)
    negative = torch._neg_view(found[2])
    held = [place(tensor) is not None for tensor in (*found, negative, plain)]
    assert held == [True, False, True, False, False, False]


def test_a_checkpoint_of_lightning(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self, width: int = 3) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.layer = nn.Linear(width, 1)

        def training_step(self, batch: Tensor) -> Tensor:
            loss: Tensor = self.layer(batch).sum()
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters())

    module = Module()
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(
        max_steps=2, default_root_dir=tmp_path, enable_model_summary=False, **options
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, DataLoader(torch.randn(4, 3), batch_size=2))  # type: ignore[arg-type]
    path = tmp_path / "it.ckpt"
    trainer.save_checkpoint(path)
    found = load_pickle(path)
    assert found["global_step"] == 2
    assert alike(found["state_dict"], dict(module.state_dict()))
    assert found["optimizer_states"][0]["state"][0]["step"] == 2


def test_pickles_of_python_2(tmp_path: Path) -> None:
    """Strings of bytes, and ordered dictionaries made from pairs."""
    plain = pickled(OrderedDict(w=Stored(torch.FloatStorage, "0", 2)))
    storage = plain[plain.index(b"(X\x07") : plain.index(b"Q") + 1]
    tensor = b"ctorch._utils\n_rebuild_tensor\n(" + storage + b"K\0K\x02\x85K\x01\x85tR"
    text = b"\x80\x02ccollections\nOrderedDict\n]]U\x01w" + b"(" * 0 + tensor + b"\x86a\x85R."
    text = text.replace(b"]]U", b"](U").replace(b"\x86a\x85R.", b"ta\x85R.")
    path = tmp_path / "it.pt"
    path.write_bytes(
        archive({"data.pkl": text, "data/0": torch.tensor([1.0, 2.0]).numpy().tobytes()})
    )
    assert load_pickle(path)["w"].tolist() == [1.0, 2.0]


@layouts
def test_released_pages_leave_memory_and_come_back(tmp_path: Path, archived: bool) -> None:
    held = of_bytes(torch.float32, (1 << 24,))
    path = tmp_path / "it.pt"
    save({"w": held}, path, archived)
    start = resident_bytes()
    found = load_pickle(path)["w"]
    assert resident_bytes() - start < 8 << 20, "the file was read, but its pages are not kept"
    assert same(found, held)
    assert resident_bytes() - start > 60 << 20
    release(found[1000:].view(torch.int32))
    assert resident_bytes() - start < 8 << 20
    assert same(found, held)


def test_files_without_checksums(tmp_path: Path) -> None:
    """They are read, and a flipped bit of a tensor is what the file says."""
    path = tmp_path / "it.pt"
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        save({"w": torch.zeros(64)}, path)
    finally:
        torch.serialization.set_crc32_options(before)
    assert load_pickle(path)["w"].eq(0).all()


SAVED = {"w": of_bytes(torch.bfloat16, (9, 3)), "step": 7, "b": [of_bytes(torch.int64, (5,), 1)]}


@in_folder
@given(data=st.data())
def test_a_flipped_bit_of_an_archive_is_refused_or_of_no_use(
    tmp_path: Path, data: st.DataObject
) -> None:
    path = tmp_path / "it.pt"
    save(SAVED, path)
    whole = path.read_bytes()
    path.write_bytes(flipped(whole, data.draw(st.integers(0, 8 * len(whole) - 1))))
    try:
        found = load_pickle(path)
    except ValueError as error:
        assert str(path) in str(error)
    else:
        assert alike(found, SAVED)


def test_every_flipped_bit_of_content_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "it.pt"
    save(SAVED, path)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as opened:
        contents = [opened.read(name) for name in opened.namelist() if "/data" in name]
    for content in filter(None, contents):
        start = whole.index(content)
        for at in range(start, start + len(content)):
            path.write_bytes(flipped(whole, 8 * at + at % 8))
            with pytest.raises(ValueError, match="is damaged: its checksum is another"):
                load_pickle(path)


@layouts
def test_a_file_cut_short_anywhere_is_refused(tmp_path: Path, archived: bool) -> None:
    path = tmp_path / "it.pt"
    save({"w": torch.arange(8.0)}, path, archived)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=re.escape(str(path))):
            load_pickle(path)


class Subclass(Tensor):
    """A tensor of another class."""


def sparse_rows() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.eye(2).to_sparse_csr()


def quantized() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.zeros(2), 1.0, 0, torch.qint8)


def nested() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([torch.zeros(1), torch.zeros(2)])


STRANGE: dict[str, tuple[Callable[[], object], str]] = {
    "sparse": (lambda: torch.eye(2).to_sparse(), r"model\.1\.w is a sparse tensor, wanted a plain"),
    "sparse rows": (sparse_rows, r"model\.1\.w is a sparse tensor"),
    "quantized": (quantized, r"model\.1\.w is a quantized tensor"),
    "nested": (nested, r"model\.1\.w is a nested tensor"),
    "meta": (lambda: torch.zeros(2, device="meta"), r"model\.1\.w is a tensor without content"),
    "a class": (lambda: torch.zeros(2).as_subclass(Subclass), r"it asks for .*Subclass"),
    "a storage": (
        lambda: torch.zeros(2).untyped_storage(),
        r"model\.1\.w is a storage without its tensor",
    ),
}


@pytest.mark.parametrize(("make", "message"), STRANGE.values(), ids=STRANGE.keys())
def test_tensors_that_are_not_plain_are_refused_by_their_place(
    tmp_path: Path, make: Callable[[], object], message: str
) -> None:
    path = tmp_path / "it.pt"
    save({"model": [0, {"w": make()}]}, path)
    with pytest.raises(ValueError, match=message) as caught:
        load_pickle(path)
    assert str(path) in str(caught.value)


class Custom:
    """What a training script would save beside its weights."""


MARKER = "marker-of-code-that-ran"
PAYLOADS: dict[str, bytes] = {
    "os.system": pickled(Calls(os.system, f"touch {MARKER}")),
    "eval": pickled(Calls(eval, f"open({MARKER!r}, 'w')"), protocol=4),
    "exec, thrown away": b"\x80\x02cbuiltins\nexec\n(X\x06\0\0\0raise 1tR0}.",
    "a class": pickled(Custom()),
    "a name only": pickled(Custom),
    "a module": pickled(nn.Linear(1, 1), protocol=2),
    "an attribute of what is known": pickled({})[:2] + b"ctorch\nSize.__subclasses__\n.",
    "numpy's generators": pickled(numpy.random.default_rng(0)),
    "a submodule": b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
    "Python 2's modules": b"\x80\x02c__builtin__\neval\nX\x01\0\0\x001\x85R.",
}


@pytest.mark.parametrize("payload", PAYLOADS.values(), ids=PAYLOADS.keys())
@layouts
def test_code_is_named_and_never_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, payload: bytes, archived: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "it.pt"
    if archived:
        path.write_bytes(archive({"data.pkl": payload}))
    else:
        save({}, path, archived=False)
        whole = path.read_bytes()
        place = whole.rindex(b"\x80\x02}q\0.")
        path.write_bytes(whole[:place] + payload + whole[place + 6 :])
    with pytest.raises(ValueError, match=r"it asks for .* polyak never runs code") as caught:
        load_pickle(path)
    assert str(path) in str(caught.value)
    assert not (tmp_path / MARKER).exists()
    with pytest.raises(ValueError, match=r"a pickle, but none|it asks for"):
        path.write_bytes(payload)
        load_pickle(path)


def test_the_class_that_is_asked_for_is_named(tmp_path: Path) -> None:
    path = tmp_path / "it.pt"
    save({"args": Custom()}, path)
    with pytest.raises(ValueError, match=r"test_loading\.Custom") as caught:
        load_pickle(path)
    assert "\n" not in str(caught.value)


def laughs() -> object:
    """Ten lists of ten of ten ...: short here, 10^12 values written out."""
    value: list[object] = []
    for _ in range(12):
        value = [value] * 10
    return value


def deep_key() -> bytes:
    """A key whose hash takes 2^60 steps: each tuple holds the one below twice."""
    return b"\x80\x02}" + b")" + b"2\x86" * 60 + b"K\x01s."


def loop() -> object:
    value: list[object] = []
    value.append(value)
    return value


def copies(function: Any, argument: object) -> object:
    """The same large thing, copied many times by calls of a function."""
    return [Calls(function, argument) for _ in range(3000)]


BOMBS: dict[str, Callable[[], bytes]] = {
    "a bytearray of 10^12": lambda: pickled(Calls(bytearray, 10**12)),
    "a tensor of 10^12": lambda: pickled(Calls(torch.FloatTensor, 10**12)),
    "a storage of 10^12": lambda: pickled(Calls(torch.UntypedStorage, 10**12)),
    "repeated lists": lambda: pickled(laughs()),
    "a deep key": deep_key,
    "a loop": lambda: pickled(loop()),
    "a deep list": lambda: b"\x80\x02" + b"]" * 300_000 + b"a" * 299_999 + b".",
    "a deep tuple": lambda: b"\x80\x02)" + b"\x85" * 1_000_000 + b".",
    "a deep call": lambda: b"\x80\x02" + b"ctorch\nSize\n" * 9999 + b")" + b"R\x85" * 9999 + b".",
    "bytes copied": lambda: pickled(copies(bytearray, b"x" * 1_000_000)),
    "dictionaries copied": lambda: pickled(copies(OrderedDict, dict.fromkeys(range(100_000)))),
    "text of 2^60": lambda: b"\x80\x04\x8d" + (1 << 60).to_bytes(8, "little") + b"x.",
    "bytes of 2^60": lambda: b"\x80\x04\x8e" + (1 << 60).to_bytes(8, "little") + b"x.",
    "a number of 2^30 bytes": lambda: b"\x80\x02\x8b" + (1 << 30).to_bytes(4, "little") + b"x.",
    "marks": lambda: b"\x80\x02" + b"(" * 1_000_000 + b".",
    "no end": lambda: b"\x80\x02}",
    "nothing": lambda: b"",
    "too much": lambda: b"\x80\x02}}.",
    "an empty stack": lambda: b"\x80\x020000.",
    "an unknown instruction": lambda: b"\x80\x02\x82\x01.",
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS.keys())
def test_bombs_are_refused_without_their_memory_or_time(
    tmp_path: Path, bomb: Callable[[], bytes]
) -> None:
    path = tmp_path / "it.pt"
    path.write_bytes(archive({"data.pkl": bomb()}))
    start, began = resident_bytes(), time.monotonic()
    with pytest.raises(ValueError, match=re.escape(str(path))):
        load_pickle(path)
    assert resident_bytes() - start < 300 << 20
    assert time.monotonic() - began < 20


OPCODES = [
    b"(", b"0", b"1", b"2", b")", b"]", b"}", b"\x8f", b"N", b"\x88", b"K\x03", b"J\xff\xff\xff\x7f",
    b"X\x01\0\0\0w", b"U\x01w", b"C\x01x", b"G" + bytes(8), b"\x8a\x09" + b"\xff" * 9, b"a", b"e", b"s",
    b"u", b"t", b"\x85", b"\x86", b"\x87", b"\x90", b"\x91", b"R", b"\x81", b"b", b"Q", b"q\x01", b"h\x01",
    b"\x94", b"ctorch\nSize\n", b"ccollections\nOrderedDict\n", b"ctorch\nFloatStorage\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch._utils\n_rebuild_parameter\n",
    b"ctorch._tensor\n_rebuild_from_type_v2\n", b"ctorch\nfloat32\n", b"c_codecs\nencode\n",
    b"cbuiltins\nset\n", b"cbuiltins\ncomplex\n", b"cbuiltins\nbytearray\n", b"cnumpy\ndtype\n",
    b"ctorch\ndevice\n", b"cnumpy._core.multiarray\nscalar\n", b"\x8c\x05torch\x8c\x04Size\x93",
    b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x0ctQ",
]  # fmt: skip


@settings(in_folder, max_examples=1000)
@given(program=st.lists(st.sampled_from(OPCODES), max_size=30).map(b"".join))
def test_any_program_means_something_or_is_refused(tmp_path: Path, program: bytes) -> None:
    path = tmp_path / "it.pt"
    path.unlink(missing_ok=True)
    path.write_bytes(archive({"data.pkl": b"\x80\x02" + program + b".", "data/0": TWELVE}))
    try:
        load_pickle(path)
    except ValueError as error:
        assert str(error).startswith(f"{path}: ")


TWELVE = torch.arange(12.0).numpy().tobytes()
LIES: dict[str, tuple[Any, int, int, Any, Any, bytes]] = {
    "expanded to 10^12": (torch.FloatStorage, 12, 0, (10**12,), (0,), TWELVE),
    "beyond its storage": (torch.FloatStorage, 12, 0, (13,), (1,), TWELVE),
    "an offset beyond": (torch.FloatStorage, 12, 12, (1,), (1,), TWELVE),
    "a negative offset": (torch.FloatStorage, 12, -1, (2,), (1,), TWELVE),
    "a negative stride": (torch.FloatStorage, 12, 11, (12,), (-1,), TWELVE),
    "a negative shape": (torch.FloatStorage, 12, 0, (-2, -2), (1, 1), TWELVE),
    "a large stride": (torch.FloatStorage, 12, 0, (2,), (1 << 62,), TWELVE),
    "a huge empty shape": (torch.FloatStorage, 12, 0, (0, 1 << 62), (1, 1), TWELVE),
    "fewer strides": (torch.FloatStorage, 12, 0, (3, 4), (1,), TWELVE),
    "a shape of floats": (torch.FloatStorage, 12, 0, (3.0, 4.0), (4, 1), TWELVE),
    "a shape of truths": (torch.FloatStorage, 12, 0, (True,), (1,), TWELVE),
    "a shape that is a number": (torch.FloatStorage, 12, 0, 12, 1, TWELVE),
    "a hundred dimensions": (torch.FloatStorage, 12, 0, (1,) * 100, (1,) * 100, TWELVE),
    "a storage of more": (torch.FloatStorage, 13, 0, (12,), (1,), TWELVE),
    "a storage of less": (torch.FloatStorage, 11, 0, (11,), (1,), TWELVE),
    "a storage of 2^70": (torch.FloatStorage, 1 << 70, 0, (12,), (1,), TWELVE),
    "a storage of -1": (torch.FloatStorage, -1, 0, (1,), (1,), TWELVE),
    "a storage of wider elements": (torch.DoubleStorage, 12, 0, (12,), (1,), TWELVE),
    "a storage of no type": (torch.Size, 12, 0, (12,), (1,), TWELVE),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
def test_a_tensor_lies_within_its_storage(
    tmp_path: Path, lie: tuple[Any, int, int, Any, Any, bytes]
) -> None:
    path = tmp_path / "it.pt"
    path.write_bytes(claimed(*lie))
    start = resident_bytes()
    with pytest.raises(ValueError, match=re.escape(str(path))):
        load_pickle(path)
    assert resident_bytes() - start < 50 << 20
    path.write_bytes(claimed(torch.FloatStorage, 12, 0, (3, 4), (4, 1), TWELVE))
    assert torch.equal(load_pickle(path)["w"], torch.arange(12.0).reshape(3, 4))


def test_weights_that_are_tied_many_times_are_no_bomb(tmp_path: Path) -> None:
    path = tmp_path / "it.pt"
    weight = torch.randn(1000, 1000)
    save({f"layers.{i}.weight": weight for i in range(48)}, path)
    assert len(load_pickle(path)) == 48


def script(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(nn.Linear(1, 1)), path)


def test_other_archives_are_refused_in_words(tmp_path: Path) -> None:
    path = tmp_path / "it.pt"
    script(path)
    with pytest.raises(ValueError, match="a TorchScript archive, which is code"):
        load_pickle(path)
    cases: dict[bytes, str] = {
        archive({"a.txt": b"text"}): r"an archive without data\.pkl",
        archive({"data.pkl": pickled({}), "byteorder": b"big"}): "the other byte order",
        packed({"archive/data.pkl": pickled({})}): r"the record 'data\.pkl' is packed",
        twice(): r"two records are named 'data\.pkl'",
        b"text": "no file of torch.save",
        pickle.dumps(3, 2): "a pickle, but none of torch.save",
    }
    for data, message in cases.items():
        path.write_bytes(data)
        with pytest.raises(ValueError, match=message):
            load_pickle(path)


def packed(records: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as opened:
        for name, data in records.items():
            opened.writestr(name, data)
    return file.getvalue()


def twice() -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(file, "w") as opened:
        warnings.simplefilter("ignore")
        opened.writestr("archive/data.pkl", pickled({"a": 1}))
        opened.writestr("archive/data.pkl", pickled({"a": 2}))
    return file.getvalue()


def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(ValueError, match="pipe is a pipe or a device"):
        load_pickle(pipe)
    with pytest.raises(IsADirectoryError, match=re.escape(str(tmp_path))):
        load_pickle(tmp_path)
    with pytest.raises(FileNotFoundError, match="missing"):
        load_pickle(tmp_path / "missing")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A folder with an index of safetensors, and one of files of torch.save."""
    parts = {"1": {"a": torch.arange(3.0), "b": torch.ones(2).half()}, "2": {"c": torch.zeros(1)}}
    for number, held in parts.items():
        save_file(held, tmp_path / f"model-{number}.safetensors")
        torch.save(held, tmp_path / f"model-{number}.bin")
    for kind in ("safetensors", "bin"):
        files = {name: f"model-{number}.{kind}" for number, held in parts.items() for name in held}
        index = {"metadata": {"total_size": 20}, "weight_map": files}
        (tmp_path / f"{kind}.index.json").write_text(json.dumps(index))
    return tmp_path


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_tensors_of_several_files(sharded: Path, kind: str) -> None:
    found = IndexedTensors(sharded / f"{kind}.index.json")
    wanted = {"a": torch.arange(3.0), "b": torch.ones(2).half(), "c": torch.zeros(1)}
    assert found.forms == {name: form(tensor) for name, tensor in wanted.items()}
    assert alike(dict(found), wanted)
    assert found.metadata == {"total_size": 20}
    found.release("a")
    assert torch.equal(found["a"], wanted["a"])
    with pytest.raises(KeyError):
        found["d"]


def test_a_file_is_opened_when_it_is_needed(sharded: Path) -> None:
    (sharded / "model-2.safetensors").write_bytes(b"no tensors")
    found = IndexedTensors(sharded / "safetensors.index.json")
    assert found["a"].tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match=r"model-2\.safetensors"):
        found["c"]


def test_the_cache_of_the_hub_is_links(sharded: Path, tmp_path: Path) -> None:
    """Its snapshots are folders of links to files named by their content."""
    hub = tmp_path / "models--it"
    snapshot = hub / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (hub / "blobs").mkdir()
    for number, file in enumerate(
        ("safetensors.index.json", *(f"model-{i}.safetensors" for i in "12"))
    ):
        (sharded / file).rename(hub / "blobs" / str(number))
        (snapshot / file).symlink_to(Path("../../blobs") / str(number))
    assert IndexedTensors(snapshot / "safetensors.index.json")["c"].tolist() == [0]


def test_an_index_leads_to_its_own_folder_only(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    folder = tmp_path / "folder"
    folder.mkdir()
    save_file({"a": torch.zeros(1)}, outside / "it.safetensors")
    (folder / "link.safetensors").symlink_to(outside / "it.safetensors")
    index = folder / "index.json"
    names = [
        "../outside/it.safetensors", str(outside / "it.safetensors"), "link.safetensors", "..", "",
        ".", "a/../link.safetensors", "\0", "it.safetensors\0",
    ]  # fmt: skip
    for name in names:
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(ValueError, match=r"index\.json: "):
            IndexedTensors(index)
    index.write_text(json.dumps({"weight_map": {"a": "missing.safetensors"}}))
    with pytest.raises(FileNotFoundError, match=r"index\.json: the file missing\.safetensors is"):
        IndexedTensors(index)


INDEXES = {
    "nothing": "",
    "text": "text",
    "no map": "{}",
    "an array": "[]",
    "a map that is none": '{"weight_map": 3}',
    "a file that is a number": '{"weight_map": {"a": 3}}',
    "a name twice": '{"weight_map": {"a": "x", "a": "y"}}',
    "deep": "[" * 1_000_000,
    "a long number": '{"weight_map": ' + "1" * 5000 + "}",
    "bytes": "\udcff",
}


@pytest.mark.parametrize("text", INDEXES.values(), ids=INDEXES.keys())
def test_damaged_indexes_are_refused(tmp_path: Path, text: str) -> None:
    index = tmp_path / "index.json"
    index.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=r"index\.json: "):
        IndexedTensors(index)


def test_an_index_is_held_to_what_it_says(sharded: Path) -> None:
    index = sharded / "safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"z": "model-1.safetensors"}}))
    with pytest.raises(
        ValueError, match=r"it says that z is in model-1\.safetensors, which has no"
    ):
        IndexedTensors(index)["z"]
    torch.save([torch.zeros(1)], sharded / "model-1.bin")
    with pytest.raises(ValueError, match=r"model-1\.bin: wanted a dictionary name -> tensor"):
        IndexedTensors(sharded / "bin.index.json")["a"]
    os.truncate(index, 0)
    os.truncate(index, 100_000_001)
    with pytest.raises(ValueError, match="an index of more than 100000000 bytes"):
        IndexedTensors(index)
