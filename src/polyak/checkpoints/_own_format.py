"""Stored: what `polyak.save` wrote, read: its description checked, averages by their rules.

The layout is in `polyak.checkpoints._save`, which writes it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from polyak import _tensors as tensors
from polyak._engine.readout import NamedTensors
from polyak._engine.states import as_tick
from polyak._engine.tracking import is_statistic
from polyak.checkpoints._checkpoint import MOST_UPDATES
from polyak.checkpoints._distributed import DistributedTensors
from polyak.checkpoints._names import Renamed
from polyak.checkpoints._parts import Chunked, unread
from polyak.checkpoints._tensorfile import Form, TensorFile, is_safetensors
from polyak.rules import LIVE, START, Rule, Tail, Tick, Window
from polyak.specs import parse

KEY = "polyak"
_PARTS = {"averages", "copies", "live", "times"}
FORMAT = 1
SAVE = "save"  # the mark of one save, which every rank's file of a folder has
PAIRS = "pairs"  # tensors of a complex dtype that safetensors lacks, stored as pairs of float64


class StoredAverage(NamedTuple):
    """What a file says of an average: its rule, its clock, the slots that it stored."""

    rule: Rule
    tick: Tick
    slots: list[str]


class Stored(NamedTensors):
    """What `polyak.save` wrote, its description checked: tensors by key, values by name.

    Raises `ValueError` naming the file for a damaged one, or one of another format.
    """

    def __init__(self, path: Path, tensors: TensorFile | Renamed, text: str) -> None:
        self.path = path
        self._tensors = tensors
        try:
            described = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise self.error(f"the header does not read ({error})") from None
        if not isinstance(described, dict) or described.get("format") != FORMAT:
            got = described.get("format") if isinstance(described, dict) else described
            raise self.error(f"format is {got!r}, wanted {FORMAT}")
        self._described = described
        self._pairs = frozenset(map(str, self.mapping(PAIRS, list)))
        self.forms = {key: self._form(key, each) for key, each in tensors.forms.items()}

    @classmethod
    def open(cls, path: Path, *, whole: bool = True) -> Stored:
        """What was saved at a path: `find`, where it must be there."""
        found = cls.find(path, whole=whole)
        if found is None:
            raise ValueError(f"{path} was not written by polyak.save")
        return found

    @classmethod
    def find(cls, path: Path, *, whole: bool = True) -> Stored | None:
        """What was saved at a path: a file, a folder, or one averager of a folder by its key.

        Of a file the digest is compared, for which all is read, unless `whole` is False; of a
        folder each part has a checksum, which is compared when the part is read. None for what was
        not written by us.

        Raises `ValueError` for a folder with several averagers.
        """
        if (place := DistributedTensors.at(path)) is not None:
            return cls.part(*place)
        if not path.is_file() or not is_safetensors(path):
            return None
        file = TensorFile(path)
        if KEY not in file.metadata:
            return None
        stored = cls(path, file, file.metadata[KEY])
        if whole:
            file.require_digest()
        return stored

    @classmethod
    def part(cls, folder: DistributedTensors, key: str | None) -> Stored | None:
        """The averager of a folder under a key, or its only one; None where there is none."""
        return cls.only(folder) if key is None else cls.within(folder).get(key)

    @classmethod
    def within(cls, folder: DistributedTensors) -> dict[str, Stored]:
        """The averagers of a folder by their keys; one that was saved alone has the empty key."""
        found = {}
        for part, held in folder.parts().items():
            begins = {name.split("/")[0] for name in held}
            if KEY in held and held.forms[KEY].dtype == torch.uint8 and begins <= {KEY, *_PARTS}:
                keys, text = _others(held), _text(held, KEY)
                stored = cls(_place(folder.path, part), Renamed(held, keys), text)
                stored.require_one_save(held)
                found[part] = stored
        return found

    @classmethod
    def only(cls, folder: DistributedTensors) -> Stored | None:
        """The averager of a folder, if it has any; raises `ValueError` for several."""
        found = cls.within(folder)
        if len(found) > 1:
            one, has = folder.path / next(iter(found)), ", ".join(found)
            raise ValueError(f"{folder.path} has the averagers {has}: give one, as {one}")
        return next(iter(found.values()), None)

    def require_one_save(self, held: Renamed) -> None:
        """Raises `ValueError` for a folder with a rank's file of another save."""
        for name in held:
            if name.startswith(f"{KEY}/") and _text(held, name) != self.value(SAVE):
                raise self.error(
                    f"rank {name.partition('/')[2]}'s file is of another save than the others: the "
                    "folder was put together of two, so load another one"
                )

    @property
    def known(self) -> Mapping[str, object]:
        return self.forms

    def __getitem__(self, key: str) -> Tensor:
        dtype = self.form(key).dtype
        tensor = self._tensors[key]
        if key not in self._pairs:
            return tensor
        if dtype != torch.complex128:
            raise self.error(f"{key} is no tensor of pairs of float64")
        if tensor.data_ptr() % 16:  # torch's kernels for complex128 fault on it
            tensor = tensor.clone()
        return torch.view_as_complex(tensor)

    def form(self, key: str) -> Form:
        """The form of a tensor that must be there."""
        if key not in self.forms:
            raise self.error(f"the tensor {key!r} is missing")
        return self.forms[key]

    def unread(self, key: str) -> Tensor | Chunked:
        """A tensor before its chunks are put together, where it lies in chunks."""
        self.form(key)
        return self[key] if key in self._pairs else unread(self._tensors, key)

    def release(self, key: str) -> None:
        """Gives the pages of a tensor back."""
        self._tensors.release(key)

    def under(self, prefix: str) -> Renamed:
        """The tensors whose keys begin so, by the rest of the key."""
        keys = [key for key in self if key.startswith(prefix)]
        return Renamed(self, {key.removeprefix(prefix): key for key in keys})

    def error(self, problem: str) -> ValueError:
        return ValueError(f"{self.path}: {problem}")

    def value(self, name: str) -> Any:
        """What the description says of a name."""
        if name not in self._described:
            raise self.error(f"the header lacks {name!r}")
        return self._described[name]

    def has(self, name: str) -> bool:
        return name in self._described

    def mapping(self, name: str, kind: type = dict) -> Any:
        value = self.value(name)
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

    def _form(self, key: str, stored: Form) -> Form:
        """The form of a tensor; that of a complex one, where it is stored as pairs."""
        pair = stored.dtype == torch.float64 and stored.shape[-1:] == (2,)
        if key in self._pairs and pair:
            return Form(torch.complex128, stored.shape[:-1])
        return stored

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


