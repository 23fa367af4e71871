"""Ties: the names of a checkpoint that mean one tensor."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from polyak.checkpoints._checkpoint import Checkpoint, Weights
from polyak.checkpoints._tensorfile import Form, forms

Place = tuple[int, torch.Size, tuple[int, ...]]


def place(tensor: Tensor) -> Place:
    """Where a tensor's content lies, which tied ones share; it holds while the tensor does."""
    return tensor.data_ptr(), tensor.shape, tensor.stride()


def distinct(found: Checkpoint, weights: Weights) -> dict[str, Form]:
    """The form of each of a checkpoint's tensors, of tied ones under their first name."""
    known = forms(weights)
    if found.dtypes:
        return {name: known[name] for name in known if name in found.dtypes}
    if not known or not _holds(weights, known):
        return dict(known)
    kept: dict[Place | str, str] = {}
    for name, each in known.items():
        kept.setdefault(place(weights[name]) if each.nbytes else name, name)
    return {name: known[name] for name in kept.values()}


def _holds(weights: Weights, known: Mapping[str, Form]) -> bool:
    """Whether the tensors stay where they are; those made when asked for share their addresses."""
    small = min(known, key=lambda name: known[name].nbytes)
    return weights[small] is weights[small]
