"""Dividing: weights that are computed by several ranks, each its share, into the files of one.

For what takes one process too long. No rank waits for another but at the beginning and at the end.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from polyak._ranks.agreement import agree, chosen, together
from polyak.checkpoints._sharded_export import begin, opened, write_at
from polyak.checkpoints._tensorfile import Form, Layout, Pieces, content, layout
from polyak.checkpoints._writing import METADATA, arranged

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_CALL = "write"


def write(
    out: Path | str,
    forms: Mapping[str, Form],
    pieces: Pieces,
    *,
    told: Mapping[str, str],
    group: ProcessGroup,
    shard_bytes: int | None = None,
    overwrite: bool = False,
) -> None:
    """Writes what `writing.write` writes, every rank of the group the tensors that are its share.

    Collective. `told` is what ranks must agree in beside the tensors' forms. Raises as it does, and
    on all ranks what is raised on one: then what was there before still is.
    """
    out = Path(out)
    with together(_CALL, group):
        within = arranged(out, forms, shard_bytes)
        layouts = [layout(held, METADATA) for held in within.values()]
    described = {name: f"{form.shape} {form.dtype}" for name, form in forms.items()}
    wanted = "give all ranks the same files and options"
    agree(_CALL, {**told, "shard_bytes": shard_bytes, **described}, group, wanted)
    with ExitStack() as stack:
        begun = chosen(
            _CALL, lambda: begin(stack, out, within, layouts, shard_bytes, overwrite), group
        )
        with together(_CALL, group):
            mine = shares(forms, dist.get_world_size(group))[dist.get_rank(group)]
            for file, each in zip(begun, layouts, strict=True):
                _fill(file, each, [name for name in each.starts if name in mine], pieces)
        with together(_CALL, group):
            stack.close()


def shares(forms: Mapping[str, Form], ranks: int) -> list[set[str]]:
    """The tensors of each rank: the largest first, each to the rank that has the fewest bytes.

    >>> import torch
    >>> forms = {name: Form(torch.int8, (size,)) for name, size in (("a", 1), ("b", 3), ("c", 3))}
    >>> [sorted(share) for share in shares(forms, 2)]
    [['a', 'b'], ['c']]
    """
    found: list[set[str]] = [set() for _ in range(ranks)]
    nbytes = [0] * ranks
    for name in sorted(forms, key=lambda name: -forms[name].nbytes):
        least = nbytes.index(min(nbytes))
        found[least].add(name)
        nbytes[least] += forms[name].nbytes
    return found


def _fill(file: str, layout: Layout, own: Iterable[str], pieces: Pieces) -> None:
    """Writes some tensors of a file at their places."""
    with opened(file) as handle:
        for name in own:
            place = layout.starts[name]
            for piece in pieces(name):
                held = content(piece)
                write_at(handle, held, place)
                place += held.nbytes
        os.fsync(handle)
