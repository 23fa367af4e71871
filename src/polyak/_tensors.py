"""The few in-place operations that averaging needs, on lists of plain tensors.

This module knows no rule, no slot name and no model. Names that end in `_` write in place. All
operations are elementwise, so the layout, shape and device of a tensor never change the result.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.compiler import is_compiling

from polyak._dtypes import Kind, kind
from polyak._modes import InferenceMode, no_grad
from polyak._parts import DEVICE_CHUNK_BYTES, Stages, chunk_length, parts

Groups = list[list[Tensor]]
Lerps = list[tuple[list[Tensor], float]]
"""Lists of slots, each with the fraction by which it moves."""


SHARED_BYTES = 1 << 22
"""The bytes of weights that are moved into every average before the next weights are read."""

FEW = 8
"""Up to this many tensors, one call for all averages costs less than a call for each average."""


class Journal:
    """The writes of a pass over tensors, so that an exception may break the pass off between any two lines.

    A signal handler may raise there, but not within a call of torch. The next pass leaves out what is
    written. It must come to the same writes in the same order.
    """

    # Attributes of the class until they are set, since every update makes a journal.
    lost = False
    """Whether a call of torch has failed when it may have moved some of its tensors."""
    _at = _done = 0
    _last: tuple[int, Tensor | None, int] = 0, None, 0
    """The last write begun: its number, its first tensor, and the version of that before it."""
    _pending: tuple[int, Copies] = 0, []

    @property
    def begun(self) -> bool:
        """Whether any write has begun."""
        return self._last[0] > 0 or self._pending[0] > 0

    def begin(self, tensor: Tensor) -> bool:
        """Whether a write by one call, whose first tensor this is, is still to be made."""
        at = self._at = self._at + 1
        if at <= self._done:
            return False
        self._last = at, tensor, tensor._version
        return True

    def copy_(self, copies: Copies) -> None:
        """Writes contents that were computed of what they replace. Nothing is lost if it stops halfway."""
        self._at += 1
        if self._at > self._done:
            self._pending = self._at, copies
            _copy_all_(copies)
            self.end()

    def end(self) -> None:
        """Notes that the write which began last is made."""
        self._last = self._at, None, 0
        self._pending = 0, []
        self.lost = False

    def again(self) -> None:
        """Begins the next pass; raises `RuntimeError` where a call has moved some of its tensors."""
        if self.lost:
            raise RuntimeError("a call of torch changed some tensors and not others")
        number, tensor, version = self._last
        written = tensor is None or tensor._version != version
        pending, copies = self._pending
        _copy_all_(copies)
        self._done = max(self._done, pending, number if written else number - 1)
        self._at = 0


Copies = list[tuple[list[Tensor], list[Tensor]]]
"""Tensors, and what is to be written into them."""


@no_grad
def _copy_all_(copies: Copies) -> None:
    for tensors, contents in copies:
        torch._foreach_copy_(tensors, contents)


def lerp_(slots: list[Tensor], live: list[Tensor], fraction: float) -> None:
    """`slot <- slot + fraction (live - slot)` for each pair; dtypes and devices may differ.

    A fraction of 1 copies, because a lerp by 1 into a slot that holds inf or NaN gives NaN. 0 is not a fraction:
    `polyak._engine.moving` leaves such moves out.
    lerp and not multiply and add: a constant input then stays the same, bit for bit; only -0.0 may
    become 0.0.
    """
    lerp_all_([slots], live, [fraction])


def lerp_all_(
    averages: list[list[Tensor]],
    live: list[Tensor],
    fractions: list[float],
    stages: Stages | None = None,
    group: int = 0,
    journal: Journal | None = None,
) -> None:
    """`lerp_` of several lists of slots towards the same weights, which are read from memory once.

    Each list has one dtype and one device. k lists move 1 + 2k times the bytes of the weights
    instead of 3k. `stages` keeps what the next call with lists of the same shapes can use again,
    under the number of the group. A pass that was broken off is repeated with its `journal`.
    """
    # Not `no_grad`, under which torch still walks through the lists for autograd: a fifth of the time of
    # many small tensors. Tensors stay ordinary ones, and their versions count. As `_modes.inference`,
    # without the call: every update runs this.
    inference = torch.inference_mode if is_compiling() else InferenceMode
    with inference(True):
        lerps = []
        for slots, fraction in zip(averages, fractions, strict=True):
            if fraction == 1:
                if journal is None or journal.begin(slots[0]):
                    torch._foreach_copy_(slots, live)
            else:
                lerps.append((slots, fraction))
        for slots, _ in lerps:  # each list is of one kind, so its first tensor tells for all
            if slots[0].dtype != live[0].dtype or slots[0].device != live[0].device:
                stages = Stages() if stages is None else stages
                _lerp_staged_(lerps, live, stages, group, journal)
                return
        if len(lerps) == 1:
            _lerp_alike_(lerps[0][0], live, lerps[0][1], journal)
        elif lerps:
            _lerp_together_(lerps, live, journal)


def _lerp_together_(lerps: Lerps, live: list[Tensor], journal: Journal | None) -> None:
    """Several averages in the weights' own dtype: weights are read as long as they stay in the cache."""
    length = (SHARED_BYTES if live[0].is_cpu else DEVICE_CHUNK_BYTES) // live[0].element_size()
    columns = [slots for slots, _ in lerps]
    whole = sum(map(Tensor.numel, live)) <= length
    for weights, *rows in [[live, *columns]] if whole else parts([live, *columns], length):
        if len(weights) > FEW:
            for slots, (_, fraction) in zip(rows, lerps, strict=True):
                _lerp_alike_(slots, weights, fraction, journal)
        else:
            fractions = [fraction for _, fraction in lerps for _ in weights]
            all_slots = [slot for slots in rows for slot in slots]
            _lerp_alike_(all_slots, weights * len(rows), fractions, journal)


