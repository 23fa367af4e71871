"""Tensors that are known before their content is read."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch
from torch import Tensor


class TensorSpec(NamedTuple):
    """The shape and dtype of a tensor: all that is known of it before its content is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """The bytes of the content."""
        return self.dtype.itemsize * prod(self.shape)

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} of shape {self.shape}"


def spec_of(tensor: Tensor) -> TensorSpec:
    """The spec of a tensor."""
    return TensorSpec(tuple(tensor.shape), tensor.dtype)
