"""Our own files: a state in safetensors, with names, rules, clocks and a digest; no pickle anywhere.

The header's metadata holds, beside the digest (`tensorfile`), one entry `polyak`: the state's numbers,
rules and names as JSON. The tensors lie under `averages/<average>/<slot>/<name>`, `copies/<name>`,
`random/<average>/<device>`, and `live/<name>` where a rule's readout has a term in the live weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polyak import tensors
from polyak.averager import Averager
from polyak.checkpoints import tensorfile
from polyak.checkpoints.checkpoint import MOST_UPDATES, Checkpoint, Clock
from polyak.checkpoints.tensorfile import Form, TensorFile, narrowed
from polyak.ema import EMA
from polyak.rules import LIVE, START, Rule, Tail, Tick, Window
from polyak.sharding import require_whole
from polyak.specs import parse
from polyak.states import as_tick
from polyak.tracking import Tracked

KEY = "polyak"
FORMAT = 1
_PAIRS = "pairs"  # tensors of a complex dtype that safetensors lacks, stored as pairs of float64


def save(path: Path | str, averager: Averager | EMA, *, overwrite: bool = True) -> None:
    """Writes all that an averager (or the article's `EMA`) needs to go on exactly: slots, clock, rule.

    The file appears when it is complete and on the disk; a process killed on the way leaves the
    file that was there before. Live weights, optimizer and data order are yours to save, in one
    folder with this file (`saving`) so that they agree.

    >>> import tempfile
    >>> place = Path(tempfile.mkdtemp()) / "average.safetensors"
    >>> averager = Averager({"w": torch.zeros(2)}, "exponential(0.9)")
    >>> averager.update()
    >>> save(place, averager)
    >>> TensorFile(place)["averages/average/average/w"]
    tensor([0., 0.])

    Raises `RuntimeError` inside `applied()`, `TypeError` for another object or a dtype that
    safetensors lacks, `ValueError` for a sharded model, `OSError` where it cannot be written.
    """
    described, stored = _packed(averager)
    write(path, described, stored, overwrite=overwrite)


def write(
    path: Path | str,
    described: Mapping[str, Any],
    stored: Mapping[str, Tensor],
    *,
    overwrite: bool = True,
    narrow: torch.dtype | None = None,
) -> None:
    """Writes a file of ours: its description as JSON, its tensors by key.

    `narrow` is the dtype of averages' real tensors in the file, if not their own; raises
    `ValueError` for a value that it cannot hold.
    """
    pairs = [key for key, tensor in stored.items() if tensor.dtype == torch.complex128]
    plain = {**stored, **{key: torch.view_as_real(stored[key].resolve_conj()) for key in pairs}}
    cast = [k for k, t in plain.items() if k.startswith("averages/") and t.is_floating_point()]
    dtypes = {key: tensor.dtype for key, tensor in plain.items()} | (
        dict.fromkeys(set(cast) - set(pairs), narrow) if narrow else {}
    )
    tensorfile.write(
        path,
        {key: Form(dtypes[key], tuple(tensor.shape)) for key, tensor in plain.items()},
        lambda key: [narrowed(key, plain[key], dtypes[key])],
        {KEY: json.dumps({"format": FORMAT, _PAIRS: pairs, **described})},
        digest=True,
        overwrite=overwrite,
    )


class Stored:
    """A file of ours, its digest and its description checked: tensors by key, numbers by name.

    With `whole=False` the digest, for which all is read, is left to `require_whole`. Raises `ValueError` naming the file for a damaged one, or one of another format.
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
            self.require_whole()
        self._described = described
        self._pairs = frozenset(map(str, self.mapping(_PAIRS, list)))

    def require_whole(self) -> None:
        """Reads the file; raises `ValueError` unless it is what was written."""
        self._file.require_digest()

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


def _packed(averager: Averager | EMA) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description and the tensors by key of what is saved."""
    if isinstance(averager, EMA):
        described = {"kind": "ema", "rule": str(averager.rule), "every": averager.update_every}
        held = averager.state_dict()
        require_whole("save", held)
        return described, {f"ema/{key}": tensor for key, tensor in held.items()}
    if not isinstance(averager, Averager):
        raise TypeError(f"save: got {type(averager).__name__}, wanted a polyak.Averager or EMA")
    return packed(averager, "averager")


def packed(averager: Averager, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description and the tensors by key of an averager: its state, and what its model is like."""
    state = averager.state_dict()
    require_whole("save", {item.name: item.held() for item in averager.tracked})
    averages = state.pop("averages")
    stored = {f"copies/{name}": tensor for name, tensor in state.pop("copies").items()}
    for average, held in averages.items():
        stored |= {
            f"averages/{average}/{slot}/{name}": tensor
            for slot, tensors_of in held["slots"].items()
            for name, tensor in tensors_of.items()
        }
        random = held.get("random", {})
        stored |= {f"random/{average}/{device}": state_of for device, state_of in random.items()}
    if any(_needs_live(parse(held["rule"]), held["tick"]) for held in averages.values()):
        named = ((item.name, item.live()) for item in averager.tracked if item.policy == "average")
        stored |= {f"live/{name}": tensor.detach() for name, tensor in named}
    described = {
        name: {"rule": held["rule"], "tick": held["tick"], "slots": list(held["slots"])}
        for name, held in averages.items()
    }
    del state["format"]
    model = described_model(averager)
    described_all = {"kind": kind, "every": averager.every, **state, "averages": described}
    return {**described_all, "model": model}, stored


def described_model(averager: Averager) -> dict[str, Any]:
    """What the averaged model is like: shape, dtype, policy, other names, of all that is stored."""
    return {item.name: _described(item) for item in averager.tracked if item.policy != "live"}


def _needs_live(rule: Rule, tick: list[Any]) -> bool:
    return tick[0] > 0 and LIVE in rule.readout(as_tick(tick))


def _described(item: Tracked) -> dict[str, Any]:
    live = item.live()
    return {
        "shape": list(live.shape),
        "dtype": str(live.dtype).removeprefix("torch."),
        "policy": item.policy,
        "aliases": list(item.aliases),
    }


def state(stored: Stored) -> dict[str, Any]:
    """The state that an averager's `load_state_dict` takes, its tensors mapped from the file."""
    averages = {}
    for average, held in clocks(stored).items():
        slots = {slot: stored.under(f"averages/{average}/{slot}/") for slot in held["slots"]}
        random = stored.under(f"random/{average}/")
        averages[average] = {"rule": held["rule"], "tick": held["tick"], "slots": slots}
        averages[average] |= {"random": random} if random else {}
    numbers = {name: stored.get(name) for name in ("calls", "elapsed", "skipped")}
    numbers |= {name: stored.get(name) for name in ("run", "mixed") if stored.has(name)}
    return {"format": 1, **numbers, "copies": stored.under("copies/"), "averages": averages}


def checkpoint(stored: Stored) -> Checkpoint:
    """What a file of ours holds, as any checkpoint: averages read out by their rules."""
    kind = stored.get("kind")
    if kind == "ema":
        return _ema_checkpoint(stored)
    live = stored.under("live/")
    held = clocks(stored)
    rules = {name: parse(each["rule"]) for name, each in held.items()}
    ticks = {name: _tick(stored, each["tick"]) for name, each in held.items()}
    averages = {
        name: ReadOut(stored, name, rule, ticks[name])
        for name, rule in rules.items()
        if ticks[name].n
    }
    count = max((tick.n for tick in ticks.values()), default=0)
    dtypes = {name: getattr(torch, each["dtype"]) for name, each in stored.mapping("model").items()}
    return Checkpoint(stored.path, "polyak", live or None, averages, rules, Clock(count), dtypes)


def _ema_checkpoint(stored: Stored) -> Checkpoint:
    held = stored.under("ema/")
    parts = {
        part: {k.removeprefix(part): t for k, t in held.items() if k.startswith(part)}
        for part in ("ema_model.", "online_model.")
    }
    step = stored.tensor("ema/step")
    if step.numel() != 1 or int(step) < 0:
        raise stored.error(f"step is {step}, wanted one integer >= 0")
    average = {"average": parts["ema_model."]}
    rules = {"average": _rule(stored, stored.get("rule"))}
    clock = Clock(int(step), "calls")
    return Checkpoint(stored.path, "polyak", parts["online_model."] or None, average, rules, clock)


class ReadOut(Mapping[str, Tensor]):
    """An average of a file of ours, read out tensor by tensor: `sum of coefficient * slot`."""

    def __init__(self, stored: Stored, average: str, rule: Rule, tick: Tick) -> None:
        self._stored = stored
        self._keys = [
            ("live/" if slot == LIVE else f"averages/{average}/{slot}/", coefficient)
            for slot, coefficient in rule.readout(tick).items()
        ]
        model = stored.mapping("model")
        self._names = {alias: name for name, each in model.items() for alias in _names(name, each)}
        self._copied = {name for name, each in model.items() if each["policy"] == "copy"}

    def __getitem__(self, name: str) -> Tensor:
        first = self._names[name]
        if first in self._copied:
            return self._stored.tensor(f"copies/{first}")
        terms = [(self._stored.tensor(prefix + first), c) for prefix, c in self._keys]
        if [c for _, c in terms] == [1.0]:
            return terms[0][0]
        like = max((t for t, _ in terms), key=lambda t: t.dtype.itemsize)
        if any(tensor.shape != like.shape for tensor, _ in terms):
            raise self._stored.error(f"{name}: the slots have different shapes")
        out = torch.empty_like(like)
        tensors.combine_([out], [([tensor], c) for tensor, c in terms])
        return out

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def release(self, name: str) -> None:
        """Gives the pages of a tensor's slots back."""
        first = self._names[name]
        keys = [f"copies/{first}"] if first in self._copied else [p + first for p, _ in self._keys]
        for key in keys:
            self._stored.release(key)


def _names(name: str, described: Any) -> list[str]:
    return [name, *described["aliases"]]


def clocks(stored: Stored) -> dict[str, Any]:
    """average -> its rule, tick and slots as data, checked; the model's description too."""
    for name, each in stored.mapping("model").items():
        holds = isinstance(each, dict) and _are_names(each.get("aliases"))
        holds = holds and isinstance(getattr(torch, str(each.get("dtype")), None), torch.dtype)
        if not holds or each.get("policy") not in ("average", "copy"):
            raise stored.error(f"the header describes {name} as {each!r}")
    averages = stored.mapping("averages")
    for name, held in averages.items():
        if not isinstance(held, dict) or not _are_names(held.get("slots")):
            raise stored.error(f"average {name!r} is {held!r}, wanted rule, tick and slots")
        rule, tick = _rule(stored, held.get("rule")), _tick(stored, held.get("tick"))
        if tick.n > MOST_UPDATES or _filled(rule, tick) > len(held["slots"]):
            raise stored.error(f"average {name!r} has {tick.n} updates and too few slots for them")
    return dict(averages)


def _filled(rule: Rule, tick: Tick) -> int:
    """The slots that a window has filled, without naming them all: a file may claim any size."""
    while isinstance(rule, Tail):
        rule, tick = rule.rule, tick.inner or START
    return min(tick.n, rule.size) if isinstance(rule, Window) else 0


def _are_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _rule(stored: Stored, spec: object) -> Rule:
    try:
        return parse(spec)  # type: ignore[arg-type]  # which is what it tells
    except (ValueError, TypeError) as error:
        raise stored.error(str(error)) from None


def _tick(stored: Stored, data: object) -> Tick:
    try:
        return as_tick(data)
    except ValueError as error:
        raise stored.error(str(error)) from None
