"""Tensors that an update copies and does not average: integers and most buffers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import attrgetter

import torch
from torch import Tensor

from polyak import _tensors as tensors
from polyak._engine.live import ModelTensors
from polyak._engine.tracking import named
from polyak._modes import ordinary

_DTYPE = attrgetter("dtype")


class Copies:
    """The copied tensors of a model as of the last update, in the order of `ModelTensors.copied`."""

    def __init__(self, live: ModelTensors, device: torch.device | None) -> None:
        self.tensors: list[Tensor] = []
        self._live, self._device = live, device

    def sources(self) -> list[Tensor]:
        """The model's tensors, for which there are copies of their shapes and dtypes then.

        Raises what `ModelTensors.copied_now` raises.
        """
        now = self._live.copied_now()
        if list(map(_DTYPE, self.tensors)) != list(map(_DTYPE, now)):  # a copy would be rounded
            pairs = zip(self.tensors, now, strict=True)
            self.tensors = [a.to(b.dtype) for a, b in pairs] if self.tensors else self._empty(now)
        return now

    def take_(self, sources: list[Tensor], ok: Tensor | None = None) -> None:
        """Copies the sources, or leaves all as it is where `ok` is a False that only a device knows."""
        if not sources:
            return
        if ok is not None:
            pairs = zip(self.tensors, sources, strict=True)
            sources = [torch.where(ok.to(b.device), b, a.to(b.device, b.dtype)) for a, b in pairs]
        tensors.lerp_(self.tensors, sources, 1.0)

    def state(self) -> dict[str, Tensor]:
        """name -> copy."""
        return named(self._live.copied if self.tensors else [], self.tensors)

    def taken(self, given: Mapping[str, Tensor]) -> dict[str, object]:
        """The attributes of this object with copies of tensors that were checked."""
        if not given:
            return {"tensors": []}
        filled = self._empty(self.tensors or [item.local() for item in self._live.copied])
        tensors.lerp_(filled, [given[item.name] for item in self._live.copied], 1.0)
        return {"tensors": filled}

    def moved(self, device: torch.device | None) -> dict[str, object]:
        """The attributes of this object on another device; None leaves it where it is."""
        there = [tensor.to(device or tensor.device) for tensor in self.tensors]
        return {"tensors": there, "_device": device or self._device}

    @ordinary
    def _empty(self, like: Sequence[Tensor]) -> list[Tensor]:
        return [torch.empty_like(t, device=self._device) for t in like]
