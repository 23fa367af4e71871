"""Slabs: safetensors files that all ranks write together, each the parts of tensors that it holds.

Every rank knows from the tensors' shapes and layouts where everything lies in the files. So where all
ranks see the files that the first one begins, each writes its own parts at their places, and none
waits for another. Parts that would be many short runs of bytes (columns of a matrix), and all parts
where a rank does not see the files, pass through the first rank (`polyak.checkpoints._sharded_export`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from polyak import _files as files
from polyak._ranks.agreement import agree, chosen, first, gathered, is_first, together
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
from polyak.checkpoints._tensorfile import Form, Layout, as_bytes, content, layout, narrowed
from polyak.checkpoints._writing import INDEX, METADATA, arranged, index, totalled

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor

RUN_BYTES = 1 << 16
"""Parts whose runs in the file are shorter pass through the first rank, which joins them."""

_CALL = "export"
_NOTHING = Box((0,), (0,))


class Spread(NamedTuple):
    """A tensor's form in the file, and the tensor as it is held: a DTensor, or whole on every rank."""

    form: Form
    held: Tensor


Read = Callable[[str, tuple[slice, ...]], Tensor]
"""(name, where in this rank's part of it) -> what is there."""


def write(
    out: Path | str,
    spreads: Mapping[str, Spread],
    read: Read,
    *,
    told: str,
    group: ProcessGroup | None = None,
    shard_bytes: int | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> None:
    """Writes tensors that are spread over ranks, as `writing.write` does those of one process.

    Collective: all ranks of the group call it, alike. The first alone tells `progress`. `told` is what ranks must agree in besides the tensors' forms.

    Raises, on all ranks, what `writing.write` raises, and `ValueError` where ranks disagree; then
    what was there before still is.
    """
    out = Path(out)
    with together(_CALL, group):
        forms = {name: each.form for name, each in spreads.items()}
        within = arranged(out, forms, shard_bytes)
        layouts = [layout(held, METADATA) for held in within.values()]
        shares = {name: _share(name, each, group) for name, each in spreads.items()}
    agree(
        _CALL,
        {"path": str(out), "what is exported": f"{told}, shard_bytes={shard_bytes}"}
        | _described(spreads),
        group,
        "export the same average from all ranks that share it (`group=`)",
    )
    total = sum(form.nbytes for form in forms.values())
    add = totalled(progress if is_first(group) else None, total)
    with ExitStack() as stack:
        places = chosen(
            _CALL, lambda: begin(stack, out, within, layouts, shard_bytes, overwrite), group
        )
        seen = all(gathered(os.access(places[0], os.W_OK), group))
        ranks = _Ranks(spreads, shares, read, add or (lambda _: None), seen, group)
        for place, each in zip(places, layouts, strict=True):
            ranks.fill(place, each)
        with together(_CALL, group):
            stack.close()


def _share(name: str, spread: Spread, group: ProcessGroup | None) -> Box:
    """What of a tensor this rank has to give: of replicas, those with the first rank give.

    They may be of one mesh, or of several: one of tensor parallelism for each part of the data.
    """
    if not is_distributed(spread.held):
        return whole(spread.form.shape) if is_first(group) else _NOTHING
    own = box_of(name, spread.held)
    with_first = bool((spread.held.device_mesh.mesh == first(group)).any())
    gives = is_first_replica(spread.held) and with_first
    return own if gives and own.numel else _NOTHING


def _described(spreads: Mapping[str, Spread]) -> dict[str, str]:
    """name -> form and layout, in which ranks must agree."""
    described = {}
    for name, (form, held) in spreads.items():
        described[name] = f"{form.shape} {form.dtype}"
        if is_distributed(held):
            spread = ", ".join(map(repr, held.placements))
            described[name] += f" as ({spread}) on {tuple(held.device_mesh.shape)} ranks"
    return described


def begin(
    stack: ExitStack,
    out: Path,
    within: Mapping[str, Mapping[str, Form]],
    layouts: list[Layout],
    shard_bytes: int | None,
    overwrite: bool,
) -> list[str]:
    """Where files can be filled until the stack is closed: hidden, with their headers and sizes."""
    out = out.absolute()  # other ranks may be in another folder
    if shard_bytes is None:
        places = [Path(stack.enter_context(files.writing(out, overwrite=overwrite)).name)]
    else:
        folder = stack.enter_context(files.writing_folder(out, overwrite=overwrite))
        places = [folder / name for name in within]
        (folder / INDEX).write_text(index(within))
    for place, each in zip(places, layouts, strict=True):
        place.write_bytes(each.header)
        os.truncate(place, each.nbytes)
    return list(map(str, places))


@dataclass(frozen=True)
class _Ranks:
    """The ranks at work: what this one gives, how it is read, whether all write to the files."""

    spreads: Mapping[str, Spread]
    shares: Mapping[str, Box]
    read: Read
    told: Callable[[int], object]
    seen: bool
    group: ProcessGroup | None

    def fill(self, place: str, layout: Layout) -> None:
        """Writes the content of one file."""
        direct = [name for name in layout.starts if self._is_written_by_all(name)]
        with ExitStack() as stack:
            with together(_CALL, self.group):
                writes = self.seen or is_first(self.group)
                handle = stack.enter_context(opened(place) if writes else nullcontext(-1))
                written = sum(self._write_own(handle, name, layout) for name in direct)
                os.fsync(handle) if written else None
            with together(_CALL, self.group):
                self.told(sum(self.spreads[name].form.nbytes for name in direct) - written)
            for name in layout.starts:
                if name not in direct:
                    with together(_CALL, self.group):
                        self._pass(handle, name, layout)

    def _is_written_by_all(self, name: str) -> bool:
        """Whether each rank writes its part of a tensor itself; all ranks find the same."""
        form, held = self.spreads[name]
        if not is_distributed(held):
            return True
        largest = box_at(held, [0] * held.device_mesh.ndim)
        count = next((count for _, count in runs(form.shape, largest)), 0)
        long = count == largest.numel or count * form.dtype.itemsize >= RUN_BYTES
        return self.seen and long

    def _write_own(self, handle: int, name: str, layout: Layout) -> int:
        """Writes this rank's part of a tensor at its places; how many bytes that were."""
        return sum(
            self._write(handle, name, layout, window, self._piece(name, window))
            for window in windows(self.shares[name], WINDOW)
        )

    def _pass(self, handle: int, name: str, layout: Layout) -> None:
        """This rank's part of a tensor goes to the first rank, which writes it."""
        form, held = self.spreads[name]
        assert is_distributed(held)
        share = self.shares[name]
        sent = Sent(form, held, share, lambda box: self._piece(name, box), self.group)
        if is_first(self.group):
            sent.receive(lambda box, piece: self._write(handle, name, layout, box, piece))
        else:
            sent.send()

    def _piece(self, name: str, box: Box) -> Tensor:
        """The content of a box of this rank's part, as it is written."""
        piece = self.read(name, box.within(self.shares[name]))
        return narrowed(name, piece, self.spreads[name].form.dtype)

    def _write(self, handle: int, name: str, layout: Layout, box: Box, piece: Tensor) -> int:
        """Writes the content of a box of a tensor run by run."""
        form, held = self.spreads[name].form, content(piece)
        skip, size = 0, form.dtype.itemsize
        for start, count in runs(form.shape, box):
            run = held[skip : skip + count * size]
            skip += run.nbytes
            write_at(handle, run, layout.starts[name] + start * size)
        self.told(held.nbytes)
        return held.nbytes


@contextmanager
def opened(place: str) -> Iterator[int]:
    """A file to write at places."""
    handle = os.open(place, os.O_WRONLY | os.O_CLOEXEC)
    try:
        yield handle
    finally:
        os.close(handle)


def write_at(handle: int, held: memoryview, place: int) -> None:
    """Writes all of it at a place of a file."""
    while held:
        count = os.pwrite(handle, held, place)
        held, place = held[count:], place + count


WINDOW = 1 << 22
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
        for window in windows(whole(self.form.shape), WINDOW) if self.share.numel else ():
            if (part := window.overlap(self.share)).numel:
                piece = self._attempts.run(self.piece, part)
                flat = self._blank(part) if piece is None else as_bytes(piece)
                dist.send(flat, dst=first(self.group), group=self.group)
        self._attempts.end()

    def receive(self, write: Callable[[Box, Tensor], object]) -> None:
        """Gathers window by window on the first rank, and writes it."""
        shares = boxes(self.held)
        for window in windows(whole(self.form.shape), WINDOW):
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