def _place(folder: Path, part: str) -> Path:
    """What `find` takes for a part; a part's name may be anything."""
    return Path(f"{folder}/{part}") if part else folder


def _others(held: Renamed) -> dict[str, str]:
    """All names but those of the description and of the marks of its save."""
    return {name: name for name in held if name.split("/")[0] != KEY}


def _text(held: Renamed, name: str) -> str:
    """The text that lies in a tensor of bytes; none in any other."""
    if held.forms[name].dtype != torch.uint8:
        return ""
    return held[name].numpy().tobytes().decode(errors="replace")


def _filled(rule: Rule, tick: Tick) -> int:
    """The slots that a window has filled, without naming them all: a file may claim any size."""
    while isinstance(rule, Tail):
        rule, tick = rule.rule, tick.inner or START
    return min(tick.n, rule.size) if isinstance(rule, Window) else 0


def _are_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


class ReadOut(NamedTensors):
    """An average of a file of ours, read out tensor by tensor: `sum of coefficient * slot`.

    Running statistics have the rule's convex coefficients, as in the averager.
    """

    def __init__(self, stored: Stored, name: str, average: StoredAverage) -> None:
        self._stored = stored
        rule, tick = average.rule, average.tick
        self._keys, self._convex = (
            [
                ("live/" if slot == LIVE else f"averages/{name}/{slot}/", coefficient)
                for slot, coefficient in readout.items()
            ]
            for readout in (rule.readout(tick), rule.convex_readout(tick))
        )
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
        return {name: self._form(name) for name in self}

    def __getitem__(self, name: str) -> Tensor:
        held = self.unread(name)
        return held.whole() if isinstance(held, Chunked) else held

    def unread(self, name: str) -> Tensor | Chunked:
        """A tensor before its chunks are put together, where it is a slot as it lies."""
        terms = self._terms(name)
        dtype, shape = self._form(name)
        if [c for _, c in terms] == [1.0]:
            return self._stored.unread(terms[0][0])
        out = torch.empty(shape, dtype=dtype)
        tensors.combine_([out], [([self._stored[key]], c) for key, c in terms])
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
        keys = self._convex if is_statistic(first) else self._keys
        return [(prefix + first, coefficient) for prefix, coefficient in keys]

    def _form(self, name: str) -> Form:
        """The shape of the slots, and the widest of their dtypes."""
        held = [self._stored.form(key) for key, _ in self._terms(name)]
        widest = max(held, key=lambda form: form.dtype.itemsize)
        if any(form.shape != widest.shape for form in held):
            raise self._stored.error(f"{name}: the slots have different shapes")
        return widest
