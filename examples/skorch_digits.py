"""skorch on sklearn's digits: a callback that averages, and judges the average after every epoch.

    python examples/skorch_digits.py 10                so many epochs

skorch has no average of its own: this callback is all that a net needs. Its history gets `ema_loss`
beside `valid_loss`, and what monitors the one can monitor the other.
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

    def on_train_begin(self, net, **_):
        self.averager_ = Averager(net.module_, {"ema": self.rule})
        self.attachment_ = self.averager_.attach(net.optimizer_)

    def on_epoch_end(self, net, dataset_valid, **_):
        with self.averager_.applied():
            found = [net.validation_step(batch) for batch in net.get_iterator(dataset_valid)]
        sizes = torch.tensor([len(each["y_pred"]) for each in found])
        losses = torch.stack([each["loss"] for each in found])
        net.history.record("ema_loss", ((losses * sizes).sum() / sizes.sum()).item())

    def on_train_end(self, *_, **__):
        self.attachment_.remove()


class Digits(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10))


torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
average = Average("exponential(half_life=40)")
net = NeuralNetClassifier(
    Digits, criterion=nn.CrossEntropyLoss, lr=0.3, batch_size=32, max_epochs=int(sys.argv[1]),
    callbacks=[average, EarlyStopping(monitor="ema_loss", patience=3)],
)  # fmt: skip
net.fit(images[:1200].astype("float32") / 16, labels[:1200])
test = images[1200:].astype("float32") / 16, labels[1200:]
print(f"live: test accuracy {net.score(*test):.4f}")
with average.averager_.applied():
    print(f"ema: test accuracy {net.score(*test):.4f}")
