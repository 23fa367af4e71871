"""The part of a block of `applied()` in a swap, and how the block ends."""

from __future__ import annotations

from weakref import ref

from polyak._engine import open_swaps, signals
from polyak._engine.swaps import Swap

_open: set[Hold] = set()  # Python calls back only weak references that are kept


class Hold:
    """One block's part in a swap. The last block to end restores the live weights."""

    def __init__(self, block: object) -> None:
        self.swap: Swap | None = None
        # If no `__exit__` comes (an abandoned generator), the block ends with its object. `__del__`
        # would run after every block, and Python swallows a Ctrl-C that arrives in it; or in the
        # code of `weakref.finalize`, before the weights are back.
        self._rescue: ref[object] | None = ref(block, self._abandoned)
        _open.add(self)

    def end(self) -> str:
        """Ends the block. Returns what it did to weights and average; empty if it did nothing."""
        report = ""
        if self.swap is not None and open_swaps.leave(self.swap, self):
            report = self.swap.report()
        self._rescue = None
        _open.discard(self)
        return report

    @signals.critical
    def _abandoned(self, _: ref[object]) -> None:
        """Ends a block that can no longer be left. An exception raised here would be lost."""
        signals.hold()
        try:
            _end(self)
        finally:
            if not open_swaps.OPEN:
                signals.release()
            signals.send_again()


def leave(hold: Hold, error: BaseException | None) -> None:
    """Ends a block, and reports what it did to the weights: in a note on its exception, or in one."""
    try:
        report = _end(hold)
        if report and error is not None:
            error.add_note(report)
        elif report:
            raise RuntimeError(report)
    finally:
        open_swaps.hear_signals()


def _end(hold: Hold) -> str:
    try:
        return hold.end()
    except BaseException:
        hold.end()  # finishes a call that an exception interrupted
        raise
