"""The top level of a file's content, before its layout is known; and checks of its parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from torch import Tensor

from polyak._checks import is_integer, is_number
from polyak._lazy import LazyTensors
from polyak.checkpoints._checkpoint import Weights
from polyak.checkpoints._names import Names, canonical
from polyak.checkpoints._torch_save.files import StoredTensors
from polyak.checkpoints._torch_save.objects import OF_DTYPE, REMEDIES
from polyak.checkpoints._torch_save.pickles import Aside, name_of
from polyak.checkpoints._torch_save.tensors import Storage, StoredTensor

NO_CODE = (
    "only its own code could make it, and polyak runs no code from a file: load the file in the "
    "project that wrote it, and save the model's state_dict"
)


@dataclass(frozen=True)
class Found:
    """The content of a file or folder by its keys, and the format's name if no layout is recognised.

    A value is a mapping, a list, a scalar, a `StoredTensor` or `LazyTensors`. `aside` counts the objects
    that were not read, by name. `keys` are those on the way to `top`, joined by dots, if it is a part of
    the file. With `whole`, averages within a state dict are left where they are.
    """

    path: Path
    plain: str
    top: Mapping[str, Any]
    names: Names = None
    aside: Mapping[str, int] = field(default_factory=dict)
    keys: str = ""
    whole: bool = False


def is_state(value: object) -> bool:
    """Whether a value is a state dict: name -> tensor. Modules may add an `_extra_state` of any kind.

    Tensors that only unknown code could make count too: `state` says so.
    """
    if isinstance(value, LazyTensors):
        return len(value) > 0
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        return False
    values = [
        part
        for key, part in value.items()
        if not key.endswith("_extra_state") and not _is_array(part)
    ]
    return bool(values) and all(isinstance(t, StoredTensor) or holds_tensors(t) for t in values)


def state(value: Any) -> LazyTensors:
    """The tensors of a state dict by its own keys; everything else in it is left out.

    Raises `ValueError` for tensors that only unknown code could make: weights would be missing.
    """
    if isinstance(value, LazyTensors):
        return value
    if not isinstance(value, Mapping):
        raise ValueError(f"got a {type_of(value)}, wanted a state dict")
    for key, part in value.items():
        if str(key).endswith("_extra_state") or is_unread(part):
            continue
        if holds_tensors(part):
            raise ValueError(f"{key} is {part.name}: {REMEDIES.get(part.name, NO_CODE)}")
    return StoredTensors({k: part for k, part in value.items() if isinstance(part, StoredTensor)})


def weights(value: Any) -> Weights:
    """The tensors of a state dict by the plain model's names."""
    return canonical(state(value))


def part(held: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A mapping within; an empty one if there is none."""
    value = held.get(key)
    return value if isinstance(value, Mapping) else {}


def is_unread(value: object) -> TypeGuard[Aside]:
    """Whether a value is a tensor of a dtype that is not known here, or an array of numpy."""
    return isinstance(value, Aside) and (value.name.startswith(OF_DTYPE) or _is_array(value))


def _is_array(value: object) -> bool:
    return isinstance(value, Aside) and value.name == "numpy.ndarray"


def holds_tensors(value: object) -> bool:
    """Whether a value is an object of an unknown class that was made of tensors."""
    if not isinstance(value, Aside):
        return False
    rest: list[Any] = [value]
    seen: set[int] = set()
    while rest:
        one = rest.pop()
        if isinstance(one, (StoredTensor, Storage)) or (isinstance(one, Aside) and one.tensor):
            return True
        if id(one) not in seen:
            seen.add(id(one))
            rest += one.parts if isinstance(one, Aside) else ()
            rest += one.values() if isinstance(one, dict) else ()
            rest += one if isinstance(one, (list, tuple)) else ()
    return False


def count(name: str, value: Any) -> int:
    """A counter: an integer, or a tensor of one element that is one."""
    if isinstance(value, StoredTensor):
        value = value.read() if value.spec.numel == 1 else value.spec.shape
    if isinstance(value, Tensor):
        value = value.item() if value.numel() == 1 else tuple(value.shape)
    if is_number(value) and value == int(value):
        value = int(value)
    if not is_integer(value, 0):
        raise ValueError(f"{name} is {value!r:.100}, wanted one integer >= 0")
    return int(value)


def number(name: str, value: Any) -> float:
    """A setting that is a number."""
    if not is_number(value):
        raise ValueError(f"{name} is {value!r:.100}, wanted a number")
    return float(value)


def flag(name: str, value: Any) -> bool:
    """A setting that is on or off."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r:.100}, wanted True or False")
    return value


def tensors(name: str, value: Any) -> dict[str, StoredTensor]:
    """A list of tensors, by their positions."""
    for one in value if isinstance(value, (list, tuple)) else [value]:
        if holds_tensors(one):
            raise ValueError(f"{name} holds {one.name}: {REMEDIES.get(one.name, NO_CODE)}")
    if not isinstance(value, (list, tuple)) or not all(isinstance(t, StoredTensor) for t in value):
        raise ValueError(f"{name} is a {type_of(value)}, wanted a list of tensors")
    return {str(place): tensor for place, tensor in enumerate(value)}


def type_of(value: object) -> str:
    """The type of a value, in a word."""
    if isinstance(value, (Tensor, StoredTensor)):
        return "tensor"
    return "dict" if isinstance(value, LazyTensors) else name_of(value)


def kind_of(value: object) -> str:
    """The type of a value and its size."""
    if isinstance(value, StoredTensor):
        return f"tensor {value.spec.shape}"
    if isinstance(value, Tensor):
        return f"tensor {tuple(value.shape)}"
    sized = isinstance(value, (Mapping, list, tuple)) and not (
        isinstance(value, Aside) and not value
    )
    if isinstance(value, dict) and value and all(map(_is_array, value.values())):
        return f"{len(value)} arrays of numpy, which are not read: save tensors"
    return f"{type_of(value)} of {len(value)}" if sized else type_of(value)  # type: ignore[arg-type]
