"""Saves in the background: what a training is now is copied, and written while it goes on."""

from __future__ import annotations

import atexit
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any
from warnings import warn

import torch.distributed as dist

from polyak._ranks.agreement import alone, require_member, together
from polyak._ranks.torch_private import time_out
from polyak.checkpoints._folders import save_folder
from polyak.checkpoints._save_distributed import content_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_CALL = "save_distributed_async"


class Saving:
    """A save under way. If it fails and no one asks for its `result`, a warning says so at exit."""

    def __init__(self, future: Future[None], path: Path) -> None:
        self._future = future
        self._path = path
        self._told = False

    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._future.done()

    def result(self, timeout: float | None = None) -> None:
        """Waits until the folder is there, at most so many seconds.

        Raises what `save_distributed` raises, and `TimeoutError`.
        """
        error = self._future.exception(timeout)
        self._told = True
        if error is not None:
            raise error

    def require_told(self) -> None:
        """Waits, and raises what went wrong unless `result` has."""
        if not self._told:
            self.result()

    def warn_untold(self) -> None:
        """Waits, and warns of what no one was told."""
        if not self._told and (error := self._future.exception()) is not None:
            warn(f"{_CALL}: {self._path} was not saved: {error}", RuntimeWarning, stacklevel=2)


def save_distributed_async(
    path: Path | str,
    state: Mapping[str, Any],
    *,
    group: ProcessGroup | None = None,
    overwrite: bool = False,
) -> Saving:
    """`save_distributed` of what is now, written in the background while the training goes on.

    It copies the state to the CPU's memory, which is all that the training waits for; what is
    changed afterwards is not saved. Ranks speak over a gloo group of their own, made at the first
    call, so the training may use its group meanwhile. A second save waits for the first, and raises
    its error unless `result()` of it did. Let all saves end (`result()`) before the process group
    is destroyed.

    >>> import tempfile, torch
    >>> from polyak import Averager
    >>> weights = {"w": torch.zeros(2)}
    >>> averager = Averager(weights, "exponential(0.9)")
    >>> averager.update()
    >>> saving = save_distributed_async(Path(tempfile.mkdtemp()) / "1", {"average": averager})
    >>> averager.update()
    >>> saving.result()

    Raises at once what `save_distributed` raises of the state, and from `result()` what it raises
    of the folder.
    """
    path = Path(path).absolute()  # the process may be in another folder by then
    saver = _saver(group)
    saver.settle()
    content = content_of(_CALL, state, saver.group)
    with together(_CALL, saver.group):
        copied = _copied(content)

    def save() -> None:
        try:
            save_folder(_CALL, path, copied, group=saver.group, overwrite=overwrite)
        except Exception as error:
            if saver.group is None or dist.is_initialized():
                raise
            raise RuntimeError(
                f"{_CALL}: the process group was destroyed before {path} was saved, which is not "
                "there: wait for result() first"
            ) from error

    return saver.begin(save, path)


class _Saver:
    """The group and the thread of all background saves of some ranks; there is one save at a time."""

    def __init__(self, group: ProcessGroup | None) -> None:
        self.group = group
        self._thread = ThreadPoolExecutor(1, "polyak-save")
        self._last: Saving | None = None

    def settle(self) -> None:
        """Waits for the save before; its error is raised on all ranks, unless all have been told."""
        last, self._last = self._last, None
        if last is not None:
            with together(_CALL, self.group):
                last.require_told()

    def begin(self, save: Callable[[], None], path: Path) -> Saving:
        self._last = Saving(self._thread.submit(save), path)
        return self._last

    def warn_untold(self) -> None:
        if self._last is not None:
            self._last.warn_untold()


_SAVERS: dict[ProcessGroup | None, _Saver] = {}


@atexit.register
def _warn_untold() -> None:
    """What the last saves have come to, where a program ends without asking."""
    for saver in _SAVERS.values():
        saver.warn_untold()


def _saver(group: ProcessGroup | None) -> _Saver:
    """What saves for the ranks of a group; its first use is collective."""
    if alone():
        if None not in _SAVERS:
            _SAVERS[None] = _Saver(None)
        return _SAVERS[None]
    key = group if group is not None else dist.group.WORLD
    assert key is not None
    require_member(key)
    if key not in _SAVERS:
        # Where all ranks are here they need not meet by a name that only these would make: ranks that
        # have made unlike groups before would not find each other by it.
        alike = key is dist.group.WORLD
        own = dist.new_group(
            None if alike else dist.get_process_group_ranks(key),
            timeout=time_out(key),
            backend="gloo",
            use_local_synchronization=not alike,
        )
        _SAVERS[key] = _Saver(own)
    return _SAVERS[key]


def _copied(content: dict[str, Any]) -> dict[str, Any]:
    """A copy on the CPU."""
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

    stager = DefaultStager(
        StagingOptions(
            use_pinned_memory=False,
            use_shared_memory=False,
            use_async_staging=False,
            use_non_blocking_copy=False,
        )
    )
    try:
        copied: Any = stager.stage(content)
        return dict(copied)
    finally:
        stager.close()
