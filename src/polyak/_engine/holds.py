"""Holds: what the blocks of `applied()` have of a loan, and how each of them ends."""

from __future__ import annotations

from weakref import ref

from polyak._engine import lending, signals
from polyak._engine.loans import Loan

_open: set[Hold] = set()  # Python calls only those weak references back that someone keeps


class Hold:
    """What one block has of a loan. The last block to end gives the model its live weights back."""

    def __init__(self, block: object) -> None:
        self.loan: Loan | None = None
        # If no `__exit__` comes (an abandoned generator), the block ends with its object. `__del__`
        # would run after every block, and Python swallows a Ctrl-C that arrives in it; or in the
        # code of `weakref.finalize`, before the weights are back.
        self._rescue: ref[object] | None = ref(block, self._abandoned)
        _open.add(self)

    def end(self) -> str:
        """Ends the block. Returns what it did to weights and average; empty if it did nothing."""
        report = ""
        if self.loan is not None and lending.leave(self.loan, self):
            report = self.loan.report()
        self._rescue = None
        _open.discard(self)
        return report

    @signals.critical
    def _abandoned(self, _: ref[object]) -> None:
        """Ends a block that no one can leave any more. No one would hear an exception from here."""
        signals.hold()
        try:
            _end(self)
        finally:
            if not lending.OPEN:
                signals.release()
            signals.send_again()


def leave(hold: Hold, error: BaseException | None) -> None:
    """Ends a block, and tells what it did to the weights: in a note on its exception, or by one."""
    try:
        report = _end(hold)
        if report and error is not None:
            error.add_note(report)
        elif report:
            raise RuntimeError(report)
    finally:
        lending.hear_signals()


def _end(hold: Hold) -> str:
    try:
        return hold.end()
    except BaseException:
        hold.end()  # finishes what an exception has broken off
        raise
