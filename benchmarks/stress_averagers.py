"""What the stress command knows of an averager: all that it was given, and so what it must hold.

`History` is a value: a saved state keeps the history that belongs to it. The averages are read from
the slots without a call of polyak, since a call looks all tensors up anew and would hide that an
update did not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn

import polyak
from polyak._engine.tracking import Policy
from polyak.rules import Tick
from stress_models import Entry, Source, bits, entries, first_names
from stress_rules import Fault, RuleCase, Vector, coefficients, ticks, without_extrapolation

SKIP = "skip" if "skip" in get_args(Policy) else "live"
STATISTICS = ("running_mean", "running_var")
TRAINABLE = "trainable"


@dataclass(frozen=True)
class History:
    """What an averager was given: calls since the last update, and every update's time and weights."""

    calls: int = 0
    elapsed: float = 0.0
    skipped: int = 0
    times: tuple[float, ...] = ()
    path: tuple[Vector, ...] = ()
    copies: tuple[Tensor, ...] = ()
    epsilon: Vector | float = 0.0

    def called(
        self,
        elapsed: float,
        every: int,
        weights: Vector,
        copies: tuple[Tensor, ...],
        epsilon: Vector,
    ) -> History:
        """The history after a call of `update` that counts."""
        calls, span = self.calls + 1, self.elapsed + elapsed
        if self.times and calls < every:
            return replace(self, calls=calls, elapsed=span)
        times, path = (*self.times, span), (*self.path, weights)
        return History(0, 0.0, self.skipped, times, path, copies, np.maximum(self.epsilon, epsilon))

    def left_out(self, elapsed: float) -> History:
        """The history after an update that was left out: its time counts in the next."""
        return replace(self, calls=0, elapsed=self.elapsed + elapsed)


def vector(tensor: Tensor) -> Vector:
    """The values of a tensor in float64, complex ones as pairs."""
    plain = tensor.detach().resolve_conj().resolve_neg()
    real = torch.view_as_real(plain) if plain.is_complex() else plain
    flat: Vector = real.reshape(-1).double().numpy()
    return flat


def epsilons(tensors: list[Tensor], dtypes: list[torch.dtype]) -> Vector:
    """The rounding of a dtype, for each element of a tensor."""
    pairs = zip(tensors, dtypes, strict=True)
    return np.concatenate([np.full(len(vector(t)), torch.finfo(d).eps) for t, d in pairs])


def joined(tensors: list[Tensor]) -> Vector:
    return np.concatenate([vector(tensor) for tensor in tensors]) if tensors else np.zeros(0)


def rounded(values: Vector, like: list[Tensor]) -> Vector:
    """Values as tensors of these dtypes hold them."""
    parts, start = [], 0
    for tensor in like:
        real = tensor.dtype.to_real() if tensor.is_complex() else tensor.dtype
        end = start + len(vector(tensor))
        parts.append(torch.from_numpy(values[start:end]).to(real).double().numpy())
        start = end
    return np.concatenate(parts)


def selected(firsts: Mapping[str, str], select: Any) -> set[str]:
    """The first names of the tensors that an averager is asked to look at."""
    if select == TRAINABLE:
        return set(firsts.values())
    if callable(select):
        return {first for name, first in firsts.items() if select(name)}
    patterns = [select] if isinstance(select, str) else select
    return {
        first
        for name, first in firsts.items()
        for p in patterns
        if p == name or fnmatchcase(name, p)
    }


def frozen_names(found: list[Entry], options: Mapping[str, Any]) -> frozenset[str]:
    """All names of the parameters that do not train when an averager is made, unless none does."""
    firsts = first_names(found)
    parameters = {e.name for e in found if isinstance(e.tensor, nn.Parameter)}
    training = {firsts[e.name] for e in found if e.tensor.requires_grad}
    frozen = {n for n, first in firsts.items() if first in parameters and first not in training}
    whole = options["select"] != TRAINABLE or parameters <= frozen
    return frozenset() if whole else frozenset(frozen)


