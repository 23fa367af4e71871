"""What a file holds at its top, before anyone says whose layout it is; and checks of its parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from polyak._checks import is_integer, is_number
from polyak.checkpoints._checkpoint import Weights
from polyak.checkpoints._names import Names, canonical


@dataclass(frozen=True)
class Found:
    """The content of a file or folder by its keys, and the format's name where it is a plain one.

    A mapping that is no `dict` holds tensors only, and reads them when asked for.
    """

    path: Path
    plain: str
    top: Mapping[str, Any]
    names: Names = None


def is_state(value: object) -> bool:
    """Whether a value is a state dict: name -> tensor. Modules may add an `_extra_state` of their own."""
    if not isinstance(value, Mapping) or not value:
        return False
    if not isinstance(value, dict):
        return True
    if not all(isinstance(key, str) for key in value):
        return False
    held = [each for key, each in value.items() if not key.endswith("_extra_state")]
    return bool(held) and all(isinstance(each, Tensor) for each in held)


def weights(value: Any) -> Weights:
    """The tensors of a state dict, by the plain model's names; what else it has is left out."""
    if not isinstance(value, Mapping):
        raise ValueError(f"a {type(value).__name__} where a state dict belongs")
    if not isinstance(value, dict):
        return canonical(value)
    return canonical({key: each for key, each in value.items() if isinstance(each, Tensor)})


def part(held: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A mapping within; an empty one where there is none."""
    value = held.get(key)
    return value if isinstance(value, Mapping) else {}


def count(name: str, value: Any) -> int:
    """A counter: an integer, or a tensor of one element that is one."""
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


def tensors(name: str, value: Any) -> list[Tensor]:
    """A list of tensors."""
    if not isinstance(value, (list, tuple)) or not all(isinstance(t, Tensor) for t in value):
        raise ValueError(f"{name} is a {type(value).__name__}, wanted a list of tensors")
    return list(value)


def flag(name: str, value: Any) -> bool:
    """A setting that is on or off."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r:.100}, wanted True or False")
    return value
