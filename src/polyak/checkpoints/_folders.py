"""Folders: what belongs together is saved together, by one process or all ranks, and is found again.

All ranks of a group write one folder of torch.distributed.checkpoint. It is filled beside its place and
renamed when every rank is done, so it appears complete or not at all, and what fails on one rank fails
on all. A process without a process group is a group of one.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyak._checks import require, require_count
from polyak._files import naming, writing_folder
from polyak._ranks.agreement import agree, alone, chosen, raise_failures, rank_of, together
from polyak._ranks.sharding import is_distributed
from polyak._unfinished import remove
from polyak.checkpoints._dcp import DistributedTensors
from polyak.checkpoints._dcp_metadata import METADATA
from polyak.checkpoints._file_names import UNFINISHED
from polyak.checkpoints._rank_checks import require_all_parts, require_stored_rightly

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.tensor import DTensor

__all__ = ["latest", "saving"]

_FILE = re.compile(r"\.(safetensors|pt|pth|ckpt|bin)$")
_PART = re.compile(rf"{_FILE.pattern}|\.distcp$|^{re.escape(METADATA)}$")
_NUMBER = re.compile(r"(?<![\d.])\d+$")
_ALONE = ("ignore", re.compile("torch.distributed is disabled"), UserWarning, None, 0)


@contextmanager
def saving(path: Path | str, *, overwrite: bool = False, keep: int | None = None) -> Iterator[Path]:
    """Give a folder to fill; it appears at `path` when the block ends, with all its files or not at all.

    Missing parent folders are made. With `overwrite` the old folder (or file) is removed when the new
    folder is complete; through a symbolic link, the folder that it points to is replaced. An
    exception within the block leaves everything as it was.

    With `keep`, the older folders beside it are removed when the new one is complete: those whose names
    differ from its name in the number at the end only, but for the `keep` largest numbers.

    >>> import tempfile
    >>> run = Path(tempfile.mkdtemp())
    >>> for step in (8, 9, 10):
    ...     with saving(run / f"step-{step}", keep=2) as folder:
    ...         _ = (folder / "note").write_text("all of it")
    >>> sorted(each.name for each in run.iterdir())
    ['step-10', 'step-9']

    Raises `FileExistsError` if `path` exists, unless `overwrite`; `ValueError` if `keep` is not a positive
    integer, or the name has no number at its end; `OSError` if `path` is a device, a pipe or a socket, and
    if the system cannot write: the error names `path`.
    """
    path = Path(path)
    if keep is not None:
        require_count("keep", keep, "how many folders stay")
        wanted = 'a name with a number at its end, such as "step-1000"'
        require(
            _NUMBER.search(path.name) is not None, "saving with keep: the name", path.name, wanted
        )
    with writing_folder(path, overwrite=overwrite) as folder:
        yield folder
    if keep is not None:
        _remove_older(path, keep)


def _remove_older(path: Path, keep: int) -> None:
    """Remove folders named like this one but for the number, except the newest and this one."""
    alike: dict[int, Path] = {}
    for each in path.parent.iterdir():
        number = _NUMBER.search(each.name)
        same = _NUMBER.sub("", each.name) == _NUMBER.sub("", path.name)
        if number and same and each.is_dir() and not each.is_symlink():
            alike[int(number[0])] = each
    for older in [alike[number] for number in sorted(alike)[:-keep]]:
        if older != path:
            remove(older)


def latest(folder: Path | str, group: ProcessGroup | None = None) -> Path | None:
    """Find the newest checkpoint in a folder: the path whose name ends in the largest number, or None.

    Where no name ends in a number (`last.ckpt`, `best`), it is the one that was changed last. A checkpoint is
    a file named `*.safetensors`, `.pt`, `.pth`, `.ckpt` or `.bin`, or a folder: one whose name ends in a
    number, or that holds such a file or a part of torch.distributed.checkpoint. If a folder and a file have
    the same number, the folder is chosen.

    A folder of `saving` gets its name only when it is complete. An empty folder, and one of
    torch.distributed.checkpoint without its metadata, are interrupted saves: they are skipped, and a
    warning names those that are newer than the result.

    With a `group` it is collective: the first rank looks, and all ranks get the same absolute path.

    >>> import tempfile
    >>> run = Path(tempfile.mkdtemp())
    >>> for step in (900, 1000):
    ...     with saving(run / f"step-{step}") as place:
    ...         _ = (place / "note").write_text("all of it")
    >>> latest(run).name
    'step-1000'
    """
    if group is not None:
        return chosen("latest", lambda: latest(Path(folder).absolute()), group)
    saves = sorted(filter(_is_save, Path(folder).glob("*")), key=_age)
    whole = [path for path in saves if _is_complete(path)]
    torn = saves[saves.index(whole[-1]) + 1 :] if whole else saves
    if torn:
        names = ", ".join(path.name for path in torn)
        warnings.warn(
            f"latest: skipped {names} in {folder}: the save was interrupted", stacklevel=2
        )
    return whole[-1] if whole else None


def _is_save(path: Path) -> bool:
    """Whether the name, or what a folder holds, says that it is a checkpoint."""
    if path.name.startswith(".") or not path.is_dir():
        return path.is_file() and _FILE.search(path.name) is not None
    if path.suffix in UNFINISHED:
        return False
    return _number(path) is not None or any(_PART.search(each.name) for each in path.iterdir())


def _age(path: Path) -> tuple[int, float, float, str]:
    """What sorts checkpoints, the newest last: by number, before these by time."""
    number, changed, folder = _number(path), path.stat().st_mtime, path.is_dir()
    return (-1, changed, folder, path.name) if number is None else (number, folder, 0, path.name)


def _number(path: Path) -> int | None:
    """The number at the end of a checkpoint's name."""
    found = _NUMBER.search(path.name if path.is_dir() else _FILE.sub("", path.name))
    return int(found[0]) if found else None


def _is_complete(path: Path) -> bool:
    """Whether it may be whole: a file, or a folder that is neither empty nor torn."""
    if not path.is_dir():
        return True
    torn = any(path.glob("*.distcp")) and not (path / METADATA).exists()
    return any(path.iterdir()) and not torn


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

    from polyak.checkpoints._dcp_reader import FolderReader

    with _plain_errors(call, group):
        load(
            content,
            storage_reader=FolderReader(folder),
            **_ranks(load, group),
        )


def _ranks(function: Callable[..., object], group: ProcessGroup | None) -> dict[str, Any]:
    """Which ranks take part. Older versions of torch have no `no_dist`, and find out for themselves."""
    told = {"no_dist": alone(group)} if "no_dist" in signature(function).parameters else {}
    return {"process_group": group, **told}


@contextmanager
def _shared_folder(
    call: str, path: Path, overwrite: bool, group: ProcessGroup | None
) -> Iterator[Path]:
    """A folder for all ranks to fill, which appears at `path` when the block ends on all of them.

    An error of the block must be raised on all ranks: the first rank removes the folder then.
    """
    with ExitStack() as first:  # on the other ranks it stays empty

        def begin() -> Path:
            writing = saving(path, overwrite=overwrite)
            return first.enter_context(writing).absolute()

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