def _lerp_alike_(
    slots: list[Tensor],
    live: list[Tensor],
    fraction: float | list[float],
    journal: Journal | None,
) -> None:
    """One foreach call. It stops at a tensor of another dtype or device: from there on they move one by one."""
    if journal is not None and not journal.begin(slots[0]):
        return
    try:
        torch._foreach_lerp_(slots, live, fraction)
    except RuntimeError as error:
        if error.__traceback__ is not None and error.__traceback__.tb_next is not None:
            raise  # it is of a signal handler, whose frame is in the traceback: torch's has none
        if journal is not None:
            journal.lost = True
        alike = [kind(a) == kind(b) for a, b in zip(slots, live, strict=True)]
        if all(alike):
            raise
        first = alike.index(
            False
        )  # the call goes through the lists in order: it moved those before
        fractions = fraction if isinstance(fraction, list) else [fraction] * len(slots)
        rest = zip(slots[first:], live[first:], fractions[first:], strict=True)
        for slot, weight, each in rest:
            _lerp_staged_([([slot], each)], [weight], Stages(), 0, None)
        if journal is not None:
            journal.end()


def _lerp_staged_(
    lerps: Lerps, live: list[Tensor], stages: Stages, group: int, journal: Journal | None
) -> None:
    """Slots of another dtype or device: each part of the weights is converted once for all of them."""
    by_kind: dict[Kind, Lerps] = {}
    for slots, fraction in lerps:
        by_kind.setdefault(kind(slots[0]), []).append((slots, fraction))
    for alike in by_kind.values():
        columns = [slots for slots, _ in alike]
        length = chunk_length([live[0], columns[0][0]])
        for weights, *rows in stages.of(group, columns[0], length).parts(live, columns):
            for slots, (_, fraction) in zip(rows, alike, strict=True):
                _lerp_alike_(slots, weights, fraction, journal)


