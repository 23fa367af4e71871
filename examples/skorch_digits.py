"""skorch on sklearn's digits: a callback that averages, and judges the average after every epoch.

    python examples/skorch_digits.py 10                so many epochs

skorch has no average of its own. With this callback the history has `ema_loss` beside `valid_loss`.
A net that was pickled and loaded takes the average by `averager_.copy_to(net.module_)`.
"""

import sys

import torch
from sklearn.datasets import load_digits
from skorch import NeuralNetClassifier
from skorch.callbacks import Callback, EarlyStopping
from torch import nn

from polyak import Averager


class Average(Callback):
    def __init__(self, rule):
        self.rule = rule

    def initialize(self):
        self.averager_ = None  # `fit` begins anew, and `partial_fit` goes on
        return self

    def on_train_begin(self, net, **_):
        self.averager_ = self.averager_ or Averager(net.module_, {"ema": self.rule})
        self.attachment_ = self.averager_.attach(net.optimizer_)

    def on_epoch_end(self, net, dataset_valid, **_):
        if dataset_valid is None:  # as with `train_split=None`
            return
        with self.averager_.applied():
            found = [net.validation_step(batch) for batch in net.get_iterator(dataset_valid)]
        losses = [each["loss"].item() * len(each["y_pred"]) for each in found]
        net.history.record("ema_loss", sum(losses) / len(dataset_valid))

    def on_train_end(self, *_, **__):
        self.attachment_.remove()


class Digits(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10))


torch.manual_seed(0)
images, labels = (load_digits().data / 16).astype("float32"), load_digits().target
average = Average("exponential(half_life=40)")
net = NeuralNetClassifier(
    Digits, criterion=nn.CrossEntropyLoss, lr=0.3, batch_size=32, max_epochs=int(sys.argv[1]),
    callbacks=[average, EarlyStopping(monitor="ema_loss", patience=3)],
)  # fmt: skip
net.fit(images[:1200], labels[:1200])
print(f"live: test accuracy {net.score(images[1200:], labels[1200:]):.4f}")
with average.averager_.applied():
    print(f"ema: test accuracy {net.score(images[1200:], labels[1200:]):.4f}")
