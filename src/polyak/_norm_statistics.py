"""One norm with running statistics: what they were, and the mean of its batches' statistics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from polyak._checks import as_number, is_number
from polyak._engine.tracking import STATISTICS, walk

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


_COUNTER = "num_batches_tracked"


# A value that every float dtype holds exactly, and that the variances of all channels never have at
# once: a norm that still has it after a batch has not updated its statistics.
_UNMOVED = 95 / 128


def find_norms(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The norms to estimate, each once, by canonical name."""
    seen: set[int] = set()
    for prefix, module in walk(model, ""):
        if id(module) not in seen and _is_norm(module):
            yield prefix.removesuffix("."), module
        seen.add(id(module))


def _is_norm(module: nn.Module) -> bool:
    buffers = dict(module.named_buffers(recurse=False))
    momentum = getattr(module, "momentum", "none")
    return (
        all(leaf in buffers for leaf in STATISTICS)
        and (momentum is None or is_number(as_number(momentum)))
        and bool(getattr(module, "track_running_stats", True))
    )


class Norm:
    """A norm, its statistics before, and the mean of its batches' statistics so far."""

    def __init__(self, name: str, module: Any) -> None:
        self.label = f"{name or 'the model'} ({type(module).__name__})"
        self.module, self.momentum, self.calls = module, module.momentum, 0
        buffers = dict(module.named_buffers(recurse=False))
        self.buffers = {leaf: buffers[leaf] for leaf in (*STATISTICS, _COUNTER) if leaf in buffers}
        if any(is_lazy(buffer) or buffer.is_meta for buffer in self.buffers.values()):
            raise ValueError(
                f"{self.label} has no content yet (a lazy module, or the meta device): run a "
                "forward pass or load the model's weights first"
            )
        self.before = {leaf: buffer.clone() for leaf, buffer in self.buffers.items()}
        # At least float32: in bfloat16 the share of the 500th batch would be rounded away.
        self._means = [
            torch.zeros_like(
                buffers[leaf], dtype=torch.promote_types(buffers[leaf].dtype, torch.float32)
            )
            for leaf in STATISTICS
        ]

    def take(self, called: list[Norm], module: nn.Module, *_: object) -> None:
        """A forward hook: add the statistics of a batch, which a momentum of 1 has written to the buffers."""
        if module is not self.module:
            raise ValueError(
                f"a copy of {self.label} was called, as DataParallel makes them: give the module that "
                "it wraps, model.module"
            )
        called.append(self)
        self.calls += 1
        for mean, leaf in zip(self._means, STATISTICS, strict=True):
            mean.lerp_(module.get_buffer(leaf).to(mean.dtype), 1 / self.calls)

    def mark(self) -> None:
        """Write a mark, by which `check` finds that a norm does not update its statistics."""
        self.write(dict.fromkeys(self.buffers, torch.tensor(_UNMOVED)))

    def check(self, number: int) -> None:
        """Raise unless a batch left finite statistics, and left any. `number` is the batch's."""
        if not all(bool(mean.isfinite().all()) for mean in self._means):
            raise FloatingPointError(
                f"the statistics of {self.label} in batch {number} are not finite: check that batch "
                "and the weights"
            )
        if bool((self._means[1] == _UNMOVED).all()):
            raise ValueError(
                f"{self.label} kept its running statistics in batch {number}, wanted "
                "running <- (1 - momentum) running + momentum batch, with the momentum of 1 that "
                "was set; if the norm is frozen, set its track_running_stats = False"
            )

    def pool(self, group: ProcessGroup) -> None:
        """Combine the calls of all ranks: `mean = sum of calls * mean / sum of calls`."""
        # In float64, since the sum over ranks would round float32 means in an order of its own.
        sums = [self.calls * mean.double() for mean in self._means]
        calls = sums[0].new_tensor(self.calls)
        for each in (*sums, calls):
            torch.distributed.all_reduce(each, group=group)
        self.calls = int(calls)
        for mean, total in zip(self._means, sums, strict=True):
            mean.copy_(total / self.calls)

    def estimate(self) -> dict[str, Tensor]:
        """The new content of the norm's buffers."""
        contents = (*self._means, torch.tensor(self.calls))
        return dict(zip((*STATISTICS, _COUNTER), contents, strict=True))

    def write(self, contents: Mapping[str, Tensor]) -> None:
        """Write in place; where a norm has replaced its buffer, put the first one back."""
        for leaf, buffer in self.buffers.items():
            self.module._buffers[leaf] = buffer.copy_(contents[leaf])
