"""The swaps that are open in this process, over all averagers, and the calls that they forbid.

A *swap* is an average that is in the model for a while (`polyak._engine.swaps`). Blocks of several
averagers of one model may end in any order: the swaps above the one that ends are undone first and
made again afterwards. While a swap is open, an optimizer's step on its weights raises, and so does
an update from them.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from polyak._engine import signals
from polyak._engine.memory import meeting, of_one_storage
from polyak._engine.swaps import Owner, Swap
from polyak._engine.tracking import Tracked
from polyak._ranks.sharding import local

_P = ParamSpec("_P")
_T = TypeVar("_T")

TURN = threading.RLock()
"""The lock of every call that reads or moves weights: no other thread exchanges them meanwhile."""

OPEN: list[Swap] = []
"""The open swaps. If several are on one tensor, the model has the average of the last."""

_blocks: list[tuple[Swap, object]] = []  # the blocks that are open, in the order of entering
_late: list[tuple[Swap, object]] = []  # blocks that ended during an exchange
_hooks: list[Any] = []


def in_turn(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Lets calls wait while another thread exchanges contents, or is in a call of this kind itself."""

    @wraps(function)
    def waits(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        with TURN:
            return function(*args, **kwargs)

    return waits


def owner() -> Owner:
    """The thread and the asyncio task that call."""
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


def enter(swap: Swap, block: object) -> None:
    """Writes the average of a swap into the model, for a block. If it raises, `leave` undoes it.

    Raises `RuntimeError` if another thread or task has swapped some of the same tensors.
    """
    with TURN:
        if swap not in OPEN:
            _refuse_others(swap)
        _blocks.append((swap, block))
        _arrange(swap)


def leave(swap: Swap, block: object) -> bool:
    """Ends a block, in any position among those that are open. Returns whether the swap has ended.

    A call that an exception interrupted can be repeated.
    """
    if signals.runs_below(sys._getframe(1), {_arrange.__code__}):
        # The garbage collector closes a generator, with a block in it, during an exchange.
        _late.append((swap, block))
        return False
    with TURN:
        ended = _leave(swap, block)
        while _late:
            _leave(*_late[-1])
            _late.pop()
    return ended


def _leave(swap: Swap, block: object) -> bool:
    # Filtered and not removed: a repeated call finds its block gone.
    _blocks[:] = [each for each in _blocks if each[1] is not block]
    _arrange(swap)
    ended = all(other is not swap for other, _ in _blocks)
    if ended:
        swap.close()
    return ended


def _arrange(swap: Swap) -> None:
    """Brings a swap to its place: on top, below others, or out of `OPEN`.

    The model has the average of the block that was entered last among those that are open.
    """
    wanted = _latest()
    if swap in OPEN and wanted != OPEN:
        involved = _involved(swap, wanted)
        for each in reversed(involved):  # each took what those below had put in
            each.take_back()
        _follow(involved)
    OPEN[:] = wanted
    # A hook costs time at every step of every optimizer, so it is there only while a block is open.
    if _blocks and not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_refuse_step))
    again = [each for each in OPEN if not each.out]
    for each in again:
        each.put_in()
    _follow(again)
    if not _blocks and _hooks:
        _hooks.pop().remove()


def _follow(swaps: Sequence[Swap]) -> None:
    """Brings the contents that have changed to tensors that have left swapped memory, or replaced others."""
    if strayed := [each for each in swaps if each.strayed]:
        swapped = [tensor for each in {*OPEN, *strayed} for tensor in each.tensors]
        for each in swaps:
            each.part()
        for each in strayed:
            each.follow(swapped)


def _latest() -> list[Swap]:
    """The swaps of all open blocks, in the order in which they were entered last."""
    newest_first = dict.fromkeys(swap for swap, _ in reversed(_blocks))
    return list(reversed(newest_first))


def is_swapped(model: object) -> bool:
    """Whether a model's tensors, as they were found last, hold an average."""
    return any(swap.model is model for swap in OPEN)


def refuse_swapped(call: str, items: Sequence[Tracked]) -> None:
    """Raises `RuntimeError` if any of these tensors of a model holds an average."""
    if OPEN:  # a block may have removed some of them from the model
        refuse_parts(call, [(i.name, part) for i in items if (part := i.own()) is not None])


def refuse_parts(call: str, parts: Sequence[tuple[str, Tensor]]) -> None:
    """Raises `RuntimeError` if any of these tensors, given with their names, holds an average."""
    for swap in OPEN:
        if places := meeting([part for _, part in parts], swap.carriers()[0]):
            raise RuntimeError(
                f"{call}: {parts[places[0]][0]} has an average, in a block "
                f"applied({swap.label!r}) of {swap.owner.name}; leave that block first"
            )


def refuse_owner(call: str, swap: Swap, name: str) -> None:
    """Raises `RuntimeError` if an open swap is another thread's, or another task's."""
    mine = owner()
    tasks = {mine.task, swap.owner.task} - {None}
    if mine.thread != swap.owner.thread or len(tasks) > 1:
        raise RuntimeError(
            f"{call} in {mine.name}: {swap.owner.name} is in a block applied({swap.label!r}), and "
            f"{name} can have one average at a time. Enter the block in one thread, or "
            "use a lock"
        )


def _refuse_others(swap: Swap) -> None:
    for other in OPEN:
        call = f"applied({swap.label!r})"
        if places := of_one_storage(swap.tensors, other.tensors):
            refuse_owner(call, other, swap.names[places[0]])
        new = other.carriers()[0][len(other.tensors) :]
        if places := of_one_storage(swap.tensors, new):
            raise RuntimeError(
                f"{call}: {swap.names[places[0]]} was replaced or moved inside a block "
                f"applied({other.label!r}) of {other.owner.name}, and gets its live weight when "
                "that ends; leave that block first"
            )


def _involved(swap: Swap, wanted: list[Swap]) -> list[Swap]:
    """A swap, and those that must make way for it: on its storages, and above it now or afterwards.

    Those below make way too where tensors were replaced or moved: they may not know of these.
    """
    found = [swap]
    for each in found:  # which grows on the way
        above = [after for order in (OPEN, wanted) for after in _after(each, order)]
        for other in OPEN:
            if other not in found and _share(other, each) and (other in above or not each.same()):
                found.append(other)
    return [each for each in OPEN if each in found]


def _after(swap: Swap, order: list[Swap]) -> list[Swap]:
    return order[order.index(swap) + 1 :] if swap in order else []


def _share(a: Swap, b: Swap) -> bool:
    return bool(of_one_storage(a.tensors, b.tensors))


def _refuse_step(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """A hook before the steps of all optimizers; it is there while a block is open."""
    held = [local(p) for group in optimizer.param_groups for p in group["params"]]
    for swap in OPEN:
        tensors, names = swap.carriers()
        if places := meeting(tensors, held):
            raise RuntimeError(
                f"a step of {type(optimizer).__name__} inside applied({swap.label!r}) of "
                f"{swap.owner.name}: {names[places[0]]} has the average there, and a step "
                "would change it; leave the block first"
            )


def _reset_after_fork() -> None:
    """A child process has no thread that could end what another thread was doing in the parent."""
    TURN._at_fork_reinit()  # type: ignore[attr-defined]
    for swap in OPEN:
        swap.fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_after_fork)
