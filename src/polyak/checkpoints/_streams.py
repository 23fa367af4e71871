"""Streams: a tensor's parts pass through the first rank, window by window of the file.

No rank holds more than a window. One that fails goes on with its messages until the tensor's end, as
another may wait for them; only then does it raise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from polyak._ranks.agreement import first
from polyak._ranks.shard_geometry import Box, boxes, whole, windows
from polyak._ranks.sharding import local
from polyak.checkpoints._tensorfile import Form, as_bytes

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor

MOST = 1 << 22
"""So many elements at most are computed, sent and held at a time: 32 MiB of the widest."""

_T = TypeVar("_T")


@dataclass(frozen=True)
class Sent:
    """A DTensor on its way: its form in the file, this rank's share of it, and what is in a box of it."""

    form: Form
    held: DTensor
    share: Box
    piece: Callable[[Box], Tensor]
    group: ProcessGroup | None
    _attempts: _Attempts = field(default_factory=lambda: _Attempts())

    def send(self) -> None:
        """Sends this rank's share to the first rank, as it expects it."""
        for window in windows(whole(self.form.shape), MOST) if self.share.numel else ():
            if (part := window.overlap(self.share)).numel:
                piece = self._attempts.run(self.piece, part)
                flat = self._blank(part) if piece is None else as_bytes(piece)
                dist.send(flat, dst=first(self.group), group=self.group)
        self._attempts.end()

    def receive(self, write: Callable[[Box, Tensor], object]) -> None:
        """Gathers window by window on the first rank, and writes it."""
        shares = boxes(self.held)
        for window in windows(whole(self.form.shape), MOST):
            parts = {rank: window.overlap(share) for rank, share in shares.items()}
            content = self._window(window, {r: part for r, part in parts.items() if part.numel})
            self._attempts.run(write, window, content)
        self._attempts.end()

    def _window(self, window: Box, parts: dict[int, Box]) -> Tensor:
        """The content of a window, of which each rank has a part."""
        me = first(self.group)
        received = {rank: self._blank(part) for rank, part in parts.items() if rank != me}
        coming = [dist.irecv(flat, src=r, group=self.group) for r, flat in received.items()]
        content = torch.empty(window.shape, dtype=self.form.dtype)
        if me in parts and (own := self._attempts.run(self.piece, parts[me])) is not None:
            content[parts[me].within(window)] = own
        for work in filter(None, coming):
            work.wait()
        for rank, flat in received.items():
            part = flat.view(self.form.dtype).view(parts[rank].shape)
            content[parts[rank].within(window)] = part
        return content

    def _blank(self, part: Box) -> Tensor:
        """A message's bytes, on the device where messages come from."""
        count = part.numel * self.form.dtype.itemsize
        return torch.empty(count, dtype=torch.uint8, device=local(self.held).device)


class _Attempts:
    """What may fail while others wait: after the first error nothing is done, and `end` raises it."""

    def __init__(self) -> None:
        self._error: BaseException | None = None

    def run(self, call: Callable[..., _T], *given: Any) -> _T | None:
        if self._error is None:
            try:
                return call(*given)
            except BaseException as error:
                self._error = error
        return None

    def end(self) -> None:
        if self._error is not None:
            raise self._error
