"""Files and folders that `polyak.save` wrote, read: the description checked, averages by their rules.

The layout is in `polyak.checkpoints._save`, which writes it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from polyak._engine.slots import tick_data
from polyak._engine.states import STATE_FORMAT, as_tick
from polyak._lazy import Elements, LazyTensors, Renamed, TensorSpec, Where, renamed
from polyak.checkpoints._checkpoint import Checkpoint, Clock, ReadOut, read_out_terms
from polyak.checkpoints._dcp.tensors import DistributedTensors
from polyak.checkpoints._safetensors.files import KEY, TensorFile
from polyak.checkpoints._sniff import Source, sniff
from polyak.rules import AVERAGE, LIVE, START, Rule, Tail, Tick, Window
from polyak.specs import class_of, parse, path_of

_PARTS = {"averages", "copies", "live", "times"}
FORMAT = 2
SAVE = "save"  # the mark of one save, which every rank's file of a folder has
_FROZEN = "frozen parameters, which are the model's and not in this file"
PAIRS = "pairs"  # tensors of a complex dtype that safetensors lacks, stored as pairs of float64


class StoredAverage(NamedTuple):
    """The description of an average in a file: its rule, its clock, the names of its slots."""

    rule: Rule
    tick: Tick
    slots: list[str]


class Stored(LazyTensors):
    """A file or folder of `polyak.save`: tensors by key, and the values of the description, which is checked.

    Raises `ValueError` that names the file if it is damaged, or has another format.
    """

    def __init__(self, path: Path, tensors: LazyTensors, text: str) -> None:
        self.path = path
        self._tensors = tensors
        try:
            described = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise self.error(f"the header cannot be read ({error})") from None
        if not isinstance(described, dict) or described.get("format") != FORMAT:
            got = described.get("format") if isinstance(described, dict) else described
            raise self.error(f"format is {got!r:.100}, wanted {FORMAT}")
        self._described = described
        self._pairs = frozenset(map(str, self.mapping(PAIRS, list)))
        self._specs = {key: self._spec_at(key, spec) for key, spec in tensors.specs.items()}

    @classmethod
    def open(cls, path: Path) -> Stored:
        """Open a file or folder of `polyak.save`; raises `ValueError` for anything else."""
        stored = of_source(sniff(path))
        if stored is None:
            raise ValueError(f"{path} was not written by polyak.save")
        return stored

    @property
    def specs(self) -> dict[str, TensorSpec]:
        return self._specs

    def read(self, key: str, where: Where = ()) -> Tensor:
        dtype = self.spec(key).dtype
        if key not in self._pairs:
            return self._tensors.read(key, where)
        if dtype != torch.complex128:
            raise self.error(f"{key} is not a tensor of pairs of float64")
        tensor = self._tensors.read(key, where)
        if tensor.data_ptr() % 16:  # torch's kernels for complex128 fault on it
            tensor = tensor.clone()
        return torch.view_as_complex(tensor.contiguous())

    def elements(self, key: str) -> Elements:
        self.spec(key)
        return super().elements(key) if key in self._pairs else self._tensors.elements(key)

    def spec(self, key: str) -> TensorSpec:
        """The spec of a tensor that must be there."""
        if key not in self._specs:
            raise self.error(f"the tensor {key!r} is missing")
        return self._specs[key]

    def release(self, key: str) -> None:
        self._tensors.release(key)

    def under(self, prefix: str) -> Renamed:
        """The tensors whose keys begin with a prefix, by the rest of the key."""
        keys = [key for key in self if key.startswith(prefix)]
        return renamed(self, {key.removeprefix(prefix): key for key in keys})

    def error(self, problem: str) -> ValueError:
        return ValueError(f"{self.path}: {problem}")

    def value(self, name: str) -> Any:
        """A value of the description, which must be there."""
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
        """The rule that a spec in the description means."""
        try:
            return parse(spec)  # type: ignore[arg-type]  # it raises TypeError for another type
        except (ValueError, TypeError) as error:
            raise self.error(str(error)) from None

    def model(self) -> dict[str, Any]:
        """name -> shape, dtype, policy and other names of the model's tensors, checked."""
        model: dict[str, Any] = self.mapping("model")
        for name, entry in model.items():
            holds = isinstance(entry, dict) and _are_names(entry.get("aliases"))
            holds = holds and isinstance(getattr(torch, str(entry.get("dtype")), None), torch.dtype)
            if not holds or entry.get("policy") not in ("average", "copy"):
                raise self.error(f"the header describes {name} as {entry!r}")
        return model

    def averages(self) -> dict[str, StoredAverage]:
        """Every average by name, checked; the model's description is checked too."""
        self.model()
        described = self.mapping("averages")
        return {name: self._average(name, average) for name, average in described.items()}

    def _require_classes(self, classes: Any) -> None:
        """Raises `ValueError` if a class of a user's rule is not there: loading imports nothing."""
        if not isinstance(classes, dict):
            raise self.error(f"classes is {classes!r}, wanted a JSON dict")
        for name, path in classes.items():
            if path_of(class_of(name)) != path:
                now = path_of(class_of(name)) or "no class"
                raise self.error(
                    f"its rule {name}(...) is the class {path}, and {name} means {now} now: import "
                    "the module that defines it before you load"
                )

    def _spec_at(self, key: str, stored: TensorSpec) -> TensorSpec:
        """The spec of a tensor; for pairs of float64, that of the complex tensor."""
        pair = stored.dtype == torch.float64 and stored.shape[-1:] == (2,)
        if key in self._pairs and pair:
            return TensorSpec(stored.shape[:-1], torch.complex128)
        return stored

    def _average(self, name: str, held: Any) -> StoredAverage:
        if not isinstance(held, dict) or not _are_names(held.get("slots")):
            raise self.error(f"average {name!r} is {held!r}, wanted rule, tick and slots")
        self._require_classes(held.get("classes", {}))
        rule = self.rule(held.get("rule"))
        try:
            tick = as_tick(held.get("tick"))
        except ValueError as error:
            raise self.error(str(error)) from None
        if tick.n > 2**53 or _filled(rule, tick) > len(held["slots"]):
            raise self.error(f"average {name!r} has {tick.n} updates and too few slots for them")
        return StoredAverage(rule, tick, held["slots"])


