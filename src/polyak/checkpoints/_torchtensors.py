"""What the names in a pickle of torch.save mean: plain tensors on storages, and plain values.

The tables at the end are all that is known. A tensor becomes a view of the file after its claim is
checked: it must lie within its storage, and all tensors together may not claim far more than the
file holds, as tensors of stride 0 could.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from polyak.checkpoints._mapped import Mapped
from polyak.checkpoints._meaning import Meaning
from polyak.checkpoints._pickles import Call, Name, Persistent

_LEAST_ROOM = 1 << 20
_REPEATS = 64  # tied weights are claimed once for every name they have
_MOST = 1 << 60
_DIMENSIONS = 64


class Unread(NamedTuple):
    """Stands for an object beside the weights that only its own code could make."""

    name: str


class Stored(NamedTuple):
    """A storage as a pickle describes it: its key, its bytes, its elements' dtype."""

    key: str
    nbytes: int
    dtype: torch.dtype


def stored(persistent: Persistent) -> Stored:
    """The storage that a pickle means; `ValueError` for what torch.save does not write."""
    match persistent:
        case Persistent(("storage", Name(kind), str(key), str(), int(count), *views)):
            if kind in _STORAGES and not any(views) and 0 <= count < _MOST:
                return Stored(key, count * _STORAGES[kind].itemsize, _STORAGES[kind])
    raise ValueError("a storage is described as torch.save never does")


class Tensors:
    """The values of a pickle whose storages lie in a mapped file.

    `of(data)` gives a value. `locate` says where in the file a storage lies; `size` is the pickle's,
    `room` the bytes that hold all storages.
    """

    def __init__(
        self, mapped: Mapped, locate: Callable[[Stored], int], size: int, *, room: int
    ) -> None:
        self._mapped = mapped
        self._locate = locate
        self._room = _LEAST_ROOM + _REPEATS * room
        self._meanings = _MEANINGS | {
            "torch._utils._rebuild_tensor": self._tensor,
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_tensor_v3": self._tensor_of_dtype,
            "torch._tensor._rebuild_from_type_v2": self._tensor_with_attributes,
        }
        self._meanings |= dict.fromkeys(_ASIDE, _aside)
        self.of = Meaning(self._meanings, DTYPES | {name: Unread(name) for name in _ASIDE}, size)

    def _tensor(self, call: Call, meaning: Meaning) -> Tensor:
        """(storage, offset, shape, stride[, requires_grad, hooks[, flags]])"""
        storage, offset, shape, stride, _, _, flags = _padded(call.arguments, 7)
        return self._view(meaning, stored(storage), None, offset, shape, stride, meaning(flags))

    def _tensor_of_dtype(self, call: Call, meaning: Meaning) -> Tensor:
        """(storage, offset, shape, stride, requires_grad, hooks, dtype[, flags])"""
        storage, offset, shape, stride, _, _, dtype, flags = _padded(call.arguments, 8)
        layout = (offset, shape, stride, meaning(flags))
        return self._view(meaning, stored(storage), meaning(dtype), *layout)

    def _tensor_with_attributes(self, call: Call, meaning: Meaning) -> object:
        """(function, type, arguments, state), of which the attributes are left out."""
        function, kind, arguments, _ = call.arguments
        if kind.text not in _TENSORS:
            raise ValueError(f"{meaning.place} is a {kind.text}, wanted a plain tensor")
        return self._meanings[function.text](Call(function.text, arguments), meaning)

    def _view(
        self,
        meaning: Meaning,
        storage: Stored,
        dtype: torch.dtype | None,
        offset: Any,
        shape: Any,
        stride: Any,
        flags: Any,
    ) -> Tensor:
        dtype = dtype or storage.dtype
        shape, stride = meaning(shape), meaning(stride)
        holds = storage.nbytes // dtype.itemsize
        if not _within(holds, offset, shape, stride):
            raise ValueError(
                f"{meaning.place}: shape {shape} with stride {stride} from {offset} on lies outside "
                f"its storage of {holds} elements"
            )
        self._room -= prod(shape) * dtype.itemsize
        if self._room < 0:
            raise ValueError(f"{meaning.place}: the tensors claim far more than the file holds")
        if prod(shape) == 0:
            return torch.empty(shape, dtype=dtype)
        flat = self._mapped.tensor(dtype, (holds,), self._locate(storage))
        return _flagged(flat.as_strided(shape, stride, offset), flags or {}, meaning)


