"""Two lists of tensors exchange their contents, and no exception loses any."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from polyak._modes import no_grad
from polyak._parts import chunk_length, parts
from polyak._tensors import clones

_FAILURES = (RuntimeError, MemoryError)  # no memory, a tensor that cannot be written


def failure(action: Callable[[], object]) -> str:
    """The error of an action that fails twice: what was missing (memory) may be there by then."""
    try:
        action()
    except _FAILURES:
        try:
            action()
        except _FAILURES as error:
            return str(error) or type(error).__name__
    return ""


class _Broken(NamedTuple):
    """A chunk that is being exchanged: `kept` is what `a` held; `late` says that `b` is written to."""

    a: list[Tensor]
    b: list[Tensor]
    kept: list[Tensor]
    late: bool


class _Progress(NamedTuple):
    """Whether the pairs are exchanged, how many chunks are already the other way, and the current one."""

    exchanged: bool
    done: int = 0
    broken: _Broken | None = None


class Exchange:
    """Pairs of tensors of one dtype and device that exchange their contents, chunk by chunk.

    Only contents move: the tensors keep their memory. Temporary memory is one chunk. A call of `to`
    may end by an exception at any point, also between two lines (a signal handler may raise there).
    Another call then continues, or undoes it. `staging`, tensors like `a`, is used as the temporary
    memory of a single chunk.
    """

    def __init__(
        self,
        a: list[Tensor],
        b: list[Tensor],
        staging: list[Tensor] | None = None,
        *,
        exchanged: bool = False,
    ) -> None:
        self._a, self._b, self._staging = a, b, staging
        self._progress = _Progress(exchanged)

    @no_grad
    def to(self, exchanged: bool) -> None:
        """Makes the pairs hold each other's contents, or their own again."""
        self._settle()
        before, done, _ = self._progress
        forward = exchanged != before
        if not forward and not done:
            return
        chunks = self._chunks()
        while done < len(chunks) if forward else done > 0:
            a, b = chunks[done if forward else done - 1]
            done += 1 if forward else -1
            self._exchange(a, b, _Progress(before, done))
        if forward:
            self._progress = _Progress(exchanged)

    @no_grad
    def give_up(self) -> list[str]:
        """Copies `b` into `a` where `to` cannot bring contents back; what `a` held is lost.

        It needs no memory. Returns the errors of tensors that cannot be written either.
        """
        self._settle()
        before, done, _ = self._progress
        chunks = self._chunks()
        errors = [_copy(a, b) for a, b in (chunks[done:] if before else chunks[:done])]
        self._progress = _Progress(False)
        return [error for of_chunk in errors for error in of_chunk]

    def _chunks(self) -> list[list[list[Tensor]]]:
        """The pairs in chunks. Computed at every use: kept views would keep old memory alive."""
        if not self._a:
            return []
        if self._staging is not None:
            return [[self._a, self._b]]
        return list(parts([self._a, self._b], chunk_length([self._a[0]])))

    def _exchange(self, a: list[Tensor], b: list[Tensor], after: _Progress) -> None:
        # `_progress` says what is about to be written before it is written. So at any point `kept`
        # or the other list still holds, whole, whatever may be half written.
        if self._staging is None:
            kept = clones(a)
        else:
            kept = self._staging
            torch._foreach_copy_(kept, a)
        self._progress = self._progress._replace(broken=_Broken(a, b, kept, late=False))
        torch._foreach_copy_(a, b)
        self._progress = self._progress._replace(broken=_Broken(a, b, kept, late=True))
        torch._foreach_copy_(b, kept)
        self._progress = after  # one assignment: the chunk is done, and it is not broken

    def _settle(self) -> None:
        """Undoes a chunk that an exception interrupted."""
        broken = self._progress.broken
        if broken is None:
            return
        if broken.late:
            _copy(broken.b, broken.a)  # `a` was complete before `b` was begun
            self._progress = self._progress._replace(broken=broken._replace(late=False))
        _copy(broken.a, broken.kept)
        self._progress = self._progress._replace(broken=None)


def _copy(to: list[Tensor], contents: list[Tensor]) -> list[str]:
    """Copies all that can be copied; the errors of the rest, which then was not written before either."""
    try:
        torch._foreach_copy_(to, contents)
        return []
    except _FAILURES:
        errors = []
        for tensor, content in zip(to, contents, strict=True):
            try:
                tensor.copy_(content)
            except _FAILURES as error:
                errors.append(str(error))
        return errors