def of_source(source: Source) -> Stored | None:
    """Open a file or folder of `polyak.save`, or one averager of a folder; None for anything else.

    Raises `ValueError` for a folder with several averagers.
    """
    if isinstance(source.opened, DistributedTensors):
        found = within(source.opened)
        return _only(source.opened.path, found) if source.key is None else found.get(source.key)
    if source.kind != "polyak" or not isinstance(source.opened, TensorFile):
        return None
    file = source.opened
    file.use_checksums()
    return Stored(source.path, file, file.metadata[KEY])


def within(folder: DistributedTensors) -> dict[str, Stored]:
    """The averagers of a folder by their keys; an averager that was saved alone has the key ""."""
    found = {}
    for part, tensors in folder.parts().items():
        begins = {name.split("/")[0] for name in tensors}
        if KEY in tensors and tensors.specs[KEY].dtype == torch.uint8 and begins <= {KEY, *_PARTS}:
            path = Path(f"{folder.path}/{part}") if part else folder.path  # a key may be anything
            others = {name: name for name in tensors if name.split("/")[0] != KEY}
            stored = Stored(path, renamed(tensors, others), _text(tensors, KEY))
            _require_one_save(stored, tensors)
            found[part] = stored
    return found


def _only(folder: Path, found: Mapping[str, Stored]) -> Stored | None:
    if len(found) > 1:
        one, has = folder / next(iter(found)), ", ".join(found)
        raise ValueError(f"{folder} has the averagers {has}: give one, such as {one}")
    return next(iter(found.values()), None)


