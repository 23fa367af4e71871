"""The meaning of the names in a pickle of torch.save: tensors on storages, and plain values.

The tables at the end are all that is known. A tensor's claim is checked when the pickle is read: the
tensor must lie within its storage, and all tensors together may not claim far more than the file holds,
as tensors of stride 0 could.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from math import prod
from reprlib import repr as repr_of  # a short text of any value, however deep
from typing import Any, TypeGuard

import torch

from polyak._lazy import TensorSpec
from polyak.checkpoints._torch_save.pickles import (
    LEAST_VALUES,
    Aside,
    Dictionary,
    Inert,
    Maker,
    Sealed,
    aside,
    key,
)
from polyak.checkpoints._torch_save.tensors import Storage, StoredTensor

_LEAST_ROOM = 1 << 20
_REPEATS = 64  # tied weights are claimed once for every name they have
_MOST = 1 << 60
_DIMENSIONS = 64


OF_DTYPE = "a tensor of the dtype "
"""The name of objects in place of tensors whose dtype is not known here."""


class Objects:
    """Makes the objects of one pickle of `size` bytes; `room` bytes hold all storages."""

    def __init__(self, size: int, room: int) -> None:
        self.size = size
        self._values = LEAST_VALUES + 8 * size
        self._room = _LEAST_ROOM + _REPEATS * room
        self.storages: dict[str, Storage] = {}

    def known(self) -> dict[str, object]:
        """Name -> its meaning. The mapping is not kept here: a cycle would hold the file until collected."""
        values: dict[str, Callable[..., object]] = {
            "torch._utils._rebuild_tensor": self._tensor,
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_tensor_v3": self._tensor_of_dtype,
            "torch._utils._rebuild_parameter": _parameter,
            "torch._utils._rebuild_parameter_with_state": _parameter,
            "torch._tensor._rebuild_from_type_v2": self._tensor_of_kind,
            "collections.OrderedDict": self._dictionary,
            "collections.Counter": self._dictionary,
            "collections.defaultdict": lambda _=None, *start: self._dictionary(*start),
            "builtins.set": lambda items=(): set(map(key, self._limited(items))),
            "builtins.frozenset": lambda items=(): frozenset(map(key, self._limited(items))),
            "builtins.bytearray": lambda content=b"", *_: bytearray(self._limited(content, bytes)),
            "_codecs.encode": self._encoded,
            "torch.Size": self._size,
        }
        return {**KNOWN, **_makers(values)}

    def storage(self, described: object) -> object:
        """The storage that a pickle describes."""
        match described:
            case ("storage", kind, str(name), str(), int(count), *views):
                if _is_aside(kind):
                    return kind()
                dtype = getattr(kind, "storage_dtype", None)
                if dtype is not None and not any(views) and 0 <= count < _MOST:
                    storage = Storage(name, count * dtype.itemsize, dtype)
                    known = self.storages.setdefault(name, storage)
                    if (known.nbytes, known.dtype) == (storage.nbytes, dtype):
                        return known
        raise ValueError("a storage is described in a way that torch.save never uses")

    def _limited(self, items: Any, *kinds: type) -> Any:
        """Items to be copied; all copies together may not be far larger than the pickle."""
        if not isinstance(items, kinds or (list, tuple)):
            raise ValueError(f"the pickle makes an object of a {type(items).__name__}")
        limited: Any = items
        self._values -= len(limited)
        if self._values < 0:
            raise ValueError("it repeats the same parts over and over")
        return limited

    def _dictionary(self, start: Any = ()) -> Dictionary:
        """From nothing, from pairs (Python 2) or from a dictionary; then items are set."""
        made = Dictionary()
        for name, value in self._limited(list(start.items()) if isinstance(start, dict) else start):
            made[name] = value
        return made

    def _encoded(self, text: Any, encoding: object) -> bytes:
        """(text, "latin1"), as protocol 2 writes bytes."""
        if encoding != "latin1":
            raise ValueError(f"bytes in the encoding {repr_of(encoding)}")
        return bytes(self._limited(text, str).encode("latin1"))

    def _size(self, numbers: Any) -> torch.Size:
        if not all(type(n) is int and 0 <= n < _MOST for n in self._limited(numbers)):
            raise ValueError(f"a size that is not made of integers: {repr_of(numbers)}")
        return torch.Size(numbers)

    def _tensor(
        self, storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any, dtype: Any = None
    ) -> object:
        """rest: [requires_grad, hooks[, flags]]"""
        if _is_aside(type(storage)):
            return aside("a tensor of an unknown kind", tensor=True)(storage)
        if _is_aside(dtype):
            return aside(OF_DTYPE + dtype.name, tensor=True)(storage)
        flags = (rest[2] if len(rest) > 2 else None) or {}
        if not isinstance(storage, Storage) or not isinstance(dtype, torch.dtype | None):
            raise ValueError("a tensor is described in a way that torch.save never uses")
        dtype = dtype or storage.dtype
        # Only complex tensors and their parts are ever conjugate or negative views.
        may = dtype.is_complex or (dtype.is_floating_point and dtype.itemsize > 1)
        known = {"conj", "neg"} if may else set()
        if not isinstance(flags, dict) or flags.keys() - known:
            raise ValueError(f"a tensor of {dtype} with the flags {repr_of(flags)}")
        holds = storage.nbytes // dtype.itemsize
        if not _within(holds, offset, shape, stride):
            raise ValueError(
                f"a tensor of shape {repr_of(shape)} with stride {repr_of(stride)} from "
                f"{repr_of(offset)} on lies outside its storage of {holds} elements"
            )
        spec = TensorSpec(tuple(shape), dtype)
        self._room -= spec.nbytes
        if self._room < 0:
            raise ValueError("the tensors claim far more than the file holds")
        return StoredTensor(spec, storage, offset, stride, flags)

    def _tensor_of_dtype(self, *arguments: Any) -> object:
        """(storage, offset, shape, stride, requires_grad, hooks, dtype[, flags])"""
        *first, dtype = arguments[:7]
        return self._tensor(*first, *arguments[7:], dtype=dtype)

    def _tensor_of_kind(self, function: Any, kind: Any, arguments: Any, *_: object) -> object:
        """(function, type, arguments, state); a tensor's attributes are left out."""
        if _is_aside(kind):
            return kind(function, arguments)
        if kind in _TENSORS.values() and str(getattr(function, "name", "")).startswith(_REBUILD):
            return function(*arguments)
        return aside("a tensor of an unknown kind", tensor=True)(function, arguments)


