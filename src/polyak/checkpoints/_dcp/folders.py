"""Folders of torch.distributed.checkpoint that all ranks of a group write or load together.

A folder is filled beside its place and renamed when every rank is done, so it appears complete or not at
all, and what fails on one rank fails on all. A process without a process group is a group of one.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyak._files import naming, writing_folder
from polyak._ranks.agreement import agree, alone, chosen, raise_failures, rank_of, together
from polyak._ranks.sharding import is_distributed
from polyak.checkpoints._dcp.tensors import DistributedTensors
from polyak.checkpoints._rank_checks import require_all_parts, require_stored_rightly

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.tensor import DTensor

_ALONE = ("ignore", re.compile("torch.distributed is disabled"), UserWarning, None, 0)


def save_folder(
    call: str,
    path: Path | str,
    content: Mapping[str, Any],
    *,
    group: ProcessGroup | None,
    overwrite: bool,
) -> None:
    """Write a folder of torch.distributed.checkpoint; of what several ranks have, the lowest rank's."""
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
    from torch.distributed.checkpoint.state_dict_saver import save

    with together(call, group):
        for name, tensor in _sharded(content):
            require_stored_rightly(call, name, tensor)
            require_all_parts(call, name, tensor, group)
    agree(call, {"path": str(path)}, group, "give all ranks one path, or each group its own")
    with _shared_folder(call, Path(path), overwrite, group) as folder, _plain_errors(call, group):
        save(
            dict(content),
            storage_writer=_writer(Path(path), folder),
            # Otherwise torch spreads what several ranks have over them, and buffers that differ between
            # ranks would come from several.
            planner=DefaultSavePlanner(dedup_save_to_lowest_rank=True),
            **_ranks(save, group),
        )


def load_folder(
    call: str, folder: DistributedTensors, content: dict[str, Any], *, group: ProcessGroup | None
) -> None:
    """Read a folder into the tensors of `content`, and its objects into their places.

    Objects are unpickled, which runs the code in them.
    """
    from torch.distributed.checkpoint.state_dict_loader import load

    from polyak.checkpoints._dcp.reader import FolderReader

    with _plain_errors(call, group):
        load(
            content,
            storage_reader=FolderReader(folder),
            **_ranks(load, group),
        )


def _ranks(function: Callable[..., object], group: ProcessGroup | None) -> dict[str, Any]:
    """Which ranks take part. Older versions of torch have no `no_dist`, and find out for themselves."""
    options = {"no_dist": alone(group)} if "no_dist" in signature(function).parameters else {}
    return {"process_group": group, **options}


@contextmanager
def _shared_folder(
    call: str, path: Path, overwrite: bool, group: ProcessGroup | None
) -> Iterator[Path]:
    """A folder for all ranks to fill, which appears at `path` when the block ends on all of them.

    An error of the block must be raised on all ranks: the first rank removes the folder then.
    """
    with ExitStack() as first:  # on the other ranks it stays empty

        def begin() -> Path:
            return first.enter_context(writing_folder(path, overwrite=overwrite)).absolute()

        folder = chosen(call, begin, group)
        with together(call, group):
            if not folder.is_dir():
                raise FileNotFoundError(
                    f"{call}: this rank does not see {folder}, which the first rank made: all ranks "
                    "must share the file system on which they save"
                )
        yield folder
        chosen(call, first.close, group)  # all are done: the first rank renames the folder


def _writer(path: Path, folder: Path) -> FileSystemWriter:
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.planner import SavePlan, SavePlanner

    class Writer(FileSystemWriter):
        """Writes a rank's parts. Only here can the system's errors be seen, which torch.save hides."""

        def write_data(self, plan: SavePlan, planner: SavePlanner) -> Any:
            with naming(path, folder):
                return super().write_data(plan, planner)

    return Writer(folder)


def _sharded(held: object, name: str = "") -> Iterator[tuple[str, DTensor]]:
    """The DTensors in nested mappings and lists, by their flat names."""
    if is_distributed(held):
        yield name, held
    within = held.items() if isinstance(held, Mapping) else ()
    for key, value in enumerate(held) if isinstance(held, (list, tuple)) else within:
        yield from _sharded(value, f"{name}.{key}" if name else str(key))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's warning that this process is alone.

    All threads share the filters, and `catch_warnings` sets them back for all when one thread ends.
    So each call puts in one equal filter, and takes one out.
    """
    warnings.filters.insert(0, _ALONE)  # type: ignore[attr-defined]  # a list, whatever typeshed says
    try:
        yield
    finally:
        with suppress(ValueError):  # it is gone where somebody has set the filters back meanwhile
            warnings.filters.remove(_ALONE)  # type: ignore[attr-defined]


@contextmanager
def _plain_errors(call: str, group: ProcessGroup | None) -> Iterator[None]:
    """Raise this rank's own error instead of `CheckpointException`, which `except Exception` misses.

    A rank that did not fail raises a `RuntimeError` that quotes the errors of the others.
    """
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with _quiet() if alone(group) else nullcontext():
            yield
        return
    except CheckpointException as raised:
        failures = {rank: error for rank, (error, _) in raised.failures.items()}
    if (own := failures.get(rank_of(group))) is not None:
        raise own
    raise_failures(call, {rank: f"{type(e).__name__}: {e}" for rank, e in failures.items()})
