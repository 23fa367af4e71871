"""Files of torch.save and indexed files: as torch reads them, or refused; nothing run, no bombs."""

from __future__ import annotations

import argparse
import codecs
import collections
import gc
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
    load_torch,
    of_bytes,
    pickled,
    resident_bytes,
    same,
)
from polyak._lazy import spec_of
from polyak.checkpoints import read
from polyak.checkpoints._indexed import IndexedTensors
from polyak.checkpoints._open.files import OpenFile
from polyak.checkpoints._torch_save.files import StoredTensors, load
from polyak.checkpoints._torch_save.pickles import Aside, name_of
from quick import slow_if

in_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
LAYOUTS = [True, False]  # the zip archive, and what came before it
layouts = pytest.mark.parametrize("archived", LAYOUTS, ids=["archive", "pickles"])


def index_of(path: Path) -> IndexedTensors:
    return IndexedTensors(OpenFile(path))


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
    found = load_torch(path)
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
    found = load_torch(path)
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
    assert alike(load_torch(path), wanted)


def test_objects_beside_weights_are_left_unread(tmp_path: Path) -> None:
    path = tmp_path / "it.pt"
    options = argparse.Namespace(rate=0.1)
    save(
        {"args": options, "losses": numpy.ones(3), "w": torch.ones(2), "kind": numpy.ndarray}, path
    )
    found = load_torch(path)
    assert torch.equal(found["w"], torch.ones(2))
    assert isinstance(found["args"], Aside) and isinstance(found["losses"], Aside)
    assert load(OpenFile(path).whole).aside == {"argparse.Namespace": 1, "numpy.ndarray": 2}


def test_views_of_any_layout(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    complexes = of_bytes(torch.complex64, (3,)).nan_to_num()
    value = [base.T, base[1:3, ::2], base[0, 0], base.expand(3, 4, 6), complexes.conj()]
    value += [complexes.clone().conj().imag, torch.ones(1).expand(1000), torch.empty(0, 5)]
    path = tmp_path / "it.pt"
    save(value, path)
    for got, wanted in zip(load_torch(path), value, strict=True):
        assert torch.equal(got, wanted)
        assert got.stride() == wanted.stride() or wanted.numel() == 0
        assert got.is_conj() == wanted.is_conj()


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
    found = load_torch(path)
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
    assert load_torch(path)["w"].tolist() == [1.0, 2.0]


@layouts
def test_released_pages_leave_memory_and_come_back(tmp_path: Path, archived: bool) -> None:
    held = of_bytes(torch.float32, (1 << 24,))
    path = tmp_path / "it.pt"
    save({"w": held}, path, archived)
    start = resident_bytes()
    tensors = StoredTensors(load(OpenFile(path).whole).value)  # type: ignore[arg-type]
    found = tensors["w"]
    assert resident_bytes() - start < 8 << 20, "the file was read, but its pages are not kept"
    assert same(found, held)
    assert resident_bytes() - start > 60 << 20
    tensors.release("w")
    assert resident_bytes() - start < 8 << 20
    assert same(found, held)


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@layouts
def test_a_file_is_closed_when_nothing_refers_to_it(tmp_path: Path, archived: bool) -> None:
    """At once, and not when garbage is collected."""
    path = tmp_path / "it.pt"
    save({"model": {"w": torch.ones(2)}, "n": Custom()}, path, archived)
    before = open_files()
    gc.disable()
    try:
        found = read(path)
        assert open_files() == before + 1
        del found
        assert open_files() == before
    finally:
        gc.enable()


def test_files_without_checksums(tmp_path: Path) -> None:
    """They are read, and a flipped bit of a tensor is what the file says."""
    path = tmp_path / "it.pt"
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        save({"w": torch.zeros(64)}, path)
    finally:
        torch.serialization.set_crc32_options(before)
    assert load_torch(path)["w"].eq(0).all()


REMEDY = re.compile(
    "(copy|fetch|save|load|unpack) (or fetch )?(it|the (file|archive|weights))|another copy of the file"
)
SAVED = {"w": of_bytes(torch.bfloat16, (9, 3)), "step": 7, "b": [of_bytes(torch.int64, (5,), 1)]}


@in_folder
@given(data=st.data())
def test_a_flipped_bit_of_an_archive_is_refused_or_of_no_use(
    tmp_path: Path, data: st.DataObject
) -> None:
    path = tmp_path / "it.pt"
    save(SAVED, path)
    whole = path.read_bytes()
    path.write_bytes(flipped(whole, at := data.draw(st.integers(0, 8 * len(whole) - 1))))
    try:
        found = load_torch(path)
    except ValueError as error:
        assert str(path) in str(error)
        assert at < 32 or REMEDY.search(str(error))
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
            with pytest.raises(ValueError, match="is damaged: its checksum is"):
                load_torch(path)


@layouts
def test_a_file_cut_short_anywhere_is_refused(tmp_path: Path, archived: bool) -> None:
    path = tmp_path / "it.pt"
    save({"w": torch.arange(8.0)}, path, archived)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=re.escape(str(path))) as refused:
            load_torch(path)
        if archived and length >= 4:
            assert "a damaged file of torch.save" in str(refused.value)
        assert length < 4 or REMEDY.search(str(refused.value))


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
    "sparse": (lambda: torch.eye(2).to_sparse(), "w is a sparse tensor: save it dense"),
    "sparse rows": (sparse_rows, "w is a sparse tensor: save it dense"),
    "quantized": (quantized, "w is a quantized tensor: dequantise it"),
    "nested": (nested, "w is a nested tensor: save its parts"),
    "meta": (
        lambda: torch.zeros(2, device="meta"),
        "w is a tensor without content: its model was on the meta device",
    ),
    "a class": (
        lambda: torch.zeros(2).as_subclass(Subclass),
        r"w is test_loading\.Subclass: .* save the model's state_dict",
    ),
    "a module": (
        lambda: nn.Linear(1, 1),
        r"w is torch\.nn\.modules\.linear\.Linear: .* save the model's state_dict",
    ),
}