def _require_one_save(stored: Stored, held: Renamed) -> None:
    """Raise `ValueError` if the folder has a rank's file from another save."""
    for name in held:
        if name.startswith(f"{KEY}/") and _text(held, name) != stored.value(SAVE):
            raise stored.error(
                f"the file of rank {name.partition('/')[2]} comes from another save than the others: "
                "the folder is a mixture of two saves, so load another one"
            )


def _text(held: Renamed, name: str) -> str:
    """The text in a tensor of bytes; empty for any other tensor."""
    if held.specs[name].dtype != torch.uint8:
        return ""
    return held[name].numpy().tobytes().decode(errors="replace")


def _filled(rule: Rule, tick: Tick) -> int:
    """How many slots a window has filled. They are not listed: a damaged file may claim any size."""
    while isinstance(rule, Tail):
        rule, tick = rule.rule, tick.inner or START
    return min(tick.n, rule.size) if isinstance(rule, Window) else 0


def _are_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _read_out(stored: Stored, name: str, average: StoredAverage) -> ReadOut:
    """An average of a file of ours, as its rule reads it out of its slots."""
    model = stored.model()
    copied = {first for first, entry in model.items() if entry["policy"] == "copy"}

    def place(slot: str, first: str) -> tuple[LazyTensors, str]:
        return stored, f"live/{first}" if slot == LIVE else f"averages/{name}/{slot}/{first}"

    terms = read_out_terms(average.rule, average.tick, set(model) - copied, place)
    terms |= {first: [(stored, f"copies/{first}", 1.0)] for first in copied}
    names = {n: first for first, e in model.items() for n in (first, *e["aliases"])}
    return ReadOut({n: terms[first] for n, first in names.items()}, stored.error)


def state(stored: Stored) -> dict[str, Any]:
    """The state for an averager's `load_state_dict`; its tensors are not read yet."""
    averages: dict[str, dict[str, Any]] = {}
    for name, average in stored.averages().items():
        slots = {slot: stored.under(f"averages/{name}/{slot}/") for slot in average.slots}
        averages[name] = {
            "rule": str(average.rule),
            "tick": tick_data(average.tick),
            "slots": slots,
        }
    numbers = {name: stored.value(name) for name in ("calls", "elapsed", "skipped", "every")}
    numbers |= {name: stored.value(name) for name in ("run", "mixed", "pull") if stored.has(name)}
    copies = stored.under("copies/")
    return {"format": STATE_FORMAT, **numbers, "copies": copies, "averages": averages}


def checkpoint(stored: Stored) -> Checkpoint:
    """A file of ours as a `Checkpoint`: averages are read out by their rules."""
    if stored.value("kind") == "ema":
        return _ema_checkpoint(stored)
    averages, model = stored.averages(), stored.model()
    frozen = stored.mapping("frozen", list) if stored.has("frozen") else []
    return Checkpoint(
        path=stored.path,
        format="polyak",
        # A snapshot's are beside what it is for; they lack the buffers.
        live=(stored.value("kind") != "snapshot" and stored.under("live/")) or None,
        averages={
            n: _read_out(stored, n, average) for n, average in averages.items() if average.tick.n
        },
        rules={name: average.rule for name, average in averages.items()},
        clock=Clock(max((average.tick.n for average in averages.values()), default=0)),
        dtypes={name: getattr(torch, entry["dtype"]) for name, entry in model.items()},
        ticks={name: average.tick for name, average in averages.items()},
        left={_FROZEN: len(frozen)} if frozen else {},
    )


def _ema_checkpoint(stored: Stored) -> Checkpoint:
    step = stored.read("ema/step")
    if step.numel() != 1 or int(step) < 0:
        raise stored.error(f"step is {step}, wanted one integer >= 0")
    rules, every = {AVERAGE: stored.rule(stored.value("rule"))}, stored.value("every")
    clock = Clock(int(step), "calls", every=every if type(every) is int and every > 0 else None)
    average, live = stored.under("ema/ema_model."), stored.under("ema/online_model.")
    return Checkpoint(stored.path, "polyak", live or None, {AVERAGE: average}, rules, clock)
