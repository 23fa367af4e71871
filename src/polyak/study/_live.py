"""Live: the live weights, with torch's Adam and plateau schedule.

The training equals that of the plain script (`benchmarks/plain_article.py`) bit for bit, in a third of its
time: one flat parameter, no loader, no synchronisation in each step.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.optim.adam import adam

from polyak.study._data import Data, shuffled
from polyak.study._gradient import loss_and_gradient
from polyak.study._model import as_layers, initial_weights, views
from polyak.study._settings import Settings


class Live:
    """The live weights of a run, their optimizer and the schedule of their learning rate."""

    def __init__(self, settings: Settings, data: Data) -> None:
        self._data = data
        self._settings = settings
        weights = initial_weights(settings)
        self.shapes = [w.shape for w in weights]
        self.flat = torch.cat([w.reshape(-1) for w in weights])
        self.flat.grad = self._gradient = torch.zeros_like(self.flat)
        self._layers = as_layers(views(self.flat, self.shapes))
        self._gradients = as_layers(views(self._gradient, self.shapes))
        self._optimizer = torch.optim.Adam(
            [self.flat], lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        self._schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(
            self._optimizer, factor=settings.lr_factor, patience=settings.lr_patience
        )

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next step."""
        return float(self._optimizer.param_groups[0]["lr"])

    def judged(self, loss: float) -> None:
        """Gives the schedule the validation loss of an epoch."""
        self._schedule.step(loss)

    def train_epoch(self, after_step: Callable[[], None]) -> float:
        """Trains one epoch and returns the mean training loss of its batches."""
        losses = []
        dropout = self._settings.dropout
        for x, y in shuffled(self._data, self._settings.batch_size):
            losses.append(loss_and_gradient(self._layers, self._gradients, x, y, dropout))
            self._step()
            after_step()
        return float(sum(torch.stack(losses).tolist()) / len(losses))

    def _step(self) -> None:
        """A step of Adam by its functional form: the hooks of `Adam.step` cost more than Adam itself."""
        state, group = self._optimizer.state[self.flat], self._optimizer.param_groups[0]
        if not state:
            self._optimizer.step()
            return
        beta1, beta2 = group["betas"]
        adam(
            [self.flat],
            [self._gradient],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [state["step"]],
            foreach=False,
            amsgrad=False,
            maximize=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
        )
