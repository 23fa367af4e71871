"""Gradient: the training loss and its gradient, written out for a network of linear layers.

Autograd gives the same bits (`tests/test_study_trainer.py`) but takes 1.4 times as long: for such small
tensors, most of a step is the overhead of each operation.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from polyak.study._model import Layers


def loss_and_gradient(
    layers: Layers, gradient: Layers, x: Tensor, y: Tensor, dropout: float
) -> Tensor:
    """The mean squared error of a batch; writes its gradient into `gradient`, shaped like `layers`.

    The dropout masks come from torch's global generator, in the order of a forward pass.
    """
    *hidden, (last_weight, last_bias) = layers
    inputs = [x]
    for weight, bias in hidden:
        active = torch.relu_(functional.linear(inputs[-1], weight, bias))
        inputs.append(torch.dropout(active, dropout, True))
    prediction = functional.linear(inputs[-1], last_weight, last_bias)
    # d loss / d prediction, then backward through each layer. The input of a layer is 0 where ReLU or
    # dropout made it 0, so it also tells where the gradient is 0.
    error = torch.sub(prediction, y).mul_(2 / y.numel())
    for i in range(len(layers) - 1, -1, -1):
        weight_gradient, bias_gradient = gradient[i]
        torch.mm(error.t(), inputs[i], out=weight_gradient)
        torch.sum(error, 0, out=bias_gradient)
        if i:
            error = torch.mm(error, layers[i][0]).mul_(1 / (1 - dropout)).mul_(inputs[i] > 0)
    return functional.mse_loss(prediction, y)