def _makers(functions: Mapping[str, Callable[..., object]]) -> dict[str, Maker]:
    return {name: Maker(name, function) for name, function in functions.items()}


def _is_aside(kind: object) -> TypeGuard[type[Aside]]:
    return isinstance(kind, type) and issubclass(kind, Aside)


def _within(holds: int, offset: Any, shape: Any, stride: Any) -> bool:
    """Whether a tensor of this layout lies within `holds` elements."""
    if type(shape) not in (tuple, torch.Size) or type(stride) is not tuple:
        return False
    numbers = (offset, *shape, *stride)
    if len(shape) != len(stride) or len(shape) > _DIMENSIONS:
        return False
    if not all(type(n) is int and 0 <= n < _MOST for n in numbers):
        return False
    if 0 in shape:
        return bool(prod(n for n in shape if n) < _MOST)
    last = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    return bool(last < holds)


def _parameter(data: Any, *_: object) -> object:
    """(data, requires_grad, hooks[, state]): a parameter's content, without the rest."""
    if not isinstance(data, (StoredTensor, Aside)):
        raise ValueError("a parameter without a tensor")
    return data


def _empty_bytes(*arguments: object) -> bytes:
    """bytes(), as protocol 2 writes them when there are none."""
    if arguments:
        raise ValueError("bytes that are made by a call")
    return b""


def _object_of(kind: Any, *arguments: Any) -> object:
    """A helper of pickles, which makes an object of the class that is its first argument."""
    return (kind if _is_aside(kind) else aside("an object"))(*arguments)


def _layout(name: object) -> object:
    return torch.strided if name == "torch.strided" else aside("torch.layout")(name)


