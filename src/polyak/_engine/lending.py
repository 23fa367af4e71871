"""Lending: the loans of this process that are open now, over all averagers, and what they forbid.

A *loan* is an average that is in the model for a while (`polyak._engine.loans`). Blocks of several
averagers of one model may end in any order: the loans above the one that ends are undone first and
made again afterwards. While any is open, a step of an optimizer that has its
weights raises, and so does an update from them.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from polyak._engine import signals
from polyak._engine.loans import Loan, Owner
from polyak._engine.memory import meeting, of_one_storage
from polyak._engine.tracking import Tracked
from polyak._ranks.sharding import local

_P = ParamSpec("_P")
_T = TypeVar("_T")

TURN = threading.RLock()
"""What reads or moves weights takes turns with their exchange in another thread."""

OPEN: list[Loan] = []
"""The open loans. If several are on one tensor, the model has the average of the last."""

_blocks: list[tuple[Loan, object]] = []  # the blocks that are open, in the order of entering
_late: list[tuple[Loan, object]] = []  # blocks that ended during an exchange
_hooks: list[Any] = []


def in_turn(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Lets calls wait while another thread exchanges contents, or is in a call of this kind itself."""

    @wraps(function)
    def waits(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        with TURN:
            return function(*args, **kwargs)

    return waits


def owner() -> Owner:
    """Who is calling."""
    thread = threading.current_thread()
    asyncio: Any = sys.modules.get("asyncio")
    try:
        task = asyncio and asyncio.current_task()
    except RuntimeError:  # no event loop runs in this thread
        task = None
    name = f"thread {thread.name!r}" + (f", task {task.get_name()!r}" if task else "")
    return Owner(thread.ident or 0, id(task) if task else None, name)


def hear_signals() -> None:
    """Let the handlers that have waited run; an open block holds later ones until it ends."""
    if not OPEN:
        signals.release()
    signals.deliver()


def enter(loan: Loan, block: object) -> None:
    """Writes the average of a loan into the model, for a block. If it raises, `leave` undoes it.

    Raises `RuntimeError` if another thread or task has lent some of the same tensors.
    """
    with TURN:
        if loan not in OPEN:
            _refuse_others(loan)
        _blocks.append((loan, block))
        _arrange(loan)


def leave(loan: Loan, block: object) -> bool:
    """Ends a block, in any position among those that are open. Returns whether the loan has ended.

    A call that an exception interrupted can be repeated.
    """
    if signals.runs_below(sys._getframe(1), {_arrange.__code__}):
        # The garbage collector closes a generator, with a block in it, during an exchange.
        _late.append((loan, block))
        return False
    with TURN:
        ended = _leave(loan, block)
        while _late:
            _leave(*_late[-1])
            _late.pop()
    return ended


def _leave(loan: Loan, block: object) -> bool:
    _blocks[:] = [each for each in _blocks if each[1] is not block]
    _arrange(loan)
    ended = all(other is not loan for other, _ in _blocks)
    if ended:
        loan.close()
    return ended


def _arrange(loan: Loan) -> None:
    """Brings a loan to its place: on top, below others, or out of `OPEN`.

    The model has the average of the block that was entered last among those that are open.
    """
    wanted = _latest()
    if loan in OPEN and wanted != OPEN:
        involved = _involved(loan, wanted)
        for each in reversed(involved):
            each.take_back()
        _follow(involved)
    OPEN[:] = wanted
    if _blocks and not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_refuse_step))
    again = [each for each in OPEN if not each.out]
    for each in again:
        each.lend()
    _follow(again)
    if not _blocks and _hooks:
        _hooks.pop().remove()


def _follow(loans: Sequence[Loan]) -> None:
    """Brings the contents that have changed to tensors that have left lent memory, or replaced others."""
    if strayed := [each for each in loans if each.strayed]:
        lent = [tensor for each in {*OPEN, *strayed} for tensor in each.tensors]
        for each in loans:
            each.part()
        for each in strayed:
            each.follow(lent)


def _latest() -> list[Loan]:
    """The loans of all open blocks, in the order in which they were entered last."""
    newest_first = dict.fromkeys(loan for loan, _ in reversed(_blocks))
    return list(reversed(newest_first))


def lends(model: object) -> bool:
    """Whether a model's tensors, as they were found last, hold an average."""
    return any(loan.model is model for loan in OPEN)


def refuse_lent(call: str, items: Sequence[Tracked]) -> None:
    """Raises `RuntimeError` if any of these tensors of a model holds an average."""
    for loan in OPEN:
        # A block may have removed some of them from the model.
        found = [(item.name, part) for item in items if (part := item.own()) is not None]
        if places := meeting([part for _, part in found], loan.carriers()[0]):
            raise RuntimeError(
                f"{call}: {found[places[0]][0]} has an average, in a block "
                f"applied({loan.label!r}) of {loan.owner.name}; leave that block first"
            )


def refuse_owner(call: str, loan: Loan, name: str) -> None:
    """Raises `RuntimeError` if an open loan is another thread's, or another task's."""
    mine = owner()
    tasks = {mine.task, loan.owner.task} - {None}
    if mine.thread != loan.owner.thread or len(tasks) > 1:
        raise RuntimeError(
            f"{call} in {mine.name}: {loan.owner.name} is in a block applied({loan.label!r}), and "
            f"{name} can have one average at a time. Enter the block in one thread, or "
            "use a lock"
        )


def _refuse_others(loan: Loan) -> None:
    for other in OPEN:
        call = f"applied({loan.label!r})"
        if places := of_one_storage(loan.tensors, other.tensors):
            refuse_owner(call, other, loan.names[places[0]])
        new = other.carriers()[0][len(other.tensors) :]
        if places := of_one_storage(loan.tensors, new):
            raise RuntimeError(
                f"{call}: {loan.names[places[0]]} was replaced or moved inside a block "
                f"applied({other.label!r}) of {other.owner.name}, and gets its live weight when "
                "that ends; leave that block first"
            )


def _involved(loan: Loan, wanted: list[Loan]) -> list[Loan]:
    """A loan, and those that must make way for it: on its storages, and above it now or afterwards.

    Those below make way too where tensors were replaced or moved: they may not know of these.
    """
    found = [loan]
    for each in found:  # which grows on the way
        above = [after for order in (OPEN, wanted) for after in _after(each, order)]
        for other in OPEN:
            if other not in found and _share(other, each) and (other in above or not each.same()):
                found.append(other)
    return [each for each in OPEN if each in found]


def _after(loan: Loan, order: list[Loan]) -> list[Loan]:
    return order[order.index(loan) + 1 :] if loan in order else []


def _share(a: Loan, b: Loan) -> bool:
    return bool(of_one_storage(a.tensors, b.tensors))


def _refuse_step(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """A hook before the steps of all optimizers; it is there while a block is open."""
    held = [local(p) for group in optimizer.param_groups for p in group["params"]]
    for loan in OPEN:
        tensors, names = loan.carriers()
        if places := meeting(tensors, held):
            raise RuntimeError(
                f"a step of {type(optimizer).__name__} inside applied({loan.label!r}) of "
                f"{loan.owner.name}: {names[places[0]]} has the average there, and a step "
                "would change it; leave the block first"
            )


def _reset_after_fork() -> None:
    """A child process has no thread that could end what another thread was doing in the parent."""
    TURN._at_fork_reinit()  # type: ignore[attr-defined]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_after_fork)
