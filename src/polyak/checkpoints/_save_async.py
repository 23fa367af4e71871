"""Save a training in the background: its state is copied, and written while the training continues."""

from __future__ import annotations

import atexit
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any
from warnings import warn

import torch
import torch.distributed as dist

from polyak._ranks.agreement import alone, require_member, together
from polyak._ranks.torch_private import time_out
from polyak.checkpoints._dcp.folders import save_folder
from polyak.checkpoints._save_distributed import content_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_CALL = "save_distributed_async"


class Saving:
    """A save in progress. If it fails and `result` is never called, a warning says so at exit."""

    def __init__(self, future: Future[None], path: Path) -> None:
        self._future = future
        self._path = path
        self._reported = False

    def done(self) -> bool:
        """Whether the save has ended, with or without an error."""
        return self._future.done()

    def result(self, timeout: float | None = None) -> None:
        """Wait until the folder is there, for at most `timeout` seconds.

        Raises what `save_distributed` raises, and `TimeoutError`.
        """
        error = self._future.exception(timeout)
        self._reported = True
        if error is not None:
            raise error

    def require_reported(self) -> None:
        """Wait, and raise the error unless `result` has raised it."""
        if not self._reported:
            self.result()

    def warn_unreported(self) -> None:
        """Wait, and warn of an error that `result` has not raised."""
        if not self._reported and (error := self._future.exception()) is not None:
            warn(f"{_CALL}: {self._path} was not saved: {error}", RuntimeWarning, stacklevel=2)


def save_distributed_async(
    path: Path | str,
    state: Mapping[str, Any],
    *,
    group: ProcessGroup | None = None,
    overwrite: bool = False,
) -> Saving:
    """Save as `save_distributed` does, in the background, while training continues.

    The training only waits until the state is copied to the memory of the CPU; changes after that are
    not saved. The ranks communicate over a gloo group of their own, which the first call makes, so the
    training may use its group meanwhile. A second save waits for the first, and raises the first one's
    error unless its `result()` did. Wait for all saves (`result()`) before you destroy the process group.

    >>> import tempfile, torch
    >>> from polyak import Averager
    >>> weights = {"w": torch.zeros(2)}
    >>> averager = Averager(weights, "exponential(0.9)")
    >>> averager.update()
    >>> saving = save_distributed_async(Path(tempfile.mkdtemp()) / "1", {"average": averager})
    >>> averager.update()
    >>> saving.result()

    Errors of the state are raised at once, as `save_distributed` raises them; errors of the folder are
    raised by `result()`.
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
                f"{_CALL}: the process group was destroyed before {path} was saved, so nothing was "
                "saved: call result() first"
            ) from error

    return saver.begin(save, path)


class _Saver:
    """The gloo group and the thread of the background saves of one group; one save runs at a time."""

    def __init__(self, group: ProcessGroup | None) -> None:
        self.group = group
        self._thread = ThreadPoolExecutor(1, "polyak-save")
        self._last: Saving | None = None

    def settle(self) -> None:
        """Wait for the previous save; its error is raised on all ranks, unless each has raised it before."""
        last, self._last = self._last, None
        if last is not None:
            with together(_CALL, self.group):
                last.require_reported()

    def begin(self, save: Callable[[], None], path: Path) -> Saving:
        self._last = Saving(self._thread.submit(save), path)
        return self._last

    def warn_unreported(self) -> None:
        if self._last is not None:
            self._last.warn_unreported()


_SAVERS: dict[ProcessGroup | None, _Saver] = {}


@atexit.register
def _warn_unreported() -> None:
    """Report a failed last save if the program ends without asking for its result."""
    for saver in _SAVERS.values():
        saver.warn_unreported()


def _saver(group: ProcessGroup | None) -> _Saver:
    """The saver of a group. Its first use is collective."""
    if alone():
        if None not in _SAVERS:
            _SAVERS[None] = _Saver(None)
        return _SAVERS[None]
    key = group if group is not None else dist.group.WORLD
    assert key is not None
    require_member(key)
    if key not in _SAVERS:
        # Members of a smaller group make theirs without the other ranks ("local synchronization"), and
        # find each other by a name made from how many such groups each has made. Ranks may differ in
        # that, so where all ranks take part the usual way is used.
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
    """A copy in the memory of the CPU."""
    try:
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
    except ImportError:
        raise RuntimeError(
            f"{_CALL}: torch {torch.__version__} cannot copy a state to memory (torch 2.9 can): "
            "call save_distributed, for which the training waits"
        ) from None

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