class _NumpyDtype(Inert):
    """(code, False, True), then a state whose second part is the byte order."""

    __slots__ = ("format",)

    def __init__(self, code: Any, *_: object) -> None:
        self.format = _NUMPY.get(code) if isinstance(code, str) else None

    def __setstate__(self, state: Any) -> None:
        self.format = self.format if state[1] in ("<", "|") else None


def _numpy_scalar(dtype: Any, content: Any = None) -> object:
    """(dtype, bytes): a plain number."""
    if not isinstance(dtype, _NumpyDtype) or dtype.format is None or type(content) is not bytes:
        return aside("numpy.generic")(dtype, content)
    return struct.unpack(f"<{dtype.format}", content)[0]


def _named(name: str, **attributes: object) -> type:
    """A class that a pickle can name, but not call."""
    return Sealed(name.rpartition(".")[2], (), {"__slots__": (), "name": name, **attributes})


_NUMPY = {
    "b1": "?", "i1": "b", "i2": "h", "i4": "i", "i8": "q", "u1": "B", "u2": "H", "u4": "I", "u8": "Q",
    "f2": "e", "f4": "f", "f8": "d",
}  # fmt: skip
# float8_e8m0fnu exists since torch 2.7, float4_e2m1fn_x2 since 2.8.
DTYPES: dict[str, object] = {
    f"torch.{name}": getattr(torch, name)
    for name in (
    "float64", "float32", "float16", "bfloat16", "complex128", "complex64", "complex32",
    "int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool",
    "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu",
    "float4_e2m1fn_x2",
    )
    if hasattr(torch, name)
}  # fmt: skip
_STORAGES = {
    "torch.DoubleStorage": torch.float64, "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16, "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64, "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16, "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8, "torch.BoolStorage": torch.bool,
    "torch.ComplexDoubleStorage": torch.complex128, "torch.ComplexFloatStorage": torch.complex64,
    "torch.storage.UntypedStorage": torch.uint8,
}  # fmt: skip
_TENSORS = {name: _named(name) for name in ("torch.Tensor", "torch.nn.parameter.Parameter")}
_REBUILD = "torch._utils._rebuild_"
_STRANGE = {
    "sparse_tensor": "a sparse tensor", "qtensor": "a quantized tensor",
    "nested_tensor": "a nested tensor", "meta_tensor_no_storage": "a tensor without content",
    "wrapper_subclass": "a tensor of another class",
    "device_tensor_from_numpy": "a tensor of another device",
    "device_tensor_from_cpu_tensor": "a tensor of another device",
}  # fmt: skip
REMEDIES = {
    "a sparse tensor": "save it dense (to_dense()), and read that",
    "a nested tensor": "save its parts, or one padded tensor, and read that",
    "a quantized tensor": "dequantise it, and read that",
    "a tensor without content": "its model was on the meta device: save it when it has its weights",
}
"""The remedy for tensors that are not read, by their names."""
_OF_A_CLASS = (
    "builtins.getattr", "copyreg._reconstructor", "copyreg.__newobj__", "copyreg.__newobj_ex__",
    "numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct",
)  # fmt: skip
KNOWN: dict[str, object] = {
    # A tensor of packed halves of bytes is left out: torch can neither add nor convert it.
    **{name: dtype for name, dtype in DTYPES.items() if "float4" not in name},
    **_TENSORS,
    **{name: _named(name, storage_dtype=dtype) for name, dtype in _STORAGES.items()},
    **{_REBUILD + name: aside(what, tensor=True) for name, what in _STRANGE.items()},
    **_makers(dict.fromkeys(_OF_A_CLASS, _object_of)),
    "numpy.dtype": _NumpyDtype,
    "numpy.core.numeric._frombuffer": aside("numpy.ndarray"),
    "numpy._core.numeric._frombuffer": aside("numpy.ndarray"),
    **_makers({
        "builtins.bytes": _empty_bytes,
        "builtins.complex": lambda real, imaginary: complex(float(real), float(imaginary)),
        "torch.device": torch.device,
        "torch.serialization._get_layout": _layout,
        "numpy.core.multiarray.scalar": _numpy_scalar,
        "numpy._core.multiarray.scalar": _numpy_scalar,
    }),
}  # fmt: skip
