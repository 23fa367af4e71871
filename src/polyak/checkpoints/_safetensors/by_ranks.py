"""Safetensors files that all ranks write together, each its own parts of the tensors.

Every rank knows from the tensors' shapes and layouts where everything lies in the files. So if all
ranks see the files that the first rank begins, each writes its parts at their places, and no rank waits
for another. Two kinds of parts go through the first rank instead, window by window of the file: parts
that would be many short runs of bytes (columns of a matrix), and all parts if a rank does not see the
files. No rank holds more than a window beside its own parts.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from polyak._lazy import TensorSpec
from polyak._ranks.agreement import first, gathered, is_first, together
from polyak._ranks.shard_geometry import (
    Box,
    box_at,
    box_of,
    boxes,
    is_first_replica,
    runs,
    whole,
    windows,
)
from polyak._ranks.sharding import is_distributed, local
from polyak.checkpoints._safetensors.files import FileLayout, as_bytes, content, narrowed
from polyak.checkpoints._safetensors.weights import Begun, SharedFile, begun_files, totalled

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor

RUN_BYTES = 1 << 16
"""Parts whose runs in the file are shorter go through the first rank, which joins them."""

WINDOW = 1 << 22
"""The most elements that are computed, sent and held at a time: 32 MiB of the widest dtype."""

_T = TypeVar("_T")
_CALL = "export"
_NOTHING = Box((0,), (0,))


class Spread(NamedTuple):
    """A tensor's form in the file, and the tensor in the model: a DTensor, or whole on every rank."""

    form: TensorSpec
    held: Tensor


Read = Callable[[str, tuple[slice, ...]], Tensor]
"""(name, where in this rank's part of the tensor) -> the content there."""


