"""Model: the article's network as a function of one flat tensor of weights.

All operations on weights here are elementwise (Adam, averages, copies). So one flat tensor gives the same
bits as six small ones, with a sixth of the calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from polyak.study._data import Data
from polyak.study._settings import Settings

Metrics = dict[str, float]
Layers = list[tuple[Tensor, Tensor]]


def initial_weights(settings: Settings) -> list[Tensor]:
    """The article's initial weights and biases, drawn from torch's global generator.

    The layers are made first, as in any module, because that draws random numbers too.
    """
    widths = (settings.features, *settings.hidden, 1)
    linear = [nn.Linear(*sizes) for sizes in pairwise(widths)]
    for layer in linear:
        nn.init.xavier_normal_(layer.weight)
        nn.init.zeros_(layer.bias)
    return [p.detach() for layer in linear for p in (layer.weight, layer.bias)]


def views(flat: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """The consecutive parts of a flat tensor, with their shapes; they share its memory."""
    parts = torch.split(flat, [shape.numel() for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def as_layers(weights: Sequence[Tensor]) -> Layers:
    """(weight, bias) of each layer."""
    return list(zip(weights[::2], weights[1::2], strict=True))


def forward(layers: Layers, x: Tensor) -> Tensor:
    """The predictions (rows, 1) without dropout: linear layers with ReLU between them."""
    *hidden, (last_weight, last_bias) = layers
    for weight, bias in hidden:
        x = torch.relu_(functional.linear(x, weight, bias))
    return functional.linear(x, last_weight, last_bias)


class Probe:
    """Evaluates any flat weights on the validation set.

    It draws no random numbers, so evaluations cannot change a run.
    """

    def __init__(self, shapes: Sequence[torch.Size], data: Data) -> None:
        self._shapes = shapes
        self._data = data
        self._variance = float(data.valid_y.double().var(correction=0))

    def predict(self, flat: Tensor) -> Tensor:
        """The predictions (rows, 1) of flat weights for the validation set."""
        with torch.inference_mode():
            return forward(as_layers(views(flat, self._shapes)), self._data.valid_x)

    def judge(self, prediction: Tensor) -> Metrics:
        """MSE, MAE and R2 of predictions for the validation set."""
        mse = functional.mse_loss(prediction, self._data.valid_y).item()
        mae = functional.l1_loss(prediction, self._data.valid_y).item()
        return {"mse": mse, "mae": mae, "r2": 1 - mse / self._variance}

    def evaluate(self, flat: Tensor) -> Metrics:
        """MSE, MAE and R2 of flat weights on the validation set."""
        return self.judge(self.predict(flat))
