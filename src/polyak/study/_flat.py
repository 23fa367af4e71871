"""The tensors of a network joined into a few long ones, so that one operation serves all of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from polyak._engine.tracking import is_statistic
from polyak._tensors import lerp_

K = TypeVar("K")
Weights = dict[str, Tensor]


class Flat:
    """Copies of named tensors, joined into one tensor for each dtype; the first `batch` dimensions stay.

    Running statistics are joined apart: some averages read them with other coefficients.
    """

    def __init__(self, source: Weights, batch: int = 0) -> None:
        self._source = list(source.values())
        self._batch = batch
        self._groups: dict[str, Weights] = {}
        for name, tensor in source.items():
            # An averager knows a running statistic by the last part of its name.
            kind = "running_var" if is_statistic(name) else "weight"
            self._groups.setdefault(f"{tensor.dtype}.{kind}", {})[name] = tensor
        self.tensors = {
            group: joined(named.values(), batch) for group, named in self._groups.items()
        }
        views = self.split(self.tensors)
        self.views = {name: views[name] for name in source}

    def take(self, source: Sequence[Tensor] | None = None) -> None:
        """Copy the tensors again; `source` are others of the same shapes."""
        lerp_(list(self.views.values()), list(source or self._source), 1.0)

    def split(self, tensors: Weights) -> Weights:
        """name -> its part of joined tensors, in its own shape and dtype."""
        split = {}
        for group, named in self._groups.items():
            shapes = [tensor.shape[self._batch :] for tensor in named.values()]
            parts = tensors[group].split([shape.numel() for shape in shapes], -1)
            for (name, like), part, shape in zip(named.items(), parts, shapes, strict=True):
                split[name] = part.view(part.shape[:-1] + shape).to(like.dtype)
        return split


def called_with(model: nn.Module, weights: Weights, inputs: Any, options: Any = None) -> Any:
    """Call a model with other tensors, given by their first names.

    torch.func gets every place of a tied tensor, with a module that is used twice as one place. If it
    exchanged a tensor there twice, it would put back only one.
    """
    first = first_names(model)
    places = {
        place: weights[first[id(tensor)]]
        for prefix, module in model.named_modules()
        for own in (module.named_parameters, module.named_buffers)
        for place, tensor in own(prefix, recurse=False, remove_duplicate=False)
    }
    return functional_call(model, places, inputs, options, tie_weights=False)


def first_names(model: nn.Module) -> dict[int, str]:
    """The id of each tensor of a model -> its first name; a buffer that is a parameter, too, has that one's."""
    tensors = (*model.named_buffers(), *model.named_parameters())
    return {id(tensor): name for name, tensor in tensors}


def joined(tensors: Iterable[Tensor], batch: int = 0) -> Tensor:
    """Tensors as one, detached; the first `batch` dimensions, which all have, stay."""
    return torch.cat([t.detach().reshape(*t.shape[:batch], -1) for t in tensors], -1)


def some_runs(tensors: Mapping[K, Tensor], rows: Tensor) -> dict[K, Tensor]:
    """The tensors of some of the runs of a stack."""
    return {key: tensor[rows] for key, tensor in tensors.items()}
