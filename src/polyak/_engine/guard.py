"""Guards: steps that must not count, told by a device and not waited for at once.

A scaler that skipped a step and weights that are not finite are known on the device first. There the
update is masked at once, without asking; the host hears of it at the next call and takes the clock
back. It waits there for the update before at most, so it runs one step ahead and no further. On the CPU the answer is there at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from polyak._tensors import Groups


class Verdict:
    """A yes or no computed on a device; `ask` waits only if the copy to the host is under way."""

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
    """Real tensors of a dtype that has a norm, without empty ones, which have none."""
    real = [torch.view_as_real(t) if t.is_complex() else t for t in group if t.numel()]
    return [t.float() if t.element_size() == 1 else t for t in real]


def stepped(found_inf: Sequence[Tensor]) -> Tensor:
    """Whether at least one optimizer took its step, from what a `GradScaler` left in each."""
    device = found_inf[0].device
    flags = [flag.reshape(()).to(device) == 0 for flag in found_inf]
    return torch.stack(flags).any()


class Attachment:
    """Hooks on optimizers that call back once each of them has taken its step."""

    def __init__(
        self,
        optimizers: Sequence[torch.optim.Optimizer],
        scaler: Any,
        step: Callable[[list[Tensor]], None],
        before: Callable[[], None],
        after: Callable[[], None],
    ) -> None:
        if not optimizers or len({id(optimizer) for optimizer in optimizers}) < len(optimizers):
            raise ValueError(
                f"attach: {len(optimizers)} optimizers, wanted one or more, each of them once"
            )
        self._expected = {id(optimizer) for optimizer in optimizers}
        self._scaler = scaler
        self._step = step
        self._after = after
        self._found: dict[int, Tensor | None] = {}
        self._handles = [o.register_step_post_hook(self._after_step) for o in optimizers]
        self._handles += [o.register_step_pre_hook(lambda *_: before()) for o in optimizers]

    def remove(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._after()

    @property
    def active(self) -> bool:
        """Whether the hooks are on."""
        return bool(self._handles)

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and self._scaler is None:
            raise RuntimeError(
                "a GradScaler drives this fused optimizer, whose hooks run on skipped steps too: "
                "give it to attach(optimizer, scaler)"
            )
        self._found[id(optimizer)] = found_inf
        if self._found.keys() == self._expected:
            flags = [flag for flag in self._found.values() if flag is not None]
            certain = len(flags) < len(self._found)  # an optimizer without a flag did step
            self._found = {}
            self._step([] if certain else flags)
