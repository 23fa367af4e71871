"""Updates that must not count, which a device knows before the host does.

That a scaler skipped a step, or that weights are not finite, is known on the device first. The update
is masked there at once. The host learns the result at the next call and rolls the counters back: it
waits at most for the update before, so it runs at most one step ahead. On the CPU it learns
the result at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from polyak._checks import listed, require
from polyak._engine.clock import Moment, UpdateClock
from polyak._engine.live import ModelTensors
from polyak._tensors import Groups

Nonfinite = Literal["allow", "skip", "error"]


class Verdict:
    """A bool computed on a device; `ask` waits only until its copy has reached the host."""

    def __init__(self, yes: Tensor) -> None:
        self.yes = yes
        self._host, self._event = yes, None
        if yes.device.type == "cuda":
            self._host = torch.empty((), dtype=torch.bool, pin_memory=True)
            with torch.cuda.device(yes.device):
                self._host.copy_(yes, non_blocking=True)
                self._event = torch.cuda.Event()
                self._event.record()

    def ask(self) -> bool:
        """The answer."""
        if self._event is not None:
            self._event.synchronize()
        return bool(self._host)


def finite(live: Groups) -> Tensor:
    """Whether all weights are finite, as a 0-dim tensor on the device of the first of them."""
    plain = [tensors for group in live if (tensors := _plain(group))]
    largest = [norm for tensors in plain for norm in torch._foreach_norm(tensors, ord=torch.inf)]
    device = live[0][0].device
    flags = [norm.isfinite().to(device) for norm in largest]
    return torch.stack(flags).all() if flags else torch.ones((), dtype=torch.bool, device=device)


def _plain(group: list[Tensor]) -> list[Tensor]:
    """The tensors as real ones of a dtype that has a norm; empty tensors have none and are left out."""
    # A parameter may have become a conjugate view since, which has no view as real numbers.
    real = [
        torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in group if t.numel()
    ]
    return [t.float() if t.element_size() == 1 else t for t in real]


def stepped(found_inf: Sequence[Tensor]) -> Tensor:
    """Whether at least one optimizer took its step, by the flags that a `GradScaler` left in them."""
    device = found_inf[0].device
    flags = [flag.reshape(()).to(device) == 0 for flag in found_inf]
    return torch.stack(flags).any()


class _Pending(NamedTuple):
    """A masked update whose verdicts the host does not know yet, and the moments to go back to."""

    stepped: Verdict | None
    finite: Verdict | None
    before: Moment
    called: Moment


class Guard:
    """Decides which calls count: none where no optimizer stepped, or where weights are not finite."""

    def __init__(self, live: ModelTensors, clock: UpdateClock, nonfinite: Nonfinite) -> None:
        wanted = '"allow", "skip" or "error"'
        require(nonfinite in get_args(Nonfinite), "nonfinite", nonfinite, wanted)
        self.skipped = 0
        self.nonfinite = nonfinite
        self.pending: _Pending | None = None
        self._live, self._clock = live, clock

    def counts(
        self,
        groups: Groups,
        since: tuple[int, float],
        found_inf: Sequence[Tensor],
        *,
        due: bool,
    ) -> tuple[bool, Tensor | None]:
        """Whether a call counts, as far as the host knows, and the flag that masks its update.

        `since` are calls and time with this call.
        """
        before = self._clock.now()
        took = stepped(found_inf) if found_inf else None
        if took is not None and not _deferred(took) and not took:
            return False, None
        called = before._replace(calls=since[0], elapsed=since[1])
        clean = finite(groups) if due and self.nonfinite != "allow" else None
        if clean is not None and not _deferred(clean) and not clean:
            self._live.copied_now()  # an update that is left out refuses another model too
            self._refuse(called)
            return False, None
        verdicts = [flag if flag is None else Verdict(flag) for flag in (took, clean)]
        self.pending = _Pending(verdicts[0], verdicts[1], before, called)
        return True, _both(took, clean)

    def hear(self) -> None:
        """Reads the verdicts of the call before, if there are any, and turns the clock back."""
        pending, self.pending = self.pending, None
        if pending is None:
            return
        if pending.stepped is not None and not pending.stepped.ask():
            self._clock.back_to(pending.before)
        elif pending.finite is not None and not pending.finite.ask():
            self._refuse(pending.called)

    def _refuse(self, called: Moment) -> None:
        """Leaves out an update of weights that are not finite; its time counts in the next one."""
        self._clock.back_to(called._replace(calls=0))
        if self.nonfinite == "error":
            raise FloatingPointError(
                f"update: {self._culprits()} not finite; the average is unchanged. Correct the "
                'weights or the training, or leave such updates out with nonfinite="skip"'
            )
        self.skipped += 1

    def _culprits(self) -> str:
        wrong = (item for item in self._live.averaged if not item.local().isfinite().all())
        names = [item.name for item in wrong]
        return f"{listed(names)} {'are' if len(names) > 1 else 'is'}" if names else "weights were"


def _deferred(flag: Tensor) -> bool:
    """Whether the host would have to wait for a flag."""
    return flag.device.type != "cpu"


def _both(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """The flags that the host does not know yet, as one; None if there is nothing to mask."""
    open_flags = [flag for flag in (a, b) if flag is not None and _deferred(flag)]
    return reduce(lambda a, b: a.logical_and(b.to(a.device)), open_flags) if open_flags else None