def policies(
    found: list[Entry],
    options: Mapping[str, Any],
    frozen: frozenset[str],
    *,
    by_storage: bool = True,
) -> dict[str, str]:
    """first name -> "average", "copy", "frozen" or left alone, as the pages say."""
    firsts, buffers = first_names(found, by_storage=by_storage), options["buffers"]
    chosen = selected(firsts, options["select"])
    given = {firsts[n]: p for n, p in buffers.items()} if isinstance(buffers, Mapping) else {}
    result = {}
    for entry in found:
        if firsts[entry.name] == entry.name:
            decided = {**dict.fromkeys(frozen, "frozen"), **given}.get(entry.name)
            result[entry.name] = (
                SKIP if entry.name not in chosen else decided or _policy(entry, buffers)
            )
    return result


def _policy(entry: Entry, buffers: Any) -> str:
    tensor = entry.tensor
    if not entry.persistent:
        return SKIP
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return "copy"
    if entry.kind != "buffer":
        return "average"
    if buffers in ("average", "copy"):
        return str(buffers)
    return "average" if entry.leaf in STATISTICS else "copy"


@dataclass(eq=False)
class Subject:
    """An averager under test, and what the program has done to it.

    `causes` are the averages that may have been spoilt since they were last set right, `tainted` those
    that have been written to where nobody can notice.
    """

    number: int
    averager: polyak.Averager
    cases: dict[str, RuleCase]
    options: dict[str, Any]
    history: History = History()
    causes: set[str] = field(default_factory=set)
    tainted: set[str] = field(default_factory=set)
    optimizer: str | None = None
    attachment: Any = None

    def bind(self, source: Source) -> Subject:
        """Notes what the model is like when the averager is made."""
        found = entries(source)
        self.frozen = frozen_names(found, self.options)
        decided = policies(found, self.options, self.frozen)
        self.averaged = [name for name, policy in decided.items() if policy == "average"]
        self.copied = [name for name, policy in decided.items() if policy == "copy"]
        stored = {*self.averaged, *self.copied}
        self.shapes = {e.name: tuple(e.tensor.shape) for e in found if e.name in stored}
        self.left_frozen = {name for name, policy in decided.items() if policy == "frozen"}
        self.firsts = first_names(found)
        self.form = form(found, self.options, self.frozen, by_storage=False)
        self.storage_form = form(found, self.options, self.frozen, by_storage=True)
        tensors = {entry.name: entry for entry in found}
        flags = [
            np.full(len(vector(tensors[name].tensor)), tensors[name].leaf in STATISTICS)
            for name in self.averaged
        ]
        self.statistics = np.concatenate(flags) if flags else np.zeros(0, dtype=bool)
        return self

    def renew(self, source: Source) -> None:
        """Makes the averager anew, with no update yet."""
        if self.attachment is not None:
            self.attachment.remove()
        self.attachment = self.optimizer = None
        self.averager = make(source, self.cases, self.options)
        self.history, self.causes, self.tainted = History(), set(), set()
        self.bind(source)

    @property
    def every(self) -> int:
        return int(self.options["every"])

    @property
    def due(self) -> bool:
        """Whether the next call of `update` updates."""
        return not self.history.times or self.history.calls + 1 >= self.every

    def tick(self, name: str) -> Tick:
        """The clock by the history."""
        return ticks(self.cases[name].rule, self.history.times)

    def readable(self) -> set[str]:
        """All names that an average has when it is read."""
        frozen = {name for name, first in self.firsts.items() if first in self.left_frozen}
        return self.carried() | frozen

    def carried(self) -> set[str]:
        """All names of what a block of this averager puts into the model."""
        stored = {*self.averaged, *self.copied}
        return {name for name, first in self.firsts.items() if first in stored}

    def weights(self, source: Source) -> Vector:
        """What the model carries now, of all that is averaged."""
        found = {entry.name: entry.tensor for entry in entries(source)}
        return joined([found[name] for name in self.averaged])

    def copies(self, source: Source) -> tuple[Tensor, ...]:
        """What the model carries now, of all that is copied."""
        found = {entry.name: entry.tensor for entry in entries(source)}
        return tuple(found[name].detach().clone() for name in self.copied)

    def slot_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of a slot that is made now, for weights of a dtype."""
        wanted: torch.dtype | None = self.options["dtype"]
        if wanted is not None:
            double = wanted == torch.float64
            wide = torch.complex128 if double else torch.complex64
            return wide if dtype.is_complex else wanted
        return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype

    def slot_dtypes(self, name: str, source: Source) -> list[torch.dtype]:
        """The dtypes of the slots, those there are or those there will be, in the order of `averaged`."""
        found = {entry.name: entry.tensor for entry in entries(source)}
        held = [tensor.dtype for tensor in next(iter(self.slots(name).values()), ())]
        return held or [self.slot_dtype(found[n].dtype) for n in self.averaged]

    def epsilon(self, source: Source) -> Vector:
        """The rounding of an update, for each element. A state may be loaded into wider slots later."""
        found = {entry.name: entry.tensor for entry in entries(source)}
        dtypes = self.slot_dtypes(next(iter(self.cases)), source)
        return epsilons([found[n] for n in self.averaged], dtypes)

    def spoilt(self, name: str) -> str:
        average = self.averager._averages[name]
        return average.damaged or next(iter(average.torn.values()), "")

    def slots(self, name: str) -> dict[str, list[Tensor]]:
        """The slots as they are, in the order of `averaged`."""
        held: dict[str, list[Tensor]] = self.averager._averages[name].slots
        order = [item.name for item in self.averager._live.averaged]
        places = [order.index(each) for each in self.averaged]
        return {slot: [tensors[i] for i in places] for slot, tensors in held.items()}

    def fingerprint(self) -> object:
        """All that a refused call must leave as it was."""
        averager = self.averager
        averages = {
            name: (
                average.tick,
                average.damaged,
                {s: list(map(bits, t)) for s, t in average.slots.items()},
            )
            for name, average in averager._averages.items()
        }
        updating = averager._updating
        clock = *updating.clock.since, updating.guard.skipped
        return averages, clock, list(map(bits, updating.copies.tensors))

    def read(self, name: str, live: Vector) -> Vector:
        """The average by its slots; terms that are all equal give themselves, infinities included."""
        rule, slots = self.cases[name].rule, self.slots(name)
        readout = rule.readout(self.tick(name))
        if missing := readout.keys() - slots.keys() - {"live"}:
            raise Fault("average", f"averager {self.number} has no slots {sorted(missing)}")
        terms = {slot: live if slot == "live" else joined(slots[slot]) for slot in readout}
        values = np.stack(list(terms.values()))
        with np.errstate(invalid="ignore", over="ignore"):
            total: Vector = np.array(list(readout.values())) @ values
        alike = (values == values[:1]).all(axis=0)
        total[alike] = values[0][alike]
        if "live" in readout:
            total[self.statistics] = terms["average"][self.statistics]
        return total

    def expected(self, name: str, live: Vector) -> tuple[Vector, Vector, Vector]:
        """profile @ trajectory; the largest value that went into each element; which are constant."""
        rule, path = self.cases[name].rule, np.stack(self.history.path)
        sampled, live_term = coefficients(rule, self.history.times)
        rows = path[sampled != 0]
        terms = sampled[sampled != 0]
        if live_term:
            rows, terms = np.concatenate([rows, live[None]]), np.append(terms, live_term)
        with np.errstate(invalid="ignore", over="ignore"):
            wanted: Vector = terms @ rows
            if live_term and self.statistics.any():
                plain = without_extrapolation(rule, self.history.times)
                wanted[self.statistics] = (plain[plain != 0] @ path[plain != 0])[self.statistics]
            if live_term:  # terms may cancel, and each is rounded
                rows = np.concatenate([path, live[None]])
                wanted[~np.isfinite(rows).all(axis=0)] = np.nan
            scale = np.abs(rows).max(axis=0) * (np.abs(terms).sum() + 2 * abs(live_term))
        constant = ((rows == rows[:1]) | (np.isnan(rows) & np.isnan(rows[:1]))).all(axis=0)
        wanted[constant] = rows[0][constant]
        return wanted, scale, constant

    def check(self, name: str, live: Vector, held: Vector | None = None) -> None:
        """The law of averages, for the slots as they are or for what a call has returned."""
        wanted, scale, constant = self.expected(name, live)
        if not self.slots(name):
            raise Fault("average", f"averager {self.number} has no slots")
        seen = self.read(name, live) if held is None else held
        like = next(iter(self.slots(name).values()))
        epsilon = np.maximum(self.history.epsilon, epsilons(like, [t.dtype for t in like]))
        with np.errstate(invalid="ignore"):
            off = (3 * len(self.history.times) + 8) * epsilon * scale + np.where(
                epsilon > 1e-4, 1e-6, 1e-13
            )
            right = (np.abs(seen - wanted) <= off) | ~np.isfinite(wanted)
        exact = constant & (rounded(wanted, like) == wanted)
        right[exact] = (seen == wanted)[exact]
        if not right.all():
            at = int(np.flatnonzero(~right)[0])
            raise Fault(
                "average",
                f"{self.cases[name].rule} of averager {self.number} after {len(self.history.times)} "
                f"updates, {self._name_of(at)}: {seen[at]:.9g}, wanted {wanted[at]:.9g}",
            )

    def _name_of(self, at: int) -> str:
        for name, tensor in zip(self.averaged, next(iter(self._any_slots().values())), strict=True):
            at -= len(vector(tensor))
            if at < 0:
                return name
        return "?"

    def _any_slots(self) -> dict[str, list[Tensor]]:
        return self.slots(next(iter(self.cases)))

    def check_copies(self, held: Mapping[str, Tensor] | None = None) -> None:
        """The law of copied tensors: those of the last update, in the dtype of the first copy."""
        if held is None:
            order = [item.name for item in self.averager._live.copied]
            held = dict(zip(order, self.averager._updating.copies.tensors, strict=False))
        for name, copy in zip(self.copied, self.history.copies, strict=False):
            if bits(held[name]) != bits(copy.to(held[name].dtype)):
                seen = f"averager {self.number}: {name} is not that of the last update"
                raise Fault("copies", seen)

    def check_clock(self) -> None:
        """The law of the clock: updates, and calls and time since the last."""
        tick, updating = self.averager.clock, self.averager._updating
        calls, elapsed = updating.clock.since
        seen = tick.n, round(tick.t, 6), calls, round(elapsed, 6)
        h = self.history
        wanted = len(h.times), round(sum(h.times), 6), h.calls, round(h.elapsed, 6)
        if seen != wanted:
            raise Fault(
                "clock",
                f"averager {self.number} is at {seen}, wanted {wanted} (n, t, calls, elapsed)",
            )


def make(
    source: Source, cases: Mapping[str, RuleCase], options: Mapping[str, Any]
) -> polyak.Averager:
    """The averager; a lone average has no name of its own."""
    rules: Any = {name: case.rule for name, case in cases.items()}
    if list(cases) == ["average"]:
        rules = cases["average"].rule
    return polyak.Averager(source, rules, **options)


def form(
    found: list[Entry], options: Mapping[str, Any], frozen: frozenset[str], *, by_storage: bool
) -> dict[str, object]:
    """What must stay as it was when an averager was made: names, shapes, policies."""
    decided = policies(found, options, frozen, by_storage=by_storage)
    shapes = {entry.name: tuple(entry.tensor.shape) for entry in found}
    left = (SKIP, "frozen")
    return {n: None if policy in left else (shapes[n], policy) for n, policy in decided.items()}