def _padded(arguments: tuple[Any, ...], count: int) -> tuple[Any, ...]:
    """Arguments, with None for those at the end that are left out."""
    return (*arguments, *[None] * (count - len(arguments)))


def _within(holds: int, offset: Any, shape: Any, stride: Any) -> bool:
    """Whether a tensor of this layout lies within so many elements."""
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


def _flagged(tensor: Tensor, flags: dict[str, bool], meaning: Meaning) -> Tensor:
    """Conjugate and negative views are saved as flags."""
    if not isinstance(flags, dict) or set(flags) - {"conj", "neg"}:
        raise ValueError(f"{meaning.place} is a tensor with the flags {flags!r:.100}")
    tensor = tensor.conj() if flags.get("conj") else tensor
    return torch._neg_view(tensor) if flags.get("neg") else tensor


def _parameter(call: Call, meaning: Meaning) -> Tensor:
    """(data, requires_grad, hooks[, state]): a parameter's content, without the rest."""
    data, _, _, _ = _padded(call.arguments, 4)
    data = meaning(data)
    if not isinstance(data, Tensor):
        raise ValueError(f"{meaning.place} is a parameter without a tensor")
    return data


def _strange(what: str) -> Callable[[Call, Meaning], object]:
    def refuse(_: Call, meaning: Meaning) -> object:
        raise ValueError(f"{meaning.place} is {what}, wanted a plain tensor: save it as one")

    return refuse


def _mapping(call: Call, meaning: Meaning) -> dict[Any, Any]:
    """OrderedDict and Counter: from nothing, pairs (Python 2) or a dictionary, then items set."""
    start = call.arguments[0] if call.arguments else {}
    pairs = start.items() if isinstance(start, dict) else start
    return meaning.pairs(pairs) | meaning.pairs(call.items)


def _encoded(call: Call, meaning: Meaning) -> bytes:
    """(text, "latin1"), as protocol 2 writes bytes."""
    text, encoding = meaning(call.arguments)
    if encoding != "latin1":
        raise ValueError(f"{meaning.place}: bytes in the encoding {encoding!r:.100}")
    return bytes(text.encode(encoding))


def _empty_bytes(call: Call, meaning: Meaning) -> bytes:
    """bytes(), as protocol 2 writes them when there are none."""
    if call.arguments:
        raise ValueError(f"{meaning.place}: bytes that are made by a call")
    return b""


def _aside(call: Call, meaning: Meaning) -> object:
    """The items of what is a dictionary of another class; of anything else that it is there."""
    return meaning.pairs(call.items) if call.items else Unread(call.name)


def _bytearray(call: Call, meaning: Meaning) -> bytearray:
    content = meaning(call.arguments[0]) if call.arguments else b""
    if type(content) is not bytes:
        raise ValueError(f"{meaning.place}: a bytearray of a {type(content).__name__}")
    return bytearray(content)


def _device(call: Call, meaning: Meaning) -> torch.device:
    return torch.device(*meaning(call.arguments))


def size(call: Call, meaning: Meaning) -> torch.Size:
    """torch.Size(numbers)"""
    return torch.Size(meaning(call.arguments[0]))


def _set(call: Call, meaning: Meaning) -> set[Any]:
    return set(meaning.keys(call.arguments[0]))


def _complex(call: Call, meaning: Meaning) -> complex:
    real, imaginary = meaning(call.arguments)
    return complex(float(real), float(imaginary))