@no_grad
def combine_(out: list[Tensor], terms: list[tuple[list[Tensor], float]]) -> None:
    """`out <- sum of coefficient * tensor`, for coefficients that sum to 1.

    Lerps, `out <- out + c / (sum of c so far) (tensor - out)`, give the value itself, bit for bit,
    if all terms are equal, infinities too. Coefficients above 0 come first, so that no sum so far
    is 0.
    """
    total = 0.0
    counting = [term for term in terms if term[1] != 0]
    places: list[int] = []
    for i, (tensors, coefficient) in enumerate(sorted(counting, key=lambda term: term[1] < 0)):
        if i == 1:
            places = infinite(out)
        total += coefficient
        at = [out[j] for j in places], [tensors[j] for j in places]
        kept = equal_infinities(*at) if places else []
        lerp_(out, tensors, coefficient / total)
        if kept:
            keep_(kept)


Kept = list[tuple[Tensor, Tensor, Tensor]]
"""Slots, where they hold the same infinities as the weights (a mask), and the weights' values."""


@no_grad
def infinite(tensors: Sequence[Tensor]) -> list[int]:
    """The positions of the tensors that hold an infinity, or NaN; one read, and one wait for it."""
    held = [(i, tensor) for i, tensor in enumerate(tensors) if tensor.numel()]
    plain = [torch.view_as_real(t) if t.is_complex() else t for _, t in held]
    wide = [t.float() if t.element_size() == 1 else t for t in plain]  # a byte has no norm
    if not wide:
        return []
    largest = torch._foreach_norm(wide, ord=torch.inf)
    device = largest[0].device
    finite = torch.stack([norm.isfinite().to(device) for norm in largest]).tolist()
    return [i for (i, _), is_finite in zip(held, finite, strict=True) if not is_finite]


@no_grad
def equal_infinities(slots: Sequence[Tensor], live: Sequence[Tensor]) -> Kept:
    """Where slots and weights hold the same infinity before a lerp, which makes `inf - inf` of it."""
    alike = [weight.to(slot.device, slot.dtype) for slot, weight in zip(slots, live, strict=True)]
    pairs = zip(slots, alike, strict=True)
    return [(slot, slot.isinf() & (slot == weight), weight) for slot, weight in pairs]


@no_grad
def keep_(kept: Kept) -> None:
    """Gives slots, after a lerp, the infinities that they shared with the weights."""
    for slot, same, weight in kept:
        slot.copy_(torch.where(same, weight, slot))


@no_grad
def kept(before: list[Tensor] | None, now: list[Tensor]) -> list[Tensor]:
    """The contents of `now` in the memory of `before`, if that has the same shapes, dtypes and devices."""
    if not before or _forms(before) != _forms(now):
        return now
    lerp_(before, now, 1.0)
    return before


def _forms(tensors: Sequence[Tensor]) -> list[tuple[torch.Size, Kind]]:
    return [(tensor.shape, kind(tensor)) for tensor in tensors]


def clones(tensors: list[Tensor]) -> list[Tensor]:
    """A clone of each tensor, in one call where torch has one for it (since 2.8)."""
    if hasattr(torch, "_foreach_clone"):
        return list(torch._foreach_clone(tensors))
    return [tensor.clone() for tensor in tensors]


def versions(tensors: Sequence[Tensor]) -> list[int]:
    """How often autograd has seen each tensor written to."""
    return [tensor._version for tensor in tensors]


def set_versions(tensors: Sequence[Tensor], wanted: Sequence[int]) -> None:
    """Sets what `versions` gives: a graph that has saved a tensor at another version is refused."""
    if _ONE_AT_A_TIME:
        for tensor, version in zip(tensors, wanted, strict=True):
            _set_version(tensor, version)  # type: ignore[arg-type]
    else:
        _set_version(tuple(tensors), tuple(wanted))


_set_version = torch._C._autograd._unsafe_set_version_counter
# torch 2.6 takes one tensor; all versions since 2.7 take several.
_ONE_AT_A_TIME = "arg0: torch.Tensor" in str(_set_version.__doc__)