@pytest.mark.parametrize("beside", [{}, {"v": torch.ones(1)}], ids=["alone", "beside others"])
@pytest.mark.parametrize("key", ["", "model"])
@pytest.mark.parametrize(("make", "message"), STRANGE.values(), ids=STRANGE.keys())
def test_weights_that_only_code_could_make_are_refused_by_name(
    tmp_path: Path, make: Callable[[], object], message: str, key: str, beside: dict[str, Tensor]
) -> None:
    path = tmp_path / "it.pt"
    state = {"w": make(), **beside}
    save({key: state, "step": 3} if key else state, path)
    with pytest.raises(ValueError, match=message) as caught:
        read(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("make", [make for make, _ in STRANGE.values()], ids=STRANGE.keys())
def test_tensors_beside_the_weights_may_be_of_any_kind(
    tmp_path: Path, make: Callable[[], object]
) -> None:
    path = tmp_path / "it.pt"
    save({"model": {"v": torch.ones(1)}, "other": [0, {"w": make()}]}, path)
    found = read(path)
    assert found.live is not None and torch.equal(found.live["v"], torch.ones(1))
    assert sum(found.aside.values()) == 1
    assert [name for name in found.left if name.startswith("other.1.w (a ")]


NO_WEIGHTS: dict[str, tuple[Callable[[], Any], str]] = {
    "sparse in a tuple": (lambda: (torch.eye(2).to_sparse(),), "graph.adj.0 (a sparse tensor)"),
    "sparse in a list": (lambda: [torch.eye(2).to_sparse()], "graph.adj.0 (a sparse tensor)"),
    "nested": (lambda: (STRANGE["nested"][0](),), "graph.adj.0 (a nested tensor)"),
}


@pytest.mark.parametrize("key", ["", "model"])
@pytest.mark.parametrize(("make", "place"), NO_WEIGHTS.values(), ids=NO_WEIGHTS.keys())
def test_what_torch_packs_no_weights_in_is_listed_beside_them(
    tmp_path: Path, make: Callable[[], Any], place: str, key: str
) -> None:
    path = tmp_path / "it.pt"
    state = {"a.w": torch.ones(1), "graph.adj": make()}
    save({key: state, "step": 3} if key else state, path)
    found = read(path)
    assert list(found.live or {}) == ["a.w"]
    assert list(found.left) == [f"{key}.{place}" if key else place]
    save(state | {"b.w": torch.eye(2).to_sparse()}, path)  # in a weight's place it is one
    with pytest.raises(ValueError, match=r"b\.w is a sparse tensor: save it dense"):
        read(path)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.out = nn.LSTM(4, 2), nn.Linear(2, 1)


@pytest.mark.parametrize("key", ["", "model"])
@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2)), r"0\._packed_params\._packed_params is a quantized tensor: dequantise it"),
        (Recurrent(), r"rnn\._all_weight_values\.0\.param is torch\.ScriptObject: "),
    ],
    ids=["linear", "recurrent"],
)  # fmt: skip
def test_weights_that_torch_packed_among_others_are_refused_by_name(
    tmp_path: Path, model: nn.Module, message: str, key: str
) -> None:
    """Dynamic quantisation keeps a layer's weights in a tuple, beside its scale and other layers' weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        packed = torch.ao.quantization.quantize_dynamic(model, {nn.LSTM, nn.Linear}).state_dict()
        torch.save({key: packed, "step": 3} if key else packed, tmp_path / "it.pt")
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "it.pt")


class Custom:
    """What a training script would save beside its weights."""


MARKER = "marker-of-code-that-ran"
PAYLOADS: dict[str, tuple[bytes, str]] = {
    "os.system": (pickled(Calls(os.system, f"touch {MARKER}")), "posix.system"),
    "eval": (pickled(Calls(eval, f"open({MARKER!r}, 'w')"), protocol=4), "builtins.eval"),
    "a class": (pickled(Custom()), "test_loading.Custom"),
    "a name only": (pickled(Custom), "test_loading.Custom"),
    "a module": (pickled(nn.Linear(1, 1), protocol=2), "torch.nn.modules.linear.Linear"),
    "an attribute of what is known": (b"\x80\x02ctorch\nSize.__subclasses__\n.", "torch.Size.__subclasses__"),
    "numpy's generators": (pickled(numpy.random.default_rng(0)), "numpy.random._pickle.__generator_ctor"),
    "a submodule": (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "os.system"),
    "Python 2's modules": (b"\x80\x02c__builtin__\neval\nX\x01\0\0\x001\x85R.", "builtins.eval"),
    "a method, called": (pickled(Calls(getattr, Custom, "run")), "test_loading.Custom"),
    "a new object with names": (b"\x80\x04cos\nsystem\n)}\x92.", "os.system"),
    "state that is set": (b"\x80\x02cos\nsystem\n)\x81}X\x01\0\0\0aK\x01sb.", "os.system"),
}  # fmt: skip


def written(path: Path, payload: bytes, archived: bool) -> None:
    """A file of torch.save whose value is this pickle's."""
    if archived:
        path.write_bytes(archive({"data.pkl": payload}))
        return
    save({}, path, archived=False)
    whole = path.read_bytes()
    place = whole.rindex(b"\x80\x02}q\0.")
    path.write_bytes(whole[:place] + payload + whole[place + 6 :])


