"""Stored: a file of ours, read: its digest and description checked, averages by their rules.

The layout is in `polyak.checkpoints.native`, which writes it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from polyak import tensors
from polyak.checkpoints.checkpoint import MOST_UPDATES
from polyak.checkpoints.tensorfile import Form, TensorFile, form
from polyak.reading import NamedTensors
from polyak.rules import LIVE, START, Rule, Tail, Tick, Window
from polyak.specs import parse
from polyak.states import as_tick

KEY = "polyak"
FORMAT = 1
PAIRS = "pairs"  # tensors of a complex dtype that safetensors lacks, stored as pairs of float64


class StoredAverage(NamedTuple):
    """What a file says of an average: its rule, its clock, the slots that it stored."""

    rule: Rule
    tick: Tick
    slots: list[str]


class Stored:
    """A file of ours, its digest and its description checked: tensors by key, numbers by name.

    With `whole=False` the digest, for which all is read, is not compared. Raises `ValueError`
    naming the file for a damaged one, or one of another format.
    """

    def __init__(self, file: TensorFile, *, whole: bool = True) -> None:
        self.path = file.path
        self._file = file
        try:
            described = json.loads(file.metadata[KEY])
        except (ValueError, RecursionError) as error:
            raise self.error(f"the header does not read ({error})") from None
        if not isinstance(described, dict) or described.get("format") != FORMAT:
            got = described.get("format") if isinstance(described, dict) else described
            raise self.error(f"format is {got!r}, wanted {FORMAT}")
        if whole:
            file.require_digest()
        self._described = described
        self._pairs = frozenset(map(str, self.mapping(PAIRS, list)))

    @classmethod
    def open(cls, path: Path, *, whole: bool = True) -> Stored:
        """The file of ours at a path."""
        return cls(TensorFile(path), whole=whole)

    def error(self, problem: str) -> ValueError:
        return ValueError(f"{self.path}: {problem}")

    def get(self, name: str) -> Any:
        if name not in self._described:
            raise self.error(f"the header lacks {name!r}")
        return self._described[name]

    def has(self, name: str) -> bool:
        return name in self._described

    def mapping(self, name: str, kind: type = dict) -> Any:
        value = self.get(name)
        if not isinstance(value, kind):
            raise self.error(f"{name} is {value!r}, wanted a JSON {kind.__name__}")
        return value

    def rule(self, spec: object) -> Rule:
        """The rule that a text of the description means."""
        try:
            return parse(spec)  # type: ignore[arg-type]  # which is what it tells
        except (ValueError, TypeError) as error:
            raise self.error(str(error)) from None

    def model(self) -> dict[str, Any]:
        """name -> shape, dtype, policy and other names of the model's tensors, checked."""
        model: dict[str, Any] = self.mapping("model")
        for name, each in model.items():
            holds = isinstance(each, dict) and _are_names(each.get("aliases"))
            holds = holds and isinstance(getattr(torch, str(each.get("dtype")), None), torch.dtype)
            if not holds or each.get("policy") not in ("average", "copy"):
                raise self.error(f"the header describes {name} as {each!r}")
        return model

    def averages(self) -> dict[str, StoredAverage]:
        """Every average by name, checked, as is the model that they are of."""
        self.model()
        return {name: self._average(name, each) for name, each in self.mapping("averages").items()}

    def tensor(self, key: str) -> Tensor:
        if key not in self._file:
            raise self.error(f"the tensor {key!r} is missing")
        tensor = self._file[key]
        if key not in self._pairs:
            return tensor
        if tensor.dtype != torch.float64 or tensor.shape[-1:] != (2,):
            raise self.error(f"{key} is no tensor of pairs of float64")
        return torch.view_as_complex(tensor)

    def under(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose keys begin so, by the rest of the key."""
        keys = [key for key in self._file if key.startswith(prefix)]
        return {key.removeprefix(prefix): self.tensor(key) for key in keys}

    def release(self, key: str) -> None:
        """Gives the pages of a tensor back."""
        self._file.release(key)

    def _average(self, name: str, held: Any) -> StoredAverage:
        if not isinstance(held, dict) or not _are_names(held.get("slots")):
            raise self.error(f"average {name!r} is {held!r}, wanted rule, tick and slots")
        rule = self.rule(held.get("rule"))
        try:
            tick = as_tick(held.get("tick"))
        except ValueError as error:
            raise self.error(str(error)) from None
        if tick.n > MOST_UPDATES or _filled(rule, tick) > len(held["slots"]):
            raise self.error(f"average {name!r} has {tick.n} updates and too few slots for them")
        return StoredAverage(rule, tick, held["slots"])


class ReadOut(NamedTensors):
    """An average of a file of ours, read out tensor by tensor: `sum of coefficient * slot`."""

    def __init__(self, stored: Stored, name: str, average: StoredAverage) -> None:
        self._stored = stored
        self._keys = [
            ("live/" if slot == LIVE else f"averages/{name}/{slot}/", coefficient)
            for slot, coefficient in average.rule.readout(average.tick).items()
        ]
        model = stored.model()
        self._names = {n: first for first, each in model.items() for n in (first, *each["aliases"])}
        self._copied = {first for first, each in model.items() if each["policy"] == "copy"}

    @property
    def known(self) -> Mapping[str, str]:
        """name -> the first name of the same tensor."""
        return self._names

    @property
    def forms(self) -> dict[str, Form]:
        """The tensors' dtypes and shapes, without their content."""
        return {name: form(self._widest(name)) for name in self}

    def __getitem__(self, name: str) -> Tensor:
        like = self._widest(name)
        terms = self._terms(name)
        if [c for _, c in terms] == [1.0]:
            return like
        out = torch.empty_like(like)
        tensors.combine_([out], [([self._stored.tensor(key)], c) for key, c in terms])
        return out

    def release(self, name: str) -> None:
        """Gives the pages of a tensor's slots back."""
        for key, _ in self._terms(name):
            self._stored.release(key)

    def _terms(self, name: str) -> list[tuple[str, float]]:
        """The key and the coefficient of each tensor that is summed."""
        first = self._names[name]
        if first in self._copied:
            return [(f"copies/{first}", 1.0)]
        return [(prefix + first, coefficient) for prefix, coefficient in self._keys]

    def _widest(self, name: str) -> Tensor:
        """The one of the slots whose dtype the average has: a view of the file."""
        held = [self._stored.tensor(key) for key, _ in self._terms(name)]
        like = max(held, key=lambda tensor: tensor.dtype.itemsize)
        if any(tensor.shape != like.shape for tensor in held):
            raise self._stored.error(f"{name}: the slots have different shapes")
        return like


def _filled(rule: Rule, tick: Tick) -> int:
    """The slots that a window has filled, without naming them all: a file may claim any size."""
    while isinstance(rule, Tail):
        rule, tick = rule.rule, tick.inner or START
    return min(tick.n, rule.size) if isinstance(rule, Window) else 0


def _are_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)