def write_together(
    out: Path | str,
    spreads: Mapping[str, Spread],
    read: Read,
    *,
    agreed: str,
    group: ProcessGroup | None = None,
    shard_bytes: int | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> None:
    """Write tensors that are spread over ranks, as `write` of `_safetensors.weights` does those of one process.

    Collective: all ranks of the group call it with the same arguments. Only the first calls `progress`.
    `agreed` is a text that must be equal on all ranks, as the tensors' specs and layouts must be.

    Raises on all ranks: what that `write` raises, and `ValueError` if ranks disagree; then everything is
    as it was before.
    """
    specs = {name: each.form for name, each in spreads.items()}
    with together(_CALL, group):
        shares = {name: _share(name, each, group) for name, each in spreads.items()}
    total = sum(form.nbytes for form in specs.values())
    add = totalled(progress if is_first(group) else None, total)
    with begun_files(
        _CALL,
        Path(out),
        specs,
        {"what is exported": agreed} | _described(spreads),
        "export the same average from all ranks that share it (`group=`)",
        group=group,
        shard_bytes=shard_bytes,
        overwrite=overwrite,
    ) as begun:
        # If one rank does not see the files, all parts go through the first rank: all decide alike.
        seen = all(gathered(os.access(begun[0].path, os.W_OK), group))
        ranks = _Ranks(spreads, shares, read, add or (lambda _: None), seen, group)
        for each in begun:
            ranks.fill(each)


def _share(name: str, spread: Spread, group: ProcessGroup | None) -> Box:
    """The box of a tensor that this rank writes, so that each element is written once.

    Replicas may be dimensions of one mesh. They may also be meshes of their own: one mesh of tensor
    parallelism for each part of the data. Then the mesh that has the first rank writes.
    """
    if not is_distributed(spread.held):
        return whole(spread.form.shape) if is_first(group) else _NOTHING
    own = box_of(name, spread.held)
    with_first = bool((spread.held.device_mesh.mesh == first(group)).any())
    gives = is_first_replica(spread.held) and with_first
    return own if gives and own.numel else _NOTHING


def _described(spreads: Mapping[str, Spread]) -> dict[str, str]:
    """name -> form and layout, which must be equal on all ranks."""
    described = {}
    for name, (form, tensor) in spreads.items():
        described[name] = f"{form.shape} {form.dtype}"
        if is_distributed(tensor):
            spread = ", ".join(map(repr, tensor.placements))
            described[name] += f" as ({spread}) on {tuple(tensor.device_mesh.shape)} ranks"
    return described


@dataclass(frozen=True)
class _Ranks:
    """How this rank takes part: what it writes, how that is read, whether all ranks see the files."""

    spreads: Mapping[str, Spread]
    shares: Mapping[str, Box]
    read: Read
    progress: Callable[[int], object]
    seen: bool
    group: ProcessGroup | None

    def fill(self, begun: Begun) -> None:
        """Write the content of one file."""
        layout = begun.layout
        direct = [name for name in layout.starts if self._is_written_by_all(name)]
        with ExitStack() as stack:
            file: SharedFile | None = None
            with together(_CALL, self.group):
                if self.seen or is_first(self.group):
                    file = stack.enter_context(SharedFile(begun))
                written = sum(self._write_own(file, name, layout) for name in direct)
                if file is not None and written:
                    file.sync()  # each rank its own: the first rank cannot force another host's pages
            with together(_CALL, self.group):
                # What the other ranks have written, which this one has not counted.
                self.progress(sum(self.spreads[name].form.nbytes for name in direct) - written)
            for name in layout.starts:
                if name not in direct:
                    with together(_CALL, self.group):
                        self._pass(file, name, layout)

    def _is_written_by_all(self, name: str) -> bool:
        """Whether each rank writes its part of a tensor itself; the same on all ranks."""
        form, tensor = self.spreads[name]
        if not is_distributed(tensor):
            return True
        # The part at (0, ..., 0) is the largest and is known to all ranks, so that they decide alike.
        largest = box_at(tensor, [0] * tensor.device_mesh.ndim)
        # Many short writes into a shared file take longer than sending the part to one rank.
        count = next((count for _, count in runs(form.shape, largest)), 0)
        long = count == largest.numel or count * form.dtype.itemsize >= RUN_BYTES
        return self.seen and long

    def _write_own(self, file: SharedFile | None, name: str, layout: FileLayout) -> int:
        """Write this rank's part of a tensor at its places; the number of bytes written."""
        return sum(
            self._write(file, name, layout, window, self._piece(name, window))
            for window in windows(self.shares[name], WINDOW)
        )

    def _pass(self, file: SharedFile | None, name: str, layout: FileLayout) -> None:
        """Send this rank's part of a tensor to the first rank, which writes it."""
        form, tensor = self.spreads[name]
        assert is_distributed(tensor)
        share = self.shares[name]
        sent = _Sent(form, tensor, share, lambda box: self._piece(name, box), self.group)
        if is_first(self.group):
            sent.receive(lambda box, piece: self._write(file, name, layout, box, piece))
        else:
            sent.send()

    def _piece(self, name: str, box: Box) -> Tensor:
        """The content of a box within this rank's part, as it is written."""
        piece = self.read(name, box.within(self.shares[name]))
        return narrowed(name, piece, self.spreads[name].form.dtype)

    def _write(
        self, file: SharedFile | None, name: str, layout: FileLayout, box: Box, piece: Tensor
    ) -> int:
        """Write the content of a box of a tensor run by run."""
        assert file is not None
        form, data = self.spreads[name].form, content(piece)
        skip, size = 0, form.dtype.itemsize
        for start, count in runs(form.shape, box):
            run = data[skip : skip + count * size]
            skip += run.nbytes
            file.write(run, layout.starts[name] + start * size)
        self.progress(data.nbytes)
        return data.nbytes


@dataclass(frozen=True)
class _Sent:
    """A DTensor on its way to the first rank, window by window of the file.

    A rank that fails sends and receives on until the end of the tensor, since another may wait for its
    messages; only then does it raise.
    """

    form: TensorSpec
    held: DTensor
    share: Box
    piece: Callable[[Box], Tensor]
    group: ProcessGroup | None
    _attempts: _Attempts = field(default_factory=lambda: _Attempts())

    def send(self) -> None:
        """Send this rank's share to the first rank, in the order in which that expects it."""
        # In the order of the file, as the first rank asks for them: a message has no name.
        for window in windows(whole(self.form.shape), WINDOW) if self.share.numel else ():
            if (part := window.overlap(self.share)).numel:
                piece = self._attempts.run(self.piece, part)
                flat = self._blank(part) if piece is None else as_bytes(piece)
                dist.send(flat, dst=first(self.group), group=self.group)
        self._attempts.end()

    def receive(self, write: Callable[[Box, Tensor], object]) -> None:
        """Gather window after window on the first rank, and write it."""
        shares = boxes(self.held)
        # By window of the file and not by rank, so that each is written in few long runs.
        for window in windows(whole(self.form.shape), WINDOW):
            parts = {rank: window.overlap(share) for rank, share in shares.items()}
            content = self._window(window, {r: part for r, part in parts.items() if part.numel})
            self._attempts.run(write, window, content)
        self._attempts.end()

    def _window(self, window: Box, parts: dict[int, Box]) -> Tensor:
        """The content of a window, put together from the parts of the ranks."""
        me = first(self.group)
        received = {rank: self._blank(part) for rank, part in parts.items() if rank != me}
        # Asked for before this rank computes its own part, so that no rank waits for that.
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
        """Room for a part's bytes, on the device whose memory the backend sends."""
        count = part.numel * self.form.dtype.itemsize
        return torch.empty(count, dtype=torch.uint8, device=local(self.held).device)


class _Attempts:
    """Work that may fail while other ranks wait: after the first error it does nothing; `end` raises it."""

    def __init__(self) -> None:
        self._error: BaseException | None = None

    def run(self, call: Callable[..., _T], *given: Any) -> _T | None:
        if self._error is None:
            try:
                return call(*given)
            except BaseException as error:  # Ctrl-C too: other ranks wait for messages of this one
                self._error = error
        return None

    def end(self) -> None:
        if self._error is not None:
            raise self._error