@pytest.mark.parametrize(("payload", "name"), PAYLOADS.values(), ids=PAYLOADS.keys())
@layouts
def test_code_is_named_and_never_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, payload: bytes, name: str, archived: bool
) -> None:
    """It stands for an object of that name; as all that a file holds it is refused."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "it.pt"
    written(path, payload, archived)
    assert name_of(load_torch(path)) == name
    assert load(OpenFile(path).whole).aside == {name: 1}
    with pytest.raises(ValueError, match=re.escape(f"{path} holds a {name}, wanted a dictionary")):
        read(path)
    assert not (tmp_path / MARKER).exists()
    path.write_bytes(payload)
    with pytest.raises(ValueError, match=r"a pickle that torch\.save did not write|neither a file"):
        read(path)


@layouts
def test_code_that_is_thrown_away_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, archived: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    program = b"\x80\x02cos\nsystem\n(X\x1d\0\0\0touch marker-of-code-that-rantR0}."
    written(tmp_path / "it.pt", program, archived)
    assert load_torch(tmp_path / "it.pt") == {}
    assert not (tmp_path / MARKER).exists()


STORAGE = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x02tQ"
POISONS = {
    "a class of ours": b"ccollections\nOrderedDict\n",
    "a value of ours": b"ctorch\nfloat32\n",
    "a class that is unknown": b"cos\nsystem\n",
    "a storage's class": b"ctorch\nFloatStorage\n",
    "a class of numpy": b"cnumpy\ndtype\n",
    "a function that all files share": b"cbuiltins\ncomplex\n",
    "a function of ours": b"ctorch._utils\n_rebuild_tensor_v2\n",
    "a storage": STORAGE,
    "a tensor": b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + b"K\0K\x02\x85K\x01\x85\x89NtR",
    "a set": b"\x8f",
    "a size": b"ctorch\nSize\n(K\x02K\x03t\x85R",
    "a device": b"ctorch\ndevice\nX\x03\0\0\0cpu\x85R",
    "a list": b"]",
    "a number": b"K\x07",
}


@pytest.mark.parametrize("target", POISONS.values(), ids=POISONS.keys())
@pytest.mark.parametrize("attribute", [b"__new__", b"_offset", b"key", b"_function"])
@pytest.mark.parametrize("slots", [False, True])
def test_no_state_is_set_on_what_files_share(
    tmp_path: Path, target: bytes, slots: bool, attribute: bytes
) -> None:
    """BUILD sets attributes: of a class of ours it would change what later files mean.

    Of a tensor it would change the place that was checked.
    """
    path = tmp_path / "it.pt"
    state = b"}X" + len(attribute).to_bytes(4, "little") + attribute + b"J\0\0\0\x40s"
    state = b"N" + state + b"\x86" if slots else state
    program = b"\x80\x04" + target + state + b"b."
    path.write_bytes(archive({"data.pkl": program, "data/0": bytes(8)}))
    with pytest.raises(ValueError, match=re.escape(str(path))):
        load_torch(path)
    save({"w": torch.ones(2), "d": OrderedDict(a=torch.float32), "n": numpy.float64(2)}, path)
    found = load_torch(path)
    assert found["d"] == {"a": torch.float32} and found["n"] == 2


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
    "a storage of 10^12": lambda: pickled(Calls(torch.UntypedStorage, 10**12)),
    "repeated lists": lambda: pickled(laughs()),
    "a deep key": deep_key,
    "a deep key of one": lambda: b"\x80\x02})" + b"\x85" * 1_000_000 + b"K\x01s.",
    "a deep member": lambda: b"\x80\x04\x8f(" + b")" + b"2\x86" * 60 + b"\x90.",
    "a deep frozen member": lambda: b"\x80\x04(" + b")" + b"2\x86" * 60 + b"\x91.",
    "a deep member of a set that is called": lambda: b"\x80\x02cbuiltins\nset\n](" + b")" + b"2\x86" * 60 + b"e\x85R.",
    "a deep key of pairs": lambda: b"\x80\x02ccollections\nOrderedDict\n](" + b")" + b"2\x86" * 60 + b"K\x01\x86e\x85R.",
    "a loop": lambda: pickled(loop()),
    "a deep list": lambda: b"\x80\x02" + b"]" * 300_000 + b"a" * 299_999 + b".",
    "a deep tuple": lambda: b"\x80\x02)" + b"\x85" * 1_000_000 + b".",
    "a deep call": lambda: b"\x80\x02" + b"ctorch\nSize\n" * 9999 + b")" + b"R\x85" * 9999 + b".",
    "bytes copied": lambda: pickled(copies(bytearray, b"x" * 1_000_000)),
    "dictionaries copied": lambda: pickled(copies(OrderedDict, dict.fromkeys(range(100_000)))),
    "sets copied": lambda: pickled(copies(set, list(range(100_000)))),
    "text encoded": lambda: pickled([Calls(codecs.encode, "x" * 1_000_000, "latin1")] * 1 + [Calls(codecs.encode, LONG, "latin1") for _ in range(3000)]),
    "a far place in memory": lambda: b"\x80\x02Kr" + b"r\xff\xff\xff\x7f.",
    "a place not so far": lambda: b"\x80\x02K\x01" + b"r\xff\xff\xff\x07.",
    "a far place in text": lambda: b"\x80\x02K\x01p4294967295\n.",
    "text of 2^60": lambda: b"\x80\x04\x8d" + (1 << 60).to_bytes(8, "little") + b"x.",
    "bytes of 2^60": lambda: b"\x80\x04\x8e" + (1 << 60).to_bytes(8, "little") + b"x.",
    "an array of 2^40": lambda: b"\x80\x05\x96" + (1 << 40).to_bytes(8, "little") + b"x.",
    "a number of 2^30 bytes": lambda: b"\x80\x02\x8b" + (1 << 30).to_bytes(4, "little") + b"x.",
    "names without end": lambda: b"\x80\x02" + b"".join(b"ca\n%d\n0" % i for i in range(200_000)) + b"N.",
    "marks": lambda: b"\x80\x02" + b"(" * 1_000_000 + b".",
    "no end": lambda: b"\x80\x02}",
    "nothing": lambda: b"",
    "an empty stack": lambda: b"\x80\x020000.",
    "an unknown instruction": lambda: b"\x80\x02\x82\x01.",
    "an instance of protocol 0": lambda: b"(ios\nsystem\n.",
    "an object of protocol 1": lambda: b"\x80\x02(cos\nsystem\no.",
}  # fmt: skip
HARMLESS: dict[str, Callable[[], bytes]] = {
    "a tensor of 10^12": lambda: pickled(Calls(torch.FloatTensor, 10**12)),
    "a list of 10^12": lambda: pickled(Calls(list, 10**12)),
    "a range of 10^12": lambda: pickled(Calls(range, 10**12)),
    "a string of 10^12": lambda: pickled(Calls(str.__mul__, "x", 10**12)),
    "a frame that is wrong": lambda: b"\x80\x04\x95" + (1 << 60).to_bytes(8, "little") + b"}.",
    "something left on the stack": lambda: b"\x80\x02}}.",
    "unhashed tuples": lambda: b"\x80\x02)" + b"2\x86" * 12 + b".",
}
LONG = "x" * 1_000_000


LARGE = ("dictionaries copied",)  # "sets copied" is as large


@pytest.mark.parametrize(
    "bomb", [slow_if(made, name in LARGE) for name, made in BOMBS.items()], ids=BOMBS.keys()
)
def test_bombs_are_refused_without_their_memory_or_work(
    tmp_path: Path, bomb: Callable[[], bytes]
) -> None:
    path = tmp_path / "it.pt"
    path.write_bytes(archive({"data.pkl": bomb()}))
    start, began = resident_bytes(), time.process_time()
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        load_torch(path)
    assert "RecursionError" not in str(caught.value)
    assert resident_bytes() - start < 300 << 20
    assert time.process_time() - began < 20


@pytest.mark.parametrize("program", HARMLESS.values(), ids=HARMLESS.keys())
def test_what_is_not_made_takes_no_memory(tmp_path: Path, program: Callable[[], bytes]) -> None:
    path = tmp_path / "it.pt"
    path.write_bytes(archive({"data.pkl": program()}))
    start = resident_bytes()
    load_torch(path)
    assert resident_bytes() - start < 50 << 20


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
        load_torch(path)
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
    with pytest.raises(ValueError, match=r"tensor|storage"):
        load(OpenFile(path).whole)  # before anything asks for the tensor
    assert resident_bytes() - start < 50 << 20
    path.write_bytes(claimed(torch.FloatStorage, 12, 0, (3, 4), (4, 1), TWELVE))
    assert torch.equal(load_torch(path)["w"], torch.arange(12.0).reshape(3, 4))


def test_a_flag_that_torch_never_gives_a_dtype_is_refused_by_the_name_of_the_file(
    tmp_path: Path,
) -> None:
    """Such as a negative view of booleans, on which torch has no operation."""
    torch.save({"w": torch.ones(3).to(torch.complex64).conj().imag}, tmp_path / "float.pt")
    whole = (tmp_path / "float.pt").read_bytes()
    assert load_torch(tmp_path / "float.pt")["w"].tolist() == [-0.0] * 3
    parts = zipfile.ZipFile(io.BytesIO(whole))
    data = {name.partition("/")[2]: parts.read(name) for name in parts.namelist()}
    data["data.pkl"] = data["data.pkl"].replace(b"FloatStorage", b"BoolStorage")
    data["data/0"] = data["data/0"][:6]
    (tmp_path / "it.pt").write_bytes(archive(data))
    with pytest.raises(ValueError, match=r"it\.pt: .*bool with the flags"):
        read(tmp_path / "it.pt")


def test_weights_that_are_tied_many_times_are_no_bomb(tmp_path: Path) -> None:
    path = tmp_path / "it.pt"
    weight = torch.randn(1000, 1000)
    save({f"layers.{i}.weight": weight for i in range(48)}, path)
    assert len(load_torch(path)) == 48


def script(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(nn.Linear(1, 1)), path)


def test_other_archives_are_refused_in_words(tmp_path: Path) -> None:
    path = tmp_path / "it.pt"
    script(path)
    with pytest.raises(ValueError, match="a TorchScript archive, which is code"):
        load_torch(path)
    cases: dict[bytes, str] = {
        archive({"a.txt": b"text"}): r"a zip archive without data\.pkl",
        archive({"data.pkl": pickled({}), "byteorder": b"big"}): "the other byte order",
        packed({"archive/data.pkl": pickled({})}): r"the record 'data\.pkl' is packed",
        twice(): r"two records are named 'data\.pkl'",
        b"text": "it is not a file of torch.save",
        pickle.dumps(3, 2): "a pickle that torch.save did not write",
    }
    for data, message in cases.items():
        path.write_bytes(data)
        with pytest.raises(ValueError, match=message):
            load_torch(path)


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
        load_torch(pipe)
    with pytest.raises(IsADirectoryError, match=re.escape(str(tmp_path))):
        load_torch(tmp_path)
    with pytest.raises(FileNotFoundError, match="missing"):
        load_torch(tmp_path / "missing")


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
    found = index_of(sharded / f"{kind}.index.json")
    wanted = {"a": torch.arange(3.0), "b": torch.ones(2).half(), "c": torch.zeros(1)}
    assert found.specs == {name: spec_of(tensor) for name, tensor in wanted.items()}
    assert alike(dict(found), wanted)
    found.release("a")
    assert torch.equal(found["a"], wanted["a"])
    with pytest.raises(KeyError):
        found["d"]


def test_a_file_is_opened_when_it_is_needed(sharded: Path) -> None:
    (sharded / "model-2.safetensors").write_bytes(b"no tensors")
    found = index_of(sharded / "safetensors.index.json")
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
    assert index_of(snapshot / "safetensors.index.json")["c"].tolist() == [0]


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
            index_of(index)
    index.write_text(json.dumps({"weight_map": {"a": "missing.safetensors"}}))
    with pytest.raises(FileNotFoundError, match=r"index\.json: the file missing\.safetensors is"):
        index_of(index)


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
        index_of(index)


def test_an_index_is_held_to_what_it_says(sharded: Path) -> None:
    index = sharded / "safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"z": "model-1.safetensors"}}))
    with pytest.raises(
        ValueError, match=r"it says that z is in model-1\.safetensors, which has no"
    ):
        index_of(index)["z"]
    torch.save([torch.zeros(1)], sharded / "model-1.bin")
    with pytest.raises(ValueError, match=r"model-1\.bin: wanted a dictionary name -> tensor"):
        index_of(sharded / "bin.index.json")["a"]
    os.truncate(index, 0)
    os.truncate(index, 100_000_001)
    with pytest.raises(ValueError, match="an index of more than 100000000 bytes"):
        index_of(index)
