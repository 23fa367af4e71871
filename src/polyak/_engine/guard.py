"""Guards: updates that must not count, which a device knows of before the host does.

That a scaler skipped a step, or that weights are not finite, is known on the device first. The update
is masked there at once. The host learns the result at the next call and rolls the counters back: it
waits for the update before at most, so it runs one step ahead and no further. On the CPU it learns
the result at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from polyak._tensors import Groups


class Verdict:
    """A yes or no computed on a device; `ask` waits only while its copy to the host is under way."""

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