def layout(call: Call, meaning: Meaning) -> torch.layout:
    """_get_layout("torch.strided")"""
    if call.arguments != ("torch.strided",):
        raise ValueError(f"{meaning.place}: a layout that is not torch.strided")
    return torch.strided


def _numpy_dtype(call: Call, meaning: Meaning) -> str:
    """A number's format, as `struct` has it. The state's second part is the byte order."""
    code, state = call.arguments[0], meaning(call.state)
    if code not in _NUMPY or state[1] not in ("<", "|"):
        raise ValueError(f"{meaning.place}: a numpy scalar of type {code!r:.100}")
    return _NUMPY[code]


def _numpy_scalar(call: Call, meaning: Meaning) -> object:
    """(dtype, bytes): a number; what it is of numpy is left out."""
    dtype, content = meaning(call.arguments)
    return struct.unpack(f"<{dtype}", content)[0]


_NUMPY = {
    "b1": "?", "i1": "b", "i2": "h", "i4": "i", "i8": "q", "u1": "B", "u2": "H", "u4": "I", "u8": "Q",
    "f2": "e", "f4": "f", "f8": "d",
}  # fmt: skip
DTYPES: dict[str, object] = {
    str(dtype): dtype
    for dtype in (
    torch.float64, torch.float32, torch.float16, torch.bfloat16,
    torch.complex128, torch.complex64, torch.complex32,
    torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint64, torch.uint32, torch.uint16, torch.uint8, torch.bool,
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu, torch.float4_e2m1fn_x2,
    )
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
_TENSORS = {"torch.Tensor", "torch.nn.parameter.Parameter"}
_MEANINGS: dict[str, Callable[[Call, Meaning], object]] = {
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._utils._rebuild_sparse_tensor": _strange("a sparse tensor"),
    "torch._utils._rebuild_qtensor": _strange("a quantized tensor"),
    "torch._utils._rebuild_nested_tensor": _strange("a nested tensor"),
    "torch._utils._rebuild_meta_tensor_no_storage": _strange("a tensor without content"),
    "torch._utils._rebuild_wrapper_subclass": _strange("a tensor of another class"),
    "torch._utils._rebuild_device_tensor_from_numpy": _strange("a tensor of another device"),
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _strange("a tensor of another device"),
    "collections.OrderedDict": _mapping,
    "collections.Counter": _mapping,
    "_codecs.encode": _encoded,
    "builtins.bytes": _empty_bytes,
    "builtins.bytearray": _bytearray,
    "builtins.set": _set,
    "builtins.complex": _complex,
    "torch.Size": size,
    "torch.device": _device,
    "torch.serialization._get_layout": layout,
    "numpy.dtype": _numpy_dtype,
    "numpy.core.multiarray.scalar": _numpy_scalar,
    "numpy._core.multiarray.scalar": _numpy_scalar,
}
_REFUSED = {
    "torch.QInt8Storage", "torch.QUInt8Storage", "torch.QInt32Storage", "torch.QUInt4x2Storage",
    "torch.QUInt2x4Storage", "torch.per_tensor_affine", "torch.per_channel_affine",
    "torch.per_channel_affine_float_qparams",
}  # fmt: skip
"""Named by quantized tensors, whose place is to be in the error."""
_ASIDE = {
    "argparse.Namespace", "builtins.getattr", "datetime.timedelta", "dnnlib.util.EasyDict",
    "mmengine.logging.history_buffer.HistoryBuffer", "numpy.ndarray",
    "numpy._core.multiarray._reconstruct", "numpy.core.multiarray._reconstruct",
    "torch.torch_version.TorchVersion",
}  # fmt: skip
"""What trainers (timm, Composer, MMEngine, EDM2) save beside weights: its items, or nothing, is kept."""
KNOWN = frozenset(_MEANINGS) | set(DTYPES) | set(_STORAGES) | _TENSORS | _REFUSED | _ASIDE | {
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3",
    "torch._tensor._rebuild_from_type_v2",
}  # fmt: skip
